"""Convert a LLaMA-2 checkpoint to a model directory, without PyTorch.

    python tools/convert.py SOURCE DEST [--dtype float32|float16|bfloat16|int8] [--tokenizer FILE]

SOURCE is one of these; its format is detected:

- a directory in Hugging Face's format (safetensors, or pytorch_model*.bin),
- a directory in Meta's format (params.json, consolidated.*.pth),
- a llama2.c file (.bin of version 0, 1 or 2, or a .pt file of its training).

If a directory holds several formats, the first in the order above is read. DEST becomes a directory
that npllama and Hugging Face transformers can load. It holds config.json, generation_config.json,
safetensors and, if SOURCE has a tokenizer, tokenizer.model and tokenizer_config.json.
"""

if __name__ == "__main__":  # before the other imports, which take a while
    from npllama.early_interrupt import end_at_once

    end_at_once()

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from atomic import check_dest, identity, names_beside, resolved
from command_line import Parser, exit_code, named_path, say
from converting.conversion import convert
from converting.inspection import description, dry_run
from converting.read_source import read_source
from interruption import interruptible
from npllama.console import open_streams, tell
from npllama.errors import InputError
from npllama.weight_formats import FORMATS

MAX_SHARD_SIZE = "4GB"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    open_streams()
    args = _parser().parse_args(argv)
    before = None

    def work() -> None:
        nonlocal before
        with interruptible():
            if args.dest is not None:
                args.dest = resolved(args.dest)
                before = identity(args.dest)
            _run(args)

    def interrupted() -> str:
        if args.dest is None:
            return "interrupted"
        is_same = identity(args.dest) == before
        return f"interrupted: {args.dest} is {'as it was' if is_same else 'complete'}"

    # memory runs out if a size in SOURCE is damaged, or a tensor is larger than the memory
    return exit_code("convert", work, interrupted, "SOURCE needs more than this machine has")


def _run(args: argparse.Namespace) -> None:
    if args.dest is None and not args.inspect:
        raise InputError("DEST is missing: name the model directory to make")
    max_shard_size = _bytes(args.max_shard_size)
    source = read_source(args.source)
    for note in source.notes:
        tell(f"convert: {note}")
    if args.inspect or args.dry_run:
        say(description(replace(source, tokenizer=args.tokenizer or source.tokenizer)))
    if args.inspect:
        return
    inside = args.source.iterdir() if args.source.is_dir() else ()  # files may be links
    for path in (args.source, args.tokenizer, source.tokenizer, *inside):
        if path is not None:
            refuse_to_replace(path, args.dest)
    if args.dry_run:
        check_dest(args.dest, args.overwrite)
        say(dry_run(source, args.dest, args.dtype, args.tokenizer, max_shard_size))
        return
    convert(source, args.dest, args.dtype, args.tokenizer, max_shard_size, args.overwrite)


def refuse_to_replace(source: Path, dest: Path) -> None:
    """Refuse a DEST whose replacement would delete the source. --overwrite removes DEST and the
    other names that a conversion uses in the same folder.

    Raises:
        InputError: `source` is one of these paths or inside one of them.
    """
    real = Path(os.path.realpath(source))
    for place in (dest, *names_beside(dest)):
        if real.is_relative_to(place):
            raise InputError(
                f"{place} would be replaced, but it is or holds {source}, which is read: choose "
                "another directory"
            )


def _bytes(size: str) -> int:
    units = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
    units |= {f"{name}B": n for name, n in units.items() if name}
    units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = size.upper().rstrip("KMGIB")
    with contextlib.suppress(ValueError, KeyError, OverflowError):
        n = int(float(number) * units[size.upper().removeprefix(number)])
        if n > 0:
            return n
    raise InputError(f"--max-shard-size is {size!r}: expected a size such as 4GB or 500MB")


def _parser() -> argparse.ArgumentParser:
    p = Parser(
        "convert",
        "Convert a LLaMA-2 checkpoint in the format of Meta, Hugging Face or llama2.c to a "
        "directory that npllama and Hugging Face transformers can load. PyTorch is not needed.",
    )
    p.add_argument(
        "source", type=named_path, metavar="SOURCE", help="the checkpoint, a directory or a file"
    )
    p.add_argument(
        "dest", type=named_path, nargs="?", metavar="DEST", help="the model directory to make"
    )
    p.add_argument(
        "--dtype",
        choices=tuple(FORMATS),
        help="dtype of the weights; int8 takes a quarter of float32's space (default: as stored)",
    )
    p.add_argument(
        "--tokenizer",
        type=named_path,
        metavar="FILE",
        help="tokenizer.model, tokenizer.json of Llama's kind, or llama2.c's tokenizer.bin "
        "(default: the tokenizer that comes with SOURCE)",
    )
    p.add_argument(
        "--max-shard-size",
        default=MAX_SHARD_SIZE,
        metavar="SIZE",
        help="largest size of one weight file (default: %(default)s)",
    )
    p.add_argument(
        "--overwrite", action="store_true", help="replace DEST once the new one is complete"
    )
    p.add_argument(
        "--inspect", action="store_true", help="report what SOURCE is, and write nothing"
    )
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="report what SOURCE is and what would be written, and write nothing",
    )
    return p


if __name__ == "__main__":
    sys.exit(main())
