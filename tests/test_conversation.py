"""Chat: what is read each turn, what is kept, and what stands in the messages."""

import copy
import gc
import inspect
import pickle
import threading
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import npllama
from chat_templates import TEMPLATES, assistant, need_jinja2, system, user
from conftest import TINY, make_llama, make_ops
from interrupted_lines import interrupted_at_line
from model_directory import write_model
from npllama import Chat, threads
from npllama.chat_formats import FORMATS, llama_2, story, vicuna, zephyr
from npllama.chat_template import ChatTemplate
from npllama.conversation import Turn
from npllama.dialogue import encode_chat
from npllama.dialogue_parts import encode_parts
from npllama.errors import InputError, OutOfMemoryError, TokenizerError, TokenizerWarning
from npllama.generation import Generation
from npllama.llama import SHIPPED, Llama
from npllama.tokenizer import Tokenizer

GREEDY = {"temperature": 0, "max_new_tokens": 5, "ignore_eos": True}
CONFIG = replace(TINY, context_length=512)
VICUNA = vicuna(None, [user("")], "")[0].split("USER")[0]
WORDS = ["Hi", "Who?", "Tell me", "So"]


@pytest.fixture(scope="module")
def plain_llama():
    """A model with random weights: nearly all that it writes is encoded otherwise afresh."""
    return make_llama(make_ops("numpy"), CONFIG)


@pytest.fixture(scope="module")
def piece_llama():
    """The same, with a tokenizer of words."""
    config = replace(CONFIG, vocab_size=1024)
    return make_llama(make_ops("numpy"), config, tokenizer=Tokenizer(SHIPPED / "tokenizer.model"))


def template(name):
    need_jinja2()
    return ChatTemplate(TEMPLATES[name], Path("chat_template.jinja"), {}).parts


def dialogue_ids(tokenizer, name, texts, answers):
    """A dialogue's ids, written out: the users' texts, the answers' ids between them."""
    around = {
        "llama-2": ([1], "[INST] ", " [/INST]", [" ", 2]),
        "zephyr": ([], "<|user|>\n", [2, "\n<|assistant|>\n"], [2, "\n"]),
        "vicuna": ([], "USER: ", " ASSISTANT:", [2]),
    }[name]
    begin, before, after, end = around
    parts = [VICUNA] if name == "vicuna" else []
    for i, text in enumerate(texts):
        parts += [*begin, before, text, *([after] if isinstance(after, str) else after)]
        if i < len(answers):
            parts += [tuple(answers[i]), *end]
    return encode_parts(tokenizer, parts)


def common(one, other):
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def prompt_ids(monkeypatch):
    """A list that gets each prompt's ids."""
    seen, made = [], Llama.new_generation

    def new_generation(self, prompts, **options):
        seen.append(list(prompts[0]))
        return made(self, prompts, **options)

    monkeypatch.setattr(Llama, "new_generation", new_generation)
    return seen


# -- what is read


@pytest.mark.array_calls
@pytest.mark.parametrize("name", ["llama-2", "zephyr", "vicuna"])
def test_each_turn_reads_only_the_new_ids_and_answers_as_without_a_cache(ops, name):
    llama = make_llama(ops, CONFIG)
    chat = Chat(llama, chat_format=name, **GREEDY)
    texts, answers = [], []
    for word in WORDS:
        texts.append(word)
        want = dialogue_ids(llama.tokenizer, name, texts, answers)
        held = list(chat.cache.ids[0])
        completion = chat.say(word)
        assert completion.ids == llama.generate(want, **GREEDY).ids
        assert held == want[: len(held)]
        assert chat.turn == Turn(len(want), len(held), len(want) - len(held))
        assert chat.cache.ids[0] == want + completion.ids[:-1]
        answers.append(completion.ids)


@pytest.mark.parametrize("name", ["llama-2", "zephyr", "vicuna"])
def test_what_a_turn_reads_does_not_grow_with_the_dialogue(plain_llama, name):
    chat = Chat(plain_llama, chat_format=name, **GREEDY)
    n_read = []
    for _ in range(8):
        chat.say("Hi")
        n_read.append(chat.turn.n_read)
    last_id, controls = 1, {"llama-2": 3, "zephyr": 4, "vicuna": 1}[name]
    tags = {"llama-2": "[INST] Hi [/INST]", "zephyr": "<|user|>\nHi<|assistant|>\n"}
    text = len(plain_llama.tokenizer.encode(tags.get(name, "USER: Hi ASSISTANT:"), bos=False))
    # zephyr's two newlines behind EOS, each with a space before it
    assert {*n_read[1:]} == {last_id + controls + text + (1 if name == "zephyr" else 0)}


def test_the_models_own_ids_are_not_those_of_the_text(plain_llama):
    """Else the tests above would show nothing."""
    chat = Chat(plain_llama, chat_format="llama-2", **GREEDY)
    ids = [chat.say(word).ids for word in WORDS]
    afresh = [plain_llama.tokenizer.encode(m["content"], bos=False) for m in chat.messages[1::2]]
    assert all(one != other for one, other in zip(ids, afresh, strict=True))


def test_an_end_of_text_is_written_by_the_format(piece_llama):
    tokenizer = piece_llama.tokenizer
    prompt = tokenizer.encode("[INST] Hi [/INST]")
    ids = piece_llama.generate(prompt, **GREEDY).ids
    at = next(i for i in range(1, 5) if ids[i] not in ids[:i])
    config = replace(piece_llama.config, eos_ids=frozenset({ids[at]}))
    llama = make_llama(make_ops("numpy"), config, tokenizer=tokenizer)
    chat = Chat(llama, chat_format="llama-2", temperature=0)
    completion = chat.say("Hi")
    assert (completion.finish_reason, completion.ids) == ("eos", ids[: at + 1])
    chat.say("Bye", max_new_tokens=1)
    space = tokenizer.encode(" ", bos=False)[1:]  # without the one before a text
    bye = tokenizer.encode("[INST] Bye [/INST]")
    assert chat.cache.ids[0] == [*prompt, *ids[:at], *space, tokenizer.eos_id, *bye]
    assert chat.turn.n_kept == len(prompt) + at


@pytest.mark.parametrize("name", sorted({*FORMATS} & {*TEMPLATES}))
def test_a_checkpoints_template_keeps_the_own_ids_as_well(plain_llama, monkeypatch, name):
    chats = [Chat(plain_llama, chat_format=f, **GREEDY) for f in (template(name), name)]
    prompts = prompt_ids(monkeypatch)
    for chat in chats:
        for word in WORDS:
            held = len(chat.cache.ids[0])
            chat.say(word)
            assert chat.turn.n_kept == held
    assert prompts[: len(WORDS)] == prompts[len(WORDS) :]


def test_words_go_on_from_the_cache_in_every_format(piece_llama):
    """Begun answers, answers that end within a token, control tokens' names and white space."""
    for name in FORMATS:
        chat = Chat(piece_llama, chat_format=name, max_new_tokens=4, ignore_eos=True)
        for word, begun in (("a ", ""), ("</s>", "So"), ("\n", ""), (" x", "I ")):
            held = list(chat.cache.ids[0])
            completion = chat.say(word, answer=begun, seed=len(held))
            assert chat.turn.n_kept == len(held), (name, word)
            assert chat.messages[-1]["content"] == begun + completion.text


@pytest.mark.array_calls
def test_after_any_change_reading_begins_at_the_first_difference(ops):
    llama = make_llama(ops, CONFIG)
    tokenizer = llama.tokenizer
    chat = Chat(llama, system="Be.", chat_format="llama-2", **GREEDY)
    for word in WORDS:
        chat.say(word)

    def again():
        list(chat.stream_again())

    def undo():
        assert chat.undo() and chat.undo()
        chat.say("No")

    def edit_user():
        chat.messages[1]["content"] = "Ho"
        chat.say("x")

    def edit_answer():
        chat.messages[2]["content"] += "!"
        chat.say("x")

    def replace_system():
        chat.system = "Be?"
        chat.say("x")

    def remove_system():
        chat.system = None
        chat.say("x")

    def insert():
        chat.messages[2:2] = [user("b"), assistant("a")]
        chat.say("x")

    n_lost = 0  # answers without ids of their own
    for change in (again, undo, edit_user, edit_answer, replace_system, remove_system, insert):
        held = list(chat.cache.ids[0])
        change()
        own = {
            i: own
            for i, m in enumerate(chat.messages[:-1])
            if (own := chat._own_answer(m)) is not None
        }
        want = encode_chat(tokenizer, chat.messages[:-1], llama_2, own_answers=own)
        assert chat.turn.n_prompt == len(want)
        assert chat.turn.n_kept == min(common(held, want), len(want) - 1), change
        answer = llama.generate(want, **GREEDY)
        assert chat.cache.ids[0] == want + answer.ids[:-1]
        n_lost += change in (edit_answer, insert)
        # a lost one is known again after its text was read
        assert len(own) >= sum(m["role"] == "assistant" for m in chat.messages[:-1]) - n_lost


def test_an_edited_answer_loses_its_ids_and_one_edited_back_has_them_again(plain_llama):
    chat = Chat(plain_llama, chat_format="llama-2", **GREEDY)
    chat.say("Hi")
    answer = chat.messages[-1]
    text = answer["content"]
    answer["content"] = "Hello"
    assert chat._own_answer(answer) is None
    answer["content"] = text
    assert chat._own_answer(answer) is not None
    assert chat._own_answer(dict(answer)) is None


@pytest.mark.parametrize("name", ["llama-2", "zephyr"])
@pytest.mark.parametrize("begun", ["Sure,", "Sure, ", " Sure", "   "])
def test_a_begun_answer_is_whole_in_the_messages_and_kept_in_the_cache(plain_llama, name, begun):
    chat = Chat(plain_llama, chat_format=name, **GREEDY)
    completion = chat.say("Hi", answer=begun)
    whole = (begun if begun.strip() else "") + completion.text
    assert chat.messages[-1] == assistant(whole)
    held = list(chat.cache.ids[0])
    chat.say("Bye")
    assert chat.turn.n_kept == len(held)


def test_a_stop_text_is_no_part_of_the_answer(plain_llama):
    chat = Chat(plain_llama, chat_format="zephyr", **GREEDY)
    whole = chat.say("Hi")
    texts = [plain_llama.tokenizer.decode(whole.ids[: i + 1]) for i in range(5)]
    assert len(texts[3]) > len(texts[2]) > len(texts[1])  # so the stop text is of its own ids
    chat.undo()
    stopped = chat.say("Hi", stop=[texts[3][len(texts[1]) :]])
    assert (stopped.finish_reason, stopped.text) == ("stop", texts[1])
    assert chat.messages[-1] == assistant(texts[1])
    chat.say("Bye")
    assert chat.turn.n_kept == len(encode_chat(plain_llama.tokenizer, [user("Hi")], zephyr)) + 2


# -- streams


def test_a_stream_puts_the_answer_so_far_into_the_messages(plain_llama):
    chat = Chat(plain_llama, chat_format="llama-2", **GREEDY)
    stream = chat.stream("Hi")
    assert chat.messages == [user("Hi")] and chat.turn.n_kept == 0
    piece = next(stream)
    stream.close()
    stream.close()
    assert stream.completion.finish_reason == "interrupted"
    assert chat.messages == [user("Hi"), assistant(stream.completion.text)]
    assert stream.completion.text.startswith(piece)
    held = list(chat.cache.ids[0])
    chat.say("Bye")
    assert chat.turn.n_kept == len(held)


def test_a_stream_that_nobody_holds_is_closed(plain_llama):
    chat = Chat(plain_llama, chat_format="llama-2", **GREEDY)
    for _piece in chat.stream("Hi"):
        break
    gc.collect()
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]
    chat.say("Bye")
    assert len(chat.messages) == 4


def test_a_chat_with_a_running_answer_is_not_to_be_used(plain_llama):
    chat = Chat(plain_llama, chat_format="llama-2", **GREEDY)
    stream = chat.stream("Hi")
    for begun in (False, True):
        if begun:
            next(stream)
        for use in (
            lambda: chat.say("x"),
            lambda: chat.stream("x"),
            chat.stream_again,
            chat.undo,
            chat.clear,
            lambda: setattr(chat, "system", "s"),
        ):
            with pytest.raises(InputError, match=r"still being written: .* or close\(\) it"):
                use()
    assert chat.messages == [user("Hi")]
    assert stream.read().text == "".join(m["content"] for m in chat.messages[1:])


def test_only_answers_among_the_messages_are_remembered(plain_llama):
    chat = Chat(plain_llama, chat_format="llama-2", **GREEDY)
    for _ in range(3):
        chat.say("Hi")
        chat.stream_again().read()
        chat.clear()
    assert len(chat._own_answers) == 1


def test_an_end_of_text_behind_an_answer_is_the_formats(plain_llama):
    chat = Chat(plain_llama, chat_format="llama-2", temperature=0, max_new_tokens=3)
    stream = chat.stream("Hi")
    for id_ in (100, 2):
        stream._generation.rows[0].accept(id_, 0.0)
    stream.close()
    assert stream.completion.finish_reason == "eos"
    chat.say("Hi", max_new_tokens=1)
    encode = plain_llama.tokenizer.encode
    turn = encode("[INST] Hi [/INST]")
    assert chat.cache.ids[0] == [*turn, 100, 259, 2, *turn]


def test_of_two_threads_one_is_refused(plain_llama):
    chat = Chat(plain_llama, chat_format="llama-2", **GREEDY)
    barrier, streams, errors = threading.Barrier(4), [], []

    def ask():
        barrier.wait()
        try:
            streams.append(chat.stream("Hi"))
        except InputError as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(streams), len(errors)) == (1, 3)
    streams[0].read()
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]


@pytest.mark.parametrize("at", [1, 3])
def test_ctrl_c_ends_the_answer_and_leaves_the_chat_usable(plain_llama, monkeypatch, at):
    chat = Chat(plain_llama, chat_format="llama-2", **GREEDY)
    chat.say("Hi")
    n_called, read = 0, Generation._read

    def interrupted(self):
        nonlocal n_called
        n_called += 1
        if n_called == at:
            raise KeyboardInterrupt
        return read(self)

    monkeypatch.setattr(Generation, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chat.say("Bye")
    roles = [m["role"] for m in chat.messages]
    assert roles == (["user", "assistant"] if at == 1 else ["user", "assistant"] * 2)
    completion = chat.say("So")
    want = Chat(plain_llama, chat.messages[:-2], chat_format="llama-2", **GREEDY)
    want._own_answers = {
        id(mine): (mine, chat._own_answer(its))
        for mine, its in zip(want.messages, chat.messages, strict=False)
        if chat._own_answer(its) is not None
    }
    assert want.say("So").ids == completion.ids


@pytest.mark.parametrize(
    ("modules", "stride"),
    [
        (("conversation.py", "text_stream.py"), 1),
        (("own_answers.py", "kv_cache.py", "generation.py", "row.py"), 29),
    ],
)
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # within __del__
def test_ctrl_c_at_any_line_leaves_whole_turns(plain_llama, monkeypatch, modules, stride, again):
    # the end of a `with` is traced as a line, before `__exit__` is called: the turn stays taken
    monkeypatch.setattr("npllama.threads._turn", threads._Turn())
    options = {**GREEDY, "max_new_tokens": 2}
    hello = [user("Hi"), assistant("Ho")]
    fresh = Chat(plain_llama, hello, chat_format="llama-2", **options)
    want = fresh.say("So").text
    at, was_interrupted = 1, True
    while was_interrupted:
        chat = Chat(plain_llama, hello, chat_format="llama-2", **options)
        ask = (lambda c=chat: c.stream_again().read()) if again else partial(chat.say, "So")
        was_interrupted = interrupted_at_line(at, ask, modules)
        roles = [m["role"] for m in chat.messages]
        assert roles in (["user", "assistant"], ["user", "assistant"] * 2), at
        chat.messages[:] = [dict(m) for m in hello]  # and the cache as it is
        assert chat.say("So").text == want, at
        at += stride
    assert at > 50


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda chat: chat.say("x" * 600), InputError),
        (lambda chat: chat.say("x", temperature=-1), InputError),
        (lambda chat: chat.say("x", tempature=1), TypeError),
        (lambda chat: chat.say("a\udcff"), InputError),
        (lambda chat: chat.say("x", answer=5), InputError),
        (lambda chat: chat.say(5), InputError),
        (lambda chat: chat.stream_again(temperature=-1), InputError),
    ],
)
def test_where_nothing_is_answered_the_messages_are_as_before(plain_llama, call, error):
    chat = Chat(plain_llama, system="Be.", chat_format="llama-2", **GREEDY)
    chat.say("Hi")
    before = [dict(m) for m in chat.messages]
    with pytest.raises(error) as raised:
        call(chat)
    assert "\n" not in str(raised.value)
    assert chat.messages == before
    chat.say("Bye")
    assert len(chat.messages) == 5


def test_no_new_token_is_no_answer(plain_llama):
    chat = Chat(plain_llama, chat_format="llama-2", **GREEDY)
    assert chat.say("Hi", max_new_tokens=0).ids == []
    assert chat.messages == []


# -- a full context

SHORT = replace(TINY, context_length=200)
"""llama-2's tags have 16 ids, here with BOS, EOS and spaces: a turn of "Hi" has some 30."""


@pytest.fixture(scope="module")
def short_llama():
    return make_llama(make_ops("numpy"), SHORT)


def test_the_oldest_turns_are_left_out_of_a_full_prompt(short_llama, monkeypatch):
    chat = Chat(short_llama, system="Be.", chat_format="llama-2", **GREEDY)
    prompts = prompt_ids(monkeypatch)
    tokenizer = short_llama.tokenizer
    head = tokenizer.encode("[INST] <<SYS>>\nBe.\n<</SYS>>\n\n")
    n_turn = len(tokenizer.encode("[INST] u10. [/INST]")) + GREEDY["max_new_tokens"] + 2
    n_left_out = n_times = 0
    for turn in range(20):
        held = list(chat.cache.ids[0])
        chat.say(f"u{turn}.")
        n_left_out += chat.turn.n_dropped
        prompt = prompts[-1]
        assert len(prompt) + 5 <= 200
        assert prompt[: len(head)] == head
        first = tokenizer.decode(prompt[len(head) :]).split("[/INST]")[0]
        assert first.strip() == f"u{n_left_out}."
        if chat.turn.n_dropped:
            n_times += 1
            assert len(prompt) <= 150  # a quarter is free
            assert len(prompt) + n_turn > 150  # no turn more than it needs
            assert len(head) < chat.turn.n_kept == common(held, prompt)
            assert "left out" in chat.turn.note() and "\n" not in chat.turn.note()
        else:
            assert chat.turn.n_kept == len(held)
            assert chat.turn.note() is None
    assert len(chat.messages) == 41  # nothing of it is lost
    assert 3 < n_times < 12


def test_notes_count_the_turns():
    assert Turn(5, 0, 5, 1).note().endswith("the oldest turn is left out of the prompt from now on")
    assert Turn(5, 0, 5, 3).note().endswith("oldest 3 turns are left out of the prompt from now on")


def full(llama, **options):
    chat = Chat(llama, system="Be.", chat_format="llama-2", **{**GREEDY, **options})
    while chat.turn is None or not chat.turn.n_dropped:
        chat.say("Hi")
    return chat


@pytest.mark.parametrize("change", ["undo", "edit", "system"])
def test_turns_that_are_left_out_come_back_where_there_is_room(short_llama, change):
    chat = full(short_llama)
    n_before, n_prompt = len(chat.messages), chat.turn.n_prompt
    list(chat.stream_again())
    assert chat.turn.n_dropped == 0 and chat.turn.n_prompt == n_prompt  # they stay left out
    if change == "undo":
        chat.undo()
        chat.undo()
        chat.say("Hi")
        assert chat.turn.n_dropped == 0 and chat.turn.n_prompt > n_prompt
        assert len(chat.messages) == n_before - 2
    elif change == "edit":
        chat.messages[-4]["content"] = "Ho"
        chat.say("Hi")
        assert chat.turn.n_dropped > 0
    else:
        chat.system = None
        chat.say("Hi")
        assert chat.turn.n_dropped > 0
    chat.clear()
    chat.say("Hi")
    assert chat.turn.n_dropped == 0 and chat.turn.note() is None
    assert len(chat.messages) == (2 if change == "system" else 3)


def test_turns_stay_left_out_after_an_answer_that_did_not_begin(short_llama):
    chat = full(short_llama)
    held = len(chat.cache.ids[0])
    chat.stream("Ho").close()
    chat.say("Hi")
    assert (chat.turn.n_dropped, chat.turn.n_kept) == (0, held)


def test_the_room_for_an_answer_is_its_most_tokens_up_to_a_quarter(short_llama):
    for n_new, room in ((5, 5), (40, 40), (None, 50), (1000, 50)):
        chat = Chat(short_llama, chat_format=story, max_new_tokens=n_new, temperature=0)
        chat.messages = [user("a"), assistant("b")]
        text = "x" * (200 - room - 2)  # with BOS and a space it fits exactly
        chat.chat_format = lambda tokenizer, messages, answer: [
            "".join(m["content"] for m in messages)
        ]
        chat.stream(text[:-2]).close()
        assert chat.turn == Turn(200 - room, 0, 200 - room)
        chat.clear()
        chat.messages = [user("a"), assistant("b")]
        chat.stream(text[:-1]).close()
        assert chat.turn.n_dropped == 1


def test_without_leaving_out_a_full_context_is_refused(short_llama):
    chat = Chat(short_llama, chat_format="llama-2", drop_old_turns=False, **GREEDY)
    with pytest.raises(InputError, match=r"^the dialogue has 2\d\d tokens .* for 200 tokens of"):
        for _ in range(20):
            chat.say("Hi")
    assert chat.messages[-1]["role"] == "assistant" and chat.turn.n_dropped == 0
    n_messages = len(chat.messages)
    assert chat.undo()
    chat.say("Hi")
    assert len(chat.messages) == n_messages


def test_a_message_that_does_not_fit_alone_is_refused(short_llama):
    chat = full(short_llama)
    before = [dict(m) for m in chat.messages]
    with pytest.raises(InputError, match=r"have \d+ tokens .*: shorten one of them$") as e:
        chat.say("x" * 190)
    assert "\n" not in str(e.value) and chat.messages == before
    chat = Chat(short_llama, chat_format=story, **GREEDY)
    with pytest.raises(InputError, match=r"^the message has 200 tokens .*: shorten the message$"):
        chat.say("x" * 198)
    assert len(chat.say("x" * 197).ids) == 1
    chat = full(short_llama)
    chat.say("x" * 140)  # which leaves less room than usual
    assert chat.turn.n_prompt > 150


# -- settings


def test_the_system_prompt_is_the_first_message(plain_llama):
    chat = Chat(plain_llama, [system("a"), user("u"), assistant("v")], chat_format="llama-2")
    assert chat.system == "a"
    chat.system = "b"
    assert chat.messages[0] == system("b") and len(chat.messages) == 3
    chat.system = None
    assert chat.system is None and chat.messages[0] == user("u")
    chat.clear()
    assert chat.messages == [] and not chat.undo()
    chat.system = "c"
    chat.clear()
    assert chat.messages == [system("c")]
    given = [system("a")]
    other = Chat(plain_llama, given, system="b", chat_format="llama-2")
    assert other.system == "b" and given == [system("a")]
    with pytest.raises(InputError, match="messages are not a list"):
        chat.system = 5


def test_options_of_an_answer_count_before_the_chats(plain_llama):
    chat = Chat(plain_llama, chat_format="llama-2", **GREEDY)
    assert len(chat.say("Hi").ids) == 5
    assert len(chat.say("Hi", max_new_tokens=2).ids) == 2
    chat.options["max_new_tokens"] = 3
    assert len(chat.say("Hi").ids) == 3
    assert len(chat.stream_again(max_new_tokens=4).read().ids) == 4
    assert len(chat.say("Hi", max_new_tokens=None).ids) == 3  # as if it was not given
    chat.options["fresh_text"] = None
    assert chat.say("Hi", seed=1).text == chat.stream_again(fresh_text=True, seed=1).read().text


def test_wrong_options_are_refused_at_once(plain_llama):
    for options, error in (
        ({"temperature": -1}, InputError),
        ({"tempature": 1}, TypeError),
        ({"batch_size": 4}, TypeError),
    ):
        with pytest.raises(error):
            Chat(plain_llama, chat_format="llama-2", **options)
    chat = Chat(plain_llama, chat_format="llama-2", **GREEDY)
    for name, value in (("cache", plain_llama.new_cache()), ("batch_size", 4)):
        with pytest.raises(TypeError, match=f"{name} is no option of an answer"):
            chat.say("Hi", **{name: value})
    assert chat.messages == [] and chat.say("Hi", cache=None).ids


def test_signatures_show_the_keywords_that_a_chat_passes_on():
    for function in (Chat, Chat.stream, Chat.say, Chat.stream_again, Llama.chat):
        names = [*inspect.signature(function).parameters]
        assert len(names) == len({*names}) and {"temperature", "stop"} < {*names}
        assert "fresh_text" not in names
        assert ("cache" in names) == (function in (Chat, Llama.chat))
        assert ("batch_size" in names) == (function is Llama.chat)


def test_none_is_the_default_of_every_optional_argument(plain_llama):
    chats = []
    for given in (
        {"chat_format": "zephyr"},
        dict.fromkeys([*inspect.signature(Chat).parameters][1:]),
    ):
        chat = Chat(plain_llama, **{**given, "chat_format": "zephyr", "drop_old_turns": True})
        nothing = dict.fromkeys([*inspect.signature(Chat.say).parameters][2:])
        options = (
            {**nothing, "max_new_tokens": 3, "seed": 5}
            if chats
            else {"max_new_tokens": 3, "seed": 5}
        )
        chat.say("Hi", **options)
        chats.append(chat)
    assert chats[0].messages == chats[1].messages
    messages = [user("Hi")]
    nothing = dict.fromkeys([*inspect.signature(Llama.chat).parameters][2:])
    given = {"chat_format": "zephyr", "seed": 5, "max_new_tokens": 3}
    want = plain_llama.chat(messages, **given)
    assert plain_llama.chat(messages, **{**nothing, **given}).ids == want.ids
    assert want.text == chats[0].messages[-1]["content"]


def test_a_caches_first_ids_are_kept(plain_llama):
    cache = plain_llama.new_cache()
    ids = encode_chat(plain_llama.tokenizer, [user("Hi")], zephyr)
    plain_llama.prefill(ids[:-3] + [9], cache)
    chat = Chat(plain_llama, chat_format="zephyr", cache=cache, **GREEDY)
    chat.say("Hi")
    assert chat.turn == Turn(len(ids), len(ids) - 3, 3)
    with pytest.raises(InputError, match="2 rows"):
        Chat(plain_llama, chat_format="zephyr", cache=plain_llama.new_cache(2))
    stream = chat.stream("x")
    next(stream)
    other = Chat(plain_llama, chat_format="zephyr", cache=cache, **GREEDY).stream("y")
    next(other)
    with pytest.raises(InputError, match="another generation uses the cache"):
        stream.read()
    want = plain_llama.chat([user("y")], chat_format="zephyr", **GREEDY)
    assert other.read().ids == want.ids


def test_a_cache_that_does_not_fit_the_memory_is_refused(plain_llama, monkeypatch):
    cache = plain_llama.new_cache()
    monkeypatch.setattr(plain_llama.backend, "free_bytes", lambda: 1_000_000)
    with pytest.raises(OutOfMemoryError, match="for 1 x 512 positions"):
        Chat(plain_llama, chat_format="zephyr")
    assert Chat(plain_llama, chat_format="zephyr", cache=cache, **GREEDY).say("Hi").ids


def test_a_story_goes_on_from_the_last_message_alone():
    llama = npllama.load(backend="numpy")
    chat = Chat(llama, chat_format=story, fresh_text=False, max_new_tokens=6, temperature=0)
    for text in ("Once", "One day"):
        want = llama.generate(text, max_new_tokens=6, temperature=0)
        assert chat.say(text).text == want.text
    assert len(chat.messages) == 4
    chat.cache = llama.new_cache(context=20)
    chat.say("Once upon a time there was a little girl named Lily. She loved to")
    assert chat.turn.n_dropped == 0  # which would gain nothing


# -- without a Chat


@pytest.mark.parametrize("name", FORMATS)
def test_llama_chat_continues_a_dialogues_ids(plain_llama, name):
    messages = [system("Be."), user("Hi"), assistant("Ho"), user("Bye")]
    ids = encode_chat(plain_llama.tokenizer, messages, FORMATS[name])
    want = plain_llama.generate(ids, fresh_text=True, **GREEDY)
    got = plain_llama.chat(messages, chat_format=name, **GREEDY)
    assert (got.ids, got.text) == (want.ids, want.text)
    stream = plain_llama.stream_chat(iter(messages), chat_format=FORMATS[name], **GREEDY)
    assert "".join(stream) == want.text == stream.completion.text
    begun = plain_llama.chat(messages, chat_format=name, answer="Sure,", **GREEDY)
    ids = encode_chat(plain_llama.tokenizer, messages, FORMATS[name], "Sure,")
    assert begun.text == plain_llama.generate(ids, **GREEDY).text


def test_llama_chat_keeps_what_a_cache_has_in_common(plain_llama):
    cache = plain_llama.new_cache()
    for word in WORDS:
        got = plain_llama.chat([user(word)], chat_format="llama-2", cache=cache, **GREEDY)
        assert got.ids == plain_llama.chat([user(word)], chat_format="llama-2", **GREEDY).ids
    assert got.timings.prompt_tokens < got.prompt_tokens


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ("Hi", {}, "messages are not a list"),
        (None, {}, "messages are not a list"),
        ([user("Hi"), {"role": "user"}], {}, "messages are not a list"),
        ([user("Hi"), assistant("Ho")], {}, "end with user"),
        ([user("Hi")], {"chat_format": "gpt"}, "'gpt' is unknown: expected one of llama-2"),
        ([user("Hi")], {"chat_format": 5}, "chat_format is 5: expected a name of llama-2"),
        (
            [user("Hi")],
            {"chat_format": None},
            "not loaded from a directory.*give chat_format=, one of",
        ),
        ([user("Hi"), assistant("Ho")] * 20, {}, r"user, assistant, ... \(40 messages\)"),
        ([user("Hi")], {"answer": 5}, "beginning of the answer is 5"),
    ],
)
def test_wrong_dialogues_have_one_line(plain_llama, messages, options, message):
    with pytest.raises(InputError, match=message) as error:
        plain_llama.chat(messages, **{"chat_format": "llama-2", **options})
    assert "\n" not in str(error.value)


def test_a_model_without_a_tokenizer_cannot_chat(plain_llama):
    llama = Llama(CONFIG, plain_llama.parameters, plain_llama.ops)
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        llama.chat([user("Hi")], chat_format="llama-2")
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        Chat(llama, chat_format="llama-2")


@pytest.mark.parametrize("path", [None, SHIPPED])
def test_the_shipped_model_says_that_it_cannot_chat(path):
    llama = npllama.load(path, backend="numpy")
    for call in (lambda: llama.chat_format, lambda: llama.chat([user("Hi")]), lambda: Chat(llama)):
        with pytest.raises(InputError, match=r"tells stories and cannot chat: .* chat_format="):
            call()


def test_the_chat_format_is_found_in_the_directory_once(tmp_path):
    need_jinja2()
    model = write_model(tmp_path / "with", CONFIG)
    (model / "chat_template.jinja").write_text(TEMPLATES["zephyr"])
    llama = npllama.load(model, backend="numpy")
    (model / "chat_template.jinja").write_text("{{ damaged")
    want = llama.chat([user("Hi")], chat_format="zephyr", **GREEDY)
    (model / "chat_template.jinja").write_text(TEMPLATES["zephyr"])
    assert llama.chat([user("Hi")], **GREEDY).ids == want.ids
    (model / "chat_template.jinja").write_text("{{ damaged")
    assert Chat(llama, **GREEDY).say("Hi").ids == want.ids
    assert copy.copy(llama).chat_format is llama.chat_format
    other = pickle.loads(pickle.dumps(llama))
    with pytest.raises(TokenizerError, match="cannot be rendered"):
        other.chat([user("Hi")])


def test_a_directory_without_a_template_is_warned_of_once(tmp_path):
    llama = npllama.load(write_model(tmp_path, CONFIG), backend="numpy")
    with pytest.warns(
        TokenizerWarning, match=r"has no chat template .* \(chat_format= in Python\)"
    ):
        got = llama.chat([user("Hi")], **GREEDY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert llama.chat([user("Hi")], **GREEDY).ids == got.ids
        assert llama.chat([user("Hi")], chat_format="llama-2", **GREEDY).ids == got.ids
