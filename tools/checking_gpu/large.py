"""Decoding with models that fill an 80 GB GPU: 13b in float16, 34b in int8."""

import sys

from checking_gpu.decode import Case, run_cases
from checking_gpu.stage import Stage, main

CASES = {
    ("13b", "float16"): (Case(512), Case(3500)),
    ("34b", "int8"): (Case(512), Case(3500)),
}


def run(stage: Stage) -> None:
    """Add one row per case."""
    run_cases(stage, CASES)


if __name__ == "__main__":
    sys.exit(main("large", run))
