"""Programs on disk, without torch; and what is wrong with a folder or a request is said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from spinnaker2_toys import make_program

from spiking_lm.errors import CheckpointError, DataError
from spiking_lm.hardware import load_program
from spiking_lm_spinnaker2.program import SpiNNaker2Program

VARIANTS: list[dict[str, Any]] = [
    {},
    {"numerics": "int8"},
    {"numerics": "int8", "storage": "dense", "projection": 9, "decoder": "pe", "embedding": "pe"},
    {"kernel": "event", "projection": 9, "zoneout": 0.1, "chips": 3, "pes_per_chip": 2, "pes": [2, 3]},
]


@pytest.mark.parametrize("options", VARIANTS)
def test_save_and_load(tmp_path: Path, options: dict[str, Any]) -> None:
    program, *_ = make_program(**options)
    tokens = np.arange(20)
    expected = program.run(tokens)
    program.save(tmp_path / "p", files={"note.txt": "kept"})
    loaded = load_program(tmp_path / "p")
    assert isinstance(loaded, SpiNNaker2Program)
    assert (loaded.config, loaded.pe_map, loaded.model) == (program.config, program.pe_map, "egru")
    found = loaded.run(tokens)
    np.testing.assert_array_equal(found.logits, expected.logits)
    assert found.counters == expected.counters
    assert loaded.report(found) == program.report(expected)
    assert (tmp_path / "p" / "note.txt").read_text() == "kept"


def test_a_tied_matrix_is_stored_once() -> None:
    program, *_ = make_program(sizes=(12, 12))
    parts = program.parts
    head = type(parts.head[0])("decoder.decoder", parts.embedding.rows, parts.head[0].bias)
    tied = SpiNNaker2Program.of(parts.embedding, parts.layers, [head], program.config, model="egru")
    record, tensors = tied.to_folder()
    assert record["tied"]
    assert "decoder.decoder.weight" not in tensors
    again = SpiNNaker2Program.from_folder(json.loads(json.dumps(record)), tensors)
    assert np.array_equal(again.run(np.arange(9)).logits, tied.run(np.arange(9)).logits)


def test_it_runs_where_torch_is_not(tmp_path: Path) -> None:
    program, *_ = make_program()
    program.save(tmp_path / "p")
    script = f"""
import sys
sys.modules["torch"] = None  # any import of torch fails
import numpy as np
from spiking_lm.hardware import load_program
program = load_program({str(tmp_path / "p")!r})
result = program.run(np.arange(20))
from rich.console import Console
Console(width=200).print(program.report(result).render())
np.save({str(tmp_path / "logits.npy")!r}, result.logits)
loaded = [name for name in sys.modules if name.split(".")[0] in ("torch", "norse", "snntorch")]
assert loaded == ["torch"] and sys.modules["torch"] is None, loaded
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "energy per token" in done.stdout
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), program.run(np.arange(20)).logits)


@pytest.mark.parametrize("name", ["weights.safetensors", "program.json"])
def test_a_truncated_folder(tmp_path: Path, name: str) -> None:
    program, *_ = make_program()
    program.save(tmp_path / "p")
    path = tmp_path / "p" / name
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=name):
        load_program(tmp_path / "p")
    path.unlink()
    with pytest.raises(CheckpointError, match=name):
        load_program(tmp_path / "p")


def test_a_program_of_a_newer_version(tmp_path: Path) -> None:
    program, *_ = make_program()
    program.save(tmp_path / "p")
    path = tmp_path / "p" / "program.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "format": record["format"] + 1}))
    with pytest.raises(CheckpointError, match="format 2"):
        load_program(tmp_path / "p", verify=False)


def _set(record: dict[str, Any], path: str, value: Any) -> None:
    *way, last = path.split(".")
    target: Any = record
    for step in way:
        target = target[int(step)] if isinstance(target, list) else target[step]
    target[int(last) if isinstance(target, list) else last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("options.kernel", "spiral", "kernel"),
        ("options.colour", "red", "colour"),
        ("vocab_size", 31, "embeddings.rows"),
        ("layers.0.units", 21, r"rnns\.0"),
        ("layers.1.inputs", 19, r"rnns\.1"),
        ("layers.0.op", "rnns.9", r"rnns\.9"),
        ("layers", [], "16"),
        ("head.0.op", "decoder.other", r"decoder\.other"),
        ("map.stages.0.bounds", [0, 19], r"rnns\.0"),
        ("map.stages.0.bounds", [0, 10, 20], "bounds"),
        ("map.stages.0.op", "rnns.5", r"rnns\.0"),
        ("map.stages", [], "stage"),
        ("map", None, "TypeError"),
        ("embedding", {}, "KeyError"),
    ],
)
def test_what_is_wrong_in_the_record_is_said(path: str, value: Any, message: str) -> None:
    program, *_ = make_program()
    record, tensors = program.to_folder()
    record = json.loads(json.dumps(record))
    _set(record, path, value)
    with pytest.raises(DataError, match=message):
        SpiNNaker2Program.from_folder(record, tensors)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("embeddings.rows", None, r"lack 'embeddings\.rows'"),
        ("rnns.0.input.values", lambda a: a.astype(np.float64), r"'rnns\.0\.input\.values' is float64"),
        ("rnns.0.input.columns", lambda a: a + 12, r"rnns\.0\.input\.columns point outside the 12 columns"),
        ("rnns.1.recurrent.pointers", lambda a: a[::-1].copy(), "do not ascend"),
        ("rnns.1.threshold", lambda a: a[1:], r"'rnns\.1\.threshold' is float32 \(15,\), expected float32 \(16,\)"),
        ("decoder.decoder.bias", None, r"decoder\.decoder\.bias"),
    ],
)
def test_what_is_wrong_in_the_weights_is_said(name: str, change: Any, message: str) -> None:
    program, *_ = make_program()
    record, tensors = program.to_folder()
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors[name])
    with pytest.raises(DataError, match=message):
        SpiNNaker2Program.from_folder(record, tensors)


@pytest.mark.parametrize("tokens", [[30], [-1], [[1, 2]], [0.5]])
def test_tokens_that_are_none(tokens: list[Any]) -> None:
    program, *_ = make_program()
    with pytest.raises(DataError):
        program.run(np.array(tokens))


def test_the_state_of_another_program_is_refused() -> None:
    program, *_ = make_program()
    other, *_ = make_program(sizes=(12, 21, 16))
    whole, *_ = make_program(numerics="int8")
    for state in (other.run(np.arange(3)).state, whole.run(np.arange(3)).state, [], "state", [None, None]):
        with pytest.raises(DataError, match="state"):
            program.run(np.arange(3), state)


def test_nothing_is_dropped_from_the_report() -> None:
    program, *_ = make_program(projection=9, numerics="int8", decoder="pe")
    report = program.report(program.run(np.arange(5)))
    assert [op.name for op in report.placement] == [
        "embeddings",
        *(f"rnns.{n}{part}" for n in (0, 1) for part in (".input", ".recurrent", "")),
        "decoder.projection",
        "decoder.decoder",
    ]
    on_pes = [op for op in report.placement if op.runs_on == "embedded-core"]
    assert sum(op.bytes for op in on_pes) == sum(sum(stage.pe_bytes) for stage in program.pe_map.stages)
    assert [op.runs_on for op in report.placement].count("host") == 1
    assert any("embeddings" in warning and "host" in warning for warning in report.warnings)
    assert any("nothing was measured" in warning for warning in report.warnings)
    for constant in report.constants:
        assert constant.source
        assert constant.grade in ("measured", "derived", "assumed")
    assert sum("fitted" in constant.name for constant in report.constants) == 1
    json.dumps(report.to_dict(), allow_nan=False)
