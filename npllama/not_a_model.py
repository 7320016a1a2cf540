"""Explains what a path holds that is not a model, and what to do about it.

Each function returns the end of a sentence that begins with the path, or None if it finds nothing
to explain. Callers use these functions after a read has failed. The functions only word messages;
they do not decide what is valid.
"""

import contextlib
import os
import re
import shlex
import struct
from collections.abc import Callable
from pathlib import Path

HOW_TO_GET_ONE = (
    "hf download NAME --local-dir DIR downloads one, and npllama convert makes one from a "
    "checkpoint in another format"
)
_FIRST_BYTES = 64
_LFS = (
    "is a Git LFS pointer, not the file itself: run git lfs pull in its directory, or get the file "
    "again with hf download"
)
_PAGE = (
    "is a web page, not the file itself, perhaps because the download needs a login: run hf auth "
    "login and get the file again"
)
_REFUSAL = "is an error message of a refused download: run hf auth login and get the file again"
_GGUF = "is a GGUF file, which cannot be read: get the Hugging Face directory it was made from"
# first bytes of a file, in lower case and without leading white space -> what the file is
_BEGINNINGS = {
    b"version https://git-lfs": _LFS,
    b"<!doctype": _PAGE,
    b"<html": _PAGE,
    b"<?xml": _PAGE,
    b"access to model": _REFUSAL,
    b"entry not found": _REFUSAL,
    b"invalid credentials": _REFUSAL,
    b"invalid username": _REFUSAL,
    b"repository not found": _REFUSAL,
    b"gguf": _GGUF,
}
_UNFINISHED = (".incomplete", ".part", ".crdownload", ".aria2")  # suffixes that downloaders use
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_ADAPTER = (
    "a LoRA adapter, not a whole model: merge it into its base model (peft's merge_and_unload) "
    "and save that"
)
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.(safetensors|bin)")
_TO_CONVERT = re.compile(
    r"params\.json|consolidated\.\d+\.pth|pytorch_model.*\.(bin|bin\.index\.json)"
)
_PART = re.compile(r"config\.json|tokenizer\.model|.+\.safetensors|.+\.index\.json")
_HUB_NAME = re.compile(r"(?:https?:/+)?(?:(?:huggingface\.co|hf\.co)/)?([\w-][\w.-]*/[\w-][\w.-]*)")
_LLAMA2C_MAGIC = b"24ka"  # "ak42" as a little-endian integer


def content_instead(path: Path) -> str | None:
    """What a file holds instead of a model, recognized by its first bytes, or None.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     file = Path(folder, "config.json")
    ...     _ = file.write_text("<!DOCTYPE html> ...")
    ...     print(content_instead(file)[:13])
    is a web page
    """
    begin = _first_bytes(path).lstrip().lower()
    return next((what for start, what in _BEGINNINGS.items() if begin.startswith(start)), None)


def missing_instead(given: str, is_converting: bool = False) -> str | None:
    """Advice for a path that does not exist but may name a repository on Hugging Face's hub.

    Args:
        given: the path as the user wrote it. It may be a URL.
        is_converting: whether the converter asks, which also reads .bin files.

    >>> print(missing_instead("org/name"))
    does not exist; if it is a repository on the hub: hf download org/name --local-dir name \
--exclude "*.bin"; then give --model name
    """
    match = _HUB_NAME.fullmatch(given.rstrip("/"))
    if match is None or os.path.exists(given.partition("/")[0]):
        return None
    name = match.group(1)
    folder = name.rpartition("/")[2]
    command = f"hf download {name} --local-dir {folder}"
    if not is_converting:
        command += ' --exclude "*.bin"'
    then = f"convert {folder}" if is_converting else f"give --model {folder}"
    return f"does not exist; if it is a repository on the hub: {command}; then {then}"


def as_given(path: str | os.PathLike[str]) -> str:
    """A path as text, with both slashes of a URL restored. Path keeps only one.

    >>> as_given(Path("https://huggingface.co/org/name"))
    'https://huggingface.co/org/name'
    """
    return re.sub(r"\A(https?):/+", r"\1://", os.fspath(path))


def file_instead(path: Path, is_converting: bool = False) -> str | None:
    """What a file is that was given in place of a model directory.

    Args:
        is_converting: whether the converter asks, which also reads other formats and single files.
    """
    if (what := content_instead(path)) is not None:
        return what
    if path.suffix in _UNFINISHED:
        return "is an unfinished download: run the download again"
    if path.name in _ADAPTERS:
        return f"belongs to {_ADAPTER}"
    if _TO_CONVERT.fullmatch(path.name) and not is_converting:
        return f"is part of a checkpoint in another format: {_convert(path.parent)}"
    if _PART.fullmatch(path.name) or _TO_CONVERT.fullmatch(path.name):
        return f"is part of a checkpoint: give its directory, {path.parent}"
    if not is_converting and (path.suffix == ".pt" or _is_llama2c(path)):
        return f"is a checkpoint of llama2.c: {_convert(path)}"
    return None


def directory_instead(directory: Path, is_converting: bool = False) -> str | None:
    """What a directory without a model's config.json or weights is, or holds.

    Args:
        is_converting: as in `file_instead`.
    """
    try:
        return _directory_instead(directory, sorted(os.listdir(directory)), is_converting)
    except OSError:  # part of it is unreadable; the caller then reports only what is missing
        return None


def _directory_instead(directory: Path, names: list[str], is_converting: bool) -> str | None:
    if not names:
        what = f"a model directory; {HOW_TO_GET_ONE}"
        if is_converting:
            what = "a checkpoint: download one first (hf download NAME --local-dir DIR)"
        return f"is empty: expected {what}"
    for kind in _DIRECTORIES:
        if (what := kind(directory, names)) is not None:
            return what
    for name in names:
        needs_config = name.startswith("pytorch_model") and "config.json" not in names
        if not is_converting and _TO_CONVERT.fullmatch(name) and not needs_config:
            return f"holds {name}, a checkpoint in another format: {_convert(directory)}"
        if name.endswith(".bin") and _is_llama2c(directory / name):
            file = directory / name
            end = f"give that file, {file}" if is_converting else _convert(file)
            return f"holds {name}, a checkpoint of llama2.c: {end}"
    return None


def unfinished_download(directory: Path) -> str | None:
    """The name of an unfinished download in a directory, or in hf download's folder inside it."""
    for folder in (directory, directory / ".cache" / "huggingface" / "download"):
        with contextlib.suppress(OSError):
            for name in sorted(os.listdir(folder)):
                if name.endswith(_UNFINISHED):
                    return name
    return None


def _is_in_a_cache(directory: Path, names: list[str]) -> str | None:
    """A folder of Hugging Face's cache: hub/models--org--name/snapshots/revision/config.json."""
    if "snapshots" in names:
        repository = directory
    else:
        repository = next((directory / n for n in names if n.startswith("models--")), None)
    if repository is None or not (repository / "snapshots").is_dir():
        return None
    snapshots = [path for path in (repository / "snapshots").iterdir() if path.is_dir()]
    if not snapshots:
        return "is a folder of Hugging Face's cache without a snapshot: run the download again"
    main = repository / "refs" / "main"
    revision = main.read_text(errors="replace").strip() if main.is_file() else ""
    snapshot = max(snapshots, key=lambda path: (path.name == revision, path.stat().st_mtime))
    return f"is a folder of Hugging Face's cache: give a snapshot in it, {snapshot}"


def _is_an_adapter(directory: Path, names: list[str]) -> str | None:
    return f"holds {_ADAPTER}" if set(names) & set(_ADAPTERS) else None


def _is_unfinished(directory: Path, names: list[str]) -> str | None:
    name = unfinished_download(directory)
    return None if name is None else f"holds an unfinished download, {name}: run it again"


def _has_dead_links(directory: Path, names: list[str]) -> str | None:
    for name in names:
        if os.path.islink(directory / name) and not os.path.exists(directory / name):
            return (
                f"holds {name}, a link to a file that does not exist: copy with cp -L, or "
                "download again"
            )
    return None


def _has_no_index(directory: Path, names: list[str]) -> str | None:
    for match in filter(None, map(_SHARD.fullmatch, names)):
        index = "{}.{}.index.json".format(*match.groups())
        if index not in names:
            return f"has shards but no {index}: get that file as well"
    return None


def _has_gguf(directory: Path, names: list[str]) -> str | None:
    name = next((name for name in names if name.endswith(".gguf")), None)
    return None if name is None else f"holds {name}, {_GGUF.removeprefix('is ')}"


def _has_it_further_in(directory: Path, names: list[str]) -> str | None:
    for name in names:
        if (directory / name / "config.json").is_file():
            return f"is not a model directory, but its folder {name} is: give {directory / name}"
    return None


_DIRECTORIES: tuple[Callable[[Path, list[str]], str | None], ...] = (
    _is_in_a_cache,
    _is_an_adapter,
    _is_unfinished,
    _has_dead_links,
    _has_no_index,
    _has_gguf,
    _has_it_further_in,
)


def _first_bytes(path: Path) -> bytes:
    """The first bytes of a file; empty if it cannot be read."""
    with contextlib.suppress(OSError):
        if path.is_file():  # reading a pipe could block
            with open(path, "rb") as file:
                return file.read(_FIRST_BYTES)
    return b""


def _convert(path: Path) -> str:
    return f"npllama convert {shlex.quote(str(path))} DEST makes a model directory from it"


def _is_llama2c(path: Path) -> bool:
    """Whether a file begins like a llama2.c checkpoint: with a magic number or seven counts."""
    header = _first_bytes(path)
    if len(header) < 28:
        return False
    if header.startswith(_LLAMA2C_MAGIC):
        return True
    counts = struct.unpack("<7i", header[:28])  # D, F, L, H, K, V (negative if untied), context
    # float32 weights, read as integers, are far larger than any count
    return all(0 < abs(n) < 2**24 for n in counts) and counts[0] % counts[3] == 0
