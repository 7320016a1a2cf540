"""Two decode steps of two rows, eager, and then captured: what the sanitizer watches."""

from benchmarking.shapes import random_llama
from checking_gpu.decode import eager
from checking_gpu.models import TINY
from npllama.backend import get_backend


def main() -> None:
    """Each dtype that has a kernel of its own."""
    for dtype in ("float16", "int8"):
        captured = random_llama(TINY, get_backend("cupy"), dtype, 64)
        for llama in filter(None, (eager(captured), captured)):
            prompts = [[5, 6, 7], [8, 9]]
            llama.generate_batch(prompts, max_new_tokens=4, temperature=0, ignore_eos=True)
            llama.generate_batch(prompts, max_new_tokens=4, seed=1, top_k=9, ignore_eos=True)
    print("launched")


if __name__ == "__main__":
    main()
