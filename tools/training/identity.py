"""Which run a checkpoint is of: what its numbers follow from, and what of it may change."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from npllama.errors import InputError
from training import schedules
from training.schedules import Schedule

_LENGTH = ("steps", "decay")
"""They may change where no step that is done would have had another rate."""
_BEFORE = {"schedule": "cosine", "decay": None, "start": None}
"""What a checkpoint means that was written before these had a choice."""

_WHY = {
    "cosine": "a cosine falls from its warm-up to the last step",
    "wsd": "its decay has begun, or would have",
}


def schedule_of(identity: Mapping[str, Any]) -> Schedule:
    """The schedule of a run with these options."""
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
    """Refuse a checkpoint from which the run `ours` cannot go on.

    It goes on where all is the same, or where only the number of steps (or that of the decay)
    differs and every step that is done had the rate that it has in the new run. Then the result
    is that of the new run from its beginning.

    Args:
        ours: the run that is asked for; `theirs`: the one that wrote the checkpoint.

    Raises:
        InputError: it is of another run, or cannot get this length.
    """
    theirs = _BEFORE | dict(theirs)
    for name, value in ours.items():
        if name not in _LENGTH and theirs.get(name) != value:
            is_long = name in ("config", "text", "tokenizer", "start")
            what = "" if is_long else f" ({theirs.get(name)}, now {value})"
            raise InputError(
                f"{checkpoint} is of a run with another {name}{what}: "
                "give what it was begun with, or choose another --out"
            )
    if ours["steps"] < steps_done:
        raise InputError(
            f"{checkpoint} has {steps_done} steps done and --steps is {ours['steps']}: give at "
            "least as many, or choose another --out"
        )
    if all(ours[name] == theirs[name] for name in _LENGTH):
        return
    old, new = schedule_of(theirs), schedule_of(ours)
    if any(old(step) != new(step) for step in range(steps_done)):
        changed = next(name for name in _LENGTH if ours[name] != theirs[name])
        raise InputError(
            f"{checkpoint} was begun with --{changed} {theirs[changed]}, and with "
            f"{ours[changed]} the steps that are done would have had other learning rates, since "
            f"{_WHY[ours['schedule']]}: give what it was begun with, or choose another --out"
        )
