"""python -m npllama.chat, as a user runs it through pipes and at a terminal."""

import io
import json
import os
import re
import signal
import subprocess
import sys

import pytest

from conftest import TINY
from model_directory import write_model
from npllama import Chat, chat, load
from npllama.chat import main, parser
from npllama.chat_commands import COMMANDS, command_words
from npllama.chat_formats import zephyr
from npllama.config import LlamaConfig
from npllama.console import ReaderLeftError
from npllama.dialogue import encode_chat
from npllama.errors import InputError
from npllama.generation import Generation
from npllama.interrupts import Interrupts, ended_by_signals
from npllama.message_input import Entry, PipedInput, TypedInput, read_entry
from terminal import Terminal

CONFIG = LlamaConfig(**{**vars(TINY), "context_length": 512})
GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
FLAGS = ["--temperature", "0", "--max-new-tokens", "12", "--ignore-eos"]
CUT = "npllama: the answer ends at the limit of 12 tokens (--max-new-tokens, /set max-new-tokens)\n"
PROMPT = "\x1b[?2004h>>> "  # of readline, which then takes a paste as one line


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("model"), CONFIG))


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    """No test reads or writes the history of whoever runs it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def call(model, monkeypatch, capsys):
    """The program in this process, with lines of standard input."""

    def call(lines, *args, chat=("--chat-format", "zephyr")):
        content = lines if isinstance(lines, bytes) else lines.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        code = main(["--model", model, "--backend", "numpy", *chat, *FLAGS, *args])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture
def dialogue(model):
    """The same dialogue from Python."""
    return Chat(load(model, backend="numpy"), chat_format="zephyr", **GREEDY)


def error_line(call, lines, *args, out=""):
    """The line of a call that must end with exit code 2, behind notes on answers that were cut."""
    code, said, err = call(lines, *args)
    assert (code, said) == (2, out)
    err = err.replace(CUT, "")
    assert err.startswith("npllama: error: ") and err.count("\n") == 1
    return err.removeprefix("npllama: error: ")


# -- through pipes


def test_each_line_is_a_message_and_stdout_has_the_answers_alone(call, dialogue):
    answers = [dialogue.say(text).text for text in ("Hi", "größe 🦙", "/etc", "a\nb", "c")]
    lines = '\ufeffHi\r\n\n  \ngröße 🦙\n//etc\n"""a\nb"""\n"""c"""'
    code, out, err = call(lines)
    assert (code, out) == (0, "".join(f"{answer}\n" for answer in answers))
    assert err == 5 * CUT


def test_an_answer_is_there_before_the_next_line_is(model, dialogue):
    """A program that waits for the answer before it says more gets it."""
    command = [sys.executable, "-m", "npllama.chat", "--model", model, "--backend", "numpy"]
    with subprocess.Popen(
        [*command, "--chat-format", "zephyr", *FLAGS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
    ) as process:
        for text in ("Hi", "You"):
            answer = f"{dialogue.say(text).text}\n".encode()
            process.stdin.write(f"{text}\n".encode())
            said = b""
            while len(said) < len(answer):
                said += process.stdout.read(len(answer) - len(said))
            assert said == answer
        process.stdout.close()  # and then it leaves
        process.stdin.write(b"more\n")
        assert process.wait(60) == 0


def test_ctrl_c_ends_a_program_in_a_pipe(tmp_path):
    config = LlamaConfig(**{**vars(TINY), "context_length": 100_000})
    model = str(write_model(tmp_path / "model", config))
    command = [sys.executable, "-m", "npllama.chat", "--model", model, "--chat-format", "zephyr"]
    process = subprocess.Popen(
        [*command, "--max-new-tokens", "90000", "--temperature", "1", "--ignore-eos"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdin.write(b"Hi\n")
    process.stdin.flush()
    said = b""
    while len(said) < 200:
        said += os.read(process.stdout.fileno(), 1000)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, b"")
    assert (said + rest).endswith(b"\n")


def test_the_shipped_model_continues_each_line_as_a_story(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Once upon\nThe dog\n")))
    assert main(["--backend", "numpy", *FLAGS]) == 0
    out, err = capsys.readouterr()
    llama = load(backend="numpy")
    assert out == "".join(f"{llama.generate(t, **GREEDY).text}\n" for t in ("Once upon", "The dog"))
    assert err == f"npllama: {chat.STORIES}\n" + 2 * CUT


def test_a_model_without_a_format_says_so_first(call, model):
    code, _, err = call("Hi\n", chat=())
    assert code == 0
    assert err.startswith(
        f"npllama: {model} has no chat template (in chat_template.jinja or tokenizer_config.json): "
        "Llama-2-chat's format is used; name another with --chat-format (chat_format= in Python), "
        "or continue a text if the model was not trained to chat\n"
    )


def test_a_wrong_line_ends_a_program_in_a_pipe(call, dialogue, tmp_path):
    answer = f"{dialogue.say('Hi').text}\n"

    def line(second, *args):
        message = error_line(call, b"Hi\n" + second, *args, out=answer)
        assert message.startswith("standard input, line 2: ")
        return message

    assert "it is not UTF-8 (byte 1 of the line): convert" in line(b"a\xff\n")
    assert 'input ends inside a message: expected """ at its end' in line(b'"""a\nb\nc')
    assert "there is no command '/regn' (did you mean /regen?): /help" in line(b"/regn\nYou\n")
    assert "there is no command '/': /help lists the commands; write // for" in line(b"/")
    assert "/clear takes no argument: found 'all'" in line(b"/clear all")
    assert "/save needs the name of a file: write /save FILE" in line(b"/save  \n")
    assert "the name of the file contains a zero byte" in line(b"/save a\0b")
    assert "cannot be read: No such file" in line(f"/load {tmp_path}/none".encode())
    assert "temperature is -1.0: expected 0 or above" in line(b"/set temperature -1")
    for command in (b"/system", b"/set stop"):
        assert r"the text has a single \uXXXX from D800" in line(command + rb' "\ud83e"')
    code, out, err = call("/clear\n/undo\n/bye\n")
    assert (code, out, err) == (
        2,
        "",
        "the dialogue is empty\n"
        "npllama: error: standard input, line 2: there is no message to remove\n",
    )


def test_wrong_options_are_one_line(call, model, monkeypatch, capsys):
    def line(*args, lines="Hi\n"):
        try:
            return error_line(call, lines, *args)
        except SystemExit as end:  # argparse
            assert end.code == 2
            return capsys.readouterr().err

    for word in ("--chat", "--prompt", "--prompt=Hi"):
        name = word.partition("=")[0]
        assert f"{name} is an option of generate: messages are typed, or piped" in line(word)
    assert "'Hi' belongs to no option: messages are typed, or piped to standard" in line("Hi")
    assert "write --system=TEXT for" in line("--system")
    assert "temperature is -1.0: expected 0 or above" in line("--temperature", "-1")
    assert "max_new_tokens is -1: expected a whole number" in line("--max-new-tokens", "-1")
    assert "a stop text is empty" in line("--stop", "")
    assert "--model is empty" in line("--model", "")
    assert r"--system has \q" in line("-e", "--system", r"\q")
    monkeypatch.setattr(sys, "stdin", None)
    assert main([]) == 2
    assert "standard input is closed: expected messages, one per line" in capsys.readouterr().err
    for option in ("--system=S", "--chat-format=zephyr"):
        assert main([option]) == 2
        name = option.split("=")[0]
        assert f"{name} needs a chat model, and the model that ships" in capsys.readouterr().err
    bare = write_model(f"{model}-bare", CONFIG, tokenizer=False)
    assert line("--model", str(bare)).startswith(f"{bare} has no tokenizer.model")


def test_help_explains_every_option_and_every_command(call):
    for action in parser()._actions:
        assert action.help, action.dest
    code, out, err = call("/help\n/?\n")
    assert (code, out) == (0, "")
    for name, command in COMMANDS.items():
        assert err.count(f"  /{name} {command.takes}".rstrip()) == 2
        assert err.count(command.about) == 2


# -- commands


def test_system_prompts_are_given_shown_changed_and_taken_away(call, dialogue):
    said = []
    for system in ("A\nB", "C", None, "D\nE", "D\nF"):
        dialogue.system = system
        said.append(dialogue.say("Hi").text)
    lines = 'Hi\n/system\n/system C\nHi\n/system ""\n/system\nHi\n/system "D\\nE"\nHi\n'
    lines += '/system """D\nF"""\nHi\n'
    code, out, err = call(lines, "-e", "--system", r"A\nB")
    assert (code, out.split("\n")) == (0, [*said, ""])
    for note in ("system prompt: A\nB\n", "prompt is set\n", "is removed\n", "there is no"):
        assert note in err


def test_answers_are_made_again_and_taken_back(call, dialogue):
    options = {"temperature": 2, "top_p": 1, "seed": 5}
    dialogue.options |= options
    one = dialogue.say("Hi").text
    other = [dialogue.stream_again(seed=5 + i).read().text for i in (1, 2)]
    assert len({one, *other}) == 3
    dialogue.undo()
    last = [dialogue.say("You").text]
    last.append(dialogue.stream_again(seed=6).read().text)
    dialogue.clear()
    last.append(dialogue.say("Hi").text)
    flags = [f for name, v in options.items() for f in ("--" + name.replace("_", "-"), str(v))]
    code, out, err = call("Hi\n/regen\n/regen\n/undo\nYou\n/regen\n/clear\nHi\n", *flags)
    assert (code, out) == (0, "".join(f"{text}\n" for text in [one, *other, *last]))
    assert "removed this message and its answer: Hi\n" in err and "the dialogue is empty\n" in err


def test_dialogues_are_saved_and_loaded(call, dialogue, tmp_path):
    file = tmp_path / "a dialogue.json"
    dialogue.system = "S"
    dialogue.say("größe")
    code, _, err = call(f"größe\n/save {file}\n/clear\n/save {file}\n", "--system", "S")
    assert code == 0 and f"saved 3 messages to {file}\n" in err
    assert json.loads(file.read_text())[1:] == []
    call(f'größe\n/save "{file}"\n', "--system", "S")
    assert json.loads(file.read_text(encoding="utf-8")) == dialogue.messages
    answer = Chat(dialogue.llama, dialogue.messages, chat_format="zephyr", **GREEDY).say("You").text
    code, out, err = call(f"/load {file}\nYou\n/system\n")
    assert (code, out) == (0, f"{answer}\n")
    assert f"loaded 3 messages from {file}\n" in err and "system prompt: S\n" in err
    file.write_text(json.dumps(dialogue.messages[1:]))
    err = call(f"/load {file}\n/load {file}\n", "--system", "S")[2]
    removed = "; it has no system prompt, and the earlier one is removed"
    line = f"loaded 2 messages from {file}"
    assert err == f"{line}{removed}\n{line}\n"


def test_settings_are_shown_changed_and_checked_as_the_flags_are(call, dialogue):
    dialogue.say("Hi")
    options = {"temperature": 1.5, "top_k": 9, "seed": 3, "max_new_tokens": 7, "stop": ["\n", "x"]}
    answer = dialogue.say("Hi", **options).text
    lines = "Hi\n/set temperature 1.5\n/set top_k 9\n/set --seed 3\n/set max-new-tokens=7\n"
    code, out, err = call(lines + '/set stop "\\n" "x"\nHi\n/set\n/set min-p\n')
    assert (code, out.removesuffix("\n").split("\n", 1)[1]) == (0, answer)
    rows = dict(line.split(maxsplit=1) for line in err.split("\n") if line.startswith("  "))
    assert rows == {
        "temperature": "1.5", "top-k": "9", "top-p": "0.9", "min-p": "0.0", "seed": "3",
        "repetition-penalty": "1.0", "max-new-tokens": "7", "stop": '"\\n" "x"', "ignore-eos": "on",
    }  # fmt: skip
    _, _, err = call('/set seed random\n/set stop a b\n/set ignore-eos off\n/set stop ""\n')
    assert err == '  seed  random\n  stop  "a b"\n  ignore-eos  off\n  stop  ""\n'
    code, out, err = call("/set max-new-tokens 0\nHi\n/undo\n")
    assert "at the limit of 0 tokens (--max-new-tokens, /set max-new-tokens), and the " in err
    assert err.endswith("line 3: there is no message to remove\n")
    for wrong, message in {
        "top-k 1.5": "top_k is '1.5': expected a whole number from 0, 0 for all",
        "min-p x": "min_p is 'x': expected from 0 to 1",
        "min-p 2": "min_p is 2.0: expected from 0 to 1",
        "seed -1": "seed is -1: expected",
        "seed x": "seed is 'x': expected a whole number from 0, or random",
        "max-new-tokens -1": "max_new_tokens is -1: expected a whole number from 0",
        "ignore-eos 1": "ignore-eos is '1': expected on or off",
        "warmth 2": "there is no setting 'warmth': expected one of temperature, top-k,",
    }.items():
        assert message in error_line(call, f"/set {wrong}\n")


def test_settings_change_where_the_memory_is_full(talk, dialogue, monkeypatch):
    """The cache of the chat is allocated already, and answers need no other."""
    monkeypatch.setattr(dialogue.llama.backend, "free_bytes", lambda: 0)
    session, _, err = talk("/set temperature 0", "Hi", None)
    assert err == f"  temperature  0.0\n{CUT}\n" and len(session.chat.messages) == 2


def test_stats_count_the_ids_that_are_kept_and_read(call, dialogue):
    dialogue.say("Hi")
    dialogue.say("You")
    turn = dialogue.turn
    assert turn.n_kept > turn.n_read > 0
    code, _, err = call("Hi\nYou\n/stats\n")
    assert code == 0
    rows = {line[:20].strip(): line[21:] for line in err.splitlines()}
    assert rows["prompt"] == (
        f"{turn.n_prompt} tokens: {turn.n_kept} kept in the cache, {turn.n_read} read"
    )
    assert rows["context used"] == f"{turn.n_prompt + 12} of 512 tokens"
    assert "tokens/s" in rows["decode"] and rows["finish"] == "length"
    assert call("Hi\nYou\n", "--stats")[2].count("kept in the cache") == 2
    assert call("Hi\nYou\n/clear\n/stats\n")[2].count(rows["context used"]) == 1
    assert "this session has no answer yet" in error_line(call, "/stats\n")


def test_a_full_context_leaves_old_turns_out_or_is_an_error(call):
    lines = "".join(f"{letter * 60}\n" for letter in "abcdefg")
    code, _, err = call(lines)
    assert (code, err.count(CUT)) == (0, 7)
    notes = err.replace(CUT, "").splitlines()
    assert notes and all("npllama: the context is full: " in note for note in notes)
    code, _, err = call(lines, "--no-drop")
    assert code == 2
    error = err.replace(CUT, "")
    assert error.startswith("npllama: error: standard input, line ") and error.count("\n") == 1
    assert "the dialogue has 5" in error and error.endswith(
        " tokens in the chat format, and the context has room for 512 tokens of prompt and "
        "answer: undo turns, clear the dialogue or drop old turns\n"
    )
    line = error_line(call, "a" * 300, "--system", "S", "--context", "300")
    assert "line 1: the message and the system prompt have 3" in line
    assert line.endswith("answer: shorten one of them or give a larger context\n")


def test_an_answer_that_the_context_ends_says_so(call):
    _, _, err = call("Hi\n", "--max-new-tokens", "500", "--context", "90")
    assert err == "npllama: the answer ends because the context of 90 tokens is full\n"


def test_the_shipped_model_has_no_place_for_roles(monkeypatch, capsys, tmp_path):
    file = tmp_path / "saved.json"
    file.write_text('[{"role": "system", "content": "S"}]')
    texts = {"/system S": "a system prompt", f"/load {file}": "the system prompt of the file"}
    for command, what in texts.items():
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(command.encode())))
        assert main(["--backend", "numpy"]) == 2
        assert f"{what} needs a chat model, and this model only" in capsys.readouterr().err


# -- Ctrl-C


def test_ctrl_c_is_heard_once_in_a_block_and_nowhere_else():
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), interrupts.heard():
            try:
                os.kill(os.getpid(), signal.SIGINT)
            finally:
                os.kill(os.getpid(), signal.SIGINT)  # while the first one is dealt with
        os.kill(os.getpid(), signal.SIGINT)
        with interrupts.heard():
            pass
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup has it
    try:
        with Interrupts() as interrupts, interrupts.heard():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


class Typed:
    """A terminal's input: units, of which an exception is raised."""

    is_typed = True

    def __init__(self, *units):
        self.units = [*units]

    def read(self, sign):
        unit = self.units.pop(0) if self.units else None
        if isinstance(unit, str | None):
            return unit
        raise unit

    def where(self):
        return ""

    def remember(self, entry):
        pass


@pytest.fixture
def talk(model, capsys, dialogue):
    """A session with units that are typed; the session, stdout, stderr."""

    def talk(*units):
        session = chat.Session(dialogue)
        dialogue.options |= {"sampling": load(model).new_generation([""]).rows[0].sampling}
        chat.talk(session, Typed(*units))
        said = capsys.readouterr()
        return session, said.out, said.err

    return talk


def interrupt_generations(monkeypatch, after, number=signal.SIGINT):
    """Ctrl-C, or another signal, in each generation, after so many tokens."""
    run = Generation._run

    def interrupted(self):
        for i, piece in enumerate(run(self)):
            if i == after:
                os.kill(os.getpid(), number)
            yield piece

    monkeypatch.setattr(Generation, "_run", interrupted)


def test_ctrl_c_keeps_the_answer_so_far_and_the_program_goes_on(talk, monkeypatch, dialogue):
    whole = dialogue.say("Hi").text
    dialogue.clear()
    interrupt_generations(monkeypatch, after=8)
    session, out, err = talk("Hi", KeyboardInterrupt(), "You", "/stats", None)
    answers = [m["content"] for m in session.chat.messages if m["role"] == "assistant"]
    assert len(answers) == 2 and out == "".join(f"{answer}\n" for answer in answers)
    assert 0 < len(answers[0].rstrip("\ufffd")) < len(whole)
    assert whole.startswith(answers[0].rstrip("\ufffd"))
    assert err.startswith("\n(Ctrl-D or /bye leaves)\nprompt ") and err.endswith("\n\n")
    assert "finish               interrupted\n" in err


def test_ctrl_c_while_a_piece_is_written_does_not_write_it_twice(talk, monkeypatch):
    written = []

    def show(text):
        written.append(text)
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("npllama.chat_session.show", show)
    session, _, _ = talk("Hi", None)
    assert "".join(written) == session.chat.messages[1]["content"] + "\n"


def test_ctrl_c_before_the_answer_leaves_the_dialogue_as_it_was(talk, monkeypatch):
    before = talk("Hi")[0].chat.messages.copy()
    assert len(before) == 2
    monkeypatch.setattr(
        Generation, "_prefill_prompts", lambda self: os.kill(os.getpid(), signal.SIGINT)
    )
    session, _, err = talk("You", "/regen", "/bye")
    assert session.chat.messages == before and session.is_over
    assert err == 2 * "npllama: the answer had not begun, and the dialogue is unchanged\n"


def test_errors_at_a_terminal_are_lines_after_which_it_goes_on(talk, monkeypatch):
    stream = Chat.stream

    def failing(self, text, **options):
        if text == "fail":
            raise MemoryError
        return stream(self, text, **options)

    monkeypatch.setattr(Chat, "stream", failing)
    session, out, err = talk("/nothing", "a" * 600, "fail", "Hi", "/undo", "/undo")
    assert out.count("\n") >= 1 and session.chat.messages == []
    lines = err.replace(CUT, "").splitlines()
    assert lines[0].startswith("npllama: there is no command '/nothing'")
    assert lines[1].endswith("tokens of prompt and answer: shorten the message")
    assert lines[2] == "npllama: out of memory: shorten the dialogue with /undo or /clear"
    assert lines[3:] == [
        "removed this message and its answer: Hi", "npllama: there is no message to remove", "",
    ]  # fmt: skip

    def leave(self, text, **options):
        raise ReaderLeftError("")

    monkeypatch.setattr(Chat, "stream", leave)
    with pytest.raises(ReaderLeftError):
        talk("Hi", "You")


# -- a prompt cache


def first_turn(err):
    """The rows of the first --stats."""
    rows = [line for line in err.splitlines() if line[:20].strip() in ("prompt", "prompt cache")]
    return {line[:20].strip(): line[21:] for line in rows[:2]}


@pytest.mark.parametrize("loads", [False, True])
def test_a_resumed_chat_reads_only_what_its_file_lacks(call, dialogue, tmp_path, loads):
    file, saved = tmp_path / "cache", tmp_path / "saved.json"
    options = ("--system", "S" * 30, "--prompt-cache", str(file), "--stats")
    code, _, err = call(f"Hi\n/save {saved}\n", *options)
    assert code == 0 and first_turn(err)["prompt cache"] == "0 tokens loaded"
    stored = dialogue.llama.load_cache(file).ids[0]
    lines = f"/load {saved}\nYou\nAnd\n" if loads else "Other\nAnd\n"
    plain = call(lines, "--system", "S" * 30)
    code, out, err = call(lines, *options)
    assert code == 0 and out.count("\n") >= 2 and (loads or out == plain[1])

    messages = [{"role": "system", "content": "S" * 30}, {"role": "user", "content": "Other"}]
    if loads:
        messages = [*json.loads(saved.read_text()), {"role": "user", "content": "You"}]
    ids = encode_chat(dialogue.llama.tokenizer, messages, zephyr)
    now = dialogue.llama.load_cache(file).ids[0]
    n_kept = next(i for i, id_ in enumerate(now) if stored[i : i + 1] != [id_])
    assert (n_kept == len(stored)) == loads and n_kept > 30
    if not loads:
        assert now[: len(ids)] == ids
    n_prompt, *counts = map(int, re.findall(r"\d+", first_turn(err)["prompt"]))
    assert counts == [n_kept, n_prompt - n_kept]
    assert first_turn(err)["prompt cache"] == f"{len(stored)} tokens loaded"
    decode = dialogue.llama.decode  # the answer of the file has other ids than its text
    assert decode(now[:n_prompt]) == decode(ids)
    assert len(now) > n_prompt + 20  # both turns


def test_the_cache_is_saved_however_a_chat_ends(call, dialogue, tmp_path, monkeypatch):
    dialogue.say("Hi")
    kept = dialogue.cache.ids[0]

    def stored(lines, code):
        file = tmp_path / f"cache {len(os.listdir(tmp_path))}"
        try:
            ended = call(lines, "--prompt-cache", str(file))[0]
        except SystemExit as end:
            ended = end.code
        assert ended == code
        return dialogue.llama.load_cache(file).ids[0]

    assert stored("Hi\n", 0) == stored("Hi\n/bye\nYou\n", 0) == stored("Hi\n/nothing\n", 2) == kept
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        before = signal.getsignal(number)
        with monkeypatch.context() as patch:
            interrupt_generations(patch, 8, number)
            assert len(kept) > len(stored("Hi\n", code)) > len(kept) - 12
        assert signal.getsignal(number) == before


def test_the_first_of_two_signals_ends_a_block_and_ignored_ones_stay_ignored():
    with pytest.raises(SystemExit), ended_by_signals():
        try:
            os.kill(os.getpid(), signal.SIGHUP)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
    try:
        with ended_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_cache_is_read_only_or_refused_before_the_first_message(call, model, tmp_path):
    file = tmp_path / "cache"
    wrong = ("--prompt-cache", str(file), "--prompt-cache-read-only")
    assert "does not exist" in error_line(call, "Hi\n", *wrong)
    assert "give both" in error_line(call, "Hi\n", wrong[-1])
    assert call("/help\n", *wrong[:2])[0] == 0 and not file.exists()  # there is nothing to save
    answers = call("Hi\n", *wrong[:2])[1]
    content = file.read_bytes()
    assert call("Hi\nYou\n", *wrong)[1].startswith(answers)
    assert file.read_bytes() == content
    other = str(write_model(tmp_path / "other", CONFIG, seed=1))
    line = error_line(call, "Hi\n", *wrong, "--model", other)
    assert "prompt cache of another model" in line


# -- what a message is


@pytest.mark.parametrize(
    "units, entries",
    [
        (["", " ", "a"], [Entry("a")]),
        (["/set seed 1", "//x", "a /b"], [Entry("set seed 1", True), Entry("/x"), Entry("a /b")]),
        (["/bin/ls\na: not found"], [Entry("/bin/ls\na: not found")]),  # pasted
        (['"""', "a", "", '  b"""  ', "c"], [Entry("a\n\n  b"), Entry("c")]),
        (['"""a"""', '"""\na\n"""', '""""""'], [Entry("a"), Entry("a")]),
        (['"""/set', "x", '"""'], [Entry("/set\nx")]),
        (['"""/set"""'], [Entry("/set")]),
        (['/system """a', 'b"""', "c"], [Entry("system a\nb", True), Entry("c")]),
        (['/system  """a"""', 'x """y'], [Entry("system  a", True), Entry('x """y')]),
        (['//x """y', '/set stop """'], [Entry('/x """y'), Entry('set stop """', True)]),
        (['"""a', "b"], []),  # Ctrl-D
    ],
)
def test_entries(units, entries):
    source = Typed(*units)
    assert [*iter(lambda: read_entry(source), None)] == entries


def test_lines_of_a_pipe_end_at_line_ends_alone(monkeypatch):
    content = "a\x0cb\u2028c\r\nd\re".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    source = PipedInput()
    assert [source.read(""), source.read(""), source.read("")] == ["a\x0cb\u2028c", "d\re", None]


# -- at a terminal


def test_a_session_at_a_terminal(tmp_path, state):
    config = LlamaConfig(**{**vars(TINY), "context_length": 100_000})
    model = str(write_model(tmp_path / "model", config))
    args = ("npllama.chat", "--model", model, "--chat-format", "zephyr", "--temperature", "1")
    args += ("--ignore-eos", "--max-new-tokens")
    saved = tmp_path / "saved.json"
    with Terminal(*args, "90000") as terminal:  # which is not over before Ctrl-C comes
        assert "/help lists the commands; Ctrl-D leaves" in terminal.wait_for(PROMPT)
        terminal.type("größe\r")
        terminal.wait_for("größe\r\n", more=300)
        terminal.interrupt_until(PROMPT)
        terminal.type("/set max-new-tokens 3\r")
        terminal.wait_for(PROMPT)
        terminal.type("\x1b[200~two\rlines\r\r/and\ta tab\r\x1b[201~")
        terminal.type("\r")
        terminal.wait_for(PROMPT)
        terminal.type('"""three\r')
        terminal.wait_for("... ")
        terminal.type('lines"""\r')
        terminal.wait_for(PROMPT)
        terminal.type("not sent")
        terminal.wait_for("not sent")
        terminal.interrupt_until("(Ctrl-D or /bye leaves)")
        terminal.wait_for(PROMPT)
        terminal.type(f"/sa\t {saved}\r")
        terminal.wait_for(PROMPT)
        terminal.type("\x04")
        assert terminal.exit_code() == 0
    messages = json.loads(saved.read_text())
    texts = ["größe", "two\nlines\n\n/and\ta tab", "three\nlines"]
    assert [m["content"] for m in messages[::2]] == texts
    assert len(messages[1]["content"]) > 200
    controls = {*map(chr, [*range(9), *range(11, 32), 127])} - {"\r"}
    shown = terminal.shown.split("größe\r\n", 1)[1].split("^C")[0]
    assert {*messages[1]["content"]} & controls
    assert not {*shown.removeprefix("\x1b[?2004l")} & controls

    history = state / "npllama" / "chat_history"
    assert history.stat().st_mode & 0o777 == 0o600
    with Terminal(*args, "3") as terminal:  # the arrows find what was typed the last time
        terminal.wait_for(PROMPT)
        terminal.type("\x1b[A\x1b[A\x1b[A\r")
        terminal.wait_for(PROMPT)
        terminal.type(f"/save {saved}\r")
        terminal.wait_for(PROMPT)
        terminal.type("/bye\r")
        assert terminal.exit_code() == 0
    assert json.loads(saved.read_text())[0]["content"] == "two\nlines\n\n/and\ta tab"


def test_a_paste_is_one_message_without_bracketed_paste_too(monkeypatch):
    lines = ["one", "two", "three"]
    monkeypatch.setattr("npllama.message_input._readline", lambda: None)
    monkeypatch.setattr("npllama.message_input._more_is_there", lambda: len(lines) in (1, 2))
    monkeypatch.setattr("builtins.input", lambda sign: lines.pop(0) if lines else 1 / 0)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert TypedInput(chat.History(None)).read(">>> ") == "one\ntwo\nthree"


def test_typed_lines_where_the_output_is_no_terminal(monkeypatch, capsys):
    """As in `npllama chat | tee log`: without readline, which would write to standard output."""
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO("größe\n\n\xff".encode("latin-1")))
    )
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    source = TypedInput(chat.History(None))
    with pytest.raises(InputError, match="is not UTF-8: set the terminal's encoding to UTF-8"):
        source.read(">>> ")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("größe\nb".encode())))
    source = TypedInput(chat.History(None))
    assert [source.read(">>> ") for _ in range(3)] == ["größe", "b", None]
    assert capsys.readouterr() == ("", 4 * ">>> ")


def test_tab_completes_commands_settings_and_names_of_files(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "other").touch()
    line = ""

    class Readline:
        def __getattr__(self, name):
            return lambda *_args: line

    monkeypatch.setattr("npllama.message_input._readline", Readline)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    source = TypedInput(chat.History(None), command_words())

    def completions(before):
        nonlocal line
        line, found = before, []
        while (word := source._completion(before.split(" ")[-1], len(found))) is not None:
            found.append(word)
        return found

    assert completions("/s") == ["/save", "/set", "/stats", "/system"]
    assert completions("/regen") == ["/regen"]
    assert completions("hello /s") == completions("") == completions("/system /s") == []
    names = [f"{tmp_path}/file", f"{tmp_path}/folder/"]
    assert completions(f"/load {tmp_path}/f") == completions(f"/save {tmp_path}/f") == names
    assert completions("/set top") == ["top-k", "top-p"]
