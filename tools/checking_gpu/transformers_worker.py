"""Hugging Face transformers decoding on a GPU, in a process of its own: a job as JSON is its
argument, and its last line is JSON with the seconds a token. rival.py starts it."""

import json
import statistics
import sys
import time

import torch
import transformers

NEW_TOKENS, FEW = 64, 16


def main() -> None:
    """Make a model of random weights, and decode as the job says."""
    job = json.loads(sys.argv[1])
    transformers.logging.set_verbosity_error()
    config = transformers.LlamaConfig(**job["config"])
    torch.set_default_dtype(getattr(torch, job["dtype"]))
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    n_prompt = job["context"] - NEW_TOKENS
    ids = torch.randint(3, config.vocab_size, (1, n_prompt), device="cuda")
    with torch.inference_mode():
        seconds = {"eager": eager, "compiled": compiled}[job["way"]](model, ids)
    versions = f"{transformers.__version__}, torch {torch.__version__}"
    print(json.dumps({"seconds": seconds, "versions": versions}))


def eager(model, ids) -> float:  # noqa: ANN001
    """The plain loop over forwards with a cache; `generate` would add its own bookkeeping."""

    def run(new_tokens: int) -> float:
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        token, past = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
        token.tolist()
        begin = time.perf_counter()
        for _ in range(new_tokens):
            out = model(input_ids=token, past_key_values=past, use_cache=True, logits_to_keep=1)
            token, past = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
            token.tolist()  # a caller needs it
        return (time.perf_counter() - begin) / new_tokens

    run(4)
    return statistics.median(run(NEW_TOKENS) for _ in range(3))


def compiled(model, ids) -> float:  # noqa: ANN001
    """`generate` with a static cache, which compiles the forward; two lengths, of which the
    difference is decoding alone."""

    def run(new_tokens: int) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        out = model.generate(
            ids,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            cache_implementation="static",
            pad_token_id=0,
        )
        torch.cuda.synchronize()
        assert out.shape[1] == ids.shape[1] + new_tokens
        return time.perf_counter() - begin

    for n in (NEW_TOKENS, NEW_TOKENS, FEW, FEW):  # each length has a cache, and a compilation
        run(n)
    few, many = (statistics.median(run(n) for _ in range(3)) for n in (FEW, NEW_TOKENS))
    return (many - few) / (NEW_TOKENS - FEW)


if __name__ == "__main__":
    main()
