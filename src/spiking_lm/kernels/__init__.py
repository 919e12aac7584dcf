"""Operations of spiking models, each declared once and run by the fastest implementation that fits.

``lif_scan`` runs leaky integrate-and-fire neurons, ``egru_scan`` event-based gated recurrent units, ``wkv`` the linear
attention of RWKV-4, ``elastic_scan`` elastic bi-spiking neurons, ``attention`` softmax attention in several spike
steps, ``gif_linear`` products of Generalized Integrate-and-Fire spikes. ``spike_linear``, ``int8_linear``,
``packed_linear`` and ``ternary_linear`` are the products of one token; ``pack_spikes`` makes bits of spikes. ``use``
forces an implementation, ``explain_choice`` says which one would run and why the others would not.
"""

from __future__ import annotations

from spiking_lm.kernels.dispatch import explain_choice, use
from spiking_lm.kernels.linear_ops import (
    int8_linear,
    pack_spikes,
    pack_ternary,
    packed_linear,
    spike_linear,
    ternary_linear,
)
from spiking_lm.kernels.ops import attention, egru_scan, elastic_scan, gif_linear, lif_scan, wkv
from spiking_lm.kernels.reference import WKVState, spike, surrogate_gradient

__all__ = [
    "WKVState",
    "attention",
    "egru_scan",
    "elastic_scan",
    "explain_choice",
    "gif_linear",
    "int8_linear",
    "lif_scan",
    "pack_spikes",
    "pack_ternary",
    "packed_linear",
    "spike",
    "spike_linear",
    "surrogate_gradient",
    "ternary_linear",
    "use",
    "wkv",
]
