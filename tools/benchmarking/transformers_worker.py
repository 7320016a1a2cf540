"""Runs Hugging Face transformers in a separate process, for tools/benchmark.py.

Apart from make_reference.py and tools/checking_gpu, only this program imports torch. The first
line on standard input is the job as JSON (config, dtype, threads, prompts, new_tokens). Each
further line requests a run. The program answers each line with a line of JSON. It ends when its
input is closed.
"""

import json
import os
import sys
import time


def main() -> None:
    """Serve runs until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of the libraries must not mix with the answers
    job = json.loads(sys.stdin.readline())
    import torch
    import transformers

    torch.set_num_threads(job["threads"])
    transformers.logging.set_verbosity_error()
    config = transformers.LlamaConfig(**job["config"])
    torch.set_default_dtype(getattr(torch, job["dtype"]))  # the weights are created in it
    model = transformers.LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    _answer(answers, {"versions": versions})
    for _request in sys.stdin:
        with torch.inference_mode():
            _answer(answers, run(model, job["prompts"], job["new_tokens"]))


def run(model, prompts: list[list[int]], new_tokens: int) -> dict[str, float]:  # noqa: ANN001
    """Seconds to read the prompts, and seconds for all further tokens: greedy, with the KV cache,
    and with the head only on the last position. `generate` would add its bookkeeping to each
    step."""
    import torch

    width = max(map(len, prompts))
    padded = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    is_ragged = not bool(mask.all())  # a mask costs time, so a single prompt has none

    def forward(tokens: torch.Tensor, past=None):  # noqa: ANN001
        masked = {}
        if is_ragged:
            places = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            masked = {"attention_mask": mask, "position_ids": places}
        out = model(
            input_ids=tokens, past_key_values=past, use_cache=True, logits_to_keep=1, **masked
        )
        chosen = out.logits[:, -1].argmax(-1, keepdim=True)  # (B, 1, V) -> (B, 1)
        chosen.tolist()  # a caller needs the ids; on a device this also waits
        return chosen, out.past_key_values

    begin = time.perf_counter()
    tokens, past = forward(padded)
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        tokens, past = forward(tokens, past)
    return {"prefill_seconds": first - begin, "decode_seconds": time.perf_counter() - first}


def _answer(answers, message: dict) -> None:  # noqa: ANN001
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
