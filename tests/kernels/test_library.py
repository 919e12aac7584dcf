"""Every op is one node to torch.compile and torch.export, and what the graph computes is what eager calls do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from spiking_lm import kernels
from spiking_lm.config import SurrogateConfig
from spiking_lm.kernels import library
from spiking_lm.models import create_model
from spiking_lm.schemes import ActivationScheme, SalientChannels

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

Op = Callable[..., Any]
FOUR_BITS, SIGMOID = ActivationScheme(bits=4), SurrogateConfig(name="sigmoid", alpha=4.0)
SALIENT = ActivationScheme(bits=4, salient=SalientChannels(rate=0.25, steps=2))


def _real(*shape: int, learned: bool = True, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).requires_grad_(learned)


def _lif(**options: Any) -> Op:
    return lambda x, v0=None: kernels.lif_scan(x, v0, **{"beta": 0.5, "gain": 0.5, "threshold": 1, **options})


def _egru(a: Tensor, kernel: Tensor, bias: Tensor, threshold: Tensor, y0: Tensor | None, **options: Any) -> Any:
    return kernels.egru_scan(a, kernel, bias, threshold, None, y0, gamma=1, epsilon=1.0, **options)


AMPLITUDES = torch.full((4,), 1.5)
CASES: dict[str, tuple[str, Op, tuple[Any, ...]]] = {
    "lif": ("lif_scan", _lif(), (_real(7, 2, 5), _real(2, 5))),
    "lif, batch first, soft reset": (
        "lif_scan",
        lambda x: _lif(v_reset=None, compare=">", surrogate=SIGMOID, final_only=True)(x.transpose(0, 1)),
        (_real(2, 7, 5),),
    ),
    "wkv": ("wkv", kernels.wkv, (_real(5), _real(5, seed=1), _real(2, 7, 5), _real(2, 7, 5, seed=1))),
    "wkv, state": (
        "wkv",
        lambda *x: kernels.wkv(*x[:4], x[4:]),
        (*(_real(5), _real(5, seed=1), _real(2, 7, 5), _real(2, 7, 5, seed=1)), *[_real(2, 5)] * 2, torch.zeros(2, 5)),
    ),
    "egru": ("egru_scan", _egru, (_real(7, 2, 12), _real(4, 12), _real(12), _real(4), _real(2, 4))),
    "egru, mask": (
        "egru_scan",
        lambda *x: _egru(*x[:5], keep=x[5]),
        (_real(7, 2, 12), _real(4, 12), _real(12), _real(4), None, (_real(7, 2, 4, learned=False) > 0).float()),
    ),
    "elastic": ("elastic_scan", kernels.elastic_scan, (_real(4, 2, 5), AMPLITUDES, _real(2, 5))),
    "elastic, learned": (
        "elastic_scan",
        lambda *x: kernels.elastic_scan(*x, final=False, bits=1),
        (_real(4, 2, 5), AMPLITUDES.clone().requires_grad_()),
    ),
    "attention": ("attention", kernels.attention, (_real(2, 2, 3, 4, 5), *[_real(2, 2, 3, 6, 5)] * 2)),
    "gif": ("gif_linear", lambda *x: kernels.gif_linear(*x, FOUR_BITS), (_real(2, 7, 8), _real(5, 8), _real(5))),
    "gif, salient, spikes": (
        "gif_linear",
        lambda *x: kernels.gif_linear(*x[:2], None, SALIENT, x[2], mode="spike"),
        (_real(2, 7, 8), _real(5, 8), torch.arange(8) % 4 == 0),
    ),
}  # fmt: skip


def _outputs(result: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]


@pytest.mark.parametrize("case", list(CASES))
def test_an_op_is_one_node_and_equals_the_eager_call(case: str) -> None:
    """Forward to the bit, gradients too: what runs behind the node is what runs without it."""
    name, op, inputs = CASES[case]
    graphs: list[torch.fx.GraphModule] = []

    def look(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(module)
        return module

    traced = torch.compile(op, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    torch.compile(op, backend=look, fullgraph=True)(*inputs)
    (graph,) = graphs
    nodes = Counter(str(node.target).removesuffix(".default") for node in graph.graph.nodes)
    assert nodes[f"spiking_lm.{name}"] + nodes[f"spiking_lm::{name}"] == 1, nodes

    learned = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    results = []
    for run in (op, traced):
        outputs = _outputs(run(*inputs))
        loss = sum(
            (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() for out in outputs if out.requires_grad
        )
        results.append((outputs, torch.autograd.grad(loss, learned)))
    (eager, eager_grads), (graphed, graph_grads) = results
    for expected, found in zip((*eager, *eager_grads), (*graphed, *graph_grads), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


RAW: dict[str, tuple[Any, ...]] = {
    "lif_scan": (_real(7, 2, 5), _real(2, 5), 0.5, 0.5, 1.0, None, ">=", "atan", 2.0, True, False),
    "wkv": (_real(5), _real(5), _real(2, 7, 5), _real(2, 7, 5), None, None, None),
    "egru_scan": (_real(7, 2, 12), _real(4, 12), _real(12), _real(4), None, _real(2, 4), None, 0.7, 1.0, 0.0),
    "elastic_scan": (_real(4, 2, 5), AMPLITUDES, None, 0.25, 2, "asymmetric", True),
    "attention": (_real(2, 2, 3, 4, 5), _real(2, 2, 3, 6, 5), _real(2, 2, 3, 6, 5), None, None, None, 2),
    "gif_linear": (_real(7, 8), _real(5, 8), None, None, None, 4, None, "exact", "signed", "dynamic", "fake"),
}


@pytest.mark.parametrize("name", list(RAW))
def test_torch_finds_nothing_wrong_with_the_declaration(name: str) -> None:
    opcheck(getattr(torch.ops.spiking_lm, name).default, RAW[name])


def test_an_empty_text_shares_no_memory_with_the_state_it_hands_on() -> None:
    state = [torch.ones(2, 5) for _ in range(3)]
    _, p, q, o = torch.ops.spiking_lm.wkv(_real(5), _real(5), torch.empty(2, 0, 5), torch.empty(2, 0, 5), *state)
    assert {t.data_ptr() for t in (p, q, o)}.isdisjoint(t.data_ptr() for t in state)
    assert torch.equal(p, state[0])


def test_fake_tensors_have_the_shapes_of_real_ones() -> None:
    with FakeTensorMode() as mode:
        spikes, v = kernels.lif_scan(torch.empty(5, 3, 4, dtype=torch.bfloat16), beta=0.5, gain=0.5, threshold=1.0)
    assert spikes.fake_mode is mode
    assert (spikes.dtype, v.dtype) == (torch.bfloat16, torch.float32)
    assert spikes.shape == v.shape == (5, 3, 4)


def test_an_implementation_is_forced_in_a_graph_as_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    plain = library.call
    monkeypatch.setattr(library, "call", lambda op, *a, **k: (seen.append(op), plain(op, *a, **k))[1])
    graph = torch.export.export(_Wrapped(_lif()), (torch.randn(7, 2, 5),)).module()
    assert not seen, "nothing runs while it is traced"
    with kernels.use(lif_scan="reference"):
        graph(torch.randn(7, 2, 5))
    assert seen == ["lif_scan"]


class _Wrapped(torch.nn.Module):
    def __init__(self, op: Op) -> None:
        super().__init__()
        self.op = op

    def forward(self, *args: Tensor) -> Any:
        return self.op(*args)


MODELS: list[tuple[str, dict[str, Any], dict[str, int]]] = [
    ("spikegpt", {"n_layer": 2, "n_embd": 16, "ctx_len": 64}, {"wkv": 2, "lif_scan": 4}),
    ("egru", {"n_embd": 12, "n_hidden": 16}, {"egru_scan": 3}),
]


@pytest.mark.parametrize(("name", "sizes", "nodes"), MODELS, ids=["spikegpt", "egru"])
def test_an_exported_model_holds_one_node_per_op(name: str, sizes: dict[str, Any], nodes: dict[str, int]) -> None:
    if name == "spikegpt":
        pytest.importorskip("snntorch")
    torch.manual_seed(0)
    model = create_model(name, vocab_size=20, **sizes).eval()
    length = torch.export.Dim("length", min=3, max=64)
    program = torch.export.export(model, (torch.randint(20, (2, 9)),), dynamic_shapes=({1: length},))
    found = Counter(str(n.target).split(".")[1] for n in program.graph.nodes if str(n.target).startswith("spiking_lm."))
    assert found == nodes
    for other in (9, 33):
        tokens = torch.randint(20, (2, other))
        torch.testing.assert_close(program.module()(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["spikegpt", "egru"])
def test_a_compiled_model_trains_as_an_eager_one(name: str) -> None:
    if name == "spikegpt":
        pytest.importorskip("snntorch")
    sizes = next(sizes for other, sizes, _ in MODELS if other == name)
    torch.manual_seed(0)
    model = create_model(name, vocab_size=20, **sizes)
    tokens = torch.randint(20, (2, 9))
    torch._dynamo.reset()
    grads = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        torch.manual_seed(1)  # masks of dropout
        run(tokens).logits.square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-7)
