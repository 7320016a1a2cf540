"""npllama and the names of its programs, and Ctrl-C during startup."""

import os
import re
import signal
import subprocess
import sys

import pytest

import npllama
from conftest import ROOT, TINY
from model_directory import write_model
from npllama import early_interrupt
from npllama.__main__ import PROGRAMS, main, tools_folder


def call(capsys, *words):
    """Run npllama in this process, and return the exit code, stdout and stderr."""
    try:
        code = main(words)
    except SystemExit as end:  # raised by argparse
        code = end.code
    said = capsys.readouterr()
    return code, said.out, said.err


# -- the list of programs


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)])
def test_it_says_what_there_is(capsys, words):
    code, out, err = call(capsys, *words)
    assert (code, err) == (0, "")
    for word, about in PROGRAMS.items():
        assert re.search(rf"^  npllama {word} +{re.escape(about)}$", out, re.M)


def test_it_says_which_version_it_is(capsys):
    assert call(capsys, "--version") == (0, f"npllama {npllama.__version__}\n", "")


@pytest.mark.parametrize(
    "word, hint",
    [
        ("convrt", "did you mean npllama convert?"),
        ("Generate", "did you mean npllama generate?"),
        ("bench", "did you mean npllama benchmark?"),
        ("zzz", "expected the name of one"),
        ("", "expected the name of one"),
        ("--prompt", "try npllama generate --prompt ..."),
    ],
)
def test_an_unknown_word_is_one_line_with_the_nearest_one(capsys, word, hint):
    code, out, err = call(capsys, word, "x")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("npllama: error: ")
    assert repr(word) in err and hint in err and "npllama --help" in err


@pytest.mark.parametrize("word", PROGRAMS)
def test_each_word_starts_a_program_whose_help_has_that_name(capsys, monkeypatch, word):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/npllama", word])
    code, out, err = call(capsys, word, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: npllama {word} ")
    alone = f"python tools/{word}.py"
    if word in ("generate", "chat", "plain", "explore"):
        alone = f"python -m npllama.{word}"
    monkeypatch.setattr(sys, "argv", [f"/somewhere/{word}.py"])
    assert call(capsys, word, "--help")[1].startswith(f"usage: {alone} ")


def test_generate_by_its_word_is_the_module(capsys):
    from npllama import generate

    words = ["--prompt", "Once", "--temperature", "0", "--max-new-tokens", "5"]
    assert generate.main(words) == 0
    alone = capsys.readouterr()
    assert call(capsys, "generate", *words) == (0, alone.out, alone.err)


def test_the_programs_are_those_of_the_repository():
    assert tools_folder() == ROOT / "tools"


def test_importing_the_package_is_quick_and_its_names_are_there():
    code = (
        "import sys, npllama\n"
        "assert 'numpy' not in sys.modules\n"
        "assert {*npllama.__all__} <= {*dir(npllama)}\n"
        "assert npllama.Sampling.__module__ == 'npllama.sampling_options'\n"
        "from npllama import *\n"
        "assert load is npllama.load and issubclass(NpllamaError, Exception)\n"
        "assert not hasattr(npllama, 'lode')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- Ctrl-C


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "npllama.generate", "--prompt", "x"],
        ["-m", "npllama.chat"],
        ["-m", "npllama", "perplexity", "--text", "x"],
        [str(ROOT / "tools" / "convert.py"), "x", "y"],
    ],
    ids=["generate", "chat", "word", "tool"],
)
def test_ctrl_c_while_importing_ends_without_a_traceback(tmp_path, command):
    """A module in place of NumPy sends the signal while it is imported."""
    (tmp_path / "numpy.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    ended = subprocess.run([sys.executable, *command], env=env, capture_output=True, timeout=50)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, b"", b"")


def test_once_a_program_works_ctrl_c_is_its_own_again():
    early_interrupt.end_at_once()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    early_interrupt.handle_again()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    for chosen in (signal.SIG_IGN, lambda *_: None):  # nohup, and a handler of another library
        signal.signal(signal.SIGINT, chosen)
        try:
            early_interrupt.end_at_once()
            assert signal.getsignal(signal.SIGINT) is chosen
            early_interrupt.handle_again()
            assert signal.getsignal(signal.SIGINT) is chosen
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_program_that_works_hears_ctrl_c(capsys, monkeypatch, tmp_path):
    """A program restores the normal handling of Ctrl-C before it starts its work, so it ends with
    exit code 130 and one line."""
    model = str(write_model(tmp_path / "model", TINY))
    text = tmp_path / "text.txt"
    text.write_text("Once")

    def interrupted(*_args, **_options):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("perplexity.read_stories", interrupted)
    words = ("perplexity", "--model", model, "--text", str(text))
    assert call(capsys, *words) == (130, "", "perplexity: interrupted\n")
