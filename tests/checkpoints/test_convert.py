"""``spiking-lm convert``: the papers' checkpoints in and out, tensors equal, and nothing in a file ever runs."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spiking_lm import create_model, export_reference, load_model, records, registry, save_model
from spiking_lm.checkpoints import save_checkpoint
from spiking_lm.cli import main as cli_main
from spiking_lm.convert import convert, read_tensors
from spiking_lm.data import load_tokenizer
from spiking_lm.errors import CheckpointError, DataError, UnknownNameError, UsageError

Make = Callable[..., Any]


def reference(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in export_reference(model).items()}


@pytest.fixture
def pth(tmp_path: Path, tiny: Make) -> Path:
    torch.save(reference(tiny(seed=9)), tmp_path / "paper.pth")
    return tmp_path / "paper.pth"


def main(arguments: list[str]) -> Any:
    with pytest.raises(SystemExit) as ended:
        cli_main(arguments)
    return ended.value.code


# -- reading ------------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("name", ["evil.pth", "evil.safetensors", "evil.bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_an_evil_pickle_is_refused_and_does_not_run(
    tmp_path: Path, name: str, zipped: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(2), "b": Evil()}, name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(DataError, match=r"refused: it holds the Python object (posix|nt)\.system") as caught:
        convert(Path(name), Path("out"))
    assert caught.value.exit_code == 4
    assert main(["convert", name, "out"]) == 4
    assert "state_dict" in capsys.readouterr().err
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Evil()), "refused"),
        (pickle.dumps({"a": 1}), "refused|not a whole"),
        (b"", "not a whole"),
        (b"hello, world\n", "not a whole|refused"),
        (b"\x80\x02", "not a whole|refused"),
        ((40).to_bytes(8, "little") + b"{" + b"x" * 60, "damaged safetensors"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "damaged safetensors"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(DataError, match=message):
        convert(Path("x.pth"), Path("out"))
    assert os.listdir(tmp_path) == ["x.pth"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "holds a list"),
        (torch.ones(2), "holds a Tensor"),
        ({}, "it is empty"),
        ({"a": torch.ones(1), "epoch": 3}, "'epoch' is a int"),
        ({0: torch.ones(1)}, "not a dictionary of tensors"),
        ({"args": argparse.Namespace(), "model": {"a": torch.ones(1)}}, r"refused: .*argparse\.Namespace"),
        (torch.nn.Linear(1, 1), "refused"),
    ],
)
def test_what_is_not_a_state_dict_is_named(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(DataError, match=message):
        read_tensors(tmp_path / "x.pth")


def test_a_file_cut_short_and_a_compressed_one(pth: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.pth").write_bytes(pth.read_bytes()[:-40])
    with pytest.raises(DataError, match="not a whole"):
        read_tensors(tmp_path / "cut.pth")
    with zipfile.ZipFile(pth) as source, zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        for item in source.namelist():
            bomb.writestr(item, source.read(item) + b"\0" * 1_000_000)
    with pytest.raises(DataError, match="refused: a compressed archive"):
        read_tensors(tmp_path / "bomb.pth")


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module"])
def test_wrapped_and_prefixed_weights_are_found(tmp_path: Path, wrapper: str) -> None:
    weights = {"a": torch.ones(2), "b.c": torch.zeros(1)}
    prefixed = {f"module.{name}": tensor for name, tensor in weights.items()}
    torch.save({"epoch": 3, wrapper: prefixed, "loss": 0.5}, tmp_path / "x.pth")
    found = read_tensors(tmp_path / "x.pth")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


# -- converting ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", [None, "tiny"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_there_and_back(pth: Path, tmp_path: Path, tiny: Make, to: str | None, suffix: str) -> None:
    done = convert(pth, tmp_path / "m", to=to)
    assert (done.model_type, done.equal, done.compared) == ("tiny", 5, 5)
    assert done.parameters == sum(p.numel() for p in tiny().parameters())
    assert load_model(tmp_path / "m").seen == 12
    back = convert(tmp_path / "m", tmp_path / f"back{suffix}", to="reference")
    assert (back.equal, back.compared) == (5, 5)
    ours, theirs = read_tensors(tmp_path / f"back{suffix}"), torch.load(pth, weights_only=True)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_command_prints_checksum_and_size(pth: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(pth), str(tmp_path / "m"), "--set", "gain=0.5"]) == 0
    text = capsys.readouterr().out
    sums = (tmp_path / "m/SHA256SUMS").read_text()
    checksum = next(line.split()[0] for line in sums.splitlines() if line.endswith("model.safetensors"))
    assert f"sha256 {checksum}" in text
    assert "tiny, 100 parameters" in text
    assert "5 of 5 tensors equal" in text
    assert load_model(tmp_path / "m").config.gain == 0.5
    assert main(["convert", str(tmp_path / "m"), str(tmp_path / "b.pth"), "--to", "reference", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["equal"] == 5


def test_a_run_is_exported_from_its_newest_checkpoint(tmp_path: Path, tiny: Make) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path / "run", step, tiny(seed=step), {})
    convert(tmp_path / "run", tmp_path / "x.safetensors", to="reference")
    assert load_file(tmp_path / "x.safetensors")["paper.seen"] == 5


def test_a_damaged_model_is_not_exported(tmp_path: Path, tiny: Make) -> None:
    save_model(tiny(), tmp_path / "m")
    (tmp_path / "m/config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json is not what was saved"):
        convert(tmp_path / "m", tmp_path / "x.pth", to="reference")


def test_requests_that_make_no_sense(pth: Path, tmp_path: Path, tiny: Make) -> None:
    save_model(tiny(), tmp_path / "m")
    cases: list[tuple[type[Exception], str, Path, str, dict[str, Any]]] = [
        (UsageError, "exists already", pth, "m", {}),
        (UsageError, "is a spiking-lm model already", tmp_path / "m", "x", {}),
        (UsageError, "what format", tmp_path / "m", "x", {"to": "reference"}),
        (UsageError, "--set", tmp_path / "m", "x.pth", {"to": "reference", "options": {"a": 1}}),
        (UsageError, "converts a model folder", pth, "x.pth", {"to": "reference"}),
        (UnknownNameError, "unknown model 'tinny'", pth, "x", {"to": "tinny"}),
        (DataError, "no such file", tmp_path / "gone.pth", "x", {}),
        (DataError, "not a SpikeGPT state dict", pth, "x", {"to": "spikegpt"}),
    ]
    for error, message, source, out, options in cases:
        with pytest.raises(error, match=message):
            convert(source, tmp_path / out, **options)
        assert not (tmp_path / "x").exists()


def test_keys_that_nobody_knows(tmp_path: Path) -> None:
    save_file({"strange.weight": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(DataError, match=r"no model knows its keys \(strange\.weight") as caught:
        convert(tmp_path / "x.safetensors", tmp_path / "out")
    assert "--to tiny" in (caught.value.hint or "")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="no converter recognises this folder"):
        convert(tmp_path / "folder", tmp_path / "out")


def test_converters_of_plugins_see_paths_and_a_broken_one_is_passed_over(
    tmp_path: Path, tiny: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One converter reads a folder by itself; another fails on everything it is shown."""
    import sys
    import types

    from spiking_lm import hookimpl

    home = types.ModuleType("folder_converter")
    home.sniff = lambda source: isinstance(source, Path) and (source / "weights.txt").is_file()  # type: ignore[attr-defined]
    home.read = lambda source, **config: create_model("tiny", **config)  # type: ignore[attr-defined]
    home.broken = lambda source: 1 / 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "folder_converter", home)

    class Plugin:
        @hookimpl
        def spiking_lm_converters(self, register: Any) -> None:
            for name, sniff in (("folder", "sniff"), ("broken", "broken")):
                register(
                    records.ConverterSpec(name=name, sniff=f"folder_converter:{sniff}", convert="folder_converter:read")
                )

    registry.manager().register(Plugin(), "converters-of-a-stranger")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/weights.txt").write_text("1 2 3")
    done = convert(tmp_path / "theirs", tmp_path / "m", options={"width": 3})
    assert (done.model_type, done.source_sha256, done.equal) == ("tiny", None, None)
    assert load_model(tmp_path / "m").config.width == 3
    assert "'broken' failed to look at the source" in caplog.text


# -- tokenizers ---------------------------------------------------------------------------------------------------


def test_a_tokenizer_is_stored_with_the_model(pth: Path, tmp_path: Path) -> None:
    vocabulary = json.dumps({str(i): c for i, c in enumerate("abcdefg")}).encode("utf-16")
    (tmp_path / "vocab.json").write_bytes(vocabulary)
    convert(pth, tmp_path / "m", tokenizer=tmp_path / "vocab.json")
    assert load_tokenizer(tmp_path / "m").decode([6, 0, 1]) == "gab"
    convert(pth, tmp_path / "bare")
    done = convert(tmp_path / "bare", tmp_path / "m2", tokenizer=tmp_path / "m/tokenizer.json")  # added later
    assert (done.equal, done.compared) == (5, 5)
    assert (tmp_path / "m2/tokenizer.json").read_bytes() == (tmp_path / "m/tokenizer.json").read_bytes()
    load_model(tmp_path / "m2")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(pth: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"spiking_lm": {"type": "byte"}}')
    with pytest.raises(UsageError, match="256 tokens, the model only 7"):
        convert(pth, tmp_path / "m", tokenizer=tmp_path / "tokenizer.json")
    assert not (tmp_path / "m").exists()


# -- SpikeGPT -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["tiny", "deep8", "tiny_ffnpre"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_spikegpt_there_and_back(shared: Path, tmp_path: Path, case: str, suffix: str) -> None:
    pytest.importorskip("snntorch")
    golden = shared / "golden/spikegpt" / f"{case}.weights.safetensors"
    weights = load_file(golden)
    source = golden
    if suffix == ".pth":  # as the paper's code saves it, snnTorch's constants among the weights
        source = tmp_path / "paper.pth"
        torch.save({**weights, "blocks.0.lif1.threshold": torch.tensor(1.0)}, source)
    done = convert(source, tmp_path / "m", options={"ctx_len": 64})
    assert done.model_type == "spikegpt"
    assert done.equal == done.compared == len(weights)
    convert(tmp_path / "m", tmp_path / f"back{suffix}", to="reference")
    back = read_tensors(tmp_path / f"back{suffix}")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    if suffix == ".safetensors":
        assert (tmp_path / "back.safetensors").read_bytes() == golden.read_bytes()


def test_spikegpt_survives_the_disk_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("snntorch")
    torch.manual_seed(0)
    model = create_model("spikegpt", vocab_size=31, n_layer=3, n_embd=16, ctx_len=32, head_tying=True).eval()
    save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    tokens = torch.randint(31, (2, 32))
    assert torch.equal(model(tokens).logits, loaded(tokens).logits)
    assert loaded.head.weight is loaded.emb.weight  # type: ignore[union-attr]
