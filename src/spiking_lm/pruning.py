"""Magnitude pruning: the smallest weights go to zero step by step, while the others are trained on.

A weight of a pruned matrix that is exactly zero stays zero: the zeros are the mask. Nothing else has to be kept in
checkpoints or programs, and a run that was stopped goes on bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from spiking_lm.errors import UsageError, did_you_mean
from spiking_lm.evaluation import evaluate
from spiking_lm.graph import Op
from spiking_lm.interfaces import SpikingLanguageModel
from spiking_lm.recipe import Recipe
from spiking_lm.report.tables import pruning_table
from spiking_lm.rundir import RunDir, read_json
from spiking_lm.stages import PruneConfig
from spiking_lm.training import train

if TYPE_CHECKING:
    from rich.console import Console

    from spiking_lm.data import Data

Scope = Literal["uniform", "global"]


def magnitude_masks(weights: Mapping[str, Tensor], sparsity: float, scope: Scope = "uniform") -> dict[str, Tensor]:
    """Return for each matrix which weights stay (True) when the smallest ``sparsity`` share of them goes.

    Exactly ``round(sparsity * n)`` weights go, of each matrix (``uniform``) or of all together (``global``, by one
    magnitude); among equal magnitudes the earlier ones go first. Raises: UsageError unless 0 < sparsity < 1.
    """
    if not 0 < sparsity < 1:
        raise UsageError(f"a sparsity of {sparsity:g} is not between 0 and 1", hint="0.9 prunes nine weights of ten")
    if scope == "uniform":
        return {name: _largest(weight, sparsity) for name, weight in weights.items()}
    if not weights:
        return {}
    kept = _largest(torch.cat([weight.detach().flatten() for weight in weights.values()]), sparsity)
    parts = torch.split(kept, [weight.numel() for weight in weights.values()])
    return {name: part.view(weight.shape) for (name, weight), part in zip(weights.items(), parts, strict=True)}


def _largest(weight: Tensor, sparsity: float) -> Tensor:
    """Return where ``weight`` is not among its ``round(sparsity * n)`` smallest."""
    magnitude = weight.detach().abs().flatten()
    gone = round(sparsity * magnitude.numel())
    kept = torch.ones_like(magnitude, dtype=torch.bool)
    if gone:
        limit = magnitude.kthvalue(gone).values
        kept[magnitude < limit] = False
        at_limit = (magnitude == limit).nonzero().flatten()
        kept[at_limit[: gone - int((~kept).sum())]] = False
    return kept.view(weight.shape)


def prunable(model: SpikingLanguageModel, patterns: Iterable[str] = ("*",)) -> dict[str, nn.Parameter]:
    """Return the matrices of ``model`` that may be pruned, by the name of their operation in its graph.

    They are those of ``linear`` operations whose name fits one of the shell ``patterns``, but never the last one, the
    output head, and none that is tied to an embedding table.

    Raises: UsageError for a pattern that fits no such operation.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    graph = tuple(model.graph())
    linears = [op for op in graph if op.kind == "linear"]
    kept = {id(_weight(op, parameters)) for op in (*linears[-1:], *(op for op in graph if op.kind == "embedding"))}
    found: dict[str, nn.Parameter] = {}
    for op in linears:
        weight = _weight(op, parameters)
        if weight is not None and id(weight) not in kept:
            kept.add(id(weight))  # two operations may share a matrix
            found[op.name] = weight
    patterns = tuple(patterns)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in found):
            names = ", ".join(list(found)[:6]) + (", ..." if len(found) > 6 else "")
            offer = did_you_mean(pattern, found) or f"there are: {names or 'none'}"
            raise UsageError(f"prune.parameters: {pattern!r} fits no weight matrix that can be pruned", hint=offer)
    return {name: weight for name, weight in found.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}


def _weight(op: Op, parameters: Mapping[str, nn.Parameter]) -> nn.Parameter | None:
    named = op.parameters.get("weight") or op.parameters.get("weight_t")
    return parameters.get(named or f"{op.module}.weight")


def prune(
    run: RunDir,
    recipe: Recipe,
    model: SpikingLanguageModel,
    data: Data,
    *,
    resume_from: Path,
    console: Console,
) -> SpikingLanguageModel:
    """Go on with training from the checkpoint ``resume_from`` while the sparsity rises, as ``recipe.prune`` says.

    Writes ``pruning.json``: each matrix, and how the model did ``before`` on what the evaluate stage scores. Raises
    what :func:`spiking_lm.training.train` does; UsageError for a pattern that fits no matrix.
    """
    config, base = recipe.prune, recipe.train
    assert config is not None
    assert base is not None
    pruner = Pruner(prunable(model, config.parameters), config)
    path = run.path / "pruning.json"
    if resume_from.name == f"step-{base.steps:06d}" and recipe.evaluate is not None:
        run.write_json(path.name, {"before": evaluate(model, data, recipe.evaluate)})
    before = read_json(path).get("before") if path.is_file() else None
    optimizer = base.optimizer.model_copy(update={"lr": config.lr or base.optimizer.lr})
    schedule = base.schedule.model_copy(update={"warmup": 0})  # the optimizer's moments are warm
    changes: dict[str, Any] = {"steps": base.steps + config.steps, "optimizer": optimizer, "schedule": schedule}
    if base.distill is not None:  # phases share the steps of training; these are more of the last
        changes["distill"] = base.distill.model_copy(update={"phases": base.distill.phases[-1:]})
    with pruner:
        train(
            run,
            recipe,
            model,
            data,
            resume_from=resume_from,
            console=console,
            config=base.model_copy(update=changes),
            first_step=base.steps,
            after_step=lambda step, optimizer: pruner.after_step(step - base.steps, optimizer),
        )
    account = {**pruner.describe(), "steps": config.steps, "before": before}
    run.write_json(path.name, account)
    console.print(pruning_table(account))
    return model


def sparsity_at(step: int, steps: int, final: float) -> float:
    """Return the sparsity after ``step`` of ``steps``: it rises as 1 - (1 - t)^3 (Zhu & Gupta, arXiv 1710.01878)."""
    return final * (1 - (1 - min(1.0, step / steps)) ** 3)


class Pruner:
    """Prunes matrices while they are trained; between cuts, weights that are zero get no gradient and so stay zero.

    Use as a context around training, and call :meth:`after_step` when the optimizer has made a step.
    """

    def __init__(self, matrices: Mapping[str, nn.Parameter], config: PruneConfig) -> None:
        self.matrices, self.config = matrices, config
        self.ramp = max(1, math.ceil(config.ramp * config.steps))
        """Steps after which the sparsity has risen."""
        self._share = self._share_of_zeros()
        self._handles: list[Any] = []

    def __enter__(self) -> Pruner:
        for weight in self.matrices.values():
            self._handles.append(weight.register_hook(_only_living(weight)))  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def cuts(self, step: int) -> bool:
        """Say whether weights are cut after ``step`` (from 1)."""
        return step == self.ramp or (step < self.ramp and step % self.config.every == 0)

    @torch.no_grad()
    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Cut what is due after ``step`` (from 1) and forget the moments of what was cut; return the ``sparsity``."""
        if self.cuts(step):
            sparsity = sparsity_at(step, self.ramp, self.config.sparsity)
            for name, kept in magnitude_masks(self.matrices, sparsity, self.config.scope).items():
                weight = self.matrices[name]
                weight.masked_fill_(~kept, 0.0)
                for moment in optimizer.state[weight].values():
                    if isinstance(moment, Tensor) and moment.shape == weight.shape:
                        moment.masked_fill_(~kept, 0.0)
            self._share = self._share_of_zeros()
        return {"sparsity": self._share}

    def _share_of_zeros(self) -> float:
        weights = sum(weight.numel() for weight in self.matrices.values())
        return 1 - sum(int(weight.count_nonzero()) for weight in self.matrices.values()) / weights

    def describe(self) -> dict[str, Any]:
        """Return the JSON-able account: how many weights each matrix has, and how many are not zero."""
        matrices: list[dict[str, Any]] = [
            {"name": name, "weights": weight.numel(), "nonzero": int(weight.count_nonzero())}
            for name, weight in self.matrices.items()
        ]
        return {
            "scope": self.config.scope,
            "target": self.config.sparsity,
            "sparsity": self._share_of_zeros(),
            "weights": sum(row["weights"] for row in matrices),
            "nonzero": sum(row["nonzero"] for row in matrices),
            "matrices": [{**row, "sparsity": 1 - row["nonzero"] / row["weights"]} for row in matrices],
        }


def _only_living(weight: nn.Parameter) -> Any:
    """Return a hook that stops the gradient of weights that are zero: no step moves them, and none counts them."""
    return lambda gradient: gradient.masked_fill(weight == 0, 0.0)
