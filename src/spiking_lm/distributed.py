"""Training in several processes, on torch.distributed: gloo between CPUs, NCCL between GPUs.

Imported only in a process that torchrun started beside others. Rank 0 runs the recipe; the others wait until it comes
to training, train with it, and are done. docs/distributed.md describes what is the same as in one process, and why.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from spiking_lm.checkpoints import filled_model
from spiking_lm.errors import DivergedError, InterruptedRunError, LostRankError, SpikingLMError, UsageError
from spiking_lm.interfaces import SpikingLanguageModel
from spiking_lm.recipe import Recipe
from spiking_lm.recompute import blocks_of
from spiking_lm.rundir import RunDir
from spiking_lm.stages import TrainConfig
from spiking_lm.world import LAUNCHER, World

_LOST = re.compile(r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|socket|peer", re.IGNORECASE)
_TIMEOUT = timedelta(minutes=30)  # between two collectives, e.g. while rank 0 writes a checkpoint
_LOOK_EVERY = 0.05  # seconds
_times_joined = itertools.count()


class Members(World):
    """One of several processes that train together; ``store`` holds the notes that they leave each other."""

    def __init__(self, store: Store, rank: int, size: int, device: torch.device) -> None:
        self.store, self.rank, self.size, self.device = store, rank, size, device
        self._strategy = "ddp"
        self._engine: nn.Module | None = None

    # -- before and after ----------------------------------------------------------------------------------------------

    def lead(self, run: RunDir, recipe: Recipe, resume_from: str | None, data_sha256: str) -> None:
        order = {
            "run": str(run.path),
            "manifest": run.manifest,
            "recipe": recipe.model_dump(mode="json", by_alias=True),
            "resume_from": resume_from,
            "data": data_sha256,
        }
        self.store.set("order", json.dumps(order))
        for rank in range(1, self.size):
            self._look_for(f"ready {rank}")
            if problem := self.store.get(f"ready {rank}").decode():
                raise SpikingLMError(f"rank {rank} of {self.size} cannot train: {problem}")

    def order(self) -> dict[str, Any] | None:
        """Return what rank 0 says is to be trained, when it says so; None when it trains nothing."""
        self._look_for("order")
        order: dict[str, Any] | None = json.loads(self.store.get("order"))
        return order

    def ready(self, problem: str = "") -> None:
        """Tell rank 0 that this process can begin, or why it cannot."""
        self.store.set(f"ready {self.rank}", problem)

    def _look_for(self, note: str) -> None:
        """Wait for a note; signals are heard, and a launcher that ends this process can."""
        while not self.store.check([note]):
            time.sleep(_LOOK_EVERY)

    def leave(self) -> None:
        if self.rank == 0 and not self.store.check(["order"]):
            self.store.set("order", "null")
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):  # of a lost rank
                dist.destroy_process_group()

    # -- the batch -----------------------------------------------------------------------------------------------------

    def whole(self, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows.contiguous()) for _ in range(self.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    # -- the step ------------------------------------------------------------------------------------------------------

    def place(self, model: SpikingLanguageModel) -> None:
        norms = [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        if norms:
            raise UsageError(
                f"{norms[0]} normalises by the statistics of a batch, of which each process sees a part alone",
                hint="train this model in one process",
            )
        model.to(self.device)
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.detach(), 0)

    def wrap(
        self, micro: nn.Module, rehearsal: Callable[[], Tensor], optimizer: torch.optim.Optimizer, config: TrainConfig
    ) -> Callable[..., Tensor]:
        self._strategy = config.distributed.strategy
        if self._strategy == "fsdp2":
            blocks = blocks_of(micro, rehearsal)
            names = {id(parameter): name for name, parameter in micro.named_parameters()}
            self._engine = _sharded(micro, blocks, self.device, self.size)
            shares = dict(micro.named_parameters())
            for group in optimizer.param_groups:
                group["params"] = [shares[names[id(parameter)]] for parameter in group["params"]]
            return self._engine
        # Buffers are the same everywhere: none depends on the rows.
        unused = bool(config.distill) or not _reaches(rehearsal(), micro)  # a distillation has phases
        new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        buffers: dict[str, Any] = {"forward_sync_buffers" if new else "broadcast_buffers": False}
        self._engine = DistributedDataParallel(micro, find_unused_parameters=unused, **buffers)
        return self._engine

    def begin_step(self, seed: int, step: int) -> None:
        torch.manual_seed(int(np.random.SeedSequence((seed, step, self.rank)).generate_state(1)[0]))

    def accumulating(self, engine: Any, *, last: bool) -> AbstractContextManager[None]:
        if self._strategy == "fsdp2":
            engine.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else engine.no_sync()  # type: ignore[no-any-return]

    def number(self, value: Tensor) -> float:
        return float(_full(value))

    def sums(self, *values: float) -> tuple[float, ...]:
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return tuple(total.tolist())

    def any(self, here: bool) -> bool:
        return bool(self.sums(float(here))[0])

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    @property
    def keeps_all(self) -> bool:
        return self._strategy == "ddp"

    def snapshot(
        self, model: SpikingLanguageModel, optimizer: torch.optim.Optimizer
    ) -> tuple[SpikingLanguageModel, dict[str, Any]]:
        if self._strategy == "ddp":
            return model, optimizer.state_dict()
        from torch.distributed.fsdp import FSDPModule

        assert self._engine is not None
        for module in self._engine.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        tensors: dict[str, Tensor] = {}
        aliases: dict[str, str] = {}
        first: dict[int, str] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) in first:
                aliases[name] = first[id(tensor)]
            else:
                first[id(tensor)] = name
                tensors[name] = self._gathered(tensor)
        state = self._gathered(optimizer.state_dict())
        return (filled_model(model.config, tensors, aliases) if self.rank == 0 else model), state

    def _gathered(self, value: Any) -> Any:
        """Return a nest of dicts and lists with its tensors whole, on rank 0's CPU; elsewhere they are empty."""
        if isinstance(value, Tensor):
            whole = _full(value)
            return whole.cpu() if self.rank == 0 else whole.new_empty(0)
        if isinstance(value, dict):
            return {key: self._gathered(item) for key, item in value.items()}
        return [self._gathered(item) for item in value] if isinstance(value, list) else value

    def share_state(self, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        if self._strategy == "ddp":
            return state
        from torch.distributed.tensor import DTensor, distribute_tensor

        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

        def part(value: Any, of: Tensor) -> Any:
            if isinstance(of, DTensor) and isinstance(value, Tensor) and value.shape == of.shape:
                return distribute_tensor(value.to(of.device), of.device_mesh, of.placements)
            return value

        shares = {
            index: {name: part(value, parameters[index]) for name, value in moments.items()}
            for index, moments in state["state"].items()
        }
        return {**state, "state": shares}

    def lost(self, error: RuntimeError) -> bool:
        gone = isinstance(error, dist.DistError) or bool(_LOST.search(str(error)))
        if gone and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher ends whoever is left; we end by ourselves
        return gone


def _reaches(loss: Tensor, module: nn.Module) -> bool:
    """Say whether every parameter of ``module`` takes part in ``loss``."""
    missing = {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
    seen, ahead = set(), [loss.grad_fn]
    while ahead and missing:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            missing.discard(id(getattr(node, "variable", None)))
            ahead += [before for before, _ in node.next_functions]
    return not missing


def _sharded(micro: nn.Module, blocks: Sequence[nn.Module], device: torch.device, size: int) -> nn.Module:
    """Cut every weight over the processes; a block's weights are whole only while it computes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    scalars = [name for name, parameter in micro.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise UsageError(
            f"train.distributed: fsdp2 cuts weights along their first dimension, and {scalars[0]} has none",
            hint="strategy: ddp",
        )
    mesh = init_device_mesh(device.type, (size,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
        _pass_on_objects(block)
    fully_shard(micro, mesh=mesh)
    if device.type == "cpu":
        for module in (*blocks, micro):
            module.__dict__["forward"] = partial(_with_own_weights, module, module.forward)
    return micro


def _with_own_weights(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run ``forward`` with copies of the weights that are whole now.

    FSDP takes the memory of weights back, and numpy, which compiled kernels on a CPU show theirs to, forbids that.
    """
    from torch.distributed.tensor import DTensor

    whole = [
        (part, name, weight)
        for part in module.modules()
        for name, weight in part._parameters.items()
        if weight is not None and not isinstance(weight, DTensor)
    ]
    copies = {id(weight): weight.clone() for _, _, weight in whole}
    try:
        for part, name, weight in whole:
            part._parameters[name] = copies[id(weight)]  # type: ignore[assignment]
        return forward(*args, **kwargs)
    finally:
        for part, name, weight in whole:
            part._parameters[name] = weight


class _Held:
    """Something that is not to be taken apart."""

    def __init__(self, content: object) -> None:
        self.content = content


def _pass_on_objects(block: nn.Module) -> None:
    """Let a sharded block write into the lists and objects that it is called with, where FSDP would give it copies.

    What it returns is no view, which FSDP could not follow if the model changed it in place.
    """
    forward = block.forward

    def hold(value: Any) -> Any:
        return value if isinstance(value, Tensor) else _Held(value)

    def release(value: Any) -> Any:
        return value.content if isinstance(value, _Held) else value

    def own(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) and value._is_view() else value

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return _mapped(hold, args), {name: _mapped(hold, value) for name, value in kwargs.items()}

    def run(*args: Any, **kwargs: Any) -> Any:
        held = {name: _mapped(release, value) for name, value in kwargs.items()}
        return _mapped(own, forward(*_mapped(release, args), **held))

    block.register_forward_pre_hook(before, prepend=True, with_kwargs=True)  # before that of FSDP
    block.__dict__["forward"] = run


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply ``function`` to whatever is in a nest of tuples."""
    if not isinstance(value, tuple):
        return function(value)
    parts = [_mapped(function, part) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


def _full(tensor: Tensor) -> Tensor:
    """Return a tensor whole, on every rank; every rank must ask."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


# -- who takes part ----------------------------------------------------------------------------------------------------


@contextmanager
def members() -> Iterator[Members]:
    """Meet the other processes that the launcher started, for as long as the block lasts, or until one leaves."""
    store, rank, size = next(rendezvous("env://"))
    store = PrefixStore(f"spiking-lm {next(_times_joined)}", store)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=PrefixStore("group", store), rank=rank, world_size=size, timeout=_TIMEOUT)
    hidden = {name: os.environ.pop(name) for name in LAUNCHER if name in os.environ}
    world = Members(store, rank, size, device)
    try:
        yield world
    finally:
        os.environ.update(hidden)
        with contextlib.suppress(RuntimeError):  # the store may be gone with the one who kept it
            world.leave()


class _Follower(RunDir):
    """A run as the other ranks see it: they write nothing, and what they would note stays with them."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        super().__init__(path)
        self._manifest = manifest

    @property
    def manifest(self) -> dict[str, Any]:
        return self._manifest

    def update_manifest(self, **changes: Any) -> None:
        self._manifest = {**self._manifest, **changes}

    def write_json(self, name: str, value: Any) -> None:
        return

    def append_metrics(self, entry: Any) -> None:
        return

    def log(self, message: str) -> None:
        return


def follow(world: Members) -> RunDir:
    """Train with rank 0 what it trains; return the run, which is not for this process to write.

    Raises: SystemExit where the run ends in a way that all ranks agree on, which rank 0 reports; LostRankError;
    SpikingLMError when rank 0 ended before training, or this process cannot take part.
    """
    from rich.console import Console

    from spiking_lm.preparation import build_model, data_of
    from spiking_lm.recipe import resolve
    from spiking_lm.training import train

    order = world.order()
    if order is None:
        raise SystemExit(0)  # nothing to train, or a problem of which rank 0 tells
    console = Console(quiet=True)
    try:
        recipe = resolve(order["recipe"], where="the recipe of rank 0")
        data = data_of(recipe, console)
        if data.sha256 != order["data"]:
            raise SpikingLMError("its data is not that of rank 0", hint="every machine needs the same files")
        resume_from = Path(order["resume_from"]) if order["resume_from"] else None
        if resume_from is not None and not resume_from.is_dir():
            raise SpikingLMError(f"it does not see {resume_from}", hint="runs must lie where every machine sees them")
        model = build_model(recipe, data)
    except Exception as error:
        world.ready(str(error) or type(error).__name__)
        raise
    world.ready()
    run = _Follower(Path(order["run"]), order["manifest"])
    try:
        train(run, recipe, model, data, resume_from=resume_from, console=console, world=world)
    except LostRankError:
        raise
    except (DivergedError, InterruptedRunError) as error:
        raise SystemExit(error.exit_code) from None
    world.leave()
    return run
