"""EGRU language models as programs: equal to the int8 model in torch, in every form in which they can be run."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import spiking_lm
from spiking_lm import hardware
from spiking_lm.data import create_tokenizer
from spiking_lm.deployment import embedded_tokens, model_logits, render
from spiking_lm.errors import CheckpointError, ConfigError, DataError, LoweringError, PluginError
from spiking_lm.hardware import load_program, lower
from spiking_lm_lava.executor import LavaExecutor
from spiking_lm_lava.install import PYTHON_VARIABLE
from spiking_lm_lava.process import Synapse
from spiking_lm_lava.program import LavaProgram
from spiking_lm_lava.quantise import LIMIT, most_of_messages, observe, quantise_rows, quantise_table
from spiking_lm_lava.simulator import reference
from spiking_lm_lava.torch_model import Int8Model

VOCAB = 37

FORMS: dict[str, dict[str, Any]] = {
    "projection": {"projection": True, "n_hidden": 24},
    "two layers": {"projection": False, "n_hidden": 20, "n_layer": 2, "zoneout": 0.1},
}


def a_model(form: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "thr_mean": 0.05, **FORMS[form], **changes}
    model = spiking_lm.create_model("egru", vocab_size=VOCAB, **sizes)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.4)
        elif parameter.ndim == 1 and parameter.min() <= 0:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def text(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, 500)[:n]


TOKENS = np.random.default_rng(1).integers(0, VOCAB, 60)


@pytest.fixture(scope="module", params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def program(form: str) -> LavaProgram:
    found = lower(a_model(form), "lava", text=text)
    assert isinstance(found, LavaProgram)
    return found


def test_it_is_the_int8_model_in_torch_to_the_bit(program: LavaProgram, form: str) -> None:
    result = program.run(TOKENS)
    assert result.logits.dtype == np.float32
    quantised = program.reference_logits(TOKENS)
    assert quantised is not None
    assert (result.logits == quantised).all()
    # These weights are wild: one event more or less is seen for long. Before that, the float model is near.
    real = model_logits(a_model(form), TOKENS)
    assert np.abs(real - result.logits)[:8].max() < 0.03
    assert np.abs(real - result.logits).mean() < 0.25 * np.abs(real).mean()
    # And without a text to look at, from the weights alone.
    plain = lower(a_model(form), "lava")
    assert (plain.run(TOKENS).logits == plain.reference_logits(TOKENS)).all()


def test_the_definition_of_the_network_gives_the_same(program: LavaProgram) -> None:
    inputs = program.inputs(TOKENS[:20])
    steps = program.pipeline.steps
    sums = reference(program.pipeline.network, inputs).sinks["logits"]
    assert (program.parts.logits(sums[steps : steps + 20]) == program.run(TOKENS[:20]).logits).all()


def test_a_stream_may_be_cut_anywhere(program: LavaProgram) -> None:
    whole = program.run(TOKENS).logits
    for cut in (0, 1, 13, 60):
        first = program.run(TOKENS[:cut])
        kept = first.state.copy()
        second = program.run(TOKENS[cut:], first.state)
        assert (np.concatenate([first.logits, second.logits]) == whole).all()
        again = program.run(TOKENS[cut:], kept)
        assert (again.logits == second.logits).all()


def test_a_long_text_is_read_in_pieces(program: LavaProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = program.run(TOKENS)
    monkeypatch.setattr("spiking_lm_lava.program.STEPS_AT_ONCE", 7)
    pieces = program.run(TOKENS)
    assert (pieces.logits == whole.logits).all()
    added_up = ("steps", "synaptic_operations", "messages", "active_updates", "to_host")
    assert all(pieces.counters["counts"][name] == whole.counters["counts"][name] for name in added_up)


def test_generation_is_that_of_the_int8_model(program: LavaProgram) -> None:
    prompts = TOKENS[:14].reshape(2, 7)
    wanted = Int8Model(program.parts).generate(prompts, 30)
    for prompt, tokens in zip(prompts, wanted, strict=True):
        assert (program.generate(prompt, 30) == tokens).all()
    rest = program.run(prompts[0][:3]).state
    assert (program.generate(prompts[0][3:], 30, rest) == wanted[0]).all()
    with pytest.raises(DataError, match="begins with a token"):
        program.generate(TOKENS[:0], 3)


def test_lava_gives_the_same_integers_and_goes_on_from_a_state(lava: LavaExecutor) -> None:
    program = lower(a_model("projection", n_hidden=128), "lava", text=text)
    assert isinstance(program, LavaProgram)
    tokens = np.random.default_rng(3).integers(0, VOCAB, 200)
    in_lava = LavaProgram(program.parts, program.config.model_copy(update={"executor": "lava"}), model="egru")
    first = in_lava.run(TOKENS[:20])
    simulated = program.run(TOKENS[:20])
    assert (first.logits == simulated.logits).all()
    for name, held in simulated.state.nodes.items():
        for part, values in held.items():
            assert np.array_equal(values, first.state.nodes[name][part]), (name, part)
    second = in_lava.run(tokens, simulated.state)
    assert (second.logits == program.run(tokens, first.state).logits).all()
    assert (in_lava.generate(TOKENS[:7], 10) == program.generate(TOKENS[:7], 10)).all()


def test_without_lava_the_command_that_brings_it_is_named(
    program: LavaProgram, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(PYTHON_VARIABLE, str(tmp_path / "python"))
    in_lava = LavaProgram(program.parts, program.config.model_copy(update={"executor": "lava"}), model="egru")
    with pytest.raises(PluginError, match=PYTHON_VARIABLE):
        in_lava.run(TOKENS[:2])


def test_a_saved_program_runs_without_torch(program: LavaProgram, tmp_path: Path) -> None:
    program.save(tmp_path / "p")
    np.save(tmp_path / "tokens.npy", TOKENS)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np; from spiking_lm.hardware import load_program\n"
        "program = load_program('p'); result = program.run(np.load('tokens.npy'))\n"
        "program.report(result); np.save('logits.npy', result.logits)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
    assert (np.load(tmp_path / "logits.npy") == program.run(TOKENS).logits).all()


def test_a_damaged_program_is_refused(program: LavaProgram, tmp_path: Path) -> None:
    program.save(tmp_path / "p")
    manifest = tmp_path / "p" / "program.json"
    written = manifest.read_text(encoding="utf-8")
    manifest.write_text(written.replace('"looped": true', '"looped": false'), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"program\.json"):
        load_program(tmp_path / "p")
    for old, new, said in (
        ('"looped": true', '"looped": false', "has no wire that carries the last token"),
        ('"kind": "egru"', '"kind": "gru"', "there is no process of the kind 'gru'"),
        ('"logits": ', '"logits": 1', "vocabulary or latency"),
        ('"executor": "simulator"', '"executor": "chip"', "executor"),
    ):
        manifest.write_text(written.replace(old, new), encoding="utf-8")
        with pytest.raises((DataError, CheckpointError), match=said):
            load_program(tmp_path / "p", verify=False)
    record, tensors = program.to_folder()
    with pytest.raises(DataError, match="scale is float64"):
        LavaProgram.from_folder(json.loads(json.dumps(record)), {**tensors, "scale": tensors["scale"][1:]})
    name = next(name for name in tensors if name.startswith("table "))
    with pytest.raises(DataError, match=r"goes from -?\d+ to 300"):
        LavaProgram.from_folder(record, {**tensors, name: np.full(tensors[name].shape, 300, np.int16)})


def test_foreign_states_and_tokens_are_refused(program: LavaProgram, form: str) -> None:
    other = lower(a_model("two layers" if form == "projection" else "projection"), "lava")
    for state in (other.run(TOKENS[:2]).state, (), "state"):
        with pytest.raises(DataError, match="not one of this program"):
            program.run(TOKENS, state)
    with pytest.raises(DataError, match="token ids run from"):
        program.run(np.array([0, VOCAB]))


def test_the_report_places_every_op_and_counts(program: LavaProgram, form: str) -> None:
    report = program.report(program.run(TOKENS))
    ops = {op.name: op for op in report.placement}
    assert list(ops) == [op.name for op in a_model(form).graph()]
    assert {op.runs_on for op in report.placement if op.name != "embeddings"} == {"neuromorphic"}
    figures = {figure.name: figure.value for figure in report.figures}
    weights = sum(op.weights for op in report.placement)
    assert figures["weights on the host"] == pytest.approx(100 * VOCAB * 16 / weights)
    assert figures["barriers per token"] == (len(TOKENS) + program.pipeline.steps + 1) / len(TOKENS)
    assert any("no energy" in warning for warning in report.warnings)
    costs = {f"{name}_pj": 1.0 for name in ("synaptic_operation", "active_update", "idle_update", "message")}
    priced = lower(a_model(form), "lava", costs={**costs, "hop_x_pj": 1, "hop_y_pj": 1})
    assert any(figure.name == "dynamic energy per token" for figure in priced.report(priced.run(TOKENS)).figures)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (("egru", {"cell": "gru"}), r"op 'rnns\.0' \(elementwise\) computes with real numbers"),
        (("egru", {"cell": "lstm"}), r"op 'rnns\.0' \(elementwise\) computes with real numbers"),
    ],
)
def test_what_has_no_process_is_named_before_training(kind: tuple[str, dict[str, Any]], what: str) -> None:
    model = spiking_lm.create_model(kind[0], vocab_size=VOCAB, **kind[1])
    with pytest.raises(LoweringError, match=what):
        hardware.check_graph(model.graph(), "lava")
    with pytest.raises(LoweringError, match=what):
        lower(model, "lava")


def test_a_model_that_was_not_trained_well_is_refused() -> None:
    model = a_model("projection")
    with torch.no_grad():
        model.decoder.decoder.weight[0, 0] = float("nan")
    with pytest.raises(LoweringError, match=r"op 'decoder\.decoder' \(linear\): its weight .* not finite"):
        lower(model, "lava")
    with pytest.raises(ConfigError, match="executor"):
        lower(a_model("projection"), "lava", executor="chip")


# -- quantisation ------------------------------------------------------------------------------------------------------


def test_a_clip_leaves_the_least_error_in_what_is_read() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_t(3, (40, 30))
    codes, scale = quantise_rows(weight)
    assert np.abs(codes).max() <= LIMIT
    plain = (
        np.rint(weight / np.abs(weight).max(1, keepdims=True) * LIMIT) * np.abs(weight).max(1, keepdims=True) / LIMIT
    )
    assert (((codes * scale[:, None] - weight) ** 2).sum(1) <= ((plain - weight) ** 2).sum(1) + 1e-12).all()
    zeros, ones = quantise_rows(np.zeros((2, 3)))
    assert not zeros.any()
    assert (ones == 1).all()


def test_what_text_shows_decides_over_the_clips(form: str) -> None:
    model = a_model(form)
    seen = observe(model, text(500))
    names = [op.name for op in model.graph() if op.kind == "linear"]
    assert sorted(seen) == sorted(names)
    rows = model.embeddings.weight.detach().double().numpy()[text(500)]
    np.testing.assert_allclose(seen["rnns.0.input"].moments, rows.T @ rows / 500, rtol=1e-6)
    np.testing.assert_allclose(seen["rnns.0.input"].most, np.abs(rows).max(0), rtol=1e-6)
    weight = model.decoder.decoder.weight.detach().double().numpy()
    moments = seen["decoder.decoder"].moments

    def error(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
        off = codes * scale[:, None] - weight
        return (off @ moments * off).sum(1)

    looked, blind = quantise_rows(weight, seen["decoder.decoder"]), quantise_rows(weight)
    assert (error(*looked) <= error(*blind) + 1e-12).all()
    assert error(*looked).sum() < error(*blind).sum()
    table = np.array([[1.0, -1.0], [0.5, 0.25], [100.0, 0.0]])
    assert quantise_table(table, np.array([0, 1, 1]))[1] < 0.1 < quantise_table(table)[1]


def test_messages_are_as_fine_as_sums_of_24_bits_let_them_be(program: LavaProgram) -> None:
    network = program.pipeline.network
    assert most_of_messages([np.full((2, 3), 100, np.int8)]) == (2**23 - 1) // 300
    for synapse in network.of_kind(Synapse):
        sums = network.bounds[synapse.name].sends[0]
        assert sums.most < 2**23


# -- recipes -----------------------------------------------------------------------------------------------------------


def test_a_run_deploys_with_the_perplexity_of_all_three(tmp_path: Path) -> None:
    recipe = {
        "schema": 1,
        "name": "lava",
        "data": {"type": "austen3", "tokenizer": {"type": "byte"}},
        "model": {"type": "egru", "n_embd": 16, "n_hidden": 32, "n_layer": 1, "projection": True, "thr_mean": 0.01},
        "train": {"steps": 6, "batch_size": 4, "seq_len": 32, "eval_every": 6, "eval_tokens": 256, "save_every": 6},
        "deploy": {"backend": "lava", "tokens": 64, "calibration_tokens": 300},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    quiet = Console(file=io.StringIO())
    run = spiking_lm.run_recipe(file, out=tmp_path, console=quiet)
    account = json.loads((run.path / "deployment.json").read_text(encoding="utf-8"))
    assert account["quantised_perplexity"] == account["perplexity"]
    assert account["quantised_difference"] == 0
    assert account["perplexity"] == pytest.approx(account["model_perplexity"], rel=0.03)
    console = Console(width=140)
    with console.capture() as shown:
        console.print(render(account))
    assert "perplexity of the model, quantised" in shown.get()
    assert (run.path / "program" / "tokenizer.json").is_file()


def test_the_corpus_to_look_at_is_not_the_one_to_be_measured_on() -> None:
    tokenizer = create_tokenizer({"type": "byte"})
    trained, valid = (embedded_tokens(tokenizer, 64, part) for part in ("train", "valid"))
    assert len(trained) == len(valid) == 64
    assert (trained != valid).any()
