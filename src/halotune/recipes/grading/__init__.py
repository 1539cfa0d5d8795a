"""Whether a written answer to a problem of mathematics is right.

Two rules, and every report says which one it used:

- `strict`: math-verify, on what lm-eval's tasks `gsm8k` (flexible-extract) and `minerva_math` (math_verify) look at.
- `paper`: the rules by which the figures of the HRA paper were made, with their defects (`paper.py` lists them).
"""
