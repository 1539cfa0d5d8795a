"""Random programs: a small model, and instructions that run it and change it in any order, against the definitions.

`python -m tests.execution.programs --count 10000 --seed 7` runs many. One that fails is shrunk and printed.

A program is data: tuples of names, numbers and tuples. Its passes are *plans*, which call layers one after another, side by
side, under checkpoints, while something is changed. `AdaptedMachine` runs a plan on the adapted model, `PlainMachine` on the
model without adapters, where the weight of every layer is W' by `definitions` at the time of the call.
"""
