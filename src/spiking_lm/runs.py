"""Runs: a recipe's stages, one after the other, in a directory that says all there is to know about them.

A stage that is complete is never repeated: a run that was stopped, or killed, goes on where it was.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spiking_lm.errors import DataError, InterruptedRunError, MissingExtraError, SpikingLMError, UsageError
from spiking_lm.files import atomic_write, remove
from spiking_lm.manifest import describe_environment
from spiking_lm.preparation import (
    build_model,
    converter,
    converter_options,
    data_of,
    identity,
    sample_tokens,
    source_of,
)
from spiking_lm.recipe import Overrides, Recipe, load_recipe, split_choice
from spiking_lm.rundir import RunDir, Status, now
from spiking_lm.world import World, joined

if TYPE_CHECKING:
    from rich.console import Console

    from spiking_lm.data import Data
    from spiking_lm.graph import LMGraph


def run_recipe(
    path_or_name: str | Path | None,
    overrides: Overrides | None = None,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    console: Console | None = None,
) -> RunDir:
    """Run every stage of a recipe and return its run directory.

    Parameters: ``out`` is where runs are kept (default ``./runs``); ``resume`` is a run directory to go on with, whose
    own recipe then holds, or ``"auto"``: the latest unfinished run of exactly this recipe, else a new one; ``console``
    (rich) shows progress and results, by default on standard error.

    Under torchrun every process calls this: rank 0 runs the recipe, and the others take part in its training.

    Raises: RecipeError, UnknownNameError, PluginError, DataError; InterruptedRunError on Ctrl-C, with the command that
    goes on; DivergedError; LostRankError.
    """
    with joined() as world:
        if world.rank:
            from spiking_lm.distributed import Members, follow

            assert isinstance(world, Members)
            return follow(world)
        return _run(path_or_name, overrides, out, resume, console, world)


def _run(
    path_or_name: str | Path | None,
    overrides: Overrides | None,
    out: str | Path | None,
    resume: str | Path | None,
    console: Console | None,
    world: World,
) -> RunDir:
    out = Path(out) if out is not None else Path("runs")
    console, data = console or _stderr(), None
    if resume is not None and str(resume) != "auto":
        run = RunDir.open(resume)
        recipe = run.recipe
        if overrides:
            raise UsageError("a resumed run keeps its own recipe", hint="start a new run to change a setting")
        if path_or_name is not None and (asked := load_recipe(path_or_name).name) != recipe.name:
            raise UsageError(f"{run.path} is a run of {recipe.name!r}, not of {asked!r}")
    else:
        if path_or_name is None:
            raise UsageError("no recipe was given", hint="'spiking-lm recipes ls' lists them")
        recipe = load_recipe(path_or_name, overrides or ())
        unfinished = _unfinished(recipe, out) if resume is not None else None
        if unfinished is None:  # what cannot begin, for want of its data for instance, leaves no folder behind
            _check_extras(recipe)
            data = data_of(recipe, console)
        run = unfinished or RunDir.create(recipe, out)
    with run.lock():
        return _go(run, recipe, data, console, world)


def _unfinished(recipe: Recipe, out: Path) -> RunDir | None:
    """Return the newest run of exactly this recipe that is neither complete nor going on in another process."""
    family = out / recipe.name
    for path in sorted(family.iterdir(), reverse=True) if family.is_dir() else ():
        with contextlib.suppress(SpikingLMError):  # a folder of another kind, a broken run, or one that is locked
            run = RunDir.open(path)
            with run.lock():
                if run.status != "complete" and run.recipe == recipe:
                    return run
    return None


def plan(recipe: Recipe, console: Console | None = None) -> dict[str, Any]:
    """Load the data and build the model of a recipe; say how large they are, and change nothing on disk."""
    _check_extras(recipe)
    data = data_of(recipe, console or _stderr())
    facts: dict[str, Any] = {"recipe": recipe.name, "data": data.describe()}
    if recipe.convert is not None:
        return {**facts, "source": str(source_of(recipe))}
    model = build_model(recipe, data)
    facts["parameters"] = model.num_parameters()
    if recipe.train is not None:
        per_step = recipe.train.batch_size * recipe.train.accumulate
        if hasattr(data.train, "tokens"):
            per_step *= recipe.train.seq_len
            facts["tokens_per_step"], available = per_step, len(data.train.tokens)
        else:
            facts["examples_per_step"], available = per_step, len(data.train)
        facts["steps"] = recipe.train.steps
        facts["epochs"] = round(per_step * recipe.train.steps / max(1, available), 3)
    if recipe.prune is not None:
        from spiking_lm.pruning import prunable

        facts["prunable_weights"] = sum(w.numel() for w in prunable(model, recipe.prune.parameters).values())
    if recipe.compare is not None:
        from spiking_lm.compare import build_variants

        variants = build_variants(recipe, model, data, console or _stderr())
        facts["variants"] = {name: {"parameters": m.num_parameters()} for name, m in variants}
    return facts


# -- the stages -------------------------------------------------------------------------------------------------------


def _go(run: RunDir, recipe: Recipe, data: Data | None, console: Console, world: World) -> RunDir:
    """Do what is left to do of a run; ``data`` is None where it has yet to be loaded."""
    if run.status == "complete":
        console.print(f"{run.path} is complete", highlight=False, soft_wrap=True)
        return run
    again = bool(run.manifest["stages"]) or (run.path / "checkpoints").is_dir()
    resumed = [*run.manifest.get("resumed", ()), {"at": now(), **describe_environment()}] if again else []
    run.update_manifest(status="running", ended=None, error=None, resumed=resumed)
    run.log("resumed" if again else "started")
    console.print(f"run directory: {run.path}", highlight=False, soft_wrap=True)
    status: Status = "failed"
    try:
        _check_extras(recipe)
        with _noting_warnings(run, console):
            _Stages(run, recipe, data_of(recipe, console) if data is None else data, console, world).go()
        status = "complete"
    except KeyboardInterrupt:
        status = "interrupted"
        raise InterruptedRunError("interrupted", hint=f"resume: {run.resume_command}") from None
    except InterruptedRunError as error:
        status = "interrupted"
        error.hint = error.hint or f"resume: {run.resume_command}"
        raise
    except BaseException as error:
        known = isinstance(error, SpikingLMError)
        with contextlib.suppress(OSError):
            run.update_manifest(error=str(error) if known else f"{type(error).__name__}: {error}")
            run.log(f"failed: {error}" if known else traceback.format_exc())
        raise
    finally:
        with contextlib.suppress(OSError):  # a full disk must not hide what happened
            run.update_manifest(status=status, ended=now())
            run.log(status)
    return run


@contextmanager
def _noting_warnings(run: RunDir, console: Console) -> Iterator[None]:
    """Show what our modules log, e.g. that a corrupt checkpoint was passed over, and keep it in ``log.txt``."""

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if logger.handlers[-1] is not self:
                return  # a run within this one, a variant, speaks for itself
            run.log(f"{record.levelname.lower()}: {record.getMessage()}")
            console.print(f"{record.levelname.lower()}: {record.getMessage()}", markup=False, highlight=False)

    handler = Recorder(logging.WARNING)
    logger = logging.getLogger("spiking_lm")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Stages:
    """The stages of one run; each writes its results into the run directory."""

    def __init__(self, run: RunDir, recipe: Recipe, data: Data, console: Console, world: World) -> None:
        self.run, self.recipe, self.data, self.console, self.world = run, recipe, data, console, world

    def go(self) -> None:
        """Load the model, then do each stage that the recipe has and that is not complete."""
        from spiking_lm.checkpoints import latest_checkpoint, load_model

        run, recipe = self.run, self.recipe
        before = run.manifest.get("data")
        if before is not None and before["sha256"] != self.data.sha256:
            hashes = f"SHA-256 {self.data.sha256[:12]}..., was {before['sha256'][:12]}..."
            raise DataError(
                f"{run.path}: the data is not what the run began with ({hashes})",
                hint="restore the data, or start a new run",
            )
        checkpoint = latest_checkpoint(run.path)
        self.step = _step_of(checkpoint) if checkpoint else 0
        done = run.manifest["stages"]
        lost = [stage for stage, steps in _steps_after(recipe).items() if stage in done and self.step < steps]
        if "convert" in done and checkpoint is None:
            lost.append("convert")
        if lost:
            again = "converting" if "convert" in lost else "training"
            run.log(f"the trained model is lost; {again} again from step {self.step}")
            run.update_manifest(stages={name: facts for name, facts in done.items() if name not in lost})
        run.update_manifest(data={"sha256": self.data.sha256, **self.data.describe()})
        self.resume_from = checkpoint
        if {"convert", "train"} & run.manifest["stages"].keys() and checkpoint is not None:
            self.model = load_model(checkpoint)
        elif recipe.convert is None:
            self.model = build_model(recipe, self.data)
            if recipe.train is not None and recipe.train.start is not None:
                run.update_manifest(start=identity(recipe.train.start))
        if recipe.convert is None:
            self._note_model()
            self._check_later_stages()
        if recipe.train is None or "train" in run.manifest["stages"]:
            self.world.leave()
        stages: dict[str, Callable[[], None]] = {
            "convert": self.convert,
            "train": self.train,
            "prune": self.prune,
            "evaluate": self.evaluate,
            "generate": self.generate,
            "explain": self.explain,
            "deploy": self.deploy,
            "compare": self.compare,
            "report": self.report,
        }
        for name, stage in stages.items():
            if getattr(recipe, name) is not None and name not in run.manifest["stages"]:
                with _timed(run, name):
                    stage()

    def _note_model(self) -> None:
        parameters = self.model.num_parameters()
        self.run.update_manifest(model={"type": self.recipe.model["type"], "parameters": parameters})

    def _check_later_stages(self) -> None:
        """Say what a later stage will refuse before hours are spent on the model."""
        recipe, stages = self.recipe, self.run.manifest["stages"]
        if recipe.generate is not None and not {"lm", "seq2seq"} & self.model.capabilities:
            raise UsageError(f"generate: this {recipe.model['type']} model says nothing about what comes next")
        if recipe.prune is not None:
            from spiking_lm.pruning import prunable

            prunable(self.model, recipe.prune.parameters)  # a pattern that fits nothing
        if recipe.deploy is not None and "deploy" not in stages:
            self._check_deployment(self.model.graph())
        if recipe.compare is not None and not stages:
            from spiking_lm.compare import build_variants

            for _ in build_variants(recipe, self.model, self.data, self.console):
                pass  # one that cannot be built, or not take this run's weights

    def _check_deployment(self, graph: LMGraph) -> None:
        from spiking_lm.hardware import check_graph

        assert self.recipe.deploy is not None
        backend, options = split_choice(self.recipe.deploy, "backend")
        check_graph(graph, backend, **options)

    def convert(self) -> None:
        from spiking_lm.checkpoints import load_model, save_checkpoint
        from spiking_lm.report.tables import conversion_tables

        recipe, work = self.recipe, self.run.path / "conversion"
        if recipe.deploy is not None and converter(recipe).spec.outline is not None:
            self._check_deployment(converter(recipe).load("outline")(converter_options(recipe)))
        model, report = converter(recipe).load("calibrate")(
            converter_options(recipe), self.data, work, seed=recipe.seed, console=self.console
        )
        self.run.write_json("conversion.json", report)
        checkpoint = save_checkpoint(self.run.path, 0, model, {}, tokenizer=self.data.tokenizer)
        del model  # or it would be in memory twice
        self.model = load_model(checkpoint)
        self._note_model()
        if work.exists():
            remove(work)
        self.console.print(conversion_tables(report))

    def train(self) -> None:
        from spiking_lm.checkpoints import latest_checkpoint, load_model
        from spiking_lm.training import train

        run, recipe, world = self.run, self.recipe, self.world
        run.rewind_metrics(self.step)
        world.lead(run, recipe, None if self.resume_from is None else str(self.resume_from), self.data.sha256)
        self.model = train(
            run, recipe, self.model, self.data, resume_from=self.resume_from, console=self.console, world=world
        )
        if world.size > 1:
            world.leave()
            trained = latest_checkpoint(run.path)
            assert trained is not None
            self.model = load_model(trained)  # whole, and where a lone process has it

    def prune(self) -> None:
        from spiking_lm.checkpoints import latest_checkpoint
        from spiking_lm.pruning import prune

        trained = latest_checkpoint(self.run.path)
        assert trained is not None
        self.run.rewind_metrics(_step_of(trained))
        self.model = prune(self.run, self.recipe, self.model, self.data, resume_from=trained, console=self.console)

    def evaluate(self) -> None:
        from spiking_lm import evaluation

        assert self.recipe.evaluate is not None
        result = evaluation.evaluate(self.model, self.data, self.recipe.evaluate)
        self.run.write_json("evaluation.json", result)
        self.console.print(evaluation.render(result))

    def generate(self) -> None:
        from spiking_lm.generation import sample_text

        config = self.recipe.generate
        assert config is not None
        self.console.rule("a sample")
        prompt = config.prompt + ("\n" if "seq2seq" in self.model.capabilities else "")  # a target stands by itself
        self._show_piece(prompt)
        sample = sample_text(self.model, self.data.tokenizer, config, stream=self._show_piece)
        self.console.print()
        self.console.rule()
        atomic_write(self.run.path / "samples.txt", prompt + sample.text + "\n")

    def _show_piece(self, piece: str) -> None:
        safe = re.sub(
            r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", piece
        )  # nothing steers the terminal
        self.console.print(safe, end="", markup=False, highlight=False, soft_wrap=True)

    def explain(self) -> None:
        from spiking_lm.accounting import explain

        assert self.recipe.explain is not None
        split = self._split()
        tokens = sample_tokens(self.data, split, self.recipe.explain.tokens)
        both = " sources, each read and written" if "seq2seq" in self.model.capabilities else ""
        explanation = explain(self.model, tokens, sample=f"{len(tokens):,} tokens of the {split} split{both}")
        self.run.write_json("explanation.json", explanation.to_dict())
        self.console.print(explanation.render())

    def deploy(self) -> None:
        from spiking_lm import deployment

        account = deployment.deploy(self.run, self.recipe, self.model, self.data)
        self.run.write_json("deployment.json", account)
        self.console.print(deployment.render(account))

    def compare(self) -> None:
        from spiking_lm import compare

        result = compare.compare(self.run, self.recipe, self.model, self.data, self.console)
        self.run.write_json("compare.json", result)
        self.console.print(compare.render(result))

    def report(self) -> None:
        from spiking_lm.raster import save_raster
        from spiking_lm.report import write_report

        assert self.recipe.report is not None
        if self.data.tokenizer is not None:
            n = self.recipe.report.raster_tokens
            tokens = sample_tokens(self.data, self._split(), n)
            save_raster(self.model, tokens, self.data.tokenizer, self.run.path / "raster.npz", n)
        path = write_report(self.run.path)
        self.console.print(f"report: {path}", highlight=False, soft_wrap=True)

    def _split(self) -> str:
        return self.recipe.evaluate.split if self.recipe.evaluate is not None else "test"


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _steps_after(recipe: Recipe) -> dict[str, int]:
    """Return how many steps a run has made when its stages that train are complete."""
    trained = recipe.train.steps if recipe.train is not None else 0
    pruned = trained + (recipe.prune.steps if recipe.prune is not None else 0)
    return {"train": trained, "prune": pruned}


@contextmanager
def _timed(run: RunDir, stage: str) -> Iterator[None]:
    """Note that a stage is complete, and how long it took; a stage that raises is not noted."""
    run.update_manifest(stage=stage)
    run.log(f"{stage}: started")
    start = time.perf_counter()
    yield
    seconds = round(time.perf_counter() - start, 3)
    stages = {**run.manifest["stages"], stage: {"ended": now(), "seconds": seconds}}
    run.update_manifest(stages=stages, stage=None)
    run.log(f"{stage}: complete after {seconds:.1f} s")


def _check_extras(recipe: Recipe) -> None:
    """Say before hours of training, not after, what the last stage lacks."""
    from spiking_lm.provenance import installed

    missing = [module for module in ("jinja2", "matplotlib") if not installed(module)]
    if recipe.report is not None and missing:
        raise MissingExtraError("the report stage", "report", detail=f"{' and '.join(missing)} not installed")


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True)
