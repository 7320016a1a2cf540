"""A training run: its state, and its steps."""

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from npllama.backend import Array
from npllama.config import LlamaConfig
from npllama.errors import InputError, OutOfMemoryError
from npllama.gradients import loss_and_gradients
from npllama.model import Transformer
from npllama.ops import Ops
from npllama.weights import named_arrays
from training.adamw import AdamW, clip
from training.batches import Batches, MicroBatch
from training.schedules import Schedule


@dataclass(frozen=True)
class StepResult:
    """Results of a step: loss in nats per token, norm of the gradient, targets, learning rate."""

    loss: float
    gradient_norm: float
    n_targets: int
    learning_rate: float


def check_training_memory(config: LlamaConfig, ops: Ops, micro_batch: int, n_workers: int) -> None:
    """Raise OutOfMemoryError if a run of such a model does not fit, before it is allocated.

    A run needs the weights, the optimizer's m and v, the sum of gradients, and per worker: one
    gradient, the inputs of all blocks, and the temporary arrays of one block or of the head.
    """
    weights = 4 * config.n_parameters * (4 + n_workers)
    n_tokens = micro_batch * config.context_length
    block = 8 * config.dim + 8 * config.n_heads * config.head_dim + 6 * config.ffn_dim
    scores = 6 * config.n_heads * config.context_length
    widest = max(block + scores, 5 * config.vocab_size)
    inputs = (2 * config.n_layers + 1) * config.dim
    activations = 4 * n_workers * n_tokens * (inputs + widest)
    free = ops.backend.free_bytes()
    if free is not None and weights + activations > free:
        raise OutOfMemoryError(
            f"training needs {(weights + activations) / 1e9:.2f} GB of "
            f"{ops.backend.memory_name()} (weights, gradients and optimizer "
            f"{weights / 1e9:.2f} GB, activations {activations / 1e9:.2f} GB), but "
            f"only {free / 1e9:.2f} GB are free: use a smaller --micro-batch, fewer --threads or a "
            "smaller model"
        )


class WorkerThreads:
    """Threads that each compute the gradient of one micro-batch, with one BLAS thread.

    Half of a small model's step is elementwise, which NumPy computes on one core. One core per
    micro-batch is therefore faster than all cores for one micro-batch. The number of threads does
    not change results, because each product runs in one thread. A device is parallel itself and
    has one worker.
    """

    def __init__(self, n: int) -> None:
        self.n = n

    def __enter__(self) -> "WorkerThreads":
        self._pool = ThreadPoolExecutor(self.n)
        self._limits = threadpool_limits(1, user_api="blas")
        return self

    def map(self, function: Any, items: Iterable[Any]) -> Iterable[Any]:
        """function(item) for each item, in order."""
        return map(function, items) if self.n == 1 else self._pool.map(function, items)

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._limits.restore_original_limits()


class Run:
    """Weights, optimizer state and position of a run.

    The gradients of micro-batches are added in their order, whatever the number of workers, so a
    run is reproducible bit by bit.
    """

    def __init__(
        self,
        model: Transformer,
        batches: Batches,
        schedule: Schedule,
        *,
        decay: float,
        max_grad_norm: float,
        workers: WorkerThreads,
    ) -> None:
        self.model = model
        self.batches = batches
        self.schedule = schedule
        self.max_grad_norm = max_grad_norm
        self.workers = workers
        self.xp = model.backend.xp
        self.weights = named_arrays(model.parameters, model.config)
        self.optimizer = AdamW(self.weights, decay=decay, xp=self.xp)
        self.steps_done = 0

    def step(self) -> StepResult:
        """Perform one step of the schedule. The weights change in-place.

        Raises:
            InputError: the loss or gradient is not finite. The weights are unchanged.
        """
        micro_batches = self.batches.step(self.steps_done)
        loss, gradients = self._gradients(micro_batches)
        to_host = self.model.backend.to_host
        norm = float(to_host(clip(gradients, self.max_grad_norm, self.xp)))
        loss = float(to_host(loss))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise InputError(
                f"the loss became {loss} and its gradient's norm {norm} at step "
                f"{self.steps_done + 1}: use a smaller --lr; earlier checkpoints are kept"
            )
        rate = self.schedule(self.steps_done)
        self.steps_done += 1
        self.optimizer.update(gradients, rate, self.steps_done, self.workers.map)
        n_targets = sum(int(np.count_nonzero(part.weights)) for part in micro_batches)
        return StepResult(loss, norm, n_targets, rate)

    def _gradients(self, micro_batches: list[MicroBatch]) -> tuple[Array, dict[str, Array]]:
        n = self.workers.n
        total_loss, total = None, {}
        for begin in range(0, len(micro_batches), n):  # limits memory to n gradients
            for loss, gradients in self.workers.map(
                self._gradient, micro_batches[begin : begin + n]
            ):
                if total_loss is None:
                    total_loss, total = loss, gradients
                    continue
                total_loss = total_loss + loss
                for name, gradient in gradients.items():
                    total[name] += gradient
        return total_loss, total

    def _gradient(self, part: MicroBatch) -> tuple[Array, dict[str, Array]]:
        move = self.model.backend.to_device
        tokens, targets, weights = (move(a) for a in (part.tokens, part.targets, part.weights))
        with np.errstate(all="ignore"):  # `step` checks that loss and gradient are finite
            loss, gradients = loss_and_gradients(self.model, tokens, targets, weights)
        return loss, named_arrays(gradients, self.model.config)

    # -- the state, for checkpoints

    def state(self) -> dict[str, np.ndarray]:
        """Weights and optimizer state by name, as host arrays."""
        to_host = self.model.backend.to_host
        kinds = {"w": self.weights, "m": self.optimizer.m, "v": self.optimizer.v}
        return {
            f"{kind}/{name}": to_host(array)
            for kind, arrays in kinds.items()
            for name, array in arrays.items()
        }

    def restore(self, state: dict[str, np.ndarray], steps_done: int) -> None:
        """Restore the state returned by `state` after `steps_done` steps."""
        kinds = {"w": self.weights, "m": self.optimizer.m, "v": self.optimizer.v}
        for kind, arrays in kinds.items():
            for name, array in arrays.items():
                array[...] = self.model.backend.to_device(state[f"{kind}/{name}"])
        self.steps_done = steps_done
