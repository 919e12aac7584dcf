"""SpikeGPT's cells in the int8 torch model: the same integers as ``worker/cells``, written for themselves.

What is a shift there is a product with a power of two here, and a floor; tables are computed anew, from torch's own
functions. See :mod:`spiking_lm_lava.torch_model`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spiking_lm_lava.cells_spikegpt import (
    GIF,
    WKV,
    Add,
    Centre,
    Gate,
    HoldingLIF,
    InverseRoot,
    Normalise,
    Pointwise,
    SquaredReLU,
    TokenShift,
)
from spiking_lm_lava.torch_model import Step, arithmetic, halved, logistic, tensor, times

State = dict[str, Tensor]

_STOP = 2.0**23 - 1


def _rounded(x: Tensor) -> Tensor:
    return torch.floor(x + 0.5)


_PLACES = torch.arange(65, dtype=torch.float64)
_EXP2 = _rounded(2**15 * torch.exp2(-_PLACES / 64))
_MIDDLES = (_PLACES[:64] + 0.5) / 64
_INVERSE = _rounded(2**15 / (0.5 + _MIDDLES / 2))
_INVERSE_ROOT = _rounded(2**15 / torch.sqrt(_MIDDLES))


def _scaled(x: Tensor, exponents: Tensor) -> Tensor:
    """Return ``x / 2^exponents``, to nearest, halves up."""
    return _rounded(x * torch.exp2(-exponents))


def _power(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return 2^x, x at most 0 with ``bits`` fraction bits, as mantissa in Q15 and exponent."""
    depth = -x * 2.0**-bits
    whole = torch.floor(depth)
    place = (depth - whole) * 64
    at = torch.floor(place)
    upper, lower = _EXP2[at.long()], _EXP2[at.long() + 1]
    return upper - _rounded((upper - lower) * (place - at)), whole.clamp(max=31)


def _leading(x: Tensor, even: bool = False) -> tuple[Tensor, Tensor]:
    """Return the length of ``x`` in bits, rounded up to an even one if so, and its first 16 bits below that."""
    bits = torch.frexp(x)[1].double()
    if even:
        bits = bits + bits % 2
    return bits, torch.floor(x * torch.exp2(16 - bits))


def _lif_decay(v: Tensor, dv: int) -> Tensor:
    return torch.trunc(v * (4096 - dv) / 4096)


@arithmetic(HoldingLIF)
def _lif(node: HoldingLIF) -> Step:
    def step(state: State, a: Tensor) -> tuple[Tensor, ...]:
        v = (_lif_decay(state["v"], node.dv) + 64 * a + node.bias).clamp(-_STOP, _STOP)
        fires = v > 64 * node.vth
        state["v"] = v.masked_fill(fires, 0)
        return (fires.double(),)

    return step


@arithmetic(GIF)
def _gif(node: GIF) -> Step:
    def step(state: State, a: Tensor) -> tuple[Tensor, ...]:
        v = (_lif_decay(state["v"], node.dv) + a).clamp(-_STOP, _STOP)
        fits = v.abs().div(node.vth, rounding_mode="floor").clamp(max=node.levels)
        count = torch.where(v < 0, -fits if node.signed else torch.zeros_like(fits), fits)
        state["v"] = v - count * node.vth
        return (count,)

    return step


@arithmetic(Centre)
def _centre(node: Centre) -> Step:
    def step(state: State, x: Tensor, mean: Tensor) -> tuple[Tensor, ...]:
        rest = x - mean
        return rest, halved(halved(rest, node.before).square(), node.behind)

    return step


@arithmetic(InverseRoot)
def _inverse_root(node: InverseRoot) -> Step:
    mantissa, shift = map(tensor, (node.mantissa, node.shift))

    def step(state: State, total: Tensor) -> tuple[Tensor, ...]:
        bits, m = _leading((times(total, mantissa, shift) + node.eps).clamp(min=1), even=True)
        y = _INVERSE_ROOT[torch.floor(m / 1024).long()]
        for _ in range(2):
            y = halved(y * (3 * 2**15 - halved(m * halved(y.square(), 16), 15)), 16)
        return (32 * y.clamp(max=2**16 - 1) + bits / 2,)

    return step


@arithmetic(Normalise)
def _normalise(node: Normalise) -> Step:
    def step(state: State, x: Tensor, root: Tensor) -> tuple[Tensor, ...]:
        mantissa = torch.floor(root / 32)
        return (_scaled(x * mantissa, node.shift + root - 32 * mantissa).clamp(-node.most, node.most),)

    return step


@arithmetic(WKV)
def _wkv(node: WKV) -> Step:
    of_k = tuple(map(tensor, (node.k_mantissa, node.k_shift)))
    of_v = tuple(map(tensor, (node.v_mantissa, node.v_shift)))
    decay, first, bits, most = map(tensor, (node.decay, node.first, node.weight_bits, node.most))
    finer = tensor(node.finer)
    reach = most * torch.exp2(finer)

    def join(num: Tensor, den: Tensor, top: Tensor, v: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        highest = torch.maximum(top, k)
        (old, fallen), (new, behind) = _power(top - highest, node.fraction), _power(k - highest, node.fraction)
        num = _scaled(num * old, 15 + fallen) + _scaled(v * new, 15 + behind)
        return num, _scaled(den * old, 15 + fallen) + _scaled(new, 15 + behind - bits), highest

    def step(state: State, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        k, v = times(k, *of_k), times(v, *of_v).clamp(-most, most)
        num, den, top = state["num"], state["den"], state["top"]
        above, below, _ = join(num, den, top, v, k + first)
        length, m = _leading(below.clamp(min=1))
        guess = _INVERSE[torch.floor(m / 512).long() - 64]
        for _ in range(2):
            guess = halved(guess * (2**16 - halved(m * guess, 16)), 15)
        mean = _scaled(above * guess, (15 + length - bits - finer).clamp(min=0))
        state["num"], state["den"], state["top"] = join(num, den, top - decay, v, k)
        return (mean.clamp(-reach, reach),)

    return step


def _sending(node: Pointwise) -> Any:
    mantissa, shift, bias = map(tensor, (node.mantissa, node.shift, node.bias))
    least, most = tensor(node.least), tensor(node.most)
    return lambda x, further=0: (times(x, mantissa, shift) + bias + further).clamp(least, most)


@arithmetic(TokenShift)
def _token_shift(node: TokenShift) -> Step:
    send, bias = _sending(node), tensor(node.held_bias)
    of_held = tuple(map(tensor, (node.held_mantissa, node.held_shift)))

    def step(state: State, x: Tensor) -> tuple[Tensor, ...]:
        sent = send(x, state["held"])
        state["held"] = times(x, *of_held) + bias
        return (sent,)

    return step


@arithmetic(Gate)
def _gate(node: Gate) -> Step:
    send, of_r = _sending(node), tuple(map(tensor, (node.r_mantissa, node.r_shift)))
    return lambda state, x, r: (send(halved(x * logistic(times(r, *of_r)), 15)),)


@arithmetic(SquaredReLU)
def _squared_relu(node: SquaredReLU) -> Step:
    send, of_root = _sending(node), tuple(map(tensor, (node.root_mantissa, node.root_shift)))
    return lambda state, x: (send(times(x.relu(), *of_root).square()),)


@arithmetic(Add)
def _add(node: Add) -> Step:
    of_y = tuple(map(tensor, (node.mantissa, node.shift)))
    return lambda state, x, y: (x + times(y, *of_y),)
