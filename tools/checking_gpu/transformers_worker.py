"""Decodes with Hugging Face transformers on a GPU, in a separate process started by rival.py.

The argument is the job as JSON. The last output line is JSON with the seconds per token.
"""

import json
import statistics
import sys
import time

import torch
import transformers

RUNS = 3
UNSTEADY = 8
"""Number of steps at the start of a run that are not timed, because graphs are captured in them."""


def main() -> None:
    """Make a model with random weights, and decode as the job says."""
    job = json.loads(sys.argv[1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    transformers.logging.set_verbosity_error()
    config = transformers.LlamaConfig(**job["config"])
    torch.set_default_dtype(getattr(torch, job["dtype"]))
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    n_new = job["new_tokens"]
    ids = torch.randint(3, config.vocab_size, (1, job["context"] - n_new), device=device)
    run = {"eager": eager, "compiled": compiled}[job["way"]]
    with torch.inference_mode():
        run(model, ids, n_new)  # warms up and compiles
        seconds = statistics.median(run(model, ids, n_new) for _ in range(RUNS))
    versions = f"{transformers.__version__}, torch {torch.__version__}"
    print(json.dumps({"seconds": seconds, "versions": versions}))


def eager(model, ids, n_new: int) -> float:  # noqa: ANN001
    """Seconds per token of a loop with a growing cache. `generate` would add its bookkeeping to
    each step."""
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    token, past = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
    token.tolist()
    begin = time.perf_counter()
    for _ in range(n_new - 1):
        out = model(input_ids=token, past_key_values=past, use_cache=True, logits_to_keep=1)
        token, past = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
        token.tolist()  # a caller needs the id
    return (time.perf_counter() - begin) / (n_new - 1)


def compiled(model, ids, n_new: int) -> float:  # noqa: ANN001
    """Seconds per token of `generate` with a static cache, for which it compiles the model."""
    times = []

    def look(input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        input_ids[:, -1].tolist()
        times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    out = model.generate(
        ids,
        max_new_tokens=n_new,
        min_new_tokens=n_new,
        do_sample=False,
        cache_implementation="static",
        pad_token_id=0,
        stopping_criteria=transformers.StoppingCriteriaList([look]),
    )
    assert out.shape[1] == ids.shape[1] + n_new
    first = min(UNSTEADY, n_new - 2)
    return (times[-1] - times[first]) / (len(times) - 1 - first)


if __name__ == "__main__":
    main()
