"""Prepared decoding against the model's own step: tokens, logits, spikes and states; and the choice of forms."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from spiking_lm import bench_decoding, create_model, decoding, generate, generation, kernels
from spiking_lm.decoding import WATCHED, prepare, refusal
from spiking_lm.errors import UsageError
from spiking_lm.generation import iterate
from spiking_lm.interfaces import SpikingLanguageModel, map_state
from spiking_lm.kernels import compiled, events
from spiking_lm.schemes import ActivationScheme, WeightScheme

ENGINES = ["compiled", "torch"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "spikegpt": ("spikegpt", {"n_layer": 3, "n_embd": 48}),
    "spike_input": ("spikegpt", {"n_layer": 2, "n_embd": 40, "placement": "spike_input"}),
    "ffn_pre": ("spikegpt", {"n_layer": 2, "n_embd": 33, "ffn_pre": True}),
    "not spiking": ("spikegpt", {"n_layer": 2, "n_embd": 32, "spiking": False}),
    "tied": ("spikegpt", {"n_layer": 2, "n_embd": 32, "head_tying": True, "binary_embedding": False}),
    "snntorch": ("spikegpt", {"n_layer": 2, "n_embd": 32, "neuron": {"type": "snntorch.leaky"}}),
    "norse": ("spikegpt", {"n_layer": 2, "n_embd": 32, "neuron": {"type": "norse.lif_box"}}),
    "soft reset": ("spikegpt", {"n_layer": 2, "n_embd": 32, "neuron": {"type": "if"}}),
    "gif": ("spikegpt", {"n_layer": 2, "n_embd": 32, "placement": "spike_input", "neuron": {"type": "gif"}}),
    "egru": ("egru", {"n_layer": 2, "n_embd": 24, "n_hidden": 40}),
    "egru projected": ("egru", {"n_layer": 1, "n_embd": 24, "n_hidden": 40, "projection": True, "zoneout": 0.2}),
}


def _model(name: str, seed: int = 0, vocab_size: int = 50) -> SpikingLanguageModel:
    kind, config = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create_model(kind, vocab_size=vocab_size, **config).eval()
        for parameter in model.parameters():  # what begins as one constant must not hide what is left out
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def _leaves(state: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_state(lambda t: found.append(t) or t, state)  # type: ignore[func-returns-value]
    return found


def _close(found: Any, expected: Any) -> None:
    for a, b in zip(_leaves(found), _leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5 * max(1.0, float(b.abs().max().clamp(max=1e4))))


@pytest.fixture(autouse=True)
def _compiler(request: pytest.FixtureRequest) -> None:
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and callspec.params.get("engine") == "compiled":
        pytest.importorskip("numba")


@pytest.fixture(autouse=True)
def _built_in_rates(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Choose forms as on a machine where events pay at this size too."""
    monkeypatch.setenv(events.ENVIRONMENT, "gather=1e12,int8_gather=1e12,overhead=1e-12")
    rates = events.rates  # a test may put something else there
    rates.cache_clear()
    yield
    rates.cache_clear()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_decodes_as_the_model_steps(name: str, engine: Any) -> None:
    model = _model(name)
    decoder = prepare(model, engine=engine)
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        output = model(prompt)
        state, token = output.state, output.logits[:, -1].argmax(-1)
        decoder.load(state)
        for n in range(60):
            logits, state = model.step(token, state)
            found = decoder.feed(int(token))
            torch.testing.assert_close(found, logits[0], rtol=1e-4, atol=2e-5)
            if n % 20 == WATCHED + 2:  # states are exchanged in the middle of a text, before and after forms are chosen
                _close(decoder.state(), state)
                decoder.load(state)
            token = logits.argmax(-1)
            assert int(found.argmax()) == int(token)
        _close(decoder.state(), state)
        stepped, after = decoder.step(token, state)
        expected, state = model.step(token, state)
    torch.testing.assert_close(stepped, expected, rtol=1e-4, atol=2e-5)
    _close(after, state)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["spikegpt", "spike_input", "egru"])
def test_int8_is_the_model_with_rounded_matrices(name: str, engine: Any) -> None:
    model = _model(name)
    decoder = prepare(model, weights="int8", engine=engine)
    table = next(m for m in model.modules() if isinstance(m, nn.Embedding)).weight
    rounded = _model(name)
    turned = {op.parameters["weight_t"] for op in rounded.graph() if "weight_t" in op.parameters}
    for key, p in rounded.named_parameters():
        if p.dim() != 2 or key.startswith("emb"):
            continue
        rows = p.data.T if key in turned else p.data
        scale = rows.abs().amax(1, keepdim=True) / 127
        rows.copy_((rows / scale).round() * scale)
    if name == "egru":  # its table is its decoder: only one of them is rounded
        rounded.decoder.decoder.weight = nn.Parameter(rounded.embeddings.weight.data.clone())
        weight = rounded.decoder.decoder.weight.data
        scale = weight.abs().amax(1, keepdim=True) / 127
        weight.copy_((weight / scale).round() * scale)
    assert all(form.startswith("int8") for form in decoder.forms().values())
    assert table.dtype == torch.float32
    with torch.no_grad():
        state = rounded.init_state(1)
        for n in range(30):
            logits, state = rounded.step(torch.tensor([n]), state)
            torch.testing.assert_close(decoder.feed(n), logits[0], rtol=1e-4, atol=2e-5)


def test_silent_sources_are_not_read() -> None:
    pytest.importorskip("numba")
    model = _model("spike_input")
    floats, codes = prepare(model, engine="compiled"), prepare(model, weights="int8", engine="compiled")
    assert set(floats.forms().values()) == {"rows"}
    assert set(codes.forms().values()) == {"int8 rows"}
    for n in range(WATCHED):
        floats.feed(n)
        codes.feed(n)
    ops = {op.name: model.graph().input_kinds(op)[0] for op in model.graph() if op.kind == "linear"}
    assert floats.forms() == {name: "rows" if kind == "real" else "sources" for name, kind in ops.items()}
    assert codes.forms() == {name: f"int8 {form}" for name, form in floats.forms().items()}
    assert codes.bytes_per_token() * 4 == floats.bytes_per_token()
    assert set(prepare(_model("egru"), engine="torch").forms().values()) == {"rows", "sources"}


def test_two_decoders_and_no_memory_per_token() -> None:
    model = _model("spikegpt")
    one, other = prepare(model), prepare(model)
    place = one.feed(1).data_ptr()
    before = one.state()
    other.feed(7)
    _close(one.state(), before)
    assert one.feed(2).data_ptr() == place
    assert model.emb.weight.data_ptr() == one.plan.instructions[0].table.data_ptr()
    with pytest.raises(AssertionError):
        _close(one.state(), before)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model("spikegpt")
    assert refusal(model) is None
    with pytest.raises(UsageError, match="token 50 is not one of this model's 50"):
        prepare(model).feed(50)
    with pytest.raises(UsageError, match="one stream"):
        prepare(model).load(model.init_state(2))
    with pytest.raises(UsageError, match="weights is 'float' or 'int8'"):
        prepare(model, weights="int4")  # type: ignore[arg-type]
    halved = create_model("spikegpt", vocab_size=50, n_layer=1, n_embd=32, rescale=True)
    assert "wkv" in str(refusal(halved))
    with pytest.raises(UsageError, match=r"cannot be prepared for decoding: op 'blocks\.0\.att\.wkv'"):
        prepare(halved)
    for kind, reason in (({"type": "norse.lif"}, "state of op"), ({"type": "gif.ternary"}, "no dynamics")):
        other = create_model("spikegpt", vocab_size=50, n_layer=1, n_embd=32, neuron=kind)
        assert reason in str(refusal(other)), refusal(other)
    assert "no state is declared" in str(
        refusal(create_model("egru", vocab_size=50, n_layer=1, n_embd=8, n_hidden=8, cell="gru"))
    )
    assert "torch.float64" in str(refusal(_model("spikegpt").double()))
    model.step = model.step  # type: ignore[method-assign]
    assert "has been replaced" in str(refusal(model))
    del model.step
    model.head.register_forward_hook(lambda *_: None)
    assert "hooks" in str(refusal(model))
    monkeypatch.setattr(compiled, "missing", lambda: "there is no compiler")
    assert prepare(_model("egru")).engine == "torch"
    with pytest.raises(UsageError, match="there is no compiler"):
        prepare(_model("egru"), engine="compiled")


@given(sources=st.integers(1, 4096), targets=st.integers(1, 4096), shares=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_fewer_events_never_cost_more(sources: int, targets: int, shares: tuple[float, float]) -> None:
    less, more = sorted(shares)
    rates = events.DEFAULT_RATES
    few, many = (events.form_costs(sources, targets, share * sources, rates) for share in (less, more))
    assert all(few[form] <= many[form] for form in few)
    if events.cheaper_form(sources, targets, more * sources, ("rows", "sources"), rates) == "sources":
        assert events.cheaper_form(sources, targets, less * sources, ("rows", "sources"), rates) == "sources"


def test_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    fast_gather = events.Rates(gather=1e15, overhead=1e-15)
    slow_gather = events.Rates(gather=1.0)
    assert events.cheaper_product(64, 512, 512, 64 * 512, rates=fast_gather) == "event"
    assert events.cheaper_product(1, 512, 512, 1, rates=slow_gather) == "dense"
    assert events.cheaper_form(512, 512, 512, ("rows", "sources"), slow_gather) == "rows"
    assert events.cheaper_form(512, 512, 0, ("int8 rows", "packed"), events.Rates(packed=1e15)) == "packed"

    def rates(setting: str | None, **compiled: bool) -> events.Rates:
        events.rates.cache_clear()
        if setting is None:
            monkeypatch.delenv(events.ENVIRONMENT)
        else:
            monkeypatch.setenv(events.ENVIRONMENT, setting)
        return events.rates(**compiled)

    assert rates("default") == events.DEFAULT_RATES
    assert rates("gather=2e10, stream=3e10") == events.Rates(gather=2e10, stream=3e10)
    for wrong in ("gather", "gather=fast", "speed=1", "gather=-1"):
        with pytest.raises(UsageError, match="cannot read"):
            rates(wrong)
    pytest.importorskip("numba")
    measured = rates(None, compiled=True)
    assert events.rates(compiled=True) is measured  # once per process
    assert all(1e8 < getattr(measured, name) < 1e13 for name in ("stream", "gather", "int8_stream", "packed"))
    assert 0 < measured.overhead < 1e-2
    assert events.rates().int8_stream == events.DEFAULT_RATES.int8_stream != measured.int8_stream
    assert measured.gemm == events.DEFAULT_RATES.gemm


def test_text_that_nobody_tuned_depends_on_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on the machine's rates nor on what the process has loaded: same seed, same text."""
    model, decoders = _model("spike_input"), []

    def measured(compiled: bool = False) -> events.Rates:
        raise AssertionError("measured")

    def preparing(model: SpikingLanguageModel, **options: Any) -> Any:
        decoders.append(prepare(model, **options))
        return decoders[-1]

    monkeypatch.setattr(events, "rates", measured)
    monkeypatch.setattr(generation, "prepare", preparing)
    generate(model, [1, 2, 3], max_new_tokens=40, seed=3)
    assert [decoder.engine for decoder in decoders] == ["torch"]
    with pytest.raises(AssertionError, match="measured"):
        generate(model, [1, 2, 3], max_new_tokens=40, seed=3, weights="float")


@pytest.mark.parametrize("name", ["spikegpt", "egru"])
def test_generation_decodes_prepared_where_it_can(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(name)
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0.7, "seed": 3}
    texts = {None: generate(model, [1, 2, 3], **options)}
    steps: list[int] = []
    step = type(model).step
    monkeypatch.setattr(type(model), "step", lambda self, *args: (steps.append(1), step(self, *args))[1])
    asked: list[str] = []

    def preparing(model: SpikingLanguageModel, weights: Any = "float", **options: Any) -> Any:
        asked.append(weights)
        return prepare(model, weights=weights, **options)

    monkeypatch.setattr(generation, "prepare", preparing)
    for weights in (None, "float", "int8"):
        texts[weights] = generate(model, [1, 2, 3], weights=weights, **options)
    assert not steps
    assert torch.equal(texts[None], texts["float"])
    assert asked == ["float", "float", "int8"]
    for _, state in itertools.islice(iterate(model, torch.tensor([[1, 2, 3]]), temperature=0), 5):
        expected = state
    with torch.no_grad():
        greedy = generate(model, [1, 2, 3], max_new_tokens=4, temperature=0)
        _close(expected, model(greedy[None]).state)  # the state before the token it came with

    monkeypatch.setattr("spiking_lm.decoding._Lowering.check", lambda self: self.refuse())
    monkeypatch.setattr("spiking_lm.decoding._Lowering.refuse", _refuse, raising=False)
    assert torch.equal(generate(model, [1, 2, 3], **options), texts[None])
    assert len(steps) == 39
    with pytest.raises(UsageError, match="cannot be prepared for decoding: for a reason"):
        generate(model, [1, 2, 3], weights="float", **options)
    with pytest.raises(UsageError, match="one stream, not for 2 rows"):
        generate(model, [[1, 2], [3, 4]], weights="int8", **options)


def _refuse(self: object) -> None:
    raise decoding._Refused("for a reason")


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_few_bit_weights_are_read_as_codes(bits: int, symmetric: bool) -> None:
    pytest.importorskip("numba")
    layers = pytest.importorskip("spiking_lm_spikellm.layers")
    generator = torch.Generator().manual_seed(bits)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(bits)
        scheme = WeightScheme(bits=bits, symmetric=symmetric)
        layer = layers.SpikingLinear(300, 260, True, scheme, ActivationScheme(bits=4))
    layer.bias.data.normal_(generator=generator)
    assert "weight" not in dict(layer.named_parameters())
    for rows in (1, 4, 5):
        x = torch.randn(1, rows, 300, generator=generator)
        expected = kernels.gif_linear(x, layer.weight, layer.bias, layer.activations)
        with torch.no_grad():
            found = layer(x)
        assert layer._takes_codes(x) == (rows <= 4)
        torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)
    other = layers.round_to_nearest(torch.randn(260, 300, generator=generator), scheme)
    layer.set_weight(other)  # what was kept of the first matrix is forgotten
    x = torch.randn(2, 300, generator=generator)
    with torch.no_grad():
        found = layer(x)
    expected = kernels.gif_linear(x, other.dequantize(), layer.bias, layer.activations)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-3)


def test_benchmarks_and_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    monkeypatch.setattr(bench_decoding, "TOKENS", 2)
    rows = [
        *bench_decoding.decode_spikegpt(1, n_layer=2, n_embd=32, vocab_size=50),
        bench_decoding.decode_events(1, side=32, layers=1),
        *bench_decoding.packed_ternary(1, side=64, copies=3),
    ]
    assert [row.name for row in rows] == [
        *("decode/spikegpt-fp32", "decode/spikegpt-int8", "decode/events", "decode/ternary-spikes"),
        "decode/ternary-reals",
    ]
    assert all(row.value is not None and row.value > 0 and row.note for row in rows)
    assert rows[0].details["bytes"] == 4 * (2 * 13 * 32**2 + 50 * 32)
    (finding,) = decoding.check_decoding()
    assert finding.status == "ok"
    assert "compiled code" in finding.message
    monkeypatch.setattr(compiled, "missing", lambda: "there is no compiler")
    assert "torch (there is no compiler)" in decoding.check_decoding()[0].message
    monkeypatch.setattr(bench_decoding, "missing", lambda: "there is no compiler")
    (row,) = bench_decoding.decode_spikegpt(1)
    assert row.value is None
    assert "there is no compiler" in row.note
