"""Where a run stands: weights, optimizer state and position, whole or not at all."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from npllama.atomic_file import atomic_file
from npllama.errors import InputError


def save_checkpoint(path: Path, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    """Write all of it, or leave the old file.

    Args:
        arrays: by name, float32.
        facts: what JSON can hold, such as the step.

    Raises:
        InputError: it cannot be written.
    """
    with atomic_file(path) as partial, open(partial, "wb") as file:
        np.savez(file, facts=np.array(json.dumps(facts)), **arrays)


def load_facts(path: Path) -> dict[str, Any]:
    """The facts alone, without reading the arrays.

    Raises:
        InputError: as for load_checkpoint.
    """
    return load_checkpoint(path, with_arrays=False)[1]


def load_checkpoint(
    path: Path, with_arrays: bool = True
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What save_checkpoint wrote.

    Raises:
        InputError: the file is damaged or of another kind.
    """
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            facts = json.loads(str(file["facts"]))
            names = [name for name in file.files if name != "facts"] if with_arrays else []
            return {name: file[name] for name in names}, facts
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} is no checkpoint of a training run ({error}): remove it to begin anew"
        ) from None
