"""The laws of a spiking language model, as a test class to inherit."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from fnmatch import fnmatch
from itertools import zip_longest
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spiking_lm.decoding import prepare, refusal
from spiking_lm.graph import LMGraph
from spiking_lm.interfaces import SpikingLanguageModel, State, map_state, observe, select_rows
from spiking_lm.testing.checks import (
    assert_close,
    assert_config_round_trip,
    assert_gradients_alive,
    assert_identical,
    assert_kind,
    assert_no_new_tensors,
    assert_states_close,
    assert_states_identical,
    hidden_tensors,
    state_tensors,
)
from spiking_lm.testing.encoders import EncoderLaws, full_lengths, needs, vocabulary
from spiking_lm.testing.sequences import SequenceLaws

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
odd_shapes = pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 7), (5, 1), (2, 19)], ids="B{}".format)


class ModelContract(EncoderLaws, SequenceLaws):
    """Every law of :class:`spiking_lm.interfaces.SpikingLanguageModel`; inherit it and override :meth:`model`."""

    untrained_parameters: ClassVar[Mapping[str, str]] = {}
    """Parameters (shell patterns) that get no gradient at initialisation -> the reason."""
    silent_at_initialisation: ClassVar[str | None] = None
    """The reason why a fresh model may be without a single spike; None demands at least one."""
    outside_the_graph: ClassVar[Mapping[str, str]] = {}
    """Weight matrices (shell patterns of module names) that do not run for every token -> the reason."""

    @pytest.fixture
    def model(self) -> SpikingLanguageModel:
        """The model under test: a small one (a few thousand weights), without dropout where that is an option."""
        raise NotImplementedError(f"{type(self).__name__} must override the fixture 'model'")

    @pytest.fixture(autouse=True)
    def _evaluate(self, model: SpikingLanguageModel) -> None:
        model.eval()

    def rebuilt(self, model: SpikingLanguageModel, seed: int) -> SpikingLanguageModel:
        """Return a fresh model of the same configuration; override it for one that must be prepared before its use."""
        torch.manual_seed(seed)
        return type(model)(model.config)  # type: ignore[call-arg]

    # -- one computation, three ways -----------------------------------------------------------------------------------

    @both_dtypes
    def test_forward_is_a_scan_of_step(self, model: SpikingLanguageModel, dtype: torch.dtype) -> None:
        tokens, start = self.tokens(model), self.start(model.to(dtype), 3)
        _assert_forward_is_scan(model, tokens, dtype, start)

    @odd_shapes
    def test_forward_is_a_scan_of_step_at_odd_shapes(
        self, model: SpikingLanguageModel, batch: int, length: int
    ) -> None:
        tokens, start = self.tokens(model, batch, length), self.start(model.double(), batch)
        _assert_forward_is_scan(model, tokens, torch.float64, start)

    @both_dtypes
    def test_two_pieces_with_carried_state_are_one(self, model: SpikingLanguageModel, dtype: torch.dtype) -> None:
        start, tokens = self.start(model.to(dtype), 3), self.tokens(model)
        with torch.no_grad():
            whole = model(tokens, start)
            for cut in (1, self.length // 2, self.length - 1):
                first = model(tokens[:, :cut], start)
                second = model(tokens[:, cut:], first.state)
                logits = torch.cat([first.logits, second.logits], 1)
                assert_close(logits, whole.logits, f"cut after {cut} tokens, logits")
                assert_states_close(second.state, whole.state, f"cut after {cut} tokens")

    def test_starting_without_state_is_starting_from_init_state(self, model: SpikingLanguageModel) -> None:
        needs(model, "lm")
        tokens = self.tokens(model)
        with torch.no_grad():
            plain, started = model(tokens), model(tokens, model.init_state(len(tokens)))
        assert_identical(started.logits, plain.logits, "state None against init_state(), logits")
        assert_states_identical(started.state, plain.state, "state None against init_state()")

    def test_prepared_decoding_is_the_model(self, model: SpikingLanguageModel) -> None:
        """Where a model's graph says all that decoding needs, it says what the model computes."""
        reason = refusal(model)
        if reason is not None:
            pytest.skip(f"it is not prepared for decoding: {reason}")
        decoder, state = prepare(model, engine="torch"), model.init_state(1)
        with torch.no_grad():
            for token in self.tokens(model, 1, 8)[0]:
                expected, state = model.step(token[None], state)
                assert_close(decoder.feed(int(token)), expected[0], "logits of prepared decoding")

    def test_logits_have_the_shape_of_the_vocabulary(self, model: SpikingLanguageModel) -> None:
        start, tokens = self.start(model, 3), self.tokens(model)
        logits = model(tokens, start).logits
        expected = (*tokens.shape, vocabulary(model))
        assert logits.shape == expected, f"logits have shape {tuple(logits.shape)}, expected {expected}"
        assert torch.isfinite(logits).all(), "logits are not finite"

    # -- what may influence what ---------------------------------------------------------------------------------------

    def test_later_tokens_do_not_influence_earlier_logits(self, model: SpikingLanguageModel) -> None:
        start, tokens = self.start(model, 3), self.tokens(model)
        with torch.no_grad():
            logits = model(tokens, start).logits
            for position in (1, self.length // 2, self.length - 1):
                changed = tokens.clone()
                changed[:, position] = (changed[:, position] + 1) % vocabulary(model)
                before = model(changed, start).logits[:, :position]
                assert_identical(before, logits[:, :position], f"token {position} was changed; logits before it")

    def test_earlier_tokens_do_influence_later_logits(self, model: SpikingLanguageModel) -> None:
        start, tokens, half = self.start(model, 3), self.tokens(model), self.length // 2
        changed = tokens.clone()
        changed[:, :half] = (changed[:, :half] + 1) % vocabulary(model)
        with torch.no_grad():
            later, changed_later = (model(text, start).logits[:, half:] for text in (tokens, changed))
        assert not torch.equal(later, changed_later), "logits ignore every earlier token: the model has no memory"

    def test_rows_of_the_batch_are_independent(self, model: SpikingLanguageModel) -> None:
        start, tokens = self.start(model.double(), 4), self.tokens(model, batch=4)
        with torch.no_grad():
            whole = model(tokens, start)
            for what, rows in (("permuted", [2, 0, 3, 1]), ("alone", [1]), ("repeated", [3, 3, 0, 1, 2, 1])):
                chosen = torch.tensor(rows)
                some = model(tokens[chosen], select_rows(start, chosen))
                assert_close(some.logits, whole.logits[chosen], f"rows {what} ({rows}), logits")
                assert_states_close(some.state, select_rows(whole.state, chosen), f"rows {what} ({rows})")

    # -- state is explicit ---------------------------------------------------------------------------------------------

    def test_interleaved_calls_do_not_disturb_each_other(self, model: SpikingLanguageModel) -> None:
        start, tokens, half = self.start(model, 3), self.tokens(model), self.length // 2
        other = (tokens + 1) % vocabulary(model)
        with torch.no_grad():
            alone = model(tokens[:, half:], model(tokens[:, :half], start).state)
            ours = model(tokens[:, :half], start).state
            theirs = model(other[:2, :half], select_rows(start, torch.arange(2))).state
            model.step(other[:2, half], theirs)
            between = model(tokens[:, half:], ours)
        assert_identical(between.logits, alone.logits, "with another text in between, logits")
        assert_states_identical(between.state, alone.state, "with another text in between")

    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    def test_nothing_is_kept_in_the_module(self, model: SpikingLanguageModel, training: bool) -> None:
        model.train(training)
        tokens = self.tokens(model)
        before = hidden_tensors(model)
        _loss(model, tokens)
        assert_no_new_tensors(before, hidden_tensors(model), "a forward pass")
        if {"lm", "seq2seq"} & model.capabilities:
            start = self.start(model, len(tokens))
            model.step(tokens[:, 0], model.init_state(len(tokens)) if start is None else start)
            assert_no_new_tensors(before, hidden_tensors(model), "step")

    def test_state_is_not_changed_in_place(self, model: SpikingLanguageModel) -> None:
        first, tokens = self.start(model, 3), self.tokens(model)
        with torch.no_grad():
            start = first if first is not None else model(tokens).state
            kept = map_state(torch.clone, start)
            model(tokens, start)
            assert_states_identical(start, kept, "the state handed to forward")
            model.step(tokens[:, 0], start)
            assert_states_identical(start, kept, "the state handed to step")

    def test_state_is_batch_first_and_keeps_its_form(self, model: SpikingLanguageModel) -> None:
        start, tokens = self.start(model, 5), self.tokens(model, batch=5)
        start = model.init_state(5) if start is None else start
        with torch.no_grad():
            after = dict(state_tensors(model(tokens, start).state))
        for path, tensor in state_tensors(start):
            assert tensor.shape[:1] == (5,), f"state{path} has shape {tuple(tensor.shape)}: the batch comes first"
            assert not tensor.requires_grad, f"state{path}: the first state needs no gradient"
            assert path in after, f"state{path} is gone after forward"
            # What is empty at first, such as a cache of keys and values, may grow along its empty dimension.
            before, now = tuple(tensor.shape), tuple(after[path].shape)
            assert now == tuple(n if m == 0 else m for m, n in zip_longest(before, now, fillvalue=-1)), (
                f"state{path} grows from {before} to {now}"
            )
            assert after[path].dtype == tensor.dtype, f"state{path} went from {tensor.dtype} to {after[path].dtype}"
        assert len(after) == len(list(state_tensors(start))), "forward returns another number of state tensors"

    def test_state_can_be_moved_to_another_dtype(self, model: SpikingLanguageModel) -> None:
        start, tokens = self.start(model, 3), self.tokens(model)
        with torch.no_grad():
            state = model(tokens, start).state
            moved = map_state(lambda t: t.double() if t.is_floating_point() else t, state)
            output = copy.deepcopy(model).double()(tokens, moved)
        assert output.logits.dtype == torch.float64, (
            f"a float64 model with float64 state gave {output.logits.dtype} logits"
        )
        for path, tensor in state_tensors(output.state):
            assert not tensor.is_floating_point() or tensor.dtype == torch.float64, f"state{path} is {tensor.dtype}"
        if start is not None:
            return
        for path, tensor in state_tensors(model.init_state(1, dtype=torch.float64)):
            assert not tensor.is_floating_point() or tensor.dtype == torch.float64, (
                f"init_state(dtype=torch.float64): state{path} is {tensor.dtype}"
            )

    def test_rows_of_the_state_can_be_selected(self, model: SpikingLanguageModel) -> None:
        start, tokens = self.start(model.double(), 4), self.tokens(model, batch=4)
        with torch.no_grad():
            state = model(tokens, start).state
            logits, after = model.step(tokens[:, 0], state)
            rows = torch.tensor([3, 1])
            some, some_after = model.step(tokens[rows, 0], select_rows(state, rows))
        assert_close(some, logits[rows], "step from select_rows(), logits")
        assert_states_close(some_after, select_rows(after, rows), "step from select_rows()")

    # -- spikes --------------------------------------------------------------------------------------------------------

    def test_every_site_emits_its_declared_kind(self, model: SpikingLanguageModel) -> None:
        sites, tokens = _sites(model), self.tokens(model)
        assert len({site.name for site in sites}) == len(sites), "two spike sites have one name"
        with torch.no_grad():
            output = observe(model, tokens)
        assert output.spikes is not None, "return_spikes=True returned no spikes"
        declared = {site.name for site in sites}
        assert output.spikes.keys() == declared, (
            f"declared but not returned: {sorted(declared - output.spikes.keys())}; "
            f"returned but not declared: {sorted(output.spikes.keys() - declared)}"
        )
        for site in sites:
            spikes = output.spikes[site.name]
            assert spikes.ndim in (3, 4), f"site {site.name!r}: spikes have {spikes.ndim} dimensions: (B, S, [T,] N)"
            assert spikes.shape[:2] == tokens.shape, (
                f"site {site.name!r}: spikes have shape {tuple(spikes.shape)}, expected (*{tuple(tokens.shape)}, N)"
            )
            assert_kind(spikes, site.kind, f"site {site.name!r}")

    def test_something_spikes(self, model: SpikingLanguageModel) -> None:
        _sites(model)
        if self.silent_at_initialisation:
            pytest.skip(f"declared silent at initialisation: {self.silent_at_initialisation}")
        with torch.no_grad():
            spikes = observe(model, self.tokens(model)).spikes or {}
        rates = {name: float((s != 0).double().mean()) for name, s in spikes.items()}
        assert any(rates.values()), f"not one spike at any of {sorted(rates)}: nothing else here tests its spikes"

    def test_asking_for_spikes_changes_nothing_else(self, model: SpikingLanguageModel) -> None:
        start, tokens = self.start(model, 3), self.tokens(model)
        with torch.no_grad():
            plain, spiking = model(tokens, start), model(tokens, start, return_spikes=True)
        assert plain.spikes is None, "spikes came without being asked for (they cost memory)"
        assert_identical(spiking.logits, plain.logits, "with return_spikes=True, logits")
        assert_states_identical(spiking.state, plain.state, "with return_spikes=True")

    # -- training ------------------------------------------------------------------------------------------------------

    def test_gradients_reach_every_parameter(self, model: SpikingLanguageModel) -> None:
        model.train()
        model.zero_grad()
        torch.manual_seed(1)
        _loss(model, self.tokens(model, batch=4, length=2 * self.length)).backward()  # type: ignore[no-untyped-call]
        assert_gradients_alive(model, self.untrained_parameters)

    def test_parameter_groups_hold_every_trainable_parameter_once(self, model: SpikingLanguageModel) -> None:
        grouped = [id(p) for group in model.parameter_groups(0.1) for p in group["params"]]
        trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        assert len(grouped) == len(set(grouped)), "a parameter is in two optimizer groups"
        assert set(grouped) == trainable.keys(), (
            f"not optimized: {sorted(trainable[i] for i in trainable.keys() - set(grouped))}"
        )

    def test_bf16_autocast_stays_finite(self, model: SpikingLanguageModel) -> None:
        model.train()
        tokens = self.tokens(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = _loss(model, tokens)
        assert torch.isfinite(loss), "the loss under bf16 autocast is not finite"
        loss.backward()  # type: ignore[no-untyped-call]
        bad = [n for n, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
        assert not bad, f"gradients under bf16 autocast are not finite: {bad}"
        if model.spike_sites():
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                spikes = observe(model, tokens).spikes or {}
            for site in model.spike_sites():
                assert_kind(spikes[site.name], site.kind, f"site {site.name!r} under bf16 autocast")

    # -- reproducibility and files -------------------------------------------------------------------------------------

    def test_equal_seeds_give_equal_models_and_equal_results(self, model: SpikingLanguageModel) -> None:
        first, second = self.rebuilt(model, seed=11), self.rebuilt(model, seed=11)
        for name, tensor in first.state_dict().items():
            assert_identical(second.state_dict()[name], tensor, f"built twice under one seed, {name}")
        tokens = self.tokens(model)
        for training in (False, True):
            losses = []
            for built in (first, second):
                torch.manual_seed(12)
                losses.append(_loss(built.train(training), tokens).detach())
            assert_identical(
                losses[1], losses[0], f"run twice under one seed ({'train' if training else 'eval'}), loss"
            )

    def test_evaluation_is_not_random(self, model: SpikingLanguageModel) -> None:
        tokens = self.tokens(model)
        with torch.no_grad():
            before = _loss(model, tokens)
            torch.manual_seed(99)
            model.train()
            _loss(model, tokens)
            model.eval()
            after = _loss(model, tokens)
        assert_identical(after, before, "eval() before and after a pass in train(), loss")

    def test_save_and_load_give_bit_equal_results(self, model: SpikingLanguageModel, tmp_path: Path) -> None:
        from spiking_lm import load_model, save_model

        save_model(model, tmp_path / "model")
        again = load_model(tmp_path / "model")
        assert type(again) is type(model), f"a {type(model).__name__} was saved, a {type(again).__name__} loaded"
        assert again.config == model.config, "the configuration changes between save and load"
        again.eval()
        tokens = self.tokens(model)
        with torch.no_grad():
            assert_identical(_loss(again, tokens), _loss(model, tokens), "saved and loaded, loss")
            if "lm" in model.capabilities:
                assert_identical(again(tokens).logits, model(tokens).logits, "saved and loaded, logits")
            if "seq2seq" in model.capabilities:
                ours, theirs = (one.score_pairs(tokens, full_lengths(tokens), tokens).logits for one in (model, again))
                assert_identical(theirs, ours, "saved and loaded, score_pairs()")
            if "encode" in model.capabilities:
                a, b = (one.encode(tokens, full_lengths(tokens)) for one in (again, model))
                assert_identical(a.pooled, b.pooled, "saved and loaded, pooled")
                assert_identical(a.hidden[-1], b.hidden[-1], "saved and loaded, hidden[-1]")

    def test_config_survives_json_and_refuses_typos(self, model: SpikingLanguageModel) -> None:
        values = model.config.to_dict()
        assert values.pop("model_type", None) == model.config.model_type, "to_dict() names no model_type"
        assert_config_round_trip(model.config, values)

    def test_state_dict_holds_the_weights_and_nothing_else(self, model: SpikingLanguageModel) -> None:
        before = set(model.state_dict())
        _loss(model, self.tokens(model))
        assert set(model.state_dict()) == before, (
            f"a forward pass changes the keys of state_dict(): {sorted(set(model.state_dict()) ^ before)}"
        )
        named = {n for n, _ in model.named_parameters(remove_duplicate=False)}
        named |= {n for n, _ in model.named_buffers(remove_duplicate=False)}
        assert before <= named, f"state_dict() holds what is neither parameter nor buffer: {sorted(before - named)}"
        fresh = self.rebuilt(model, seed=1)
        fresh.load_state_dict(model.state_dict())  # strict: every key, and no other

    # -- the graph -----------------------------------------------------------------------------------------------------

    def test_graph_names_modules_that_exist(self, model: SpikingLanguageModel) -> None:
        graph, modules = model.graph(), dict(model.named_modules())
        assert isinstance(graph, LMGraph), f"graph() returned a {type(graph).__name__}"
        assert graph.ops, "graph() describes nothing"
        missing = [f"{op.name} -> {op.module}" for op in graph if op.module is not None and op.module not in modules]
        assert not missing, f"graph names modules that the model does not have: {missing}"
        assert all(op.size > 0 for op in graph), "an op of the graph emits nothing"

    def test_graph_holds_every_weight_matrix_in_its_shape(self, model: SpikingLanguageModel) -> None:
        graph, modules = model.graph(), dict(model.named_modules())
        for op in graph:
            assert (op.kind == "linear") == (op.weight is not None), f"op {op.name!r}: kind and weight contradict"
            if op.weight is None:
                continue
            assert op.size == op.weight[0], f"op {op.name!r} emits {op.size} values from a {op.weight} matrix"
            weight = getattr(modules.get(op.module or ""), "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 2:
                assert tuple(weight.shape) == op.weight, (
                    f"op {op.name!r}: {op.module}.weight is {tuple(weight.shape)}, the graph says {op.weight}"
                )
        described = {op.module for op in graph}
        described |= {name.rpartition(".")[0] for op in graph if op.weight for name in op.parameters.values()}
        forgotten = {n for n, m in modules.items() if isinstance(m, nn.Linear)} - described
        excused = {n for n in forgotten if any(fnmatch(n, pattern) for pattern in self.outside_the_graph)}
        assert forgotten <= excused, f"weight matrices that the graph leaves out: {sorted(forgotten - excused)}"
        unused = [p for p in self.outside_the_graph if not any(fnmatch(n, p) for n in excused)]
        assert not unused, f"outside_the_graph matches no weight matrix that the graph leaves out: {unused}"

    def test_graph_holds_every_spike_site(self, model: SpikingLanguageModel) -> None:
        graph, sites = model.graph(), _sites(model)
        names = {op.name for op in graph}
        for site in sites:
            assert site.name in names, f"spike site {site.name!r} is no op of the graph"
            emitted = graph[site.name].emits
            assert emitted == site.kind, f"site {site.name!r} is declared {site.kind}, the graph says {emitted}"
            readers = {op.name for op in graph.readers(site.name)}
            assert set(site.feeds) == readers, (
                f"site {site.name!r} declares that it feeds {sorted(site.feeds)}; in the graph, {sorted(readers)} do"
            )
        spiking = {op.name for op in graph if op.kind == "neuron"}
        undeclared = spiking - {site.name for site in sites}
        assert not undeclared, f"neurons of the graph that spike_sites() leaves out: {sorted(undeclared)}"

    # -- classification ------------------------------------------------------------------------------------------------

    def test_padding_does_not_influence_a_classification(self, model: SpikingLanguageModel) -> None:
        needs(model, "classify")
        model, tokens = model.double(), self.tokens(model)
        lengths = torch.tensor([1, self.length - 3, self.length])
        padding = torch.arange(self.length) >= lengths[:, None]
        other = torch.where(padding, (tokens + 1) % vocabulary(model), tokens)
        longer = torch.cat([tokens, tokens[:, :4]], 1)
        with torch.no_grad():
            scores = model.classify(tokens, lengths)
            classes = getattr(model.config, "num_classes", scores.shape[-1])
            assert scores.shape == (3, classes), (
                f"class logits have shape {tuple(scores.shape)}, expected (3, {classes})"
            )
            assert_close(model.classify(other, lengths), scores, "with other tokens in the padding, class logits")
            assert_close(model.classify(longer, lengths), scores, "with more padding, class logits")
            for row in range(3):
                alone = model.classify(tokens[row : row + 1, : int(lengths[row])], lengths[row : row + 1])
                assert_close(alone, scores[row : row + 1], f"row {row} alone and without padding, class logits")


def _sites(model: SpikingLanguageModel) -> list:  # type: ignore[type-arg]
    sites = model.spike_sites()
    if not sites:
        pytest.skip(f"{type(model).__name__} declares no spike site in this configuration")
    return sites


def _loss(model: SpikingLanguageModel, tokens: Tensor) -> Tensor:
    """One scalar that depends on everything the model can do, auxiliary losses included."""
    parts = []
    if "lm" in model.capabilities:
        output = model(tokens)
        parts.append(F.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()))
        parts.extend(output.aux_losses.values())
    if "classify" in model.capabilities:
        scores = model.classify(tokens, full_lengths(tokens))
        parts.append(F.cross_entropy(scores.float(), torch.arange(len(tokens)) % scores.shape[1]))
    if "mlm" in model.capabilities:
        logits = model.predict_masked(tokens, full_lengths(tokens))
        parts.append(F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten()))
    if "seq2seq" in model.capabilities:
        logits = model.score_pairs(tokens, full_lengths(tokens), tokens).logits
        parts.append(F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()))
    if "encode" in model.capabilities:
        pooled = model.encode(tokens, full_lengths(tokens)).pooled.float()
        # What is normalised has a constant square: look at it from one side.
        parts.append((pooled * torch.linspace(-1, 1, pooled.shape[1])).mean())
    if not parts:
        pytest.skip(f"{type(model).__name__} declares none of 'lm', 'seq2seq', 'classify', 'mlm' and 'encode'")
    return torch.stack([part.float() for part in parts]).sum()


def _assert_forward_is_scan(model: SpikingLanguageModel, tokens: Tensor, dtype: torch.dtype, start: State) -> None:
    with torch.no_grad():
        whole = model(tokens, start)
        logits, state = _scan(model, tokens, dtype, start)
    assert_close(whole.logits, logits, "forward against scan of step, logits")
    assert_states_close(whole.state, state, "forward against scan of step")


def _scan(model: SpikingLanguageModel, tokens: Tensor, dtype: torch.dtype, start: State) -> tuple[Tensor, State]:
    state: State = model.init_state(tokens.shape[0], dtype=dtype) if start is None else start
    logits = []
    for token in tokens.unbind(1):
        scores, state = model.step(token, state)
        logits.append(scores)
    return torch.stack(logits, 1), state
