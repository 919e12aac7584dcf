"""SpikeGPT as programs: equal to the int8 model in torch, near the float model, and what cannot be lowered."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import spiking_lm
from spiking_lm.deployment import model_logits
from spiking_lm.errors import LoweringError, SpikingLMError
from spiking_lm.hardware import load_program, lower, score
from spiking_lm_lava.cells_spikegpt import GIF, WKV, HoldingLIF, TokenShift
from spiking_lm_lava.executor import LavaExecutor
from spiking_lm_lava.process import Synapse
from spiking_lm_lava.program import LOGITS, LavaProgram
from spiking_lm_lava.shares import fed_by
from spiking_lm_lava.simulator import reference
from spiking_lm_lava.torch_model import Int8Model

VOCAB = 41

INPUT = {"placement": "spike_input"}
FORMS: dict[str, dict[str, Any]] = {
    "spike input": INPUT,
    "canonical": {},
    "real embedding": {"binary_embedding": False},
    "second FFN, tied head": {**INPUT, "ffn_pre": True, "head_tying": True, "init": "torch"},
    "leaks less, one layer": {
        **INPUT,
        "n_layer": 1,
        "n_embd": 21,
        "neuron": {"type": "lif", "beta": 0.75, "threshold": 0.8, "compare": ">"},
    },
    "counts of spikes": {**INPUT, "neuron": {"type": "gif", "levels": 3}},
}


def a_model(form: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = spiking_lm.create_model("spikegpt", vocab_size=VOCAB, **{"n_layer": 2, "n_embd": 16, **form})
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "time" not in name:  # gains and biases that are not all one
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


@cache
def programs(form: str) -> tuple[Any, LavaProgram]:
    model = a_model(FORMS[form])
    program = lower(model, "lava")
    assert isinstance(program, LavaProgram)
    return model, program


TOKENS: NDArray[np.int64] = np.random.default_rng(1).integers(0, VOCAB, 60)


@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_int8_model_in_torch_to_the_bit_and_near_the_float_model(form: str) -> None:
    model, program = programs(form)
    result = program.run(TOKENS)
    assert np.array_equal(result.logits, program.reference_logits(TOKENS))
    real = model_logits(model, TOKENS)
    assert np.corrcoef(real.ravel(), result.logits.ravel())[0, 1] > (0.9 if form == "counts of spikes" else 0.97)
    # A token alone meets no spike that another one decided.
    first = program.run(TOKENS[:1]).logits
    assert np.abs(first - real[:1]).max() < 0.1 * np.abs(real).max()


def test_the_simulator_is_the_reference_and_goes_on_from_a_state() -> None:
    _, program = programs("spike input")
    rows = program.inputs(TOKENS[:20])
    whole = program.run(TOKENS)
    steps = program.pipeline.steps
    assert np.array_equal(
        reference(program.pipeline.network, rows).sinks[LOGITS][steps : steps + 20],
        program.simulator.run(rows).sinks[LOGITS][steps : steps + 20],
    )
    before = program.run(TOKENS[:23])
    after = program.run(TOKENS[23:], before.state)
    assert np.array_equal(np.concatenate([before.logits, after.logits]), whole.logits)


def test_every_path_is_as_long_as_it_must_be() -> None:
    _, program = programs("spike input")
    assert program.pipeline.network.uneven() == {}
    synapses_of_a_norm, matrices_of_a_block = 4, 4
    assert program.pipeline.steps == 2 * (2 * synapses_of_a_norm + matrices_of_a_block) + synapses_of_a_norm + 1


@pytest.mark.parametrize("form", ["spike input", "counts of spikes"])
def test_generation_through_the_valid_flag_gives_the_tokens_of_the_int8_model(form: str) -> None:
    _, program = programs(form)
    expected = Int8Model(program.parts).generate(TOKENS[None, :5], 12)[0]
    assert np.array_equal(program.generate(TOKENS[:5], 12), expected)


def test_a_saved_program_is_the_same(tmp_path: Path) -> None:
    _, program = programs("counts of spikes")
    program.save(tmp_path / "program")
    again = load_program(tmp_path / "program")
    assert np.array_equal(again.run(TOKENS).logits, program.run(TOKENS).logits)
    kinds = [type(node) for node in again.parts.graph.nodes]  # type: ignore[attr-defined]
    assert {GIF, WKV, TokenShift} <= set(kinds)


def test_calibration_changes_codes_and_nothing_else() -> None:
    model, plain = programs("spike input")
    text = np.random.default_rng(2).integers(0, VOCAB, 600)
    program = lower(model, "lava", text=lambda n: text[:n])
    assert isinstance(program, LavaProgram)
    assert np.array_equal(program.run(TOKENS).logits, program.reference_logits(TOKENS))
    before, after = ({n.name: n for n in p.parts.graph.nodes} for p in (plain, program))
    assert before.keys() == after.keys()
    weights = [(before[name], node) for name, node in after.items() if isinstance(node, Synapse)]
    assert any((old.weight != new.weight).any() for old, new in weights if isinstance(old, Synapse))


@pytest.mark.parametrize(("form", "spikes"), [("spike input", 14), ("canonical", 0)])
def test_the_report_says_where_every_op_is_and_what_feeds_it(form: str, spikes: int) -> None:
    model, program = programs(form)
    graph = model.graph()
    report = program.report(program.run(TOKENS))
    assert [op.name for op in report.placement] == [op.name for op in graph]
    on_host = {op.name for op in report.placement if op.runs_on == "host"}
    assert on_host == {"emb", "embedding", "blocks.0.ln0"} & {op.name for op in graph}
    named = [name for op in program.parts.ops for name in op.nodes]
    assert len(named) == len(set(named))
    assert set(named) == {node.name for node in program.parts.graph.nodes} - {LOGITS}
    matrices = [op for op in graph if op.kind == "linear"]
    fed = [op for op in matrices if graph.input_kinds(op) == ("binary",)]
    assert len(fed) == spikes
    every = sum(op.weight[0] * op.weight[1] for op in matrices)
    share = 100 * sum(op.weight[0] * op.weight[1] for op in fed) / every
    figures = {figure.name: figure.value for figure in fed_by(program.parts.graph, program.parts.ops)}
    assert figures["matrix weights fed by binary spikes"] == pytest.approx(share)
    assert sum(figures.values()) == pytest.approx(100)
    assert figures.items() <= {figure.name: figure.value for figure in report.figures}.items()
    assert sum(op.weights for op in report.placement if op.kind == "linear") == every


def test_neurons_are_lavas_in_the_format_of_their_currents() -> None:
    _, program = programs("leaks less, one layer")
    cells = [node for node in program.parts.graph.nodes if isinstance(node, HoldingLIF)]
    assert len(cells) == 7
    for cell in cells:
        assert (cell.dv, cell.bias) == (1024, 0)  # beta 3/4; strictly above
        fraction = np.log2(cell.vth / 0.8)
        assert abs(fraction - round(float(fraction))) < 0.02


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"spiking": False}, "adds to the residual stream what has no bound"),
        ({"rescale": True}, r"op 'blocks.0.att.wkv' \(wkv\) declares no dynamics"),
        ({"neuron": {"type": "snntorch.leaky", "reset": "subtract"}}, r"\(neuron\) declares no dynamics"),
        ({**INPUT, "neuron": {"type": "if"}}, "beta 1, reset to None"),
    ],
)
def test_what_has_no_process_is_refused_by_name(form: dict[str, Any], words: str) -> None:
    with pytest.raises(LoweringError, match=words) as refused:
        lower(a_model(form), "lava")
    assert refused.value.hint


def test_weights_that_no_format_fits_are_refused_with_the_bound() -> None:
    model = a_model(INPUT)
    model.blocks[0].neurons["att_output"].gain.data.fill_(1e9)
    with pytest.raises(LoweringError, match=r"op 'blocks.0.att.gate'") as refused:
        lower(model, "lava")
    assert refused.value.hint
    model = a_model(INPUT)
    model.head.weight.data[0, 0] = float("nan")
    with pytest.raises(LoweringError, match=r"op 'head' .* not finite"):
        lower(model, "lava")


def test_lava_gives_the_same_integers() -> None:
    _, program = programs("spike input")
    try:
        lava = LavaExecutor.find()
    except SpikingLMError as error:
        pytest.skip(f"{error.message}: {error.hint}")
    rows = program.inputs(TOKENS[:12])
    theirs = lava.run(program.pipeline.network, rows).sinks[LOGITS]
    assert np.array_equal(theirs, program.simulator.run(rows).sinks[LOGITS])


def test_perplexity_is_that_of_the_model_on_its_own_text() -> None:
    """A model scores what it generates itself, quantised or not: the best text to tell the two apart."""
    model, program = programs("spike input")
    text = spiking_lm.generate(model, TOKENS[:4].tolist(), max_new_tokens=300, temperature=1.0, seed=0)
    ids = np.asarray(text, np.int64).reshape(-1)
    result = program.run(ids[:-1])
    real = score(type(result)(model_logits(model, ids[:-1]), None), ids).mean()
    assert abs(score(result, ids).mean() - real) < 0.05
