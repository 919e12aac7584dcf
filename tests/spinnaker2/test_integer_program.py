"""A transformer on SpiNNaker 2: spikes and logits of the model, without torch; what it costs, and what cannot be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import spiking_lm
from spiking_lm.errors import CheckpointError, ConfigError, DataError
from spiking_lm.hardware import LoweringError, check_graph, load_program, lower
from spiking_lm.interfaces import SpikingLanguageModel
from spiking_lm_spinnaker2.integer_program import IntegerProgram
from spiking_lm_spinnaker2.mapping import BUDGET

SIZES: dict[str, Any] = {
    **{"vocab_size": 60, "n_layer": 2, "n_embd": 24, "n_inner": 40, "n_head": 4, "n_kv_head": 2, "head_dim": 6},
    **{"ctx_len": 64, "rope_theta": 500.0, "cache": {"bits": 4}},
}
STATIC = {"weights": {"bits": 4}, "activations": {"bits": 8, "scale": "static"}}
GROUPED = {
    "weights": {"bits": 8, "group_size": 9},
    "activations": {"bits": 4, "scale": "static", "salient": {"rate": 0.25, "steps": 4}},
    "rotation": True,
}


def spikellm(dtype: torch.dtype = torch.float64, **config: Any) -> SpikingLanguageModel:
    torch.manual_seed(3)
    model = spiking_lm.create_model("spikellm", **{**SIZES, **STATIC, **config})
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.4 + (parameter.ndim == 1)
    for name, buffer in model.named_buffers():
        if name.endswith("salient"):
            buffer.copy_(torch.rand(buffer.shape) < 0.25)
    return model.to(dtype).eval()


def place(model: SpikingLanguageModel, **options: Any) -> IntegerProgram:
    program = lower(model, "spinnaker2", **{"numerics": "int8", **options})
    assert isinstance(program, IntegerProgram)
    return program


TOKENS = np.random.default_rng(0).integers(0, 60, 30)


@pytest.mark.parametrize("config", [{}, GROUPED])
@pytest.mark.parametrize("kernel", ["row", "event"])
def test_the_program_is_the_model(config: dict[str, Any], kernel: str) -> None:
    """Every spike in float64; logits are given in float32."""
    model, tokens = spikellm(**config), torch.from_numpy(TOKENS)
    with torch.no_grad():
        output = model(tokens[None], return_spikes=True)
    program = place(model, kernel=kernel)
    result = program.run(TOKENS)
    np.testing.assert_allclose(result.logits, output.logits[0], rtol=1e-6, atol=1e-6)
    for stage in result.counters["stages"]:
        counts = output.spikes[f"{stage['op']}.input"][0]
        outputs = program.host.by_name[stage["op"]].size
        assert stage["events_in"] == int((counts != 0).sum())
        assert stage["useful_macs"] == stage["events_in"] * outputs
    first, second = program.run(TOKENS[:7]), None
    second = program.run(TOKENS[7:], first.state)
    np.testing.assert_array_equal(np.concatenate([first.logits, second.logits]), result.logits)


def test_a_greedy_continuation_is_the_models() -> None:
    model = spikellm()
    prompt = torch.from_numpy(TOKENS[:5])[None]
    expected = spiking_lm.generate(model, prompt, max_new_tokens=12, temperature=0.0)[0]
    program = place(model)
    result, text = program.run(TOKENS[:5]), TOKENS[:5].tolist()
    for _ in range(12):
        text.append(int(result.logits[-1].argmax()))
        result = program.run(np.array(text[-1:]), result.state)
    assert text == expected.tolist()


def test_every_op_of_the_graph_is_placed() -> None:
    model = spikellm(**GROUPED)
    report = place(model).report()
    placed = {op.name: (op.kind, op.runs_on) for op in report.placement}
    matrices = {op.name for op in model.graph() if op.kind == "linear" and op.name != "lm_head"}
    assert len(matrices) == 14
    expected = {op.name: (op.kind, "embedded-core" if op.name in matrices else "host") for op in model.graph()}
    assert placed == expected
    (warning,) = [text for text in report.warnings if text.startswith("on the host")]
    for name in ("lm_head", "model.layers.*.self_attn.attention", "model.layers.*.mlp.rotate", "model.norm"):
        assert name in warning


def test_what_the_kernels_cost() -> None:
    """Event: a MAC for each spike that arrives and output. Row: the MAC arrays, a salient channel once per step."""
    model = spikellm(**GROUPED)
    runs = {kernel: place(model, kernel=kernel).run(TOKENS).counters["stages"] for kernel in ("event", "row")}
    salient = {name: int(mask.sum()) for name, mask in model.named_buffers() if name.endswith(".salient")}
    for event, row in zip(runs["event"], runs["row"], strict=True):
        op = model.graph()[row["op"]]
        assert op.weight is not None
        outputs, inputs = op.weight
        inputs += 3 * salient[f"{op.name}.salient"]
        assert row["macs"] == row["mla_macs"] == 30 * outputs * inputs
        assert row["busy_cycles"] == pytest.approx(30 * np.ceil(outputs / 16) * inputs / 0.17)
        assert (event["macs"], event["mla_macs"]) == (event["useful_macs"], 0)
        assert event["busy_cycles"] == pytest.approx(32.4 * event["macs"] + 100 * event["events_in"])
        assert event["packets"] == row["packets"] == 30 * outputs * -(-op.weight[1] // 9), "a sum per group"
        assert event["useful_macs"] == row["useful_macs"]


def test_matrices_that_read_the_same_work_at_once() -> None:
    program = place(spikellm())
    result = program.run(TOKENS)
    steps = [stage["step"] for stage in result.counters["stages"]]
    assert steps == [0, 0, 0, 1, 2, 2, 3, 4, 4, 4, 5, 6, 6, 7]
    figures = {figure.name: figure for figure in program.report(result).figures}
    assert figures["latency of one token"].note == "8 stages"
    one_by_one = place(spikellm(), schedule="sequential")
    stages = one_by_one.run(TOKENS).counters["stages"]
    slowest = {step: max(s["slowest_cycles"] for s in stages if s["step"] == step) for step in range(8)}
    time = {f.name: f.value for f in one_by_one.report(one_by_one.run(TOKENS)).figures}["time per token"]
    assert time == pytest.approx(1e3 * sum(slowest.values()) / 150e6)


def test_sums_beyond_the_arrays_accumulator_are_counted() -> None:
    large = {"weights": {"bits": 8, "symmetric": True}, "n_inner": 2048, "n_layer": 1, "rotation": False}
    model = spikellm(**large)
    down = model.get_submodule("model.layers.0.mlp.down_proj")
    down.weight_codes.fill_(254)  # the greatest weight everywhere
    overflows = {
        kernel: [
            s["accumulator_overflows"] for s in place(model, kernel=kernel, chips=3).run(TOKENS).counters["stages"]
        ]
        for kernel in ("row", "event")
    }
    assert not any(overflows["event"])
    assert [n > 0 for n in overflows["row"]] == [*6 * [False], True]


def test_a_larger_model_takes_more_chips_and_says_how_many() -> None:
    model = spikellm(n_embd=96, n_inner=200, head_dim=24, n_layer=1)
    with pytest.raises(LoweringError, match=r"model\.layers\.0\.mlp\.up_proj does not fit: its 20800 bytes take 1 PEs"):
        place(model, pes_per_chip=5)
    with pytest.raises(LoweringError) as error:
        place(model, pes_per_chip=5)
    assert error.value.hint == "would fit: chips=2"
    program = place(model, pes_per_chip=5, chips=2)
    assert program.pe_map.chips == 2
    assert program.pe_map.max_bytes == 256 + 200 * (96 + 8) < BUDGET
    spread = place(model, pes={"model.layers.0.mlp.down_proj": 12})
    assert spread.pe_map.n_pes == 18
    np.testing.assert_array_equal(spread.run(TOKENS).logits, program.run(TOKENS).logits)


def test_other_options_are_refused() -> None:
    model = spikellm()
    with pytest.raises(LoweringError, match="whole numbers") as error:
        lower(model, "spinnaker2")
    assert "numerics=int8" in str(error.value.hint)
    with pytest.raises(LoweringError, match="decoder=pe"):
        place(model, decoder="pe")
    with pytest.raises(ConfigError, match=r"no layer 'mlp\.down'"):
        place(model, pes={"mlp.down": 1})


def test_a_dynamic_scale_is_refused_by_name() -> None:
    model = spikellm(activations={"bits": 4})
    for refuse in (lambda: place(model), lambda: check_graph(model.graph(), "spinnaker2", numerics="int8")):
        with pytest.raises(
            LoweringError, match=r"'model\.layers\.0\.self_attn\.q_proj' \(linear\) has a thresh"
        ) as error:
            refuse()
        assert "convert.activations.scale=static" in str(error.value.hint)


def test_a_program_runs_where_there_is_no_torch(tmp_path: Path) -> None:
    program = place(spikellm(**GROUPED))
    program.save(tmp_path / "program")
    np.save(tmp_path / "tokens.npy", TOKENS)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np; from spiking_lm.hardware import load_program\n"
        "program = load_program('program'); result = program.run(np.load('tokens.npy'))\n"
        "np.save('logits.npy', result.logits); print(len(program.report(result).figures))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert int(done.stdout) == 15
    result = program.run(TOKENS)
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), result.logits)
    again = load_program(tmp_path / "program")
    assert again.run(TOKENS).counters == result.counters
    assert again.report(result).to_dict() == program.report(result).to_dict()


def test_the_state_of_another_program_is_refused() -> None:
    program = place(spikellm())
    with pytest.raises(DataError, match="not one of this program"):
        program.run(TOKENS, [(0, 0)])
    for other in ({"cache": {"bits": 16}}, {"n_layer": 1}, {"n_kv_head": 4}):
        with pytest.raises(DataError, match="not one of this program"):
            program.run(TOKENS, place(spikellm(**other)).run(TOKENS).state)
    with pytest.raises(DataError, match="0 to 59"):
        program.run(np.array([60]))


def test_an_altered_program_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "program"
    place(spikellm()).save(folder)
    weights = load_file(folder / "weights.safetensors")
    name = "model.layers.1.mlp.gate_proj:weight"
    save_file({x: array for x, array in weights.items() if x != name}, folder / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"weights\.safetensors"):
        load_program(folder)
    with pytest.raises(DataError, match=name):
        load_program(folder, verify=False)
    text = (folder / "program.json").read_text(encoding="utf-8")
    save_file(weights, folder / "weights.safetensors")
    (folder / "program.json").write_text(text.replace('"type": "Gate"', '"type": "Gale"', 1), encoding="utf-8")
    with pytest.raises(DataError, match="Gale"):
        load_program(folder, verify=False)
