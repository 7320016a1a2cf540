"""Structural rules that a program can check: the layering of imports, and uses of CuPy's name."""

import ast
import re
import subprocess
import sys

import pytest

from conftest import ROOT

PACKAGE = ROOT / "npllama"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# From the lowest level to the highest. A module may import only from lower levels.
FLOORS = [
    [
        "errors",
        "early_interrupt",
        "small_file",
        "not_a_model",
        "operating_system",
        "shared_arrays",
        "uniforms",
        "completion",
        "quantization",
        "cuda_device",
        "template_renderer",
        "progress",
        "interrupts",
    ],
    # pictures need nothing of the model: they draw arrays
    ["explore", "explore.figures", "explore.colours", "explore.labels"],
    ["explore.svg"],
    ["explore.axes"],
    ["explore.heat_map"],
    ["explore.figures.rows"],
    [
        "explore.figures.attention",
        "explore.figures.cache",
        "explore.figures.dials",
        "explore.figures.embedding",
        "explore.figures.family",
        "explore.figures.heads",
        "explore.figures.lens",
        "explore.figures.norm",
        "explore.figures.overview",
        "explore.figures.residual",
        "explore.figures.rope",
        "explore.figures.sampling",
        "explore.figures.swiglu",
        "explore.figures.text",
    ],
    ["threads", "weight_formats", "rope_scaling", "atomic_file"],
    ["backend", "config", "sentencepiece_model", "console", "progress_line", "escapes"],
    ["parameters", "weight_table", "tokenizer_json", "sampling_options", "input_history"],
    ["tokenizer", "ops.tiles", "ops.rope_frequencies", "costs"],
    ["special_tokens", "message_input"],
    ["dialogue_parts"],
    ["chat_formats", "chat_template", "own_answers", "saved_dialogue"],
    ["ops.equations", "dialogue", "tokenizer_files", "safetensors_file", "row", "decode_step"],
    [
        "ops.sampling",
        "ops.derivatives",
        "ops.workers",
        "ops.chunks",
        "ops.cuda",
        "ops.cuda.kernels",
        "ops.cuda.cublas",
    ],
    ["ops.blocks", "ops.shared_products", "ops.numpy_sampling", "ops.numpy_derivatives"],
    [
        "ops.numpy_equations",
        "ops.cuda.gemv",
        "ops.cuda.decode_attention",
        "ops.cuda.sampling",
        "ops.cuda.prompt",
        "ops.cuda.embedding",
        "ops.cuda.graph",
        "ops.cuda.upload",
    ],
    ["ops.numpy_ops", "ops.cupy_ops"],
    ["ops"],
    ["op_times"],
    ["kv_cache", "weights", "initialization"],
    ["memory", "kept_cache"],
    ["model"],
    ["generation", "gradients", "cache_fingerprint"],
    ["serving", "text_stream", "prompt_cache"],
    ["llama"],
    ["conversation", "prompt_cache_file", "report"],
    ["options"],
    ["chat_settings", "chat_session"],
    ["chat_commands"],
    ["explore.calls", "explore.lens", "explore.running"],
    ["explore.layers", "explore.choice"],
    ["explore.rotation"],
    ["explore.record"],
    ["explore.section"],
    ["explore.sections", "explore.sections.heads"],
    [
        "explore.sections.attention",
        "explore.sections.cache",
        "explore.sections.embedding",
        "explore.sections.family",
        "explore.sections.lens",
        "explore.sections.norm",
        "explore.sections.residual",
        "explore.sections.rope",
        "explore.sections.sampling",
        "explore.sections.swiglu",
        "explore.sections.text",
    ],
    ["explore.page"],
    ["__init__", "generate", "chat", "plain", "explore.__main__"],
    ["__main__"],
]
FLOOR = {name: i for i, floor in enumerate(FLOORS) for name in floor}


def module_name(path):
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imports(path):
    """The npllama modules that a file imports at run time. Imports for type checkers do not
    count."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("npllama"):
            base = node.module.removeprefix("npllama").lstrip(".")
            if base:
                yield base
            else:
                yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_down(path):
    floor = FLOOR[module_name(path)]
    assert not [name for name in imports(path) if FLOOR[name] >= floor]


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_framework_is_imported_and_cupy_is_picked_in_one_place(path):
    source = path.read_text()
    assert not re.search(r"^\s*(import|from)\s+(torch|transformers|jax|tensorflow)\b", source, re.M)
    if path.name != "backend.py" and "ops" not in path.parts:
        assert not re.search(r"import cupy|== *[\"']cupy|== *[\"']numpy", source)


def test_importing_npllama_imports_neither_cupy_nor_a_framework():
    code = (
        "import sys, npllama, npllama.generate; "
        "print([m for m in ('cupy', 'torch', 'transformers', 'jax', 'jinja2') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_top_level_is_what_the_design_card_says():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode != 0 or not tracked.stdout:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    assert top <= {
        "npllama", "tools", "tests", "setup.cfg", "README.md",
        "pyproject.toml", "LICENSE", ".ci", ".gitignore",
    }  # fmt: skip
