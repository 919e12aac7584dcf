"""Whatever ends a save (an error, a full disk, kill -9), the checkpoint before it still loads and no rubbish stays."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from spiking_lm import checkpoints, files, sealed
from spiking_lm.checkpoints import latest_checkpoint, load_checkpoint, load_model, save_checkpoint, save_model
from spiking_lm.errors import CheckpointError
from spiking_lm.files import atomic_folder, atomic_write, clean_leftovers

Make = Callable[..., Any]

posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals and limits")


def drive(*args: str) -> dict[str, Any]:
    driver = Path(__file__).with_name("crash_driver.py")
    done = subprocess.run([sys.executable, str(driver), *args], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@posix
def test_kill_9_at_random_moments(tmp_path: Path) -> None:
    result = drive("random", str(tmp_path / "run"), "45")
    assert result["saved"] > 20
    assert result["caught"] > 5, "too few kills fell into a save: the test has lost its point"
    assert result["left"] == [], "the next save clears away what killed ones left"


@posix
@pytest.mark.parametrize("exchange", ["exchange", "two-renames"])
def test_kill_9_before_every_system_call(tmp_path: Path, exchange: str) -> None:
    result = drive("calls", str(tmp_path), exchange)
    assert result["calls"] > 20
    assert result["steps"][0] == 1
    assert result["steps"][-1] == 2
    assert result["steps"] == sorted(result["steps"])  # once the new one is there it stays


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def run(tmp_path: Path, tiny: Make) -> Path:
    """A run with one good checkpoint and one good model."""
    save_checkpoint(tmp_path, 1, tiny(seed=1), {"step": 1})
    save_model(tiny(seed=1), tmp_path / "final")
    return tmp_path


@pytest.mark.parametrize("failing", ["save_file", "_pack", "_seal", "sha256_file"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()]
)
def test_a_failed_save_changes_nothing(
    run: Path, tiny: Make, failing: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = listing(run)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(checkpoints if failing in ("save_file", "_pack") else sealed, failing, fail)
    expected = CheckpointError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        save_checkpoint(run, 2, tiny(seed=2), {"step": 2}, keep=1)
    if failing != "_pack":
        with pytest.raises(expected):
            save_model(tiny(seed=2), run / "final")
    assert listing(run) == before
    assert not [p for p in run.rglob("*") if "tmp-" in p.name]
    if isinstance(caught.value, CheckpointError):
        assert "No space left on device" in caught.value.message
        assert "step-000002" in caught.value.message
        assert "untouched" in (caught.value.hint or "")


@posix
@pytest.mark.parametrize("limit", [100, 300, 3000, 20_000])
def test_the_system_refuses_to_write_more(run: Path, tiny: Make, limit: int) -> None:
    """A file-size limit makes the write itself fail half-way, inside safetensors too."""
    import resource

    before = listing(run)
    model = tiny(seed=2, width=100)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointError, match=r"step-000002: cannot be written: .*(File too large|os error 27)"):
            save_checkpoint(run, 2, model, {"step": 2, "moments": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert listing(run) == before
    assert latest_checkpoint(run) == run / "checkpoints/step-000001"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, where we may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root on Linux")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("moments", [1_000, 30_000, 60_000])
def test_a_disk_that_is_really_full(small_disk: Path, tiny: Make, moments: int) -> None:
    save_checkpoint(small_disk, 1, tiny(seed=1), {"step": 1})
    (small_disk / "ballast").write_bytes(b"x" * 200_000)
    before = listing(small_disk)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_checkpoint(small_disk, 2, tiny(seed=2, width=100), {"step": 2, "moments": torch.zeros(moments)})
    assert listing(small_disk) == before
    latest = latest_checkpoint(small_disk)
    assert latest is not None
    assert load_checkpoint(latest)[1] == {"step": 1}


def test_keep_deletes_only_after_the_new_one_is_there(tmp_path: Path, tiny: Make) -> None:
    for step in range(1, 6):
        path = save_checkpoint(tmp_path, step, tiny(seed=step), {"step": step}, keep=3)
        assert latest_checkpoint(tmp_path) == path
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-000003", "step-000004", "step-000005"]
    save_checkpoint(tmp_path, 6, tiny(), {"step": 6}, keep=1)
    assert os.listdir(tmp_path / "checkpoints") == ["step-000006"]
    assert (tmp_path / "latest").read_text() == "checkpoints/step-000006\n"


def test_going_on_from_an_earlier_step_makes_that_the_newest(tmp_path: Path, tiny: Make) -> None:
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, tiny(), {"step": step}, keep=9)
    again = save_checkpoint(tmp_path, 15, tiny(), {"step": 15}, keep=2)
    assert latest_checkpoint(tmp_path) == again
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-000015", "step-000030"]


def test_latest_passes_over_what_is_damaged_and_says_so(
    tmp_path: Path, tiny: Make, caplog: pytest.LogCaptureFixture
) -> None:
    assert latest_checkpoint(tmp_path) is None
    paths = [save_checkpoint(tmp_path, step, tiny(), {"step": step}, keep=9) for step in (1, 2, 3, 4)]
    (paths[3] / "COMPLETE").unlink()
    with (paths[2] / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    assert latest_checkpoint(tmp_path) == paths[1]
    assert "step-000003: model.safetensors is not what was saved" in caplog.text
    for pointer in (b"", b"../../etc\n", b"\xff\xfe", b"checkpoints/step-000001/../step-000001"):
        (tmp_path / "latest").write_bytes(pointer)
        assert latest_checkpoint(tmp_path) == paths[1]
    (tmp_path / "latest").unlink()
    assert latest_checkpoint(tmp_path) == paths[1]


def test_a_checkpoint_under_a_wrong_step_is_refused(tmp_path: Path, tiny: Make) -> None:
    path = save_checkpoint(tmp_path, 7, tiny(), {"step": 7})
    best = path.rename(path.with_name("best"))
    assert load_checkpoint(best)[1] == {"step": 7}
    wrong = best.rename(path.with_name("step-000009"))
    with pytest.raises(CheckpointError, match="of step 7"):
        load_checkpoint(wrong)


# -- the helpers themselves ---------------------------------------------------------------------------------------


def test_atomic_write_replaces_or_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic_write(tmp_path / "new/place/a.txt", "grün\n")
    target = tmp_path / "new/place/a.txt"
    assert target.read_bytes() == "grün\n".encode()
    atomic_write(target, b"\x00\r\n")
    assert target.read_bytes() == b"\x00\r\n"

    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, refuse)
            with pytest.raises(OSError, match="No space left"):
                atomic_write(target, "never")
        assert target.read_bytes() == b"\x00\r\n"
        assert os.listdir(target.parent) == ["a.txt"]


@posix
def test_atomic_write_goes_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    atomic_write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_atomic_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with atomic_folder(tmp_path / "f") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub/a").write_text("1")
        assert not (tmp_path / "f").exists()
    assert (tmp_path / "f/sub/a").read_text() == "1"
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "f"):
        pytest.fail("the block must not start")
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "f", replace=True):
        raise ZeroDivisionError
    for exchange in (files._exchange, lambda a, b: False):
        monkeypatch.setattr(files, "_exchange", exchange)
        with atomic_folder(tmp_path / "f", replace=True) as temporary:
            (temporary / "b").write_text("2")
        assert listing(tmp_path) == {"f/b": b"2"}
    assert os.listdir(tmp_path) == ["f"]


def test_leftovers_of_the_dead_go_and_of_the_living_stay(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mine, other = os.getpid(), os.getppid()
    names = {
        f".a.tmp-{dead.pid}-{files._HOST}-0": False,
        f".b.tmp-{mine}-{files._HOST}-999999": False,  # our pid, but not ours: from before a restart of the container
        f".c.tmp-{other}-{files._HOST}-0": True,
        f".d.tmp-{dead.pid}-another.host-0": True,
        ".e.tmp-notes": True,
        "f.tmp-1-x-0": True,
    }
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").touch()
    (tmp_path / f".g.old-{dead.pid}-{files._HOST}-0").mkdir()  # died between the two renames of a replacement
    clean_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([name for name, stays in names.items() if stays] + ["g"])


def test_sha256_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert files.sha256_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_failed_load_after_truncation_of_everything(run: Path) -> None:
    for path in (run / "final").iterdir():
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="SHA256SUMS"):
        load_model(run / "final")
