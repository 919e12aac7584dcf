"""A float Llama-family model becomes a spiking one, block by block, with one block in memory.

The calibration text streams through the model as hidden states on disk. A block is rotated, its salient channels are
chosen on its float form, what omni learns is learnt, and its matrices are rounded in the order in which text meets
them, each on what the matrices before it return in few bits. A finished block is a file, so that an interrupted
conversion goes on with the next one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from spiking_lm.checkpoints import filled_model
from spiking_lm.config import parse_config
from spiking_lm.data import TextData
from spiking_lm.errors import DataError, SpikingLMError
from spiking_lm.files import atomic_write, remove, sha256_file
from spiking_lm.gif import calibrate_scale
from spiking_lm.graph import LMGraph
from spiking_lm.quantization import QuantizedWeight, round_to_nearest
from spiking_lm.schemes import OFF, ActivationScheme, CacheScheme, WeightScheme
from spiking_lm_spikellm.config import SpikeLLMConfig
from spiking_lm_spikellm.conversion_config import SpikeLLMConversion
from spiking_lm_spikellm.gptq import Drift, Factor, factorize, follow, gptq
from spiking_lm_spikellm.layers import SpikingLinear
from spiking_lm_spikellm.model import Block, SpikeLLM, graph_of
from spiking_lm_spikellm.omni import calibrate_block
from spiking_lm_spikellm.pbllm import pb_llm
from spiking_lm_spikellm.progress import Display
from spiking_lm_spikellm.rotation import Rotation
from spiking_lm_spikellm.saliency import CacheSaliency, SecondMoment, activation_saliency, choose
from spiking_lm_spikellm.sources import EMBEDDING, HEAD, NORM, Source, open_source
from spiking_lm_spikellm.streams import Stream, Walk, watching_attention, writing

if TYPE_CHECKING:
    from rich.console import Console

STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""The projections that read what is seen in each stage of a :class:`Walk`."""

Facts = dict[str, Any]

log = logging.getLogger("spiking_lm.spikellm")  # below the host's, whose warnings a run shows and keeps


def calibrate(
    options: SpikeLLMConversion, data: TextData, work: Path, *, seed: int, console: Console
) -> tuple[SpikeLLM, dict[str, Any]]:
    """Convert ``options.source``, looking at the training part of ``data``; return the model and a JSON-able report.

    ``work`` keeps finished blocks and hidden states; a call that finds there those of the same source, options and text
    goes on from them, to the very same result.

    Raises: DataError for a source that is damaged or a text shorter than a window; DivergedError naming the block.
    """
    assert options.source is not None
    source = open_source(Path(options.source).expanduser())
    config = converted_config(options, source)
    conversion = Conversion(options, source, config, calibration_tokens(data, options, seed), work, seed)
    with torch.no_grad(), Display(console, config.n_layer) as display:
        conversion.run(display.show)
    return conversion.model(), conversion.report()


def outline(options: SpikeLLMConversion) -> LMGraph:
    """Return the graph of the model that a conversion would return, from the configuration of its source alone."""
    assert options.source is not None
    return graph_of(converted_config(options, open_source(Path(options.source).expanduser())))


def converted_config(options: SpikeLLMConversion, source: Source) -> SpikeLLMConfig:
    """Return the configuration of the model that ``source`` becomes."""
    schemes = {name: getattr(options, name).model_dump() for name in ("weights", "activations", "cache")}
    values = {**source.config.model_dump(), **schemes, "rotation": options.rotation}
    return parse_config(SpikeLLMConfig, values, where="the converted model")


def calibration_tokens(data: TextData, options: SpikeLLMConversion, seed: int) -> Tensor:
    """Return windows ``(N, S)`` from random places of the training text."""
    text, window = data.train.tokens, options.calibration.window
    if len(text) < window:
        raise DataError(
            f"the calibration text, the training part of the data, has {len(text):,} tokens, "
            f"less than one window of {window:,}",
            hint="choose another text, or a smaller convert.calibration.window",
        )
    random = np.random.default_rng(seed)
    starts = random.integers(0, len(text) - window + 1, options.calibration.samples)
    rows = np.stack([np.asarray(text[start : start + window]) for start in starts])
    return torch.from_numpy(rows.astype(np.int64))


@dataclass
class Conversion:
    """A conversion under way, and what it has on disk."""

    options: SpikeLLMConversion
    source: Source
    config: SpikeLLMConfig
    tokens: Tensor
    work: Path
    seed: int

    def __post_init__(self) -> None:
        off = {"activations": ActivationScheme(), "cache": CacheScheme()}
        self.while_rounding = self.config.model_copy(update={"weights": WeightScheme(), "mode": "fake"})
        self.in_float = self.while_rounding.model_copy(update=off)
        salient = [scheme.salient for scheme in (self.options.activations, self.options.cache) if scheme.bits < OFF]
        self.marks = any(salient)
        self.learns = self.options.omni is not None
        self.solves = self.options.rounding != "nearest" and not (
            self.options.rounding == "gptq" and self.options.weights.off
        )
        self.follows = self.solves and self.options.rounding == "gptq" and self.options.gptq.follow > 0
        self.keeps_float = self.learns or self.follows
        self.ranges = self.options.activations.bits < OFF and self.options.activations.scale == "static"
        self.rotation = Rotation(self.config.n_embd, self.seed) if self.options.rotation else None
        self.reads_text = self.marks or self.learns or self.solves or self.ranges

    # -- on disk ------------------------------------------------------------------------------------------------------

    def block_file(self, index: int) -> Path | None:
        """Where a finished block is, with its hash in its name; None as long as it is not finished."""
        return next(self.work.glob(f"block-{index:05d}-*.safetensors"), None)

    def _keep(self, index: int, tensors: dict[str, Tensor], facts: dict[str, Facts]) -> None:
        content = save(tensors, metadata={"facts": json.dumps(facts)})
        file = self.work / f"block-{index:05d}-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
        with writing(file):
            atomic_write(file, content)

    def _is_finished(self, index: int) -> bool:
        file = self.block_file(index)
        if file is None:
            return False
        if sha256_file(file)[:16] != file.stem.rpartition("-")[2]:
            log.warning("%s is damaged: what was converted from there on is done again", file)
            return False
        return True

    def _opened(self, index: int) -> Any:
        """Open a finished block."""
        file = self.block_file(index)
        assert file is not None
        return safe_open(file, "pt")

    def states(self, index: int, kind: str = "states", *, new: bool = False) -> Stream:
        """Return the hidden states in front of block ``index``; kind "float": those of the float model."""
        return Stream(self.work / f"{kind}-{index:05d}.f32", (*self.tokens.shape, self.config.n_embd), new=new)

    @cached_property
    def source_sha256(self) -> str:
        """The hash of the source, all of which has to be read for it."""
        return self.source.sha256()

    def identity(self) -> str:
        """Return a hash of all that decides the result."""
        facts = [self.options.model_dump(mode="json", exclude={"source"}), self.source_sha256, self.seed]
        return hashlib.sha256(json.dumps(facts).encode() + self.tokens.numpy().tobytes()).hexdigest()

    def finished(self) -> int:
        """Return how many blocks are done and can be gone on from; what is not of this conversion is removed."""
        note, identity = self.work / "identity", self.identity()
        if not note.is_file() or note.read_text() != identity:
            _forget(self.work)
            with writing(self.work):
                self.work.mkdir(parents=True)
                atomic_write(note, identity)
        done = 0
        while done < self.config.n_layer and self._is_finished(done):
            done += 1
        if done == self.config.n_layer or not self.reads_text:
            return done
        kinds = ["states", "float"] if self.keeps_float else ["states"]
        size = 4 * self.tokens.numel() * self.config.n_embd
        files = [self.work / f"{kind}-{done:05d}.f32" for kind in kinds]
        return done if all(file.is_file() and file.stat().st_size == size for file in files) else 0

    # -- the blocks ---------------------------------------------------------------------------------------------------

    def run(self, show: Callable[[int, str], None]) -> None:
        """Do the blocks that are not done."""
        done = self.finished()
        if done == 0 and self.reads_text:
            self._embed()
        for index in range(done, self.config.n_layer):
            with _naming(index):
                self._convert(index, show)

    def _embed(self) -> None:
        table = self._ends()[EMBEDDING]
        for kind in ("states", "float") if self.keeps_float else ("states",):
            states = self.states(0, kind, new=True)
            for rows in range(len(self.tokens)):
                x = table[self.tokens[rows : rows + 1]].float()
                states[slice(rows, rows + 1)] = x if self.rotation is None else self.rotation.residual(x)
            states.flush()

    def _convert(self, index: int, show: Callable[[int, str], None]) -> None:
        show(index, "reading")
        params = self._params(index)
        block = _block(self.while_rounding, index, params)
        facts: dict[str, Facts] = {name: {} for names in STAGES for name in names}
        if self.marks:
            show(index, "choosing salient channels")
            self._mark(index, block, params)
        rounded: dict[str, QuantizedWeight] = {}
        if self.learns:
            params, rounded = self._learn(index, block, params, facts, show)
        show(index, "rounding")
        if self.reads_text:
            self._round_on_text(index, block, params, rounded, facts)
        else:
            for name in facts:
                self._round(block.get_submodule(name), None, None, facts[name])
        tensors = {name: tensor.contiguous() for name, tensor in block.state_dict().items()}
        self._keep(index, tensors, facts)
        for kind in ("states", "float"):
            _forget(self.work / f"{kind}-{index:05d}.f32")

    def _generator(self, index: int) -> torch.Generator:
        """Return what random masks of a block are drawn from: a conversion that goes on draws the same."""
        return torch.Generator().manual_seed(self.seed * self.config.n_layer + index)

    def _params(self, index: int) -> dict[str, Tensor]:
        """Return the float block that is to be quantised."""
        params = self.source.block(index)
        bad = [name for name, tensor in params.items() if not bool(torch.isfinite(tensor).all())]
        if bad:
            raise DataError(f"{bad[0]} of {self.source.path} is not finite", hint="is the copy complete?")
        return params if self.rotation is None else self.rotation.block(params, self.config)

    def _mark(self, index: int, block: Block, params: dict[str, Tensor]) -> None:
        """Choose salient channels on the float block, which reads what the blocks before it return in few bits."""
        generator = self._generator(index)
        walk = Walk(_block(self.in_float, index, params), self.states(index))
        config = self.config
        ours = self.options.activations.salient if self.options.activations.bits < OFF else None
        kept = self.options.cache.salient if self.options.cache.bits < OFF else None
        cache = CacheSaliency(config.kv_heads, config.head_size)
        for names, stage in zip(STAGES, walk.stages(), strict=True):
            moment = SecondMoment(cast(SpikingLinear, block.get_submodule(names[0])).in_features)
            with watching_attention(walk.block, cache.update) if stage == walk.to_output else nullcontext():
                for states in stage():
                    if ours is not None:
                        moment.update(states)
            for name in names if ours is not None else ():
                assert ours is not None
                saliency = activation_saliency([params[f"{name}.weight"]], moment)
                mask = choose(saliency, ours.rate, choice=ours.choice, generator=generator)
                cast(SpikingLinear, block.get_submodule(name)).salient = mask
        if kept is not None:
            block.self_attn.salient_k = choose(cache.keys, kept.rate, choice=kept.choice, generator=generator)
            block.self_attn.salient_v = choose(cache.values, kept.rate, choice=kept.choice, generator=generator)

    def _learn(
        self,
        index: int,
        block: Block,
        params: dict[str, Tensor],
        facts: dict[str, Facts],
        show: Callable[[int, str], None],
    ) -> tuple[dict[str, Tensor], dict[str, QuantizedWeight]]:
        """Let omni transform the block; return its float parameters then, and the matrices that are rounded already."""
        assert self.options.omni is not None
        before = self.states(index, "float")
        walk = Walk(_block(self.in_float, index, params), before)
        for stage in walk.stages():
            for _ in stage():
                pass
        after = self.states(index + 1, "float", new=True)
        walk.finish(after)
        ours = self.options.weights if self.options.rounding == "nearest" else WeightScheme()
        with torch.enable_grad():
            result = calibrate_block(
                self._dynamic(index, block),
                params,
                before.tensor(),
                self.states(index).tensor(),
                after.tensor(),
                self.options.omni,
                weights=ours,
                progress=lambda epoch, loss: show(index, f"learning, epoch {epoch}, loss {loss:.3g}"),
            )
        for name in facts:
            facts[name]["notes"] = list(result.report.notes)
        _load(block, result.params)
        return result.params, result.weights

    def _dynamic(self, index: int, block: Block) -> Block:
        """Return the block with a scale per token: static ones are measured on what is learnt, not learnt with."""
        if not self.ranges:
            return block
        activations = self.options.activations.model_copy(update={"scale": "dynamic"})
        twin = Block(self.while_rounding.model_copy(update={"activations": activations}), index)
        twin.load_state_dict({name: t for name, t in block.state_dict().items() if not name.endswith(".scale")})
        return twin.requires_grad_(False)

    def _round_on_text(
        self,
        index: int,
        block: Block,
        params: dict[str, Tensor],
        rounded: dict[str, QuantizedWeight],
        facts: dict[str, Facts],
    ) -> None:
        walk, generator = Walk(block, self.states(index)), self._generator(index)
        beside = Walk(_block(self.in_float, index, params), self.states(index, "float")) if self.follows else None
        stages = zip(STAGES, walk.stages(), beside.stages() if beside else repeat(None), strict=False)
        for names, stage, in_float in stages:
            layers = [cast(SpikingLinear, block.get_submodule(name)) for name in names]
            moment, limits = SecondMoment(layers[0].in_features), _Limits()
            drift = Drift(layers[0].in_features) if in_float is not None else None
            for states, truth in zip(stage(), in_float() if in_float is not None else repeat(None), strict=False):
                moment.update(states)
                limits.update(states)
                if drift is not None:
                    drift.update(states, cast(Tensor, truth))
            if self.ranges:
                for layer in layers:
                    assert limits.scale is not None
                    layer.scale = limits.scale.clone()
            # Matrices of the size of a moment are the most that is held here, so none is held for longer than need be.
            missing = None if drift is None else drift.missing(moment)
            mean, hessian = moment.mean.float(), moment.hessian if self.solves else None
            del moment, drift
            factor = None
            if hessian is not None:
                gptq_options = self.options.gptq
                order = gptq_options.act_order if self.options.rounding == "gptq" else self.options.pb_llm.act_order
                factor = factorize(hessian, act_order=order, damp=gptq_options.damp)
            for name, layer in zip(names, layers, strict=True):
                target = None
                if missing is not None:
                    target = follow(layer.weight.detach(), missing, self.options.gptq.follow)
                self._round(layer, factor, mean, facts[name], rounded.get(name), target, generator)
        walk.finish(self.states(index + 1, new=True))
        if beside is not None:
            beside.finish(self.states(index + 1, "float", new=True))

    def _round(
        self,
        layer: torch.nn.Module,
        factor: Factor | None,
        mean: Tensor | None,
        facts: Facts,
        rounded: QuantizedWeight | None = None,
        target: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Write the matrix of a projection in few bits, and note what that did; ``target`` is aimed at in its place.

        ``mean`` (I, I) is E[x x^T] of what it reads.
        """
        assert isinstance(layer, SpikingLinear)
        options, scheme, w = self.options, self.options.weights, layer.weight.detach()
        bits: float = 32.0
        notes = facts.setdefault("notes", [])
        if options.rounding == "pb_llm":
            assert factor is not None
            mixed = pb_llm(w, factor, low_frac=options.pb_llm.low_frac, group_size=options.pb_llm.group_size)
            layer.weight = torch.nn.Parameter(mixed.weight)
            bits = mixed.bits_per_weight
        elif not scheme.off:
            if rounded is not None:
                packed = rounded
            elif factor is None:
                packed = round_to_nearest(w, scheme)
            else:
                solution = gptq(
                    w if target is None else target,
                    factor,
                    scheme,
                    mse=options.gptq.mse,
                    static_groups=options.gptq.static_groups,
                    generator=generator,
                )
                packed = solution.weight
                if solution.damp > options.gptq.damp:
                    notes.append(f"damped by {solution.damp:g}")
            layer.set_weight(packed)
            bits = packed.bits_per_weight()
        written = layer.weight.detach()
        marked = layer.salient
        nearest = None
        if mean is not None and not scheme.off:
            nearest = _error(w, round_to_nearest(w, scheme).dequantize(), mean)
        facts.update(
            bits_per_weight=bits,
            weights=w.numel(),
            salient=None if marked is None else float(marked.float().mean()),
            zeros=float((written == 0).float().mean()),
            error=None if mean is None else _error(w, written, mean),
            error_nearest=nearest,
        )

    # -- the result ---------------------------------------------------------------------------------------------------

    def _ends(self) -> dict[str, Tensor]:
        """Return embedding, last norm and head; beside packed matrices no table is in more than 16 bits."""
        final = self.source.final()
        tables = {EMBEDDING: self.source.embedding(), HEAD: final.head}
        if not self.config.weights.off:
            tables = {
                name: None if t is None else t.half() if t.dtype.itemsize > 2 else t for name, t in tables.items()
            }
        ends = {NORM: final.norm, **{name: table for name, table in tables.items() if table is not None}}
        return ends if self.rotation is None else self.rotation.ends(ends, self.config)

    def model(self) -> SpikeLLM:
        """Put the finished blocks together."""
        tensors = self._ends()
        for index in range(self.config.n_layer):
            with self._opened(index) as file:
                tensors.update({f"model.layers.{index}.{name}": file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        tied = {} if HEAD in tensors else {HEAD: EMBEDDING}
        return cast(SpikeLLM, filled_model(self.config, tensors, tied))

    def report(self) -> dict[str, Any]:
        """Return what was done, JSON-able: facts of the whole, and of every matrix."""
        layers: list[Facts] = []
        for index in range(self.config.n_layer):
            with self._opened(index) as file:
                facts = json.loads(file.metadata()["facts"])
            layers += [{"name": f"model.layers.{index}.{name}", **of} for name, of in facts.items()]
        notes = [f"{layer['name']}: {note}" for layer in layers for note in dict.fromkeys(layer.pop("notes"))]
        return {
            "source": str(self.source.path),
            "source_sha256": self.source_sha256,
            "summary": self._summary(layers),
            "layers": layers,
            "notes": notes,
        }

    def _summary(self, layers: list[Facts]) -> dict[str, str]:
        options = self.options
        windows, length = self.tokens.shape
        weights = sum(layer["weights"] for layer in layers)
        bits = sum(layer["bits_per_weight"] * layer["weights"] for layer in layers) / weights
        steps = [name for name, on in (("rotation", options.rotation), ("omni", self.learns)) if on]
        summary = {
            "method": ", then ".join([*steps, f"rounding: {options.rounding}"]),
            "weights": f"{_words(options.weights)}; {bits:.2f} bits each, with scales, orders and masks",
            "activations": _words(options.activations),
            "keys and values": _words(options.cache),
            "calibration": f"{windows} windows of {length} tokens" if self.reads_text else "none",
        }
        paper, real = ace(options.weights, options.activations)
        summary["ACE per weight"] = (
            f"{paper:.2f} counting steps, {real:.2f} counting bits; float16 has {OFF * OFF} "
            "(bits of weight x bits of activation, Zhang et al., arXiv 2112.00133)"
        )
        return summary


def ace(weights: WeightScheme, activations: ActivationScheme) -> tuple[float, float]:
    """Return the arithmetic effort of a weight, bits of weight x bits of activation, in the two ways it is counted.

    A salient channel of T steps costs T times as much in the paper's accounting; the codes it holds have log2 T bits
    more. A ternary step counts as 2 bits.
    """

    def steps(scheme: WeightScheme | ActivationScheme, count: Callable[[int], float]) -> float:
        if scheme.salient is None:
            return 1.0
        return 1 + scheme.salient.rate * (count(scheme.salient.steps) - 1)

    own = 2.0 * steps(weights, float) if weights.type == "ternary" else float(weights.bits)
    extra = 0.0 if activations.salient is None else activations.salient.rate * math.log2(activations.salient.steps)
    return own * activations.bits * steps(activations, float), own * (activations.bits + extra)


def _words(scheme: WeightScheme | ActivationScheme | CacheScheme) -> str:
    if isinstance(scheme, WeightScheme) and scheme.type == "ternary":
        kind = "ternary spikes"
    elif scheme.bits >= OFF:
        return "real"
    else:
        kind = f"{scheme.bits} bits"
    group = getattr(scheme, "group_size", None)
    grouped = f", {group} weights to a scale" if group else ""
    if scheme.salient is None:
        return kind + grouped
    chosen = f"{scheme.salient.rate:.0%} of the channels with {scheme.salient.steps} steps ({scheme.salient.choice})"
    return f"{kind}{grouped}, {chosen}"


def _forget(path: Path) -> None:
    if path.exists():
        remove(path)


@contextmanager
def _naming(index: int) -> Iterator[None]:
    """Have errors say in which block they happened, counted from 1 as it is shown."""
    try:
        yield
    except SpikingLMError as error:
        error.message = f"block {index + 1}: {error.message}"
        error.args = (error.message,)
        raise


def _block(config: SpikeLLMConfig, index: int, params: dict[str, Tensor]) -> Block:
    with torch.random.fork_rng(devices=[]):
        block = Block(config, index)
    _load(block, params)
    return block.requires_grad_(False)


def _load(block: Block, params: dict[str, Tensor]) -> None:
    """Have a block hold these very parameters, which others hold too; masks and scales stay as they are."""
    unknown = block.load_state_dict(params, strict=False, assign=True).unexpected_keys
    assert not unknown, unknown


def _error(w: Tensor, written: Tensor, mean: Tensor) -> float:
    """Return the mean squared error of the outputs, as a share of their mean square, where inputs have E[x x^T]."""

    def energy(x: Tensor) -> float:
        return float(((x @ mean) * x).sum())

    return energy(w - written) / max(energy(w), 1e-30)


class _Limits:
    """The least and the greatest value seen, for a static scale."""

    scale: Tensor | None = None

    def update(self, states: Tensor) -> None:
        self.scale = calibrate_scale(states, self.scale)
