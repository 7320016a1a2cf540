"""The table of weights: for each tensor of a LLaMA its names, its shape, and how shards split it.

Loading, converting, writing and initializing read this table. Letters: D width, H query heads,
K key-value heads, C head width, F ffn width, V vocabulary.
"""

from dataclasses import dataclass
from math import prod

from npllama.config import LlamaConfig

_LAYER = "{layer}"


@dataclass(frozen=True)
class Weight:
    """One row of the table.

    Attributes:
        field: the name of the weight in Parameters, Layer or Head.
        hf: Hugging Face's name, with "{layer}" in place of the layer's index.
        meta: Meta's name, with the same placeholder.
        shape: one string per axis, a letter or a product of letters such as "H*C".
        split: the axis along which Meta's model-parallel shards split the tensor; None if each
            shard holds all of it.
        joined: the field of Layer whose matrix holds this weight's rows together with those of
            other weights that have the same input; None if the weight is a matrix of its own.
        rotated: the letter of the head count if RoPE rotates the rows in pairs, else None. Meta
            stores such rows in another order.
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
        """Whether each layer has this weight."""
        return _LAYER in self.hf

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) == 2

    @property
    def follows(self) -> bool:
        """Whether this weight follows another one inside a joined matrix."""
        return self.joined is not None and PRODUCTS[self.joined][0] is not self

    def hf_name(self, layer: int | None) -> str:
        """Hugging Face's name of the tensor; `layer` is None if it is outside the layers."""
        return self.hf.replace(_LAYER, str(layer))

    def meta_name(self, layer: int | None) -> str:
        """Meta's name of the tensor, in the same way."""
        return self.meta.replace(_LAYER, str(layer))

    def sizes(self, config: LlamaConfig) -> tuple[int, ...]:
        """The shape as integers."""
        letters = _letters(config)
        return tuple(prod(letters[x] for x in axis.split("*")) for axis in self.shape)

    def heads(self, config: LlamaConfig) -> int | None:
        """The number of heads whose rows RoPE rotates in pairs; None if it rotates none."""
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


# In the order of the forward pass, which is also the order of the tensors in a file.
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

# The matrices by which a layer multiplies: field of Layer -> the weights whose rows it holds
PRODUCTS: dict[str, tuple[Weight, ...]] = {}
for _weight in OF_LAYER:
    if _weight.is_matrix:
        _whole = _weight.joined or _weight.field
        PRODUCTS[_whole] = (*PRODUCTS.get(_whole, ()), _weight)


def layer_name(index: int, field: str) -> str:
    """The tensor's name in the file: layer_name(0, "wq") is model.layers.0.self_attn.q_proj..."""
    return _BY_FIELD[field].hf_name(index)


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint; a tied head has no tensor."""
    return {name: weight.sizes(config) for name, weight, _ in named_weights(config)}


def named_weights(config: LlamaConfig) -> list[tuple[str, Weight, int | None]]:
    """Every tensor of a checkpoint: name in the file, row of the table, and layer or None."""
    rows: list[tuple[str, Weight, int | None]] = [(EMBEDDING, _BY_FIELD["embedding"], None)]
    for i in range(config.n_layers):
        rows += [(weight.hf_name(i), weight, i) for weight in OF_LAYER]
    rows.append((NORM, _BY_FIELD["norm"], None))
    if not config.tie_embeddings:
        rows.append((LM_HEAD, _BY_FIELD["lm_head"], None))
    return rows


def find_hf(name: str) -> tuple[Weight, int | None] | None:
    """Row and layer of the tensor with this Hugging Face name; None if there is none."""
    return _found(name, _BY_HF)


def find_meta(name: str) -> tuple[Weight, int | None] | None:
    """Row and layer of the tensor with this Meta name; None if there is none."""
    return _found(name, _BY_META)


_BY_HF = {weight.hf: weight for weight in TABLE}
_BY_META = {weight.meta: weight for weight in TABLE}


def _found(name: str, rows: dict[str, Weight]) -> tuple[Weight, int | None] | None:
    if name in rows:
        return None if _LAYER in name else (rows[name], None)
    before, layers, after = name.partition("layers.")
    index, dot, after = after.partition(".")
    # reject spellings that no checkpoint uses, such as layers.01 or layers.1000000000
    if not index.isascii() or not index.isdecimal() or len(index) > 8 or str(int(index)) != index:
        return None
    weight = rows.get(f"{before}{layers}{_LAYER}{dot}{after}")
    return None if weight is None else (weight, int(index))
