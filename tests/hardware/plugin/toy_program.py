"""The program of the backend ``toy``: numpy alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from spiking_lm.hardware import Constant, Figure, PlacedOp, Program, ProgramReport, ProgramResult

NS_PER_EVENT = 10.0


class ToyProgram(Program):
    backend = "toy"

    def __init__(self, tensors: dict[str, Any], cores: int) -> None:
        self.tensors, self.cores = tensors, cores
        self.vocab_size = len(tensors["emb"])

    def run(self, tokens: Any, state: Any = None) -> ProgramResult:
        t = self.tensors
        h = np.zeros(t["mix"].shape[1], np.float32) if state is None else state
        rows, events = [], 0
        for x in t["emb"][self.check_tokens(tokens)]:
            h = np.float32(0.5) * h + (x @ t["mix"] + t["mix_bias"])
            y = np.maximum(h, 0)
            events += int((y > 0).sum())
            rows.append(y @ t["lift"] @ t["head"] + t["head_bias"])
        return ProgramResult(np.array(rows, np.float32).reshape(-1, self.vocab_size), h, {"events": events})

    def report(self, result: ProgramResult | None = None) -> ProgramReport:
        def place(name: str, kind: str, where: str, *tensors: str) -> PlacedOp:
            arrays = [self.tensors[tensor] for tensor in tensors]
            on_chip = where != "host"
            return PlacedOp(
                name,
                kind,
                "neuromorphic" if on_chip else "host",
                where,
                "fp32" if arrays else "",
                sum(int(np.count_nonzero(array)) for array in arrays),
                sum(array.nbytes for array in arrays),
            )

        placement = (
            place("emb", "embedding", "host", "emb"),
            place("mix", "linear", f"core 0-{self.cores - 1}", "mix", "mix_bias"),
            place("cells", "neuron", f"core 0-{self.cores - 1}"),
            place("lift", "linear", f"core 0-{self.cores - 1}", "lift"),
            place("head", "linear", "host", "head", "head_bias"),
        )
        figures = [Figure("cores", self.cores, "", "derived")]
        if result is not None:
            events = result.counters["events"]
            figures += [
                Figure("events", events, "", "simulated"),
                Figure("time", events * NS_PER_EVENT, "ns", "assumed"),
            ]
        constant = Constant("event", NS_PER_EVENT, "ns", "nobody measured it", "assumed")
        return ProgramReport("toy", "toy", placement, tuple(figures), (constant,), ("[a toy] energy is not known",))

    def to_folder(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"cores": self.cores}, self.tensors

    @classmethod
    def from_folder(cls, record: dict[str, Any], tensors: dict[str, Any]) -> ToyProgram:
        wanted = ("emb", "mix", "mix_bias", "lift", "head", "head_bias")
        return cls({name: tensors[name] for name in wanted}, record["cores"])
