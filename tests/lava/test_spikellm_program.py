"""A transformer's matrices as graded synapses: spikes, sums and logits of the model; in Lava, the same."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spiking_lm
from spiking_lm.errors import DataError, LoweringError, PluginError
from spiking_lm.hardware import check_graph, load_program, lower
from spiking_lm.host import HostModel, HostOp
from spiking_lm.integers import GIFNeurons, IntegerProduct
from spiking_lm.interfaces import SpikingLanguageModel
from spiking_lm_lava.arithmetic import STATE_LIMIT
from spiking_lm_lava.config import LavaConfig
from spiking_lm_lava.executor import LavaExecutor
from spiking_lm_lava.simulator import Simulator
from spiking_lm_lava.spikellm import ProductsProgram, check_products, lower_products, reads_counts

SIZES: dict[str, Any] = {
    **{"vocab_size": 60, "n_layer": 2, "n_embd": 24, "n_inner": 40, "n_head": 4, "n_kv_head": 2, "head_dim": 6},
    **{"ctx_len": 256, "rope_theta": 500.0, "cache": {"bits": 4}},
}
STATIC = {"weights": {"bits": 4}, "activations": {"bits": 8, "scale": "static"}}
GROUPED = {
    "weights": {"bits": 8, "group_size": 9},
    "activations": {"bits": 4, "scale": "static", "salient": {"rate": 0.25, "steps": 4}},
    "rotation": True,
}
TERNARY = {
    "weights": {"type": "ternary"},
    "activations": {"bits": 4, "scale": "static", "spikes": "signed"},
}
TOKENS = np.random.default_rng(0).integers(0, 60, 30)


def spikellm(**config: Any) -> SpikingLanguageModel:
    torch.manual_seed(3)
    model = spiking_lm.create_model("spikellm", **{**SIZES, **STATIC, **config})
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.4 + (parameter.ndim == 1)
    for name, buffer in model.named_buffers():
        if name.endswith("salient"):
            buffer.copy_(torch.rand(buffer.shape) < 0.25)
    return model.double().eval()


@pytest.mark.parametrize("config", [{}, GROUPED, TERNARY], ids=["int4", "grouped", "ternary"])
def test_the_program_is_the_model(config: dict[str, Any]) -> None:
    """Every count in float64; logits are given in float32."""
    model, tokens = spikellm(**config), torch.from_numpy(TOKENS)
    with torch.no_grad():
        output = model(tokens[None], return_spikes=True)
    program = lower_products(model, LavaConfig())
    seen: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    program.host.run(TOKENS, None, lambda name, counts, sums: seen.setdefault(name, (counts, sums)))
    for name, (counts, sums) in seen.items():
        np.testing.assert_array_equal(counts, output.spikes[f"{name}.input"][0].numpy(), err_msg=name)
        found = program._with(program._simulated, _Ignored()).by_name[name].dynamics.add_up(counts)
        np.testing.assert_array_equal(found, sums, err_msg=name)
    result = program.run(TOKENS)
    np.testing.assert_allclose(result.logits, output.logits[0], rtol=1e-6, atol=1e-6)
    spikes = sum(int((counts != 0).sum()) for counts, _ in seen.values())
    assert result.counters["counts"]["from_host"] >= spikes > 0
    first = program.run(TOKENS[:7])
    second = program.run(TOKENS[7:], first.state)
    np.testing.assert_array_equal(np.concatenate([first.logits, second.logits]), result.logits)


class _Ignored:
    def add(self, sent: object) -> None:
        """Count nothing."""


def test_weights_go_in_the_bits_that_they_have() -> None:
    bits = {}
    for name, config in (("int4", {}), ("grouped", GROUPED), ("ternary", TERNARY)):
        program = lower_products(spikellm(**config), LavaConfig())
        bits[name] = {matrix.bits for matrix in program.matrices.values()}
        for matrix in program.matrices.values():
            for _, synapse, _ in matrix.nodes():
                assert synapse.num_weight_bits == matrix.bits
                assert len(np.unique(synapse.prepared)) == len(np.unique(synapse.weight))
    assert max(bits["grouped"]) == 8
    assert bits["ternary"] == {2}
    assert max(bits["int4"]) <= 5


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 300), st.sampled_from((8, 12, 14)), st.booleans())
def test_parts_hold_24_bits_whatever_is_read(seed: int, inputs: int, bits: int, signed: bool) -> None:
    """Sums of any counts are those of the product, however many parts that takes."""
    rng = np.random.default_rng(seed)
    groups, outputs = int(rng.integers(1, 4)), 3
    top = np.array([2**bits - 1, 4 * (2**bits - 1)])
    low = -top if signed else np.zeros(2, np.int64)
    neurons = GIFNeurons(bits, 4, rng.random(inputs) < 0.3, np.array([4.0, 1.0]), low, top, np.zeros(2, np.int64))
    product = IntegerProduct(
        rng.integers(-128, 128, (outputs, inputs)).astype(np.int8),
        np.minimum(np.arange(inputs) * groups // inputs, groups - 1).astype(np.int32),
        rng.random((outputs, groups)),
        rng.integers(-3, 4, (outputs, groups)).astype(np.int32),
        rng.integers(-3, 4, (outputs, groups)).astype(np.int32),
        np.where(neurons.salient, 1, 4).astype(np.int32),
        1.0,
        np.zeros(outputs),
    )
    ops = [
        HostOp("table", "embedding", ("tokens",), inputs, None, {"weight": "table"}),
        HostOp("counts", "neuron", ("table",), inputs, neurons),
        HostOp("product", "linear", ("counts",), outputs, product),
    ]
    host = HostModel(ops, {"table": np.zeros((outputs, inputs))})
    program = ProductsProgram(host, dict.fromkeys(host.by_name, 0), LavaConfig(), model="toy")
    (matrix,) = program.matrices.values()
    columns = np.sort(np.concatenate([part.columns for part in matrix.parts]))
    np.testing.assert_array_equal(columns, np.arange(inputs))
    kind = neurons.salient.astype(int)
    ends = np.stack([low[kind], top[kind]])
    counts = np.where(rng.random((9, inputs)) < 0.5, ends[0], ends[1])
    counts[0], counts[1] = ends
    np.testing.assert_array_equal(
        program._with(program._simulated, _Ignored()).by_name["product"].dynamics.add_up(counts),  # type: ignore[arg-type]
        product.add_up(counts),
    )
    joined = program.joined
    simulator = Simulator(joined.network)
    charges = counts * product.gain
    np.testing.assert_array_equal(
        joined.sums("product", charges, lambda x: simulator.run({"x": x}).sinks["y"]),
        program._simulated("product", charges),
    )
    for one, other in pairwise(matrix.parts):
        if one.group == other.group:  # cut only where it has to be
            together = product.weight[:, [*one.columns, other.columns[0]]].astype(np.int64)
            up, down = np.maximum(together, 0).sum(1), np.minimum(together, 0).sum(1)
            ends = np.abs([up * matrix.high + down * matrix.low, up * matrix.low + down * matrix.high])
            assert ends.max() >= STATE_LIMIT


def test_a_product_of_a_single_weight_beyond_24_bits_is_refused() -> None:
    assert STATE_LIMIT == 2**23
    neurons = GIFNeurons(
        18, 1, np.zeros(2, bool), np.ones(2), np.zeros(2, np.int64), np.full(2, 2**18 - 1), np.zeros(2, np.int64)
    )
    product = IntegerProduct(
        np.full((1, 2), 127, np.int8), np.zeros(2, np.int32), np.ones((1, 1)), *2 * [np.zeros((1, 1), np.int32)],
        np.ones(2, np.int32), 1.0, np.zeros(1),
    )  # fmt: skip
    ops = [
        HostOp("table", "embedding", ("tokens",), 2, None, {"weight": "table"}),
        HostOp("counts", "neuron", ("table",), 2, neurons),
        HostOp("product", "linear", ("counts",), 1, product),
    ]
    host = HostModel(ops, {"table": np.zeros((1, 2))})
    with pytest.raises(LoweringError, match=r"op 'product' \(linear\): a count of up to 262,143 times a weight"):
        ProductsProgram(host, dict.fromkeys(host.by_name, 0), LavaConfig(), model="toy")


def test_counts_are_those_of_the_network_that_is_placed() -> None:
    """One matrix: what is counted is what its own network, watched by the counter, gives."""
    from spiking_lm_lava.energy import Counter

    program = lower_products(spikellm(n_layer=1), LavaConfig())
    result = program.run(TOKENS)
    counter = Counter(program.partition)
    seen: dict[str, np.ndarray] = {}
    program.host.run(TOKENS, None, lambda name, counts, sums: seen.setdefault(name, counts))
    for name, counts in seen.items():
        matrix = program.matrices[name]
        charges = np.pad(counts * matrix.product.gain, ((0, 1), (0, 0)))
        inputs = {
            source: charges[:, part.columns] for part, source in zip(matrix.parts, matrix.names("source"), strict=True)
        }
        Simulator(matrix.network()).run(inputs, observe=counter.add)
    expected = {"tokens": 30, "executor": "simulator", "counts": counter.counts.to_dict()}
    assert result.counters == expected
    assert counter.counts.steps == 7 * 31


def test_the_report_says_what_is_where() -> None:
    model = spikellm(**GROUPED)
    program = lower_products(model, LavaConfig())
    report = program.report(program.run(TOKENS))
    matrices = {op.name for op in model.graph() if op.kind == "linear" and op.name != "lm_head"}
    assert len(matrices) == 14
    placed = {op.name: (op.kind, op.runs_on) for op in report.placement}
    assert placed == {op.name: (op.kind, "neuromorphic" if op.name in matrices else "host") for op in model.graph()}
    figures = {figure.name: figure.value for figure in report.figures}
    on_cores = sum(op.weight[0] * op.weight[1] for op in model.graph() if op.name in matrices and op.weight)
    every = sum(op.weights for op in report.placement)
    assert figures["weights on neuromorphic cores"] == pytest.approx(100 * on_cores / every)
    assert 0 < figures["operations on neuromorphic cores"] < 100
    assert figures["synaptic operations per token"] > 0
    assert any(text.startswith("no energy") for text in report.warnings)
    assert program.report().warnings


def test_saved_and_loaded_it_is_the_same() -> None:
    program = lower_products(spikellm(**GROUPED), LavaConfig())
    record, tensors = program.to_folder()
    again = ProductsProgram.from_folder(record, tensors)
    one, other = program.run(TOKENS), again.run(TOKENS)
    np.testing.assert_array_equal(one.logits, other.logits)
    assert one.counters == other.counters
    with pytest.raises(ValueError, match="operations"):
        ProductsProgram.from_folder({**record, "operations": {}}, tensors)
    with pytest.raises(DataError):
        ProductsProgram.from_folder({**record, "options": {"executor": "loihi"}}, tensors)


def test_what_cannot_be_is_refused() -> None:
    dynamic = {"activations": {"bits": 8, "scale": "dynamic"}}
    model = spiking_lm.create_model("spikellm", **{**SIZES, **STATIC, **dynamic})
    assert reads_counts(model.graph())
    with pytest.raises(LoweringError, match="dynamic scale"):
        check_products(model.graph(), LavaConfig())
    with pytest.raises(LoweringError, match="dynamic scale"):
        lower_products(model, LavaConfig())
    with pytest.raises(LoweringError, match="no board"):
        lower_products(spikellm(n_layer=1), LavaConfig(board="nahuku"))


def test_lava_gives_the_same_logits() -> None:
    try:
        LavaExecutor.find()
    except PluginError as error:
        pytest.skip(f"{error.message}: {error.hint}")
    model = spikellm(**GROUPED)
    ours = lower_products(model, LavaConfig()).run(TOKENS[:9])
    theirs = lower_products(model, LavaConfig(executor="lava")).run(TOKENS[:9])
    np.testing.assert_array_equal(ours.logits, theirs.logits)
    assert {**theirs.counters, "executor": "simulator"} == ours.counters


def test_by_name_from_model_to_folder_and_back(tmp_path: Path) -> None:
    model = spikellm(n_layer=1)
    check_graph(model.graph(), "lava")
    program = lower(model, "lava")
    assert isinstance(program, ProductsProgram)
    program.save(tmp_path / "program")
    again = load_program(tmp_path / "program")
    np.testing.assert_array_equal(again.run(TOKENS).logits, program.run(TOKENS).logits)
    assert again.report().to_dict() == program.report().to_dict()
