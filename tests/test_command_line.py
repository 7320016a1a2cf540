"""python -m npllama.generate as users run it: standard output, standard error and exit code."""

import contextlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest

from chat_templates import need_jinja2
from conftest import TINY
from model_directory import write_model
from npllama import load, operating_system
from npllama.completion import Completion, Timings
from npllama.config import LlamaConfig
from npllama.dialogue import encode_chat
from npllama.errors import OutOfMemoryError
from npllama.generate import (
    BATCH_SIZE,
    default_batch_size,
    finish_reasons,
    main,
    parser,
    print_log_probs,
)
from npllama.generation import Generation
from npllama.ops import Ops
from npllama.sampling_options import Sampling, option

CONFIG = LlamaConfig(**{**vars(TINY), "context_length": 512})
GREEDY = ["--temperature", "0", "--max-new-tokens", "12", "--ignore-eos"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("model"), CONFIG))


def run(*args, **options):
    """Run the command in a separate process."""
    return subprocess.run(
        [sys.executable, "-m", "npllama.generate", *args], capture_output=True, **options
    )


def completion(model, prompt, **options):
    greedy = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    return load(model, backend="numpy").generate(prompt, **(greedy | options))


def call(capsys, *args):
    """Run the command in this process, and return the exit code, stdout and stderr."""
    code = main(args)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def error_line(capsys, *args):
    """Run a command that must fail with exit code 2, one line on stderr and an empty stdout.
    Returns the line."""
    try:
        code = main(args)
    except SystemExit as error:  # raised by argparse
        code = error.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("npllama: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


# -- text on stdout, and everything else on stderr


def test_stdout_is_the_prompt_and_the_completion_and_one_newline(model):
    result = run("--model", model, "--prompt", "Once", *GREEDY)
    assert result.returncode == 0
    assert result.stdout.decode() == "Once" + completion(model, "Once").text + "\n"
    assert result.stderr == b""


def test_no_echo_leaves_the_prompt_out(model, capsys):
    code, out, err = call(capsys, "--model", model, "--prompt", "Once", "--no-echo", *GREEDY)
    assert (code, out, err) == (0, completion(model, "Once").text + "\n", "")


def test_an_empty_prompt_is_bos_alone(model, capsys):
    _, out, _ = call(capsys, "--model", model, "--prompt", "", *GREEDY)
    assert out == completion(model, [1]).text + "\n"


def test_a_dash_reads_the_prompt_from_standard_input(model):
    result = run("--model", model, "--prompt", "-", *GREEDY, input="two\nlines ü\n".encode())
    want = "two\nlines ü" + completion(model, "two\nlines ü").text + "\n"
    assert result.stdout.decode() == want


def test_a_prompt_file_makes_a_batch(model, tmp_path, capsys):
    prompts = ["Once", "", "A longer prompt than that"]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts) + "\n")
    _, out, _ = call(capsys, "--model", model, "--prompt-file", str(file), *GREEDY)
    assert out == "".join(p + completion(model, p).text + "\n" for p in prompts)
    _, out, _ = call(capsys, "--model", model, "--prompt-file", str(file), "--no-echo", *GREEDY)
    assert out == "".join(completion(model, p).text + "\n" for p in prompts)


def test_lines_end_at_line_ends_alone(model, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffOnce\x0cupon\u2028a\r\n\r\nlast".encode())
    _, out, _ = call(capsys, "--model", model, "--prompt-file", str(file), "--json", *GREEDY)
    prompts = [json.loads(line)["prompt"] for line in out.splitlines()]
    assert prompts == ["Once\x0cupon\u2028a", "", "last"]


def test_a_terminal_is_not_sent_control_characters(model, tmp_path, monkeypatch):
    """Files get all bytes, but a terminal would execute an escape sequence."""
    import pty

    def say(stdout):
        args = ["--model", model, "--prompt", "", "--temperature", "3", "--top-p", "1"]
        args += ["--max-new-tokens", "300", "--seed", "1", "--ignore-eos"]
        with open(stdout, "w") as out:
            monkeypatch.setattr(sys, "stdout", out)
            assert main(args) == 0
            monkeypatch.undo()

    controls = {*range(9), 11, 12, *range(14, 32), 127}
    say(tmp_path / "out")
    assert set((tmp_path / "out").read_bytes()) & controls
    parent, child = pty.openpty()
    say(os.dup(child))
    shown = os.read(parent, 100_000)
    os.close(parent)
    os.close(child)
    assert len(shown) > 300
    assert not set(shown) & controls


def test_an_output_that_cannot_be_written_is_one_line(model):
    for more in ([], ["--json"]):
        with open("/dev/full", "w") as full:
            command = [sys.executable, "-m", "npllama.generate", "--model", model, *more]
            result = subprocess.run(
                [*command, "--prompt", "a"], stdout=full, stderr=subprocess.PIPE, text=True
            )
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1
        assert "standard output cannot be written: No space left" in result.stderr


def test_text_streams_as_it_is_made(model, monkeypatch):
    """Write through a buffered pipe, which delays text that is not flushed."""
    made = []  # the number of tokens at each write

    class Pipe(io.RawIOBase):
        def writable(self):
            return True

        def write(self, content):
            made.append(n_tokens[0])
            return len(content)

    n_tokens = [0]
    run_ = Generation._run

    def counted(self):
        for piece in run_(self):
            n_tokens[0] += 1
            yield piece

    monkeypatch.setattr(Generation, "_run", counted)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(Pipe())))
    args = ["--model", model, "--prompt", "Once", "--max-new-tokens", "40", "--ignore-eos"]
    assert main([*args, "--temperature", "1", "--top-p", "1"]) == 0
    assert made[0] <= 1
    assert len(set(made)) > 20  # except for tokens that are part of a character


def test_ctrl_c_keeps_what_was_said_ends_the_line_and_exits_130(tmp_path):
    config = LlamaConfig(**{**vars(TINY), "context_length": 100_000})
    model = str(write_model(tmp_path / "model", config))
    process = subprocess.Popen(
        [sys.executable, "-m", "npllama.generate", "--model", model, "--prompt", "Once"]
        + ["--max-new-tokens", "90000", "--temperature", "1", "--ignore-eos", "--stats"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    said = b""
    while len(said) < 200:
        said += os.read(process.stdout.fileno(), 1000)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (said + rest).startswith(b"Once")
    assert (said + rest).endswith(b"\n")
    assert b"Traceback" not in err
    assert b"interrupted" in err


def test_ctrl_c_keeps_what_all_rows_have_said(model, tmp_path, capsys, monkeypatch):
    def interrupted(self):
        for i, piece in enumerate(run_(self)):
            if i == 20:
                raise KeyboardInterrupt
            yield piece

    run_ = Generation._run
    monkeypatch.setattr(Generation, "_run", interrupted)
    file = tmp_path / "prompts.txt"
    file.write_text("Once\nTwice\nThrice\n")
    args = ("--model", model, "--prompt-file", str(file), "--temperature", "0", "--ignore-eos")
    code, out, _ = call(capsys, *args)
    monkeypatch.undo()
    assert code == 130
    lines = out.removesuffix("\n").split("\n")
    for line, prompt in zip(lines, ("Once", "Twice", "Thrice"), strict=True):
        said = line.removeprefix(prompt)
        assert said
        assert completion(model, prompt, max_new_tokens=20).text.startswith(said.rstrip("\ufffd"))


def test_a_reader_that_leaves_is_no_error(model):
    process = subprocess.Popen(
        [sys.executable, "-m", "npllama.generate", "--model", model, "--prompt", "Once"]
        + ["--max-new-tokens", "400", "--temperature", "1", "--ignore-eos"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    os.read(process.stdout.fileno(), 10)
    process.stdout.close()
    assert process.wait(timeout=30) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


def test_output_is_utf8_whatever_the_locale(model):
    env = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "", "PYTHONUTF8": "0"}
    result = run("--model", model, "--prompt", "größe 🦙", *GREEDY, env=env)
    assert result.returncode == 0
    assert result.stdout.decode().startswith("größe 🦙")


# -- options


def test_every_option_reaches_the_generation(model, capsys):
    options = {
        "temperature": 1.2, "top_k": 40, "top_p": 0.8, "min_p": 0.01,
        "repetition_penalty": 1.4, "seed": 11, "max_new_tokens": 20,
    }  # fmt: skip
    args = [a for name, v in options.items() for a in ("--" + name.replace("_", "-"), str(v))]
    _, out, _ = call(capsys, "--model", model, "--prompt", "Once", "--ignore-eos", *args)
    assert out == "Once" + completion(model, "Once", **options).text + "\n"
    changed = {
        "temperature": 2.0, "top_k": 2, "top_p": 0.2, "min_p": 0.5,
        "repetition_penalty": 5.0, "seed": 12, "max_new_tokens": 10,
    }  # fmt: skip
    for name, value in changed.items():  # each option changes the text
        assert completion(model, "Once", **(options | {name: value})).text != out[4:-1], name


@dataclass(frozen=True)
class WithTypicalP(Sampling):
    """The table of options with one additional option."""

    typical_p: float = option(
        1.0,
        least=sys.float_info.min,
        most=1,
        expected="above 0 and at most 1",
        metavar="P",
        help="choose among the most typical tokens that have P together; 1 for all",
        method="keep_typical_p",
        off=1,
    )


def keep_typical_p(self, logits, p):
    """Locally typical sampling (Meister et al. 2022, equation 10).

    Keeps the fewest tokens whose probabilities sum to more than p, starting with the tokens whose
    surprise is closest to the entropy.
    """
    xp, probability = self.xp, self.softmax(logits)
    surprise = -xp.where(probability > 0, self.log_softmax(logits), 0)
    entropy = (probability * surprise).sum(axis=-1, keepdims=True)
    order = xp.abs(surprise - entropy).argsort(axis=-1)
    falling = xp.take_along_axis(probability, order, axis=-1)
    before = xp.cumsum(falling, axis=-1) - falling
    kept = xp.zeros(logits.shape, dtype=bool)
    xp.put_along_axis(kept, order, before <= p, axis=-1)
    return xp.where(kept, logits, -math.inf)


def test_a_new_filter_joins_in_one_place(model, capsys, monkeypatch):
    """A line of the table and its method: the option, its check and its use follow."""
    monkeypatch.setattr("npllama.options.Sampling", WithTypicalP)
    monkeypatch.setattr(Ops, "keep_typical_p", keep_typical_p, raising=False)
    assert "choose among the most typical tokens" in " ".join(parser().format_help().split())
    args = ("--model", model, "--backend", "numpy", "--prompt", "Once", "--json", "--ignore-eos")
    args += ("--max-new-tokens", "12", "--temperature", "1", "--top-p", "1")
    assert "typical_p is 2.0: expected above 0" in error_line(capsys, *args, "--typical-p", "2")

    # With p close to 0, only the token with the most typical surprise remains at each step.
    llama = load(model, backend="numpy")
    ids = llama.encode("Once")
    n_prompt = len(ids)
    for _ in range(12):
        logits = llama.logits(ids)[-1].astype("float64")
        log_p = logits - logits.max()
        log_p -= np.log(np.exp(log_p).sum())
        entropy = -(np.exp(log_p) * log_p).sum()
        ids.append(int(np.abs(-log_p - entropy).argmin()))
    _, out, _ = call(capsys, *args, "--typical-p", "1e-9")
    assert json.loads(out)["ids"] == ids[n_prompt:]

    plain = {"max_new_tokens": 12, "temperature": 1, "top_p": 1, "seed": 1, "ignore_eos": True}
    assert llama.generate("Once", **plain).ids != ids[n_prompt:]
    plain["sampling"] = WithTypicalP()
    assert llama.generate("Once", **plain, typical_p=1e-9).ids == ids[n_prompt:]


def test_stop_texts(model, capsys):
    text = completion(model, "Once").text
    args = ("--stop", "never said", "--stop", text[3:5])
    _, out, _ = call(capsys, "--model", model, "--prompt", "Once", *GREEDY, *args)
    assert out == "Once" + text[: text.index(text[3:5])] + "\n"


def test_context_limits_prompt_and_completion(model, capsys):
    args = ("--model", model, "--prompt", "abcd", "--json", "--ignore-eos", "--context", "10")
    _, out, _ = call(capsys, *args)
    result = json.loads(out)  # BOS, the space and 4 bytes leave 4 positions
    assert (len(result["ids"]), result["finish_reason"]) == (4, "length")


def test_stats_show_speed_memory_and_the_seed(model, capsys):
    _, out, err = call(
        capsys, "--model", model, "--prompt", "a", "--stats", "--seed", "77", *GREEDY
    )
    assert out.startswith("a")
    rows = {line[:20].strip(): line[20:].strip() for line in err.splitlines()}
    assert rows["seed"] == "77"
    assert rows["dtype"] == "float32"
    assert rows["backend"].startswith("numpy")
    for name in ("prefill", "decode"):
        assert "tokens/s" in rows[name]
        assert "GB/s" in rows[name]
    assert rows["time to first token"].endswith("ms")
    assert rows["memory"].startswith("weights")


def test_stats_count_the_memory_of_worker_processes(model, capsys, monkeypatch):
    monkeypatch.setattr(operating_system, "resident_bytes", lambda: 10**15)
    args = ("--model", model, "--backend", "numpy", "--prompt", "a", "--stats", *GREEDY)
    assert ", peak 1000000000.0 MB\n" in call(capsys, *args)[2]
    monkeypatch.setattr(operating_system, "peak_bytes", lambda: 1000)
    assert ", peak 0.0 MB (some weights were never read)\n" in call(capsys, *args)[2]


def test_stats_of_a_batch_sum_up_why_rows_ended(model, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("Once\n" * 7)
    code, _, err = call(capsys, "--model", model, "--prompt-file", str(file), "--stats", *GREEDY)
    assert code == 0
    assert re.search(r"^finish +7 length$", err, re.M)
    completions = [Completion("", [], [], end, Timings(), 0) for end in ("length", "eos", "eos")]
    assert finish_reasons(completions) == "2 eos, 1 length"
    assert finish_reasons(completions[:1]) == "length"


def test_the_random_seed_that_stats_shows_reproduces_the_text(model, capsys):
    args = ("--model", model, "--prompt", "a", "--temperature", "1", "--stats", "--json")
    args += ("--max-new-tokens", "30")
    _, out, err = call(capsys, *args)
    seed = err.split("seed")[-1].strip()
    _, again, _ = call(capsys, *args, "--seed", seed)
    assert json.loads(again)["ids"] == json.loads(out)["ids"]


def test_json_is_one_object_a_prompt(model, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("Once\nTwice\n")
    args = ("--model", model, "--prompt-file", str(file), "--json", *GREEDY)
    _, out, _ = call(capsys, *args)
    for line, prompt in zip(out.splitlines(), ("Once", "Twice"), strict=True):
        result, want = json.loads(line), completion(model, prompt)
        assert (result["prompt"], result["text"], result["ids"]) == (prompt, want.text, want.ids)
        assert result["finish_reason"] == "length"
        assert "log_probs" not in result
        assert (result["prompt_tokens"], result["new_tokens"]) == (want.prompt_tokens, 12)
        assert (result["timings"]["rows"], result["timings"]["new_tokens"]) == (2, 24)
    _, out, _ = call(capsys, *args, "--logprobs")
    assert json.loads(out.splitlines()[0])["log_probs"] == pytest.approx(
        completion(model, "Once").log_probs, abs=1e-4
    )


@pytest.mark.parametrize("size", ["1", "2", "7"])
def test_a_batch_size_changes_nothing_of_what_is_said(model, tmp_path, capsys, size):
    file = tmp_path / "prompts.txt"
    file.write_text("Once\nTwice upon a time\n\nb\nc\n")
    args = ("--model", model, "--prompt-file", str(file), "--seed", "5", "--max-new-tokens", "9")
    for more in ((), ("--no-echo",)):
        want = call(capsys, *args, *more)[:2]
        assert call(capsys, *args, *more, "--batch-size", size)[:2] == want
    want = call(capsys, *args, "--json")[1].splitlines()
    got = call(capsys, *args, "--json", "--batch-size", size)[1].splitlines()
    same = ("prompt", "text", "ids", "finish_reason", "seed")
    pick = [[json.loads(line)[name] for name in same] for line in got]
    assert pick == [[json.loads(line)[name] for name in same] for line in want]


def test_a_json_line_is_written_as_soon_as_those_before_it_are(model, tmp_path, monkeypatch):
    """Lines are not delayed until all prompts have ended. After Ctrl-C, each prompt that had
    started has a line."""
    file = tmp_path / "prompts.txt"
    file.write_text("a\nb\nc\nd\ne\n")
    lines, waiting = [], []

    def keep(text):
        lines.append(json.loads(text))
        waiting.append(len(made[0].waiting))
        if len(lines) == 2:
            raise KeyboardInterrupt

    made, turns = [], Generation.turns
    monkeypatch.setattr(Generation, "turns", lambda self: made.append(self) or turns(self))
    monkeypatch.setattr("npllama.generate.write", keep)
    monkeypatch.setattr("npllama.generation.TURN", 0)  # one step per turn
    args = ("--model", model, "--prompt-file", str(file), "--batch-size", "1", "--json", *GREEDY)
    assert main(args) == 130
    assert [line["prompt"] for line in lines][:2] == ["a", "b"]
    assert waiting[:2] == [4, 3]
    assert len(lines) <= 3 and all(line["finish_reason"] == "interrupted" for line in lines[2:])


def test_prompts_that_have_not_begun_are_not_shown_after_ctrl_c(model, tmp_path, capsys, patch_run):
    file = tmp_path / "prompts.txt"
    file.write_text("a\nb\nc\nd\n")
    patch_run(after_rows=1)
    args = ("--model", model, "--prompt-file", str(file), "--batch-size", "1", *GREEDY)
    code, out, _ = call(capsys, *args)
    assert code == 130
    assert out.startswith("a" + completion(model, "a").text + "\nb")
    assert "\nc" not in out and "\nd" not in out


@pytest.fixture
def patch_run(monkeypatch):
    def patch(after_rows):
        """Raise Ctrl-C when `after_rows` rows have ended and the next one has generated text."""
        pieces = Generation.__iter__

        def interrupted(self):
            for number, text in pieces(self):
                yield number, text
                if number >= after_rows:
                    raise KeyboardInterrupt

        monkeypatch.setattr(Generation, "__iter__", interrupted)

    return patch


def test_by_default_a_batch_is_what_is_fast_and_fits_the_memory(model, monkeypatch):
    llama = load(model, backend="numpy")
    prompts = [[1, 5]] * 500
    assert default_batch_size(llama, prompts, 60) == BATCH_SIZE
    assert default_batch_size(llama, prompts[:3], 60) == 3
    sizes = []
    for free in range(0, 10_000_000, 100_000):
        monkeypatch.setattr(llama.backend, "free_bytes", lambda free=free: free)
        with contextlib.suppress(OutOfMemoryError):
            sizes.append(default_batch_size(llama, prompts, 60))
    assert 1 <= sizes[0] < BATCH_SIZE == sizes[-1] and sizes == sorted(sizes)
    assert len(sizes) < 100  # the smallest memory was not enough for one row


def test_progress_is_shown_on_a_terminal_that_does_not_show_the_text(
    model, tmp_path, capsys, monkeypatch
):
    file = tmp_path / "prompts.txt"
    file.write_text("a\nb\nc\n")
    args = ("--model", model, "--prompt-file", str(file), "--batch-size", "1", *GREEDY)
    assert "prompt/s" not in call(capsys, *args)[2]
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    for more in ((), ("--json",)):
        err = call(capsys, *args, *more)[2]
        assert "/3 [" in err and "tokens/s" in err
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert "tokens/s" not in call(capsys, *args)[2]


def test_logprobs_are_shown_on_stderr(model, capsys):
    _, out, err = call(capsys, "--model", model, "--prompt", "Once", "--logprobs", *GREEDY)
    want = completion(model, "Once")
    assert out == "Once" + want.text + "\n"
    shown = [(int(line[:6]), float(line[6:16])) for line in err.splitlines()[1:]]
    assert [id_ for id_, _ in shown] == want.ids
    assert [p for _, p in shown] == pytest.approx(want.log_probs, abs=1e-3)


def test_logprobs_tell_rows_apart_and_show_the_likeliest(model, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("Once\nTwice\n")
    args = ("--model", model, "--prompt-file", str(file), "--logprobs")
    _, _, err = call(capsys, *args, *GREEDY)
    lines = err.splitlines()
    assert [line for line in lines if line.startswith("prompt")] == [
        "prompt 1 of 2: 'Once'",
        "prompt 2 of 2: 'Twice'",
    ]
    assert len(lines) == 2 * (1 + 1 + 12) and lines[1].endswith("piece")
    _, _, err = call(capsys, *args, "2", *GREEDY)
    rows = [line.split() for line in err.splitlines() if line[:6].strip().isdigit()]
    assert len(rows) == 24
    for _id, log_prob, piece, first, highest, _second, second in rows:  # greedy: the first wins
        assert (first, highest) == (piece, log_prob) and float(second) <= float(highest)
    _, out, _ = call(capsys, *args, "2", "--json", *GREEDY)
    result = json.loads(out.splitlines()[1])
    assert [[*token] for top in result["top_logprobs"] for token in top] == (
        24 * [["id", "text", "log_prob"]]
    )
    assert [top[0]["id"] for top in result["top_logprobs"]] == result["ids"]
    _, out, _ = call(capsys, *args, "--json", *GREEDY)
    assert "top_logprobs" not in json.loads(out.splitlines()[0])
    line = error_line(capsys, "--model", model, "--prompt", "a", "--logprobs", "21")
    assert "top_logprobs is 21: expected a whole number from 0 to 20" in line


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_dtype_is_what_computes(model, capsys, dtype):
    _, _, err = call(
        capsys, "--model", model, "--prompt", "a", "--dtype", dtype, "--stats", *GREEDY
    )
    assert dtype in err


def test_chat_wraps_the_prompt_as_ids(model, capsys):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    llama = load(model, backend="numpy")
    ids = encode_chat(llama.tokenizer, messages)
    generation = llama.new_generation(
        [ids], max_new_tokens=12, ignore_eos=True, seed=1, fresh_text=True
    )
    text = "".join(piece for _, piece in generation)
    args = ("--model", model, "--chat", "--prompt", "Hi", "--system", "Be brief.")
    _, out, _ = call(capsys, *args, "--max-new-tokens", "12", "--ignore-eos", "--seed", "1")
    assert out == "Hi\n" + text + "\n"


def test_chat_without_a_template_says_so_and_on_the_shipped_model_is_refused(model, capsys):
    args = ("--chat", "--prompt", "Hi", *GREEDY)
    code, out, err = call(capsys, "--model", model, *args)
    assert code == 0 and out.startswith("Hi\n")
    assert err == (
        f"npllama: {model} has no chat template (in chat_template.jinja or tokenizer_config.json): "
        "Llama-2-chat's format is used; name another with --chat-format (chat_format= in Python), "
        "or continue a text if the model was not trained to chat\n"
    )
    line = error_line(capsys, *args)
    assert "--chat needs a chat model, and the one that ships with npllama tells stories" in line


def test_escapes_count_with_e_alone(model, capsys):
    written, meant = r"a\tb\nc \\ \u00fc \ud83e\udd99", "a\tb\nc \\ ü 🦙"
    args = ("--model", model, "--prompt", written, *GREEDY)
    assert call(capsys, *args)[1] == written + completion(model, written).text + "\n"
    assert call(capsys, *args, "-e")[1] == meant + completion(model, meant).text + "\n"


def test_escapes_count_in_stop_system_and_answer_too(model, capsys, monkeypatch):
    asked = []

    def generation(self, prompts, **options):
        asked.append((prompts, options["stop"]))
        raise KeyboardInterrupt

    monkeypatch.setattr("npllama.llama.Llama.new_generation", generation)
    args = ("--model", model, "--chat", "--prompt", "Hi", "--stop", r"\t")
    args += ("--system", r"A\nB", "--answer", r"C\tD")
    assert main([*args, "-e"]) == main(args) == 130
    messages = [{"role": "system", "content": "A\nB"}, {"role": "user", "content": "Hi"}]
    ids = encode_chat(load(model, "numpy").tokenizer, messages, answer="C\tD")
    assert asked[0] == ([ids], ["\t"])
    assert asked[1][0] != [ids] and asked[1][1] == [r"\t"]


@pytest.mark.parametrize(
    "text, said",
    [
        (r"ab\q", r"has \q at character 3: -e expects \n, \t, \\ or \uXXXX"),
        ("ab\\", r"has \ at character 3: -e expects \n"),
        (r"\u12g4", r"has \u12g4 at character 1: -e expects"),
        (r"\u12", r"has \u12 at character 1: -e expects"),
        (r"\ud83e", r"has an unpaired \uXXXX from D800 to DFFF: expected a high one"),
    ],
)
def test_a_wrong_escape_is_one_line(model, capsys, text, said):
    for name, *rest in (("--prompt",), ("--stop", "--prompt", "a")):
        line = error_line(capsys, "--model", model, "-e", name, text, *rest)
        assert f"{name} {said}" in line


def test_special_tokens_count_with_special_alone(tmp_path, capsys):
    directory = write_model(tmp_path / "m", replace(CONFIG, vocab_size=262))
    (directory / "added_tokens.json").write_text('{"<step>": 260, "<step>>": 261}')
    llama = load(directory, "numpy")
    text = "a</s>b<step>><step>c"
    args = ("--model", str(directory), "--prompt", text, *GREEDY)
    plain = llama.encode(text)
    assert not {2, 260, 261} & {*plain}
    assert call(capsys, *args)[1] == text + completion(directory, plain).text + "\n"
    a, b, c = (llama.tokenizer.encode(letter, bos=False) for letter in "abc")
    special = [1, *a, 2, *b, 261, 260, *c]
    assert call(capsys, *args, "--special")[1] == text + completion(directory, special).text + "\n"
    assert "--special is for a text" in error_line(capsys, *args, "--special", "--chat")


def test_a_prompt_file_may_be_standard_input(model, monkeypatch, capsys):
    def stdin(content):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    args = ("--model", model, "--prompt-file", "-", *GREEDY)
    stdin(b"Once\r\n\nTwice\n")
    code, out, err = call(capsys, *args)
    assert (code, err) == (0, "")
    assert out == "".join(p + completion(model, p).text + "\n" for p in ("Once", "", "Twice"))
    stdin(b"")
    assert "standard input is empty: expected one prompt per line" in error_line(capsys, *args)
    stdin(b"\xff")
    assert "standard input is not UTF-8 (byte 0)" in error_line(capsys, *args)
    stdin(b"a\n" + b"long" * 250)
    assert "standard input, line 2: 1002 tokens do not fit" in error_line(capsys, *args)
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input is closed" in error_line(capsys, *args)


def test_a_prompt_that_fills_the_context_says_so(model, tmp_path, capsys):
    args = ("--model", model, "--context", "6", "--ignore-eos")  # BOS, the space and 4 bytes
    code, out, err = call(capsys, *args, "--prompt", "abcd")
    assert (code, out) == (0, "abcd\n")
    assert err == (
        "npllama: the prompt fills the context of 6 tokens, so there is no room for a new token: "
        "shorten it or give a larger --context\n"
    )
    assert call(capsys, *args, "--prompt", "abc")[2] == ""
    assert call(capsys, *args, "--prompt", "abcd", "--max-new-tokens", "0")[2] == ""
    code, _, err = call(capsys, "--model", model, "--prompt", "a" * 510)
    assert code == 0 and err.endswith("no room for a new token: shorten it\n")
    file = tmp_path / "prompts.txt"
    file.write_text("a\nabcd\nefgh\n")
    code, _, err = call(capsys, *args, "--prompt-file", str(file))
    assert code == 0 and err.count("\n") == 1
    assert "2 of 3 prompts fill (the first is number 2) the context of 6 tokens" in err


def test_without_a_model_the_one_that_ships_is_used(capsys):
    code, out, err = call(capsys, "--prompt", "Once", *GREEDY)
    assert (code, err) == (0, "")
    assert out == "Once" + completion(None, "Once").text + "\n"


def test_help_explains_every_option():
    text = parser().format_help()
    assert "(--prompt TEXT | --prompt-file FILE)" in " ".join(text.split())
    for action in parser()._actions:
        assert action.help, action.dest
    for word in ("temperature", "--prompt-file", "GPU", "seed"):
        assert word in text


def test_help_and_import_load_nothing_for_later():
    """Importing these modules takes a considerable part of the time of `--help`."""
    later = ("subprocess", "concurrent.futures", "threadpoolctl", "multiprocessing", "tqdm")
    later += ("psutil", "safetensors")
    code = (
        "import sys, npllama, npllama.generate\n"
        "try: npllama.generate.main(['--help'])\n"
        f"except SystemExit as end: print(end.code, [m for m in {later} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--max-new-tokens" in out.stdout
    assert out.stdout.endswith("\n0 []\n")


def test_slow_weights_are_told_of_in_one_line(tmp_path, capsys):
    for dtype, is_slow in (("float16", True), ("bfloat16", False)):
        model = str(write_model(tmp_path / dtype, CONFIG, dtype=dtype))
        command = ("--model", model, "--backend", "numpy", "--prompt", "a", *GREEDY)
        code, _out, err = call(capsys, *command)
        assert code == 0
        assert (err.count("\n"), "bfloat16" in err, "int8" in err) == (is_slow,) * 3


# -- wrong input: one line, exit code 2, nothing on stdout


def test_errors_of_the_command_line_itself(capsys, model, tmp_path):
    assert "give --prompt TEXT or --prompt-file FILE" in error_line(capsys)
    for stray, *words in (
        ("Once", "Once"),
        ("upon", "--prompt", "Once", "upon", "a"),
        ("Once", "Once", "--prompt", "upon"),
    ):
        line = f"{stray!r} belongs to no option: give the text with --prompt, in quotation marks"
        assert line in error_line(capsys, *words)
    assert "unrecognized arguments: --warm 3" in error_line(capsys, "--prompt", "a", "--warm", "3")
    for name in ("--prompt", "--prompt-file", "--system"):
        twice = error_line(capsys, name, "x", name, "y")
        assert f"argument {name}: it is given twice: expected one" in twice
    assert "not allowed with" in error_line(capsys, "--prompt", "a", "--prompt-file", "b")
    assert "invalid float" in error_line(capsys, "--prompt", "a", "--temperature", "warm")
    assert "--system is for --chat" in error_line(capsys, "--prompt", "a", "--system", "b")
    assert "--prompt-file '/nowhere' cannot be read" in error_line(
        capsys, "--prompt-file", "/nowhere"
    )
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert "is empty" in error_line(capsys, "--prompt-file", str(empty))
    latin = tmp_path / "latin.txt"
    latin.write_bytes("größe".encode("latin-1"))
    assert "is not UTF-8 (byte 2)" in error_line(capsys, "--prompt-file", str(latin))


def test_errors_of_the_arguments(capsys, model):
    def line(*args):
        return error_line(capsys, "--model", model, "--prompt", "abc", *args)

    assert "temperature is -1.0: expected 0 or above" in line("--temperature", "-1")
    assert "top_p is 2.0" in line("--top-p", "2")
    assert "max_new_tokens is -5: expected a whole number" in line("--max-new-tokens", "-5")
    assert "seed is -5" in line("--seed", "-5")
    assert "a stop text is empty" in line("--stop", "")
    assert "trained for 512" in line("--context", "513")
    assert "context is 0" in line("--context", "0")
    assert line("--context", "4").endswith(
        ": 5 tokens do not fit the context of 4: shorten the prompt, or give --context "
        "(context= in Python) up to 512\n"
    )
    too_long = error_line(capsys, "--model", model, "--prompt", "a" * 600)
    assert too_long.endswith(
        "of 512: shorten the prompt; the model was trained for 512 positions\n"
    )


def test_the_line_of_a_prompt_that_is_too_long_is_named(capsys, model, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a\n\n" + "long" * 250 + "\nb\n")
    for chat, n in ((), 1002), (("--chat",), 1017):
        line = error_line(capsys, "--model", model, "--prompt-file", str(file), *chat)
        assert f"{file}, line 3: {n} tokens do not fit the context of 512" in line


def test_errors_of_the_model_directory(capsys, tmp_path, model):
    def line(path):
        return error_line(capsys, "--model", str(path), "--prompt", "abc")

    assert "does not exist" in line(tmp_path / "nothing")
    file = tmp_path / "model.bin"
    file.touch()
    assert "is a file: expected a model directory" in line(file)
    assert "has no config.json: expected a model directory; hf download NAME" in line(tmp_path)
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", f"{tmp_path / 'empty'}/"):
        assert "empty is empty: expected a model directory; hf download NAME" in line(folder)
    bare = write_model(tmp_path / "bare", CONFIG, tokenizer=False)
    assert f"{bare} has no tokenizer.model or tokenizer.json: copy" in line(bare)
    narrow = write_model(tmp_path / "narrow", replace(CONFIG, vocab_size=200))
    pieces = f"{narrow / 'tokenizer.model'} has 260 pieces, but the model has 200 embedding rows"
    assert pieces in line(narrow)
    damaged = write_model(tmp_path / "damaged", CONFIG)
    with open(damaged / "model.safetensors", "r+b") as weights:
        weights.truncate(5000)
    assert "damaged or truncated" in line(damaged)


def test_a_tokenizer_that_fits_badly_is_one_line_of_warning(capsys, tmp_path):
    rows = replace(CONFIG, vocab_size=2000)
    directory = write_model(tmp_path / "m", rows)
    code, out, err = call(capsys, "--model", str(directory), "--prompt", "a", *GREEDY)
    assert code == 0 and out.startswith("a")
    assert err.startswith("npllama: the tokenizer has 260 tokens, but the model has 2000 embedding")
    assert err.count("\n") == 1


def test_log_probabilities_name_added_tokens(capsys, tmp_path):
    rows = replace(CONFIG, vocab_size=262, eos_ids=(261,))
    directory = write_model(tmp_path / "m", rows)
    (directory / "added_tokens.json").write_text('{"<step>": 260}')
    ids = [100, 260, 261]  # the last id is an EOS without a name
    completion = Completion("a<step>", ids, [-1.0, -2.0, -3.0], "eos", Timings(), 0)
    print_log_probs(load(directory, "numpy"), completion)
    lines = capsys.readouterr().err.splitlines()[1:]
    assert [line.split()[2] for line in lines] == ["'<0x61>'", "'<step>'", "''"]


def test_too_little_memory_is_one_line_with_both_numbers(capsys, model, monkeypatch):
    monkeypatch.setattr("npllama.backend.Backend.free_bytes", lambda self: 50_000)
    line = error_line(capsys, "--model", model, "--backend", "numpy", "--prompt", "a")
    assert "GB of memory needed (weights" in line
    assert "0.00 GB are free" in line


def chat_directory(tmp_path, template):
    directory = write_model(tmp_path / "m", CONFIG)
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return str(directory)


@pytest.mark.parametrize("end", ["--chat", "--chat-format"])
def test_chat_uses_the_checkpoints_template_or_the_format_that_is_named(capsys, tmp_path, end):
    need_jinja2()
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}>"
    directory = chat_directory(tmp_path, template)
    llama = load(directory, backend="numpy")
    tokenizer = llama.tokenizer
    args = ["--model", directory, "--chat", "--prompt", "Hi</s>", "--system", "S", *GREEDY]
    if end == "--chat":
        first, second = (tokenizer.encode(t, bos=False) for t in ("system: S", "user: Hi</s>"))
        ids = [1, *first, 2, *second, 2, *tokenizer.encode(">", bos=False)]
    else:
        args += ["--chat-format", "zephyr"]
        text = ["<|system|>\nS", "\n<|user|>\nHi</s>", "\n<|assistant|>\n"]
        first, second, third = (tokenizer.encode(t, bos=False) for t in text)
        ids = [1, *first, 2, *second, 2, *third]
    greedy = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}
    text = llama.generate(ids, fresh_text=True, **greedy).text
    code, out, err = call(capsys, *args)
    assert (code, out, err) == (0, f"Hi</s>\n{text}\n", "")


def test_chat_begins_the_answer_that_the_caller_gives(capsys, model):
    llama = load(model, backend="numpy")
    ids = encode_chat(llama.tokenizer, [{"role": "user", "content": "Hi"}], answer="Sure")
    assert ids == llama.encode("[INST] Hi [/INST] Sure")
    text = llama.generate(ids, max_new_tokens=12, temperature=0, ignore_eos=True).text
    args = ("--model", model, "--chat", "--prompt", "Hi", "--answer", "Sure", *GREEDY)
    args += ("--chat-format", "llama-2")
    assert call(capsys, *args) == (0, f"Hi\nSure{text}\n", "")
    assert call(capsys, *args, "--no-echo") == (0, f"{text}\n", "")


def test_chat_with_a_template_that_cannot_be_rendered_is_one_line(capsys, tmp_path):
    need_jinja2()
    directory = chat_directory(tmp_path, "{{ x")
    line = error_line(capsys, "--model", directory, "--chat", "--prompt", "Hi")
    assert "tokenizer_config.json cannot be rendered" in line
    code, _, _ = call(capsys, "--model", directory, "--prompt", "Hi", *GREEDY)
    assert code == 0


@pytest.mark.parametrize("option", ["--answer=a", "--chat-format=vicuna"])
def test_options_of_chat_need_it(capsys, model, option):
    line = error_line(capsys, "--model", model, "--prompt", "Hi", option)
    assert f"{option.split('=')[0]} is for --chat" in line


def test_cupy_where_there_is_none_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    line = error_line(capsys, "--backend", "cupy", "--prompt", "a")
    assert "backend cupy cannot be used" in line
