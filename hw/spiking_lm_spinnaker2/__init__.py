"""SpiNNaker 2: an embedded simulator that is accurate per processing element, and the road to py-spinnaker2."""

from __future__ import annotations

SPIKING_LM_API = 1
