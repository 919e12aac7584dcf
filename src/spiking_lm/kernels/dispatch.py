"""Which implementation of an op runs: the highest priority that is available here and supports the arguments.

Implementations are :class:`~spiking_lm.records.KernelSpec` records named ``"<op>/<implementation>"``. One may be forced
with :func:`use` or, for a whole process, with ``SPIKING_LM_KERNELS="lif_scan=reference,wkv=torch"``; a forced
implementation that cannot run raises, it is never replaced silently.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Literal

import torch

from spiking_lm import registry
from spiking_lm.errors import KernelUnavailableError, SpikingLMError, UnknownNameError, UsageError

ENVIRONMENT = "SPIKING_LM_KERNELS"

_NOTHING: Mapping[str, str] = {}
_asked: ContextVar[Mapping[str, str]] = ContextVar("spiking_lm_kernels", default=_NOTHING)


class _Implementation:
    """One registered implementation; what it needs is imported when it is first considered, and only once."""

    def __init__(self, name: str, registered: registry.Registered) -> None:
        self.name = name
        self.priority: int = registered.spec.priority
        self._registered = registered
        self._ready = False
        self._refusal: str | None = None
        self._supports: Callable[..., Any] | None = None
        self.run: Callable[..., Any] = self._unready

    def refusal(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        """Say why it cannot run with these arguments, or None when it can."""
        if not self._ready:
            self._prepare()
        if self._refusal is not None or self._supports is None:
            return self._refusal
        answer = self._supports(*args, **kwargs)
        return None if answer is True else str(answer)

    def _prepare(self) -> None:
        spec = self._registered.spec
        try:
            self._refusal = self._registered.missing()
            if self._refusal is None and spec.available is not None:
                answer = self._registered.load("available")()
                self._refusal = None if answer is True else str(answer)
            if self._refusal is None:
                self.run = self._registered.load("implementation")
                self._supports = None if spec.supports is None else self._registered.load("supports")
        except SpikingLMError as err:  # a plugin's broken target must not take the other implementations along
            self._refusal = err.message
        self._ready = True

    def _unready(self, *args: Any, **kwargs: Any) -> Any:
        raise KernelUnavailableError(f"{self._registered.spec.name} was called before it was found to be available")


_table: tuple[registry.PluginManager, dict[str, list[_Implementation]]] | None = None


def _implementations(op: str) -> list[_Implementation]:
    """Return the implementations of ``op``, highest priority first; a plugin manager is asked once."""
    global _table
    manager = registry.manager()
    if _table is None or _table[0] is not manager:
        ops: dict[str, list[_Implementation]] = {}
        for full_name, registered in manager.all("kernels").items():
            name, _, implementation = full_name.partition("/")
            ops.setdefault(name, []).append(_Implementation(implementation, registered))
        for found in ops.values():
            found.sort(key=lambda one: (-one.priority, one.name))
        _table = (manager, ops)
    try:
        return _table[1][op]
    except KeyError:
        raise UnknownNameError("kernel op", op, _table[1]) from None


def _named(op: str, name: str, *, hint: str | None = None) -> _Implementation:
    for one in _implementations(op):
        if one.name == name:
            return one
    raise UnknownNameError(f"implementation of {op}", name, [one.name for one in _implementations(op)], hint=hint)


@lru_cache(maxsize=8)
def _parse(setting: str) -> Mapping[str, str]:
    wanted = {}
    for part in filter(None, (piece.strip() for piece in setting.split(","))):
        op, equals, name = (piece.strip() for piece in part.partition("="))
        if not (op and equals and name):
            raise UsageError(
                f"environment variable {ENVIRONMENT}: cannot read {part!r}",
                hint=f'write it as {ENVIRONMENT}="lif_scan=reference,wkv=torch"',
            )
        _implementations(op)  # an op that does not exist is said at once, not when it would be called
        wanted[op] = name
    return wanted


def forced(op: str) -> tuple[str, str] | None:
    """Return the implementation that was asked for by name and by whom, or None."""
    name = _asked.get().get(op)
    if name is not None:
        return name, "kernels.use"
    setting = os.environ.get(ENVIRONMENT)
    if setting:
        name = _parse(setting).get(op)
        if name is not None:
            return name, f"environment variable {ENVIRONMENT}"
    return None


def traced() -> bool:
    """Say whether torch.compile, torch.export or fake tensors watch: an op must then be one node to them."""
    if torch.compiler.is_compiling():
        return True
    if torch._C._len_torch_dispatch_stack() == 0:
        return False
    kinds, mode = torch._C._TorchDispatchModeKey, torch._C._get_dispatch_mode
    return mode(kinds.FAKE) is not None or mode(kinds.PROXY) is not None


def call(op: str, *args: Any, **kwargs: Any) -> Any:
    """Run ``op`` with the implementation that is forced, or else the best that is available and supports the call.

    Raises: KernelUnavailableError with the reasons when none can run, or when the forced one cannot.
    """
    asked = forced(op)
    if asked is not None:
        name, source = asked
        one = _named(op, name, hint=f"it is asked for by {source}")
        reason = one.refusal(args, kwargs)
        if reason is None:
            return one.run(*args, **kwargs)
        raise KernelUnavailableError(
            f"{op}: the implementation {name!r}, asked for by {source}, cannot run: {reason}",
            hint=f"use another one, or leave the choice open: {', '.join(i.name for i in _implementations(op))}",
        )
    candidates = _implementations(op)
    for one in candidates:
        if one.refusal(args, kwargs) is None:
            return one.run(*args, **kwargs)
    reasons = "; ".join(f"{one.name}: {one.refusal(args, kwargs)}" for one in candidates)
    raise KernelUnavailableError(f"{op}: no implementation can run these arguments ({reasons})")


def explain_choice(op: str, *args: Any, **kwargs: Any) -> list[tuple[str, Literal[True] | str]]:
    """Say of each implementation, best first, whether it could run this call (True) or why not.

    The first True is the one that would run. An implementation that is forced makes all the others say so.
    """
    asked = forced(op)
    if asked is not None:
        _named(op, asked[0], hint=f"it is asked for by {asked[1]}")
    answers: list[tuple[str, Literal[True] | str]] = []
    for one in _implementations(op):
        if asked is not None and one.name != asked[0]:
            answers.append((one.name, f"passed over: {asked[1]} asks for {asked[0]!r}"))
        else:
            answers.append((one.name, one.refusal(args, kwargs) or True))
    return answers


@contextmanager
def use(**implementations: str) -> Iterator[None]:
    """Force implementations by name within a ``with`` block: ``with kernels.use(lif_scan="reference"): ...``.

    It holds for the current thread or task only, and takes precedence over SPIKING_LM_KERNELS.
    Raises: UnknownNameError for an op or an implementation that is not registered.
    """
    for op, name in implementations.items():
        _named(op, name)
    token = _asked.set({**_asked.get(), **implementations})
    try:
        yield
    finally:
        _asked.reset(token)
