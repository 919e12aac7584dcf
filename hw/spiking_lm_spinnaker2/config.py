"""The options of the SpiNNaker 2 backend (torch-free)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from spiking_lm.config import BackendConfig

Where = Literal["host", "pe", "auto"]
"""auto: on PEs if the ones that are left hold it, else on the host."""


class SpiNNaker2Config(BackendConfig):
    """How an event-based GRU language model is placed and computed; the defaults are those of the published experiment.

    Source: arXiv 2312.09084.
    """

    numerics: Literal["fp32", "int8"] = "fp32"
    """int8: weights int8 with a scale per gate row, activations 8 bit, sums int32, states s0.15, gates fp32."""
    kernel: Literal["row", "event"] = "row"
    """row: every stored weight is visited at every token, as published. event: only those of active sources."""
    storage: Literal["csr", "dense"] = "csr"
    """dense: zeros too, no indices. With int8 and the row kernel the MAC arrays compute it."""
    index_bytes: Literal[2, 4] | None = None
    """Size of a CSR index; None: 4 with fp32, as published, 2 with int8."""
    schedule: Literal["pipelined", "sequential"] = "pipelined"
    """pipelined: layers work on successive tokens at once, which needs the text in advance. sequential: one by one."""
    operating_point: Literal["150MHz", "300MHz"] = "150MHz"
    """150 MHz at 0.5 V or 300 MHz at 0.8 V."""
    tick_us: float | None = Field(default=None, gt=0)
    """Period of the chip's timer, to which every stage is held; None: as long as the slowest stage of the run."""
    chips: int = Field(default=1, ge=1)
    """Chips that may be used."""
    pes_per_chip: int = Field(default=150, ge=1, le=152)
    """PEs that may be used on each; 148 through py-spinnaker2."""
    pes: list[int] | dict[str, int] = []
    """PEs of the EGRU layers in order, or of any placed operation by name; others get the fewest that hold them."""
    embedding: Where = "host"
    decoder: Where = "host"
    """Of the output head, projection included."""
    unused_pes: Literal["asleep", "off"] = "asleep"
    """What PEs without work do: it decides the base power of a small model."""
    e_packet: float = Field(default=0.0, ge=0)
    """Energy of a packet in pJ; never published."""
    e_dram: float = Field(default=0.0, ge=0)
    """Energy of a byte to or from DRAM in pJ; never published."""

    @model_validator(mode="after")
    def _consistent(self) -> SpiNNaker2Config:
        if self.storage == "dense" and self.index_bytes is not None:
            raise ValueError("dense storage has no indices: leave index_bytes out")
        counts = self.pes.values() if isinstance(self.pes, dict) else self.pes
        if any(count < 1 for count in counts):
            raise ValueError("pes: a layer takes at least one PE")
        return self

    @property
    def on_mac_array(self) -> bool:
        """Whether matrices are computed by the MAC arrays rather than by the processors."""
        return self.numerics == "int8" and self.storage == "dense" and self.kernel == "row"
