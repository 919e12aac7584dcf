"""The report: complete in itself, escaped, and never stopped by what a run did not leave behind."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spiking_lm.accounting import ENERGY_WORDS
from spiking_lm.errors import DataError, MissingExtraError
from spiking_lm.report import write_report
from spiking_lm.report.collect import collect

PICTURES = {"loss.png", "rates.png", "operations.png", "raster.png"}


class Page(HTMLParser):
    """Tags, attributes and text of a page, and whether its elements close as they opened."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


def report(run: Path) -> Page:
    path = write_report(run)
    assert path == run / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def test_report_holds_what_the_run_left(run_dir: Path) -> None:
    page = report(run_dir)
    for words in (
        "<script>alert(1)</script> & 'demo'",
        "A bytes language model with 8.89 k parameters, trained for 40 steps on austen3 in 4 min 10 s.",
        "2.649 bits per byte on text of the test split: 0.92 above the best n-gram (interpolated byte 5-gram, 1.73).",
        "Protocol: 1,000 tokens of the test split, window 256, stride 128.",
        "In front of 1 of 2 weight matrices",
        ENERGY_WORDS.capitalize(),
        "4.6 pJ per MAC, 0.9 pJ per accumulate",
        "spiking-lm run 'demo recipe' --set seed=3",
        "pip install spiking-lm==0.1.0 torch==2.6.0",
        "0123abcd with local changes",
        "at temperature 0.7",
    ):
        assert words in page.text, words
    assert "This run" not in page.text  # no banner: it is complete
    assert {path.name for path in (run_dir / "report").iterdir()} == PICTURES
    for path in (run_dir / "report").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    assert page.text.count("blocks.0.in") >= 2


def test_report_needs_nothing_else_and_runs_nothing(run_dir: Path) -> None:
    page = report(run_dir)
    html = (run_dir / "report.html").read_text(encoding="utf-8")
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "form", "base", "foreignobject"}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "data", "action", "srcset"):
                assert value.startswith(("data:image/png;base64,", "#")), (tag, name, value[:60])
    assert re.findall(r"url\(([^#)][^)]*)\)", html) == []
    assert "@import" not in html
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_text_of_a_run_is_escaped(run_dir: Path) -> None:
    report(run_dir)
    html = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "<script" not in html
    assert "</script" not in html
    assert "<b>bold" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "&lt;/script&gt; true" in html
    assert "\x00" not in html
    assert "\x1b" not in html


def test_raster_shows_the_text_token_by_token(run_dir: Path) -> None:
    html = write_report(run_dir).read_text(encoding="utf-8")
    cells = re.findall(r'<span(?: class="mark")? style="width: \d+px">(.*?)</span>', html, re.DOTALL)
    assert "".join(cells[:8]) == "It was &"[:7] + "&lt;"
    assert cells[22] == "↵"
    assert cells[-2:] == ["␀", "␛"]


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("manifest.json", "This run has no manifest"),
        ("metrics.jsonl", "This run has no training log"),
        ("evaluation.json", "This run has no evaluation"),
        ("explanation.json", "This run was not explained"),
        ("samples.txt", "This run has no sample text"),
        ("raster.npz", "How do the neurons fire?"),
        ("recipe.yaml", "what was run"),
    ],
)
def test_missing_piece_is_said_to_be_missing(run_dir: Path, missing: str, words: str) -> None:
    (run_dir / missing).unlink()
    assert words in report(run_dir).text


@pytest.mark.parametrize(
    "kept", ["manifest.json", "metrics.jsonl", "recipe.yaml", "samples.txt", "evaluation.json", "explanation.json"]
)
def test_one_piece_alone_makes_a_report(run_dir: Path, kept: str) -> None:
    for path in run_dir.iterdir():
        if path.name != kept:
            path.unlink()
    assert "How was it made?" in report(run_dir).text


PIECES = ["manifest.json", "evaluation.json", "explanation.json", "raster.npz", "recipe.yaml", "metrics.jsonl"]


@pytest.mark.parametrize("damaged", PIECES)
def test_damaged_piece_is_named_in_the_report(run_dir: Path, damaged: str) -> None:
    (run_dir / damaged).write_bytes(b"{[")
    page = report(run_dir)
    assert re.search(rf"{re.escape(damaged)} (cannot be read|was cut short)", page.text)


@pytest.mark.parametrize("damaged", PIECES)
@pytest.mark.parametrize("content", [b"", b"{[", b"\xff\xfe\x00", b"[1, 2]", b"3"])
def test_damaged_piece_is_a_problem_and_no_crash(run_dir: Path, damaged: str, content: bytes) -> None:
    (run_dir / damaged).write_bytes(content)
    run = collect(run_dir)
    if damaged == "metrics.jsonl":
        assert run.train == run.valid == []
    else:
        assert [damaged in problem for problem in run.problems] == [True]


def test_other_shapes_of_json_are_named(run_dir: Path) -> None:
    (run_dir / "evaluation.json").write_text('{"metrics": {"bits_per_byte": 2.0}}')
    explanation = json.loads((run_dir / "explanation.json").read_text())
    del explanation["energy"]
    (run_dir / "explanation.json").write_text(json.dumps(explanation))
    text = report(run_dir).text
    assert "evaluation.json is not of the form that this version reads (KeyError: 'split')" in text
    assert "explanation.json is not of the form that this version reads (KeyError: 'energy')" in text


def test_torn_and_infinite_metrics(run_dir: Path) -> None:
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"split": "train", "step": 41, "loss": NaN, "bpb": Infinity, "lr": null}\n')
        file.write('{"split": "train", "step": 42, "lo')
    text = report(run_dir).text
    assert "the last line of metrics.jsonl was cut short; it is left out" in text
    assert "1 entries have a loss that is not a finite number" in text


def test_only_infinite_metrics(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text('{"split": "train", "step": 1, "loss": NaN, "lr": 1e-3}\n')
    assert "This run has no training log" in report(run_dir).text


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("interrupted", "This run was interrupted after step 40 of 80. It goes on with: spiking-lm run --resume"),
        ("running", "This run is not complete after step 40 of 80. It goes on with: spiking-lm run --resume"),
        ("failed", "This run failed after step 40 of 80: it <broke>"),
    ],
)
def test_unfinished_run_says_so(run_dir: Path, status: str, words: str) -> None:
    change(run_dir, status=status, error="it <broke>")
    recipe = (run_dir / "recipe.yaml").read_text()
    (run_dir / "recipe.yaml").write_text(recipe.replace("steps: 40", "steps: 80"))
    assert words in report(run_dir).text


def test_report_stage_of_a_running_run_is_complete(run_dir: Path) -> None:
    change(run_dir, status="running", stage="report")
    assert "This run" not in report(run_dir).text


def test_classification_run(run_dir: Path) -> None:
    lines = (
        '{"split": "train", "step": 1, "loss": 0.7, "lr": 1e-3}',
        '{"split": "valid", "step": 1, "loss": 0.6, "accuracy": 0.5}',
    )
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    evaluation = {"task": "classification", "split": "test", "metrics": {"accuracy": 0.8125}, "protocol": "32 examples"}
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation))
    page = report(run_dir)
    assert "81.2 % accuracy on text of the test split." in page.text
    assert "loss (nats)" in page.text
    evaluation |= {"baseline_unit": "accuracy", "baselines": {"tf-idf": 0.79}}
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation))
    page = report(run_dir)
    assert "81.2 % accuracy on texts of the test split: 2.2 points above a bag of words (tf-idf, 79.0%)." in page.text
    assert "Accuracy; longer is better." in page.text


def test_tall_and_many_sited_rasters(run_dir: Path) -> None:
    sites = [f"blocks.{i}.{kind}" for i in range(20) for kind in ("att", "ffn")]
    arrays: dict[str, Any] = {f"spikes_{i}": np.zeros((3, 5), np.uint8) for i in range(len(sites))}
    np.savez(
        run_dir / "raster.npz",
        text=np.frombuffer(json.dumps(["words", "of", "漢字\n"]).encode(), np.uint8),
        sites=np.array(sites),
        channels=np.full(len(sites), 5),
        **arrays,
    )
    text = report(run_dir).text
    assert "16 more sites are left out" in text
    assert "Spikes of" not in text
    html = (run_dir / "report.html").read_text(encoding="utf-8")
    assert 'alt="Spikes of blocks.0.att"' in html
    assert 'alt="Spikes of blocks.19.ffn"' in html


def test_report_is_the_same_each_time(run_dir: Path) -> None:
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first


def test_latest_run_of_a_folder(run_dir: Path) -> None:
    (run_dir.parent / "latest").write_text(run_dir.name + "\n")
    assert write_report(run_dir.parent) == run_dir / "report.html"


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_no_run_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is not a run"):
        write_report(tmp_path / name)


@pytest.mark.parametrize("module", ["jinja2", "matplotlib"])
def test_missing_extra_is_named(run_dir: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    for loaded in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.delitem(sys.modules, "spiking_lm.report.figures", raising=False)
    monkeypatch.delattr("spiking_lm.report.figures", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"spiking-lm\[report\]"):
        write_report(run_dir)


def change(run: Path, **entries: Any) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, **entries}))
