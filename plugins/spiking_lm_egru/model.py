"""The EGRU language model and its GRU and LSTM twins in one file (Subramoney et al., arXiv 2206.06178).

A stack of recurrent layers between an embedding and a decoder that share one matrix, regularised as in AWD-LSTM::

    tokens -> embedding -> layer 0 -> ... -> layer L-1 -> [projection ->] decoder

What an EGRU layer hands on, to itself at the next step and to whatever reads it, are graded events: mostly zeros. So
every recurrent matrix and every matrix behind the first layer reads events; layer 0 reads the real embedding. Inside,
tensors are time-major ``(T, B, N)``, the layout of the kernels.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spiking_lm.errors import UsageError
from spiking_lm.graph import LMGraph, Op
from spiking_lm.interfaces import EGRUDynamics, LMOutput, SpikeSite, SpikingLanguageModel, State
from spiking_lm.watch import check_range
from spiking_lm_egru.config import EGRUConfig
from spiking_lm_egru.functional import TRACE_DECAY, EGRUState
from spiking_lm_egru.module import EGRU

GATES = {"egru": 3, "gru": 3, "lstm": 4}
"""Blocks of rows in the weight matrices of a cell."""

POINTWISE = {"egru": 16, "gru": 11, "lstm": 13}
"""Elementary operations per unit and step outside the matrices; EGRU: a GRU's, and 5 for threshold and reset."""


class GRUState(NamedTuple):
    """What a GRU layer remembers, ``(B, H)``."""

    h: Tensor


class LSTMState(NamedTuple):
    """What an LSTM layer remembers, each ``(B, H)``."""

    h: Tensor
    c: Tensor


class Decoder(nn.Module):
    """The matrices behind the last layer; ``projection`` is None where there is none."""

    def __init__(self, config: EGRUConfig) -> None:
        super().__init__()
        self.projection = nn.Linear(config.n_hidden, config.n_embd) if config.projection else None
        self.decoder = nn.Linear(config.n_embd, config.vocab_size)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)


class EGRULanguageModel(SpikingLanguageModel):
    """The language model of EGRU; ``config.cell`` chooses the twins, which have no events and no spike sites."""

    config: EGRUConfig

    def __init__(self, config: EGRUConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.n_embd)
        nn.init.uniform_(self.embeddings.weight, -0.1, 0.1)
        if "last_word_as_padding" in config.reference_quirks:
            self.embeddings.padding_idx = config.vocab_size - 1
        self.rnns = nn.ModuleList(_layer(config, n_in, n_out) for n_in, n_out in layer_sizes(config))
        self.decoder = Decoder(config)
        if config.tie_weights:
            self.decoder.decoder.weight = self.embeddings.weight

    def layers(self) -> list[EGRU | nn.GRU | nn.LSTM]:
        """Return the recurrent layers."""
        return cast("list[EGRU | nn.GRU | nn.LSTM]", list(self.rnns))

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Any, ...]:
        """Return zeros: one :class:`EGRUState`, :class:`GRUState` or :class:`LSTMState` per layer, all ``(B, H)``."""

        def rest(rnn: EGRU | nn.GRU | nn.LSTM) -> Any:
            if isinstance(rnn, EGRU):
                return rnn.init_state(batch_size, device=device, dtype=dtype)
            zeros = rnn.get_parameter("weight_hh_l0").new_zeros(batch_size, rnn.hidden_size, device=device, dtype=dtype)
            return LSTMState(zeros, zeros) if isinstance(rnn, nn.LSTM) else GRUState(zeros)

        return tuple(rest(rnn) for rnn in self.layers())

    def forward(self, tokens: Tensor, state: State | None = None, *, return_spikes: bool = False) -> LMOutput:
        """Score ``tokens (B, S)``; returns logits ``(B, S, V)``, the next state and on request the events.

        In training, ``aux_losses`` holds the activity penalties. Raises UsageError for tokens of another shape,
        DataError for ids beyond the vocabulary.
        """
        if state is not None and self.config.cell == "egru" and self.config.state_carry == "y_only":
            state = tuple(EGRUState(*map(torch.zeros_like, layer))._replace(y=layer.y) for layer in state)
        return self._score(tokens, state, return_spikes)

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """Feed one token per row, ``token (B,)``; return ``logits (B, V)`` and the next state, all of it carried."""
        output = self._score(token[:, None], state, return_spikes=False)
        return output.logits[:, 0], output.state

    def _score(self, tokens: Tensor, state: State | None, return_spikes: bool) -> LMOutput:
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise UsageError(
                f"EGRU reads token ids (B, S) with S at least 1, not {tuple(tokens.shape)}",
                hint="tokens[None] makes a batch of one",
            )
        config = self.config
        if state is None:
            state = self.init_state(tokens.shape[0], device=tokens.device)
        after: list[Any] = []
        spikes: dict[str, Tensor] | None = {} if return_spikes else None
        arrived: dict[str, Tensor] = {}
        losses: dict[str, Tensor] = {}
        x = self._dropout(self._embed(tokens.t()), config.dropout_emb)
        for layer, (rnn, before) in enumerate(zip(self.layers(), state, strict=True)):
            if layer:
                x = self._dropout(x, config.dropout_forward)
            y, next_state, c, o = self._layer(rnn, x, before)
            after.append(next_state)
            if spikes is not None:
                name, last = f"rnns.{layer}", before.y if isinstance(rnn, EGRU) else before.h
                arrived[f"{name}.input"] = x.transpose(0, 1)
                arrived[f"{name}.recurrent"] = torch.cat([last[None].to(y.dtype), y[:-1]]).transpose(0, 1)
                if isinstance(rnn, EGRU):
                    spikes[name] = y.transpose(0, 1)
            if self.training:
                self._add_penalties(losses, y, c, o, last=layer + 1 == config.n_layer)
            x = y
        return LMOutput(self._decode(self._dropout(x, config.dropout_last)), tuple(after), spikes, losses, arrived)

    def _embed(self, tokens: Tensor) -> Tensor:
        """Look up ``tokens (T, B)``; in training, words drop out of the vocabulary as a whole."""
        try:
            x = cast(Tensor, self.embeddings(tokens))
        except IndexError:
            check_range(tokens, self.config.vocab_size)
            raise
        if self.training and self.config.dropout_words:
            x = x * _dropped(x.new_ones(self.config.vocab_size), self.config.dropout_words)[tokens, None]
        return x

    def _dropout(self, x: Tensor, p: float) -> Tensor:
        """Drop channels of ``x (T, B, N)``: one mask for each row, the same at all steps."""
        if not self.training or p == 0:
            return x
        steps, rows, size = x.shape
        shape = (steps, 1, size) if "batch_shared_dropout" in self.config.reference_quirks else (1, rows, size)
        return x * _dropped(x.new_ones(shape), p)

    def _layer(
        self, rnn: EGRU | nn.GRU | nn.LSTM, x: Tensor, state: Any
    ) -> tuple[Tensor, Any, Tensor | None, Tensor | None]:
        """Run ``x (T, B, N)`` through a layer; return its output ``(T, B, H)`` and its next state.

        States and event flags of all steps, ``(T, B, H)``, come along where a penalty of training needs them.
        """
        config = self.config
        if not isinstance(rnn, EGRU):
            y, state = self._twin(rnn, x, state)
            return y, state, None, None
        if not self.training or not (config.alpha or config.beta or config.gamma or config.activity_penalty):
            y, state = rnn(x, state)
            return y, state, None, None
        y, steps = rnn(x, state, return_sequences=True)
        return y, EGRUState(*(sequence[-1] for sequence in steps)), steps.c, steps.o

    def _twin(self, rnn: nn.GRU | nn.LSTM, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        weights: list[Tensor] = [rnn.get_parameter(f"{name}_l0") for name in names]
        if self.training and self.config.dropout_connect:
            by_row = "row_weight_drop" in self.config.reference_quirks
            ones = torch.ones_like(weights[1][:, :1] if by_row else weights[1])
            weights[1] = weights[1] * _dropped(ones, self.config.dropout_connect)
        if len(x) == 1:  # the cells: nn.LSTM repacks its weights at every call
            if isinstance(rnn, nn.LSTM):
                state = LSTMState(*torch.lstm_cell(x[0], tuple(state), *weights))
            else:
                state = GRUState(torch.gru_cell(x[0], state.h, *weights))
            return state.h[None], state
        options = (True, 1, 0.0, rnn.training, False, False)  # bias, layers, dropout, train, bidirectional, batch first
        if isinstance(rnn, nn.LSTM):
            y, h, c = torch.lstm(x, [state.h[None], state.c[None]], weights, *options)
            return y, LSTMState(h[0], c[0])
        y, h = torch.gru(x, state.h[None], weights, *options)
        return y, GRUState(h[0])

    def _add_penalties(
        self, losses: dict[str, Tensor], y: Tensor, c: Tensor | None, o: Tensor | None, *, last: bool
    ) -> None:
        """Add a layer's activity penalties; ``y``, states ``c`` and event flags ``o`` are ``(T, B, H)``."""
        config = self.config

        def add(name: str, weight: float, value: Tensor) -> None:
            losses[name] = losses.get(name, 0.0) + weight * value

        if c is not None and o is not None:
            rate = o.mean()
            if config.alpha:
                add("alpha", config.alpha, c.mean())
            if config.beta:
                rows = "batch_axis_beta" in config.reference_quirks and c.shape[1] > 1
                add("beta", config.beta, _change_after_events(c, o.detach(), axis=1 if rows else 0))
            if config.gamma:
                add("gamma", config.gamma, rate)
            if config.activity_penalty:
                add("activity", config.activity_penalty, F.relu(rate - config.activity_target))
        elif config.cell != "egru" and last:
            if config.alpha:
                add("alpha", config.alpha, y.square().mean())
            if config.beta and len(y) > 1:
                add("beta", config.beta, y.diff(dim=0).square().mean())

    def _decode(self, x: Tensor) -> Tensor:
        """Return logits ``(B, T, V)`` for ``x (T, B, N)``."""
        if self.decoder.projection is not None:
            x = self.decoder.projection(x)
        return cast(Tensor, self.decoder.decoder(x.transpose(0, 1)))

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return optimizer groups: matrices, which decay; biases; thresholds with a learning rate of their own.

        The released code lets biases decay too (``decayed_biases``).
        """
        thresholds = [rnn.thr for rnn in self.layers() if isinstance(rnn, EGRU)]
        own = {id(thr) for thr in thresholds}
        rest = [p for p in self.parameters() if id(p) not in own]
        least = 1 if "decayed_biases" in self.config.reference_quirks else 2
        groups = [
            {"params": [p for p in rest if p.ndim >= least], "weight_decay": weight_decay},
            {"params": [p for p in rest if p.ndim < least], "weight_decay": 0.0},
            {
                "params": [thr for thr in thresholds if thr.requires_grad],
                "weight_decay": 0.0,
                "lr_scale": self.config.threshold_lr,
            },
        ]
        return [group for group in groups if group["params"]]

    def spike_sites(self) -> list[SpikeSite]:
        """Return one graded site per EGRU layer; the twins have none."""
        graph = self.graph()
        return [
            SpikeSite(op.name, "graded", tuple(reader.name for reader in graph.readers(op.name)))
            for op in graph
            if op.kind == "neuron"
        ]

    def graph(self) -> LMGraph:
        """Describe one token: layer 0 reads reals, its own recurrent matrix and all behind it read graded events."""
        return LMGraph(tuple(_ops(self.config)))

    def to_reference(self, *, grads: bool = False) -> dict[str, Tensor]:
        """Return weights, or their gradients, under the keys of the released code."""
        from spiking_lm_egru.reference import to_reference

        return to_reference(self, grads=grads)


def layer_sizes(config: EGRUConfig) -> list[tuple[int, int]]:
    """Return (inputs, units) of every recurrent layer."""
    units = [config.n_hidden] * config.n_layer
    if not config.projection:
        units[-1] = config.n_embd
    return list(zip([config.n_embd, *units], units, strict=False))


def _layer(config: EGRUConfig, n_in: int, n_out: int) -> EGRU | nn.GRU | nn.LSTM:
    if config.cell != "egru":
        return (nn.GRU if config.cell == "gru" else nn.LSTM)(n_in, n_out)
    layer = EGRU(
        n_in,
        n_out,
        batch_first=False,
        dropout=config.dropout_connect,
        zoneout=config.zoneout,
        dampening_factor=config.dampening_factor,
        pseudo_derivative_support=config.pseudo_derivative_support,
        thr_mean=config.thr_mean,
    )
    layer.thr.requires_grad_(config.threshold_lr > 0)
    return layer


def _dropped(ones: Tensor, p: float) -> Tensor:
    """Turn ones into a dropout mask: 0 with probability ``p``, else 1 / (1 - p)."""
    return F.dropout(ones, p)


def _change_after_events(c: Tensor, o: Tensor, axis: int) -> Tensor:
    """Return the mean of (c_{t+1} - c_t)^2 over the events ``o_t``, or 0 without events; all ``(T, B, H)``."""
    at_event = o.narrow(axis, 0, o.shape[axis] - 1)
    return (at_event * c.diff(dim=axis).square()).sum() / at_event.sum().clamp(min=1)


def _ops(config: EGRUConfig) -> list[Op]:
    """List the operations of one token, in order."""
    gates, twin = GATES[config.cell], config.cell != "egru"
    ops = [Op("embeddings", "embedding", ("tokens",), "real", config.n_embd, module="embeddings")]
    for layer, (n_in, n_out) in enumerate(layer_sizes(config)):
        name, source, blocks = f"rnns.{layer}", ops[-1].name, gates * n_out
        of_input, of_recurrent = (
            ({"weight": f"{name}.weight_{x}_l0", "bias": f"{name}.bias_{x}_l0"} for x in ("ih", "hh"))
            if twin
            else ({"weight_t": f"{name}.{x}kernel", "bias": f"{name}.{x}bias"} for x in ("", "recurrent_"))
        )
        ops += [
            Op(f"{name}.input", "linear", (source,), "real", blocks, weight=(blocks, n_in), parameters=of_input),
            Op(
                f"{name}.recurrent",
                "linear",
                (),
                "real",
                blocks,
                weight=(blocks, n_out),
                recurrent=(name,),
                parameters=of_recurrent,
            ),
        ]
        reads, cost = (f"{name}.input", f"{name}.recurrent"), POINTWISE[config.cell] * n_out
        if twin:
            ops.append(Op(name, "elementwise", reads, "real", n_out, other_ops=cost))
        else:
            ops.append(
                Op(
                    name,
                    "neuron",
                    reads,
                    "graded",
                    n_out,
                    parameters={"threshold": f"{name}.thr"},
                    dynamics=EGRUDynamics(n_out, config.zoneout, TRACE_DECAY),
                    state=tuple((layer, name) for name in EGRUState._fields),
                    other_ops=cost + (3 * n_out if config.zoneout else 0),
                )
            )
    size, vocab = config.n_embd, config.vocab_size
    if config.projection:
        name = "decoder.projection"
        weight = (size, config.n_hidden)
        ops.append(Op(name, "linear", (ops[-1].name,), "real", size, module=name, weight=weight))
    name = "decoder.decoder"
    ops.append(Op(name, "linear", (ops[-1].name,), "real", vocab, module=name, weight=(vocab, size)))
    return ops
