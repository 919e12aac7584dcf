"""The kit itself: implementations that obey pass, and each that breaks a law is caught by that law."""

from __future__ import annotations

import inspect
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import contract_toys as toys
import pytest
import torch

from spiking_lm import create_neuron, registry
from spiking_lm.config import LIFConfig, NeuronConfig
from spiking_lm.interfaces import SpikingLanguageModel
from spiking_lm.testing import ModelContract, NeuronContract
from spiking_lm.testing.encoders import EncoderLaws
from spiking_lm.testing.sequences import SequenceLaws


@pytest.fixture(autouse=True)
def toy_is_registered() -> Iterator[None]:
    manager = registry.PluginManager(discover="first-party")
    manager.register(toys.ToyPlugin(), "toy")
    previous = registry.set_manager(manager)
    yield
    registry.set_manager(previous)


class TestHealthyModel(ModelContract):
    @pytest.fixture
    def model(self) -> SpikingLanguageModel:
        torch.manual_seed(0)
        return toys.Toy(toys.ToyConfig())


class TestHealthyNeuron(NeuronContract):
    @pytest.fixture
    def neuron(self) -> toys.Healthy:
        return toys.Healthy(LIFConfig(), size=6)


def laws(contract: type) -> list[str]:
    return [name for name, _ in inspect.getmembers(contract, inspect.isfunction) if name.startswith("test_")]


def try_law(contract: Any, law: str, make: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    """Run one law as pytest would, once for every combination of its parameters."""
    function = getattr(contract, law)
    marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
    columns = []
    for mark in marks:
        names = [mark.args[0]] if isinstance(mark.args[0], str) else list(mark.args[0])
        columns.append([dict(zip(names, v if len(names) > 1 else (v,), strict=True)) for v in mark.args[1]])
    for number, combination in enumerate(itertools.product(*columns)):
        arguments = {key: value for part in combination for key, value in part.items()}
        if "tmp_path" in inspect.signature(function).parameters:
            arguments["tmp_path"] = tmp_path / str(number)
        function(**make(), **arguments)


BROKEN_MODELS = [
    (toys.RemembersInModule, "test_nothing_is_kept_in_the_module"),
    (toys.RemembersInModule, "test_interleaved_calls_do_not_disturb_each_other"),
    (toys.RemembersInModule, "test_evaluation_is_not_random"),
    (toys.StepForgets, "test_forward_is_a_scan_of_step"),
    (toys.StepForgets, "test_forward_is_a_scan_of_step_at_odd_shapes"),
    (toys.LosesStateBetweenPieces, "test_two_pieces_with_carried_state_are_one"),
    (toys.SeesTheFuture, "test_later_tokens_do_not_influence_earlier_logits"),
    (toys.HasNoMemory, "test_earlier_tokens_do_influence_later_logits"),
    (toys.MixesRows, "test_rows_of_the_batch_are_independent"),
    (toys.MixesRows, "test_rows_of_the_state_can_be_selected"),
    (toys.IgnoresInitState, "test_starting_without_state_is_starting_from_init_state"),
    (toys.ChangesStateInPlace, "test_state_is_not_changed_in_place"),
    (toys.StateIsNotBatchFirst, "test_state_is_batch_first_and_keeps_its_form"),
    (toys.StateStaysFloat32, "test_state_can_be_moved_to_another_dtype"),
    (toys.GradedButSaysBinary, "test_every_site_emits_its_declared_kind"),
    (toys.ForgetsASite, "test_every_site_emits_its_declared_kind"),
    (toys.IsSilent, "test_something_spikes"),
    (toys.AlwaysReturnsSpikes, "test_asking_for_spikes_changes_nothing_else"),
    (toys.HasADeadParameter, "test_gradients_reach_every_parameter"),
    (toys.CutsTheGradient, "test_gradients_reach_every_parameter"),
    (toys.LeavesAParameterOut, "test_parameter_groups_hold_every_trainable_parameter_once"),
    (toys.OverflowsInBfloat16, "test_bf16_autocast_stays_finite"),
    (toys.DrawsItsOwnWeights, "test_equal_seeds_give_equal_models_and_equal_results"),
    (toys.DropsOutInEval, "test_evaluation_is_not_random"),
    (toys.HidesAWeight, "test_save_and_load_give_bit_equal_results"),
    (toys.GrowsItsStateDict, "test_state_dict_holds_the_weights_and_nothing_else"),
    (toys.GraphNamesNoModule, "test_graph_names_modules_that_exist"),
    (toys.GraphHasAnotherShape, "test_graph_holds_every_weight_matrix_in_its_shape"),
    (toys.GraphForgetsAMatrix, "test_graph_holds_every_weight_matrix_in_its_shape"),
    (toys.GraphLeavesOutTheMiddle, "test_prepared_decoding_is_the_model"),
    (toys.GraphSaysReal, "test_graph_holds_every_spike_site"),
    (toys.FeedsSomethingElse, "test_graph_holds_every_spike_site"),
    (toys.ReadsThePadding, "test_padding_does_not_influence_a_classification"),
]


@pytest.mark.parametrize(("broken", "law"), BROKEN_MODELS, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_a_broken_model_is_caught(
    broken: type[toys.Toy], law: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toys, "Toy", broken)  # what load_model() builds

    def make() -> dict[str, Any]:
        torch.manual_seed(0)
        return {"model": broken(toys.ToyConfig()).eval()}

    with pytest.raises(AssertionError):
        try_law(TestHealthyModel(), law, make, tmp_path)


def test_a_model_with_a_loose_configuration_is_caught(tmp_path: Path) -> None:
    law = "test_config_survives_json_and_refuses_typos"
    with pytest.raises(AssertionError, match="accepts an unknown field"):
        try_law(TestHealthyModel(), law, lambda: {"model": toys.Toy(toys.LooseConfig())}, tmp_path)


def test_every_model_law_has_caught_something() -> None:
    apart = set(laws(EncoderLaws)) | set(laws(SequenceLaws))  # tests/contract/test_encoders.py, tests/seq2seq
    untested = set(laws(ModelContract)) - apart - {law for _, law in BROKEN_MODELS}
    assert untested == {
        "test_config_survives_json_and_refuses_typos",  # tested on its own
        "test_logits_have_the_shape_of_the_vocabulary",
    }


BROKEN_NEURONS = [
    (toys.KeepsItsMembrane, "test_nothing_is_kept_in_the_module"),
    (toys.SharesItsMembrane, "test_interleaved_calls_do_not_disturb_each_other"),
    (toys.SharesItsMembrane, "test_nothing_is_kept_in_the_module"),
    (toys.ResetsInPlace, "test_state_is_not_changed_in_place"),
    (toys.WrongDynamics, "test_dynamics_are_those_of_step"),
    (toys.WrongDynamics, "test_forward_is_a_scan_of_step"),
    (toys.WrongTie, "test_a_membrane_exactly_at_the_threshold_does_what_is_declared"),
    (toys.WrongResetGradient, "test_dynamics_are_those_of_step"),
    (toys.WrongResetGradient, "test_gradients_of_forward_are_those_of_step"),
    (toys.ForwardOfItsOwn, "test_forward_is_a_scan_of_step"),
    (toys.ForwardOfItsOwn, "test_forward_is_a_scan_of_step_at_odd_shapes"),
    (toys.ForwardOfItsOwn, "test_two_pieces_with_carried_state_are_one"),
    (toys.CouplesRows, "test_state_can_be_selected_and_carried_on"),
    (toys.NoSteps, "test_no_steps_leave_the_state_alone"),
    (toys.StartsElsewhere, "test_starting_without_state_is_starting_at_rest"),
    (toys.StateWithoutGradient, "test_gradients_flow_through_time"),
    (toys.SpikesOfThree, "test_spikes_are_of_the_declared_kind"),
    (toys.NeverFires, "test_some_fire_and_some_are_silent"),
    (toys.DeadGradient, "test_gradients_reach_inputs_and_parameters"),
    (toys.DeadParameter, "test_gradients_reach_inputs_and_parameters"),
    (toys.AlwaysFloat32, "test_dtype_is_kept"),
    (toys.CouplesRows, "test_rows_of_the_batch_are_independent"),
    (toys.StateWithoutBatch, "test_every_state_tensor_is_batch_first"),
    (toys.Explodes, "test_silence_and_saturation_stay_finite"),
    (toys.RandomThreshold, "test_equal_seeds_give_equal_results"),
    (toys.RandomThreshold, "test_state_dict_holds_the_weights_and_nothing_else"),
]


@pytest.mark.parametrize(("broken", "law"), BROKEN_NEURONS, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_a_broken_neuron_is_caught(broken: type[toys.Healthy], law: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        try_law(TestHealthyNeuron(), law, lambda: {"neuron": broken(LIFConfig(), size=6)}, tmp_path)


def test_a_neuron_that_keeps_its_graph_cannot_be_copied(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="deepcopy"):
        try_law(
            TestHealthyNeuron(),
            "test_a_copy_taken_after_use_behaves_the_same",
            lambda: {"neuron": toys.CannotBeCopied(LIFConfig(), size=6)},
            tmp_path,
        )


def test_a_neuron_with_a_loose_configuration_is_caught(tmp_path: Path) -> None:
    neuron = toys.Healthy(toys.LooseNeuronConfig(), size=6)
    law = "test_config_survives_json_and_refuses_typos"
    with pytest.raises(AssertionError, match="accepts an unknown field"):
        try_law(TestHealthyNeuron(), law, lambda: {"neuron": neuron}, tmp_path)


def test_a_neuron_registered_under_another_name_is_caught(tmp_path: Path) -> None:
    class Mistaken(TestHealthyNeuron):
        name = "lif"

    with pytest.raises(AssertionError, match="'lif' builds a LIF"):
        try_law(
            Mistaken(),
            "test_registration_matches_the_class",
            lambda: {"neuron": toys.Healthy(LIFConfig(), size=6)},
            tmp_path,
        )


def test_every_neuron_law_has_caught_something() -> None:
    untested = set(laws(NeuronContract)) - {law for _, law in BROKEN_NEURONS}
    assert untested == {  # each tested on its own
        "test_a_copy_taken_after_use_behaves_the_same",
        "test_config_survives_json_and_refuses_typos",
        "test_registration_matches_the_class",
    }


def test_exceptions_must_name_a_parameter_that_exists(tmp_path: Path) -> None:
    class Excused(TestHealthyNeuron):
        untrained_parameters = {"beta": "kept for old checkpoints"}

    law = "test_gradients_reach_inputs_and_parameters"
    try_law(Excused(), law, lambda: {"neuron": toys.DeadParameter(LIFConfig(), size=6)}, tmp_path)
    with pytest.raises(AssertionError, match="matches no parameter"):
        try_law(Excused(), law, lambda: {"neuron": toys.Healthy(LIFConfig(), size=6)}, tmp_path)


def test_matrices_outside_the_graph_must_be_named_and_exist(tmp_path: Path) -> None:
    law = "test_graph_holds_every_weight_matrix_in_its_shape"

    class Excused(TestHealthyModel):
        outside_the_graph = {"class*": "runs once for a text"}

    try_law(Excused(), law, lambda: {"model": toys.GraphForgetsAMatrix(toys.ToyConfig())}, tmp_path)
    with pytest.raises(AssertionError, match="matches no weight matrix"):
        try_law(Excused(), law, lambda: {"model": toys.Toy(toys.ToyConfig())}, tmp_path)


def test_messages_say_where_and_by_how_much(tmp_path: Path) -> None:
    neuron = toys.WrongDynamics(LIFConfig())
    with pytest.raises(AssertionError, match=r"most at \(\d, \d+, \d\): .* where .* was expected \(allowed: relative"):
        try_law(TestHealthyNeuron(), "test_dynamics_are_those_of_step", lambda: {"neuron": neuron}, tmp_path)


def test_a_silent_law_is_never_skipped_without_a_reason(tmp_path: Path) -> None:
    model = toys.Toy(toys.ToyConfig())
    model.capabilities = frozenset({"classify"})
    with pytest.raises(pytest.skip.Exception, match=r"does not declare 'lm' \(it has \['classify'\]\)"):
        try_law(TestHealthyModel(), "test_forward_is_a_scan_of_step", lambda: {"model": model}, tmp_path)


@pytest.mark.parametrize("config", [LIFConfig(), NeuronConfig()])
def test_the_fixture_must_be_overridden(config: NeuronConfig) -> None:
    assert create_neuron("lif").config == LIFConfig()
    for contract, fixture in ((NeuronContract, "neuron"), (ModelContract, "model")):
        override = getattr(contract, fixture)
        with pytest.raises(NotImplementedError, match=f"must override the fixture '{fixture}'"):
            inspect.unwrap(getattr(override, "__wrapped__", override))(contract())


def test_fixtures_come_with_the_installation_and_import_no_torch(tmp_path: Path) -> None:
    (tmp_path / "test_someone_else.py").write_text(
        "import sys\n"
        "def test_nothing_heavy_is_loaded():\n"
        "    assert 'torch' not in sys.modules and 'pydantic' not in sys.modules\n"
        "def test_the_manager_refuses_discovery(spiking_lm_manager):\n"
        "    assert [plugin.name for plugin in spiking_lm_manager.plugins()] == ['core']\n"
        "    assert 'lif' in spiking_lm_manager.all('neurons')\n"
        "    assert 'torch' not in sys.modules\n"
        "def test_the_corpus_is_there(tiny_corpus):\n"
        "    text = tiny_corpus.read_text(encoding='utf-8')\n"
        "    assert 30_000 < len(text) < 60_000 and len(set(text)) > 25\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout
