"""LlamaConfig: fields that are read, ignored and refused."""

import json
from dataclasses import replace

import pytest

from conftest import TINY
from npllama.config import LLAMA_2, LlamaConfig
from npllama.errors import ConfigError

# The config of a published Llama-2-7b-hf, including fields that do not affect the result.
LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}


def hf(**changes):
    """The config of Llama-2-7B with changed fields. None removes a field."""
    fields = LLAMA_2_7B | changes
    return {name: value for name, value in fields.items() if value is not None}


def refused(fields, generation=None):
    """The one-line message with which a config is refused."""
    with pytest.raises(ConfigError) as caught:
        LlamaConfig.from_hf(fields, generation)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def refused_directory(directory):
    with pytest.raises(ConfigError) as caught:
        LlamaConfig.from_directory(directory)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def write_json(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))


# -- the family


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("7B", 6_738_415_616),
        ("13B", 13_015_864_320),
        ("34B", 33_743_970_304),
        ("70B", 68_976_648_192),
    ],
)
def test_each_size_has_its_published_number_of_parameters(size, parameters):
    config = LlamaConfig.named(size)
    assert config.n_parameters == parameters
    assert LlamaConfig.named(size.lower()) == config
    assert (config.norm_eps, config.rope_theta, config.context_length) == (1e-5, 10000.0, 4096)
    assert (config.head_dim, config.vocab_size) == (128, 32000)


def test_the_four_sizes_are_all_there_is():
    assert list(LLAMA_2) == ["7B", "13B", "34B", "70B"]


@pytest.mark.parametrize("size", ["8B", "", "7", "llama"])
def test_an_unknown_size_is_refused_with_the_known_ones(size):
    with pytest.raises(ConfigError, match="7B, 13B, 34B, 70B") as caught:
        LlamaConfig.named(size)
    assert repr(size) in str(caught.value)


def test_a_tied_head_counts_once():
    tied = LlamaConfig(**{**vars(TINY), "tie_embeddings": True})
    assert TINY.n_parameters - tied.n_parameters == TINY.vocab_size * TINY.dim


# -- reading


def test_a_published_config_is_the_size_of_that_name():
    assert LlamaConfig.from_hf(LLAMA_2_7B) == LLAMA_2["7B"]


@pytest.mark.parametrize("value", ["128", 0, -2, 1.5, True, 2**31])
def test_a_head_width_that_is_no_size_is_refused(value):
    assert refused(hf(head_dim=value)).startswith(f"head_dim is {value!r}: expected a")


def test_heads_need_not_add_up_to_the_width():
    """wq is (H*C, D), wk and wv are (K*C, D), and wo is (D, H*C)."""
    given = LlamaConfig.from_hf(hf(head_dim=256, hidden_size=4100))  # not a multiple of 32
    assert (given.dim, given.n_heads, given.head_dim) == (4100, 32, 256)
    wide = LlamaConfig.from_hf(hf(head_dim=256))
    assert wide.n_parameters - LLAMA_2["7B"].n_parameters == 32 * 4 * 4096 * 32 * 128


def test_every_field_is_read_from_its_own_name():
    fields = hf(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        intermediate_size=100,
        vocab_size=77,
        max_position_embeddings=55,
        rms_norm_eps=1e-6,
        rope_theta=5e5,
        tie_word_embeddings=True,
        bos_token_id=4,
        eos_token_id=5,
    )
    assert LlamaConfig.from_hf(fields) == LlamaConfig(
        dim=48,
        n_layers=3,
        n_heads=6,
        n_kv_heads=2,
        ffn_dim=100,
        vocab_size=77,
        context_length=55,
        norm_eps=1e-6,
        rope_theta=5e5,
        head_dim=10,
        tie_embeddings=True,
        bos_id=4,
        eos_ids=(5,),
    )


def test_absent_fields_have_the_defaults_of_transformers():
    fields = hf(
        architectures=None,
        model_type=None,
        hidden_act=None,
        max_position_embeddings=None,
        num_key_value_heads=None,
        rms_norm_eps=None,
        tie_word_embeddings=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    config = LlamaConfig.from_hf(fields)
    assert (config.context_length, config.norm_eps, config.rope_theta) == (2048, 1e-6, 10000.0)
    assert (config.n_kv_heads, config.tie_embeddings) == (32, False)
    assert (config.bos_id, config.eos_ids) == (1, (2,))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1e6},
        {"rope_theta": 1e6, "rope_scaling": {"rope_type": "default"}},
        {"rope_theta": 1e6, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 1e6}},
        {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 1.0}},
        {"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 10000.0},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 1e6},
        {"rope_parameters": {}, "rope_theta": 1e6},
        {"rope_parameters": {"rope_theta": 5.0}, "rope_scaling": {"rope_theta": 1e6}},
    ],
)
def test_both_spellings_of_the_rotary_base_are_read(rope):
    assert LlamaConfig.from_hf(hf(**rope)).rope_theta == 1e6


def test_a_null_rotary_field_is_as_good_as_absent():
    fields = LLAMA_2_7B | {"rope_scaling": None, "rope_parameters": None, "rope_theta": None}
    assert LlamaConfig.from_hf(fields).rope_theta == 10000.0


@pytest.mark.parametrize(
    "field",
    [
        {"pretraining_tp": 2},
        {"initializer_range": 0.5},
        {"use_cache": False},
        {"torch_dtype": "bfloat16"},
        {"dtype": "bfloat16"},
        {"attention_dropout": 0.1},
        {"pad_token_id": 0},
        {"_name_or_path": "meta-llama/Llama-2-7b-hf"},
        {"transformers_version": "5.0.0"},
        {"attention_bias": False},
        {"mlp_bias": False},
        {"head_dim": 128},
        {"hidden_act": "swish"},  # another name of silu
        {"some_field_of_the_future": {"a": [1]}},
    ],
)
def test_fields_that_do_not_change_the_result_are_ignored(field):
    assert LlamaConfig.from_hf(hf(**field)) == LLAMA_2["7B"]


REQUIRED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
)


@pytest.mark.parametrize(
    "name",
    [
        *(name for name in LLAMA_2_7B if name not in REQUIRED),
        *("head_dim", "sliding_window", "quantization_config", "is_encoder_decoder", "mlp_bias"),
        *("attention_bias", "partial_rotary_factor", "rope_parameters", "rope_theta"),
    ],
)
def test_a_field_that_is_null_counts_as_absent(name):
    fields = LLAMA_2_7B | {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
    absent = {key: value for key, value in fields.items() if key != name}
    assert LlamaConfig.from_hf(fields | {name: None}) == LlamaConfig.from_hf(absent)


@pytest.mark.parametrize(
    "architectures",
    [["LLaMAForCausalLM"], ["LlaMaForCausalLM"], "LlamaForCausalLM", [], None],
    ids=str,
)
def test_every_spelling_of_the_architecture_is_read(architectures):
    config = LlamaConfig.from_hf(LLAMA_2_7B | {"architectures": architectures})
    assert config == LLAMA_2["7B"]


def test_an_empty_quantization_quantizes_nothing():
    assert LlamaConfig.from_hf(hf(quantization_config={})) == LLAMA_2["7B"]


# -- refusing models with other mathematics


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("architectures", ["MistralForCausalLM"], "LlamaForCausalLM"),
        ("architectures", ["LlamaForSequenceClassification"], "LlamaForCausalLM"),
        ("architectures", ["LlamaForCausalLM", "LlamaModel"], "LlamaForCausalLM"),
        ("model_type", "mistral", "'llama'"),
        ("model_type", "qwen2", "'llama'"),
        ("hidden_act", "gelu", "'silu'"),
        ("hidden_act", "relu", "'silu'"),
        ("hidden_act", ["silu"], "'silu'"),
        ("attention_bias", True, "False"),
        ("mlp_bias", True, "False"),
        ("partial_rotary_factor", 0.5, "1"),
        ("sliding_window", 4096, "None"),
        ("quantization_config", {"quant_method": "gptq"}, "None"),
        ("quantization_config", {"quant_method": "npllama-int8"}, "None"),
        ("is_encoder_decoder", True, "False"),
    ],
)
def test_a_field_that_changes_the_mathematics_is_refused(name, value, wanted):
    message = refused(hf(**{name: value}))
    assert name in message and str(value) in message
    assert wanted in message.replace(str(value), "", 1)


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("spelling", ["rope_type", "type"])
@pytest.mark.parametrize("kind", ["longrope", "su", "ntk_yarn", "mrope", "none", 7, ["linear"]])
def test_an_unknown_scaling_of_the_rotary_embeddings_is_refused_by_name(field, spelling, kind):
    message = refused(hf(**{field: {spelling: kind, "factor": 2.0, "rope_theta": 10000.0}}))
    expected = "expected 'default', 'linear', 'dynamic', 'yarn', 'llama3'"
    assert message == f"{field}: {kind!r} is not implemented: {expected}"


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "factor": 1.0},
        {"factor": 1},
        {"rope_type": None, "factor": None},
        {"type": "linear", "factor": 1.0},
        {"rope_type": "linear", "factor": 1},
        {"type": "dynamic", "factor": 1.0},
        {"type": "dynamic", "factor": 1.0, "original_max_position_embeddings": 4096},
        {"rope_type": "llama3", "factor": 1.0, **LLAMA3},
        {"rope_type": "yarn", "factor": 1.0, "beta_fast": 32, "beta_slow": 1},
        {"rope_type": "yarn", "factor": 1.0, "mscale": 0.7, "attention_factor": 1.0},
        {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 4096},
        {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 2048},
        {"type": "linear", "rope_type": "default"},  # rope_type takes precedence
    ],
)
def test_a_scaling_that_changes_no_angle_is_plain(field, rope):
    assert LlamaConfig.from_hf(hf(**{field: rope})) == LLAMA_2["7B"]


YARN = {"type": "yarn", "factor": 2.0}
BELOW_ONE = "expected a number from 1 to 65536"


@pytest.mark.parametrize(
    ("rope", "says"),
    [
        ({"type": "linear"}, "'linear' needs the field factor"),
        ({"type": "linear", "factor": None}, "'linear' needs the field factor"),
        ({"type": "yarn"}, "'yarn' needs the field factor"),
        ({"type": "linear", "factor": True}, f"factor is True: {BELOW_ONE}"),
        ({"type": "linear", "factor": "2.0"}, f"factor is '2.0': {BELOW_ONE}"),
        ({"type": "dynamic", "factor": 0.5}, f"factor is 0.5: {BELOW_ONE}"),
        ({"type": "dynamic", "factor": 1e9}, f"factor is 1000000000.0: {BELOW_ONE}"),
        ({"type": "linear", "factor": float("nan")}, f"factor is nan: {BELOW_ONE}"),
        ({"type": "linear", "factor": 1.0, "alpha": 1000.0}, "'linear' with alpha 1000.0"),
        ({"type": "dynamic", "factor": 2.0, "beta_fast": 32}, "'dynamic' with beta_fast 32"),
        (
            {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 2048},
            "embeddings 2048: expected the value of max_position_embeddings, 4096",
        ),
        (YARN | {"original_max_position_embeddings": 0}, "original_max_position_embeddings is 0"),
        (YARN | {"original_max_position_embeddings": "4096"}, "embeddings is '4096'"),
        (YARN | {"original_max_position_embeddings": 2**30 + 1}, "expected a number below 2**31"),
        (YARN | {"attention_factor": 0}, "attention_factor is 0"),
        (YARN | {"beta_fast": []}, "beta_fast is []"),
        (YARN | {"beta_fast": 1, "beta_slow": 2.5}, "beta_slow 2.5 and beta_fast 1: expected"),
        (YARN | {"mscale": -1}, "mscale is -1"),
        (YARN | {"truncate": 1}, "truncate is 1: expected true or false"),
        (YARN | {"rope_theta": 1.0}, "rope_theta is 1.0: rotary scaling 'yarn' expects a"),
        ({"type": "llama3", "factor": 2.0}, "'llama3' needs the field low_freq_factor"),
        (
            {"type": "llama3", "factor": 2.0, **LLAMA3, "low_freq_factor": 4.0},
            "low_freq_factor 4.0 and high_freq_factor 4.0: expected the first below the second",
        ),
    ],
)
def test_a_scaling_that_cannot_be_computed_is_refused(rope, says):
    assert says in refused(hf(rope_scaling=rope))


def test_dynamic_scaling_needs_more_than_one_pair():
    heads = {"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    assert "head width is 2: rotary scaling 'dynamic'" in refused(hf(**heads))


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("value", ["linear", [], 2.0, True])
def test_a_rotary_field_that_is_no_object_is_refused(field, value):
    message = refused(hf(**{field: value}))
    assert field in message and repr(value) in message and "--rope-scaling" in message


def test_partial_rotation_inside_rope_parameters_is_refused_by_its_name():
    message = refused(hf(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}))
    assert "partial_rotary_factor" in message and "0.5" in message


# -- ids


@pytest.mark.parametrize(
    ("config_ids", "generation", "expected"),
    [
        (2, None, (2,)),
        ([2, 5], None, (2, 5)),
        (2, {"eos_token_id": 7}, (7,)),
        (2, {"eos_token_id": [7, 8]}, (7, 8)),
        ([3], {"eos_token_id": None}, (3,)),
        (3, {"temperature": 0.6}, (3,)),
        (None, {"eos_token_id": 0}, (0,)),
        (None, {}, (2,)),
        (-1, None, ()),
        ([2, -1], None, (2,)),
        ([], None, ()),
        (2, {"eos_token_id": -1}, ()),
        (-1, {"eos_token_id": 2}, (2,)),
    ],
)
def test_ids_that_end_a_text_come_from_the_generation_config_first(
    config_ids, generation, expected
):
    assert LlamaConfig.from_hf(hf(eos_token_id=config_ids), generation).eos_ids == expected


def test_the_id_that_begins_a_text_comes_from_the_generation_config_first():
    assert LlamaConfig.from_hf(hf(bos_token_id=5), {"bos_token_id": 0}).bos_id == 0
    assert LlamaConfig.from_hf(hf(bos_token_id=5), {}).bos_id == 5
    assert LlamaConfig.from_hf(hf(bos_token_id=-1), {}).bos_id == 1  # -1 means no id
    assert LlamaConfig.from_hf(hf(bos_token_id=5), {"bos_token_id": -1}).bos_id == 5


@pytest.mark.parametrize("value", [-2, "2", 2.0, -1.0, True, [2, "3"], [2, -3], [[2]], {}])
@pytest.mark.parametrize("where", ["config", "generation"])
def test_a_damaged_end_of_text_id_is_refused(where, value):
    generation = {"eos_token_id": value} if where == "generation" else None
    message = refused(hf(eos_token_id=value) if where == "config" else hf(), generation)
    assert "eos_token_id is" in message and "token id" in message


@pytest.mark.parametrize("value", [-2, "1", 1.5, -1.0, True, [1]])
def test_a_damaged_begin_of_text_id_is_refused(value):
    message = refused(hf(bos_token_id=value))
    assert "bos_token_id is" in message and repr(value) in message


# -- invalid numbers


@pytest.mark.parametrize(
    "name",
    [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
    ],
)
def test_a_missing_field_is_named(name):
    message = refused(hf(**{name: None}))
    assert name in message and "missing" in message


@pytest.mark.parametrize("value", [0, -1, 2.5, 32.0, "32", True, [32], float("nan")])
@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("hidden_size", "dim"),
        ("num_hidden_layers", "n_layers"),
        ("num_attention_heads", "n_heads"),
        ("num_key_value_heads", "n_kv_heads"),
        ("intermediate_size", "ffn_dim"),
        ("vocab_size", "vocab_size"),
        ("max_position_embeddings", "context_length"),
    ],
)
def test_a_count_is_a_whole_number_above_zero(name, ours, value):
    expected = f"is {value!r}: expected a whole number of at least 1"
    assert refused(hf(**{name: value})) == f"{name} {expected}"
    with pytest.raises(ConfigError) as caught:
        replace(LLAMA_2["7B"], **{ours: value})
    assert str(caught.value) == f"{ours} {expected}"


@pytest.mark.parametrize(
    "value",
    [
        0,
        -1e-5,
        float("nan"),
        float("inf"),
        "1e-5",
        True,
        [1e-5],
        pytest.param(10**400, id="an integer beyond every float"),
    ],
)
@pytest.mark.parametrize(
    ("name", "ours"), [("rms_norm_eps", "norm_eps"), ("rope_theta", "rope_theta")]
)
def test_eps_and_theta_are_finite_and_above_zero(name, ours, value):
    message = refused(hf(**{name: value}))
    assert message.startswith(f"{name} is {value!r}"[:40])
    with pytest.raises(ConfigError, match=f"^{ours} is "):
        replace(LLAMA_2["7B"], **{ours: value})


@pytest.mark.parametrize(
    ("changes", "numbers"),
    [
        ({"hidden_size": 4100}, ("hidden_size 4100", "num_attention_heads 32")),
        ({"hidden_size": 32 * 63, "head_dim": 63}, ("63", "head_dim")),
        ({"hidden_size": 32 * 63}, ("63", "hidden_size", "num_attention_heads")),
        ({"num_key_value_heads": 5}, ("32", "5", "num_attention_heads", "num_key_value_heads")),
        ({"num_key_value_heads": 64}, ("32", "64", "num_attention_heads", "num_key_value_heads")),
    ],
)
def test_counts_that_do_not_fit_together_are_named(changes, numbers):
    message = refused(hf(**changes))
    assert all(number in message for number in numbers)


NASTY = [None, True, -1, 0, 1.5, 10**400, float("nan"), "", "a\nb", [], [[]], [{}], {}, {"a": [1]}]


@pytest.mark.parametrize("name", [*LLAMA_2_7B, "rope_theta", "rope_parameters", "head_dim"])
@pytest.mark.parametrize("value", NASTY, ids=range(len(NASTY)))
def test_no_value_of_any_field_raises_anything_but_a_config_error(name, value):
    for fields, generation in ((LLAMA_2_7B | {name: value}, None), (LLAMA_2_7B, {name: value})):
        try:
            config = LlamaConfig.from_hf(fields, generation)
        except ConfigError as error:
            assert len(str(error).splitlines()) == 1
        else:
            assert config.n_parameters > 0


# -- files


def test_a_directory_is_read_with_its_generation_config(tmp_path):
    write_json(tmp_path / "config.json", LLAMA_2_7B)
    assert LlamaConfig.from_directory(tmp_path) == LLAMA_2["7B"]
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [2, 9]})
    assert LlamaConfig.from_directory(tmp_path).eos_ids == (2, 9)
    assert LlamaConfig.from_directory(str(tmp_path)).eos_ids == (2, 9)


DAMAGED = {
    "": "JSON",
    "{": "JSON",
    '{"hidden_size": 4096,}': "JSON",
    "<html>\n<body>Not Found</body>\n</html>": "web page",
    "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n": "Git LFS pointer",
    "[" * 100_000: "JSON",
    "[1]": "list",
    "null": "NoneType",
    '"llama"': "str",
}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_file_is_refused_by_its_path(tmp_path, name, text):
    write_json(tmp_path / "config.json", LLAMA_2_7B)
    write_json(tmp_path / name, text)
    message = refused_directory(tmp_path)
    assert str(tmp_path / name) in message and DAMAGED[text] in message


def test_bytes_that_are_not_text_are_refused(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\x80\x02\xff\xfe")
    message = refused_directory(tmp_path)
    assert str(tmp_path / "config.json") in message and "JSON" in message


def test_an_integer_too_long_to_read_is_refused(tmp_path):
    write_json(tmp_path / "config.json", '{"hidden_size": ' + "9" * 5000 + "}")
    assert "config.json" in refused_directory(tmp_path)


def test_a_directory_without_a_config_is_refused_by_its_path(tmp_path):
    message = refused_directory(tmp_path)
    assert message.startswith(f"{tmp_path / 'config.json'} does not exist: copy it from where")


def test_a_config_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "config.json").mkdir()
    assert "cannot be read" in refused_directory(tmp_path)
    (tmp_path / "file").touch()
    assert "cannot be read" in refused_directory(tmp_path / "file")


def test_a_refusal_names_the_file_that_asked_for_it(tmp_path):
    write_json(tmp_path / "config.json", hf(mlp_bias=True))
    message = refused_directory(tmp_path)
    assert message.startswith(str(tmp_path / "config.json")) and "mlp_bias" in message
    write_json(tmp_path / "config.json", hf())
    write_json(tmp_path / "generation_config.json", {"eos_token_id": "x"})
    assert "generation_config.json" in refused_directory(tmp_path)


# -- writing


@pytest.mark.parametrize("eos_ids", [(2,), (2, 7), ()])
@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("head_dim", [None, 8, 10])
def test_what_is_written_reads_back_the_same(tmp_path, eos_ids, tie_embeddings, head_dim):
    config = LlamaConfig(
        dim=48,
        n_layers=3,
        n_heads=6,
        n_kv_heads=2,
        ffn_dim=100,
        vocab_size=77,
        context_length=55,
        norm_eps=1e-6,
        rope_theta=1e6,
        tie_embeddings=tie_embeddings,
        bos_id=4,
        eos_ids=eos_ids,
        head_dim=head_dim,
    )
    write_json(tmp_path / "config.json", config.to_hf("bfloat16"))
    assert ("head_dim" in config.to_hf()) == (head_dim == 10)  # if 6 heads do not have 48 columns
    assert LlamaConfig.from_directory(tmp_path) == config


def test_what_is_written_says_what_a_published_config_says():
    written = LLAMA_2["7B"].to_hf("float16")
    of_no_effect = ("initializer_range", "pretraining_tp", "transformers_version", "use_cache")
    for name, value in hf().items():
        assert name in of_no_effect or written[name] == value
    assert written["rope_theta"] == 10000.0


def test_a_config_cannot_be_changed():
    with pytest.raises(AttributeError):
        TINY.dim = 64


def test_a_tie_that_is_no_bool_is_refused():
    with pytest.raises(ConfigError, match="tie_word_embeddings is 'false': expected true or false"):
        LlamaConfig.from_hf(LLAMA_2_7B | {"tie_word_embeddings": "false"})


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("rope", "named"),
    [
        ({"factor": 2.0}, "factor"),
        ({"full_attention": {"rope_type": "linear"}}, "full_attention"),
        ({"rope_type": "default", "low_freq_factor": 1.0}, "low_freq_factor"),
        ({"factor": True}, "factor"),
    ],
)
def test_a_rope_that_says_more_than_theta_is_refused(field, rope, named):
    with pytest.raises(ConfigError, match=named):
        LlamaConfig.from_hf(LLAMA_2_7B | {field: rope})
