"""The page's section on a conversion."""

from __future__ import annotations

import json
from pathlib import Path

from spiking_lm.report import write_report

LAYER = {"bits_per_weight": 4.5, "salient": 0.1, "error": 0.003, "error_nearest": 0.009, "zeros": 0.11}
REPORT = {
    "source": "somewhere/llama",
    "summary": {"method": "rotation, then rounding: gptq", "weights": "4 bits"},
    "notes": ["model.layers.1.mlp.up_proj: damped by 0.1"],
    "layers": [
        {**LAYER, "name": "model.layers.0.mlp.up_proj"},
        {**LAYER, "name": "model.layers.1.mlp.up_proj", "bits_per_weight": 4.7},
        {**LAYER, "name": "model.layers.0.mlp.down_proj", "salient": None, "error": None},
    ],
}


def test_the_page_shows_what_was_converted(run_dir: Path) -> None:
    (run_dir / "conversion.json").write_text(json.dumps(REPORT), encoding="utf-8")
    page = write_report(run_dir).read_text(encoding="utf-8")
    for words in ("What was converted?", "somewhere/llama", "rotation, then rounding: gptq", "damped by 0.1"):
        assert words in page
    assert "model.layers.*.mlp.up_proj ×2" in page
    assert "4.60" in page  # the mean of the two
    assert "0.3 %" in page


def test_a_run_that_converted_nothing_says_nothing_of_it(run_dir: Path) -> None:
    assert "What was converted?" not in write_report(run_dir).read_text(encoding="utf-8")


def test_a_conversion_of_another_shape_is_named(run_dir: Path) -> None:
    (run_dir / "conversion.json").write_text(json.dumps({**REPORT, "layers": [{"name": "a"}]}), encoding="utf-8")
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert "conversion.json is not of the form" in page


def test_the_page_says_what_shuffled_words_did(run_dir: Path) -> None:
    file = run_dir / "evaluation.json"
    evaluation = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**evaluation, "shuffled": {"perplexity": 750.98, "ratio": 22.26}}), encoding="utf-8")
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert "with its words shuffled" in page
    assert "perplexity 750.980, 22.3 times as high" in page
