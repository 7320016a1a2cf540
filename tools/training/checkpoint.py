"""Checkpoints of a run: weights, optimizer state and position, written atomically."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from npllama.atomic_file import atomic_file
from npllama.errors import InputError


def save_checkpoint(path: Path, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    """Write a checkpoint. If writing fails, the old file is kept.

    Args:
        arrays: float32 arrays by name.
        facts: JSON values by name, such as the step.

    Raises:
        InputError: the file cannot be written.
    """
    with atomic_file(path) as partial, open(partial, "wb") as file:
        np.savez(file, facts=np.array(json.dumps(facts)), **arrays)


def load_facts(path: Path) -> dict[str, Any]:
    """Read only the facts of a checkpoint, not its arrays.

    Raises:
        InputError: as for load_checkpoint.
    """
    return load_checkpoint(path, with_arrays=False)[1]


def load_checkpoint(
    path: Path, with_arrays: bool = True
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what save_checkpoint wrote: (arrays, facts).

    Raises:
        InputError: the file is damaged or is not a checkpoint.
    """
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            facts = json.loads(str(file["facts"]))
            names = [name for name in file.files if name != "facts"] if with_arrays else []
            return {name: file[name] for name in names}, facts
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} is not a checkpoint of a training run ({error}): remove it to start over"
        ) from None
