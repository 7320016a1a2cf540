"""Chat templates of published checkpoints, and dialogues rendered with them."""

import importlib.util
import json

from conftest import FIXTURES, needed

DIRECTORY = FIXTURES / "chat_templates"
TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in DIRECTORY.glob("*.jinja")}
# The dialogues, each with its rendered text per template, or None if the template refuses the
# roles. tools/make_reference.py wrote the file with transformers.
DIALOGUES = json.loads((DIRECTORY / "expected.json").read_text())


def need_jinja2():
    needed(None if importlib.util.find_spec("jinja2") else "jinja2 is missing (extra [chat])")


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}
