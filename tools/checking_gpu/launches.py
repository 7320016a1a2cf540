"""Runs a few decode steps, eager and captured, greedy and sampled, for the sanitizer to check."""

import sys
from collections.abc import Sequence

from benchmarking.shapes import random_llama
from checking_gpu.decode import eager
from checking_gpu.models import TINY
from npllama.backend import get_backend

PROMPTS = [[5, 6, 7], [8, 9]]
DTYPES = ("float16", "int8")
"""The dtypes that have their own kernels."""


def main(dtypes: Sequence[str]) -> None:
    """Run the steps for each dtype."""
    for dtype in dtypes:
        captured = random_llama(TINY, get_backend("cupy"), dtype, 64)
        for llama in (eager(captured), captured):
            llama.generate_batch(PROMPTS, max_new_tokens=4, temperature=0, ignore_eos=True)
            llama.generate_batch(PROMPTS, max_new_tokens=4, seed=1, top_k=9, ignore_eos=True)
    print("launched")


if __name__ == "__main__":
    main(sys.argv[1:] or DTYPES)
