"""The processes that train together, as one of them sees them; this one is alone (torch-free).

Training is written against :class:`World`. A lone process has nobody to ask, so that what it computes is exactly what
it would compute without; :mod:`spiking_lm.distributed` has the world of a process that torchrun started beside others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from spiking_lm.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from spiking_lm.interfaces import SpikingLanguageModel
    from spiking_lm.recipe import Recipe
    from spiking_lm.rundir import RunDir
    from spiking_lm.stages import TrainConfig


LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")
"""What torchrun tells a process that it is."""


class World:
    """A process that trains alone, and what one of several does differently."""

    rank = 0
    """Which process this is. Rank 0 alone reports and writes."""
    size = 1
    """How many there are."""

    # -- before and after ----------------------------------------------------------------------------------------------

    def lead(self, run: RunDir, recipe: Recipe, resume_from: str | None, data_sha256: str) -> None:
        """Tell the others what is trained, and wait until they have it before them."""

    def leave(self) -> None:
        """Part from the others: what follows, this process does alone."""

    # -- the batch -----------------------------------------------------------------------------------------------------

    def rows(self, n: int) -> slice:
        """Return which of the ``n`` rows of a batch are this process's; together they are all, each once.

        Raises: UsageError when they cannot be shared out equally.
        """
        if n % self.size:
            raise UsageError(
                f"train.batch_size {n} cannot be shared out to {self.size} processes",
                hint=f"it counts the sequences of all processes: take a multiple of {self.size}",
            )
        share = n // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def weight(self, mine: int, whole: int) -> float:
        """Return what a mean over ``mine`` of ``whole`` items weighs, so that the mean over ranks is that over all."""
        return self.size * mine / whole

    def whole(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes, in order, given this one's ``(B / size, ...)``."""
        return rows

    def shards(self, config: TrainConfig) -> bool:
        """Say whether weights are cut over the processes."""
        return self.size > 1 and config.distributed.strategy == "fsdp2"

    # -- the step ------------------------------------------------------------------------------------------------------

    def place(self, model: SpikingLanguageModel) -> None:
        """Bring the model to where this process computes, the same weights everywhere."""

    def wrap(
        self, micro: nn.Module, rehearsal: Callable[[], Tensor], optimizer: torch.optim.Optimizer, config: TrainConfig
    ) -> Callable[..., Tensor]:
        """Return ``micro`` so that its gradients become the means over all processes.

        Parameters may be exchanged for others, in the ``optimizer`` too, which has made no step yet. ``rehearsal``
        computes a loss with it and leaves no trace.
        """
        return micro

    def begin_step(self, seed: int, step: int) -> None:
        """Set the random generator where its numbers must not be the same in every process."""

    def accumulating(self, engine: Any, *, last: bool) -> AbstractContextManager[None]:
        """Keep gradients to this process until the ``last`` micro-batch of a step."""
        return nullcontext()

    def number(self, value: Tensor) -> float:
        """Return a scalar, e.g. a norm, that may be spread over the processes."""
        return float(value)

    def sums(self, *values: float) -> tuple[float, ...]:
        """Return the sums over all processes."""
        return values

    def any(self, here: bool) -> bool:
        """Say whether it is so in any process."""
        return here

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def snapshot(
        self, model: SpikingLanguageModel, optimizer: torch.optim.Optimizer
    ) -> tuple[SpikingLanguageModel, dict[str, Any]]:
        """Return the whole model and the optimizer's whole state, as one process would have them, on rank 0."""
        return model, optimizer.state_dict()

    def share_state(self, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return this process's part of an optimizer's whole state."""
        return state

    @property
    def keeps_all(self) -> bool:
        """Whether rank 0 has weights and optimizer state whole, without asking the others."""
        return True

    def lost(self, error: RuntimeError) -> bool:
        """Say whether an error means that another process is gone."""
        return False


def launched() -> bool:
    """Say whether torchrun, or what sets the same variables, started this process as one of several."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def leads() -> bool:
    """Say whether this process is the one that reports: alone, or rank 0."""
    return not launched() or os.environ["RANK"] == "0"


@contextmanager
def joined() -> Iterator[World]:
    """Give this process its world: alone, or with the others that were launched with it.

    Inside, the launcher's variables are hidden: what this process starts is no member.
    """
    if not launched():
        yield World()
        return
    from spiking_lm.distributed import members

    with members() as world:
        yield world
