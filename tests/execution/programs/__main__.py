"""Many programs; those that fail are printed, shrunk."""

from __future__ import annotations

import argparse
import random
import sys

import torch

from .checking import check
from .making import make


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="how many programs")
    parser.add_argument("--seed", type=int, help="of the first; else a fresh one")
    parser.add_argument("--show", action="store_true", help="print the programs instead of running them")
    parser.add_argument("--stop", type=int, default=10, help="after so many that fail")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = random.SystemRandom().randrange(10**9) if arguments.seed is None else arguments.seed
    wrong = 0
    for seed in range(start, start + arguments.count):
        if arguments.show:
            print(make(seed))
        elif message := check(seed):
            wrong += 1
            print(message, flush=True)
            if wrong == arguments.stop:
                break
    print(f"seeds {start} to {seed}: {wrong} failed")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
