"""Where Triton kernels can run: on which devices, with which tensors, and why not."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef

FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32})
"""What kernels read and write; they compute in float32."""


def interpreted() -> bool:
    """Say whether Triton was told to interpret kernels on the processor, which it is while it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def available() -> bool | str:
    """Say whether this machine can run the kernels, or why not."""
    if interpreted():
        return True
    if not torch.cuda.is_available():
        return "torch sees no GPU here (TRITON_INTERPRET=1 has the kernels interpreted: for tests, not for work)"
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(torch.cuda.current_device()).gcnArchName.partition(":")[0]
        return name.startswith("gfx9") or f"the kernels are compiled and checked for AMD's gfx9 (CDNA), not for {name}"
    capability = torch.cuda.get_device_capability()
    return capability >= (8, 0) or f"compute capability {capability[0]}.{capability[1]} is below 8.0"


def takes(*tensors: Tensor | None, dtypes: frozenset[torch.dtype] | None = FLOATS) -> bool | str:
    """Say whether kernels can read these tensors (None is passed over; ``dtypes`` None: of any type), or why not."""
    given = [t for t in tensors if t is not None]
    for t in given:
        if dtypes is not None and t.dtype not in dtypes:
            return f"{t.dtype} is not one of {', '.join(sorted(str(d).removeprefix('torch.') for d in dtypes))}"
        if t.device.type != "cuda" and not interpreted():
            return f"it is compiled for GPUs, and a tensor is on the {t.device.type}"
        if t.device != given[0].device:
            return f"tensors are on {given[0].device} and on {t.device}"
    return True


def stages(nvidia: int = 8, amd: int = 4) -> int:
    """Return how many steps of a loop are on their way to the processors at once; as it stands, for scans.

    NVIDIA's copy to shared memory asynchronously; on AMD's what is on its way takes registers.
    """
    return nvidia if torch.version.hip is None else amd


def operator(name: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Make a ``torch.library`` operator of a function, which launches on the GPU of its first argument.

    Triton launches on whichever GPU is current, and would hand it addresses of another one.
    """

    def declare(function: Callable[..., Any]) -> CustomOpDef:
        @wraps(function)
        def there(*args: Any) -> Any:
            with torch.cuda.device_of(args[0]):  # type: ignore[no-untyped-call]
                return function(*args)

        return torch.library.custom_op(f"spiking_lm_triton::{name}", there, mutates_args=())

    return declare
