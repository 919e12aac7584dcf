"""Learnable clipping and learnable equivalent transformation, block by block (Shao et al., arXiv 2308.13137).

Equivalent transformation (LET): a channel of what a matrix reads is divided by s and the matrix's column multiplied by
s. The product stays, but outliers of activations, which are hard to write in few bits, become larger weights. Four sets
of scales fold into parameters that are there anyway, so that nothing is added at run time:

    qkv   input norm / s,           columns of q, k, v * s
    fc1   post-attention norm / s,  columns of gate, up * s
    out   rows of v / s,            columns of o * s
    qkt   rows of q / s,            rows of k * s

Query heads that share a key and value head share their scales. A rotary embedding turns channels j and j + d/2 into
each other, so qkt commutes with it only where both have one scale (``tie_rotary``).

Learnable clipping (LWC): each row or group of a matrix draws the ends of its range in by sigmoid(logit).

Both are learnt together per block, against what the float block returns, and folded afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from spiking_lm.errors import ConfigError, DivergedError
from spiking_lm.quantization import QuantizedWeight, encode, group_count, split_groups, weight_grid
from spiking_lm.schemes import ActivationScheme, CacheScheme, WeightScheme
from spiking_lm_spikellm.config import SpikeLLMConfig
from spiking_lm_spikellm.model import Block
from spiking_lm_spikellm.omni_config import OmniOptions

Params = Mapping[str, Tensor]
"""Of one block, by their names below it: ``self_attn.q_proj.weight (O, I)``, ``input_layernorm.weight (C,)`` ..."""

QUERY, KEY, VALUE, OUT = (f"self_attn.{name}_proj" for name in "qkvo")
GATE, UP, DOWN = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))
PROJECTIONS = (QUERY, KEY, VALUE, OUT, GATE, UP, DOWN)
AFTER_NORMS = {
    "qkv": ("input_layernorm", (QUERY, KEY, VALUE)),
    "fc1": ("post_attention_layernorm", (GATE, UP)),
}

LEAST_SCALE = 0.01  # nearer to zero, a step of the optimizer could turn a channel's sign or blow it up
LEAST_RANGE = 1e-5
FIRST_LOGIT = 4.0  # sigmoid: 0.982, nearly the whole range


class Learned(NamedTuple):
    """What is learnt of a block; either may be empty."""

    scales: dict[str, Tensor]
    """qkv, fc1 ``(C,)``; out ``(kv_heads, d)``, of a rotated model ``(1, d)``; qkt ``(kv_heads, d/2)``, untied
    ``(kv_heads, d)``."""
    clipping: dict[str, tuple[Tensor, Tensor]]
    """Projection -> logits of the upper and lower end ``(O, G)``."""

    @property
    def method(self) -> str:
        """Say what is learnt: let+lwc, let, lwc, or rtn where nothing is."""
        return "+".join(["let"] * bool(self.scales) + ["lwc"] * bool(self.clipping)) or "rtn"


@dataclass(frozen=True)
class OmniReport:
    """How the calibration of a block went."""

    method: str
    """What the block has in the end: let+lwc, let, lwc, or rtn, plain rounding to the nearest."""
    let_lr: float
    """0 without a transformation."""
    losses: tuple[float, ...]
    """Mean over the samples of each epoch, while learning."""
    rtn_loss: float
    """Mean squared error against the targets with plain rounding to the nearest: before."""
    loss: float
    """The same in the end."""
    notes: tuple[str, ...]
    """Each step that was taken back since the loss was not finite."""


class OmniResult(NamedTuple):
    """A calibrated block."""

    params: dict[str, Tensor]
    """The float block with the scales folded in: an equal function, easier to quantise by any method."""
    weights: dict[str, QuantizedWeight]
    """The projections in few bits; empty where the scheme is off."""
    learned: Learned
    report: OmniReport


def transform(params: Params, scales: Params, config: SpikeLLMConfig) -> dict[str, Tensor]:
    """Fold the scales of an equivalent transformation into a block's parameters.

    ``scales`` are any of qkv, fc1, out and qkt, shaped as in :class:`Learned`; gradients flow to them. Biases, where
    there are any, are scaled with their rows. The new parameters compute what the old ones did, but for rounding, if
    the scales of rotary pairs are tied.
    """
    factors = _factors(scales, config)
    result = _fold_vectors(params, scales, factors)
    for name, (rows, columns) in factors.items():
        result[f"{name}.weight"] = _scaled(params[f"{name}.weight"], rows, columns)
    return result


Factors = dict[str, tuple[Tensor | None, Tensor | None]]
"""Projection -> what its rows (O,) and columns (I,) are multiplied by."""


def _factors(scales: Params, config: SpikeLLMConfig) -> Factors:
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    for key, (_, readers) in AFTER_NORMS.items():
        if key in scales:
            columns.update(dict.fromkeys(readers, scales[key]))
    if "out" in scales:
        of_keys, of_queries = _per_head(scales["out"], config)
        rows[VALUE], columns[OUT] = 1 / of_keys, of_queries
    if "qkt" in scales:
        of_keys, of_queries = _per_head(scales["qkt"], config)
        rows[QUERY], rows[KEY] = 1 / of_queries, of_keys
    return {name: (rows.get(name), columns.get(name)) for name in PROJECTIONS}


def _fold_vectors(params: Params, scales: Params, factors: Factors) -> dict[str, Tensor]:
    """Return the parameters with norms and biases scaled; matrices are as they were."""
    result = dict(params)
    for key, (norm, _) in AFTER_NORMS.items():
        for name in (f"{norm}.weight", f"{norm}.bias"):
            if key in scales and name in params:
                result[name] = params[name] / scales[key]
    for name, (rows, _) in factors.items():
        if rows is not None and f"{name}.bias" in params:
            result[f"{name}.bias"] = params[f"{name}.bias"] * rows
    return result


def _scaled(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    if columns is not None:
        weight = weight * columns
    return weight if rows is None else weight * rows[:, None]


def _per_head(scale: Tensor, config: SpikeLLMConfig) -> tuple[Tensor, Tensor]:
    """Spread ``(kv_heads | 1, d | d/2)`` over the channels of all key heads, and of all query heads."""
    if scale.shape[1] < config.head_size:  # tied: j and j + d/2 are a rotary pair
        scale = torch.cat([scale, scale], dim=1)
    scale = scale.expand(config.kv_heads, -1)
    return scale.flatten(), scale.repeat_interleave(config.n_head // config.kv_heads, dim=0).flatten()


def first_scales(params: Params, maxima: Params, options: OmniOptions, config: SpikeLLMConfig) -> dict[str, Tensor]:
    """Return the scales to start from: act^alpha / wmax^(1 - alpha) of one matrix each, and ones for qkt.

    ``maxima`` are the greatest magnitudes of what q, o and up read, from :func:`input_maxima`.
    """
    scales: dict[str, Tensor] = {}
    for key, name in (("qkv", QUERY), ("fc1", UP), ("out", OUT)):
        weight_peak, input_peak = params[f"{name}.weight"].abs().amax(0), maxima[name]
        if key == "out":
            weight_peak, input_peak = (_over_shared_heads(peak, config) for peak in (weight_peak, input_peak))
        weight_peak, input_peak = weight_peak.clamp(min=LEAST_RANGE), input_peak.clamp(min=LEAST_RANGE)
        scales[key] = (input_peak**options.alpha / weight_peak ** (1 - options.alpha)).clamp(min=LEAST_RANGE)
    width = config.head_size // 2 if options.tie_rotary else config.head_size
    scales["qkt"] = scales["qkv"].new_ones(config.kv_heads, width)
    return scales


def _over_shared_heads(peak: Tensor, config: SpikeLLMConfig) -> Tensor:
    """Take the greatest over the heads that must share scales: ``(n_head d,)`` to ``(kv_heads | 1, d)``.

    A rotation mixes heads on the way from v to o and leaves one scale per channel for all of them.
    """
    shared = 1 if config.rotation else config.kv_heads
    return peak.view(shared, -1, config.head_size).amax(1)


@torch.no_grad()
def keep_from_zero(scales: Params) -> None:
    """Move scales that are nearer to zero than 0.01 there, in place, with their sign."""
    for scale in scales.values():
        scale.copy_(torch.where(scale.abs() < LEAST_SCALE, torch.where(scale < 0, -LEAST_SCALE, LEAST_SCALE), scale))


def first_logits(params: Params, scheme: WeightScheme) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the logits of clipping to start from: nearly whole ranges, ``(O, G)`` of each projection."""
    logits = {}
    for name in PROJECTIONS:
        weight = params[f"{name}.weight"]
        first = weight.new_full((weight.shape[0], group_count(weight.shape[1], scheme.group_size)), FIRST_LOGIT)
        logits[name] = first, first.clone()
    return logits


def input_maxima(block: nn.Module, params: Params, x: Tensor) -> dict[str, Tensor]:
    """Return the greatest magnitude of every input channel of each projection, ``(I,)``, while a block reads ``x``.

    ``block`` is float and runs with ``params``; the samples ``x (N, S, C)`` are read one at a time.
    """
    maxima: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            peak = args[0].abs().flatten(0, -2).amax(0)
            maxima[name] = torch.maximum(maxima[name], peak) if name in maxima else peak

        return hook

    hooks = [block.get_submodule(name).register_forward_pre_hook(watch(name)) for name in PROJECTIONS]
    try:
        with torch.no_grad():
            for j in range(len(x)):
                run_block(block, params, x[j : j + 1])
    finally:
        for handle in hooks:
            handle.remove()
    return maxima


def run_block(block: nn.Module, params: Params, x: Tensor) -> Tensor:
    """Return what a block makes of whole texts ``x (B, S, C)``, with ``params`` in the place of its own."""
    positions = torch.arange(x.shape[1], device=x.device)
    y, _ = functional_call(block, dict(params), (x, positions))
    return cast(Tensor, y)


def float_twin(block: Block) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the block with every scheme off, without memory of its own, and the buffers that it needs to run."""
    config = block.self_attn.config.model_copy(
        update={"weights": WeightScheme(), "activations": ActivationScheme(), "cache": CacheScheme()}
    )
    with torch.device("meta"):
        twin = Block(config, block.layer)
    buffers = dict(block.named_buffers())
    return twin, {name: buffers[name] for name, _ in twin.named_buffers()}


def write_block(params: Params, learned: Learned, scheme: WeightScheme, config: SpikeLLMConfig) -> dict[str, Tensor]:
    """Return a block's parameters, transformed and with the projections on the grid of ``scheme``.

    Gradients flow to what is learnt, and to it alone: straight through the rounding, but not at the two end codes.
    """
    if scheme.off:
        return transform(params, learned.scales, config)
    factors = _factors(learned.scales, config)
    result = _fold_vectors(params, learned.scales, factors)
    for name, (rows, columns) in factors.items():
        upper, lower = learned.clipping.get(name, (None, None))
        weight = params[f"{name}.weight"].detach()
        result[f"{name}.weight"] = _write_matrix(weight, rows, columns, scheme, upper, lower)
    return result


def _write_matrix(
    weight: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    scheme: WeightScheme,
    upper: Tensor | None,
    lower: Tensor | None,
) -> Tensor:
    """Return ``fake_quantize_weight`` of the scaled matrix, for less than half the time.

    Of each group only the two ends of its range have a say in the grid. So the grid is made of a matrix that holds
    nothing but them, and the gradients of the large one are summed up as soon as they are there.
    """
    with torch.no_grad():
        scaled = _scaled(weight, rows, columns)
        groups = split_groups(scaled, scheme.group_size)
        ends, start = [], 0
        for group in groups:
            first = start + group.shape[2] * torch.arange(group.shape[1], device=group.device)
            ends.append(torch.stack([first + group.argmin(2), first + group.argmax(2)], 2).flatten(1))
            start += group.shape[1] * group.shape[2]
        at = torch.cat(ends, 1)
    extremes = _scaled(weight.gather(1, at), rows, None if columns is None else columns[at])
    grid = weight_grid(extremes, scheme.model_copy(update={"group_size": 2}), upper=upper, lower=lower)
    written, start, inputs = [], 0, 0
    for group in groups:
        stop, width = start + group.shape[1], group.shape[1] * group.shape[2]
        own = None if columns is None else columns[inputs : inputs + width]
        scale, zero = grid.scale[:, start:stop, None], grid.zero[:, start:stop, None]
        y: Tensor = _Write.apply(group, rows, own, scale, zero, 2**scheme.bits - 1)
        written.append(y.flatten(1))
        start, inputs = stop, inputs + width
    return written[0] if len(written) == 1 else torch.cat(written, 1)


class _Write(torch.autograd.Function):
    """Rounding of a scaled matrix to its grid: ``(O, n, size)``, rows ``(O,)``, columns ``(n size,)``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Tensor | None, columns: Tensor | None, scale: Tensor, zero: Tensor, most: int
    ) -> Tensor:
        y = (x / scale).round_()
        torch.maximum(y, -zero, out=y)
        torch.minimum(y, most - zero, out=y)
        y.mul_(scale)
        ctx.save_for_backward(x, rows, columns, scale, zero, y)
        ctx.most = most
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, rows, columns, scale, zero, y = ctx.saved_tensors
        g = gradients[0]
        # dy = dx within the range and code dscale; x itself is weight * columns * rows
        moved = (g * x).masked_fill_((y <= -zero * scale) | (y >= (ctx.most - zero) * scale), 0)
        by_group = moved.sum(2, keepdim=True)
        to_scale = (torch.linalg.vecdot(g, y).unsqueeze(2) - by_group) / scale
        to_rows = None if rows is None else by_group.sum((1, 2)) / rows
        to_columns = None if columns is None else moved.sum(0).flatten() / columns
        return None, to_rows, to_columns, to_scale, None, None


def calibrate_block(
    block: Block,
    params: Params,
    x_float: Tensor,
    x_quantised: Tensor,
    targets: Tensor,
    options: OmniOptions,
    *,
    weights: WeightScheme,
    progress: Callable[[int, float], None] | None = None,
) -> OmniResult:
    """Learn clipping and transformation of one block, so that it returns in few bits what it returned in float.

    ``block`` quantises activations and cache as it is to run, by the range of each token, with its salient channels
    marked in its buffers; its weights are off, and not read. ``params`` are those of the float block, ``x_float``
    (N, S, C) what it reads, which gives the scales to start from, and ``targets`` what it makes of that.
    ``x_quantised`` is what the block reads once the blocks before it are quantised. ``weights`` says how projections
    are written; off leaves them real, for a method that comes after. ``progress`` is called with each epoch, from 1,
    and its mean loss.

    Nothing is random: equal inputs give equal results. If the loss stops being finite, the block is learnt again with
    half of ``let_lr``, then without the transformation, and in the end it is rounded as it is.

    Raises: ConfigError for ternary weights, which have no range to learn, and for a block of packed weights;
    DivergedError if even plain rounding has no finite loss.
    """
    if not block.self_attn.config.weights.off:
        raise ConfigError("the block's weights are packed", hint="make it with weights off, and pass the scheme here")
    if weights.type == "ternary":
        raise ConfigError(
            "weights.type: the omni method learns ranges, and ternary weights have none",
            hint="calibrate with weights off, and let gptq make the ternary weights of the transformed block",
        )
    study = _Study(block, {name: value.detach() for name, value in params.items()}, weights, options)
    rtn_loss = study.error(Learned({}, {}), x_quantised, targets)
    if not math.isfinite(rtn_loss):
        raise DivergedError(
            "the error of the block is not finite before anything is learnt",
            hint="look for values that are not finite in the model's weights and in what the block reads",
        )
    maxima = input_maxima(study.twin, study.in_float, x_float) if options.transformation else {}
    notes: list[str] = []
    for let_lr, clip in _attempts(options, weights):
        learned = Learned(
            first_scales(study.params, maxima, options, study.config) if let_lr else {},
            first_logits(study.params, weights) if clip else {},
        )
        losses = study.learn(learned, let_lr, x_quantised, targets, progress)
        loss = study.error(learned, x_quantised, targets) if math.isfinite(losses[-1]) else math.nan
        if math.isfinite(loss):
            break
        notes.append(f"{learned.method} at let_lr {let_lr:g}: the loss was not finite in epoch {len(losses)}")
    else:
        learned, let_lr, losses, loss = Learned({}, {}), 0.0, [], rtn_loss
    folded = transform(study.params, learned.scales, study.config)
    report = OmniReport(learned.method, let_lr, tuple(losses), rtn_loss, loss, tuple(notes))
    return OmniResult(folded, _quantised(folded, learned, weights), learned, report)


def _attempts(options: OmniOptions, weights: WeightScheme) -> Iterator[tuple[float, bool]]:
    """Yield what to learn, and what instead if that diverges: the scales' learning rate (0: none), and clipping."""
    clip = options.clipping and not weights.off
    if options.transformation:
        yield options.let_lr, clip
        yield options.let_lr / 2, clip
    if clip:
        yield 0.0, True


def _quantised(params: Params, learned: Learned, scheme: WeightScheme) -> dict[str, QuantizedWeight]:
    weights = {}
    for name in () if scheme.off else PROJECTIONS:
        weight = params[f"{name}.weight"]
        upper, lower = learned.clipping.get(name, (None, None))
        grid = weight_grid(weight, scheme, upper=upper, lower=lower)
        weights[name] = QuantizedWeight(encode(weight, grid, scheme), grid, scheme)
    return weights


class _Study:
    """One block while it is calibrated."""

    def __init__(self, block: Block, params: dict[str, Tensor], weights: WeightScheme, options: OmniOptions) -> None:
        self.block, self.params, self.weights, self.options = block, params, weights, options
        self.config = block.self_attn.config
        self.twin, buffers = float_twin(block)
        self.in_float = {**buffers, **params}

    def written(self, learned: Learned) -> Params:
        """Return the parameters that the block runs with."""
        return write_block(self.params, learned, self.weights, self.config)

    @torch.no_grad()
    def error(self, learned: Learned, inputs: Tensor, targets: Tensor) -> float:
        """Return the mean squared error over all samples."""
        written = self.written(learned)
        losses = [F.mse_loss(run_block(self.block, written, x), y).item() for x, y in _samples(inputs, targets)]
        return sum(losses) / len(losses)

    def loss(self, learned: Learned, x: Tensor, target: Tensor) -> Tensor:
        """Return the loss of one sample, with gradients."""
        y = run_block(self.block, self.written(learned), x)
        loss = F.mse_loss(y, target)
        if self.options.aug_loss:
            with torch.no_grad():
                same_input = run_block(self.twin, self.in_float, x)
            loss = loss + F.mse_loss(y, same_input)
        return loss

    @torch.enable_grad()
    def learn(
        self,
        learned: Learned,
        let_lr: float,
        inputs: Tensor,
        targets: Tensor,
        progress: Callable[[int, float], None] | None,
    ) -> list[float]:
        """Change ``learned``; return the mean loss of each epoch, the last of them NaN where one was not finite."""
        scales = list(learned.scales.values())
        logits = [logit for pair in learned.clipping.values() for logit in pair]
        for leaf in scales + logits:
            leaf.requires_grad_()
        groups = [{"params": scales, "lr": let_lr}, {"params": logits, "lr": self.options.lwc_lr}]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
        keep_from_zero(learned.scales)
        epochs: list[float] = []
        for epoch in range(self.options.epochs):
            total = 0.0
            for x, target in _samples(inputs, targets):
                loss = self.loss(learned, x, target)
                total += loss.item()
                if not math.isfinite(total):
                    return [*epochs, math.nan]
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                keep_from_zero(learned.scales)
            epochs.append(total / len(inputs))
            if progress is not None:
                progress(epoch + 1, epochs[-1])
        for leaf in scales + logits:
            leaf.requires_grad_(False)
        return epochs


def _samples(inputs: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one text at a time, in order; the tensors may lie on disk."""
    for j in range(len(inputs)):
        yield inputs[j : j + 1], targets[j : j + 1]
