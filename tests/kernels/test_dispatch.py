"""Which implementation runs, how one is forced, and what is said when it cannot."""

from __future__ import annotations

import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from spiking_lm import builtin, hookimpl, kernels, registry
from spiking_lm.errors import KernelUnavailableError, UnknownNameError, UsageError
from spiking_lm.kernels import reference, torch_fast
from spiking_lm.records import KernelSpec

LIF: dict[str, Any] = {"beta": 0.5, "gain": 0.5, "threshold": 1.0, "final_only": True}
HERE = "test_kernels_toys"


def toy(x: Tensor, v0: Tensor | None = None, **_: Any) -> tuple[Tensor, Tensor]:
    """An implementation that can be told apart."""
    return torch.full_like(x, 7.0), x[0]


def only_short(x: Tensor, v0: Tensor | None = None, **_: Any) -> bool | str:
    return x.shape[0] < 3 or "only fewer than 3 steps"


def no_board() -> bool | str:
    return "no board is connected"


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The core, and a plugin with a fast kernel for short inputs and one that cannot run here."""
    module = types.ModuleType(HERE)
    module.__dict__.update(toy=toy, only_short=only_short, no_board=no_board)
    monkeypatch.setitem(sys.modules, HERE, module)

    class Plugin:
        @hookimpl
        def spiking_lm_kernels(self, register: Any) -> None:
            register(
                KernelSpec(
                    name="lif_scan/short", implementation=f"{HERE}:toy", supports=f"{HERE}:only_short", priority=50
                )
            )
            register(
                KernelSpec(
                    name="lif_scan/board", implementation=f"{HERE}:toy", available=f"{HERE}:no_board", priority=90
                )
            )
            register(KernelSpec(name="lif_scan/gone", implementation=f"{HERE}:absent", priority=80))
            register(
                KernelSpec(name="lif_scan/extra", implementation="x:y", requires=("no_such_package_xyz",), priority=70)
            )

    manager = registry.PluginManager(discover=False)
    manager.register(builtin, "core")
    manager.register(Plugin(), "toys")
    previous = registry.set_manager(manager)
    yield
    registry.set_manager(previous)


@pytest.mark.usefixtures("plugins")
def test_the_highest_priority_that_can_run_is_chosen() -> None:
    short, long = torch.zeros(2, 4), torch.zeros(3, 4)
    assert kernels.lif_scan(short, **LIF)[0].unique().tolist() == [7.0]
    assert kernels.lif_scan(long, **LIF)[0].unique().tolist() == [0.0]
    answers = dict(kernels.explain_choice("lif_scan", long, None, **LIF))
    assert list(answers) == ["board", "gone", "extra", "short", "numba", "torch", "reference"]
    assert answers["board"] == "no board is connected"
    assert "absent" in str(answers["gone"])
    assert "no_such_package_xyz" in str(answers["extra"])
    assert answers["short"] == "only fewer than 3 steps"
    assert answers["torch"] is True
    assert answers["reference"] is True


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize(
    ("name", "reason"),
    [("board", "no board is connected"), ("short", "only fewer than 3 steps"), ("gone", "absent"), ("extra", "xyz")],
)
def test_a_forced_implementation_that_cannot_run_raises_its_reason(name: str, reason: str) -> None:
    with kernels.use(lif_scan=name), pytest.raises(KernelUnavailableError, match=reason) as caught:
        kernels.lif_scan(torch.zeros(3, 4), **LIF)
    assert repr(name) in caught.value.message
    assert "kernels.use" in caught.value.message


def test_use_forces_and_restores() -> None:
    x = torch.zeros(3, 4)
    chosen = [name for name, answer in kernels.explain_choice("lif_scan", x, **LIF) if answer is True]
    assert chosen == ["torch", "reference"]
    with kernels.use(lif_scan="reference"):
        assert dict(kernels.explain_choice("lif_scan", x, **LIF))["reference"] is True
        assert "asks for 'reference'" in str(dict(kernels.explain_choice("lif_scan", x, **LIF))["torch"])
        with kernels.use(wkv="reference", lif_scan="torch"):
            assert dict(kernels.explain_choice("lif_scan", x, **LIF))["torch"] is True
        assert dict(kernels.explain_choice("lif_scan", x, **LIF))["torch"] is not True
    assert dict(kernels.explain_choice("lif_scan", x, **LIF))["torch"] is True


def test_forcing_really_runs_the_forced_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is differentiable twice, the fast form is not: the graph shows which one ran."""
    x = torch.randn(3, 4, requires_grad=True)
    with kernels.use(lif_scan="reference"):
        assert "LIFScan" not in kernels.lif_scan(x, **LIF)[0].grad_fn.name()
    assert "LIFScan" in kernels.lif_scan(x, **LIF)[0].grad_fn.name()
    monkeypatch.setenv("SPIKING_LM_KERNELS", "wkv=torch, lif_scan=reference")
    assert "LIFScan" not in kernels.lif_scan(x, **LIF)[0].grad_fn.name()
    with kernels.use(lif_scan="torch"):
        assert "LIFScan" in kernels.lif_scan(x, **LIF)[0].grad_fn.name()


def test_unknown_names_are_named() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'torch'"), kernels.use(lif_scan="troch"):
        pass
    with pytest.raises(UnknownNameError, match="did you mean 'lif_scan'"), kernels.use(lif_scna="torch"):
        pass
    with pytest.raises(UnknownNameError, match="did you mean 'wkv'"):
        kernels.explain_choice("wvk")


@pytest.mark.parametrize(
    ("setting", "error", "match"),
    [
        ("lif_scan=troch", UnknownNameError, "did you mean 'torch'.*SPIKING_LM_KERNELS"),
        ("lif_scna=torch", UnknownNameError, "did you mean 'lif_scan'"),
        ("lif_scan", UsageError, "SPIKING_LM_KERNELS"),
        ("=torch", UsageError, "SPIKING_LM_KERNELS"),
    ],
)
def test_a_wrong_environment_variable_is_said(
    monkeypatch: pytest.MonkeyPatch, setting: str, error: type[Exception], match: str
) -> None:
    monkeypatch.setenv("SPIKING_LM_KERNELS", setting)
    with pytest.raises(error, match=match):
        kernels.lif_scan(torch.zeros(3, 4), **LIF)


def test_an_unsupported_dtype_raises_when_forced_and_falls_to_the_definition_when_not() -> None:
    x = torch.ones(3, 4).to(torch.float8_e4m3fn)
    with kernels.use(lif_scan="torch"), pytest.raises(KernelUnavailableError, match="float8_e4m3fn is not one of"):
        kernels.lif_scan(x, **LIF)
    assert kernels.lif_scan(x, **LIF)[0].dtype == torch.float8_e4m3fn
    k = torch.ones(1, 3, 4).to(torch.float8_e4m3fn)
    with kernels.use(wkv="torch"), pytest.raises(KernelUnavailableError, match="float8_e4m3fn is not one of"):
        kernels.wkv(torch.zeros(4), torch.zeros(4), k, k)


def test_use_holds_for_its_own_thread_only() -> None:
    x = torch.zeros(3, 4)
    seen: list[Any] = []

    def look() -> None:
        seen.append(dict(kernels.explain_choice("lif_scan", x, **LIF))["torch"])

    with kernels.use(lif_scan="reference"):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert seen == [True]


def test_many_threads_may_choose_at_once() -> None:
    wrong: list[str] = []

    def work(name: str) -> None:
        # A leaf of its own: threads that put the same leaf into graphs at once can deadlock inside torch 2.14.
        x = torch.randn(5, 4, requires_grad=True)
        for _ in range(50):
            with kernels.use(lif_scan=name):
                graph = kernels.lif_scan(x, **LIF)[0].grad_fn.name()
            if ("LIFScan" in graph) != (name == "torch"):
                wrong.append(f"{name}: {graph}")

    threads = [threading.Thread(target=work, args=(name,)) for name in ("torch", "reference") * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_importing_kernels_imports_no_compiler() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import spiking_lm.kernels as k; "
        "k.lif_scan(torch.zeros(2, 3), beta=.5, gain=.5, threshold=1.); "
        "print([m for m in set(sys.modules) - before if m.split('.')[0] in ('triton', 'numba', 'snntorch')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_both_ops_register_their_definition_and_their_fast_form() -> None:
    names = set(registry.all("kernels"))
    assert {"lif_scan/reference", "lif_scan/torch", "wkv/reference", "wkv/torch"} <= names
    assert registry.get("kernels", "wkv/torch").load("implementation") is torch_fast.wkv
    assert registry.get("kernels", "wkv/reference").load("implementation") is reference.wkv
