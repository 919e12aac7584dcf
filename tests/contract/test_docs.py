"""What docs/neurons.md and docs/testing.md say is so."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import torch
from pydantic import Field

import spiking_lm
from spiking_lm import registry
from spiking_lm.config import LIFConfig, NeuronConfig
from spiking_lm.interfaces import Neuron
from spiking_lm.testing import ModelContract, NeuronContract


def section(root: Path, page: str, title: str) -> str:
    text = (root / "docs" / page).read_text(encoding="utf-8")
    return re.split(r"^##+ ", text.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def code_blocks(text: str) -> list[str]:
    return [textwrap.dedent(block) for block in re.findall(r"(?:^ {4}.*\n|^\n)+", text, re.MULTILINE) if block.strip()]


@pytest.mark.parametrize(
    ("title", "contract"), [("The laws of a neuron", NeuronContract), ("The laws of a model", ModelContract)]
)
def test_the_laws_are_the_kits(root: Path, title: str, contract: type) -> None:
    rows = [line for line in section(root, "testing.md", title).splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert len(named) > 15
    assert [name for name in named if not hasattr(contract, f"test_{name}")] == []


def test_every_neuron_of_ours_is_described(root: Path) -> None:
    table = section(root, "neurons.md", "What is there")
    for name, entry in registry.all("neurons").items():
        if entry.plugin.first_party:
            assert f"| `{name}` |" in table


def test_the_defaults_are_the_configurations(root: Path) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\S.*?) \|", section(root, "neurons.md", "`lif`"), re.MULTILINE)
    stated = {name: value.strip("`") for name, value in rows if name in LIFConfig.model_fields}
    assert stated.keys() == LIFConfig.model_fields.keys()
    for name, default in LIFConfig().model_dump(mode="json").items():
        if name == "surrogate":
            assert stated[name] == "{name: atan, alpha: 2.0}"
        else:
            assert stated[name] == (str(default).lower() if isinstance(default, bool) else str(default))


class TestTheNeuronOfThePage(NeuronContract):
    @pytest.fixture
    def neuron(self, root: Path) -> Neuron:
        source = code_blocks(section(root, "neurons.md", "Write your own"))[0].split("@hookimpl")[0]
        names: dict = {
            "Field": Field,
            "Neuron": Neuron,
            "NeuronConfig": NeuronConfig,
            "spiking_lm": spiking_lm,
            "torch": torch,
        }
        exec(source, names)
        return names["MyNeuron"](names["MyConfig"](), size=4)
