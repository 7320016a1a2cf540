"""Learning rate schedules: functions of the step, 0 .. steps - 1.

All of them rise linearly over `warmup` steps: step 0 has peak / warmup, step warmup - 1 has peak.
"""

import math
from collections.abc import Callable

Schedule = Callable[[int], float]
SCHEDULES = ("cosine", "wsd", "constant")


def cosine(step: int, *, peak: float, warmup: int, steps: int, final: float) -> float:
    """Half a cosine after the warm-up, from `peak` to `final` * peak at the last step:

        rate = peak * (final + (1 - final) * (1 + cos(pi * done)) / 2)
        done = (step - warmup) / (steps - 1 - warmup)

    Source: Loshchilov & Hutter 2017 (SGDR), equation 5, without restarts.
    """
    if step < warmup:
        return _rising(step, peak, warmup)
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (final + (1 - final) * (1 + math.cos(math.pi * done)) / 2)


def wsd(step: int, *, peak: float, warmup: int, steps: int, decay: int, final: float) -> float:
    """Warmup-stable-decay: `peak` after the warm-up, except for the last `decay` steps, in which
    the rate falls to `final` * peak:

        rate = peak * (final + (1 - final) * (1 - sqrt(done)))
        done = (step + 1 - (steps - decay)) / decay

    Before the decay the rate does not depend on `steps`.

    Source: Hu et al. 2024 (MiniCPM), section 4; the decay is Hägele et al. 2024's "1-sqrt".
    """
    if step < warmup:
        return _rising(step, peak, warmup)
    falling = step + 1 - (steps - decay)
    if falling <= 0:
        return peak
    return peak * (final + (1 - final) * (1 - math.sqrt(falling / decay)))


def constant(step: int, *, peak: float, warmup: int) -> float:
    """`peak` after the warm-up: rate = peak * min(1, (step + 1) / warmup).

    Source: Goyal et al. 2017, section 2.2 (gradual warm-up), without its later decreases.
    """
    return _rising(step, peak, warmup) if step < warmup else peak


def _rising(step: int, peak: float, warmup: int) -> float:
    return peak * (step + 1) / warmup
