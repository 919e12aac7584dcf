"""Model folders: what is saved comes back bit for bit, and whatever was done to a folder is found and named."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import spiking_lm
from spiking_lm import registry, sealed
from spiking_lm.checkpoints import (
    load_checkpoint,
    load_model,
    resolve_model,
    save_checkpoint,
    save_model,
    verify_folder,
)
from spiking_lm.errors import CheckpointError, PluginError, UsageError

Make = Callable[..., Any]


def same(a: Any, b: Any) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


@pytest.fixture
def folder(tmp_path: Path, tiny: Make) -> Path:
    """A checkpoint with every file that there can be."""
    (tmp_path / "words.json").write_text('{"spiking_lm": {"type": "byte"}}')
    state = {"lr": 0.1, "moments": [torch.randn(4), torch.arange(3)]}
    return save_checkpoint(tmp_path / "run", 12, tiny(), state, tokenizer=tmp_path / "words.json")


def test_round_trip_is_exact(tmp_path: Path, tiny: Make) -> None:
    model = tiny(gain=0.1 + 0.2)
    save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    tokens = torch.randint(7, (2, 9))
    assert same(model, loaded)
    assert loaded.config == model.config
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert torch.equal(loaded.scratch, model.scratch)  # not saved: made anew by the model
    assert not loaded.training
    assert sorted(os.listdir(tmp_path / "m")) == ["COMPLETE", "SHA256SUMS", "config.json", "model.safetensors"]


def test_loading_leaves_the_random_generator_alone(tmp_path: Path, tiny: Make) -> None:
    save_model(tiny(), tmp_path / "m")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load_model(tmp_path / "m")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_kept(tmp_path: Path, tiny: Make, dtype: torch.dtype) -> None:
    model = tiny().to(dtype)
    save_model(model, tmp_path / "m")
    assert same(model, load_model(tmp_path / "m"))


@pytest.mark.parametrize("by_hand", [False, True])
def test_tied_weights_are_saved_once_and_tied_again(tmp_path: Path, tiny: Make, by_hand: bool) -> None:
    model = tiny(tied=not by_hand)
    if by_hand:  # the constructor knows nothing of this tie
        model.head.weight = model.emb.weight
    save_model(model, tmp_path / "m")
    assert {"emb.weight", "head.weight"} & load_file(tmp_path / "m/model.safetensors").keys() == {"emb.weight"}
    loaded = load_model(tmp_path / "m")
    assert loaded.head.weight is loaded.emb.weight
    assert same(model, loaded)


def test_views_of_one_storage_are_saved_apart(tmp_path: Path, tiny: Make) -> None:
    model = tiny(vocab_size=5)
    both = torch.randn(10, 5)
    model.emb.weight.data, model.head.weight.data = both[:5], both[5:].t()
    save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    assert same(model, loaded)
    assert loaded.head.weight is not loaded.emb.weight


def test_sha256sum_agrees(folder: Path) -> None:
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS", "COMPLETE"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("OK") == 6


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX")
def test_files_have_the_mode_that_the_umask_gives(folder: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    assert {path.stat().st_mode for path in folder.iterdir()} == {plain.stat().st_mode}


NAMES = [
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "trainer.safetensors",
    "trainer.json",
    "SHA256SUMS",
    "COMPLETE",
]


@pytest.mark.parametrize("name", NAMES)
def test_every_flipped_bit_is_found_and_named(folder: Path, name: str) -> None:
    path = folder / name
    good = path.read_bytes()
    # About 500 bits spread evenly, each place in a byte among them; header, names and data are all met.
    stride = max(1, 8 * len(good) // 500) | 1
    for bit in range(0, 8 * len(good), stride):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        with pytest.raises(CheckpointError) as caught:
            verify_folder(folder)
        assert f"{folder}: {name} is not what was saved" in caught.value.message, bit
    path.write_bytes(good)
    verify_folder(folder)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("load", [load_model, load_checkpoint, verify_folder])
def test_truncated_and_missing_files_are_named(folder: Path, name: str, load: Callable[[Path], object]) -> None:
    good = (folder / name).read_bytes()
    for kept in (0, len(good) // 2, len(good) - 1):
        (folder / name).write_bytes(good[:kept])
        with pytest.raises(CheckpointError, match=f"{name} is not what was saved"):
            load(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing") as caught:
        load(folder)
    assert caught.value.exit_code == 4
    assert caught.value.hint


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "pytorch_model.bin", "model.safetensors.bak"])
def test_extra_file_is_named(folder: Path, name: str) -> None:
    (folder / name).write_text("x")
    with pytest.raises(CheckpointError, match=f"{name} is not listed in SHA256SUMS"):
        load_model(folder)


def test_all_bad_files_are_named_at_once(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "trainer.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    assert "config.json is not what was saved" in caught.value.message
    assert "trainer.json is missing" in caught.value.message


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege")
@pytest.mark.parametrize("verify", [True, False])
def test_links_are_refused(folder: Path, tmp_path: Path, verify: bool) -> None:
    (folder / "model.safetensors").rename(tmp_path / "elsewhere")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"model\.safetensors.* a link"):
        load_model(folder, verify=verify)


@pytest.mark.skipif(os.name == "nt", reason="no named pipes")
def test_a_pipe_or_a_folder_is_refused_without_being_opened(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is no plain file"):
        load_model(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a folder"):
        load_model(folder)


def reseal(folder: Path) -> None:
    """What an attacker can do: hashes say where a file rots, not who wrote it."""
    for name in ("SHA256SUMS", "COMPLETE"):
        (folder / name).unlink()
    sealed._seal(folder)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.safetensors"])
@pytest.mark.parametrize("sealed", [True, False])
def test_a_pickle_in_disguise_does_not_run(
    folder: Path, name: str, sealed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (folder / name).write_bytes(pickle.dumps(Evil()))
    torch.save({"a": torch.ones(2), "b": Evil()}, tmp_path / "evil.pt")
    for content in (pickle.dumps(Evil()), (tmp_path / "evil.pt").read_bytes()):
        (folder / name).write_bytes(content)
        if sealed:
            reseal(folder)
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(folder)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "header",
    [
        (1 << 62).to_bytes(8, "little") + b"{}",
        (200_000_000).to_bytes(8, "little") + b"{" + b" " * 100,
        b"",
        (2).to_bytes(8, "little") + b"{}" + b"trailing",
        (60).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}     ' + b"\0" * 8,
    ],
    ids=["2^62", "over the limit", "empty", "trailing bytes", "data cut short"],
)
def test_hostile_safetensors_headers(folder: Path, header: bytes) -> None:
    (folder / "model.safetensors").write_bytes(header)
    reseal(folder)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable safetensors file"):
        load_model(folder)


@pytest.mark.parametrize("content", ["[]", "{", '"x"', "[" * 100_000, '{"config_version": 1}', "\x00"])
@pytest.mark.parametrize("name", ["config.json", "trainer.json"])
def test_hostile_json(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    reseal(folder)
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(folder)


def edit(folder: Path, **changes: Any) -> None:
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(record | changes))
    reseal(folder)


def test_tensors_that_do_not_fit_are_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["stray"] = torch.ones(1)
    del tensors["mix.bias"]
    tensors["emb.weight"] = tensors["emb.weight"][:3].clone()
    save_file(tensors, folder / "model.safetensors")
    reseal(folder)
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    for part in ("no tensor 'mix.bias'", "tensor 'stray' has no place", "tensor 'emb.weight' is (3, 5)"):
        assert part in caught.value.message


@pytest.mark.parametrize("aliases", [{"head.weight": "nowhere"}, {"nowhere": "emb.weight"}, {"a.b": "c"}])
def test_impossible_ties_are_refused(folder: Path, aliases: dict[str, str]) -> None:
    edit(folder, aliases=aliases)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: "):
        load_model(folder)


def test_newer_format_is_refused(folder: Path) -> None:
    edit(folder, config_version=2, spiking_lm="7.0", novelty=True)
    with pytest.raises(CheckpointError, match=r"format 2 by spiking-lm 7\.0") as caught:
        load_model(folder)
    assert caught.value.hint == "pip install --upgrade spiking-lm"


def test_config_that_the_plugin_no_longer_knows(folder: Path) -> None:
    edit(folder, config={"vocab_sise": 7})
    with pytest.raises(CheckpointError, match=r"'vocab_sise' \(saved with plugin 'tiny' 1\.0\)") as caught:
        load_model(folder)
    assert "vocab_size" in (caught.value.hint or "")


def test_missing_plugin_says_what_to_install(folder: Path) -> None:
    previous = registry.set_manager(registry.PluginManager(discover="first-party"))
    try:
        with pytest.raises(PluginError, match=r"saved with plugin 'tiny' 1\.0") as caught:
            load_model(folder)
    finally:
        registry.set_manager(previous)
    assert (caught.value.hint or "").startswith("pip install spiking-lm-tiny")
    assert caught.value.exit_code == 3


def test_the_plugin_of_the_neuron_is_named_as_well(tmp_path: Path) -> None:
    model = spiking_lm.create_model("spikegpt", vocab_size=5, n_layer=1, n_embd=4, ctx_len=4, neuron={"type": "tiny"})
    save_model(model, tmp_path / "m")
    previous = registry.set_manager(registry.PluginManager(discover="first-party"))
    try:
        with pytest.raises(PluginError, match="unknown neuron 'tiny'") as caught:
            load_model(tmp_path / "m")
    finally:
        registry.set_manager(previous)
    assert (caught.value.hint or "").startswith("pip install spiking-lm-tiny")


def test_a_folder_with_other_things_is_never_replaced(tmp_path: Path, tiny: Make) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        save_model(tiny(), tmp_path / "m")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file is in the way"):
        save_model(tiny(), tmp_path / "file")
    assert (tmp_path / "m/thesis.tex").read_text() == "years of work"


def test_saving_again_replaces_the_model(tmp_path: Path, tiny: Make) -> None:
    (tmp_path / "words.json").write_text("{}")
    save_model(tiny(seed=1), tmp_path / "m", tokenizer=tmp_path / "words.json")
    save_model(tiny(seed=2), tmp_path / "m")
    assert same(load_model(tmp_path / "m"), tiny(seed=2))
    assert sorted(os.listdir(tmp_path)) == ["m", "words.json"]


def test_extra_state_that_is_no_tensor_is_refused(tmp_path: Path, tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    monkeypatch.setattr(type(model), "get_extra_state", lambda self: {"secret": 1})
    with pytest.raises(UsageError, match="_extra_state"):
        save_model(model, tmp_path / "m")
    assert os.listdir(tmp_path) == []


def test_resolve_model(tmp_path: Path, tiny: Make) -> None:
    save_model(tiny(), tmp_path / "m")
    early = save_checkpoint(tmp_path / "runs/a/20260101T000000Z-aa", 5, tiny(), {})
    late = save_checkpoint(tmp_path / "runs/a/20260102T000000Z-bb", 3, tiny(), {})
    (tmp_path / "runs/a/20260103T000000Z-cc/checkpoints").mkdir(parents=True)  # it has saved nothing yet
    assert resolve_model(tmp_path / "m") == tmp_path / "m"
    assert resolve_model(early) == early
    assert resolve_model(early.parent.parent) == early
    assert resolve_model(tmp_path / "runs/a") == late
    assert same(load_model(tmp_path / "runs/a"), tiny())


def test_resolve_model_says_what_it_found(tmp_path: Path) -> None:
    (tmp_path / "old.pth").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither a model folder"):
        resolve_model(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="no such folder") as caught:
        resolve_model(tmp_path / "emty")
    assert "empty" in (caught.value.hint or "")
    with pytest.raises(CheckpointError, match="a file") as caught:
        resolve_model(tmp_path / "old.pth")
    assert "spiking-lm convert" in (caught.value.hint or "")


def test_torch_load_is_in_convert_alone_and_with_weights_only(root: Path) -> None:
    sources = [p for base in ("src", "plugins", "hw") for p in (root / base).rglob("*.py")]
    users = {p.name: p.read_text(encoding="utf-8") for p in sources if "torch.load(" in p.read_text(encoding="utf-8")}
    assert set(users) <= {"convert.py"}
    assert all(text.count("torch.load(") == text.count("weights_only=True") for text in users.values())
    picklers = [
        p.name for p in sources if re.search(r"pickle\.(load|Unpickler)|allow_pickle=True", p.read_text("utf-8"))
    ]
    assert not picklers


def test_initialisation_costs_nothing_on_loading(tmp_path: Path, tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tiny(), tmp_path / "m")
    drawn = []
    real = torch.nn.init.orthogonal_
    monkeypatch.setattr(torch.nn.init, "orthogonal_", lambda w: drawn.append(real(w).abs().sum().item()))
    load_model(tmp_path / "m")
    assert drawn == [0.0]


def test_public_names() -> None:
    assert spiking_lm.save_model is save_model
    assert spiking_lm.load_model is load_model


def test_another_process_loads_it(folder: Path, tmp_path: Path) -> None:
    code = f"import spiking_lm; print(spiking_lm.load_model({str(folder)!r}).seen.item())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "3", done.stderr
