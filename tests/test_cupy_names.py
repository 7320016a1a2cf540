"""Every `xp` function and keyword that the package uses is in CuPy's public interface."""

import ast

import pytest

from conftest import ROOT
from strict_array import API, StrictArray, StrictBackend

FOLDERS = (
    "npllama",
    "tools/training",
    "tools/benchmarking",
    "tools/comparing",
    "tools/checking_gpu",
)
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def xp_uses(tree):
    """Yield (dotted name after xp, keywords of the call, line) for `xp.a.b(...)` and
    `self.xp.a`."""
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    inner = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or id(node) in inner:
            continue
        names, root = [], node
        while isinstance(root, ast.Attribute) and root.attr != "xp":
            names.insert(0, root.attr)
            root = root.value.func if isinstance(root.value, ast.Call) else root.value
        is_xp = isinstance(root, ast.Attribute) or (isinstance(root, ast.Name) and root.id == "xp")
        if is_xp and names:
            call = calls.get(id(node))
            yield names, [k.arg for k in call.keywords] if call else [], node.lineno


def problems(source):
    for names, keywords, line in xp_uses(ast.parse(source)):
        known = [".".join(names[:n]) for n in range(len(names), 0, -1)]
        name = next((name for name in known if name in API["functions"]), None)
        if names == ["__version__"]:
            continue
        if name is None and names[0] != "cuda":
            yield f"line {line}: CuPy has no {names[0]}"
        elif name == ".".join(names):
            for keyword in keywords:
                if keyword not in (API["functions"][name] or ()):
                    yield f"line {line}: CuPy's {name} has no keyword {keyword}"
        elif name is None:
            yield f"line {line}: CuPy has no {'.'.join(names)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_xp_name_and_keyword_is_cupys(path):
    assert not list(problems(path.read_text()))


def test_the_uses_are_found():
    uses = [
        (".".join(names), keywords)
        for path in SOURCES
        for names, keywords, _ in xp_uses(ast.parse(path.read_text()))
    ]
    assert ("concatenate", ["axis"]) in uses
    assert ("cumsum", ["axis", "dtype"]) in uses
    assert ("cuda.runtime.getDeviceProperties", []) in uses
    assert len(uses) > 30


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("xp.fromiter2(x)", "CuPy has no fromiter2"),
        ("self.xp.exp(x, where=y)", "CuPy's exp has no keyword where"),
        ("backend.xp.sort(x, axis=0, stable=True)", "CuPy's sort has no keyword stable"),
        ("xp.cuda.nothing()", "CuPy has no cuda.nothing"),
    ],
)
def test_what_cupy_lacks_is_found(source, problem):
    assert [p.split(": ", 1)[1] for p in problems(source)] == [problem]


def test_the_list_is_of_cupy_14():
    assert API["version"].split(".")[0] == "14"


# -- the strict arrays refuse what CuPy refuses


def test_strict_arrays_do_not_mix_with_numpy():
    import numpy as np

    backend = StrictBackend()
    a, n = backend.to_device(np.ones(3)), np.ones(3)
    for mix in (
        lambda: a + n,
        lambda: n + a,
        lambda: n @ a,
        lambda: np.exp(a),
        lambda: np.asarray(a),
        lambda: np.concatenate([n, a]),
        lambda: backend.xp.concatenate([a, n]),
        lambda: backend.xp.where(a > 0, n, a),
        lambda: a[n.astype(int)],
        lambda: a.__setitem__(0, n),
        lambda: a.__iadd__(n),
    ):
        with pytest.raises(TypeError):
            mix()
    assert isinstance(a + 1.0, StrictArray)


def test_strict_arrays_have_cupys_methods_and_keywords_alone():
    import numpy as np

    a = StrictBackend().to_device(np.ones((2, 3)))
    assert a.sum(axis=0, keepdims=True).shape == (1, 3)
    with pytest.raises(TypeError, match="no keyword initial"):
        a.sum(initial=0)
    with pytest.raises(AttributeError, match="no setflags"):
        a.setflags()
    with pytest.raises(AttributeError, match="no nothing"):
        StrictBackend().xp.nothing(a)
    for read in (bool, int, float):
        with pytest.raises(TypeError, match="waits for the device"):
            read(a[0, 0])
