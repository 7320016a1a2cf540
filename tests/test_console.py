"""Standard streams that are closed, full or in another locale, and clear error messages."""

import ast
import errno
import io
import json
import logging
import os
import subprocess
import sys

import pytest

import convert
import perplexity
from conftest import ROOT, TINY
from interruption import Interrupted
from model_directory import write_model
from npllama import console, generate, options
from npllama.console import ReaderLeftError, open_streams, reason, tell, utf8, write
from npllama.errors import InputError

PROGRAMS = [ROOT / "npllama" / "generate.py", *sorted((ROOT / "tools").glob("*.py"))]


class Broken(io.StringIO):
    """A stream whose writes fail with the given error number."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def write(self, text):
        raise OSError(self.number, os.strerror(self.number))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("model"), TINY))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("One.\n<|endoftext|>\nTwo.\n")
    return str(path)


@pytest.fixture
def closed_stderr(monkeypatch):
    opened = []

    def noting(*args, **options):
        opened.append(open(*args, **options))  # noqa: SIM115
        return opened[-1]

    monkeypatch.setattr(console, "open", noting, raising=False)
    monkeypatch.setattr(sys, "stderr", None)
    yield
    for file in opened:  # files that a program leaves open until it ends
        file.close()


# -- closed streams


def test_a_message_cannot_control_the_terminal(monkeypatch, capsys):
    tell("\x1b[31mred\tand\n")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    tell("\x1b[31mred\tand\n")
    assert capsys.readouterr().err == "\x1b[31mred\tand\n\n\ufffd[31mred\tand\n\n"


def test_closed_descriptors_are_opened_where_no_file_can_land_on_them(tmp_path):
    code = (
        "import json, os, sys\n"
        "from npllama.console import open_streams, tell\n"
        "open_streams(); tell('nowhere'); print('nowhere', file=sys.stderr)\n"
        "os.write(2, b'nowhere')\n"
        "devices = [os.fstat(fd).st_rdev == os.stat(os.devnull).st_rdev for fd in range(3)]\n"
        "inherited = [os.get_inheritable(fd) for fd in range(3)]\n"
        "with open(sys.argv[1], 'w') as file:\n"
        "    are_none = sys.stdin is sys.stdout is None\n"
        "    json.dump([devices, inherited, file.fileno(), are_none], file)\n"
    )
    told = tmp_path / "told.json"
    shell = 'exec "$0" -c "$1" "$2" <&- >&- 2>&-'
    subprocess.run(["sh", "-c", shell, sys.executable, code, str(told)], check=True, timeout=60)
    devices, inherited, fd, are_none = json.loads(told.read_text())
    assert (devices, inherited, are_none) == ([True] * 3, [True] * 3, True)
    assert fd > 2


def test_nothing_changes_where_streams_are_open():
    before = os.listdir("/dev/fd")
    open_streams()
    assert os.listdir("/dev/fd") == before


def test_with_standard_error_closed_standard_output_has_the_text_alone(
    model, capsys, closed_stderr
):
    args = ["--model", model, "--prompt", "Once", "--max-new-tokens", "3", "--no-echo"]
    assert (
        generate.main(
            [*args, "--ignore-eos", "--stats", "--logprobs", "--dtype", "float16", "--json"]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert json.loads(out)["finish_reason"] == "length"
    assert out.count("\n") == 1
    assert generate.main(["--model", "/nowhere", "--prompt", "a"]) == 2
    assert capsys.readouterr().out == ""


def test_with_standard_error_closed_a_tool_with_a_bar_works(model, text, capsys, closed_stderr):
    assert perplexity.main(["--model", model, "--text", text, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["texts"] == 2


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_every_program_opens_the_streams_first(path):
    tree = ast.parse(path.read_text())
    mains = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main"]
    assert all(ast.unparse(main.body[1]) == "open_streams()" for main in mains)
    assert bool(mains) == ("__main__" in path.read_text())


def test_a_tool_without_standard_output_says_so(model, text, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(perplexity, "score_texts", None)  # must not be called
    assert perplexity.main(["--model", model, "--text", text]) == 2
    assert "perplexity: error: standard output is closed" in capsys.readouterr().err


# -- messages for each type of error


def test_what_cannot_be_written_is_an_input_error(monkeypatch):
    for number, kind in ((errno.ENOSPC, InputError), (errno.EPIPE, ReaderLeftError)):
        monkeypatch.setattr(sys, "stdout", Broken(number))
        with pytest.raises(kind, match=f"cannot be written: {os.strerror(number)}"):
            write("text")


def test_a_line_that_standard_error_cannot_take_is_lost(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Broken(errno.ENOSPC))
    tell("lost")


def test_an_error_of_the_system_is_reported_as_what_it_is(capsys, monkeypatch):
    def fail(*_args, **_options):
        raise OSError(errno.EIO, "Input/output error", "model.safetensors")

    monkeypatch.setattr(options, "load", fail)
    assert generate.main(["--prompt", "a"]) == 2
    line = "error: model.safetensors: Input/output error\n"
    assert capsys.readouterr() == ("", f"npllama: {line}")
    monkeypatch.setattr(convert, "read_source", fail)
    assert convert.main(["source", "--inspect"]) == 2
    assert capsys.readouterr().err == f"convert: {line}"


class CupyOutOfMemoryError(MemoryError):
    """cupy.cuda.memory.OutOfMemoryError"""

    __module__ = "cupy.cuda.memory"


OUT_OF_GPU_MEMORY = "error: out of GPU memory: use a smaller model"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("a\nb: expected c"), 2, r"error: a\nb: expected c"),
        (MemoryError("Unable to allocate"), 2, "error: out of memory: use a smaller model"),
        (CupyOutOfMemoryError("Out of memory allocating 5 bytes"), 2, OUT_OF_GPU_MEMORY),
        (RuntimeError("cudaErrorMemoryAllocation: out of memory"), 2, OUT_OF_GPU_MEMORY),
        (RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: out of memory"), 2, OUT_OF_GPU_MEMORY),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), 2, OUT_OF_GPU_MEMORY),
        (OSError(errno.EIO, "Input/output error"), 2, "error: Input/output error"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Interrupted(15), 143, "interrupted"),
    ],
)
def test_every_error_is_one_line_and_an_exit_code(capsys, error, code, line):
    def fail():
        raise error

    assert console.exit_code("name", fail) == code
    assert capsys.readouterr() == ("", f"name: {line}\n")


def test_without_an_error_the_exit_code_is_that_of_the_work(capsys):
    assert [console.exit_code("name", lambda n=n: n) for n in (None, 0, 1, 130)] == [0, 0, 1, 130]
    assert capsys.readouterr() == ("", "")


def test_what_is_not_foreseen_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        console.exit_code("name", lambda: 1 // 0)

    def fail():
        raise RuntimeError("cudaErrorIllegalAddress")

    with pytest.raises(RuntimeError):
        console.exit_code("name", fail)


def test_what_the_package_logs_is_a_line_of_the_program_that_runs(capsys):
    def work():
        logging.getLogger("npllama.ops").info("compiling %s", "kernels")

    for program in ("train", "benchmark"):
        assert console.exit_code(program, work) == 0
        assert capsys.readouterr().err == f"{program}: compiling kernels\n"


def test_a_program_says_what_a_signal_and_a_lack_of_memory_mean_for_it(capsys):
    def fail(error):
        raise error

    for words, told in ((None, ""), ("goes on later", "name: goes on later\n")):
        code = console.exit_code("name", lambda: fail(KeyboardInterrupt), lambda words=words: words)
        assert (code, capsys.readouterr().err) == (130, told)
    console.exit_code("name", lambda: fail(MemoryError), out_of_memory="use less")
    assert capsys.readouterr().err == "name: error: out of memory: use less\n"


def test_a_broken_pipe_that_is_not_standard_output_is_an_error(capsys, monkeypatch):
    def fail(*_args, **_options):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(options, "load", fail)
    assert generate.main(["--prompt", "a"]) == 2
    assert capsys.readouterr().err == "npllama: error: Broken pipe\n"


def test_standard_input_that_cannot_be_read_is_one_line(capsys, monkeypatch):
    class Unreadable:
        def read(self):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": Unreadable()}))
    assert generate.main(["--prompt", "-"]) == 2
    assert "standard input cannot be read: Input/output error" in capsys.readouterr().err


def test_the_reason_of_an_error_names_its_file():
    assert reason(OSError(errno.ENOENT, "No such file", b"a.txt")) == "a.txt: No such file"
    assert reason(OSError("made by hand")) == "made by hand"
    assert reason(OSError()) == "OSError"


# -- locales


def test_streams_are_utf8_and_names_of_files_go_out_as_they_are(monkeypatch):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    open_streams()
    write("größe " + os.fsdecode(b"\xff"))
    tell("größe \udcff")
    assert out.buffer.getvalue() == "größe ".encode() + b"\xff"
    assert err.buffer.getvalue() == "größe \\udcff\n".encode()


def test_an_argument_is_utf8_whatever_the_locale_made_of_it(monkeypatch):
    monkeypatch.setattr(
        console.os, "fsencode", lambda text: text.encode("ascii", "surrogateescape")
    )
    as_ascii = "größe".encode().decode("ascii", "surrogateescape")
    assert utf8(as_ascii) == "größe"
    with pytest.raises(console.argparse.ArgumentTypeError, match="not UTF-8"):
        utf8(b"\xff".decode("ascii", "surrogateescape"))


def test_a_name_that_the_locale_split_into_bytes_is_whole_in_an_error():
    as_ascii = "größe".encode().decode("ascii", "surrogateescape")
    assert str(InputError(f"{as_ascii} does not exist")) == "größe does not exist"
    assert str(InputError("a\udcff\nb")) == r"a\udcff\nb"
    assert str(InputError("a\ud800")) == r"a\ud800"
