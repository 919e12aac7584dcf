"""The event-based gated recurrent unit (Subramoney et al., arXiv 2206.06178) and the Norse neurons."""

from __future__ import annotations

SPIKING_LM_API = 1
