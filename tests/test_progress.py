"""Progress: the reports of loading, reading and scoring, and the line on a terminal."""

import io
import sys

import pytest

import npllama
import perplexity
import train
from conftest import TINY, make_llama, make_ops
from model_directory import write_model
from npllama import generate, progress_line
from npllama.errors import InputError
from npllama.progress import advance, on_progress, work
from npllama.progress_line import ProgressLine, progress_shown
from npllama.weights import Checkpoint
from training.run import WorkerThreads


@pytest.fixture
def told():
    """All calls of a listener: (what, done, total, is over)."""
    calls = []
    with on_progress(lambda w: calls.append((w.what, w.done, w.total, w.is_over))):
        yield calls


def check(calls, what):
    """Check that the calls report one work from 0 to its total without going back. Returns the
    number of steps."""
    assert {(name, total) for name, _done, total, _over in calls} == {(what, calls[0][2])}
    done = [call[1] for call in calls]
    assert done[0] == 0 and done[-1] == calls[0][2] > 0
    assert done == sorted(done)
    assert [call[3] for call in calls] == [False] * (len(calls) - 1) + [True]
    return len(set(done)) - 1


# -- which functions report progress


def test_nothing_is_told_where_nobody_listens(tmp_path, capsys):
    llama = npllama.load(write_model(tmp_path / "m", TINY), "numpy", dtype="float16")
    llama.generate([1] * 20, max_new_tokens=2)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", [None, "int8", "bfloat16"])
def test_loading_tells_of_every_tensor(tmp_path, told, dtype):
    directory = write_model(tmp_path / "m", TINY)
    llama = npllama.load(directory, "numpy", dtype=dtype)
    assert check(told, "loading the weights") == 3 + 9 * TINY.n_layers
    assert told[0][2] == Checkpoint(directory, TINY, dtype).nbytes == llama.parameters.nbytes


def test_a_prompt_tells_of_every_layer_of_every_chunk(told):
    llama = make_llama(make_ops("numpy"))
    cache = llama.new_cache()
    llama.prefill([1] * 25, cache, chunk=10)
    assert check(told, "reading the prompt") == 3 * TINY.n_layers
    told.clear()
    llama.forward(llama.to_tokens([1])[None], cache)  # decode steps report nothing
    assert told == []


def test_prompts_of_a_batch_are_one_work(told):
    llama = make_llama(make_ops("numpy"))
    llama.generate_batch([[1] * 20, [1] * 5, [1, 2]], max_new_tokens=3)
    assert check(told, "reading the prompt") == 3 * TINY.n_layers
    assert told[0][2] == 27 * TINY.n_layers


@pytest.mark.parametrize("prompts", [[[1] * 20, [1] * 5, [1] * 30, [1, 2]], [[1], [1, 2], [1] * 9]])
def test_of_prompts_that_join_later_nothing_is_told(told, prompts):
    """Prompts that join later are read while text is on the terminal, which a progress line would
    overwrite."""
    llama = make_llama(make_ops("numpy"))
    llama.generate_batch(prompts, max_new_tokens=3, batch_size=2, ignore_eos=True)
    assert check(told, "reading the prompt") == 2 * TINY.n_layers
    assert told[0][2] == sum(map(len, prompts[:2])) * TINY.n_layers
    told.clear()
    llama.prefill([1] * 4, llama.new_cache())  # the listener is called again
    assert check(told, "reading the prompt") > 0


def test_what_a_cache_holds_is_not_counted(told):
    llama = make_llama(make_ops("numpy"))
    cache = llama.new_cache()
    llama.generate([1] * 20, max_new_tokens=1, cache=cache)
    told.clear()
    llama.generate([1] * 22, max_new_tokens=1, cache=cache)
    assert check(told, "reading the prompt") > 0
    assert told[0][2] == 2 * TINY.n_layers


def test_a_long_text_tells_of_its_windows(told):
    """TINY's context is 64, so windows have 65 ids and start every 32 ids, with several chunks
    each."""
    llama = make_llama(make_ops("numpy"))
    perplexity.nats(llama, [1] * 200)
    assert check(told, "scoring the text") == 6 * TINY.n_layers
    told.clear()
    texts = ["a" * 200, "b", "", "c" * 70]
    perplexity.score_texts(llama, texts)
    assert check(told, "scoring the text") > 6 * TINY.n_layers
    total = told[0][2]
    told.clear()
    with WorkerThreads(2) as workers:  # the listener does not apply to other threads
        perplexity.score_texts(llama, texts, workers.map)
    assert check(told, "scoring the text") == 3
    assert told[0][2] == total


def test_work_that_fails_is_over(told, monkeypatch):
    llama = make_llama(make_ops("numpy"))
    feed_forward, layers = llama.ops.feed_forward, []

    def failing(x, layer):
        layers.append(layer)
        if len(layers) == 2:
            raise MemoryError
        return feed_forward(x, layer)

    monkeypatch.setattr(llama.ops, "feed_forward", failing)
    with pytest.raises(MemoryError):
        llama.prefill([1] * 20, llama.new_cache())
    assert [call[1:] for call in told][-2:] == [(20, 20 * TINY.n_layers, x) for x in (False, True)]
    with pytest.raises(InputError), work("other work", 5):  # separate from the failed work
        advance(2)
        raise InputError("")
    assert told[-1] == ("other work", 2, 5, True)


def test_listeners_are_of_their_context(told):
    inner = []
    with on_progress(lambda w: inner.append(w.done)), work("a", 3):
        advance(2)
        advance(2)  # more than the announced total
    assert (inner, told) == ([0, 2, 3, 3], [])
    with work("b", 1):
        pass
    assert told == [("b", 0, 1, False), ("b", 0, 1, True)]


# -- the line


class Terminal(io.StringIO):
    """A terminal that shows one line."""

    def isatty(self):
        return True

    @property
    def shown(self):
        shown = ""
        for part in self.getvalue().split("\r"):
            shown = part + shown[len(part) :]
        return shown.rstrip()


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def line():
    """A terminal, and a clock that the test controls."""
    terminal, clock = Terminal(), Clock()
    with progress_shown("npllama", terminal, clock):
        yield terminal, clock


def test_a_line_with_the_time_left_after_two_seconds(line):
    terminal, clock = line
    with work("reading the prompt", 1000):
        for _ in range(19):
            clock.now += 0.1
            advance(10)
        assert terminal.getvalue() == ""
        clock.now += 0.11
        advance(10)
        assert terminal.shown == "npllama: reading the prompt, 20%, 00:08 left"
        before = terminal.getvalue()
        clock.now += 0.1
        advance(100)
        assert terminal.getvalue() == before  # too early for an update
        clock.now += 7.9
        advance(200)
        assert terminal.shown == "npllama: reading the prompt, 50%, 00:10 left"
        clock.now += 3600
        advance(1)
        assert terminal.shown == "npllama: reading the prompt, 50%, 59:55 left"
    assert terminal.shown == ""
    assert terminal.getvalue().endswith("\r")


def test_each_work_has_its_own_two_seconds(line):
    terminal, clock = line
    with work("loading the weights", 10):
        clock.now += 1.9
        advance(9)
    clock.now += 50
    with work("reading the prompt", 10):
        clock.now += 1.9
        advance(5)
    assert terminal.getvalue() == ""


def test_a_shorter_line_leaves_nothing_of_the_longer(line):
    terminal, clock = line
    with work("x", 1000):
        clock.now += 3600
        advance(100)
        assert terminal.shown == "npllama: x, 10%, 9:00:00 left"
        clock.now += 1
        advance(890)
        assert terminal.shown == "npllama: x, 99%, 00:36 left"
    assert terminal.shown == ""


def test_an_interrupt_leaves_no_line(line):
    terminal, clock = line
    with pytest.raises(KeyboardInterrupt), work("x", 10):
        clock.now += 3
        advance(1)
        assert terminal.shown
        raise KeyboardInterrupt
    assert terminal.shown == ""


def test_no_line_in_a_pipe_or_without_a_stream(monkeypatch):
    pipe, clock = io.StringIO(), Clock()
    with progress_shown("npllama", pipe, clock), work("x", 10):
        clock.now += 3
        advance(1)
    assert pipe.getvalue() == ""
    monkeypatch.setattr(sys, "stderr", None)
    with progress_shown("npllama", clock=clock), work("x", 10):
        clock.now += 3
        advance(1)


def test_a_terminal_that_is_gone_ends_nothing():
    class Gone(Terminal):
        def write(self, text):
            raise OSError(5, "Input/output error")

    clock = Clock()
    with progress_shown("npllama", Gone(), clock), work("x", 10):
        clock.now += 3
        advance(1)


# -- the programs


@pytest.fixture
def slow(monkeypatch):
    """A function that makes stderr a terminal whose progress line uses a clock that advances one
    second per call.

    It is a function because pytest replaces the streams again after the fixtures.
    """
    terminal, clock = Terminal(), Clock()

    class Ticking(ProgressLine):
        def __init__(self, program, stream, _clock):
            def tick():
                clock.now += 1
                return clock.now

            super().__init__(program, stream, tick)

    monkeypatch.setattr(progress_line, "ProgressLine", Ticking)

    def install(*names):
        for name in ("stderr", *names):
            monkeypatch.setattr(sys, name, terminal)
        return terminal

    return install


@pytest.fixture
def model(tmp_path):
    return str(write_model(tmp_path / "model", TINY))


def test_the_command_line_shows_loading_and_reading_and_then_the_text(model, slow):
    """Text and progress share a terminal, so all progress lines must come before the text."""
    terminal = slow("stdout")
    prompt = "a" * 40
    args = ["--model", model, "--backend", "numpy", "--dtype", "int8", "--prompt", prompt]
    assert generate.main([*args, "--max-new-tokens", "3", "--temperature", "0"]) == 0
    lines = terminal.getvalue()
    assert "\rnpllama: loading the weights, " in lines
    assert "\rnpllama: reading the prompt, " in lines
    shown, text = lines.rsplit("\r", 1)
    assert prompt not in shown and text.startswith(prompt)


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_batch_has_its_own_line_once_its_prompts_are_read(model, slow, tmp_path, more):
    file = tmp_path / "prompts.txt"
    file.write_text("a\nbcd\nef\n")
    terminal = slow()
    args = ["--model", model, "--backend", "numpy", "--prompt-file", str(file), *more]
    args += ["--batch-size", "2", "--max-new-tokens", "3", "--temperature", "0"]
    assert generate.main(args) == 0
    reading, batch = terminal.getvalue().split("/3 [", 1)
    assert "\rnpllama: reading the prompt, " in reading
    *_, erased, _, _ = reading.split("\r")
    assert erased.isspace()  # the line is erased before the text starts
    assert "npllama" not in batch


def test_an_interrupt_while_the_prompt_is_read_shows_it(model, slow, capsys, monkeypatch):
    def interrupted(self, *_, **__):
        advance(1)
        advance(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(npllama.Llama, "forward", interrupted)
    terminal = slow()
    assert generate.main(["--model", model, "--backend", "numpy", "--prompt", "abc"]) == 130
    assert capsys.readouterr().out == "abc\n"
    assert "reading the prompt" in terminal.getvalue()
    assert terminal.shown == ""


def test_perplexity_shows_its_text(model, slow, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("One text of some length. " * 10)
    terminal = slow()
    assert perplexity.main(["--model", model, "--backend", "numpy", "--text", str(text)]) == 0
    assert "\rperplexity: scoring the text, " in terminal.getvalue()
    assert terminal.getvalue().splitlines()[-1].endswith("tokens/s")
    assert "nats per token" in capsys.readouterr().out


def test_training_shows_what_comes_before_its_steps(model, slow, tmp_path, monkeypatch):
    monkeypatch.setattr("training.progress.sgemm_rate", lambda run: 1e9)
    text = tmp_path / "text.txt"
    text.write_text("One.\n<|endoftext|>\n" * 9)
    terminal = slow()
    args = ["--text", str(text), "--from", model, "--out", str(tmp_path / "run")]
    assert train.main([*args, "--steps", "1", "--batch", "2", "--backend", "numpy"]) == 0
    for what in ("reading the weights", "encoding the text"):
        assert f"\rtrain: {what}, " in terminal.getvalue()


def test_programs_write_nothing_of_it_into_a_pipe(model, capsys):
    args = ["--model", model, "--backend", "numpy", "--prompt", "a" * 40]
    assert generate.main([*args, "--max-new-tokens", "1"]) == 0
    assert capsys.readouterr().err == ""
