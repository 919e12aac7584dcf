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
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from spiking_lm.checkpoints import latest_checkpoint, load_checkpoint, save_checkpoint
from spiking_lm.data import Data
from spiking_lm.errors import DivergedError, InterruptedRunError
from spiking_lm.interfaces import LMOutput, SpikingLanguageModel
from spiking_lm.objectives import Objective, Output, objective_for
from spiking_lm.recipe import Recipe
from spiking_lm.stages import OptimizerConfig, ScheduleConfig, TrainConfig

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
) -> SpikingLanguageModel:
    """Train ``model`` as ``recipe.train`` says, logging and saving into ``run``; ``resume_from`` is a checkpoint.

    A later stage that goes on training gives its own ``config``, whose ``steps`` count from the very first one; the
    ``first_step`` from which its schedule counts; and ``after_step``, called with the steps done and the optimizer,
    which returns facts to log.

    Raises InterruptedRunError on Ctrl-C (after saving), DivergedError when loss or gradient is no longer finite.
    """
    config = config or recipe.train
    assert config is not None
    console = console or Console(stderr=True)
    objective = objective_for(model, data, config, recipe.seed)
    objective.join(run)
    optimizer = make_optimizer(model, config.optimizer, objective.parameters())
    trained = [*model.parameters(), *objective.parameters()]
    start, elapsed, threads = 0, 0.0, config.threads
    torch.manual_seed(recipe.seed)
    if resume_from is not None:
        start, elapsed, threads = _restore(resume_from, model, optimizer, objective)
        console.print(f"resuming after step {start:,} from {resume_from}")

    def save(step: int) -> Path:
        state = {
            "step": step,
            "elapsed_s": elapsed,
            "threads": torch.get_num_threads(),
            "optimizer": optimizer.state_dict(),
            "torch_rng": torch.get_rng_state(),
            "carried": objective.carried(),
        }
        return save_checkpoint(run.path, step, model, state, tokenizer=data.tokenizer, keep=config.keep)

    watch = _NeuronWatch(console, quiet_until=max(config.schedule.warmup, config.steps // 20))
    display = _progress(console, config.steps, start, objective.unit)
    with _threads(threads), _interruptible() as interrupted, display as progress:
        objective.begin(run, console)
        for step in range(start, config.steps):
            tick = time.perf_counter()
            last = step + 1 == config.steps
            log = (step + 1) % config.log_every == 0 or last or step == start
            share = learning_rate(step - first_step, config.steps - first_step, config.schedule)
            lr = config.optimizer.lr * share * objective.lr_factor(step)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            model.train()
            loss, tokens, output = _backward(model, objective, config, step, record=log)
            norm = torch.nn.utils.clip_grad_norm_(trained, config.grad_clip or math.inf)
            if not math.isfinite(loss) or not math.isfinite(float(norm)):
                raise _diverged(run, step, loss, float(norm))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            more = after_step(step + 1, optimizer) if after_step is not None else {}
            duration = time.perf_counter() - tick
            elapsed += duration
            facts: dict[str, Any] = {
                "step": step + 1,
                "loss": loss,
                **objective.describe(loss),
                "lr": lr,
                "grad_norm": float(norm),
                "tokens_per_s": tokens / duration,
                "elapsed_s": elapsed,
                **more,
            }
            if log:
                facts.update(watch.look(output, step + 1))
                run.append_metrics({"split": "train", **facts})
            progress.step(facts)
            if last or (config.eval_every and (step + 1) % config.eval_every == 0):
                score = objective.validate(model)
                run.append_metrics({"split": "valid", "step": step + 1, **score, "elapsed_s": elapsed})
                shown = "  ".join(f"{name} {value:.4f}" for name, value in score.items())
                console.print(f"step {step + 1:>6,}  validation  {shown}", highlight=False)
            stop = interrupted.is_set()
            if last or stop or (config.save_every and (step + 1) % config.save_every == 0):
                saved = save(step + 1)
            if stop and not last:
                raise InterruptedRunError(
                    f"interrupted after step {step + 1:,}; saved {saved}",
                    hint=f"resume: {run.resume_command}",
                )
    return model


def _backward(
    model: SpikingLanguageModel, objective: Objective, config: TrainConfig, step: int, *, record: bool
) -> tuple[float, int, Output | None]:
    """Accumulate the gradient of one step; return the mean loss, the tokens seen and the last micro-batch's output."""
    total, tokens, output = 0.0, 0, None
    device = next(model.parameters()).device
    for micro in range(config.accumulate):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"):
            loss, output, count = objective.loss(model, step * config.accumulate + micro, record=record)
        aux = sum(output.aux_losses.values()) if isinstance(output, LMOutput) else 0.0
        ((loss + aux) / config.accumulate).backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach()) / config.accumulate
        tokens += count
    return total, tokens, output


def _restore(
    path: Path, model: SpikingLanguageModel, optimizer: torch.optim.Optimizer, objective: Objective
) -> tuple[int, float, int]:
    """Load weights, optimizer, random and carried state from a checkpoint; return its steps, seconds and threads."""
    saved, state = load_checkpoint(path)
    model.load_state_dict(saved.state_dict())
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["torch_rng"])
    objective.take_up(model, state.get("carried", []))
    return int(state["step"]), float(state["elapsed_s"]), int(state["threads"])


def _diverged(run: RunDir, step: int, loss: float, norm: float) -> DivergedError:
    good = latest_checkpoint(run.path)
    where = f"last good checkpoint: {good}" if good else "no checkpoint was saved before"
    return DivergedError(
        f"step {step + 1:,}: loss {loss:g}, gradient norm {norm:g}: training stopped before the weights were spoilt",
        hint=f"{where}; try a lower train.optimizer.lr, a longer warm-up or precision fp32",
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
def _interruptible() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event that the loop sees after its step; a second one stops at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # signals reach only the main thread
        return

    def note(signum: int, frame: Any) -> None:
        if event.is_set():
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
