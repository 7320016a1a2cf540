"""What the README files name exists, their Python runs, and two commands are where scripts look."""

import re
from collections import Counter

import npllama
from conftest import ROOT
from npllama import chat, generate
from npllama.ops import Ops

README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "npllama" / "README.md").read_text(encoding="utf-8")
EQUATIONS = (ROOT / "npllama" / "ops" / "README.md").read_text(encoding="utf-8")
TESTS = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
TOOLS = (ROOT / "tools" / "README.md").read_text(encoding="utf-8")
ALL_TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))


def test_every_row_of_the_equation_table_names_a_function_and_tests_that_exist():
    rows = [row.split("|")[1:-1] for row in EQUATIONS.splitlines() if row.count("|") == 5]
    rows = [row for row in rows if "`Ops." in row[2] or "`Llama." in row[2]]
    assert len(rows) > 15
    for _equation, source, function, tests in rows:
        assert source.strip()
        owner, name = re.fullmatch(r"`(Ops|Llama)\.(\w+)`", function.strip()).groups()
        assert hasattr(Ops if owner == "Ops" else npllama.Llama, name)
        names = re.findall(r"`(test_\w+)`", tests)
        assert names
        assert all(f"def {test}(" in ALL_TESTS for test in names), tests


def test_the_equation_table_has_every_equation():
    from npllama.ops.equations import Equations

    assert all(f"`Ops.{name}`" in EQUATIONS for name in vars(Equations) if not name.startswith("_"))
    assert all(f"`Ops.{name}`" in EQUATIONS for name in dir(Ops) if name.endswith("_backward"))


def names_in_the_tree(page):
    """How often a page's first code block names each Python file."""
    return Counter(re.findall(r"[\w.]+\.py\b", page.split("\n```\n")[1]))


def test_the_architecture_names_every_file_once():
    files = Counter(path.name for path in (ROOT / "npllama").rglob("*.py"))
    del files["__init__.py"]
    assert names_in_the_tree(ARCHITECTURE) == files


def test_the_tools_are_named_once():
    files = Counter(path.name for path in (ROOT / "tools").glob("*.py"))
    assert names_in_the_tree(TOOLS) == files


def test_the_picture_is_drawn_by_the_function_of_the_explaining_page():
    from npllama.config import LLAMA_2
    from npllama.explore.figures.overview import pipeline

    c = LLAMA_2["7B"]
    drawn = pipeline(
        vocab_size=c.vocab_size,
        dim=c.dim,
        n_layers=c.n_layers,
        n_heads=c.n_heads,
        n_kv_heads=c.n_kv_heads,
        head_dim=c.head_dim,
        ffn_dim=c.ffn_dim,
        n_tokens=6,
        name="LLaMA-2 7B",
    ).svg
    assert (ROOT / "npllama" / "explore" / "pipeline.svg").read_text("utf-8") == drawn + "\n"


def test_the_readme_is_short():
    assert len(README.encode()) <= 12 * 1024


def test_every_option_of_the_command_line_is_named():
    parsers = (chat.parser(), generate.parser())
    options = {o for parser in parsers for action in parser._actions for o in action.option_strings}
    assert not [o for o in options - {"-h", "--help", "--model"} if f"`{o}" not in README]


def test_links_between_the_files_lead_somewhere():
    pages = [ROOT / "README.md", *(ROOT / "npllama").rglob("*.md")]
    pages += [ROOT / "tools" / "README.md", ROOT / "tests" / "README.md"]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        targets = re.findall(r"\]\((?!https?:)([^)]*)\)", text) + re.findall(r'src="(.*?)"', text)
        for target in targets:
            path, _, anchor = target.partition("#")
            there = (page.parent / path).resolve() if path else page
            assert there.exists(), f"{page}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.M)
                slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
                assert anchor in slugs, f"{page}: {target}"


def test_the_python_of_the_readme_runs(capsys):
    """All blocks that use the shipped model, one after the other, as a reader pastes them."""
    blocks = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)
    blocks = [block for block in blocks if 'load("llama' not in block]
    assert len(blocks) >= 3
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["logits"].shape == (len(names["llama"].encode("Once upon a time")), 1024)
    assert names["trace"].hidden.shape[1] == len(names["logits"])
    assert len(names["completions"]) == len(names["texts"]) == len(names["prompts"])
    assert names["cache"].ids[0] == names["ids"][:5]
    assert names["stream"].completion.text in capsys.readouterr().out


def test_exactly_two_commands_set_up_and_run():
    commands = re.findall(r"^python3 -m venv .*$", README, re.M)
    assert len(commands) == 2
    assert "npllama.generate" in commands[0]
    assert "pytest" in commands[1]


def test_the_tolerances_are_those_of_the_tests():
    from test_overrides import TOLERANCE

    for backend, name in (("numpy", "NumPy"), ("cupy", "CuPy")):
        row = re.search(rf"^\s*\| {name} \|(.*)\|$", TESTS, re.M).group(1)
        told = [float(cell) for cell in row.split("|")]
        dtypes = ("float32", "float16", "bfloat16", "int8")
        assert told == [TOLERANCE[backend, dtype] for dtype in dtypes]
