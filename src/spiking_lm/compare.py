"""The compare stage: the recipe with a few values changed, each variant a run of its own, and what came out of each.

The variants lie in ``<run>/variants/<name>/``, each an ordinary run directory: a finished one is not trained again, and
one that was stopped goes on when the run does. With ``spikes``, every variant is also given this run's weights, and it
is counted whether its neurons fire as this run's do.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spiking_lm.bench import interleaved, threads
from spiking_lm.errors import DataError, InterruptedRunError, RecipeError
from spiking_lm.generation import evaluating
from spiking_lm.interfaces import LMOutput, Neuron, SpikingLanguageModel, State
from spiking_lm.preparation import build_model, data_of, sample_tokens
from spiking_lm.recipe import Recipe, variants
from spiking_lm.rundir import RunDir, read_json
from spiking_lm.runs import run_recipe

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from spiking_lm.data import Data

THIS_RUN = "this run"
"""What results call the run that compares; no variant can be named so."""

SPIKE_TOKENS = 2048
"""Tokens of the evaluation split on which spikes are compared and timed."""

TURNS = 5


def compare(run: RunDir, recipe: Recipe, model: SpikingLanguageModel, data: Data, console: Console) -> dict[str, Any]:
    """Run every variant, then return the JSON-able comparison: ``runs``, and with ``spikes`` what neurons did.

    Raises: what a run raises; InterruptedRunError with the command that goes on with ``run``.
    """
    assert recipe.compare is not None
    runs = {THIS_RUN: run, **_run_variants(run, recipe, console)}
    changes = {THIS_RUN: {}, **recipe.compare.variants}
    result: dict[str, Any] = {"runs": [result_of(name, one, changes[name]) for name, one in runs.items()]}
    if recipe.compare.spikes:
        result["spikes"] = compare_spikes(recipe, model, data, console)
    return result


def build_variants(
    recipe: Recipe, model: SpikingLanguageModel, data: Data, console: Console
) -> Iterator[tuple[str, SpikingLanguageModel]]:
    """Build the model of each variant in turn, untrained, or with ``spikes`` with the weights of ``model``.

    Raises: RecipeError naming a variant that cannot be built for its data, or not take the weights.
    """
    assert recipe.compare is not None
    for name, variant in variants(recipe).items():
        own_data = variant.data != recipe.data
        with torch.random.fork_rng(devices=[]):
            built = build_model(variant, data_of(variant, console) if own_data else data)
        if recipe.compare.spikes:
            _give_weights(model, built, f"recipe {recipe.name}: compare.variants.{name}", own_data=own_data)
        yield name, built


def _give_weights(model: SpikingLanguageModel, variant: SpikingLanguageModel, where: str, *, own_data: bool) -> None:
    """Copy the weights of ``model`` into ``variant``, or say why its spikes cannot be compared."""
    ours, theirs = model.state_dict(), variant.state_dict()
    both = ours.keys() & theirs.keys()
    wrong = [name for name in {**ours, **theirs} if name not in both or ours[name].shape != theirs[name].shape]
    if wrong:
        more = f" and {len(wrong) - 1} others" if len(wrong) > 1 else ""
        problem = f"this run's weights do not fit it: {wrong[0]}{more}"
    elif {site.name for site in model.spike_sites()} != {site.name for site in variant.spike_sites()}:
        problem = "it has other spike sites than this run"
    elif own_data:
        problem = "it has other data than this run"
    else:
        variant.load_state_dict(ours)
        return
    raise RecipeError(
        f"{where}: spikes cannot be compared: {problem}",
        hint="with compare.spikes variants differ in their neurons alone; leave it out to compare other things",
    )


def _run_variants(run: RunDir, recipe: Recipe, console: Console) -> dict[str, RunDir]:
    """Run each variant, or what is left of it."""
    done: dict[str, RunDir] = {}
    for name, variant in variants(recipe).items():
        path = run.path / "variants" / name
        if not (path / "manifest.json").is_file():
            RunDir.begin(path, variant)
        if RunDir.open(path).recipe != variant:  # "A" and "a" are one folder on some systems
            raise DataError(f"{path} is a run of another recipe", hint="rename the variant, or remove the folder")
        console.rule(f"variant {name}")
        try:
            done[name] = run_recipe(None, resume=path, console=console)
        except InterruptedRunError as error:
            error.hint = f"resume: {run.resume_command}"
            raise
    console.rule()
    return done


def result_of(name: str, run: RunDir, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run left behind, as one row of the comparison; None where it left nothing."""
    manifest = run.manifest
    training = [entry for entry in run.metrics() if entry.get("split") == "train" and "tokens_per_s" in entry]
    neuron = run.recipe.model.get("neuron")
    path = run.path / "evaluation.json"
    evaluation = read_json(path) if path.is_file() else {}
    return {
        "name": name,
        "changes": dict(changes),
        "model": manifest["model"]["type"],
        "neuron": neuron["type"] if isinstance(neuron, dict) else None,
        "parameters": manifest["model"]["parameters"],
        "split": evaluation.get("split"),
        "metrics": evaluation.get("metrics", {}),
        "activity": evaluation.get("activity", {}).get("mean"),
        "tokens_per_s": statistics.median(entry["tokens_per_s"] for entry in training) if training else None,
        "seconds": training[-1]["elapsed_s"] if training else None,
    }


# -- spikes -----------------------------------------------------------------------------------------------------------


def compare_spikes(recipe: Recipe, model: SpikingLanguageModel, data: Data, console: Console) -> dict[str, Any]:
    """Give every variant the weights of ``model`` and count the spikes in which it differs from ``model``.

    Each runs twice on the same tokens: with every neuron going through its own step, which defines it, and as it is
    used, where a kernel may stand in. All are timed in turns on one thread.
    """
    split = recipe.evaluate.split if recipe.evaluate is not None else "test"
    tokens = torch.from_numpy(sample_tokens(data, split, SPIKE_TOKENS))
    length = min(len(tokens), recipe.train.seq_len if recipe.train is not None else 128)
    batch = tokens[: len(tokens) // length * length].view(-1, length).to(next(model.parameters()).device)
    models = {THIS_RUN: model, **dict(build_variants(recipe, model, data, console))}
    ways = {name: ("step", "forward") if _neurons(one) else ("forward",) for name, one in models.items()}
    with threads(1):
        expected = _run(model, batch, "forward", return_spikes=True).spikes or {}
        different = {
            (name, way): _count_different(expected, _run(models[name], batch, way, return_spikes=True).spikes or {})
            for name in models
            for way in ways[name]
        }
        jobs = {
            f"{name} {way}": partial(_run, models[name], batch, way, return_spikes=False)
            for name in models
            for way in ways[name]
        }
        times = interleaved(jobs, TURNS).ms()
    spikes = sum(values.numel() for values in expected.values())
    return {
        "sample": f"{batch.numel():,} tokens of the {split} split, {len(batch)} sequences of {length}",
        "sites": len(expected),
        "spikes": spikes,
        "rate": sum(int(torch.count_nonzero(values)) for values in expected.values()) / max(1, spikes),
        "runs": [
            {
                "name": name,
                **{
                    way: {
                        "different": different[name, way],
                        "tokens_per_s": 1e3 * batch.numel() / times[f"{name} {way}"],
                    }
                    if way in ways[name]
                    else None
                    for way in ("step", "forward")
                },
            }
            for name in models
        ],
    }


def _run(model: SpikingLanguageModel, batch: Tensor, way: str, *, return_spikes: bool) -> LMOutput:
    with evaluating(model), by_step(model) if way == "step" else nullcontext():
        output: LMOutput = model(batch, return_spikes=return_spikes)
        return output


def _neurons(model: SpikingLanguageModel) -> list[Neuron]:
    return [module for module in model.modules() if isinstance(module, Neuron)]


@contextmanager
def by_step(model: SpikingLanguageModel) -> Iterator[None]:
    """Let every neuron of ``model`` go step by step through its framework for a while, kernel or no kernel."""

    def scan(neuron: Neuron, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        if state is None:
            state = neuron.init_state((x.shape[0], *x.shape[2:]), device=x.device, dtype=x.dtype)
        return Neuron.scan(neuron, x, state)

    neurons = _neurons(model)
    for neuron in neurons:
        neuron.__dict__["forward"] = partial(scan, neuron)
    try:
        yield
    finally:
        for neuron in neurons:
            del neuron.__dict__["forward"]


def _count_different(expected: Mapping[str, Tensor], spikes: Mapping[str, Tensor]) -> int:
    return sum(int((spikes[site] != values).sum()) for site, values in expected.items())


def render(result: dict[str, Any]) -> RenderableType:
    """Return the tables of a comparison, for a terminal."""
    from spiking_lm.report.tables import comparison_tables

    return comparison_tables(result)
