"""AdamW, in-place on named arrays, and gradient clipping."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from npllama.backend import Array

Arrays = dict[str, Array]
Map = Callable[[Callable[[str], Any], Iterable[str]], Iterable[Any]]


class AdamW:
    """The AdamW optimizer. With g the gradient of w at step t = 1, 2, ..., elementwise:

        m = b1 m + (1 - b1) g
        v = b2 v + (1 - b2) g^2
        w = w - rate * ( (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + decay * w )

    `decay` applies to matrices only. Norm weights, which are vectors, do not decay.

    Source: Loshchilov & Hutter 2019, algorithm 2; Kingma & Ba 2015.
    """

    def __init__(
        self,
        weights: Arrays,
        *,
        b1: float = 0.9,
        b2: float = 0.99,
        eps: float = 1e-8,
        decay: float = 0.1,
        xp: Any,
    ) -> None:
        self.weights = weights
        self.b1, self.b2, self.eps, self.decay = b1, b2, eps, decay
        self.xp = xp
        self.m = {name: xp.zeros_like(w) for name, w in weights.items()}
        self.v = {name: xp.zeros_like(w) for name, w in weights.items()}

    def update(self, gradients: Arrays, rate: float, t: int, each: Map = map) -> None:
        """One step, in-place. It overwrites the gradients. `each` may be a thread pool's map."""

        def update_one(name: str) -> None:
            w, g, m, v = self.weights[name], gradients[name], self.m[name], self.v[name]
            m *= self.b1
            m += (1 - self.b1) * g
            v *= self.b2
            g *= g
            g *= 1 - self.b2
            v += g
            change = self.xp.sqrt(v, out=g)
            change *= 1 / math.sqrt(1 - self.b2**t)
            change += self.eps
            self.xp.divide(m, change, out=change)
            change *= rate / (1 - self.b1**t)
            if w.ndim > 1:
                w *= 1 - rate * self.decay
            w -= change

        for _ in each(update_one, self.weights):
            pass


def clip(gradients: Arrays, max_grad_norm: float, xp: Any) -> Array:
    """Scale all gradients in-place so that their joint norm is at most `max_grad_norm`. Returns
    the norm before scaling, an array of shape ().

    Source: Pascanu et al. 2013, algorithm 1.
    """
    norm = xp.sqrt(sum((xp.square(g).sum() for g in gradients.values()), 0.0))
    scale = xp.minimum(1.0, max_grad_norm / (norm + 1e-6)).astype("float32")
    for g in gradients.values():
        g *= scale
    return norm
