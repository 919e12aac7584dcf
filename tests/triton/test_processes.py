"""Both kinds of tests of the Triton kernels, each in a process of its own; and the plugin in an ordinary one."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from spiking_lm import kernels, registry
from spiking_lm.errors import KernelUnavailableError

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

Child = Callable[..., "subprocess.CompletedProcess[str]"]


def _passed(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout


@needs_triton
@pytest.mark.slow
def test_numerics_interpreted(child: Child) -> None:
    _passed(child("test_numerics.py", TRITON_INTERPRET="1"))


@needs_triton
@pytest.mark.slow
def test_compiled_for_three_targets(child: Child) -> None:
    _passed(child("test_aot.py", SPIKING_LM_TRITON_AOT="1"))


def test_listing_imports_neither_torch_nor_triton() -> None:
    code = (
        "import sys, spiking_lm_triton\n"
        "from spiking_lm import registry\n"
        "assert 'lif_scan/triton' in registry.manager().all('kernels')\n"
        "assert not {'torch', 'triton'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_plugin_is_active() -> None:
    (record,) = [plugin for plugin in registry.plugins() if plugin.name == "triton"]
    assert record.status == "active"
    assert "lif_scan/triton" in record.provides["kernels"]


def _reason() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton"
    return "torch sees no GPU" if not torch.cuda.is_available() else "a tensor is on the cpu"


def test_it_is_refused_on_the_processor_with_a_reason() -> None:
    x = torch.ones(3, 4)
    options = {"beta": 0.5, "gain": 0.5, "threshold": 1.0}
    name, answer = kernels.explain_choice("lif_scan", x, **options)[0]
    assert name == "triton", "it has the highest priority"
    assert _reason() in str(answer)
    with kernels.use(lif_scan="triton"), pytest.raises(KernelUnavailableError, match=_reason()):
        kernels.lif_scan(x, **options)
    spikes, _ = kernels.lif_scan(x, **options)
    assert spikes.shape == x.shape
