"""The contract between the core, the models and the neurons.

Tokens are batch-first ``(B, S)``. State is explicit: a pytree (nested tuples, NamedTuples and dicts of tensors whose
first dimension is the batch) that is passed in and returned, never kept in a module. The laws that every model and
neuron obeys are tested by :mod:`spiking_lm.testing`.

What a model can do is in its ``capabilities``: ``lm`` (forward, step: causal), ``encode`` (encode), ``mlm``
(predict_masked), ``classify`` (classify), ``seq2seq`` (read, then forward and step from the state of a source;
score_pairs), ``clips`` (frames of events in place of tokens).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from spiking_lm.config import ModelConfig, NeuronConfig, SurrogateConfig
from spiking_lm.errors import UsageError
from spiking_lm.graph import LMGraph
from spiking_lm.records import SpikeKind

State = Any
"""A pytree of tensors; every tensor has the batch as its first dimension."""


@dataclass(frozen=True)
class SpikeSite:
    """A place in the model that emits spikes: its name, what kind, and the ops of the graph that it feeds."""

    name: str
    kind: SpikeKind
    feeds: tuple[str, ...] = ()


@dataclass
class LMOutput:
    """What a model returns: ``logits (B, S, V)``, the state after the last token, and on request the spikes."""

    logits: Tensor
    state: State
    spikes: dict[str, Tensor] | None = None
    """Site name -> ``(B, S, N)``, when asked for; ``(B, S, T, N)`` where each token takes T spike steps."""
    aux_losses: dict[str, Tensor] = field(default_factory=dict)
    """Scalars that training adds to the cross-entropy."""
    arrived: dict[str, Tensor] = field(default_factory=dict)
    """With the spikes: op name -> what its weight matrix read, ``(B, S, n_in)``, where no ``nn.Linear`` holds it."""


class Encoding(NamedTuple):
    """What an encoder makes of right-padded texts; in spiking models, rates or means over the spike steps."""

    hidden: tuple[Tensor, ...]
    """L + 1 tensors ``(B, S, H)``: after the embedding, then after each layer."""
    scores: tuple[Tensor, ...]
    """L tensors ``(B, heads, S, S)``: scaled attention scores before the softmax; places that are masked, among them
    every column of a padding token, are at most -100. None at all, ``()``, in a model without attention."""
    pooled: Tensor
    """``(B, H)``: what the classification head reads."""
    spikes: dict[str, Tensor] | None = None
    """As in :class:`LMOutput`, when asked for."""
    arrived: dict[str, Tensor] | None = None
    """As in :class:`LMOutput`, with the spikes."""


class SpikingLanguageModel(nn.Module, ABC):
    """A spiking language model. Subclasses take their config as the only constructor argument."""

    config: ModelConfig
    capabilities: frozenset[str] = frozenset({"lm"})

    @abstractmethod
    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Return the state before the first token, for ``batch_size`` independent sequences."""

    @abstractmethod
    def forward(self, tokens: Tensor, state: State | None = None, *, return_spikes: bool = False) -> LMOutput:
        """Score ``tokens (B, S)``, going on from ``state`` (None: from the start of a text)."""

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """Feed one token per row, ``token (B,)``; return ``logits (B, V)`` and the next state."""
        output = self(token[:, None], state)
        return output.logits[:, 0], output.state

    @abstractmethod
    def spike_sites(self) -> list[SpikeSite]:
        """List every place that emits spikes."""

    @abstractmethod
    def graph(self) -> LMGraph:
        """Describe one token's computation as typed operations, for accounting and lowering."""

    def read(self, source: Tensor, lengths: Tensor) -> State:
        """Return the state before the first token of a target: right-padded ``source (B, S)``, true ``lengths (B,)``.

        :meth:`forward` and :meth:`step` go on from it, as a causal model does from any state; without one they refuse.
        What stands behind a row's length influences nothing. The state need not let gradients through, and the spikes
        that :meth:`forward` returns are those of the target's sites.
        """
        raise self._cannot("reads no sources")

    def score_pairs(self, source: Tensor, lengths: Tensor, target: Tensor, *, return_spikes: bool = False) -> LMOutput:
        """Score ``target (B, N)`` after right-padded ``source (B, S)`` in one pass, as training needs it.

        The same as ``forward(target, read(source, lengths))``, with gradients to every weight, and with the spikes of
        the source too, ``(B, S, N)``.
        """
        raise self._cannot("reads no sources")

    def classify(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Return class logits ``(B, num_classes)`` for right-padded ``tokens (B, S)`` with true ``lengths (B,)``."""
        raise self._cannot("has no classification head")

    def classify_pooled(self, pooled: Tensor) -> Tensor:
        """Return class logits ``(B, num_classes)`` of ``Encoding.pooled``: what :meth:`classify` does after encoding.

        Where one pass must serve both (distillation, firing rates beside scores), it is :meth:`encode` and then this.
        """
        raise self._cannot("has no classification head")

    def classify_also(self, tokens: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Return class logits that other readings of the same network give, by name; an evaluation reports them too.

        For example ``{"clamp network": ...}`` beside the logits of its spikes; most models have none.
        """
        return {}

    def encode(self, tokens: Tensor, lengths: Tensor, *, return_spikes: bool = False) -> Encoding:
        """Return the hidden states of right-padded ``tokens (B, S)`` with true ``lengths (B,)``.

        What stands behind a row's length influences nothing before it, nor ``pooled``.
        """
        raise self._cannot("encodes no texts")

    def predict_masked(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Return logits ``(B, S, V)`` of the token at every place of right-padded ``tokens (B, S)``, itself masked."""
        raise self._cannot("has no head for masked tokens")

    def _cannot(self, what: str) -> UsageError:
        return UsageError(f"{type(self).__name__} {what} (capabilities: {sorted(self.capabilities)})")

    def expect(self, stored: Mapping[str, Tensor]) -> None:
        """Make room for the tensors of a checkpoint that follow in shape and name from what they hold, not the config.

        Called before ``stored``, a whole state dict, is loaded into a model that was just made from its config.
        """

    def to_reference(self, *, grads: bool = False) -> dict[str, Tensor]:
        """Return the weights, or their gradients, under the state-dict keys of the paper's own code."""
        raise UsageError(f"{type(self).__name__} has no reference state-dict format", hint="use save_model")

    def num_parameters(self) -> int:
        """Count the weights, each once, whatever they are stored as."""
        return sum(p.numel() for p in self.parameters())

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return optimizer groups: matrices decay, vectors (norms, mixes, decays, thresholds) do not.

        A group may have ``lr_scale``: its learning rate as a multiple of everything else's; 0 freezes it.
        """
        trainable = [p for p in self.parameters() if p.requires_grad]
        matrices = [p for p in trainable if p.squeeze().ndim >= 2]
        vectors = [p for p in trainable if p.squeeze().ndim < 2]
        return [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]


class SpikingEncoder(SpikingLanguageModel):
    """A model that reads whole texts in both directions, so that it cannot say what comes next.

    It writes :meth:`encode`, with the capability ``classify`` :meth:`classify_pooled`, and with ``mlm``
    :meth:`predict_masked`. A model that is an encoder in some configurations alone inherits from this too, sets its own
    ``capabilities``, and calls ``super().forward()`` and the like where it is not causal. ``config.ctx_len`` is the
    longest text that it reads, where there is such a length.
    """

    capabilities = frozenset({"encode"})

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Refuse: nothing is carried from token to token."""
        raise self._cannot("reads whole texts and has no state")

    def forward(self, tokens: Tensor, state: State | None = None, *, return_spikes: bool = False) -> LMOutput:
        """Refuse: a token that has seen what follows it cannot be predicted from what precedes it."""
        raise self._cannot("reads whole texts, so that it scores no next tokens: call encode()")

    @abstractmethod
    def encode(self, tokens: Tensor, lengths: Tensor, *, return_spikes: bool = False) -> Encoding:
        """Return the hidden states of right-padded ``tokens (B, S)`` with true ``lengths (B,)``."""

    def classify(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Return class logits ``(B, num_classes)`` for right-padded ``tokens (B, S)`` with true ``lengths (B,)``."""
        if "classify" not in self.capabilities:
            raise self._cannot("has no classification head")
        return self.classify_pooled(self.encode(tokens, lengths).pooled)


class SpikingClipClassifier(SpikingLanguageModel):
    """A spiking network that says what clips of events show: a frame stands where a language model reads a token.

    The laws are the same: explicit state, forward a scan of step, causality, independent rows. There is no vocabulary,
    so what works on texts refuses such a model, whose only capability is ``clips``.
    """

    capabilities = frozenset({"clips"})

    @abstractmethod
    def forward(
        self, frames: Tensor, state: State | None = None, *, lengths: Tensor | None = None, return_spikes: bool = False
    ) -> LMOutput:
        """Score the classes after each frame: frames ``(B, T, P, H, W)`` -> logits ``(B, T, num_classes)``.

        ``lengths (B,)`` keeps the frames behind a clip's end out of the auxiliary losses; it changes nothing else.
        """

    def classify(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """Return class logits ``(B, num_classes)``, averaged over the true ``lengths (B,)`` of the clips."""
        return mean_over_steps(self(frames, lengths=lengths).logits, lengths)

    def graph(self) -> LMGraph:
        """Refuse: a graph describes the computation of one token."""
        raise UsageError(f"{type(self).__name__} reads frames of events: it has no graph of operations per token")


def mean_over_steps(x: Tensor, lengths: Tensor) -> Tensor:
    """Return the mean of ``x (B, T, N)`` over the first ``lengths (B,)`` steps of each row, ``(B, N)``."""
    steps = torch.arange(x.shape[1], device=x.device)
    return (x * (steps < lengths[:, None])[..., None]).sum(1) / lengths[:, None]


def longest_text(model: SpikingLanguageModel) -> int | None:
    """Return how many tokens of a text a model reads at most; None where it reads on and on."""
    bounded = isinstance(model, SpikingEncoder) or "seq2seq" in model.capabilities
    return getattr(model.config, "ctx_len", None) if bounded else None


def observe(model: SpikingLanguageModel, tokens: Tensor, lengths: Tensor | None = None) -> LMOutput | Encoding:
    """Run ``tokens (B, S)`` in the way that the model reads texts, and return what it gives, its spikes with it.

    ``lengths (B,)`` are for encoders: None says that no row is padded. A model of pairs reads each text as a source,
    and as its own target.
    """
    if "lm" in model.capabilities:
        output: LMOutput = model(tokens, return_spikes=True)
        return output
    if lengths is None:
        lengths = torch.full((tokens.shape[0],), tokens.shape[1], device=tokens.device)
    if "seq2seq" in model.capabilities:
        return model.score_pairs(tokens, lengths, tokens, return_spikes=True)
    return model.encode(tokens, lengths, return_spikes=True)


@dataclass(frozen=True)
class LIFDynamics:
    """The declared dynamics of a leaky integrate-and-fire neuron, enough to choose a kernel or to lower it.

    h_t = beta v_{t-1} + gain x_t (+ (1 - beta) v_reset when v_reset is not 0); s_t = [h_t ``compare`` threshold];
    v_t = v_reset where s_t else h_t, or h_t - s_t threshold when ``v_reset`` is None (soft reset).
    """

    beta: float
    gain: float
    threshold: float
    v_reset: float | None = 0.0
    compare: str = ">="
    surrogate: SurrogateConfig = SurrogateConfig()
    detach_reset: bool = False

    def run(self, x: Tensor, v: Tensor | None, *, final_only: bool = True) -> tuple[Tensor, Tensor]:
        """Run the kernel on ``x (B, T, N)`` from membranes ``v (B, N)``; return spikes ``(B, T, N)`` and membranes.

        The membranes are the last ones, ``(B, N)``, or with ``final_only=False`` those after every step, ``(B, T, N)``.
        """
        from spiking_lm.kernels import lif_scan

        declared = {field.name: getattr(self, field.name) for field in fields(self)}
        spikes, membranes = lif_scan(x.transpose(0, 1), v, **declared, final_only=final_only)
        return spikes.transpose(0, 1), membranes if final_only else membranes.transpose(0, 1)


@dataclass(frozen=True)
class EGRUDynamics:
    """The declared dynamics of event-based gated units (Subramoney et al., arXiv 2206.06178), enough to lower them.

    The op reads two ``linear`` ops in the order (input, recurrent), each emitting 3 H values in blocks z, r, g::

        z = sigmoid(a_z + q_z)      r = sigmoid(a_r + q_r)      g = tanh(a_g + r q_g)
        p_t = z c_{t-1} + (1 - z) g                    mixed with c_{t-1} by ``zoneout``: zoneout c + (1 - zoneout) p
        y_t = p_t [p_t > threshold]                    what is emitted
        c_t = p_t - threshold [p_t > threshold]

    ``parameters`` of the op names the ``threshold``, (H,), in the model's state dict; it holds as clipped to [0, 1].
    ``state`` of the op are c, y, the trace of y, ``trace_decay trace + (1 - trace_decay) y``, and [p_t > threshold].
    """

    hidden_size: int
    zoneout: float = 0.0
    trace_decay: float = 0.9


@dataclass(frozen=True)
class GIFDynamics:
    """The declared dynamics of a Generalized Integrate-and-Fire neuron, which counts spikes; enough to lower it.

    h_t = v_{t-1} + x_t; s_t = clip(floor(h_t / threshold), 0, levels), and with ``signed`` the same of -h_t, negative;
    v_t = h_t - s_t threshold.
    """

    levels: int
    threshold: float
    signed: bool = False


@dataclass(frozen=True)
class LayerNormDynamics:
    """``(x - mean) / sqrt(variance + eps)`` over all channels, times ``weight`` plus ``bias``, parameters of the op."""

    eps: float


@dataclass(frozen=True)
class TokenShiftDynamics:
    """``mix x_t + (1 - mix) x_{t-1}``, per channel; parameter ``mix``. Before the first token x is 0."""


@dataclass(frozen=True)
class WKVDynamics:
    """RWKV-4's time mix (:func:`spiking_lm.kernels.wkv`) of keys and values; parameters ``decay`` and ``first``."""


@dataclass(frozen=True)
class SigmoidGateDynamics:
    """The first input times the sigmoid of the second."""


@dataclass(frozen=True)
class SquaredReLUDynamics:
    """``max(x, 0)^2``."""


class Neuron(nn.Module, ABC):
    """A population of neurons along the sequence: one step is one token.

    ``dynamics`` is set when :func:`spiking_lm.kernels.lif_scan` computes exactly what :meth:`step` does; ``forward``
    then runs the kernel. Without it, ``forward`` scans :meth:`step`, which remains the definition either way.
    """

    spike_kind: ClassVar[SpikeKind] = "binary"
    dynamics: LIFDynamics | None = None

    def __init__(self, config: NeuronConfig, *, size: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.size = size

    @abstractmethod
    def init_state(
        self, shape: tuple[int, ...], *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """Return the resting state of a population of ``shape``, usually ``(B, N)``."""

    @abstractmethod
    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Advance one time step: input ``x (B, N)`` -> spikes ``(B, N)`` and the next state."""

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run ``x (B, T, N)``; return spikes ``(B, T, N)`` and the state after the last step."""
        if state is None:
            state = self.init_state((x.shape[0], *x.shape[2:]), device=x.device, dtype=x.dtype)
        if self.dynamics is not None:
            return self.dynamics.run(x, state)
        return self.scan(x, state)

    def scan(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Run :meth:`step` over ``x (B, T, N)``: the definition that a kernel must equal."""
        spikes = []
        for x_t in x.unbind(1):  # unbind, not x[:, t]: indexing under autograd costs O(T^2)
            s_t, state = self.step(x_t, state)
            spikes.append(s_t)
        return torch.stack(spikes, 1) if spikes else torch.zeros_like(x), state


def map_state(function: Callable[[Tensor], Tensor], state: State) -> State:
    """Apply ``function`` to every tensor of a state, keeping its structure."""
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, dict):
        return {key: map_state(function, value) for key, value in state.items()}
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        return type(state)(*(map_state(function, value) for value in state))
    if isinstance(state, (tuple, list)):
        return type(state)(map_state(function, value) for value in state)
    if state is None:
        return None
    raise TypeError(f"a state holds tensors in tuples, lists and dicts, not {type(state).__name__}")


def detach_state(state: State) -> State:
    """Return the state cut off from the graph, for carrying it from one training chunk to the next."""
    return map_state(Tensor.detach, state)


def select_rows(state: State, rows: Tensor) -> State:
    """Return the state of some rows of the batch, ``rows`` being an index tensor."""
    return map_state(lambda tensor: tensor[rows], state)
