"""Reads the chat template of a checkpoint, and renders dialogues with it.

A template writes markup and the text of messages into one text. Only markup may become control
tokens, so a dialogue is rendered more than once to separate the two: see `ChatTemplate.parts`.
"""

import contextlib
import json
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npllama.config import read_json
from npllama.dialogue_parts import Message, Parts
from npllama.errors import InputError, TokenizerError
from npllama.small_file import read_small_file
from npllama.special_tokens import special_ids, split_names
from npllama.tokenizer import Tokenizer

if TYPE_CHECKING:
    from subprocess import Popen

MAX_TEMPLATE = 2**20
"""The most bytes of a template. Published templates are far smaller."""
SECONDS = 10.0
"""The most seconds of CPU time for one rendering, which usually takes far less."""
_PATIENCE = 120.0  # the most elapsed seconds, for systems that cannot limit CPU time
_ROLES = ("system", "user", "assistant", "tool", "function", "developer", "ipython")
_UNFINISHED = "CONTINUE_FINAL_MESSAGE_TAG "  # transformers' mark at the end of a begun answer
_PRIVATE = [range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE)]  # Unicode's private-use characters
_OTHER_WAYS = "name a format with --chat-format (chat_format= in Python)"


def read_template(directory: Path) -> tuple[str, Path] | None:
    """The template of a directory and the path of its file; None if there is no template.

    chat_template.jinja takes precedence over tokenizer_config.json. If the latter has a list of
    templates, the one named "default" is used.

    Raises:
        TokenizerError: the template is damaged or too large, or the list has no default.
        ConfigError: tokenizer_config.json is damaged.
    """
    path = directory / "chat_template.jinja"
    if path.exists():
        try:
            return read_small_file(path, MAX_TEMPLATE).decode("utf-8-sig"), path
        except OSError as error:
            raise TokenizerError(f"{path} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{path} is not UTF-8 (byte {error.start})") from None
    path = directory / "tokenizer_config.json"
    template = read_json(path).get("chat_template") if path.exists() else None
    if isinstance(template, list):
        named = [t for t in template if isinstance(t, dict)]
        default = next((t.get("template") for t in named if t.get("name") == "default"), None)
        if default is None:
            names = ", ".join(str(t.get("name"))[:40] for t in named[:10]) or "none"
            raise TokenizerError(
                f"{path} has several chat templates ({names}) and no default: {_OTHER_WAYS}"
            )
        template = default
    if template is None:
        return None
    if not isinstance(template, str):
        raise TokenizerError(f"{path}: the chat template is {repr(template)[:40]}, expected a text")
    if len(template) > MAX_TEMPLATE:
        raise TokenizerError(
            f"{path}: the chat template has {len(template)} characters, expected at most "
            f"{MAX_TEMPLATE}"
        )
    return template, path


class ChatTemplate:
    """A template in the language of jinja2, which the extra [chat] installs.

    Args:
        template, path: see `read_template`; the path is for messages.
        settings: the content of tokenizer_config.json. The template can read its bos_token,
            eos_token, unk_token and pad_token.
    """

    def __init__(self, template: str, path: Path, settings: Mapping[str, Any]) -> None:
        self.template = template
        self.path = path
        self._settings = settings
        self._renderer = _Renderer(path)

    def render(self, tokenizer: Tokenizer, messages: Sequence[Message], answer: str = "") -> str:
        """The text of transformers' apply_chat_template, with the beginning of the answer.

        Raises:
            InputError: the template refuses the roles, or a role is unknown.
            TokenizerError: the template cannot be rendered, or takes too much time or memory.
        """
        return self._rendered(self._variables(tokenizer, messages, answer), {}, time.time())

    def parts(self, tokenizer: Tokenizer, messages: Sequence[Message], answer: str = "") -> Parts:
        """The rendered text, with ids in place of the names of control tokens in the markup.

        The dialogue is rendered a second time, with each character of the messages (except white
        space) replaced by a private character, its twin. If the two texts are equal except for the
        twins, the twins show which parts are from messages. Names are searched only in the other
        parts.

        A template that inspects the messages may give another text. The dialogue is then rendered
        with the names of tokens in the template's source replaced by private characters, which
        show where the control tokens are.

        Raises:
            InputError, TokenizerError: see `render`.
        """
        ids_of = {name: id_ for name, id_ in special_ids(tokenizer).items() if not name.isspace()}
        variables = self._variables(tokenizer, messages, answer)
        now = time.time()
        text = self._rendered(variables, {}, now)
        in_use = {*self.template, *json.dumps(variables, ensure_ascii=False), *text}

        shown = {c for m in variables["messages"] for c in m["content"] if not c.isspace()}
        free = _free_characters(in_use)
        hidden = {ord(c): twin for c, twin in zip(sorted(shown), free, strict=False)}
        if len(hidden) == len(shown):
            messages = [
                {**m, "content": m["content"].translate(hidden)} for m in self._messages(messages)
            ]
            disguised = self._variables(tokenizer, messages, answer.translate(hidden))
            back = {ord(twin): chr(c) for c, twin in hidden.items()}
            with_twins = self._attempt(disguised, {}, now)
            if with_twins is not None and with_twins.translate(back) == text:
                parts = split_names(ids_of, with_twins)
                return [p.translate(back) if isinstance(p, str) else p for p in parts]

        names = dict(zip(ids_of, _free_characters(in_use), strict=False))
        with_names = self._attempt(variables, names, now)
        if with_names is None:
            return [text]
        return split_names({twin: ids_of[name] for name, twin in names.items()}, with_names)

    def _messages(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        """The messages as the template reads them."""
        for message in messages:
            if message["role"] not in _ROLES:
                raise InputError(
                    f"the role {message['role'][:40]!r} is unknown: expected one of "
                    f"{', '.join(_ROLES)}"
                )
        if not messages or messages[-1]["role"] == "assistant":
            found = ", ".join(message["role"] for message in messages) or "none"
            raise InputError(f"messages must end with user; found {found}")
        return [{"role": m["role"], "content": m["content"]} for m in messages]

    def _variables(
        self, tokenizer: Tokenizer, messages: Sequence[Message], answer: str
    ) -> dict[str, Any]:
        """The variables of the template, with the names of transformers."""
        seen = self._messages(messages)
        if answer:
            seen.append({"role": "assistant", "content": answer + _UNFINISHED})
        return {
            "messages": seen,
            "tools": None,
            "documents": None,
            "add_generation_prompt": not answer,
            **self._tokens(tokenizer),
        }

    def _tokens(self, tokenizer: Tokenizer) -> dict[str, str]:
        """The names of the special tokens (BOS, EOS, ...) that the model has."""
        tokens = {}
        unknown = tokenizer.processor.unk_id()
        defaults = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unk": unknown, "pad": -1}
        for role, id_ in defaults.items():
            default = tokenizer.piece(id_) if id_ >= 0 else None
            token = self._settings.get(f"{role}_token", default)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                tokens[f"{role}_token"] = token
        return tokens

    def _attempt(
        self, variables: dict[str, Any], names: Mapping[str, str], now: float
    ) -> str | None:
        """As `_rendered`; None if the template refuses the replaced text."""
        try:
            return self._rendered(variables, names, now)
        except (InputError, TokenizerError):
            return None

    def _rendered(self, variables: dict[str, Any], names: Mapping[str, str], now: float) -> str:
        if names:
            tokens = {name: value for name, value in variables.items() if name.endswith("_token")}
            variables = variables | {name: names.get(tokens[name], tokens[name]) for name in tokens}
        text = self._renderer.render(
            template=self.template, variables=variables, names=names, now=now
        )
        if variables["add_generation_prompt"]:
            return text
        end = text.rfind(_UNFINISHED.rstrip())
        answer = variables["messages"][-1]["content"].removesuffix(_UNFINISHED)
        if end < 0 or answer.strip() not in text:
            raise InputError(
                f"{self.path}: this chat template changes or omits the beginning of the answer: "
                "let the model write the whole answer"
            )
        # as in transformers: if the tag lacks its space, the template has stripped the answer
        return text[:end] if text.startswith(_UNFINISHED, end) else text[:end].rstrip()


def _free_characters(in_use: set[str]) -> Iterator[str]:
    return (chr(c) for block in _PRIVATE for c in block if chr(c) not in in_use)


class _Renderer:
    """A process that renders templates (npllama/template_renderer.py). It starts when needed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._process: Popen | None = None
        self._finalizer: weakref.finalize | None = None
        self._lock = threading.Lock()

    def render(self, **request: Any) -> str:
        line = json.dumps({**request, "seconds": SECONDS}).encode() + b"\n"
        with self._lock:
            answer = self._asked(line)
        if not answer:
            raise TokenizerError(
                f"{self._path}: rendering the chat template took more than {SECONDS:g} s or too "
                f"much memory: {_OTHER_WAYS}"
            )
        fields = json.loads(answer)
        if "text" in fields:
            return fields["text"]
        kind, message = fields["error"], fields["message"][:300]
        if kind == "jinja2":
            raise TokenizerError(
                f"{self._path}: a chat template needs jinja2 3.1.6, which {message}: "
                "pip install 'npllama[chat]', or name a format that is built in with --chat-format"
            )
        if kind == "refused":
            raise InputError(f"the model's chat template refuses the dialogue: {message}")
        raise TokenizerError(f"{self._path} cannot be rendered ({message}): {_OTHER_WAYS}")

    def _asked(self, line: bytes) -> bytes:
        """The answer of the process; empty if the process has ended.

        An interruption ends the process.
        """
        process = self._started()
        timer = threading.Timer(_PATIENCE, process.kill)
        timer.daemon = True
        timer.start()
        answer = b""
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            pass
        finally:
            timer.cancel()
            if not answer.endswith(b"\n"):
                self._finalizer()
                self._process = None
                answer = b""
        return answer

    def _started(self) -> "Popen":
        import subprocess  # not for --help

        if self._process is None or self._process.poll() is not None:  # also after a fork
            if self._finalizer is not None:
                self._finalizer()
            program = Path(__file__).with_name("template_renderer.py")
            self._process = subprocess.Popen(
                [sys.executable, str(program)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C does not reach it
            )
            self._finalizer = weakref.finalize(self, _end, self._process)
        return self._process


def _end(process: "Popen") -> None:
    """End a process and close its pipes. After a fork, Popen does not end the parent's process."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # closing may flush to the ended process
            pipe.close()
