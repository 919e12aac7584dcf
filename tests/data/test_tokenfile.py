"""Token files and their cache: what is written is what is read, damage is found, memory stays small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spiking_lm import data
from spiking_lm.data import TextData, TextSource, corpora, create_tokenizer, open_tokens, tokenfile, write_tokens
from spiking_lm.errors import DataError


@pytest.mark.parametrize(
    ("config", "dtype"),
    [({"type": "byte"}, "uint8"), ({"type": "char"}, "uint8"), ({"type": "bpe", "vocab_size": 400}, "uint16"),
     ({"type": "char", "characters": "".join(map(chr, range(0x20000, 0x31000)))}, "uint32")],
)  # fmt: skip
def test_tokens_survive(tmp_path: Path, config: dict[str, Any], dtype: str) -> None:
    text = "Ein Satz, noch ein Satz;\n\U00020005 naïve\n" * 50
    source = TextSource.of(text)
    tokenizer = create_tokenizer(config, [text])
    calls: list[tuple[int, int]] = []
    info = write_tokens(tmp_path / "t.bin", source, tokenizer, progress=lambda *call: calls.append(call))
    split, again = open_tokens(tmp_path / "t.bin", verify=True)
    assert info == again
    assert isinstance(split.tokens, np.memmap)
    assert split.tokens.dtype == np.dtype(dtype)
    assert info.dtype == dtype
    assert split.tokens.tolist() == tokenizer.encode(text).tolist()
    assert (split.n_bytes, split.n_chars) == (len(text.encode()), len(text))
    assert calls[-1] == (source.n_bytes, source.n_bytes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.bin", "t.json"]
    assert (info.source_sha256, info.tokenizer_sha256) == (source.sha256, tokenizer.sha256)


def test_an_empty_text_gives_an_empty_file(tmp_path: Path) -> None:
    write_tokens(tmp_path / "t.bin", TextSource.of(""), create_tokenizer({"type": "byte"}))
    split, _ = open_tokens(tmp_path / "t.bin", verify=True)
    assert len(split) == 0


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    path, sidecar = tmp_path / "t.bin", tmp_path / "t.json"
    write_tokens(path, TextSource.of("some text"), create_tokenizer({"type": "byte"}))
    good_bin, good_json = path.read_bytes(), sidecar.read_text()
    path.write_bytes(good_bin[:-1])
    with pytest.raises(DataError, match="has 8 bytes, 9 tokens of uint8 need 9"):
        open_tokens(path)
    path.write_bytes(b"S" + good_bin[1:])
    open_tokens(path)  # the same size: only the hash tells
    with pytest.raises(DataError, match="has been altered"):
        open_tokens(path, verify=True)
    path.write_bytes(good_bin)
    for content, message in (
        ("{", "is not JSON"), ("[]", "does not describe"), ('{"tokens": 9}', "sha256"),
        (good_json.replace("tokens 1", "tokens 2"), "format"),
    ):  # fmt: skip
        sidecar.write_text(content)
        with pytest.raises(DataError, match=message):
            open_tokens(path)
    sidecar.unlink()
    with pytest.raises(DataError, match="incomplete token file"):
        open_tokens(path)


def test_a_failed_build_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    source = TextSource.of("0123456789")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tokens(tmp_path / "t.bin", source, create_tokenizer({"type": "byte"}), progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before " * 100)
    source = TextSource.of_file(path)
    path.write_text("after " * 200)
    with pytest.raises(DataError, match="changed while it was read"):
        write_tokens(tmp_path / "t.bin", source, create_tokenizer({"type": "byte"}))


# -- the cache ----------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(tokenfile, "IN_MEMORY", 100)
    (tmp_path / "book.txt").write_text("".join(f"Zeile {number}, naïve\n" for number in range(300)), encoding="utf-8")
    return {"type": "text", "path": str(tmp_path / "book.txt"), "tokenizer": {"type": "bpe", "vocab_size": 300}}


def load(config: dict[str, Any], cache: Path) -> tuple[TextData, int]:
    """Return the data and how many progress reports building it took: none when the cache had it."""
    calls: list[tuple[int, int]] = []
    loaded = data.load(config, cache_dir=cache, progress=lambda *call: calls.append(call))
    assert isinstance(loaded, TextData)
    if calls:
        assert calls[-1][0] == calls[-1][1] == sum(s.n_bytes for s in (loaded.train, loaded.valid, loaded.test))
        assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    return loaded, len(calls)


def test_the_cache_is_used_and_says_the_same(tmp_path: Path, corpus: dict[str, Any]) -> None:
    first, built = load(corpus, tmp_path / "cache")
    second, built_again = load(corpus, tmp_path / "cache")
    assert built >= 3
    assert built_again == 0
    assert first.describe() == second.describe()
    assert second.tokenizer.type == "bpe"
    text = Path(corpus["path"]).read_text(encoding="utf-8")
    for loaded in (first, second):
        assert isinstance(loaded.train.tokens, np.memmap)
        parts = [loaded.tokenizer.decode(split.tokens) for split in (loaded.train, loaded.valid, loaded.test)]
        assert "".join(parts) == text


def test_the_cache_gives_what_memory_gives(
    tmp_path: Path, corpus: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cached, _ = load(corpus, tmp_path / "cache")
    monkeypatch.setattr(tokenfile, "IN_MEMORY", 1 << 20)
    in_memory, built = load(corpus, tmp_path / "cache")
    assert built == 0
    assert not isinstance(in_memory.train.tokens, np.memmap)
    assert in_memory.describe() == cached.describe()
    assert in_memory.train.tokens.tolist() == cached.train.tokens.tolist()


def test_a_changed_text_is_tokenized_anew(tmp_path: Path, corpus: dict[str, Any]) -> None:
    before, _ = load(corpus, tmp_path / "cache")
    path = Path(corpus["path"])
    path.write_text(path.read_text(encoding="utf-8").replace("Zeile 7,", "Zeile X,"), encoding="utf-8")
    after, built = load(corpus, tmp_path / "cache")
    assert built >= 3
    assert before.sha256 != after.sha256
    assert "Zeile X," in after.tokenizer.decode(after.train.tokens)
    other, built = load({**corpus, "tokenizer": {"type": "byte"}}, tmp_path / "cache")
    assert built >= 3
    assert other.tokenizer.type == "byte"


@pytest.mark.parametrize("name", ["tokens/*/train.bin", "tokens/*/valid.json", "tokenizers/*.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "empty"])
def test_a_damaged_cache_is_built_again(tmp_path: Path, corpus: dict[str, Any], name: str, damage: str) -> None:
    cache = tmp_path / "cache"
    first, _ = load(corpus, cache)
    (path,) = cache.glob(name)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()  # a new file: cutting one short under a living memory map kills the process
    if damage != "remove":
        path.write_bytes({"flip": bytes(content), "cut": content[: len(content) // 2], "empty": b""}[damage])
    second, _ = load(corpus, cache)
    assert second.describe() == first.describe()
    assert second.train.tokens.tolist() == first.train.tokens.tolist()
    assert load(corpus, cache)[1] == 0


def test_a_cached_tokenizer_that_was_altered_is_learned_again(tmp_path: Path, corpus: dict[str, Any]) -> None:
    first, _ = load(corpus, tmp_path / "cache")
    (path,) = (tmp_path / "cache" / "tokenizers").glob("*.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    vocab["e"], vocab["i"] = vocab["i"], vocab["e"]  # valid JSON, a valid tokenizer, another one
    path.write_text(json.dumps(content), encoding="utf-8")
    second, built = load(corpus, tmp_path / "cache")
    assert built == 0
    assert second.describe() == first.describe()


def test_small_corpora_never_touch_the_disk(tmp_path: Path) -> None:
    _, built = load({"type": "austen3"}, tmp_path / "cache")
    assert built == 0
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, corpus: dict[str, Any]) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot write the token cache") as caught:
        load({**corpus, "tokenizer": {"type": "byte"}}, tmp_path / "file")
    assert "SPIKING_LM_CACHE" in (caught.value.hint or "")
    with pytest.raises(DataError, match="cannot write the token cache"):
        load(corpus, tmp_path / "file")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPIKING_LM_CACHE", str(tmp_path / "mine"))
    assert tokenfile.default_cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("SPIKING_LM_CACHE")
    for system, variable, below in (
        ("linux", "XDG_CACHE_HOME", Path()),
        ("win32", "LOCALAPPDATA", Path()),
        ("darwin", "HOME", Path("Library/Caches")),
    ):
        monkeypatch.setattr(tokenfile.sys, "platform", system)
        monkeypatch.setenv(variable, str(tmp_path))
        assert tokenfile.default_cache_dir() == tmp_path / below / "spiking-lm"


@given(blocks=st.lists(st.binary(max_size=5), max_size=20))
def test_utf8_is_checked_the_same_however_it_is_cut(blocks: list[bytes]) -> None:
    from spiking_lm.data.sources import decode_blocks

    whole = b"".join(blocks)
    try:
        expected = whole.decode()
    except UnicodeDecodeError as err:
        with pytest.raises(DataError, match=rf"byte 0x{whole[err.start]:02x} at offset {err.start} "):
            list(decode_blocks(blocks, "f"))
    else:
        assert "".join(decode_blocks(blocks, "f")) == expected


# -- memory -------------------------------------------------------------------------------------------------------

BUILD = """
import json, sys
from pathlib import Path
from spiking_lm import data

text, cache, tokenizer = sys.argv[1:]
data.create_tokenizer(json.loads(tokenizer)).encode("everything is imported and warm")
def peak():  # of this program; getrusage would count its parent, too
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0])
before = peak()
loaded = data.load({"type": "text", "path": text, "tokenizer": json.loads(tokenizer)}, cache_dir=Path(cache))
print(json.dumps({"kib": peak() - before, "tokens": len(loaded.train) + len(loaded.valid) + len(loaded.test)}))
"""


def peak_of_a_build(folder: Path, megabytes: int, tokenizer: dict[str, Any]) -> tuple[float, int]:
    """Tokenize a generated text in a process of its own; return its growth in MiB and the number of tokens."""
    path = folder / "big.txt"
    line = b"It is a truth universally acknowledged, that a single man in possession of a good fortune\n"
    block = line * 10_000
    with path.open("wb") as file:
        for _ in range(megabytes * 1_000_000 // len(block) + 1):
            file.write(block)
    command = [sys.executable, "-c", BUILD, str(path), str(folder / "cache"), json.dumps(tokenizer)]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result["kib"] / 1024, result["tokens"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(
    ("megabytes", "tokenizer", "limit"),
    [
        (100, {"type": "byte"}, 30),
        (100, {"type": "char", "characters": "".join(map(chr, range(128)))}, 60),
        (12, {"type": "file"}, 90),
        pytest.param(1000, {"type": "byte"}, 30, marks=pytest.mark.slow),
    ],
    ids=["byte", "char", "bpe", "byte-1GB"],
)
def test_a_large_file_is_tokenized_in_little_memory(
    tmp_path: Path, megabytes: int, tokenizer: dict[str, Any], limit: float
) -> None:
    if tokenizer["type"] == "file":
        austen = TextSource.of_file(corpora.EMBEDDED / "austen3.valid.txt.xz")
        create_tokenizer({"type": "bpe", "vocab_size": 2000}, austen.read()).save(tmp_path / "tokenizer.json")
        tokenizer = {**tokenizer, "path": str(tmp_path)}
    grown, tokens = peak_of_a_build(tmp_path, megabytes, tokenizer)
    assert tokens >= megabytes * 1_000_000 / 6
    assert grown < limit
