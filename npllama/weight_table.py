"""The table of weights: what each tensor of a LLaMA is called, its shape, and how it is cut.

Loading, converting, writing and initializing read it. Letters: D width, H query heads, K key-value
heads, C head width, F ffn width, V vocabulary.
"""

from dataclasses import dataclass
from math import prod

from npllama.config import LlamaConfig

_LAYER = "{layer}"


@dataclass(frozen=True)
class Weight:
    """A row of the table.

    Attributes:
        field: its name in Parameters, Layer or Head.
        hf: Hugging Face's name, with "{layer}" where the layer's index stands.
        meta: Meta's name, the same way.
        shape: letters, a product such as "H*C" for each axis.
        split: the axis that Meta's model-parallel shards split; None: each shard has all of it.
        joined: the field of Layer in which it is one matrix with the rows that follow, as they
            have one input; None: it stands alone.
        rotated: the letter of the heads whose rows RoPE pairs; Meta orders those rows otherwise.
    """

    field: str
    hf: str
    meta: str
    shape: tuple[str, ...]
    split: int | None = None
    joined: str | None = None
    rotated: str | None = None

    @property
    def in_layer(self) -> bool:
        """Whether each layer has one."""
        return _LAYER in self.hf

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2

    @property
    def follows(self) -> bool:
        """Whether the row before is joined into the same matrix."""
        return self.joined is not None and PRODUCTS[self.joined][0] is not self

    def hf_name(self, layer: int | None) -> str:
        """Hugging Face's name of the tensor in this layer, None where it is in none."""
        return self.hf.replace(_LAYER, str(layer))

    def meta_name(self, layer: int | None) -> str:
        """Meta's name of it."""
        return self.meta.replace(_LAYER, str(layer))

    def sizes(self, config: LlamaConfig) -> tuple[int, ...]:
        """The shape in numbers."""
        letters = _letters(config)
        return tuple(prod(letters[x] for x in axis.split("*")) for axis in self.shape)

    def heads(self, config: LlamaConfig) -> int | None:
        """How many heads' rows RoPE pairs; None where it pairs none."""
        return None if self.rotated is None else _letters(config)[self.rotated]


def _letters(config: LlamaConfig) -> dict[str, int]:
    return {
        "D": config.dim,
        "H": config.n_heads,
        "K": config.n_kv_heads,
        "C": config.head_dim,
        "F": config.ffn_dim,
        "V": config.vocab_size,
    }


def _in_layer(field: str, hf: str, meta: str, *shape: str, **more: object) -> Weight:
    hf, meta = f"model.layers.{_LAYER}.{hf}.weight", f"layers.{_LAYER}.{meta}.weight"
    return Weight(field, hf, meta, shape, **more)


# In the order of a forward, which is that of the tensors in a file.
TABLE = (
    Weight("embedding", "model.embed_tokens.weight", "tok_embeddings.weight", ("V", "D"), split=1),
    _in_layer("attention_norm", "input_layernorm", "attention_norm", "D"),
    _in_layer(
        "wq", "self_attn.q_proj", "attention.wq", "H*C", "D", split=0, joined="qkv", rotated="H"
    ),
    _in_layer(
        "wk", "self_attn.k_proj", "attention.wk", "K*C", "D", split=0, joined="qkv", rotated="K"
    ),
    _in_layer("wv", "self_attn.v_proj", "attention.wv", "K*C", "D", split=0, joined="qkv"),
    _in_layer("wo", "self_attn.o_proj", "attention.wo", "D", "H*C", split=1),
    _in_layer("ffn_norm", "post_attention_layernorm", "ffn_norm", "D"),
    _in_layer("w_gate", "mlp.gate_proj", "feed_forward.w1", "F", "D", split=0, joined="gate_up"),
    _in_layer("w_up", "mlp.up_proj", "feed_forward.w3", "F", "D", split=0, joined="gate_up"),
    _in_layer("w_down", "mlp.down_proj", "feed_forward.w2", "D", "F", split=1),
    Weight("norm", "model.norm.weight", "norm.weight", ("D",)),
    Weight("lm_head", "lm_head.weight", "output.weight", ("V", "D"), split=0),
)
OF_LAYER = tuple(weight for weight in TABLE if weight.in_layer)
_BY_FIELD = {weight.field: weight for weight in TABLE}
EMBEDDING, NORM, LM_HEAD = (_BY_FIELD[field].hf for field in ("embedding", "norm", "lm_head"))

# What a layer multiplies by: field of the whole -> the rows it is made of, of one input each
PRODUCTS: dict[str, tuple[Weight, ...]] = {}
for _weight in OF_LAYER:
    if _weight.is_matrix:
        _whole = _weight.joined or _weight.field
        PRODUCTS[_whole] = (*PRODUCTS.get(_whole, ()), _weight)


def layer_name(index: int, field: str) -> str:
    """The tensor's name in the file: layer_name(0, "wq") is model.layers.0.self_attn.q_proj..."""
    return _BY_FIELD[field].hf_name(index)


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint; a tied head has none of its own."""
    return {name: weight.sizes(config) for name, weight, _ in named_weights(config)}


def named_weights(config: LlamaConfig) -> list[tuple[str, Weight, int | None]]:
    """Every tensor of a checkpoint: its name in the file, its row, and its layer if it has one."""
    rows: list[tuple[str, Weight, int | None]] = [(EMBEDDING, _BY_FIELD["embedding"], None)]
    for i in range(config.n_layers):
        rows += [(weight.hf_name(i), weight, i) for weight in OF_LAYER]
    rows.append((NORM, _BY_FIELD["norm"], None))
    if not config.tie_embeddings:
        rows.append((LM_HEAD, _BY_FIELD["lm_head"], None))
    return rows


def find_hf(name: str) -> tuple[Weight, int | None] | None:
    """The row of a tensor by Hugging Face's name, and its layer; None where there is none."""
    return _found(name, _BY_HF)


def find_meta(name: str) -> tuple[Weight, int | None] | None:
    """The row of a tensor by Meta's name, and its layer; None where there is none."""
    return _found(name, _BY_META)


_BY_HF = {weight.hf: weight for weight in TABLE}
_BY_META = {weight.meta: weight for weight in TABLE}


def _found(name: str, rows: dict[str, Weight]) -> tuple[Weight, int | None] | None:
    if name in rows:
        return None if _LAYER in name else (rows[name], None)
    before, layers, after = name.partition("layers.")
    index, dot, after = after.partition(".")
    # a name such as layers.01 or layers.1000000000 is none that anybody writes
    if not index.isascii() or not index.isdecimal() or len(index) > 8 or str(int(index)) != index:
        return None
    weight = rows.get(f"{before}{layers}{_LAYER}{dot}{after}")
    return None if weight is None else (weight, int(index))
