"""Decides whether a run can resume from a checkpoint: which options must be the same."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from npllama.errors import InputError
from training import schedules
from training.schedules import Schedule

_LENGTH = ("steps", "decay")
"""Options that may change if no step already done would have had another learning rate."""
_BEFORE = {"schedule": "cosine", "decay": None, "start": None}
"""Values of options that older checkpoints do not have."""

_WHY = {
    "cosine": "the cosine schedule depends on the number of steps",
    "wsd": "the decay has already begun, or would have",
}


def schedule_of(identity: Mapping[str, Any]) -> Schedule:
    """The learning rate schedule of a run with these options."""
    settings = {"peak": identity["lr"], "warmup": identity["warmup"]}
    if identity["schedule"] == "constant":
        return partial(schedules.constant, **settings)
    settings |= {"steps": identity["steps"], "final": identity["final_lr"]}
    if identity["schedule"] == "cosine":
        return partial(schedules.cosine, **settings)
    return partial(schedules.wsd, **settings, decay=identity["decay"])


def check_identity(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], steps_done: int, checkpoint: Path
) -> None:
    """Refuse a checkpoint from which the run `ours` cannot resume.

    It can resume if all options are the same. It can also resume if only the number of steps (or of
    decay steps) differs, and each step already done had the same learning rate as in the new run.
    In both cases the result equals that of the new run without interruption.

    Args:
        ours: options of the requested run.
        theirs: options of the run that wrote the checkpoint.

    Raises:
        InputError: the checkpoint is of another run, or its run cannot be changed to this length.
    """
    theirs = _BEFORE | dict(theirs)
    for name, value in ours.items():
        if name not in _LENGTH and theirs.get(name) != value:
            is_long = name in ("config", "text", "tokenizer", "start")
            what = "" if is_long else f" ({theirs.get(name)}, now {value})"
            raise InputError(
                f"{checkpoint} is of a run with another {name}{what}: "
                "give the option that the run was started with, or choose another --out"
            )
    if ours["steps"] < steps_done:
        raise InputError(
            f"{checkpoint} has {steps_done} steps done, but --steps is {ours['steps']}: give at "
            "least as many, or choose another --out"
        )
    if all(ours[name] == theirs[name] for name in _LENGTH):
        return
    old, new = schedule_of(theirs), schedule_of(ours)
    if any(old(step) != new(step) for step in range(steps_done)):
        changed = next(name for name in _LENGTH if ours[name] != theirs[name])
        raise InputError(
            f"{checkpoint} is of a run started with --{changed} {theirs[changed]}: with "
            f"{ours[changed]}, the steps already done would have had other learning rates, since "
            f"{_WHY[ours['schedule']]}; give what it was started with, or choose another --out"
        )
