"""Every error that spiking-lm raises on purpose.

::

    SpikingLMError                   exit code 1
    ├── UsageError                   2   the request itself is wrong
    │   ├── RecipeError                  a recipe file or an override
    │   ├── ConfigError                  a model, neuron or dataset configuration
    │   └── UnknownNameError             no such model, neuron, dataset, recipe ...
    ├── PluginError                  3   a plugin is missing, broken or in conflict
    │   └── MissingExtraError            an optional dependency is not installed
    ├── DataError                    4   a data file is missing or malformed
    │   └── CheckpointError              a checkpoint is missing, incomplete or corrupt
    ├── KernelUnavailableError       1   a kernel asked for by name cannot run here
    ├── LoweringError                1   a model, or one op of it, cannot be placed on the hardware asked for
    ├── DivergedError                1   the loss or a gradient is no longer finite
    └── InterruptedRunError        130   Ctrl-C; the run can be resumed
        └── LostRankError            1   another process of the run is gone; the run can be resumed

Each carries what happened (the message) and how to mend it (``hint``).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SpikingLMError(Exception):
    """Base of all errors raised on purpose: ``message`` says what and where, ``hint`` how to mend it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class UsageError(SpikingLMError):
    """The request itself is wrong."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe file or an override is wrong; the message names file and field."""


class ConfigError(UsageError):
    """A configuration is wrong; the message names the field."""


class UnknownNameError(UsageError):
    """No such name in a registry; the hint offers the nearest ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str], *, hint: str | None = None) -> None:
        known = sorted(known)
        near = did_you_mean(name, known)
        offer = near or (f"known: {', '.join(known)}" if known else f"no {kind} is registered")
        super().__init__(f"unknown {kind} {name!r}", hint=f"{offer}. {hint}" if hint else offer)


class PluginError(SpikingLMError):
    """A plugin is missing, broken or in conflict."""

    exit_code = 3


class MissingExtraError(PluginError):
    """An optional dependency is not installed; the hint is the command that installs it."""

    def __init__(self, what: str, extra: str, *, detail: str | None = None) -> None:
        message = f"{what} needs the extra {extra!r}" + (f" ({detail})" if detail else "")
        super().__init__(message, hint=f"pip install 'spiking-lm[{extra}]'")


class DataError(SpikingLMError):
    """A data file is missing or malformed."""

    exit_code = 4


class CheckpointError(DataError):
    """A checkpoint is missing, incomplete or corrupt; the message names the file."""


class KernelUnavailableError(SpikingLMError):
    """A kernel implementation asked for by name cannot run; the message says why."""


class LoweringError(SpikingLMError):
    """A model, or one op of it, cannot be placed on the hardware asked for; the message names the op and the reason."""


class DivergedError(SpikingLMError):
    """Training met a loss or gradient that is not finite; the hint names the last good checkpoint."""


class InterruptedRunError(SpikingLMError):
    """Training was interrupted; the hint is the command that resumes it."""

    exit_code = 130


class LostRankError(InterruptedRunError):
    """Another process that trained with this one is gone; the hint is the command that resumes the run."""

    exit_code = 1


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """Return ``"did you mean 'x'?"`` when a known name is close, else None."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else None
