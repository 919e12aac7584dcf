"""Compiles what the host code of Triton kernels would launch, for targets that are not here."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
COMPILING = os.environ.get("SPIKING_LM_TRITON_AOT") == "1" and not INTERPRETING

TARGETS = ("sm_80", "sm_90", "gfx942")
MOST_SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory (LDS) that a program may have."""


@dataclass(frozen=True)
class Compiled:
    """A kernel as it would be launched on one target."""

    kernel: str
    target: str
    constants: Mapping[str, Any]
    threads: int
    registers: int
    spilled: int
    """Registers or bytes that did not fit, stack and local memory included."""
    shared: int
    assembly: str
    """PTX or AMD's assembly."""

    @property
    def name(self) -> str:
        return f"{self.kernel}@{self.target}"


class NoGPU:
    """What Triton asks a driver for while it compiles; device 0 to 2 are the targets."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.device = 0
        self.targets = [GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)]

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.targets[self.device]


def described(kernel: Any, target: str, options: dict[str, Any], folder: Path) -> Compiled:
    constants = {name: value for name, value in options.items() if name.isupper()}
    threads = kernel.metadata.num_warps * (64 if target.startswith("gfx") else 32)
    if "cubin" in kernel.asm:
        registers, spilled = _of_cubin(kernel.asm["cubin"], folder / "kernel.cubin")
        assembly = kernel.asm["ptx"]
    else:
        assembly = kernel.asm["amdgcn"]

        def said(what: str) -> int:
            return int(re.search(rf"\.{what}:\s+(\d+)", assembly)[1])  # type: ignore[index]

        registers = said("vgpr_count")
        spilled = said("vgpr_spill_count") + said("sgpr_spill_count") + said("private_segment_fixed_size")
    name = kernel.metadata.name
    return Compiled(name, target, constants, threads, registers, spilled, kernel.metadata.shared, assembly)


def _of_cubin(cubin: bytes, file: Path) -> tuple[int, int]:
    """Ask NVIDIA's own tool, which Triton brings along, for registers, and for stack and local memory."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    file.write_bytes(cubin)
    said = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"]
