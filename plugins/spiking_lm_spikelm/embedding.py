"""The word embedding, with a table of two or three levels per row where that is wanted."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spiking_lm_spikelm.config import Precision

TERNARY_SCALE = 4 / 3
"""Scale of a ternary row in units of its mean size, with which a uniform row keeps that size."""


class QuantizedEmbedding(nn.Embedding):
    """An embedding whose rows are, with a scale g each, g times -1 and 1, or -1, 0 and 1; real with ``bits="full"``.

    ``weight`` (V, H) is what is trained; the gradient of the table passes to it unchanged, g being constant.
    """

    def __init__(self, vocab_size: int, size: int, bits: Precision = "full") -> None:
        super().__init__(vocab_size, size)
        self.bits = bits

    def effective_weight(self) -> Tensor:
        """Return the table (V, H) that is looked up in, differentiable."""
        return quantize_rows(self.weight, self.bits)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ``ids (...)`` -> ``(..., H)``."""
        return quantize_rows(F.embedding(ids, self.weight), self.bits)


def quantize_rows(w: Tensor, bits: Precision) -> Tensor:
    """Return ``w (..., H)`` in few levels per row: ternary g round(clip(w/g, -1, 1)), binary g sign(w).

    g is 4/3 of the mean ``|w|`` of the row, or just that mean for binary rows. A row of zeros stays one.
    """
    if bits == "full":
        return w
    with torch.no_grad():
        size = w.abs().mean(-1, keepdim=True)
        if bits == "binary":
            levels = size * w.sign()
        else:
            g = (TERNARY_SCALE * size).clamp(min=torch.finfo(w.dtype).tiny)
            levels = g * (w / g).clamp(-1, 1).round()
    return levels + (w - w.detach())  # exactly the levels: the difference is zero
