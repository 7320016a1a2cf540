"""Write tests/fixtures/hf: small random checkpoints, and what Hugging Face computes on them.

    pip install -e '.[reference]'
    python tools/make_reference.py

Each checkpoint is what save_pretrained writes. Beside it, expected.safetensors holds the
result of transformers on the stored weights widened to float64: logits, every layer's hidden
state, and the greedy continuation. The tests need the files alone, not torch.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

DEST = Path(__file__).parent.parent / "tests" / "fixtures" / "hf"
PROMPT_TOKENS = 24
NEW_TOKENS = 16
BASE = {
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": 52,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}

# name -> (config, storage dtype, RMS of the embeddings, largest shard)
CASES = {
    "mha": ({"num_key_value_heads": 6}, torch.float32, 1.0, "5GB"),
    "gqa": ({}, torch.float32, 1.0, "5GB"),
    "mqa": ({"num_key_value_heads": 1}, torch.float32, 1.0, "5GB"),
    "tied": ({"tie_word_embeddings": True}, torch.float32, 1.0, "5GB"),
    "theta-1e6": ({"rope_theta": 1e6}, torch.float32, 1.0, "5GB"),
    "eps-1e-6": ({"rms_norm_eps": 1e-6}, torch.float32, 0.003, "5GB"),
    "bfloat16": ({}, torch.bfloat16, 1.0, "5GB"),
    "float16": ({}, torch.float16, 1.0, "5GB"),
    "sharded": ({"num_hidden_layers": 3}, torch.float32, 1.0, "60KB"),
}


def make_model(
    seed: int, changes: dict, dtype: torch.dtype, embedding_rms: float
) -> LlamaForCausalLM:
    """Weights large enough that attention is far from uniform; norms away from 1."""
    fields = BASE | changes
    theta = fields.pop("rope_theta")
    config = LlamaConfig(**fields, rope_parameters={"rope_type": "default", "rope_theta": theta})
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim == 1:
                tensor.copy_(1 + 0.2 * noise)
            elif "embed_tokens" in name:
                tensor.copy_(embedding_rms * noise)
            else:
                tensor.copy_(1.5 * noise / tensor.shape[1] ** 0.5)
    return model.to(dtype)


@torch.no_grad()
def compute(model: LlamaForCausalLM, ids: list[int]) -> dict[str, np.ndarray]:
    """Logits (T, V), hidden (L+1, T, D) without the final norm, and the greedy ids."""
    model = model.double().eval()
    hidden = [model.model.embed_tokens(torch.tensor(ids))]
    hooks = [
        layer.register_forward_hook(
            lambda _module, _inputs, output: hidden.append(
                (output[0] if isinstance(output, tuple) else output).reshape(len(ids), -1)
            )
        )
        for layer in model.model.layers
    ]
    logits = model(torch.tensor([ids])).logits[0]
    for hook in hooks:
        hook.remove()
    greedy = list(ids)
    for _ in range(NEW_TOKENS):
        greedy.append(int(model(torch.tensor([greedy])).logits[0, -1].argmax()))
    return {
        "ids": np.array(ids, dtype=np.int64),
        "logits": logits.numpy(),
        "hidden": torch.stack(hidden).numpy(),
        "greedy": np.array(greedy[len(ids) :], dtype=np.int64),
    }


def main() -> None:
    """Write every case."""
    print(f"torch {torch.__version__}, transformers {transformers.__version__}", file=sys.stderr)
    shutil.rmtree(DEST, ignore_errors=True)
    for seed, (name, (changes, dtype, rms, shard)) in enumerate(CASES.items()):
        model = make_model(seed, changes, dtype, rms)
        directory = DEST / name
        model.save_pretrained(directory, max_shard_size=shard)
        # as a newcomer's copy would be read: from the files, not from the object in memory
        model = LlamaForCausalLM.from_pretrained(directory, dtype=dtype)
        ids = np.random.default_rng(seed).integers(3, BASE["vocab_size"], PROMPT_TOKENS)
        expected = compute(model, [1, *ids.tolist()])
        safetensors.numpy.save_file(expected, directory / "expected.safetensors")
    size = sum(path.stat().st_size for path in DEST.rglob("*") if path.is_file())
    print(f"wrote {len(CASES)} cases under {DEST}, {size / 1e6:.2f} MB", file=sys.stderr)


if __name__ == "__main__":
    main()
