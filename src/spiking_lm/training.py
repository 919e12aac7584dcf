"""Training, in one file: batches, loss, optimizer, schedule, checkpoints, progress, and the way back after a stop.

Which tokens a step sees depends only on the seed and the step's number, so a resumed run sees what the uninterrupted
one would have seen; with the optimizer's, the random generator's and the carried state restored, it is the same run bit
for bit.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from spiking_lm.checkpoints import latest_checkpoint, load_checkpoint, save_checkpoint
from spiking_lm.data import Data
from spiking_lm.errors import DivergedError, InterruptedRunError, LostRankError
from spiking_lm.interfaces import LMOutput, SpikingLanguageModel
from spiking_lm.objectives import Objective, Output, objective_for
from spiking_lm.recipe import Recipe
from spiking_lm.recompute import blocks_of, recomputing
from spiking_lm.stages import OptimizerConfig, ScheduleConfig, TrainConfig
from spiking_lm.world import World

if TYPE_CHECKING:
    from spiking_lm.rundir import RunDir

AfterStep = Callable[[int, torch.optim.Optimizer], Mapping[str, float]]

SILENT_WARNING = 0.5  # share of a site's channels that may be silent, or saturated, before training says so


def learning_rate(step: int, steps: int, config: ScheduleConfig) -> float:
    """Return the learning rate of ``step`` (0-based) of ``steps``, as a share of the peak."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.type == "constant":
        return 1.0
    done = (step - config.warmup) / max(1, steps - config.warmup)
    if config.type == "cosine":
        return config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * done))
    left = min(1.0, (1 - done) / config.decay)  # wsd: warm-up, stable, decay
    if config.shape == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    return config.final + (1 - config.final) * left


def make_optimizer(
    model: SpikingLanguageModel, config: OptimizerConfig, beside: Sequence[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """Return the optimizer over the model's parameter groups, and over what is trained ``beside`` it."""
    kind = torch.optim.AdamW if config.type == "adamw" else torch.optim.Adam
    groups = model.parameter_groups(config.weight_decay)
    if beside:
        groups.append({"params": list(beside), "weight_decay": config.weight_decay})
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def train(
    run: RunDir,
    recipe: Recipe,
    model: SpikingLanguageModel,
    data: Data,
    *,
    resume_from: Path | None = None,
    console: Console | None = None,
    config: TrainConfig | None = None,
    first_step: int = 0,
    after_step: AfterStep | None = None,
    world: World | None = None,
) -> SpikingLanguageModel:
    """Train ``model`` as ``recipe.train`` says, logging and saving into ``run``; ``resume_from`` is a checkpoint.

    A later stage that goes on training gives its own ``config``, whose ``steps`` count from the very first one; the
    ``first_step`` from which its schedule counts; and ``after_step``, called with the steps done and the optimizer,
    which returns facts to log. Several processes that train together each call this, with their ``world``.

    Raises InterruptedRunError on Ctrl-C (after saving), DivergedError when loss or gradient is no longer finite,
    LostRankError when another process is gone.
    """
    config = config or recipe.train
    assert config is not None
    console, world = console or Console(stderr=True), world or World()
    world.place(model)
    objective = objective_for(model, data, config, recipe.seed)
    objective.world = world
    objective.join(run)
    start, elapsed, threads = 0, 0.0, config.threads
    optimizer_state: dict[str, Any] | None = None
    torch.manual_seed(recipe.seed)
    if resume_from is not None:
        saved, state = load_checkpoint(resume_from)
        model.load_state_dict(saved.state_dict())
        optimizer_state = state["optimizer"]
        torch.set_rng_state(state["torch_rng"])
        objective.take_up(model, state.get("carried", []))
        start, elapsed = int(state["step"]), float(state["elapsed_s"])
        if state.get("processes", 1) == world.size:  # with another number the sums are cut otherwise anyway
            threads = int(state["threads"])
        console.print(f"resuming after step {start:,} from {resume_from}")

    watch = _NeuronWatch(console, quiet_until=max(config.schedule.warmup, config.steps // 20))
    display = _progress(console, config.steps, start, objective.unit)
    with ExitStack() as stack:
        stack.enter_context(_threads(threads))
        interrupted = stack.enter_context(_interruptible(patient=world.size > 1))
        progress = stack.enter_context(display)
        objective.begin(run, console)
        micro = MicroBatch(model, objective, config.precision)
        rehearsal = partial(_rehearsal, micro, start * config.passes)
        if config.activation_checkpointing:
            stack.enter_context(recomputing(blocks_of(model, rehearsal)))
        optimizer = make_optimizer(model, config.optimizer, objective.parameters())
        engine = world.wrap(micro, rehearsal, optimizer, config)
        if optimizer_state is not None:
            optimizer.load_state_dict(world.share_state(optimizer_state, optimizer))
        trained, done = list(micro.parameters()), start

        def save() -> Path:
            whole, moments = world.snapshot(model, optimizer)
            state = {
                "step": done,
                "elapsed_s": elapsed,
                "threads": torch.get_num_threads(),
                "processes": world.size,
                "optimizer": moments,
                "torch_rng": torch.get_rng_state(),
                "carried": objective.carried(),
            }
            if world.rank:
                return run.path
            return save_checkpoint(run.path, done, whole, state, tokenizer=data.tokenizer, keep=config.keep)

        try:
            for step in range(start, config.steps):
                tick = time.perf_counter()
                last = step + 1 == config.steps
                log = (step + 1) % config.log_every == 0 or last or step == start
                share = learning_rate(step - first_step, config.steps - first_step, config.schedule)
                lr = config.optimizer.lr * share * objective.lr_factor(step)
                for group in optimizer.param_groups:
                    group["lr"] = lr * group.get("lr_scale", 1.0)
                model.train()
                world.begin_step(recipe.seed, step)
                loss, tokens = _backward(engine, micro, config, step, record=log, world=world)
                norm = world.number(torch.nn.utils.clip_grad_norm_(trained, config.grad_clip or math.inf))
                if not math.isfinite(loss) or not math.isfinite(norm):
                    raise _diverged(run, step, loss, norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                done = step + 1
                more = after_step(done, optimizer) if after_step is not None else {}
                duration = time.perf_counter() - tick
                elapsed += duration
                facts: dict[str, Any] = {
                    "step": done,
                    "loss": loss,
                    **objective.describe(loss),
                    "lr": lr,
                    "grad_norm": norm,
                    "tokens_per_s": tokens / duration,
                    "elapsed_s": elapsed,
                    **more,
                }
                if log:
                    facts.update(watch.look(micro.output, done))
                    run.append_metrics({"split": "train", **facts})
                progress.step(facts)
                if last or (config.eval_every and done % config.eval_every == 0):
                    score = micro.validate() if world.rank == 0 or world.shards(config) else {}
                    run.append_metrics({"split": "valid", "step": done, **score, "elapsed_s": elapsed})
                    shown = "  ".join(f"{name} {value:.4f}" for name, value in score.items())
                    console.print(f"step {done:>6,}  validation  {shown}", highlight=False)
                stop = world.any(interrupted.is_set())
                if last or stop or (config.save_every and done % config.save_every == 0):
                    folder = save()
                if stop and not last:
                    raise InterruptedRunError(
                        f"interrupted after step {done:,}; saved {folder}", hint=f"resume: {run.resume_command}"
                    )
        except RuntimeError as error:
            if not world.lost(error):
                raise
            if world.rank == 0 and done > start and world.keeps_all and config.sampling == "random":
                save()
            raise _lost(run, done, world) from error
    return model


class MicroBatch(nn.Module):
    """The way from a micro-batch's number to the loss whose gradient is taken: what is wrapped for many processes."""

    def __init__(self, model: SpikingLanguageModel, objective: Objective, precision: str) -> None:
        super().__init__()
        self.model, self.objective, self.precision = model, objective, precision
        self.beside = nn.ParameterList(objective.parameters())
        self.loss, self.tokens = 0.0, 0
        self.output: Output | None = None
        """The model's, of the last micro-batch, where there was one."""
        self._score: dict[str, float] = {}

    def forward(self, index: int | None, *, record: bool = False) -> torch.Tensor:
        """Return the loss of micro-batch ``index`` with the model's own auxiliary losses; of None, score and return 0.

        Scoring goes this way too, since weights that are spread over processes are whole only in here.
        """
        if index is None:
            self._score = self.objective.validate(self.model)
            return torch.zeros(())
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            loss, self.output, self.tokens = self.objective.loss(self.model, index, record=record)
        self.loss = float(loss.detach())
        return loss + sum(self.output.aux_losses.values()) if isinstance(self.output, LMOutput) else loss

    def validate(self) -> dict[str, float]:
        """Return the score on held-out data, as the objective has it."""
        self(None)
        return self._score


def _backward(
    engine: Callable[..., torch.Tensor],
    micro: MicroBatch,
    config: TrainConfig,
    step: int,
    *,
    record: bool,
    world: World,
) -> tuple[float, float]:
    """Accumulate the gradient of one step; return the mean loss and the tokens seen, of all processes."""
    total, tokens = 0.0, 0
    for part in range(config.passes):
        with world.accumulating(engine, last=part + 1 == config.passes):
            loss = engine(step * config.passes + part, record=record)
            (loss / config.passes).backward()  # type: ignore[no-untyped-call]
        total += micro.loss / config.passes
        tokens += micro.tokens
    total, all_tokens = world.sums(total / world.size, tokens)
    return total, all_tokens


def _rehearsal(micro: MicroBatch, index: int) -> torch.Tensor:
    """Return the loss of a micro-batch, and leave no trace but in neurons that set themselves."""
    before = dict(vars(micro.objective))
    devices = sorted({p.device.index for p in micro.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        micro.model.train()
        loss: torch.Tensor = micro(index)
    vars(micro.objective).update(before)
    return loss


def _diverged(run: RunDir, step: int, loss: float, norm: float) -> DivergedError:
    good = latest_checkpoint(run.path)
    where = f"last good checkpoint: {good}" if good else "no checkpoint was saved before"
    return DivergedError(
        f"step {step + 1:,}: loss {loss:g}, gradient norm {norm:g}: training stopped before the weights were spoilt",
        hint=f"{where}; try a lower train.optimizer.lr, a longer warm-up or precision fp32",
    )


def _lost(run: RunDir, step: int, world: World) -> LostRankError:
    good = latest_checkpoint(run.path)
    where = f"the last checkpoint is {good}" if good else "no checkpoint was saved before, so that it begins again"
    return LostRankError(
        f"rank {world.rank} of {world.size}: another process is gone after step {step:,}; {where}",
        hint=f"resume, with any number of processes: {run.resume_command}",
    )


class _NeuronWatch:
    """Firing statistics per site, and a word of warning, once per site, when most of its channels are stuck.

    The first steps are left in peace: neurons find their range while the learning rate warms up.
    """

    def __init__(self, console: Console, quiet_until: int) -> None:
        self.console, self.quiet_until = console, quiet_until
        self.warned: set[tuple[str, str]] = set()

    def look(self, output: Output | None, step: int) -> dict[str, dict[str, float]]:
        """Return mean rate and the share of silent and saturated channels of every site in this batch."""
        if output is None or not output.spikes:
            return {}
        rates, silent, saturated = {}, {}, {}
        for site, spikes in output.spikes.items():
            active = (spikes.detach() != 0).flatten(0, -2).float().mean(0)
            rates[site] = float(active.mean())
            silent[site] = float((active == 0).float().mean())
            saturated[site] = float((active == 1).float().mean())
        for word, shares in (("never fire", silent), ("fire at every token", saturated)):
            for site, share in shares.items():
                if share > SILENT_WARNING and step > self.quiet_until and (word, site) not in self.warned:
                    self.warned.add((word, site))
                    self.console.print(
                        f"[yellow]warning:[/] step {step}: {share:.0%} of the channels of {site} {word} in this batch"
                    )
        return {"rates": rates, "silent": silent, "saturated": saturated}


@contextmanager
def _threads(n: int | None) -> Iterator[None]:
    """Let torch use ``n`` threads for a while; sums are cut by threads, so a resumed run needs as many as before."""
    before = torch.get_num_threads()
    if n is not None:
        torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _interruptible(*, patient: bool) -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event that the loop sees after its step; a second one stops at once.

    Not where the loop is ``patient``: a launcher passes on what the terminal has sent already, and kills in the end.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # signals reach only the main thread
        return

    def note(signum: int, frame: Any) -> None:
        if event.is_set() and not patient:
            raise KeyboardInterrupt
        event.set()

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


class _Display:
    """The live line of training; plain lines now and then where there is no terminal."""

    def __init__(self, console: Console, steps: int, start: int, unit: str) -> None:
        self.console, self.steps, self.unit = console, steps, unit
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.task = self.bar.add_task("training", total=steps, completed=start, facts="")
        self.rate = math.nan
        self.speed: float | None = None
        self.smooth: float | None = None

    def step(self, facts: dict[str, Any]) -> None:
        """Show one finished step."""
        name = next(name for name in ("bpb", "perplexity", "loss") if name in facts)
        self.smooth = facts[name] if self.smooth is None else 0.95 * self.smooth + 0.05 * facts[name]
        speed = facts["tokens_per_s"]
        self.speed = speed if self.speed is None else 0.95 * self.speed + 0.05 * speed
        if facts.get("rates"):
            self.rate = sum(facts["rates"].values()) / len(facts["rates"])
        firing = "" if math.isnan(self.rate) else f"  firing {self.rate:.2f}"
        pruned = f"  pruned {facts['sparsity']:.0%}" if "sparsity" in facts else ""
        words = f"{name} {self.smooth:.3f}  {self.speed:,.0f} {self.unit}/s{firing}{pruned}  lr {facts['lr']:.1e}"
        self.bar.update(self.task, completed=facts["step"], facts=words)
        if not self.console.is_terminal and facts["step"] % max(1, self.steps // 20) == 0:
            self.console.print(f"step {facts['step']:>6,}/{self.steps:,}  {words}", highlight=False)


@contextmanager
def _progress(console: Console, steps: int, start: int, unit: str) -> Iterator[_Display]:
    display = _Display(console, steps, start, unit)
    if not console.is_terminal:
        yield display
        return
    with display.bar:
        yield display
