"""The rows that --stats shows about a model and a generation."""

from npllama.completion import Timings
from npllama.console import tell
from npllama.llama import Llama


def describe_context(llama: Llama) -> str:
    """The context, the longest context of the model, and the RoPE scaling."""
    config, scaling = llama.config, llama.config.rope_scaling
    text = f"{llama.context} of the model's {config.longest_context} tokens"
    if scaling is None:
        return text
    off = scaling.kind == "dynamic" and llama.context <= config.context_length
    state = f"not used up to {config.context_length}" if off else f"factor {scaling.factor:g}"
    return f"{text}; RoPE scaling {scaling.kind}, {state}"


def stats(llama: Llama, timings: Timings, finish: str, seed: int) -> dict[str, str]:
    """Name -> value: speed, memory and the settings that reproduce the text.

    Args:
        timings: the timings of the generation.
        finish: the reason why it ended.
        seed: the seed of its random numbers.
    """
    t = timings
    gb_per_forward = llama.bytes_per_forward / 1e9  # a forward pass reads them once
    peak = llama.backend.peak_bytes()
    memory = f"weights {llama.parameters.nbytes / 1e6:.1f} MB"
    if peak is not None:
        memory += f", peak {peak / 1e6:.1f} MB"
        if peak < llama.parameters.nbytes:  # mapped files, such as unused rows of the embedding
            memory += " (some weights were never read)"
    backend = [llama.backend.device_name()]
    if llama.backend.no_gpu is not None:
        backend.append(llama.backend.no_gpu)
    return {
        "time to first token": f"{t.first_token_seconds * 1e3:.1f} ms",
        "prefill": f"{t.prompt_tokens} tokens, {t.prefill_tokens_per_second:.1f} tokens/s, "
        f"{t.prefill_forwards * gb_per_forward / max(t.prefill_seconds, 1e-9):.2f} GB/s",
        "decode": f"{t.decode_tokens} tokens, {t.decode_tokens_per_second:.1f} tokens/s, "
        f"{t.decode_steps * gb_per_forward / max(t.decode_seconds, 1e-9):.2f} GB/s",
        "memory": memory,
        "context": describe_context(llama),
        "backend": f"{llama.backend.name} ({'; '.join(backend)})",
        "dtype": llama.dtype,
        "finish": finish,
        "seed": str(seed),
    }


def print_rows(rows: dict[str, str]) -> None:
    """Write names and values to standard error, one line each."""
    for name, value in rows.items():
        tell(f"{name:<20} {value}")
