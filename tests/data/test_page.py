"""docs/data.md is true: it lists every dataset, tokenizer and option, and its examples and figures hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from spiking_lm import data, registry
from spiking_lm.data.ngram import ngram_bits, ngram_perplexities


@pytest.fixture
def page(root: Path) -> str:
    return (root / "docs" / "data.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["datasets", "tokenizers"])
def test_every_name_and_option_is_listed(page: str, kind: str) -> None:
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`([\w-]+)`", row.split("|")[1])}
    ours = {name: entry for name, entry in registry.all(kind).items() if entry.plugin.name == "core"}
    assert set(ours) <= listed
    for entry in ours.values():
        for option in entry.load("config").model_fields:
            assert re.search(rf"`{option}[`:]", page), option


def test_the_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        scope: dict[str, object] = {}
        exec(example, scope)
    split = scope["split"]
    assert isinstance(split, data.TokenSplit)
    assert len(split) == 3200


def test_the_figures_are_those_computed(page: str) -> None:
    austen = data.load({"type": "austen3"})
    assert isinstance(austen, data.TextData)
    for name in ("valid", "test"):
        bits = ngram_bits(austen.train.tokens, getattr(austen, name).tokens, 6)
        assert f"| {name} | " + " | ".join(f"{value:.3f}" for value in bits) + " |" in page
    tokenizer = {"type": "word", "lowercase": True, "split": "punctuation", "min_count": 3, "eos": False}
    words = data.load({"type": "austen3", "tokenizer": tokenizer})
    assert isinstance(words, data.TextData)
    for name in ("valid", "test"):
        values = ngram_perplexities(words.train.tokens, getattr(words, name).tokens, 2, vocab_size=4984)
        assert f"| {name} | " + " | ".join(f"{value:.1f}" for value in values) + " |" in page


def test_notice_names_every_embedded_text(root: Path) -> None:
    notice = (root / "NOTICE").read_text(encoding="utf-8")
    embedded = {path.name.split(".")[0] for path in (root / "src/spiking_lm/data/embedded").glob("*.xz")}
    assert embedded == {"austen3", "authors4"}
    assert all(re.search(rf"^{name} ", notice, re.MULTILINE) for name in embedded)
