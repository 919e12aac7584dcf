"""The ops, declared once: signature, meaning, and what their arguments must be.

What runs is chosen by :mod:`spiking_lm.kernels.dispatch`; what is right is defined by
:mod:`spiking_lm.kernels.reference`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from spiking_lm.config import SurrogateConfig, parse_config
from spiking_lm.errors import UsageError
from spiking_lm.kernels.dispatch import call, traced
from spiking_lm.kernels.reference import WKVState
from spiking_lm.schemes import OFF, ActivationScheme

_ATAN = SurrogateConfig()


def lif_scan(
    x: Tensor,
    v0: Tensor | None = None,
    *,
    beta: float,
    gain: float,
    threshold: float,
    v_reset: float | None = 0.0,
    compare: str = ">=",
    surrogate: SurrogateConfig | Mapping[str, Any] | str = _ATAN,
    detach_reset: bool = False,
    final_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run leaky integrate-and-fire neurons over time: ``x (T, ...)`` -> ``(spikes (T, ...), v (T, ...))``.

    Per step::

        h_t = beta v_{t-1} + gain x_t + (1 - beta) v_reset
        s_t = [h_t >= threshold], or > with compare=">"
        v_t = (1 - s_t) h_t + s_t v_reset      (hard reset)
        v_t = h_t - s_t threshold              (soft reset, v_reset=None; no drift term in h_t)

    ``v`` is the membrane after the reset; with ``final_only`` just the last one, ``(...)``. ``v0 (...)`` is the
    membrane before the first step (None: zeros). Any strides will do: pass a transposed view, not a copy.
    Gradients reach ``x`` and ``v0``, from the spikes and from ``v``; ``ds/dh`` is the surrogate
    (:func:`~spiking_lm.kernels.surrogate_gradient`), and ``detach_reset`` treats the ``s_t`` in the reset as constant.
    The membrane is kept in float32, or float64 if an input is; spikes have the dtype of ``x``. Where the membrane is
    not finite the spike is NaN, so that a broken value is not taken for silence. ``surrogate`` may be written out, or
    as its name, or as ``{"name": ..., "alpha": ...}``.
    """
    if not x.dtype.is_floating_point or x.dim() == 0:
        raise UsageError(f"lif_scan: x must be a floating-point tensor (T, ...), not {x.dtype} {tuple(x.shape)}")
    if v0 is not None and v0.shape != x.shape[1:]:
        raise UsageError(
            f"lif_scan: v0 has shape {tuple(v0.shape)} but x {tuple(x.shape)} needs {tuple(x.shape[1:])}",
            hint="time is the first dimension of x; transpose batch-first inputs",
        )
    if compare != ">=" and compare != ">":
        raise UsageError(f"lif_scan: compare must be '>=' or '>', not {compare!r}")
    if not isinstance(surrogate, SurrogateConfig):
        fields = {"name": surrogate} if isinstance(surrogate, str) else dict(surrogate)
        surrogate = parse_config(SurrogateConfig, fields, where="lif_scan: surrogate")
    if traced():
        from spiking_lm.kernels import library

        numbers = beta, gain, threshold, v_reset
        return library.lif_scan(x, v0, *numbers, compare, surrogate, detach_reset, final_only)
    spikes, v = call(
        "lif_scan",
        x,
        v0,
        beta=beta,
        gain=gain,
        threshold=threshold,
        v_reset=v_reset,
        compare=compare,
        surrogate=surrogate,
        detach_reset=detach_reset,
        final_only=final_only,
    )
    return spikes, v


def wkv(
    time_decay: Tensor, time_first: Tensor, k: Tensor, v: Tensor, state: WKVState | None = None
) -> tuple[Tensor, WKVState]:
    """Run the RWKV-4 recurrence over time: ``k, v (B, T, C)`` -> ``(y (B, T, C), state)``.

    ``time_decay`` and ``time_first`` are the raw parameters, ``(C)``. Per channel, with ``w = -exp(time_decay)`` and
    ``u = time_first``::

        y_t = (sum_{i<t} e^{(t-1-i) w + k_i} v_i + e^{u + k_t} v_t) / (sum_{i<t} e^{(t-1-i) w + k_i} + e^{u + k_t})

    The state ``(p, q, o)``, each ``(B, C)``, holds the two sums over the past as ``p exp(o)`` and ``q exp(o)``; None is
    the beginning of a text. Its exponent ``o`` is there for range alone: implementations may choose it differently, and
    it carries no gradient. Inside, all is float32, or float64 if ``k`` or ``v`` is; ``y`` has the dtype of ``v``.
    Any strides will do: views ``(B, T, C)`` of time-major tensors are used as they are.
    """
    if k.dim() != 3 or k.shape != v.shape or not k.dtype.is_floating_point or not v.dtype.is_floating_point:
        raise UsageError(
            f"wkv: k and v must be floating-point tensors (B, T, C) of one shape, not {k.dtype} {tuple(k.shape)} "
            f"and {v.dtype} {tuple(v.shape)}"
        )
    channels = k.shape[2:]
    if time_decay.shape != channels or time_first.shape != channels:
        raise UsageError(
            f"wkv: time_decay {tuple(time_decay.shape)} and time_first {tuple(time_first.shape)} must be "
            f"({channels[0]},), one value per channel of k {tuple(k.shape)}"
        )
    if state is not None:
        expected = (k.shape[0], k.shape[2])
        if len(state) != 3 or any(s.shape != expected for s in state):
            raise UsageError(
                f"wkv: state has shapes {[tuple(s.shape) for s in state]} but k {tuple(k.shape)} needs three of "
                f"{expected}"
            )
    if traced():
        from spiking_lm.kernels import library

        return library.wkv(time_decay, time_first, k, v, state)
    y, state = call("wkv", time_decay, time_first, k, v, state)
    return y, state


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
    """Run event-based gated recurrent units over time: ``a (T, B, 3H)`` -> ``(y, c, o)``, each ``(T, B, H)``.

    ``a`` is the projected input, in blocks z, r, g. With ``q = y_{t-1} recurrent_kernel + recurrent_bias``, per step::

        z = sigmoid(a_z + q_z)      r = sigmoid(a_r + q_r)      g = tanh(a_g + r q_g)
        p = z c_{t-1} + (1 - z) g
        o_t = [p > threshold]       y_t = o_t p                 c_t = p - o_t threshold

    ``recurrent_kernel`` is (H, 3H), ``recurrent_bias`` (3H,), ``threshold`` (H,); ``c0`` and ``y0``, (B, H), are the
    state before the first step (None: zeros). ``keep (T, B, H)`` is the zoneout mask of training: where it is 0, p
    stays ``c_{t-1}``. ``zoneout`` is its expectation, for evaluation: p is mixed with that share of ``c_{t-1}``.
    Gradients reach every tensor but ``keep``, from all three outputs and through the reset;
    ``do/dp = gamma max(0, 1 - epsilon |p - threshold|)``. State and outputs are float32, or float64 if an input is,
    also under autocast. Any strides will do. Source: Subramoney et al., arXiv 2206.06178.
    """
    floats = (a, recurrent_kernel, recurrent_bias, threshold)
    if a.dim() != 3 or not all(t.dtype.is_floating_point for t in floats):
        raise UsageError(
            f"egru_scan: a must be a floating-point tensor (T, B, 3H) and the parameters floating-point too, not "
            f"{tuple(a.shape)} and {', '.join(str(t.dtype) for t in floats)}"
        )
    batch, hidden = a.shape[1], threshold.numel()
    expected = {
        "a": (a, (*a.shape[:2], 3 * hidden)),
        "recurrent_kernel": (recurrent_kernel, (hidden, 3 * hidden)),
        "recurrent_bias": (recurrent_bias, (3 * hidden,)),
        "threshold": (threshold, (hidden,)),
        "c0": (c0, (batch, hidden)),
        "y0": (y0, (batch, hidden)),
        "keep": (keep, (*a.shape[:2], hidden)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise UsageError(
                f"egru_scan: {name} has shape {tuple(tensor.shape)}, not {shape}, with {hidden} thresholds and a of "
                f"shape {tuple(a.shape)}",
                hint="time is the first dimension of a; the gates are blocks of the last one, in the order z, r, g",
            )
    if not (gamma >= 0 and epsilon > 0 and 0 <= zoneout < 1):
        raise UsageError(
            f"egru_scan: gamma must be at least 0, epsilon above 0 and zoneout in [0, 1), not {gamma}, {epsilon} and "
            f"{zoneout}"
        )
    if keep is not None and zoneout:
        raise UsageError("egru_scan: keep is the zoneout of training, zoneout that of evaluation; give one of them")
    if traced():
        from spiking_lm.kernels import library

        tensors = a, recurrent_kernel, recurrent_bias, threshold, c0, y0, keep
        return library.egru_scan(*tensors, gamma=gamma, epsilon=epsilon, zoneout=zoneout)
    y, c, o = call(
        "egru_scan",
        a,
        recurrent_kernel,
        recurrent_bias,
        threshold,
        c0,
        y0,
        gamma=gamma,
        epsilon=epsilon,
        keep=keep,
        zoneout=zoneout,
    )
    return y, c, o


def elastic_scan(
    x: Tensor,
    alpha: Tensor,
    carried: Tensor | None = None,
    *,
    beta: float = 0.25,
    bits: Literal[1, 2] = 2,
    reset: Literal["asymmetric", "symmetric"] = "asymmetric",
    final: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Run elastic bi-spiking neurons over time: ``x (T, ...)``, ``alpha (T,)`` -> ``(spikes (T, ...), carried (...))``.

    ``alpha`` holds one amplitude per step, for all neurons. With ``A_t = max(alpha_t, 1e-5)``, per step::

        m_t = x_t + r_{t-1}
        s_t = A_t clip(round_half_to_even(m_t / A_t), -1, 1)      bits=2: fires where |m_t| > A_t / 2
        s_t = A_t sign(m_t)                                       bits=1
        r_t = beta (alpha_t - s_t) m_t                            reset="symmetric": beta (alpha_t - |s_t|) m_t

    So a positive spike wipes the membrane, and a negative one doubles what silence would leave of it; symmetric, either
    one wipes it. ``carried`` is ``r``, before the first step (None: zeros) and, unless ``final=False``, after the last.
    Gradients reach ``x`` and ``carried``: ``ds/dm`` is 1 where ``|m_t| <= A_t`` and 0 elsewhere, and the factors of m
    in ``r`` are constants. They reach ``alpha`` where it requires one, from the spikes as of a learned step size:
    ``sum(g slope) / sqrt(n)``, with the sign of m as the slope outside the window and ``round(m/A) - m/A`` in it.
    Inside, all is float32, or float64 if an input is; spikes have the dtype of ``x``, and are NaN where a membrane is.
    Source: Xing et al., arXiv 2406.03287.
    """
    if not x.dtype.is_floating_point or x.dim() == 0:
        raise UsageError(f"elastic_scan: x must be a floating-point tensor (T, ...), not {x.dtype} {tuple(x.shape)}")
    if alpha.shape != x.shape[:1]:
        raise UsageError(
            f"elastic_scan: alpha has shape {tuple(alpha.shape)}, but x {tuple(x.shape)} needs {tuple(x.shape[:1])}",
            hint="time is the first dimension of x; transpose batch-first inputs",
        )
    if carried is not None and carried.shape != x.shape[1:]:
        raise UsageError(
            f"elastic_scan: carried has shape {tuple(carried.shape)}, but x {tuple(x.shape)} needs {tuple(x.shape[1:])}"
        )
    if bits not in (1, 2) or reset not in ("asymmetric", "symmetric"):
        raise UsageError(
            f"elastic_scan: bits is 1 or 2 and reset 'asymmetric' or 'symmetric', not {bits!r} and {reset!r}"
        )
    if traced():
        from spiking_lm.kernels import library

        return library.elastic_scan(x, alpha, carried, beta, bits, reset, final)
    spikes, carried = call("elastic_scan", x, alpha, carried, beta=beta, bits=bits, reset=reset, final=final)
    return spikes, carried


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    keep: Tensor | None = None,
    amplitudes: Tensor | None = None,
    *,
    bits: Literal[1, 2] = 2,
) -> Tensor:
    """Mix values by attention in each of T steps: ``q (T, B, heads, S, d)``, ``k, v (T, B, heads, L, d)`` -> like q.

    Per step and head, ``y = (softmax(q k^T / sqrt(d) + mask) keep) v``. ``mask (B or 1, 1, S or 1, L)`` holds 0 and
    numbers far below it, ``keep (B, heads, S, L)`` what dropout multiplies with; both are the same in all steps.
    With ``amplitudes (2, T)``, of keys and of values, k and v are currents of elastic neurons that forget each step:
    what is used are their spikes, those of ``elastic_scan(beta=0)``; the amplitudes are set and not learned.
    Gradients reach q, k and v. Any strides will do, and heads that are columns of a wide matrix are best read in place;
    the result lies in memory as ``(T, B, S, heads, d)``, ready for the next matrix.
    """
    if q.dim() != 5 or k.dim() != 5 or k.shape != v.shape or not q.dtype == k.dtype == v.dtype:
        raise UsageError(
            f"attention: q (T, B, heads, S, d), k and v (T, B, heads, L, d) must be of one dtype, not {q.dtype} "
            f"{tuple(q.shape)}, {k.dtype} {tuple(k.shape)} and {v.dtype} {tuple(v.shape)}"
        )
    n_steps, batch, heads, length, size = q.shape
    shape = batch, heads, length, k.shape[3]
    if (n_steps, batch, heads, size) != (*k.shape[:3], k.shape[4]):
        raise UsageError(f"attention: k {tuple(k.shape)} does not fit q {tuple(q.shape)}: only the length may differ")
    masks = [(b, 1, s, shape[3]) for b in (batch, 1) for s in (length, 1)]
    if mask is not None and mask.shape not in masks:
        raise UsageError(f"attention: mask has shape {tuple(mask.shape)}, which is none of {masks}")
    if keep is not None and keep.shape != shape:
        raise UsageError(f"attention: keep has shape {tuple(keep.shape)}, not {shape}")
    if amplitudes is not None and (amplitudes.shape != (2, n_steps) or amplitudes.requires_grad or bits not in (1, 2)):
        raise UsageError(
            f"attention: amplitudes {tuple(amplitudes.shape)} with bits={bits!r} must be (2, {n_steps}) and not "
            "learned, with bits=1 or bits=2",
            hint="neurons whose amplitudes are learned fire by elastic_scan",
        )
    if traced():
        from spiking_lm.kernels import library

        return library.attention(q, k, v, mask, keep, amplitudes, bits=bits)
    y: Tensor = call("attention", q, k, v, mask, keep, amplitudes, bits=bits)
    return y


def gif_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scheme: ActivationScheme,
    salient: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    mode: Literal["fake", "spike", "binary"] = "fake",
) -> Tensor:
    """Multiply Generalized Integrate-and-Fire spikes with a matrix: ``x (..., C)``, ``weight (O, C)`` -> ``(..., O)``.

    ``x`` are the charges; the scheme says how they become counts, and :mod:`spiking_lm.gif` describes the grid and the
    spikes. ``salient (C,)``, bool, is True for the channels with the salient steps (None: no channel), ``scale (2,)``
    the limits of a static scale, from :func:`spiking_lm.gif.calibrate_scale`. The modes agree but for rounding::

        fake      sum_c W_oc (code_c - zero_c) scale_c
        spike     scale_l sum_ord W_oc s_c + scale_h sum_t sum_sal W_oc s_tc - scale_l zero_l sum_ord W_oc - ...
        binary    as spike, with each s the sum of sub-steps of 0 and 1 (signed spikes: -1, 0 and 1)

    where zero is what spikes leave out: with unsigned spikes the zero point, with signed ones nothing, unless the range
    does not reach 0. Only salient channels have more than one step. ``spike`` and ``binary`` show what hardware does;
    they are not faster. Gradients are those of ``fake`` in all modes. With 16 bits this is a linear layer.
    Source: Xing et al., arXiv 2407.04752.
    """
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise UsageError(f"gif_linear: x {tuple(x.shape)} needs weights (O, C), not {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise UsageError(f"gif_linear: bias has shape {tuple(bias.shape)}, not {tuple(weight.shape[:1])}")
    if mode not in ("fake", "spike", "binary"):
        raise UsageError(f"gif_linear: mode must be 'fake', 'spike' or 'binary', not {mode!r}")
    if scheme.bits < OFF:
        check_charges("gif_linear", x, scheme, salient, scale)
        if salient is not None and salient.dim() != 1:
            raise UsageError(f"gif_linear: salient must be ({x.shape[-1]},), not {tuple(salient.shape)}")
        if mode != "fake":
            check_emittable("gif_linear", scheme, salient)
    if traced():
        from spiking_lm.kernels import library

        return library.gif_linear(x, weight, bias, scheme, salient, scale, mode)
    out: Tensor = call("gif_linear", x, weight, bias, scheme, salient, scale, mode=mode)
    return out


def check_charges(
    where: str, x: Tensor, scheme: ActivationScheme, salient: Tensor | None, scale: Tensor | None
) -> None:
    """Raise UsageError unless ``x (..., C)`` can be put on the scheme's grid with these salient channels and limits."""
    if not x.dtype.is_floating_point or x.dim() == 0 or x.shape[-1] == 0:
        raise UsageError(f"{where}: x must be a floating-point tensor (..., C), not {x.dtype} {tuple(x.shape)}")
    if salient is not None:
        if scheme.salient is None:
            raise UsageError(f"{where}: salient channels were given, but the scheme of the activations has none")
        if salient.dtype != torch.bool or (salient.dim() == 1 and salient.shape != x.shape[-1:]):
            raise UsageError(
                f"{where}: salient must be bool ({x.shape[-1]},), one per channel, not {salient.dtype} "
                f"{tuple(salient.shape)}"
            )
    if (scale is None) != (scheme.scale == "dynamic"):
        raise UsageError(
            f"{where}: the activations' scheme has a {scheme.scale} scale, but {'no' if scale is None else 'a'} scale "
            "was given",
            hint="spiking_lm.gif.calibrate_scale finds the static scale of a layer",
        )
    if scale is not None and scale.shape != (2,):
        raise UsageError(f"{where}: a static scale is the least and the greatest value, (2,), not {tuple(scale.shape)}")


def check_emittable(where: str, scheme: ActivationScheme, salient: Tensor | None) -> None:
    """Raise UsageError when the greatest code of a salient channel is more than its steps can emit."""
    if salient is not None and scheme.salient is not None and scheme.grid == "reference":
        steps, most = scheme.salient.steps, 2**scheme.bits - 1
        raise UsageError(
            f"{where}: on the reference grid salient codes reach {steps * 2**scheme.bits - 1}, but {steps} steps of at "
            f"most {most} spikes emit {steps * most}",
            hint="grid: exact has codes that spikes can emit; mode: fake works on both",
        )
