"""Write tests/fixtures: small random checkpoints, and what Hugging Face computes on them.

    pip install -e '.[reference]'
    python tools/make_reference.py hf
    python tools/make_reference.py torch --meta-converter convert_llama_weights_to_hf.py
    python tools/make_reference.py gradients
    python tools/make_reference.py tokenizers
    python tools/make_reference.py chat
    python tools/make_reference.py rope
    python tools/make_reference.py check

The tests need only the files, not torch. The folders of tests/fixtures hold:

- hf: checkpoints that save_pretrained wrote. Each has an expected.safetensors with what
  transformers computes from the stored weights widened to float64: logits, the hidden state of
  every layer, and the greedy continuation.
- torch: checkpoints that torch.save wrote: Meta's layout with 1, 2, 4 and 8 shards, a file in the
  legacy format, pytorch_model.bin, and llama2.c's training checkpoint. Each expected.safetensors
  also has every tensor as transformers' own script converts it. This script came with transformers
  up to version 4.46 (models/llama/convert_llama_weights_to_hf.py).
- gradients: float64 weights, a loss and its gradients by PyTorch's autograd. They are computed by
  a forward pass written here in torch, because part of transformers' own runs in float32. The
  loss is checked against transformers'.
- tokenizers: the files that transformers 5 writes for the shipped tokenizer.model with one special
  and one ordinary token added, and the ids that it gives to texts.
- chat_templates: chat templates and dialogues, and what transformers renders from them.
- rope: one small model; for every kind of RoPE scaling, logits of a text longer than the original
  context; and the frequencies for configs of published checkpoints.

`check` converts the fixtures hf and torch with tools/convert.py and opens the results in
transformers.
"""

import argparse
import importlib.util
import json
import shutil
import tempfile
from pathlib import Path
from types import ModuleType

import jinja2
import numpy as np
import safetensors.numpy
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.chat_template_utils import render_jinja_template

import convert
from command_line import say
from npllama.console import open_streams, tell

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures"
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
    "head-dim": ({"head_dim": 10}, torch.float32, 1.0, "5GB"),  # H * C = 60, D = 36
}


def make_model(
    seed: int, changes: dict, dtype: torch.dtype, embedding_rms: float, scale: float = 1.5
) -> LlamaForCausalLM:
    """A random model whose attention is far from uniform, and whose norms are not all near 1."""
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
                tensor.copy_(scale * noise / tensor.shape[1] ** 0.5)
    return model.to(dtype)


@torch.no_grad()
def compute(model: LlamaForCausalLM, ids: list[int]) -> dict[str, np.ndarray]:
    """Logits (T, V), hidden states (L+1, T, D) before the final norm, and the greedy ids."""
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


def make_hf() -> None:
    """Write fixtures/hf: every case of CASES."""
    dest = FIXTURES / "hf"
    shutil.rmtree(dest, ignore_errors=True)
    for seed, (name, (changes, dtype, rms, shard)) in enumerate(CASES.items()):
        model = make_model(seed, changes, dtype, rms)
        directory = dest / name
        model.save_pretrained(directory, max_shard_size=shard)
        # loaded from the files, as users load it, because saving may change the model
        model = LlamaForCausalLM.from_pretrained(directory, dtype=dtype)
        expected = compute(model, prompt(seed, BASE["vocab_size"]))
        safetensors.numpy.save_file(expected, directory / "expected.safetensors")


def prompt(seed: int, vocab_size: int) -> list[int]:
    """BOS followed by random ids."""
    ids = np.random.default_rng(seed).integers(3, vocab_size, PROMPT_TOKENS)
    return [1, *ids.tolist()]


# -- checkpoints that torch.save writes

# n_kv_heads differs from both n_heads and n_heads / n_kv_heads, so that they cannot be confused
SMALL = {"dim": 36, "n_layers": 2, "n_heads": 6, "n_kv_heads": 2, "norm_eps": 1e-5}
SMALL |= {"multiple_of": 4, "ffn_dim_multiplier": 0.5, "vocab_size": -1}
FOUR = SMALL | {"dim": 32, "n_heads": 8, "n_kv_heads": 4, "multiple_of": 8}
EIGHT = SMALL | {"dim": 32, "n_heads": 16, "n_kv_heads": 8, "multiple_of": 8}
VOCAB = 48

# name -> (params.json, shards, dtype, zip layout)
META_CASES = {
    "meta-mp1": (SMALL, 1, torch.bfloat16, True),
    "meta-mp2": (SMALL | {"rope_theta": 1e6}, 2, torch.bfloat16, True),
    "meta-mp8": (EIGHT, 8, torch.bfloat16, True),
    "meta-legacy": (SMALL, 1, torch.float16, False),
    "meta-mp4": (FOUR, 4, torch.float32, True),
}
COLUMN_SPLIT = ("wo.weight", "w2.weight", "tok_embeddings.weight")


def meta_state(params: dict, seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random weights by Meta's names, exact in bfloat16, to which transformers' script rounds."""
    d, h, k = params["dim"], params["n_heads"], params["n_kv_heads"]
    multiple = params["multiple_of"]
    f = int(params["ffn_dim_multiplier"] * int(8 * d / 3))
    f = multiple * ((f + multiple - 1) // multiple)
    kv = d // h * k
    shapes = {"tok_embeddings.weight": (VOCAB, d)}
    for i in range(params["n_layers"]):
        shapes |= {
            f"layers.{i}.attention.wq.weight": (d, d),
            f"layers.{i}.attention.wk.weight": (kv, d),
            f"layers.{i}.attention.wv.weight": (kv, d),
            f"layers.{i}.attention.wo.weight": (d, d),
            f"layers.{i}.feed_forward.w1.weight": (f, d),
            f"layers.{i}.feed_forward.w2.weight": (d, f),
            f"layers.{i}.feed_forward.w3.weight": (f, d),
            f"layers.{i}.attention_norm.weight": (d,),
            f"layers.{i}.ffn_norm.weight": (d,),
        }
    shapes |= {"norm.weight": (d,), "output.weight": (VOCAB, d)}
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        is_norm, is_embedding = len(shape) == 1, "tok_embeddings" in name
        values = 1 + 0.2 * noise if is_norm else noise / (1 if is_embedding else d**0.5)
        state[name] = values.bfloat16().to(dtype)
    return state


def split(state: dict[str, torch.Tensor], n: int) -> list[dict[str, torch.Tensor]]:
    """Split a checkpoint into n model-parallel shards. Each shard holds the whole norms."""
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(n)]
    for name, tensor in state.items():
        axis = 1 if name.endswith(COLUMN_SPLIT) else 0
        parts = tensor.chunk(n, dim=axis) if tensor.ndim == 2 else [tensor] * n
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part.clone()
    return shards


def converted(directory: Path, n: int, script: ModuleType, theta: float) -> LlamaForCausalLM:
    """The checkpoint, converted by transformers' own script."""
    with tempfile.TemporaryDirectory() as out:
        script.write_model(out, str(directory), num_shards=n, llama_version="2", vocab_size=VOCAB)
        model = LlamaForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    assert _theta(model.config) == theta
    return model


def _theta(config: LlamaConfig) -> float:
    return getattr(config, "rope_parameters", None) and config.rope_parameters["rope_theta"]


def save_expected(directory: Path, model: LlamaForCausalLM, seed: int) -> None:
    """Write expected.safetensors: the results, and every tensor under the prefix "hf."."""
    tensors = {f"hf.{name}": t.float().numpy() for name, t in model.state_dict().items()}
    expected = compute(model, prompt(seed, VOCAB)) | tensors
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(t) for name, t in expected.items()},
        directory / "expected.safetensors",
    )


def make_torch(script: ModuleType) -> None:
    """Write fixtures/torch: every layout that checkpoints saved by torch.save have."""
    dest = FIXTURES / "torch"
    shutil.rmtree(dest, ignore_errors=True)
    for seed, (name, (params, n, dtype, is_zip)) in enumerate(META_CASES.items()):
        directory = dest / name
        directory.mkdir(parents=True)
        (directory / "params.json").write_text(json.dumps(params))
        frequencies = {"rope.freqs": torch.ones(params["dim"] // params["n_heads"] // 2)}
        for i, shard in enumerate(split(meta_state(params, seed, dtype), n)):
            torch.save(
                shard | frequencies,
                directory / f"consolidated.{i:02}.pth",
                _use_new_zipfile_serialization=is_zip,
            )
        model = converted(directory, n, script, params.get("rope_theta", 10000.0))
        save_expected(directory, model, seed)

    # Hugging Face's .bin, single and sharded
    changes = {"vocab_size": VOCAB, "intermediate_size": 40}
    for seed, name in ((10, "bin"), (11, "bin-sharded")):
        model = make_model(seed, changes, torch.float16, 1.0, scale=1.0)
        directory = dest / name
        directory.mkdir()
        model.config.save_pretrained(directory)
        state = model.state_dict()
        if name == "bin":
            torch.save(state, directory / "pytorch_model.bin")
        else:
            weight_map = {}
            for i, part in enumerate((list(state)[::2], list(state)[1::2]), start=1):
                file = f"pytorch_model-{i:05}-of-00002.bin"
                torch.save({key: state[key] for key in part}, directory / file)
                weight_map |= dict.fromkeys(part, file)
            index = {"metadata": {}, "weight_map": weight_map}
            (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        # loaded from the files, because .to(float16) has also rounded the rotary frequencies
        model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float16)
        save_expected(directory, model, seed)

    # llama2.c's training checkpoint: compiled (prefix _orig_mod.), tied, and with an optimizer
    directory = dest / "llama2c-training"
    directory.mkdir()
    state = meta_state(SMALL, 20, torch.float32)
    state["output.weight"] = state["tok_embeddings.weight"]
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder) / "consolidated.00.pth")
        (Path(folder) / "params.json").write_text(json.dumps(SMALL))
        model = converted(Path(folder), 1, script, 10000.0)
    args = {key: SMALL[key] for key in ("dim", "n_layers", "n_heads", "n_kv_heads")}
    args |= {"vocab_size": VOCAB, "multiple_of": 4, "max_seq_len": 64, "dropout": 0.0}
    parameters = [torch.nn.Parameter(state["norm.weight"].clone())]
    optimizer = torch.optim.AdamW(parameters)
    parameters[0].sum().backward()
    optimizer.step()
    checkpoint = {
        "model": {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
        "optimizer": optimizer.state_dict(),
        "model_args": args,
        "iter_num": 100,
        "best_val_loss": torch.tensor(1.5),
        "config": {"out_dir": "out", "learning_rate": 5e-4},
    }
    torch.save(checkpoint, directory / "ckpt.pt")
    save_expected(directory, model, 20)


# -- tokenizers

# Left out, because npllama (like Meta's code) differs from transformers 5: texts that begin with a
# space, which get no dummy prefix in transformers, and special tokens, which it finds in text.
TOKENIZER_TEXTS = [
    "Once upon a time, there was a little girl named Lily.",
    "a  b   c\tand\n\nlines\r\n and trailing   ",
    "🦙 flags 🇩🇪, 👩\u200d👩\u200d👦",
    "漢字かな、한국어 and nai\u0308ve cafe\u0301, ก็",
    "\ufffd literal, \x00 nul, \x7f and \u2581 the mark \u2581\u2581",
    "half <s and <0x0A> and </ s>",
    "",
]


def make_tokenizers() -> None:
    """Write fixtures/tokenizers: tokenizer.json, tokenizer_config.json, ids of TOKENIZER_TEXTS."""
    dest = FIXTURES / "tokenizers"
    shutil.rmtree(dest, ignore_errors=True)
    shipped = Path(convert.__file__).parent.parent / "npllama" / "assets" / "stories"
    with tempfile.TemporaryDirectory() as folder:
        for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
            shutil.copy(shipped / name, folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    tokenizer.add_tokens(["<step>"])
    tokenizer.save_pretrained(dest)
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in TOKENIZER_TEXTS]
    expected = dict(zip(TOKENIZER_TEXTS, ids, strict=True))
    (dest / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


# -- gradients

# name -> config; make_gradients has the B and T of each batch
GRADIENT_CASES = {
    "gqa": {"num_hidden_layers": 2, "num_key_value_heads": 3},
    "tied-mqa": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "head-dim": {"num_key_value_heads": 2, "head_dim": 6},  # H * C = 36, D = 24
}
GRADIENT_BASE = {
    "hidden_size": 24,
    "num_attention_heads": 6,
    "intermediate_size": 20,
    "vocab_size": 32,
    "num_hidden_layers": 1,
}


def make_chat() -> None:
    """Write fixtures/chat_templates/expected.json: each dialogue as each template renders it."""
    dest = FIXTURES / "chat_templates"
    dialogues = json.loads((dest / "dialogues.json").read_text())
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    for dialogue in dialogues:
        answer = dialogue.get("answer")
        begun = [] if answer is None else [{"role": "assistant", "content": answer}]
        dialogue["texts"] = {}
        for path in sorted(dest.glob("*.jinja")):
            try:
                texts, _ = render_jinja_template(
                    conversations=[dialogue["messages"] + begun],
                    chat_template=path.read_text(encoding="utf-8"),
                    continue_final_message=bool(begun),
                    add_generation_prompt=not begun,
                    **tokens,
                )
            except (jinja2.exceptions.TemplateError, ValueError):  # the template refuses it
                texts = [None]
            dialogue["texts"][path.stem] = texts[0]
    (dest / "expected.json").write_text(json.dumps(dialogues, indent=1) + "\n")


def make_gradients() -> None:
    """Write fixtures/gradients: weights ("w/..."), gradients ("g/..."), and the batch and loss."""
    dest = FIXTURES / "gradients"
    shutil.rmtree(dest, ignore_errors=True)
    for seed, (name, changes) in enumerate(GRADIENT_CASES.items()):
        model = make_model(seed, GRADIENT_BASE | changes, torch.float64, 1.0)
        config = model.config
        generator = torch.Generator().manual_seed(seed)
        tokens, targets = torch.randint(0, config.vocab_size, (2, 2, 7), generator=generator)
        weights = torch.rand((2, 7), generator=generator, dtype=torch.float64)
        weights[1, 4:] = 0  # the second row ends early
        state = dict(model.named_parameters())  # does not include a tied head
        w = {key: tensor.detach().clone().requires_grad_() for key, tensor in state.items()}
        logits = torch_llama(w, tokens, config)
        surprise = torch.nn.functional.cross_entropy(
            logits.reshape(-1, config.vocab_size), targets.reshape(-1), reduction="none"
        )
        loss = (surprise.reshape(2, 7) * weights).sum()
        loss.backward()
        with torch.no_grad():
            difference = (model(tokens).logits - logits).abs().max() / logits.abs().max()
        assert difference < 1e-5, (name, float(difference))
        case = {f"w/{key}": tensor.detach().numpy() for key, tensor in w.items()}
        case |= {f"g/{key}": tensor.grad.numpy() for key, tensor in w.items()}
        case |= {"tokens": tokens.numpy(), "targets": targets.numpy(), "weights": weights.numpy()}
        case["loss"] = np.array(loss.item())
        dest.mkdir(parents=True, exist_ok=True)
        safetensors.numpy.save_file(case, dest / f"{name}.safetensors")
        fields = GRADIENT_BASE | {"rms_norm_eps": 1e-5, "rope_theta": 10000.0} | changes
        (dest / f"{name}.json").write_text(json.dumps(fields, indent=2) + "\n")


def torch_llama(w: dict, tokens: torch.Tensor, config: LlamaConfig) -> torch.Tensor:
    """LLaMA-2 entirely in float64, for autograd: tokens (B, T) -> logits (B, T, V)."""
    n_heads, n_kv_heads = config.num_attention_heads, config.num_key_value_heads
    n_batch, n_new = tokens.shape
    head_dim = config.head_dim
    pair = torch.arange(head_dim // 2, dtype=torch.float64)
    angle = torch.arange(n_new, dtype=torch.float64)[:, None] * 10000.0 ** (-2 * pair / head_dim)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]  # (T, 1, C/2) complex

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], w[name], config.rms_norm_eps)

    def heads(x: torch.Tensor, name: str, n: int) -> torch.Tensor:
        return (x @ w[name].T).reshape(n_batch, n_new, n, head_dim)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        x = torch.complex(*x.chunk(2, dim=-1)) * turn
        return torch.cat((x.real, x.imag), dim=-1)

    x = w["model.embed_tokens.weight"][tokens]
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}."
        h = norm(x, at + "input_layernorm.weight")
        q = rotated(heads(h, at + "self_attn.q_proj.weight", n_heads))
        k = rotated(heads(h, at + "self_attn.k_proj.weight", n_kv_heads))
        v = heads(h, at + "self_attn.v_proj.weight", n_kv_heads)
        o = torch.nn.functional.scaled_dot_product_attention(
            *(a.transpose(1, 2) for a in (q, k, v)), is_causal=True, enable_gqa=True
        )
        o = o.transpose(1, 2).reshape(n_batch, n_new, n_heads * head_dim)
        x = x + o @ w[at + "self_attn.o_proj.weight"].T
        h = norm(x, at + "post_attention_layernorm.weight")
        gate, up = (h @ w[f"{at}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ w[at + "mlp.down_proj.weight"].T
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return norm(x, "model.norm.weight") @ head.T


ROPE_BASE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 24,
    "intermediate_size": 40,
    "vocab_size": 64,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
}
ROPE_TOKENS = 48
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
# name -> changes to ROPE_BASE, in config.json's older spelling or in its newer one
ROPE_CASES = {
    "plain": {},
    "linear": {"rope_scaling": {"type": "linear", "factor": 3.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "yarn": {
        "rope_scaling": {
            "factor": 3.0,
            "original_max_position_embeddings": 16,
            "type": "yarn",
            "finetuned": True,
        }
    },
    "yarn-8k": {  # the factor takes precedence over max_position_embeddings / original
        "max_position_embeddings": 32,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "yarn-mscale": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 100.0,
            "original_max_position_embeddings": 16,
            "mscale": 1.5,
            "mscale_all_dim": 0.5,
            "beta_fast": 2.5,
            "beta_slow": 0.3,
            "truncate": False,
        },
    },
    "yarn-attention-factor": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 100.0,
            "original_max_position_embeddings": 16,
            "attention_factor": 0.8,
        },
    },
    "llama3": {
        "max_position_embeddings": 64,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            **_LLAMA3,
        },
    },
}
# (config fields, number of tokens of the text) of published checkpoints; C is 128
_YARN = {"type": "yarn", "original_max_position_embeddings": 4096, "finetuned": True}
_LLAMA31 = {"rope_type": "llama3", "original_max_position_embeddings": 8192, **_LLAMA3}
ROPE_PUBLISHED = {
    "llama-2": ({"max_position_embeddings": 4096}, 4096),
    "codellama": ({"max_position_embeddings": 16384, "rope_theta": 1e6}, 16384),
    "vicuna-7b-v1.5-16k": (
        {
            "max_position_embeddings": 4096,
            "max_sequence_length": 16384,
            "rope_scaling": {"factor": 4.0, "type": "linear"},
        },
        16384,
    ),
    "llama-2-7b-32k": (
        {"max_position_embeddings": 32768, "rope_scaling": {"factor": 8.0, "type": "linear"}},
        32768,
    ),
    "yarn-llama-2-7b-64k": (
        {"max_position_embeddings": 65536, "rope_scaling": {"factor": 16.0, **_YARN}},
        65536,
    ),
    "yarn-llama-2-7b-128k": (
        {"max_position_embeddings": 131072, "rope_scaling": {"factor": 32.0, **_YARN}},
        131072,
    ),
    "yarn-llama-2-70b-32k": (
        {
            "max_position_embeddings": 8192,
            "max_sequence_length": 32768,
            "rope_scaling": {"factor": 8.0, **_YARN},
        },
        32768,
    ),
    "dynamic-2": (
        {"max_position_embeddings": 4096, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        6000,
    ),
    "tinyllama-1.1b-chat-32k": (
        {"max_position_embeddings": 2048, "rope_scaling": {"type": "dynamic", "factor": 16.0}},
        32768,
    ),
    "llama-3.1": (
        {
            "max_position_embeddings": 131072,
            "rope_theta": 500000.0,
            "rope_scaling": {"factor": 8.0, **_LLAMA31},
        },
        131072,
    ),
    "llama-3.2": (
        {
            "max_position_embeddings": 131072,
            "rope_parameters": {"factor": 32.0, "rope_theta": 500000.0, **_LLAMA31},
        },
        131072,
    ),
}


@torch.no_grad()
def make_rope() -> None:
    """Write fixtures/rope: one model, and what transformers computes with it in each case."""
    dest = FIXTURES / "rope"
    shutil.rmtree(dest, ignore_errors=True)
    dest.mkdir(parents=True)
    changes = {name: value for name, value in ROPE_BASE.items() if name in BASE}
    base = make_model(0, changes | {"head_dim": ROPE_BASE["head_dim"]}, torch.float32, 1.0)
    weights = base.state_dict()
    safetensors.numpy.save_file(
        {name: tensor.numpy() for name, tensor in weights.items()}, dest / "model.safetensors"
    )
    ids = np.random.default_rng(0).integers(3, ROPE_BASE["vocab_size"], ROPE_TOKENS)
    expected, configs = {"ids": ids}, {}
    for name, changes in ROPE_CASES.items():
        # a copy, because transformers modifies the dictionaries that it receives
        configs[name] = json.loads(json.dumps(ROPE_BASE | changes))
        model = LlamaForCausalLM(LlamaConfig(**json.loads(json.dumps(configs[name]))))
        model.load_state_dict(weights)
        logits = model.double().eval()(torch.tensor([ids.tolist()])).logits[0]
        expected[f"logits/{name}"] = logits.numpy().astype("float32")
        if "rope_scaling" in changes:  # check that the newer spelling gives the same result
            newer = json.loads(json.dumps(ROPE_BASE | changes))
            newer["rope_parameters"] = newer.pop("rope_scaling")
            model = LlamaForCausalLM(LlamaConfig(**newer)).double().eval()
            model.load_state_dict(weights)
            assert torch.equal(model(torch.tensor([ids.tolist()])).logits[0], logits), name
        _add_rotation(expected, name, model.model.rotary_emb)
    for name, (changes, n_tokens) in ROPE_PUBLISHED.items():
        heads = {"hidden_size": 128, "num_attention_heads": 1}
        configs[name] = json.loads(json.dumps(ROPE_BASE | heads | changes | {"head_dim": 128}))
        configs[name]["rope_theta"] = changes.get("rope_theta", 10000.0)
        config = LlamaConfig(**json.loads(json.dumps(configs[name])))
        rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
        rotary(torch.zeros(1), torch.tensor([[n_tokens - 1]]))  # sets dynamic's frequencies
        _add_rotation(expected, name, rotary)
        configs[name]["n_tokens"] = n_tokens
    safetensors.numpy.save_file(expected, dest / "expected.safetensors")
    (dest / "configs.json").write_text(json.dumps(configs, indent=1) + "\n")


def _add_rotation(expected: dict[str, np.ndarray], name: str, rotary: torch.nn.Module) -> None:
    expected[f"frequencies/{name}"] = rotary.inv_freq.float().numpy()
    expected[f"attention_scaling/{name}"] = np.array(float(rotary.attention_scaling))


def check() -> None:
    """Check that transformers opens what convert.py writes, and computes the expected results.

    Raises:
        AssertionError: a result differs.
    """
    for directory in sorted([*(FIXTURES / "hf").iterdir(), *(FIXTURES / "torch").iterdir()]):
        source = directory / "ckpt.pt" if directory.name == "llama2c-training" else directory
        expected = safetensors.numpy.load_file(directory / "expected.safetensors")
        with tempfile.TemporaryDirectory() as folder:
            dest = Path(folder) / "model"
            assert convert.main([str(source), str(dest), "--max-shard-size", "50KB"]) == 0
            model = transformers.AutoModelForCausalLM.from_pretrained(dest, dtype="auto")
        found = compute(model, expected["ids"].tolist())
        error = np.abs(found["logits"] - expected["logits"]).max()
        assert error <= 1e-6 * np.abs(expected["logits"]).max(), (directory.name, error)
        assert np.array_equal(found["greedy"], expected["greedy"]), directory.name
        say(f"{directory.name}: transformers opens it, logits within {error:.1e}")
    check_int8_is_refused()


def check_int8_is_refused() -> None:
    """Check that transformers, which does not support npllama's int8, refuses to open it."""
    with tempfile.TemporaryDirectory() as folder:
        dest = Path(folder) / "int8"
        assert convert.main([str(FIXTURES / "hf" / "gqa"), str(dest), "--dtype", "int8"]) == 0
        for opened_by in (transformers.AutoModelForCausalLM, LlamaForCausalLM):
            try:
                opened_by.from_pretrained(dest)
            except ValueError as error:
                assert "quant_method" in str(error), error
            else:
                raise AssertionError(f"{opened_by.__name__} opens int8 weights and misreads them")
    say("int8: transformers refuses it")


def main() -> None:
    """Write the fixtures that the command line names."""
    open_streams()
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    kinds = ("hf", "torch", "gradients", "tokenizers", "chat", "rope", "check")
    p.add_argument("what", choices=kinds)
    p.add_argument("--meta-converter", type=Path, help="for torch: transformers' own script")
    args = p.parse_args()
    tell(f"torch {torch.__version__}, transformers {transformers.__version__}")
    if args.what == "check":
        check()
    elif args.what == "hf":
        make_hf()
    elif args.what == "gradients":
        make_gradients()
    elif args.what == "tokenizers":
        make_tokenizers()
    elif args.what == "chat":
        make_chat()
    elif args.what == "rope":
        make_rope()
    else:
        if args.meta_converter is None:
            p.error("torch needs --meta-converter convert_llama_weights_to_hf.py")
        spec = importlib.util.spec_from_file_location("meta_converter", args.meta_converter)
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        make_torch(script)
    size = sum(path.stat().st_size for path in FIXTURES.rglob("*") if path.is_file())
    tell(f"{FIXTURES} holds {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
