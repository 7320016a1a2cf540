"""Runs tools/equivalence.py on the shipped model: tables in equivalence.txt, the worst as rows."""

import sys

from checking_gpu.results import BELOW, OK
from checking_gpu.stage import Stage, main
from comparing.table import as_text, worst_of
from comparing.tolerance import tolerance
from equivalence import PROMPT, compare
from npllama.backend import get_backend
from npllama.llama import SHIPPED
from npllama.weight_formats import FORMATS


def run(stage: Stage) -> None:
    """Add one row per dtype and per implementation on CuPy."""
    for dtype in ("float16",) if stage.tiny else tuple(FORMATS):
        stage.attempt(dtype, _compare, stage, dtype)


def _compare(stage: Stage, dtype: str) -> None:
    backends = [get_backend("numpy"), stage.backend()]
    n_tokens, prompt = (3, "Once") if stage.tiny else (32, PROMPT)
    truth, found = compare(SHIPPED, dtype, prompt, n_tokens, backends)
    with (stage.results.directory / "equivalence.txt").open("a") as file:
        file.write(as_text(f"shipped model, {dtype} weights", truth, found) + "\n\n")
    for d in found[2:]:
        parts, is_ok = [], True
        for kind, phase in d.phases.items():
            name, layer, worst = worst_of(phase)
            parts.append(f"{kind}: {worst:.1e} ({name}, layer {layer}), logits {phase.logits:.1e}")
            is_ok = is_ok and all(
                max(layers) <= tolerance("cupy", dtype, operation, kind)
                for operation, layers in phase.operations.items()
            )
        figure = f"{'; '.join(parts)}; greedy ids {d.equal_ids} of {len(truth.ids)}"
        kernels = " with kernels" if d.kernels else ""
        name = f"{d.name}{kernels}, {dtype}"
        stage.add(name, figure, "the tests' tolerances", OK if is_ok else BELOW)


if __name__ == "__main__":
    sys.exit(main("equivalence", run))
