"""LlamaConfig: the sizes and constants in which LLaMA-2 models differ."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from npllama.errors import ConfigError
from npllama.not_a_model import content_instead
from npllama.rope_scaling import (
    RopeScaling,
    parse_rope_scaling,
    read_rope_scaling,
    scaled_context,
    with_rope_scaling,
)
from npllama.small_file import MAX_JSON, parse_json, read_small_file
from npllama.weight_formats import FORMATS

# Hugging Face config fields that change the mathematics, each with the only values that this code
# implements. A field may be absent. Fields that are listed neither here nor below do not change
# the result of LlamaForCausalLM (pretraining_tp, initializer_range, use_cache, torch_dtype, ...).
_ONLY_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "sliding_window": (None,),
    "quantization_config": (None, {}, *(f.config for f in FORMATS.values() if f.config)),
    "is_encoder_decoder": (False, None),
}
_ARCHITECTURE = "LlamaForCausalLM"

_MAX_DEPTH = 64  # nesting depth of lists and objects in a JSON file


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a LLaMA-2 (Touvron et al. 2023, table 1 and section 2.2).

    Attributes:
        dim: D, width of the residual stream.
        n_layers: L.
        n_heads: H, query heads.
        n_kv_heads: K, key-value heads: K = H is multi-head attention, K = 1 is multi-query
            attention, any other K is grouped-query attention.
        ffn_dim: F, width of the SwiGLU hidden layer.
        vocab_size: V.
        context_length: number of positions the model was trained for, after RoPE scaling; for
            "dynamic", the number before scaling.
        norm_eps: epsilon inside RMSNorm's square root.
        rope_theta: base of the rotary frequencies.
        tie_embeddings: whether the head uses the embedding matrix.
        bos_id: id that begins every text.
        eos_ids: ids that end a generation.
        head_dim: C, width of each head; None means D / H.
        rope_scaling: scaling of the rotary frequencies; None for the plain frequencies.

    Raises:
        ConfigError: a value is out of range, or the values contradict each other.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    vocab_size: int
    context_length: int = 4096
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_embeddings: bool = False
    bos_id: int = 1
    eos_ids: tuple[int, ...] = field(default=(2,))
    head_dim: int = None  # type: ignore[assignment]  # always an int after __post_init__
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        _check(vars(self), {name: name for name in _HF_NAMES})
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        kind = None if self.rope_scaling is None else self.rope_scaling.kind
        if kind == "dynamic" and self.head_dim == 2:
            raise ConfigError(
                "head width is 2: rotary scaling 'dynamic' divides by head width - 2, so it "
                "expects at least 4"
            )
        if kind == "yarn" and self.rope_theta <= 1:
            raise ConfigError(
                f"rope_theta is {self.rope_theta!r}: rotary scaling 'yarn' expects a value above 1"
            )

    @property
    def longest_context(self) -> int:
        """Positions that the model can use: `context_length`, multiplied by the factor of a
        "dynamic" scaling if there is one."""
        if self.rope_scaling is None or self.rope_scaling.kind != "dynamic":
            return self.context_length
        return int(self.context_length * self.rope_scaling.factor)

    @property
    def n_parameters(self) -> int:
        """Number of trained parameters. A tied head counts once."""
        attention = 2 * self.dim * (self.n_heads + self.n_kv_heads) * self.head_dim
        block = attention + 3 * self.dim * self.ffn_dim + 2 * self.dim
        embeddings = (1 if self.tie_embeddings else 2) * self.vocab_size * self.dim
        return embeddings + self.n_layers * block + self.dim

    @classmethod
    def named(cls, size: str) -> "LlamaConfig":
        """The configuration of a published model: "7B", "13B", "34B" or "70B".

        >>> LlamaConfig.named("70B").n_parameters
        68976648192
        """
        try:
            return LLAMA_2[size.upper()]
        except KeyError:
            known = ", ".join(LLAMA_2)
            raise ConfigError(
                f"there is no LLaMA-2 model of size {size!r}: expected one of {known}"
            ) from None

    @classmethod
    def from_directory(cls, directory: Path, rope_scaling: str | None = None) -> "LlamaConfig":
        """Read config.json, and generation_config.json if it exists.

        The end-of-sequence ids come from generation_config.json if it names any, else from
        config.json, else the id is 2.

        Args:
            rope_scaling: "TYPE:FACTOR"; replaces the scaling in config.json.

        Raises:
            ConfigError: a file is missing or damaged, or asks for something not implemented.
            InputError: `rope_scaling` is not of the form "TYPE:FACTOR".
        """
        given = None if rope_scaling is None else parse_rope_scaling(rope_scaling)
        path = Path(directory) / "config.json"
        hf = read_json(path, missing="copy it from where the weights came from")
        generation_path = path.with_name("generation_config.json")
        generation = read_json(generation_path) if generation_path.exists() else {}
        if given is not None:
            hf = with_rope_scaling(hf, *given)
        try:
            config = cls.from_hf(hf)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        try:
            return config.with_generation(generation)
        except ConfigError as error:
            raise ConfigError(f"{generation_path}: {error}") from None

    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], generation: Mapping[str, Any] | None = None
    ) -> "LlamaConfig":
        """Build from the fields of Hugging Face's config.json and generation_config.json.

        A field with the value null counts as absent.
        """
        hf = {name: value for name, value in hf.items() if value is not None}
        _refuse_other_mathematics(hf)
        rope_scaling, context = _rope_scaling(hf)
        for name in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "vocab_size",
        ):
            if name not in hf:
                raise ConfigError(f"{name} is missing: expected a Hugging Face LLaMA config")
        fields = {
            "dim": hf["hidden_size"],
            "n_layers": hf["num_hidden_layers"],
            "n_heads": hf["num_attention_heads"],
            "n_kv_heads": hf.get("num_key_value_heads", hf["num_attention_heads"]),
            "ffn_dim": hf["intermediate_size"],
            "vocab_size": hf["vocab_size"],
            "context_length": context,
            "norm_eps": hf.get("rms_norm_eps", 1e-6),
            "rope_theta": _rope_theta(hf),
            "tie_embeddings": hf.get("tie_word_embeddings") or False,
            "bos_id": _bos_id(hf, 1),
            "eos_ids": _eos_ids(hf, (2,)),
            "head_dim": hf.get("head_dim"),
            "rope_scaling": rope_scaling,
        }
        _check(fields, _HF_NAMES)
        config = cls(**fields)
        return config.with_generation(generation or {})

    def with_generation(self, generation: Mapping[str, Any]) -> "LlamaConfig":
        """A copy with the bos and eos ids that a generation_config.json names.

        An id that `generation` does not name stays as it is.

        Raises:
            ConfigError: a value is not a token id.
        """
        bos_id, eos_ids = _bos_id(generation, self.bos_id), _eos_ids(generation, self.eos_ids)
        fields = vars(self) | {"bos_id": bos_id, "eos_ids": eos_ids}
        _check(fields, _HF_NAMES)
        return replace(self, bos_id=bos_id, eos_ids=eos_ids)

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """The fields of a Hugging Face config.json that opens as LlamaForCausalLM."""
        fields = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.dim,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "intermediate_size": self.ffn_dim,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.context_length,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tie_embeddings,
            "bos_token_id": self.bos_id,
            "eos_token_id": self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids),
            "torch_dtype": dtype,
        }
        if self.n_heads * self.head_dim != self.dim:  # older readers do not know this field
            fields["head_dim"] = self.head_dim
        if self.rope_scaling is not None:
            fields["rope_scaling"] = self.rope_scaling.to_hf()
            if self.rope_scaling.kind in ("linear", "yarn"):  # context_length includes the factor
                fields["max_sequence_length"] = self.context_length
        return fields


# Field of LlamaConfig -> Hugging Face's name for it, for messages
_HF_NAMES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "ffn_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "tie_embeddings": "tie_word_embeddings",
    "bos_id": "bos_token_id",
    "eos_ids": "eos_token_id",
    "head_dim": "head_dim",
}
_COUNTS = ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size", "context_length")


def _check(fields: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Raise ConfigError for the first field of a LlamaConfig that is out of range.

    Args:
        fields: values by LlamaConfig's field names.
        names: the name of each field in the error message.
    """
    for field_ in _COUNTS:
        _check_size(names[field_], fields[field_])
    for field_ in ("norm_eps", "rope_theta"):
        name, value = names[field_], fields[field_]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value <= sys.float_info.max:
            raise ConfigError(f"{name} is {value!r}: expected a finite number above 0")
    tie = fields["tie_embeddings"]
    if not isinstance(tie, bool):
        raise ConfigError(f"{names['tie_embeddings']} is {tie!r}: expected true or false")
    dim, n_heads, n_kv_heads = (fields[name] for name in ("dim", "n_heads", "n_kv_heads"))
    if fields["head_dim"] is None:
        if dim % n_heads:
            raise ConfigError(
                f"{names['dim']} {dim} is not a multiple of {names['n_heads']} {n_heads}"
            )
        if dim // n_heads % 2:
            raise ConfigError(
                f"head width {dim // n_heads} is odd ({names['dim']} {dim} / {names['n_heads']} "
                f"{n_heads}): rotary embeddings rotate pairs of elements, so it must be even"
            )
    else:
        _check_size(names["head_dim"], fields["head_dim"])
        if fields["head_dim"] % 2:
            raise ConfigError(
                f"{names['head_dim']} is {fields['head_dim']}, which is odd: rotary embeddings "
                "rotate pairs of elements, so it must be even"
            )
    if n_heads % n_kv_heads:
        raise ConfigError(
            f"{n_heads} query heads cannot share {n_kv_heads} key-value heads evenly: "
            f"{names['n_heads']} must be a multiple of {names['n_kv_heads']}"
        )
    for field_, ids in (("bos_id", (fields["bos_id"],)), ("eos_ids", fields["eos_ids"])):
        for id_ in ids:
            if isinstance(id_, bool) or not isinstance(id_, int) or id_ < 0:
                raise ConfigError(f"{names[field_]} is {id_!r}: expected a token id of at least 0")


def read_json(
    path: Path, most: int = MAX_JSON, missing: str = "expected a JSON file"
) -> dict[str, Any]:
    """Read a JSON file of at most `most` bytes that holds one object.

    Args:
        missing: the end of the error message for a file that does not exist.

    Raises:
        ConfigError: the file does not exist, is not valid JSON, or does not hold an object.
    """
    try:
        value = parse_json(read_small_file(path, most).decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: {missing}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        if (what := content_instead(path)) is not None:
            raise ConfigError(f"{path} {what}") from None
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path} is not valid JSON ({reason}): get the file again") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a {type(value).__name__}: expected a JSON object")
    inner, depth = [value], 0
    while inner:  # the parser accepts depths at which repr and json.dumps exceed the stack
        if depth > _MAX_DEPTH:
            raise ConfigError(f"{path} is nested more than {_MAX_DEPTH} deep: get the file again")
        parts = (v.values() if isinstance(v, dict) else v for v in inner)
        inner = [v for part in parts for v in part if isinstance(v, dict | list)]
        depth += 1
    return value


def _check_size(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} is {value!r}: expected a whole number of at least 1")
    if value >= 2**31:
        raise ConfigError(f"{name} is {value}: expected a number below 2**31")


def _refuse_other_mathematics(hf: Mapping[str, Any]) -> None:
    architectures = hf.get("architectures") or [_ARCHITECTURE]
    if not _is_llama(architectures):
        raise ConfigError(f"architectures is {architectures!r}: expected {_ARCHITECTURE}")
    for name, implemented in _ONLY_IMPLEMENTED.items():
        if name in hf and hf[name] not in implemented:
            raise ConfigError(
                f"{name} is {hf[name]!r}: this model is not supported, only {implemented[0]!r} "
                "is implemented"
            )


def _is_llama(architectures: object) -> bool:
    """Whether the only name is LlamaForCausalLM; early conversions spell it LLaMAForCausalLM."""
    names = architectures if isinstance(architectures, list) else [architectures]
    return len(names) == 1 and str(names[0]).lower() == _ARCHITECTURE.lower()


def _rope_scaling(hf: Mapping[str, Any]) -> tuple[RopeScaling | None, int]:
    """The scaling of the rotary frequencies, and the number of positions the model can use."""
    context = hf.get("max_position_embeddings", 2048)
    _check_size("max_position_embeddings", context)
    name, rope = _rope(hf)
    part = rope.get("partial_rotary_factor")
    if part not in _ONLY_IMPLEMENTED["partial_rotary_factor"]:
        raise ConfigError(f"{name}.partial_rotary_factor is {part!r}: only 1 is implemented")
    original = hf.get("original_max_position_embeddings")
    try:
        scaling = read_rope_scaling(rope, context, original)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    if original is None:
        original = rope.get("original_max_position_embeddings")
    context = scaled_context(scaling, context, original, hf.get("max_sequence_length"))
    _check_size("max_position_embeddings times the factor of the rotary scaling", context)
    return scaling, context


def _rope(hf: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Name and content of the field that describes the rotary embeddings.

    `rope_scaling` (older) takes precedence over `rope_parameters` (transformers 5), as in
    transformers.
    """
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(hf.get(name, {}), dict):
            raise ConfigError(
                f"{name} is {hf[name]!r}: expected a JSON object; to override it, pass "
                "--rope-scaling TYPE:FACTOR to npllama.generate, or rope_scaling= to load"
            )
    name = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    return name, hf.get(name, {})


def _rope_theta(hf: Mapping[str, Any]) -> float:
    """`rope_theta` from the rotary field, else from the top level, else 10000."""
    theta = _rope(hf)[1].get("rope_theta")
    return hf.get("rope_theta", 10000.0) if theta is None else theta


def _bos_id(fields: Mapping[str, Any], default: int) -> int:
    """bos_token_id; null and -1 mean that there is no such id, and give the default."""
    given = fields.get("bos_token_id")
    return default if given is None or _is_none(given) else given


def _eos_ids(fields: Mapping[str, Any], default: tuple[int, ...]) -> tuple[int, ...]:
    """eos_token_id, an id or a list of ids. null gives the default; -1 means no id at all, so
    that no token ends a text."""
    given = fields.get("eos_token_id")
    if given is None:
        return default
    return tuple(
        id_ for id_ in (given if isinstance(given, list) else [given]) if not _is_none(id_)
    )


def _is_none(id_: object) -> bool:
    return isinstance(id_, int) and id_ == -1  # sentencepiece's value for "no such id"


LLAMA_2 = {
    "7B": LlamaConfig(4096, 32, 32, 32, 11008, 32000),
    "13B": LlamaConfig(5120, 40, 40, 40, 13824, 32000),
    "34B": LlamaConfig(8192, 48, 64, 8, 22016, 32000),
    "70B": LlamaConfig(8192, 80, 64, 8, 28672, 32000),
}
