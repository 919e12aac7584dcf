"""Checkpoints of the papers' own code become model folders, and model folders become such checkpoints again.

This is the one module that reads pickles, and only through torch's restricted reader, which builds tensors and plain
containers and nothing else.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from spiking_lm import data, registry
from spiking_lm.checkpoints import TOKENIZER, WEIGHTS, load_model, resolve_model, save_model
from spiking_lm.errors import CheckpointError, DataError, SpikingLMError, UsageError
from spiking_lm.files import atomic_write, sha256_file
from spiking_lm.interfaces import SpikingLanguageModel
from spiking_lm.models import export_reference, import_reference
from spiking_lm.recipe import load_recipe
from spiking_lm.records import ConverterSpec
from spiking_lm.rundir import RunDir
from spiking_lm.runs import run_recipe
from spiking_lm.sealed import SUMS

log = logging.getLogger(__name__)

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Under which training scripts keep the weights beside other things."""


@dataclass(frozen=True)
class Conversion:
    """What was converted, and how it was checked."""

    source: Path
    source_sha256: str | None
    """None when the source is a folder of another tool."""
    out: Path
    sha256: str
    """Of the file that holds the tensors: ``out`` itself, or its ``model.safetensors``."""
    model_type: str
    parameters: int
    equal: int | None
    """Tensors read back from ``out`` that equal the source's bit for bit; None where the model has no export."""
    compared: int | None


def convert(
    source: Path,
    out: Path,
    *,
    to: str | None = None,
    tokenizer: Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> Conversion:
    """Convert ``source`` to ``out`` and read the result back to compare it.

    A foreign checkpoint becomes a model folder: ``to`` names the model or converter (None recognises it), ``options``
    set what the tensors do not tell, ``tokenizer`` (None: the source's own) is stored with the model. A model of ours
    becomes a ``.pth`` or ``.safetensors`` file in its paper's keys with ``to="reference"``, or the same model with
    another ``tokenizer``.

    Raises: UsageError, DataError (refused or unrecognised content), CheckpointError, PluginError.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} exists already", hint="choose another name, or remove it")
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    if source.is_dir() and ((source / SUMS).exists() or (source / "checkpoints").is_dir()):
        return _convert_own(resolve_model(source), out, to=to, tokenizer=tokenizer, options=options)
    if to == "reference":
        raise UsageError(f"{source}: --to reference converts a model folder or a run", hint="leave out --to")

    tensors: dict[str, Tensor] | None = None
    entry, reads_tensors = _recognise(source, to)
    if reads_tensors:
        tensors = read_tensors(source)
        entry = entry or _recognise_tensors(source, tensors)
    assert entry is not None
    call = entry.load("convert" if entry.spec.kind == "converters" else "importer")
    try:
        model: SpikingLanguageModel = call(source if tensors is None else tensors, **(options or {}))
    except SpikingLMError as error:
        if str(source) not in error.message:
            error.message = f"{source}: {error.message}"
        raise
    stored = None if tokenizer is None else _tokenizer(tokenizer, model)
    if stored is None and isinstance(entry.spec, ConverterSpec) and entry.spec.tokenizer and tensors is None:
        stored = entry.load("tokenizer")(source)
    save_model(model, out, tokenizer=stored)
    equal, compared = _count_equal(tensors, load_model(out))
    return _conversion(source, out, out / WEIGHTS, model, equal, compared)


def convert_by_recipe(
    source: Path, out: Path, recipe: str, settings: Sequence[str] = (), *, to: str | None = None, console: Console
) -> RunDir:
    """Run a recipe that converts ``source``, and leave the model as the folder ``out``; return the run.

    ``settings`` are overrides, ``path.to.field=value``. The run lies in ``./runs``; one of the very same recipe and
    source that was interrupted is gone on with.
    Raises: UsageError when ``out`` exists or the recipe converts nothing, and whatever a run raises.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} exists already", hint="choose another name, or remove it")
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    overrides = [*settings, f"convert.source={json.dumps(str(source.resolve()))}"]
    kind = (load_recipe(recipe).convert or {}).get("type")
    if kind is None or to not in (None, kind):
        what = "converts nothing" if kind is None else f"converts to {kind}, not to {to}"
        raise UsageError(f"the recipe {recipe} {what}", hint="'spiking-lm recipes ls' lists them")
    run = run_recipe(recipe, overrides, resume="auto", console=console)
    folder = resolve_model(run.path)
    model = load_model(folder)
    try:
        save_model(model, out, tokenizer=folder / TOKENIZER)
    except BaseException as error:
        with contextlib.suppress(OSError):
            run.update_manifest(status="interrupted")  # what is missing is the folder: the same command goes on here
        if isinstance(error, CheckpointError):
            error.hint = f"the model is kept in {folder}: make room and give the same command again"
        raise
    return run


def read_tensors(source: Path) -> dict[str, Tensor]:
    """Read the state dict in a safetensors file or a ``torch.save`` file, told apart by content; nothing is executed.

    Weights kept under a key such as ``"state_dict"``, or named ``module.*`` by distributed training, are unwrapped.

    Raises: DataError saying what the file is instead.
    """
    try:
        with source.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error.strerror}") from None
    if len(head) == 9 and head[8:] == b"{":
        try:
            return _unprefixed(load_file(source))
        except SafetensorError as error:
            raise DataError(f"{source}: a damaged safetensors file ({error})") from None
    content = _read_pickle(source)
    for key in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict):
        raise DataError(f"{source}: holds a {type(content).__name__}, not a dictionary of tensors")
    foreign = {key: value for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))}
    if foreign or not content:
        told = ", ".join(f"{key!r} is a {type(value).__name__}" for key, value in list(foreign.items())[:3])
        raise DataError(f"{source}: not a dictionary of tensors: {told or 'it is empty'}")
    return _unprefixed(content)


def _read_pickle(source: Path) -> Any:
    """Read a ``torch.save`` file with the restricted reader."""
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            if any(item.compress_type != zipfile.ZIP_STORED for item in archive.infolist()):
                # torch.save never compresses; a few kilobytes could unpack to any size.
                raise DataError(f"{source}: refused: a compressed archive, which torch.save does not write")
    try:
        with warnings.catch_warnings(), source.open("rb") as file:  # by name, torch would go by the suffix
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named:
            raise DataError(
                f"{source}: refused: it holds the Python object {named[1]}, and reading that could run code",
                hint="ask for a safetensors file, or for the plain state dict: torch.save(model.state_dict(), FILE)",
            ) from None
        raise DataError(f"{source}: refused: not a plain state dict of torch.save") from None
    except Exception as error:  # torch raises nearly anything for a file that it cannot read
        raise DataError(f"{source}: not a whole safetensors or torch.save file ({type(error).__name__})") from None


def _unprefixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    wrapped = bool(tensors) and all(name.startswith("module.") for name in tensors)
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()} if wrapped else tensors


def _recognise(source: Path, to: str | None) -> tuple[registry.Registered | None, bool]:
    """Find who converts ``source`` judging by its path or by ``to``, and whether they want it as tensors."""
    converters = registry.all("converters")
    if to is not None and to not in converters:
        return registry.get("models", to), True
    takers = [e for name, e in converters.items() if to in (None, name) and _sniffs(e, source)]
    if len(takers) == 1:
        return takers[0], False
    if takers:
        names = [entry.spec.name for entry in takers]
        raise UsageError(f"{source}: {' and '.join(names)} can convert it", hint=f"choose one: --to {names[0]}")
    if source.is_dir():
        known = ", ".join(converters) or "none is registered"
        kind = _model_type(source)
        if to is None:
            raise DataError(f"{source}: no converter recognises this folder{kind}", hint=f"converters: {known}")
        others = [name for name, entry in converters.items() if _sniffs(entry, source)]
        raise DataError(
            f"{source}: {to!r} does not convert this folder{kind}",
            hint=f"--to {others[0]} does" if others else f"converters: {known}",
        )
    return (None if to is None else converters[to]), True


def _model_type(folder: Path) -> str:
    """Return what a folder says about its model, for a message."""
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f", whose config.json says model_type {kind!r}"


def _recognise_tensors(source: Path, tensors: dict[str, Tensor]) -> registry.Registered:
    """Find who converts this state dict: a converter that says so, else the one model whose importer takes it."""
    takers = [entry for entry in registry.all("converters").values() if _sniffs(entry, tensors)]
    if not takers:
        importers = [entry for entry in registry.all("models").values() if entry.spec.importer]
        takers = [entry for entry in importers if _imports(entry, tensors)]
    if len(takers) == 1:
        return takers[0]
    names = [entry.spec.name for entry in takers] or [
        name for name, entry in registry.all("models").items() if entry.spec.importer
    ]
    what = (
        "more than one model fits it" if takers else f"no model knows its keys ({', '.join(sorted(tensors)[:4])}, ...)"
    )
    raise DataError(f"{source}: {what}", hint=f"name the model: {' or '.join(f'--to {name}' for name in names)}")


def _sniffs(entry: registry.Registered, source: Path | dict[str, Tensor]) -> bool:
    if entry.missing():
        return False
    try:
        return bool(entry.load("sniff")(source))
    except Exception as error:  # another plugin's fault must not stop this conversion
        log.warning("converter %r failed to look at the source: %s", entry.spec.name, error)
        return False


def _imports(entry: registry.Registered, tensors: dict[str, Tensor]) -> bool:
    try:
        import_reference(entry.spec.name, tensors)
    except SpikingLMError:
        return False
    return True


def _convert_own(
    folder: Path, out: Path, *, to: str | None, tokenizer: Path | None, options: Mapping[str, Any] | None
) -> Conversion:
    if options:
        raise UsageError("--set sets what a foreign checkpoint does not tell; a model folder tells everything")
    model = load_model(folder)
    if to is None and tokenizer is not None:
        save_model(model, out, tokenizer=_tokenizer(tokenizer, model))
        equal, compared = _same(model.state_dict(), load_model(out).state_dict())
        return _conversion(folder / WEIGHTS, out, out / WEIGHTS, model, equal, compared)
    if to != "reference":
        raise UsageError(
            f"{folder} is a spiking-lm model already",
            hint="--to reference writes it in its paper's keys; --tokenizer FILE stores a tokenizer with it",
        )
    tensors = {name: tensor.contiguous() for name, tensor in export_reference(model).items()}
    if out.suffix == ".safetensors":
        atomic_write(out, save({name: tensor.clone() for name, tensor in tensors.items()}))
    elif out.suffix in (".pth", ".pt"):
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        atomic_write(out, buffer.getvalue())
    else:
        raise UsageError(f"{out}: what format?", hint="end the name in .pth or .safetensors")
    equal, compared = _same(tensors, read_tensors(out))
    return _conversion(folder / WEIGHTS, out, out, model, equal, compared)


def _tokenizer(path: Path, model: SpikingLanguageModel) -> data.Tokenizer:
    """Read a tokenizer file, or a SpikeGPT character vocabulary, and see that the model knows all its tokens."""
    where = path / TOKENIZER if path.is_dir() else path
    tokenizer = (
        data.create_tokenizer({"type": "char", "vocab": str(where)})
        if _is_character_vocabulary(where)
        else data.load_tokenizer(where)
    )
    known = getattr(model.config, "vocab_size", None)
    if known is not None and tokenizer.vocab_size > known:
        raise UsageError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {known}",
            hint="name the tokenizer that the model was trained with",
        )
    return tokenizer


def _is_character_vocabulary(path: Path) -> bool:
    try:
        content = path.read_bytes()
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8")
        return isinstance(json.loads(text).get("0"), str)
    except (OSError, ValueError, AttributeError):
        return False


def _count_equal(tensors: dict[str, Tensor] | None, model: SpikingLanguageModel) -> tuple[int | None, int | None]:
    if tensors is None:
        return None, None
    try:
        return _same(export_reference(model), tensors)
    except UsageError:  # the model has no format of a paper to compare in
        return None, None


def _same(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> tuple[int, int]:
    equal = sum(
        name in found and found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in expected.items()
    )
    return equal, len(expected)


def _conversion(
    source: Path, out: Path, weights: Path, model: SpikingLanguageModel, equal: int | None, compared: int | None
) -> Conversion:
    return Conversion(
        source=source,
        source_sha256=sha256_file(source) if source.is_file() else None,
        out=out,
        sha256=sha256_file(weights),
        model_type=model.config.model_type,
        parameters=model.num_parameters(),
        equal=equal,
        compared=compared,
    )
