"""Where the spikes are and what they save: operations counted by what really feeds each weight matrix.

:func:`explain` runs a model on tokens, watches the tensors that arrive at and leave the modules named in its graph, and
counts by NeuroBench's definitions (version 2.3: activation sparsity, connection sparsity, effective and dense synaptic
operations, membrane updates, footprint). What NeuroBench leaves out (integer spikes, norms, WKV, mixes, gates) is
counted beside it, never instead. A declared kind that the tensors contradict is an error: the graph cannot flatter.

:func:`save_raster` keeps the spikes of a short text for the report's picture.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from spiking_lm.errors import PluginError, SpikingLMError
from spiking_lm.graph import LMGraph, Op, ValueKind
from spiking_lm.interfaces import SpikeSite, SpikingLanguageModel, observe
from spiking_lm.raster import Raster, load_raster, record_raster, save_raster
from spiking_lm.report.tables import explanation_tables, percent
from spiking_lm.watch import (
    CONNECTIONS,
    RANK,
    SiteTaps,
    Stream,
    Watch,
    agree,
    device_of,
    groups,
    multiplied,
    rows_of,
    vocab_size,
    watching,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = [
    "ENERGY_WORDS",
    "ClassShare",
    "Energy",
    "Explanation",
    "NeuroBench",
    "OpCount",
    "Raster",
    "SiteCount",
    "connection_sparsity",
    "explain",
    "footprint",
    "load_raster",
    "record_raster",
    "sample_tokens",
    "save_raster",
]

OpClass = Literal["AC", "integer-AC", "MAC"]
"""AC: every input element is -1, 0 or 1, so a synapse only adds. integer-AC: small integers, k additions each."""

Placement = Literal["neuromorphic", "embedded-core", "host"]

CLASSES: tuple[OpClass, ...] = ("AC", "integer-AC", "MAC")

E_MAC, E_AC = 4.6, 0.9
"""Picojoules of a float32 multiply-accumulate and of an accumulate in 45 nm (Horowitz, ISSCC 2014)."""

ALWAYS = 0.99
"""A channel that fires at this share of the tokens or more carries no information: it is saturated."""

ENERGY_WORDS = "estimate, 45 nm constants, arithmetic only, no memory traffic"


@dataclass(frozen=True)
class OpCount:
    """One operation of the graph: what it was declared to read and emit, what it did, and what that costs per token.

    ``seen_*`` and ``*_zeros`` are None where nothing could be watched (no module computes exactly that operation).
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    declared_inputs: tuple[ValueKind, ...]
    seen_input: ValueKind | None
    input_zeros: float | None
    """Share of zeros among the elements that arrived."""
    emits: ValueKind
    seen_output: ValueKind | None
    output_zeros: float | None
    weights: int
    """Elements of the weight matrix; 0 for operations without one."""
    nonzero_weights: int
    dense: float
    """Synaptic operations per token if nothing were skipped."""
    effective_acs: float
    """Per token, NeuroBench: non-zero input times non-zero weight, in calls whose every input element is -1, 0 or 1."""
    effective_macs: float
    """Per token, NeuroBench: the same in all other calls."""
    accumulations: float
    """Per token: additions that an AC or integer-AC operation makes, an input of k counting k times; 0 for MAC."""
    other_ops: int
    """Arithmetic per token that NeuroBench does not count."""
    op_class: OpClass | None
    """None for operations without a weight matrix."""
    runs_on: Placement
    steps: float = 1.0
    """Spike steps per token that were run, where the graph says that it takes several: everything above counts them
    all, and the dense twin computes the operation once."""


@dataclass(frozen=True)
class SiteCount:
    """One spike site: how often its channels fire and what they feed."""

    name: str
    kind: ValueKind
    feeds: tuple[str, ...]
    feeds_kinds: tuple[str, ...]
    channels: int
    rate: float
    """Share of non-zero values over channels and tokens."""
    silent: float
    """Share of channels that never fire in the sample."""
    saturated: float
    """Share of channels that fire at 99 % of the tokens or more: a neuron may need a row's first token to charge."""


@dataclass(frozen=True)
class ClassShare:
    """What one class of synaptic operation holds; shares are of all weight matrices."""

    matrices: int
    weights: int
    weight_share: float
    dense: float
    dense_share: float
    effective: float


@dataclass(frozen=True)
class Energy:
    """Picojoules per token from counted operations and constants; ``ratio`` is the dense twin divided by this row."""

    label: str
    synaptic_pj: float
    other_pj: float
    """The other operations, each priced as one MAC: an upper bound, charged to the twin as well (one spike step)."""
    ratio: float | None
    ratio_with_other: float | None


@dataclass(frozen=True)
class NeuroBench:
    """NeuroBench 2.3's metrics under its definitions; a sample is one row of tokens."""

    parameter_count: int
    footprint_bytes: int
    connection_sparsity: float
    activation_sparsity: float
    synaptic_operations_per_token: dict[str, float]
    synaptic_operations_per_sample: dict[str, float]
    membrane_updates_per_token: float | None
    membrane_updates_per_sample: float | None


@dataclass(frozen=True)
class Explanation:
    """The answer to "where are the spikes?": operations, spike sites, NeuroBench's metrics, classes and energy."""

    model: str
    sample: str
    """Which tokens were run."""
    tokens: int
    samples: int
    ops: tuple[OpCount, ...]
    sites: tuple[SiteCount, ...]
    neurobench: NeuroBench
    classes: dict[OpClass, ClassShare]
    other_ops: dict[str, int]
    """Per token, by kind of operation: what NeuroBench leaves out."""
    other_parameters: int
    """Parameters outside weight matrices: embedding table, norms, mixes, decays."""
    spikes_per_token: float
    energy: tuple[Energy, ...]
    notes: tuple[str, ...]

    @property
    def additions_per_product(self) -> float | None:
        """Return the additions that stand for one product of the dense twin, in the matrices that spikes drive.

        It is the firing rate times the spike steps, less what zero weights save; None where spikes drive no matrix.
        Additions cost less up to ``E_MAC / E_AC`` of them.
        """
        driven = [op for op in self.ops if op.op_class in ("AC", "integer-AC")]
        products = sum(op.dense / op.steps for op in driven)
        return sum(op.accumulations for op in driven) / products if products else None

    @property
    def answer(self) -> str:
        """Say in one sentence where the spikes are."""
        driven = [self.classes["AC"], self.classes["integer-AC"]]
        matrices = sum(share.matrices for share in self.classes.values())
        if not self.sites:
            return f"Nowhere: this model has no spikes; all {matrices} weight matrices read real numbers (100 % MAC)."
        sites = "1 site" if len(self.sites) == 1 else f"{len(self.sites)} sites"
        weights = sum(share.weight_share for share in driven)
        graded = {name for site in self.sites if site.kind == "graded" for name in site.feeds}
        fed = [op for op in self.ops if op.op_class == "MAC" and op.name in graded]
        if fed and not any(share.matrices for share in driven):
            return (
                f"In front of {len(fed)} of {matrices} weight matrices, as graded events: {percent(_zeros(fed))} of "
                "their inputs are zero and can be skipped, but events carry values to multiply (0 % AC, 100 % MAC)."
            )
        if not any(share.matrices for share in driven):
            readers = Counter(kind for site in self.sites for kind in site.feeds_kinds)
            reads = " and ".join(_readers(kind, n) for kind, n in readers.most_common()) or "nothing"
            return (
                f"In front of no weight matrix: the spikes of {sites} go to {reads}, "
                f"and all {matrices} matrices read real numbers (0 % AC, 100 % MAC)."
            )
        dense = sum(share.dense_share for share in driven)
        fed = [op for op in self.ops if op.op_class in ("AC", "integer-AC")]
        return (
            f"In front of {sum(share.matrices for share in driven)} of {matrices} weight matrices: spikes drive "
            f"{percent(weights)} of the matrix weights and {percent(dense)} of the dense synaptic operations, "
            f"where {percent(1 - _zeros(fed))} of the inputs fire."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-able form, with ``answer`` and the words that go with the energy."""
        constants = {"mac_pj": E_MAC, "ac_pj": E_AC}
        return {
            "answer": self.answer,
            **dataclasses.asdict(self),
            "additions_per_product": self.additions_per_product,
            "energy_words": ENERGY_WORDS,
            "energy_constants": constants,
        }

    def render(self, *, full: bool = False) -> RenderableType:
        """Return rich tables, readable at 100 columns; ``full`` lists every operation and site instead of groups."""
        tables: RenderableType = explanation_tables(self.to_dict(), full=full)
        return tables


_READERS = {
    "residual": ("addition", " to the real residual stream"),
    "norm": ("normalisation", ""),
    "elementwise": ("element-wise operation", ""),
    "token_shift": ("token shift", ""),
    "wkv": ("time mix", ""),
    "pool": ("pooling", ""),
}


def _zeros(ops: list[OpCount]) -> float:
    """Return the share of zeros among what arrives at ``ops``, each weighed by its operations."""
    return sum((op.input_zeros or 0.0) * op.dense for op in ops) / sum(op.dense for op in ops)


def _readers(kind: str, n: int) -> str:
    word, where = _READERS.get(kind, (kind, ""))
    return f"{n} {word}{'' if n == 1 else 'es' if word.endswith('x') else 's'}{where}"


def explain(model: SpikingLanguageModel, tokens: Any = None, *, sample: str | None = None) -> Explanation:
    """Run ``model`` on ``tokens``; say of each operation what feeds it, what it emits, its cost and where it can run.

    Parameters: ``tokens (B, S)`` or ``(N,)``, which is cut into rows of the model's context length, each from a fresh
    state; None takes :func:`sample_tokens`. ``sample`` says in words what the tokens are.
    Raises: PluginError naming the op or site whose declaration the tensors contradict; DataError for bad tokens.
    """
    if tokens is None:
        tokens, sample = sample_tokens(vocab_size(model))
    rows = rows_of(model, tokens)
    graph = model.graph()
    watch = Watch(model, graph)
    sites = SiteTaps(model)
    with watching(model, watch):
        for group in groups(rows):
            output = observe(model, group.to(device_of(model)))
            sites.add(output.spikes or {})
            watch.add_arrived(output.arrived or {})
    watch.check()
    n_tokens, n_samples = rows.numel(), len(rows)
    steps = _steps(graph, watch, n_tokens)
    ops = tuple(_op_count(op, graph, watch, sites, n_tokens, steps[op.name]) for op in graph)
    site_counts = tuple(_site_count(site, graph, sites) for site in sites.sites.values())
    classes = _classes(ops)
    other_ops: dict[str, int] = defaultdict(int)
    for op in ops:
        if op.other_ops:
            other_ops[op.kind] += op.other_ops
    parameters = _parameter_count(model, watch)
    matrix_weights = sum(p.numel() for p in {id(t.weight): t.weight for t in watch.linears.values()}.values())
    found = Explanation(
        model=getattr(type(model.config), "model_type", type(model).__name__),
        sample=sample or "the given tokens",
        tokens=n_tokens,
        samples=n_samples,
        ops=ops,
        sites=site_counts,
        neurobench=_neurobench(model, ops, watch, sites, n_tokens, n_samples),
        classes=classes,
        other_ops=dict(other_ops),
        other_parameters=parameters - matrix_weights,
        spikes_per_token=sum(float(fired.sum()) for fired in sites.fired.values()) / n_tokens,
        energy=_energy(ops),
        notes=tuple(watch.notes),
    )
    return dataclasses.replace(found, notes=(*found.notes, *_break_even(found, graph)))


def sample_tokens(vocab_size: int, n: int = 512, *, tokenizer: Any = None) -> tuple[Tensor, str]:
    """Return ``n`` token ids to look at a model with, and what they are in words.

    They are text of the embedded corpus's validation part: encoded with ``tokenizer`` if there is one, else its bytes
    modulo the vocabulary. Without the corpus, or where the tokenizer does not know its characters, they are random ids
    (seed 0).
    """
    corpus_words = "of the embedded corpus austen3 (validation part)"
    try:
        from spiking_lm import data

        corpus = data.load({"type": "austen3", "tokenizer": {"type": "byte"}})
        assert isinstance(corpus, data.TextData)
        text = np.asarray(corpus.valid.tokens[: 8 * n], dtype=np.uint8)
        if tokenizer is not None:
            ids = np.asarray(tokenizer.encode(text.tobytes().decode("utf-8", errors="ignore")))[:n]
            return torch.from_numpy(ids.astype(np.int64)), f"{len(ids)} tokens {corpus_words}"
    except SpikingLMError:  # a model can be looked at without the corpus; the words say so
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocab_size, (n,), generator=generator), f"{n} random token ids (seed 0)"
    modulo = f" modulo {vocab_size}" if vocab_size < 256 else ""
    ids = text[:n].astype(np.int64) % vocab_size
    return torch.from_numpy(ids), f"{len(ids)} bytes{modulo} {corpus_words}"


# --- Counting ---------------------------------------------------------------------------------------------------------


def _steps(graph: LMGraph, watch: Watch, n_tokens: int) -> dict[str, float]:
    """Return in how many spike steps per token each op ran: of matrices as seen, of the others their matrices' mean."""
    seen = {
        op.name: watch.linears[op.name].dense / n_tokens / watch.linears[op.name].weight.numel()
        for op in graph
        if op.steps > 1 and op.kind == "linear"
    }
    mean = sum(seen.values()) / len(seen) if seen else None
    return {op.name: 1.0 if op.steps == 1 else seen.get(op.name, mean or float(op.steps)) for op in graph}


def _break_even(found: Explanation, graph: LMGraph) -> tuple[str, ...]:
    """Say whether additions are cheaper than the twin's products, where tokens take several spike steps."""
    additions = found.additions_per_product
    if additions is None or all(op.steps == 1 for op in found.ops):
        return ()
    most = E_MAC / E_AC
    verdict = "fewer" if additions < most else "MORE"
    words = (
        f"spikes make {additions:.2f} additions for each product of the dense twin (firing rate times spike steps); "
        f"break-even is at {most:.1f}, so that these matrices cost {verdict} picojoules than the twin's"
    )
    built = found.energy[1]
    if built.ratio_with_other is not None and built.ratio_with_other < 1:
        words += (
            f". With all operations the model costs {1 / built.ratio_with_other:.2f} times as much as its dense twin"
        )
    taken, most_steps = max((op.steps, graph[op.name].steps) for op in found.ops if graph[op.name].steps > 1)
    if taken < 0.999 * most_steps:
        words += f". Texts that settled early took {taken:.1f} of {most_steps} spike steps on average"
    return (words,)


def _op_count(op: Op, graph: LMGraph, watch: Watch, sites: SiteTaps, n_tokens: int, steps: float) -> OpCount:
    declared = graph.input_kinds(op)
    output = sites.streams.get(op.name) or (watch.outputs[op.name] if op.name in watch.outputs else Stream())
    agree(f"graph: op {op.name!r} emits", op.emits, output)
    tap = watch.linears.get(op.name)
    source = tap.input if tap else Stream()
    widest = max(declared, key=lambda kind: RANK.get(kind, 3))
    if tap:
        agree(f"graph: op {op.name!r} reads", widest, source)
    op_class = _class_of(source, widest) if tap else None
    return OpCount(
        name=op.name,
        kind=op.kind,
        inputs=op.inputs,
        declared_inputs=declared,
        seen_input=source.kind,
        input_zeros=source.share_of_zeros,
        emits=op.emits,
        seen_output=output.kind,
        output_zeros=output.share_of_zeros,
        weights=tap.weight.numel() if tap else 0,
        nonzero_weights=int(tap.fan_out.sum()) if tap else 0,
        dense=tap.dense / n_tokens if tap else 0.0,
        effective_acs=tap.effective_acs / n_tokens if tap else 0.0,
        effective_macs=tap.effective_macs / n_tokens if tap else 0.0,
        accumulations=tap.accumulations / n_tokens if tap and op_class != "MAC" else 0.0,
        other_ops=round(op.other_ops * steps),
        op_class=op_class,
        runs_on=_runs_on(op, op_class),
        steps=steps,
    )


def _site_count(site: SpikeSite, graph: LMGraph, sites: SiteTaps) -> SiteCount:
    kinds = {op.name: op.kind for op in graph}
    for reader in site.feeds:
        if reader not in kinds:
            raise PluginError(f"spike site {site.name!r} feeds {reader!r}, which is no op of the graph")
    fired, steps = sites.fired[site.name], sites.steps[site.name]
    return SiteCount(
        name=site.name,
        kind=site.kind,
        feeds=site.feeds,
        feeds_kinds=tuple(kinds[reader] for reader in site.feeds),
        channels=fired.numel(),
        rate=float(fired.sum()) / (fired.numel() * steps),
        silent=float((fired == 0).double().mean()),
        saturated=float((fired >= ALWAYS * steps).double().mean()),
    )


def _class_of(source: Stream, declared: ValueKind) -> OpClass:
    """Class an operation by what was seen; where only zeros flowed, which says nothing, by what was declared."""
    kind = declared if source.zeros == source.elements else source.kind
    rank = RANK.get(kind or "real", 3)
    return "AC" if rank <= RANK["ternary"] else "integer-AC" if rank == RANK["integer"] else "MAC"


def _runs_on(op: Op, op_class: OpClass | None) -> Placement:
    """Say where an operation can run.

    neuromorphic: neurons, and synapses that only spikes drive (AC, integer-AC). host: the embedding table, looked up
    where the token ids are. embedded-core: everything that needs arithmetic on real values.
    """
    if op.kind == "neuron" or op_class in ("AC", "integer-AC"):
        return "neuromorphic"
    return "host" if op.kind == "embedding" else "embedded-core"


def _classes(ops: tuple[OpCount, ...]) -> dict[OpClass, ClassShare]:
    weights = sum(op.weights for op in ops) or 1
    dense = sum(op.dense for op in ops) or 1
    shares: dict[OpClass, ClassShare] = {}
    for name in CLASSES:
        own = [op for op in ops if op.op_class == name]
        own_weights, own_dense = sum(op.weights for op in own), sum(op.dense for op in own)
        shares[name] = ClassShare(
            matrices=len(own),
            weights=own_weights,
            weight_share=own_weights / weights,
            dense=own_dense,
            dense_share=own_dense / dense,
            effective=sum(op.effective_acs + op.effective_macs for op in own),
        )
    return shares


def _energy(ops: tuple[OpCount, ...]) -> tuple[Energy, ...]:
    other = sum(op.other_ops for op in ops) * E_MAC
    twin_other = sum(op.other_ops / op.steps for op in ops) * E_MAC
    twin = sum(op.dense / op.steps for op in ops) * E_MAC
    adds = sum(op.accumulations for op in ops) * E_AC
    real = [op for op in ops if op.op_class == "MAC"]
    built = adds + sum(op.dense for op in real) * E_MAC
    skipping = adds + sum(op.effective_macs * E_MAC + op.effective_acs * E_AC for op in real)
    rows = (
        ("dense twin, every product a MAC", twin, twin_other),
        ("as built, spikes add and real inputs are dense", built, other),
        ("as built, zeros of real inputs skipped too", skipping, other),
    )
    return tuple(
        Energy(
            label=label,
            synaptic_pj=pj,
            other_pj=more,
            ratio=twin / pj if pj else None,
            ratio_with_other=(twin + twin_other) / (pj + more) if pj + more else None,
        )
        for label, pj, more in rows
    )


def _neurobench(
    model: nn.Module, ops: tuple[OpCount, ...], watch: Watch, sites: SiteTaps, n_tokens: int, n_samples: int
) -> NeuroBench:
    per_token = {
        "Effective_MACs": sum(op.effective_macs for op in ops),
        "Effective_ACs": sum(op.effective_acs for op in ops),
        "Dense": sum(op.dense for op in ops),
    }
    streams = [*sites.streams.values(), watch.activations]
    elements = sum(stream.elements for stream in streams)
    updates = watch.membrane_updates if watch.membranes else None
    return NeuroBench(
        parameter_count=_parameter_count(model, watch),
        footprint_bytes=footprint(model),
        connection_sparsity=connection_sparsity(
            model, [tap.weight for tap in watch.linears.values() if not isinstance(tap.module, CONNECTIONS)]
        ),
        activation_sparsity=sum(stream.zeros for stream in streams) / elements if elements else 0.0,
        synaptic_operations_per_token=per_token,
        synaptic_operations_per_sample={name: n * n_tokens / n_samples for name, n in per_token.items()},
        membrane_updates_per_token=None if updates is None else updates / n_tokens,
        membrane_updates_per_sample=None if updates is None else updates / n_samples,
    )


def _parameter_count(model: nn.Module, watch: Watch) -> int:
    """Count the parameters, and the weights of matrices that are stored packed, in buffers."""
    trained = {p.data_ptr() for p in model.parameters()}
    packed = [
        tap.weight
        for tap in watch.linears.values()
        if tap.weight.data_ptr() not in trained
        and (tap.module is None or "weight" not in dict(tap.module.named_parameters(recurse=False)))
    ]
    return sum(p.numel() for p in model.parameters()) + sum(weight.numel() for weight in packed)


def footprint(model: nn.Module) -> int:
    """Return NeuroBench's footprint in bytes: parameters and buffers, each element at its stored size."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def connection_sparsity(model: nn.Module, more: Iterable[Tensor] = ()) -> float:
    """Return NeuroBench's share of zeros among the weights of linear, convolution and recurrent layers, to 4 decimals.

    Biases are left out, except those of recurrent layers, which NeuroBench counts. ``more`` are matrices that no such
    layer holds.
    """
    zeros = weights = 0
    for matrix in more:
        weights += matrix.numel()
        zeros += matrix.numel() - int(torch.count_nonzero(matrix))
    for module in model.modules():
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            counted: list[Tensor] = list(module.parameters())
        elif isinstance(module, CONNECTIONS):
            counted = [multiplied(module)]
        else:
            continue
        weights += sum(w.numel() for w in counted)
        zeros += sum(w.numel() - int(torch.count_nonzero(w)) for w in counted)
    return round(zeros / weights, 4) if weights else 0.0
