"""A program that renders chat templates with jinja2, started by npllama/chat_template.py.

A template comes with a checkpoint and may use any amount of time and memory. It is therefore
rendered in this process, which has limits for both and can be killed. jinja2's sandbox keeps the
template from anything else. The process reads and writes one JSON object per line.
"""

import contextlib
import functools
import json
import signal
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

MEMORY = 2**29
"""Limit of the process's address space, in bytes."""
MAX_RENDERED = 16 * 2**20
"""Limit of a rendered dialogue, in characters."""


def main() -> None:
    """Answer requests until standard input ends. A request is {"template", "variables", "names",
    "now", "seconds"}, an answer {"text"} or {"error", "message"}."""
    here = Path(__file__).resolve().parent  # npllama's modules must not shadow others
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != here]
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no resource limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        with _cpu_time(request["seconds"]):
            answer = _answer(request)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


@contextlib.contextmanager
def _cpu_time(seconds: float) -> Any:
    """End the process if the block uses more CPU time than this."""
    timed = hasattr(signal, "setitimer")
    if timed:
        signal.setitimer(signal.ITIMER_PROF, seconds)
    yield
    if timed:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _answer(request: dict[str, Any]) -> dict[str, str]:
    try:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox
    except ImportError:
        return {"error": "jinja2", "message": "is not installed"}
    numbers = [int(n) if n.isdigit() else 0 for n in jinja2.__version__.split(".")[:3]]
    if numbers < [3, 1, 6]:  # older versions have known sandbox escapes
        return {"error": "jinja2", "message": f"{jinja2.__version__} is too old"}
    try:
        return {"text": _render(**request)}
    except jinja2.TemplateSyntaxError as error:
        return {"error": "template", "message": f"line {error.lineno}: {error.message}"}
    except _RaisedError as error:
        return {"error": "refused", "message": str(error)}
    except (MemoryError, OverflowError):
        return {"error": "template", "message": "it asks for too much memory"}
    except Exception as error:  # raised by the template, for example a value of the wrong type
        return {"error": "template", "message": str(error) or type(error).__name__}


class _RaisedError(Exception):
    """The message that a template passes to raise_exception."""


def _render(
    template: str, variables: dict[str, Any], names: dict[str, str], now: float, seconds: float
) -> str:
    """Render a template.

    Args:
        names: text -> replacement, for the literals in the template's source.
        now: seconds since 1970, for strftime_now.
        seconds: the limit of CPU time; `main` enforces it.
    """
    variables["strftime_now"] = datetime.fromtimestamp(now).strftime
    text = ""
    for piece in _compiled(template, tuple(names.items())).generate(**variables):
        text += piece
        if len(text) > MAX_RENDERED:
            raise ValueError(f"it produces more than {MAX_RENDERED} characters")
    return text


@functools.lru_cache(maxsize=2)
def _compiled(template: str, names: tuple[tuple[str, str], ...]) -> Any:
    environment = _environment()
    parsed = environment.parse(template)
    if names:
        _replace(parsed, dict(names))
    return environment.from_string(parsed)


def _replace(template: Any, names: dict[str, str]) -> None:
    """Replace `names` in the literals of a parsed template."""
    from jinja2 import nodes

    def replaced(text: str) -> str:
        for name in sorted(names, key=len, reverse=True):
            text = text.replace(name, names[name])
        return text

    for node in template.find_all((nodes.TemplateData, nodes.Const)):
        if isinstance(node, nodes.TemplateData):
            node.data = replaced(node.data)
        elif isinstance(node.value, str):
            node.value = replaced(node.value)


def _environment() -> Any:
    """jinja2 with the settings, tags, filters and functions that transformers gives templates."""
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %} mark an answer. They do not change the text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_same")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _same(self, caller: Any) -> str:
            return caller()

    class Dict:
        """dict() without the other attributes of the class."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict:
            return dict.fromkeys(*args)

    class Namespace(jinja2.utils.Namespace):
        """namespace() that refuses names that begin with an underscore."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            values = dict(*args[1:], **kwargs)
            for name in values:
                Namespace._check(name)
            jinja2.utils.Namespace.__init__(args[0], values)

        def __setitem__(self, name: str, value: Any) -> None:
            Namespace._check(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

        @staticmethod
        def _check(name: Any) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")

    def raise_exception(message: str) -> None:
        raise _RaisedError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "dict": Dict(),
        "namespace": Namespace,
    }
    return environment


if __name__ == "__main__":
    main()
