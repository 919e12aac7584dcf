"""The parameters of a model's ops as arrays, for backends that lower a model from its graph and its state dict."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spiking_lm.errors import LoweringError
from spiking_lm.graph import Op
from spiking_lm.interfaces import SpikingLanguageModel


class OpParameters:
    """Finds parameters by op and role (:attr:`Op.parameters`), as arrays of ``dtype`` with matrices (out, in)."""

    def __init__(self, model: SpikingLanguageModel, dtype: type[np.floating[Any]]) -> None:
        self.state, self.dtype = model.state_dict(), dtype

    def of(self, op: Op, role: str) -> NDArray[Any]:
        """Return the parameter of ``op`` in a role. Raises: LoweringError when there is none, or it is not finite."""
        found = self.find(op, role)
        if found is None:
            raise LoweringError(f"op {op.name!r} ({op.kind}): the model's state dict has no {role} for it")
        return found

    def find(self, op: Op, role: str) -> NDArray[Any] | None:
        """Return the parameter of ``op`` in a role, or None. Raises: LoweringError when it is not finite."""
        turned = f"{role}_t" in op.parameters
        name = op.parameters.get(f"{role}_t" if turned else role, f"{op.module}.{role}")
        if name not in self.state:
            return None
        held = self.state[name].detach().double().cpu().numpy()
        if not np.isfinite(held).all():
            raise LoweringError(f"op {op.name!r} ({op.kind}): its {role} {name!r} holds values that are not finite")
        return np.ascontiguousarray(held.T if turned else held, self.dtype)
