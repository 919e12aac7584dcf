"""Models and checkpoints on disk: folders that cannot run code, cannot be half-written and cannot rot unnoticed.

A model folder holds ``model.safetensors``, ``config.json``, ``tokenizer.json`` (when there is one), ``SHA256SUMS`` over
all of them, and ``COMPLETE`` with the hash of ``SHA256SUMS``; a checkpoint of a run adds ``trainer.safetensors`` and
``trainer.json``. A folder appears under its name only when it is whole. docs/checkpoints.md describes the format.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

import spiking_lm
from spiking_lm import registry
from spiking_lm.config import ModelConfig, StrictModel, parse_config
from spiking_lm.errors import CheckpointError, ConfigError, PluginError, UnknownNameError, UsageError
from spiking_lm.files import atomic_write, remove
from spiking_lm.interfaces import SpikingLanguageModel
from spiking_lm.sealed import COMPLETE, SUMS, find_problems, naming_folder, new_folder, verify_folder

log = logging.getLogger(__name__)

CONFIG_VERSION = 1
"""Version of ``config.json``; a folder with a newer one is refused."""

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
TRAINER_TENSORS, TRAINER_STATE = "trainer.safetensors", "trainer.json"
_OURS = {WEIGHTS, CONFIG, TOKENIZER, TRAINER_TENSORS, TRAINER_STATE, SUMS, COMPLETE}

_STEP = re.compile(r"step-(\d{6,})")


class SavesItself(Protocol):
    """A tokenizer, as far as saving goes."""

    def save(self, path: Path) -> object:
        """Write the one file ``path``."""


class ModelFile(StrictModel):
    """What ``config.json`` holds."""

    config_version: int = Field(ge=1)
    spiking_lm: str
    """Version of the host that wrote the folder."""
    model_type: str
    plugin: str
    plugin_version: str
    requires: dict[str, str] = Field(default={})
    """Distributions, with their versions, that registered the model and its neuron."""
    config: dict[str, Any]
    aliases: dict[str, str] = Field(default={})
    """Tied tensors: state-dict name -> the name under which the tensor is stored."""


# ---------------------------------------------------------------------------------------------------------- public


def save_model(
    model: SpikingLanguageModel, path: str | os.PathLike[str], *, tokenizer: SavesItself | Path | None = None
) -> Path:
    """Write ``model`` (and a tokenizer, or a copy of its file) as the folder ``path``, replacing a model that is there.

    Raises: UsageError when ``path`` holds other things, CheckpointError when the disk refuses; nothing changes then.
    """
    folder = Path(path)
    with new_folder(folder, ours=_OURS) as temporary:
        _write_model(temporary, model, tokenizer)
    return folder


def load_model(path: str | os.PathLike[str], *, verify: bool = True) -> SpikingLanguageModel:
    """Load a model for use (``eval()`` mode, on the CPU) from a model folder, a checkpoint, or the newest of a run.

    ``verify=False`` skips the hashes. Torch's random generator is left as it was.

    Raises: CheckpointError naming the bad file, PluginError when the plugin that offers the model is not installed.
    """
    folder = resolve_model(path)
    if verify:
        verify_folder(folder)
    return _read_model(folder).eval()


def filled_model(
    config: ModelConfig, tensors: Mapping[str, Tensor], aliases: Mapping[str, str] | None = None
) -> SpikingLanguageModel:
    """Build a model around tensors, given by the names of its state dict, without drawing weights first.

    ``aliases``: names that are the same tensor as another. Dtypes are those of ``tensors``.
    Raises: CheckpointError naming the tensors that are missing, too many or of another shape.
    """
    with torch.random.fork_rng(devices=[]), _NoRandomFills():
        model = spiking_lm.create_model(config.model_type, **config.model_dump(mode="json"))
    _fill(model, dict(tensors), dict(aliases or {}), f"a {config.model_type} model")
    return model.eval()


def save_checkpoint(
    run_dir: str | os.PathLike[str],
    step: int,
    model: SpikingLanguageModel,
    trainer_state: dict[str, Any],
    *,
    tokenizer: SavesItself | Path | None = None,
    keep: int = 2,
) -> Path:
    """Write ``<run_dir>/checkpoints/step-000123``, point ``<run_dir>/latest`` at it, then drop all but ``keep``.

    ``trainer_state`` is made of dicts (keys str or int), lists, tuples, tensors, int, float, str, bool and None.

    Raises: UsageError naming a value of another type; CheckpointError when the disk refuses (older checkpoints stay).
    """
    run_dir = Path(run_dir)
    folder = run_dir / "checkpoints" / f"step-{step:06d}"
    with new_folder(folder, ours=_OURS) as temporary:
        tensors: dict[str, Tensor] = {}
        state = {"version": 1, "step": step, "state": _pack(trainer_state, tensors, "")}
        save_file(_own_memory(tensors), temporary / TRAINER_TENSORS)
        (temporary / TRAINER_STATE).write_text(json.dumps(state, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        _write_model(temporary, model, tokenizer)
    with naming_folder(folder):
        atomic_write(run_dir / "latest", f"checkpoints/{folder.name}\n")
        others = [path for path in _complete(run_dir) if path.name != folder.name]
        for old in others[max(keep, 1) - 1 :]:
            remove(old)
    return folder


def latest_checkpoint(run_dir: str | os.PathLike[str]) -> Path | None:
    """Return the newest checkpoint of a run that is complete and verifies, or None; bad ones are logged."""
    for path in _complete(Path(run_dir)):
        if problems := find_problems(path):
            log.warning("passed over the checkpoint %s: %s", path, "; ".join(problems))
        else:
            return path
    return None


def load_checkpoint(
    path: str | os.PathLike[str], *, verify: bool = True
) -> tuple[SpikingLanguageModel, dict[str, Any]]:
    """Load a checkpoint (or a run's newest): the model in ``train()`` mode and the trainer state, tensors on the CPU.

    Raises: CheckpointError naming the bad file, PluginError when the plugin that offers the model is not installed.
    """
    folder = resolve_model(path)
    if verify:
        verify_folder(folder)
    if not _exists(folder, TRAINER_STATE):
        raise CheckpointError(
            f"{folder}: a model, not a checkpoint of a run: no {TRAINER_STATE}",
            hint="name a run or a folder like RUN/checkpoints/step-000100",
        )
    model = _read_model(folder)
    saved = _read_json(folder, TRAINER_STATE)
    named = _STEP.fullmatch(folder.name)
    try:
        if named and int(named[1]) != saved["step"]:
            raise CheckpointError(
                f"{folder}: the folder's name does not fit its content, which is of step {saved['step']}",
                hint="give the folder its own name back, or one that is no step number",
            )
        return model, _unpack(saved["state"], _read_tensors(folder, TRAINER_TENSORS))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / TRAINER_STATE}: malformed ({type(error).__name__}: {error})") from None


def resolve_model(path: str | os.PathLike[str]) -> Path:
    """Find the model folder that ``path`` means: itself, a run's newest checkpoint, or that of the newest run in it.

    Raises: CheckpointError saying what was found instead.
    """
    folder = Path(path)
    if folder.is_file():
        raise CheckpointError(
            f"{folder}: a file, not a model folder",
            hint=f"spiking-lm convert {folder} OUT makes a model folder of a reference checkpoint",
        )
    if not folder.is_dir():
        beside = [p.name for p in _subfolders(folder.parent)] if folder.parent.is_dir() else []
        raise CheckpointError(
            f"{folder}: no such folder", hint=f"beside it are: {', '.join(beside[:8])}" if beside else None
        )
    if _exists(folder, CONFIG) or _exists(folder, WEIGHTS):
        return folder
    for run in (folder, *reversed(_subfolders(folder))):  # run folders are named by their UTC time
        if checkpoints := _complete(run):
            return checkpoints[0]
    raise CheckpointError(
        f"{folder}: neither a model folder ({CONFIG}, {WEIGHTS}) nor a run with a finished checkpoint",
        hint="name a model folder, a run folder, or a run's checkpoints/step-NNNNNN",
    )


# --------------------------------------------------------------------------------------------------------- folders


def _complete(run_dir: Path) -> list[Path]:
    """List a run's finished checkpoints: the one that ``latest`` names, then by falling step."""
    found = [p for p in _subfolders(run_dir / "checkpoints") if _STEP.fullmatch(p.name) and _exists(p, COMPLETE)]
    found.sort(key=lambda path: int(path.name[5:]), reverse=True)
    with contextlib.suppress(OSError, UnicodeDecodeError):
        pointed = (run_dir / "latest").read_text(encoding="utf-8").strip()
        found.sort(key=lambda path: f"checkpoints/{path.name}" != pointed)
    return found


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")) if folder.is_dir() else []


def _exists(folder: Path, name: str) -> bool:
    return os.path.lexists(folder / name)


# ----------------------------------------------------------------------------------------------------------- model


def _write_model(folder: Path, model: SpikingLanguageModel, tokenizer: SavesItself | Path | None) -> None:
    tensors, aliases = _untie(model.state_dict(keep_vars=True))
    config = model.config.to_dict()
    model_type = config.pop("model_type")
    plugin = registry.get("models", model_type).plugin
    record = {
        "config_version": CONFIG_VERSION,
        "spiking_lm": spiking_lm.__version__,
        "model_type": model_type,
        "plugin": plugin.name,
        "plugin_version": plugin.version or "",
        "requires": _distributions(model_type, config),
        "config": config,
        "aliases": aliases,
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    if isinstance(tokenizer, Path):
        shutil.copyfile(tokenizer, folder / TOKENIZER)
    elif tokenizer is not None:
        tokenizer.save(folder / TOKENIZER)


def _untie(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split a state dict into tensors that share no memory, and the names that are the same tensor as another."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_name: dict[int, str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise UsageError(
                f"the model's state {name!r} is a {type(value).__name__}, not a tensor",
                hint="keep it in the model's config, or store it as a buffer",
            )
        if id(value) in first_name:
            aliases[name] = first_name[id(value)]
        else:
            first_name[id(value)] = name
            tensors[name] = value
    return _own_memory(tensors), aliases


def _own_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors contiguous on the CPU, views of one storage made separate, as safetensors wants them."""
    owned: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        owned[name] = tensor
    return owned


def _distributions(model_type: str, config: dict[str, Any]) -> dict[str, str]:
    """Name the installed distributions that offer the model and the neurons in its config, with versions."""
    entries = [registry.get("models", model_type)]
    neuron = config.get("neuron")
    if isinstance(neuron, dict) and isinstance(neuron.get("type"), str):
        entries.append(registry.get("neurons", neuron["type"]))
    return {e.plugin.distribution: e.plugin.version or "" for e in entries if e.plugin.distribution}


def _read_model(folder: Path) -> SpikingLanguageModel:
    where = folder / CONFIG
    raw = _read_json(folder, CONFIG)
    version = raw.get("config_version")
    if isinstance(version, int) and version > CONFIG_VERSION:
        raise CheckpointError(
            f"{where}: written in format {version} by spiking-lm {raw.get('spiking_lm', '?')}; "
            f"this is {spiking_lm.__version__}, which reads up to format {CONFIG_VERSION}",
            hint="pip install --upgrade spiking-lm",
        )
    record = parse_config(ModelFile, raw, where=str(where), error=CheckpointError)
    model = _build(record, where)
    _fill(model, _read_tensors(folder, WEIGHTS), record.aliases, folder / WEIGHTS)
    return model


def _build(record: ModelFile, where: Path) -> SpikingLanguageModel:
    """Make the model that the record describes, its weights left zero where they would be drawn at random."""
    # The core's own distribution is here by definition; for another one a missing name means: install it.
    wanted = sorted(name for name in record.requires if name != "spiking-lm")
    try:
        with torch.random.fork_rng(devices=[]), _NoRandomFills():
            return spiking_lm.create_model(record.model_type, **record.config)
    except UnknownNameError as error:
        raise PluginError(
            f"{where}: {error.message}; it was saved with plugin {record.plugin!r} {record.plugin_version}",
            hint=(f"pip install {' '.join(wanted)}" if wanted else "pip install --upgrade spiking-lm")
            + (f". {error.hint}" if error.hint else ""),
        ) from error
    except ConfigError as error:
        raise CheckpointError(
            f"{where}: {error.message} (saved with plugin {record.plugin!r} {record.plugin_version})", hint=error.hint
        ) from error


class _NoRandomFills(TorchFunctionMode):
    """Makes weight initialisation free, for weights that are about to be overwritten."""

    _FILLS = frozenset(
        [
            Tensor.normal_,
            Tensor.uniform_,
            torch.nn.init.normal_,
            torch.nn.init.uniform_,
            torch.nn.init.kaiming_uniform_,
        ]
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("generator") is None:  # with a generator of its own, a fill is part of the model's definition
            if func in self._FILLS:
                tensor = args[0] if args else kwargs["tensor"]
                tensor.data.zero_()
                return tensor
            if func is torch.linalg.qr:  # the costly part of an orthogonal initialisation
                rows, columns = args[0].shape[-2:]
                return args[0].new_zeros(rows, min(rows, columns)), args[0].new_zeros(min(rows, columns), columns)
        return func(*args, **kwargs)


def _fill(model: SpikingLanguageModel, saved: dict[str, Tensor], aliases: dict[str, str], where: Path | str) -> None:
    """Put the saved tensors, dtype included, into the model, and tie again what was tied."""
    stored = {name: saved[source] for name, source in aliases.items() if source in saved} | saved
    model.expect(stored)
    own = model.state_dict(keep_vars=True)
    problems = [f"no tensor {name!r}" for name in own.keys() - stored.keys()]
    problems += [
        f"{name!r} is to equal {source!r}, which is missing" for name, source in aliases.items() if source not in saved
    ]
    problems += [f"tensor {name!r} has no place in the model" for name in stored.keys() - own.keys()]
    problems += [
        f"tensor {name!r} is {tuple(stored[name].shape)}, the model's is {tuple(own[name].shape)}"
        for name in own.keys() & stored.keys()
        if own[name].shape != stored[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CheckpointError(f"{where}: " + "; ".join(sorted(problems)[:4]) + more)
    for name, tensor in own.items():
        tensor.data = tensor.data.to(stored[name].dtype)
    model.load_state_dict(stored)
    for name, source in aliases.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        table = module._parameters if leaf in module._parameters else module._buffers
        if table[leaf] is not (tied := model.state_dict(keep_vars=True)[source]):
            table[leaf] = tied


def _read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    try:
        return load_file(_plain(folder, name))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{folder / name}: not a readable safetensors file ({error})") from None


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads(_plain(folder, name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / name}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{folder / name}: expected a JSON object, found {type(value).__name__}")
    return value


def _plain(folder: Path, name: str) -> Path:
    path = folder / name
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{path}: " + ("a link, which is refused" if path.is_symlink() else "no such file"))
    return path


# --------------------------------------------------------------------------------------------------- trainer state


def _pack(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """Turn a nested structure into JSON, exactly, its tensors moved out into ``tensors``.

    What JSON lacks is an object with one key: ``$tensor``, ``$tuple``, ``$float`` (nan, inf), ``$dict`` (as pairs).
    """
    if isinstance(value, Tensor):
        name = f"{len(tensors)}:{path}"
        tensors[name] = value
        return {"$tensor": name}
    if isinstance(value, dict):
        pairs = [(key, _pack(item, tensors, f"{path}.{key}" if path else str(key))) for key, item in value.items()]
        if not all(type(key) in (str, int) for key, _ in pairs):
            raise UsageError(f"trainer state {path or '(top)'}: keys are str or int only")
        if all(type(key) is str and not key.startswith("$") for key, _ in pairs):
            return dict(pairs)
        return {"$dict": [list(pair) for pair in pairs]}
    if type(value) in (list, tuple):
        items = [_pack(item, tensors, f"{path}.{index}") for index, item in enumerate(value)]
        return items if type(value) is list else {"$tuple": items}
    if type(value) is float and (value != value or value in (float("inf"), float("-inf"))):
        return {"$float": repr(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise UsageError(
        f"trainer state {path or '(top)'}: cannot save a {type(value).__name__}",
        hint="use dict, list, tuple, tensor, int, float, str, bool or None",
    )


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if not tag.startswith("$"):
        return {key: _unpack(item, tensors) for key, item in value.items()}
    content = value[tag]
    if tag == "$tensor":
        return tensors[content]
    if tag == "$tuple":
        return tuple(_unpack(item, tensors) for item in content)
    if tag == "$float":
        return float(content)
    if tag == "$dict":
        return {key: _unpack(item, tensors) for key, item in content}
    raise ValueError(f"unknown tag {tag!r}")
