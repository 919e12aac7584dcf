"""The definition of every op: one obvious loop, any floating dtype, gradients by autograd.

Slow on purpose. Every other implementation is tested against these functions, gradients and states included.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from spiking_lm.config import SurrogateConfig
from spiking_lm.schemes import OFF, ActivationScheme

_ATAN = SurrogateConfig()


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return the dtype that recurrent state is kept in: float64 when an input is float64, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def surrogate_gradient(u: Tensor, surrogate: SurrogateConfig) -> Tensor:
    """Return the surrogate derivative ds/dh at the distance ``u = h - threshold``.

    ========================  =========================================
    ``atan``                  (alpha/2) / (1 + (pi/2 alpha u)^2)
    ``fast_sigmoid``          1 / (1 + alpha |u|)^2
    ``sigmoid``               alpha sigma(alpha u) (1 - sigma(alpha u))
    ``triangle``              alpha max(0, 1 - alpha |u|)
    ========================  =========================================

    ``atan``, ``sigmoid`` and ``triangle`` enclose an area of 1; ``fast_sigmoid`` has height 1, as is usual for it.
    """
    alpha = surrogate.alpha
    if surrogate.name == "atan":
        return (alpha / 2) / (1 + (math.pi / 2 * alpha * u) ** 2)
    if surrogate.name == "fast_sigmoid":
        return 1 / (1 + alpha * u.abs()) ** 2
    if surrogate.name == "sigmoid":
        # exp(-|z|) / (1 + exp(-|z|))^2 cannot overflow, and equals sigma(z) (1 - sigma(z)).
        e = torch.exp(-(alpha * u).abs())
        return alpha * e / (1 + e) ** 2
    return alpha * (1 - alpha * u.abs()).clamp(min=0)


class _Spike(torch.autograd.Function):
    """The step function whose derivative is replaced by a surrogate."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: float, compare: str, surrogate: SurrogateConfig) -> Tensor:
        ctx.save_for_backward(h)
        ctx.threshold, ctx.surrogate = threshold, surrogate
        fires = h >= threshold if compare == ">=" else h > threshold
        return fires.to(h.dtype) + 0 * h  # 0 * h: a membrane that is not finite must not pass for a silent one

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (h,) = ctx.saved_tensors
        return grads[0] * surrogate_gradient(h - ctx.threshold, ctx.surrogate), None, None, None


def spike(h: Tensor, threshold: float, compare: str = ">=", surrogate: SurrogateConfig | None = None) -> Tensor:
    """Return ``[h compare threshold]`` in the dtype of ``h``, with the surrogate as its derivative."""
    spikes: Tensor = _Spike.apply(h, threshold, compare, surrogate or _ATAN)
    return spikes


def lif_scan(
    x: Tensor,
    v0: Tensor | None = None,
    *,
    beta: float,
    gain: float,
    threshold: float,
    v_reset: float | None = 0.0,
    compare: str = ">=",
    surrogate: SurrogateConfig,
    detach_reset: bool = False,
    final_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run leaky integrate-and-fire neurons over time; see :func:`spiking_lm.kernels.lif_scan`."""
    dtype = compute_dtype(x, v0)
    v = x.new_zeros(x.shape[1:], dtype=dtype) if v0 is None else v0.to(dtype)
    drift = 0.0 if v_reset is None else (1 - beta) * v_reset
    spikes, membranes = [], []
    for x_t in x.to(dtype).unbind(0):
        h = beta * v + gain * x_t + drift
        s = spike(h, threshold, compare, surrogate)
        fired = s.detach() if detach_reset else s
        v = h - threshold * fired if v_reset is None else (1 - fired) * h + fired * v_reset
        spikes.append(s)
        membranes.append(v)
    return _stack(spikes, 0, x).to(x.dtype), v if final_only else _stack(membranes, 0, x.to(dtype))


def _stack(steps: list[Tensor], dim: int, like: Tensor) -> Tensor:
    return torch.stack(steps, dim) if steps else torch.empty_like(like)


WKVState = tuple[Tensor, Tensor, Tensor]


def wkv(
    time_decay: Tensor, time_first: Tensor, k: Tensor, v: Tensor, state: WKVState | None = None
) -> tuple[Tensor, WKVState]:
    """Run the RWKV-4 recurrence over time; see :func:`spiking_lm.kernels.wkv`."""
    dtype = compute_dtype(k, v)
    w, u = -torch.exp(time_decay.to(dtype)), time_first.to(dtype)
    p, q, o = (s.to(dtype) for s in state or empty_wkv_state(k, dtype))
    outputs = []
    for k_t, v_t in zip(k.to(dtype).unbind(1), v.to(dtype).unbind(1), strict=True):
        y, p, q, o = wkv_step(w, u, k_t, v_t, p, q, o)
        outputs.append(y)
    return _stack(outputs, 1, v).to(v.dtype), (p, q, o)


def wkv_step(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, p: Tensor, q: Tensor, o: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Advance one token, all ``(B, C)``: return ``(y, p, q, o)``; ``w = -exp(time_decay)``.

    ``p exp(o)`` and ``q exp(o)`` are the decayed sums of ``exp(k) v`` and ``exp(k)``. The exponent ``o`` is chosen for
    range alone: ``y`` does not depend on it, hence the ``detach``.
    """
    bonus = u + k
    m = torch.maximum(o, bonus).detach()
    past, now = torch.exp(o - m), torch.exp(bonus - m)
    y = (past * p + now * v) / (past * q + now)
    m = torch.maximum(w + o, k).detach()
    past, now = torch.exp(w + o - m), torch.exp(k - m)
    return y, past * p + now * v, past * q + now, m


def empty_wkv_state(k: Tensor, dtype: torch.dtype) -> WKVState:
    """Return the state before the first token for ``k (B, T, C)``: nothing summed, the smallest exponent."""
    zeros = k.new_zeros((k.shape[0], k.shape[2]), dtype=dtype)
    return zeros, zeros, torch.full_like(zeros, -1e38)


class _Event(torch.autograd.Function):
    """The strict step function of v = p - threshold, with EGRU's scaled triangle as its derivative."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, gamma: float, epsilon: float) -> Tensor:
        ctx.save_for_backward(v)
        ctx.gamma, ctx.epsilon = gamma, epsilon
        return (v > 0).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (v,) = ctx.saved_tensors
        return grads[0] * ctx.gamma * (1 - ctx.epsilon * v.abs()).clamp(min=0), None, None


def egru_event(v: Tensor, gamma: float, epsilon: float) -> Tensor:
    """Return ``[v > 0]`` in the dtype of ``v``, with ``gamma max(0, 1 - epsilon |v|)`` as its derivative."""
    events: Tensor = _Event.apply(v, gamma, epsilon)
    return events


def egru_scan(
    a: Tensor,
    recurrent_kernel: Tensor,
    recurrent_bias: Tensor,
    threshold: Tensor,
    c0: Tensor | None = None,
    y0: Tensor | None = None,
    *,
    gamma: float,
    epsilon: float,
    keep: Tensor | None = None,
    zoneout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run event-based gated recurrent units over time; see :func:`spiking_lm.kernels.egru_scan`."""
    dtype = compute_dtype(a, recurrent_kernel, recurrent_bias, threshold, c0, y0)
    kernel, bias, theta = (t.to(dtype) for t in (recurrent_kernel, recurrent_bias, threshold))
    rest = a.new_zeros((a.shape[1], theta.numel()), dtype=dtype)
    c = rest if c0 is None else c0.to(dtype)
    y = rest if y0 is None else y0.to(dtype)
    ys, cs, os = [], [], []
    with torch.autocast(a.device.type, enabled=False):
        for t, a_t in enumerate(a.to(dtype).unbind(0)):
            a_z, a_r, a_g = a_t.chunk(3, -1)
            q_z, q_r, q_g = (y @ kernel + bias).chunk(3, -1)
            z, r = torch.sigmoid(a_z + q_z), torch.sigmoid(a_r + q_r)
            g = torch.tanh(a_g + r * q_g)
            p = z * c + (1 - z) * g
            if keep is not None:
                p = c + keep[t].to(dtype) * (p - c)
            elif zoneout:
                p = zoneout * c + (1 - zoneout) * p
            o = egru_event(p - theta, gamma, epsilon)
            y = o * p
            c = p - o * theta
            ys.append(y)
            cs.append(c)
            os.append(o)
    empty = rest.new_empty((0, *rest.shape))
    y, c, o = (torch.stack(steps) if steps else empty.clone() for steps in (ys, cs, os))
    return y, c, o


def gif_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scheme: ActivationScheme,
    salient: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    mode: str = "fake",
) -> Tensor:
    """Multiply Generalized Integrate-and-Fire spikes with a matrix; see :func:`spiking_lm.kernels.gif_linear`."""
    if scheme.bits >= OFF:
        return torch.nn.functional.linear(x, weight, bias)
    dtype = compute_dtype(x)
    charges, w = x.to(dtype), weight.to(dtype)
    chosen = torch.zeros(x.shape[-1], dtype=torch.bool, device=x.device) if salient is None else salient
    most = 2**scheme.bits - 1
    steps = 1 if salient is None or scheme.salient is None else scheme.salient.steps
    finest = steps * most if scheme.grid == "exact" else steps * 2**scheme.bits - 1
    fake = spiking = charges.new_zeros((*x.shape[:-1], weight.shape[0]))
    for channels, top, n_steps in ((~chosen, most, 1), (chosen, finest, steps)):
        w_group = w[:, channels]
        unit, zero = _gif_grid(charges, scale, top)
        level = charges[..., channels] / unit
        code = (level + (level.round() - level).detach() + zero).clamp(0, top)
        values = (code - zero) * unit
        if scale is None:  # what is constant is exact, and so is its gradient
            varied = charges.amax(-1, keepdim=True) > charges.amin(-1, keepdim=True)
            values = torch.where(varied, values, charges[..., channels])
        fake = fake + values @ w_group.T
        if mode == "fake":
            continue
        silent = zero.clamp(0, top) if scheme.spikes == "signed" else torch.zeros_like(zero)
        rest = (code - silent).detach()
        total = torch.zeros_like(spiking)
        for _ in range(n_steps):
            spikes = rest.clamp(-most, most)
            rest = rest - spikes
            if mode == "spike":
                total = total + spikes @ w_group.T
            else:
                for k in range(1, most + 1):
                    total = total + spikes.sign() * (spikes.abs() >= k) @ w_group.T
        spiking = spiking + unit * (total - (zero - silent) * w_group.sum(1))
    out = fake if mode == "fake" else spiking.detach() + (fake - fake.detach())  # the gradient is that of fake
    return (out if bias is None else out + bias.to(dtype)).to(x.dtype)


def _gif_grid(x: Tensor, scale: Tensor | None, top: int) -> tuple[Tensor, Tensor]:
    """Return scale and zero, ``(..., 1)`` or (), of codes 0 ... top for ``x (..., C)``."""
    if scale is None:
        least, greatest = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    else:
        least, greatest = scale.to(x.dtype).detach().unbind()
    unit = ((greatest - least) / top).clamp(min=1e-5)
    unit = torch.where(greatest > least, unit, least.abs().clamp(min=torch.finfo(x.dtype).tiny))
    return unit, torch.round(-least / unit).detach()


LEAST_AMPLITUDE = 1e-5
"""What an elastic neuron emits at least, when it fires."""


def amplitude_gradient(g: Tensor, q: Tensor, bits: int) -> Tensor:
    """Return the gradient of one amplitude from those of its spikes ``g`` and its membranes ``q``, in amplitudes.

    As of a learned step size (Esser et al., arXiv 1902.08153), scaled by 1/sqrt of their number.
    """
    slope = q.sign() if bits == 1 else torch.where(q.abs() > 1, q.sign(), q.round() - q)
    gradient: Tensor = (g * slope).sum() / max(q.numel(), 1) ** 0.5
    return gradient


class _ElasticSpike(torch.autograd.Function):
    """Spikes of -A, 0 and A, rounded half to even; straight through while the membrane is within +-A."""

    @staticmethod
    def forward(ctx: Any, m: Tensor, alpha: Tensor, bits: int) -> Tensor:
        amplitude = alpha.clamp(min=LEAST_AMPLITUDE)
        q = m / amplitude
        ctx.save_for_backward(q)
        ctx.bits = bits
        # 0 * q: a membrane that is not finite must not pass for a silent one
        return amplitude * (q.sign() + 0 * q if bits == 1 else q.round().clamp(-1, 1))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (q,) = ctx.saved_tensors
        g = grads[0]
        return g * (q.abs() <= 1), amplitude_gradient(g, q, ctx.bits), None


def elastic_scan(
    x: Tensor, alpha: Tensor, carried: Tensor | None = None, *, beta: float, bits: int, reset: str, final: bool
) -> tuple[Tensor, Tensor | None]:
    """Run elastic bi-spiking neurons over their steps; see :func:`spiking_lm.kernels.elastic_scan`."""
    dtype = compute_dtype(x, alpha, carried)
    r = x.new_zeros(x.shape[1:], dtype=dtype) if carried is None else carried.to(dtype)
    spikes = []
    for x_t, a in zip(x.to(dtype).unbind(0), alpha.to(dtype).unbind(0), strict=True):
        m = x_t + r
        s: Tensor = _ElasticSpike.apply(m, a, bits)
        emitted = s.detach().abs() if reset == "symmetric" else s.detach()
        r = (a.detach() - emitted) * beta * m
        spikes.append(s)
    return _stack(spikes, 0, x).to(x.dtype), r if final else None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    keep: Tensor | None = None,
    amplitudes: Tensor | None = None,
    *,
    bits: int = 2,
) -> Tensor:
    """Mix values by attention; see :func:`spiking_lm.kernels.attention`."""
    if amplitudes is not None:
        options: dict[str, Any] = {"beta": 0.0, "bits": bits, "reset": "asymmetric", "final": False}
        k, v = (elastic_scan(x, a, **options)[0] for x, a in zip((k, v), amplitudes, strict=True))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    weights = (scores if mask is None else scores + mask).softmax(-1)
    y: Tensor = (weights if keep is None else weights * keep) @ v
    return y.transpose(2, 3).contiguous().transpose(2, 3)


# -- products of one token: events, int8 codes, packed ternary weights -------------------------------------------------


def spike_linear(x: Tensor, weight_t: Tensor, bias: Tensor | None = None) -> Tensor:
    """Sum the weight rows of sources that are not silent; see :func:`spiking_lm.kernels.spike_linear`."""
    rows = []
    for row in x.reshape(-1, x.shape[-1]).to(weight_t.dtype):
        active = row != 0
        rows.append((row[active, None] * weight_t[active]).sum(0))
    y = torch.stack(rows) if rows else weight_t.new_zeros(0, weight_t.shape[1])
    y = y.reshape(*x.shape[:-1], weight_t.shape[1])
    return y if bias is None else y + bias


def int8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply with int8 codes, each row with its scale; see :func:`spiking_lm.kernels.int8_linear`."""
    y = x @ (codes.to(x.dtype) * scale.to(x.dtype)[:, None]).T
    return y if bias is None else y + bias


def pack_spikes(s: Tensor, planes: int = 1) -> Tensor:
    """Put 32 spikes into a word; see :func:`spiking_lm.kernels.pack_spikes`."""
    words = -(-s.shape[-1] // 32)
    signs = (1, -1)[:planes]
    bits = torch.stack([(s == sign).long() for sign in signs], -2)
    bits = torch.nn.functional.pad(bits, (0, 32 * words - s.shape[-1])).view(*bits.shape[:-1], words, 32)
    values = torch.tensor([2**j for j in range(31)] + [-(2**31)], device=s.device)  # bit 31 is the sign of an int32
    packed: Tensor = (bits * values).sum(-1).to(torch.int32)
    return packed


def unpack_spikes(words: Tensor, size: int) -> Tensor:
    """Return bits ``(..., K)`` of ``words (..., W)`` as int64: what one plane of ``pack_spikes`` was made from."""
    places = torch.arange(32, device=words.device)
    return ((words.long()[..., None] >> places) & 1).flatten(-2)[..., :size]


def packed_linear(words: Tensor, planes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply packed spikes with packed ternary weights; see :func:`spiking_lm.kernels.packed_linear`."""
    size = 32 * words.shape[-1]
    s, weight = (_signed(t.movedim(dim, 0), size) for t, dim in ((words, -2), (planes, 0)))
    y = (s[..., None, :] * weight).sum(-1).to(scale.dtype) * scale
    return y if bias is None else y + bias


def ternary_linear(x: Tensor, planes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply real numbers with packed ternary weights; see :func:`spiking_lm.kernels.ternary_linear`."""
    weight = _signed(planes, x.shape[-1]).to(x.dtype)
    y = (x @ weight.T) * scale.to(x.dtype)
    return y if bias is None else y + bias


def _signed(planes: Tensor, size: int) -> Tensor:
    """Return ``(..., K)`` of -1, 0 and 1 from ``planes (1 or 2, ..., W)``."""
    bits = unpack_spikes(planes, size)
    return bits[0] if len(bits) == 1 else bits[0] - bits[1]
