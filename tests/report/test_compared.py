"""The section of the compare stage, and scores and baselines in perplexity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spiking_lm.report import write_report
from spiking_lm.report.collect import collect
from spiking_lm.report.tables import results_grid, spikes_grid


def result(name: str, **values: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": name,
        "changes": {},
        "model": "spikegpt",
        "neuron": "lif",
        "parameters": 141_000,
        "split": "valid",
        "metrics": {"accuracy": 0.5, "bits_per_byte": 2.3456, "perplexity": 5.1},
        "activity": 0.25,
        "tokens_per_s": 12_345.6,
        "seconds": 61.4,
    }
    return {**row, **values}


COMPARISON: dict[str, Any] = {
    "runs": [
        result("this run"),
        result("<b>box</b>", neuron="norse.lif_box", changes={"model.neuron": {"type": "norse.lif_box"}}),
        result("lstm", model="egru", neuron=None, metrics={}, activity=None, tokens_per_s=None, seconds=None),
    ],
    "spikes": {
        "sample": "2,048 tokens of the valid split, 32 sequences of 64",
        "sites": 5,
        "spikes": 655_360,
        "rate": 0.41,
        "runs": [
            {
                "name": "this run",
                "step": {"different": 0, "tokens_per_s": 75_240.2},
                "forward": {"different": 0, "tokens_per_s": 107_522.0},
            },
            {"name": "<b>box</b>", "step": None, "forward": {"different": 31_014, "tokens_per_s": 9.0}},
        ],
    },
}


def page(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def test_the_page_shows_what_was_compared(run_dir: Path) -> None:
    assert 'id="compared"' not in page(run_dir)
    (run_dir / "compare.json").write_text(json.dumps(COMPARISON), encoding="utf-8")
    html = page(run_dir)
    section = html.partition('id="compared"')[2].partition("</section>")[0]
    for words in (
        '<th class="n">parameters</th>',
        '<th class="n">bits per byte</th>',
        '<td class="n">2.346</td>',
        '<td class="n">25.0 %</td>',
        '<td class="n">12,346</td>',
        "<td>spikegpt, norse.lif_box</td>",
        "<td>egru</td>",
        "&lt;b&gt;box&lt;/b&gt;",
        "<td>equal</td>",
        "<td>31,014 of 655,360 differ</td>",
        "2,048 tokens of the valid split, 32 sequences of 64: 655 k values at 5 sites, 41.0 % of them spikes",
    ):
        assert words in section, words
    assert "<b>box</b>" not in html
    assert section.count("<table>") == 2


def test_without_spikes_there_is_one_table(run_dir: Path) -> None:
    (run_dir / "compare.json").write_text(json.dumps({"runs": COMPARISON["runs"]}), encoding="utf-8")
    assert page(run_dir).partition('id="compared"')[2].partition("</section>")[0].count("<table>") == 1


def test_a_comparison_of_another_shape_is_named(run_dir: Path) -> None:
    (run_dir / "compare.json").write_text('{"runs": [{"name": "x"}]}', encoding="utf-8")
    html = page(run_dir)
    assert "compare.json is not of the form that this version reads" in html
    assert 'id="compared"' not in html


def test_rows_are_as_long_as_their_head() -> None:
    for metrics in ({}, {"perplexity": 80.0}, {"accuracy": 0.75, "macro_f1": 0.7}):
        head, rows = results_grid({"runs": [result("this run", metrics=metrics), result("b", metrics={})]})
        assert [len(row) for row in rows] == [len(head)] * 2
    assert "80.000" in results_grid({"runs": [result("x", metrics={"accuracy": 0.3, "perplexity": 80.0})]})[1][0]
    assert "75.0 %" in results_grid({"runs": [result("x", metrics={"accuracy": 0.75, "macro_f1": 0.7})]})[1][0]
    head, rows = spikes_grid(COMPARISON["spikes"])
    assert rows[1][1:] == ["–", "31,014 of 655,360 differ", "–", "9"]


def test_words_are_scored_and_compared_in_perplexity(run_dir: Path) -> None:
    evaluation = json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))
    evaluation["metrics"] = {"accuracy": 0.25, "perplexity": 90.04}
    evaluation["baseline_unit"] = "perplexity"
    evaluation["baselines"] = {"Kneser-Ney bigram": 114.8, "Kneser-Ney trigram": 100.9}
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in lines:
        line["perplexity"] = 100 * line.pop("bpb")
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    html = page(run_dir)
    assert "90.040 perplexity per token" in html
    assert "11 below the best n-gram (Kneser-Ney trigram, 101)" in html
    assert "Perplexity of this model and of n-gram baselines" in html
    drawn = html.partition('id="training"')[2].partition("</section>")[0]
    assert "Kneser-Ney trigram: 100.90" in drawn
    assert ">perplexity<" in drawn
    assert collect(run_dir).problems == []
