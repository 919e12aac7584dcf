"""Recipes: the schema of one run, as data, and how a recipe is overridden and checked.

Nothing here imports torch, and nothing that a recipe says is ever imported, evaluated or expanded: every ``type`` is a
name that an installed plugin registered.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin

from pydantic import BaseModel, Field, TypeAdapter, ValidationError, field_validator

from spiking_lm import registry, safeyaml
from spiking_lm.config import StrictModel, parse_config
from spiking_lm.errors import PluginError, RecipeError, SpikingLMError, UnknownNameError, did_you_mean
from spiking_lm.recipe_files import choice_of, find_recipe, read_recipe
from spiking_lm.stages import (
    SAFE_PART,
    STAGES,
    CompareConfig,
    EvaluateConfig,
    ExplainConfig,
    GenerateConfig,
    PruneConfig,
    ReportConfig,
    TrainConfig,
)

_SAFE_NAME = re.compile(rf"{SAFE_PART.pattern}(/{SAFE_PART.pattern})*")

_SLOTS = {
    ("data",): "datasets",
    ("data", "tokenizer"): "tokenizers",
    ("model",): "models",
    ("model", "neuron"): "neurons",
    ("convert",): "converters",
    ("deploy",): "backends",
}
"""Where a recipe names something registered: ``type`` chooses it, and its configuration class checks the other keys."""


_FROM_DATA: dict[str, Any] = {"vocab_size": 2, "num_classes": 2, "frame_shape": (2, 2, 2)}
"""Fields of a model that the data decides when the recipe leaves them out, and what stands in for them till then."""

SOURCE_TOKENIZER = {"type": "source"}
"""The tokenizer of a recipe that converts a model: the one that lies beside the model's weights."""

_TEXT_STAGES = ("convert", "prune", "generate", "explain", "deploy")
"""Stages that work on tokens, so that clips cannot have them."""

_OF_THIS_RUN = ("prune", "generate", "deploy", "report")
"""Stages that a variant has only when one of its own values is there."""


class Recipe(StrictModel):
    """One run: the stages that are present run in this order."""

    schema_version: Literal[1] = Field(alias="schema")
    name: str
    description: str = ""
    requires: list[str] = Field(default=[])
    """Plugins that must be active."""
    seed: int = Field(default=0, ge=0)
    data: dict[str, Any]
    """``type`` names a dataset; the rest is its configuration, with ``tokenizer: {type: ...}`` beside it."""
    model: dict[str, Any] = Field(default={})
    """``type`` names a model; the rest is its configuration. ``vocab_size`` comes from the tokenizer."""
    convert: dict[str, Any] | None = None
    """In place of ``model`` and ``train``: ``type`` names a converter, ``source`` what it reads; the rest are options.
    The tokenizer of the source is that of the data."""
    train: TrainConfig | None = None
    prune: PruneConfig | None = None
    evaluate: EvaluateConfig | None = None
    generate: GenerateConfig | None = None
    explain: ExplainConfig | None = None
    deploy: dict[str, Any] | None = None
    """``backend`` names a hardware backend; the rest are its options."""
    compare: CompareConfig | None = None
    report: ReportConfig | None = None

    @field_validator("name")
    @classmethod
    def _safe_name(cls, name: str) -> str:
        if not _SAFE_NAME.fullmatch(name) or len(name) > 100 or name.endswith(".yaml"):
            raise ValueError("a name becomes a folder: use letters, digits and . _ - in parts joined by /")
        return name

    def to_yaml(self) -> str:
        """Return the recipe as YAML that :func:`load_recipe` reads back to an equal one."""
        document = self.model_dump(mode="json", by_alias=True)
        return safeyaml.dump({key: value for key, value in document.items() if key not in STAGES or value is not None})


Overrides = Mapping[str, Any] | Iterable[str]
"""``{"train.steps": 10}`` or ``["train.steps=10"]``."""


def load_recipe(path_or_name: str | Path, overrides: Overrides = ()) -> Recipe:
    """Load a recipe file (a path, or text ending in .yaml) or a registered recipe, apply overrides, and check it all.

    The configurations of model, neuron, dataset and tokenizer are checked too, and their defaults filled in.
    Raises: RecipeError naming file and field; UnknownNameError for a name that no plugin registered; PluginError when a
    plugin that the recipe requires is not active; MissingExtraError.
    """
    path = find_recipe(path_or_name)
    return resolve(read_recipe(path), overrides, where=f"recipe {path_or_name}")


def resolve(document: dict[str, Any], overrides: Overrides = (), *, where: str = "recipe") -> Recipe:
    """Check a recipe given as plain data, with overrides; see :func:`load_recipe`."""
    document = copy.deepcopy(document)
    for path, value in _in_order(overrides):
        _override(document, path, value)
    _check_required_plugins(document.get("requires"), where)
    recipe = parse_config(Recipe, document, where=where, error=RecipeError)
    if recipe.prune is not None and recipe.train is None:
        raise RecipeError(f"{where}: prune goes on with training, and there is none", hint="add the stage train")
    for metric in (recipe.evaluate.metrics if recipe.evaluate else None) or ():
        registry.get("metrics", metric)
    if recipe.convert is None:
        checked = {"data": _check_data(recipe.data, where), "model": _check_model(recipe.model, where)}
    else:
        checked = _check_conversion(recipe, where)
        recipe = recipe.model_copy(update=checked)
    if recipe.deploy is not None:
        checked["deploy"] = _check_slot(("deploy",), recipe.deploy, where)
    _check_task(recipe, where)
    _check_learning(recipe, where)
    recipe = recipe.model_copy(update=checked)
    if recipe.compare is None:
        return recipe
    # They are made from what was written: a default of one type, filled in above, is no choice of another's value.
    found = _variants(document, recipe.compare.variants, where)
    spelled_out = {name: _spell_out(recipe, found[name], given) for name, given in recipe.compare.variants.items()}
    return recipe.model_copy(update={"compare": recipe.compare.model_copy(update={"variants": spelled_out})})


def variants(recipe: Recipe) -> dict[str, Recipe]:
    """Return the recipes that the compare stage runs, by name: this one with each variant's values in it.

    A variant trains, evaluates and explains; it compares nothing in its turn, and has the other stages of this recipe
    only where one of its values changes them.
    """
    given = recipe.compare.variants if recipe.compare else {}
    return _variants(recipe.model_dump(mode="json", by_alias=True), given, "recipe")


def _variants(document: dict[str, Any], given: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, Recipe]:
    """Resolve variants of a document. Raises: RecipeError, UnknownNameError or MissingExtraError naming the variant."""
    found: dict[str, Recipe] = {}
    for name, values in given.items():
        here = f"{where}: compare.variants.{name}"
        touched = {path[0] for path, _ in _flatten((), values)}
        if "compare" in touched:
            raise RecipeError(f"{here}: a variant compares nothing in its turn")
        left_out = {"compare", *_OF_THIS_RUN} - touched
        base = {key: value for key, value in document.items() if key not in left_out}
        try:
            found[name] = resolve({**base, "name": f"{document['name']}/{name}"}, values, where=here)
        except SpikingLMError as error:
            if not error.message.startswith(here):
                error.message = f"{here}: {error.message.removeprefix('--set ')}"
                error.args = (error.message,)
            raise
    return found


def _spell_out(recipe: Recipe, variant: Recipe, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a variant's values; where it chooses another type, with all fields of that type."""
    ours, theirs = (one.model_dump(mode="json", by_alias=True) for one in (recipe, variant))
    switched = [slot for slot in _SLOTS if _at(theirs, at := (*slot, choice_of(slot))) not in (None, _at(ours, at))]
    if not switched:
        return dict(given)
    outer = [slot for slot in switched if slot[:-1] not in switched]
    kept = {path: value for path, value in _flatten((), given) if not any(path[: len(at)] == at for at in outer)}
    return {".".join(path): value for path, value in [*((at, _at(theirs, at)) for at in outer), *kept.items()]}


@dataclasses.dataclass(frozen=True)
class RecipeInfo:
    """An installed recipe, as ``spiking-lm recipes ls`` shows it."""

    name: str
    path: Path
    plugin: str
    description: str = ""
    model: str = ""
    data: str = ""
    stages: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    """Optional dependencies that are missing here and that it needs."""
    error: str | None = None
    """Why it cannot be loaded."""


def recipes() -> list[RecipeInfo]:
    """List the installed recipes, spiking-lm's own and those of plugins, sorted by name."""
    return [_describe(name, entry) for name, entry in registry.all("recipes").items()]


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes, with what is installed now, for editors that check YAML."""
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    for path, kind in _SLOTS.items():
        slots_below = {below[-1]: other for below, other in _SLOTS.items() if below[:-1] == path}
        options = []
        for name, entry in registry.all(kind).items():
            if entry.missing() or not _has_options(entry):
                continue
            option = entry.load("config").model_json_schema()
            definitions.update(option.pop("$defs", {}))
            properties = {choice_of(path): {"const": name}, **option.get("properties", {})}
            for field, other in slots_below.items():
                if field in properties or (path == ("data",) and not _holds_clips(name)):
                    properties[field] = {"$ref": f"#/$defs/{other}"}
            required = [field for field in option.get("required", ()) if field not in _FROM_DATA]
            options.append({**option, "properties": properties, "required": [choice_of(path), *required]})
        definitions[kind] = {"oneOf": options}
    for path, kind in _SLOTS.items():
        if len(path) == 1 and definitions[kind]["oneOf"]:
            schema["properties"][path[0]] = {"$ref": f"#/$defs/{kind}"}
    schema["properties"]["extends"] = {"type": "string", "description": "The recipe that this one changes."}
    schema["required"] = ["name"]  # the rest may come from the recipe that is extended
    return schema


def split_choice(config: Mapping[str, Any], key: str = "type") -> tuple[str, dict[str, Any]]:
    """Split ``{"type": "x", ...}`` into the name and the other keys; a deployment's ``key`` is ``"backend"``."""
    return config[key], {name: value for name, value in config.items() if name != key}


# -- what is installed ------------------------------------------------------------------------------------------------


def _describe(name: str, entry: registry.Registered) -> RecipeInfo:
    info = RecipeInfo(name, entry.spec.path, entry.plugin.name)
    try:
        document = read_recipe(entry.spec.path)
    except SpikingLMError as error:
        return dataclasses.replace(info, error=error.message)
    extras: dict[str, None] = {}
    variants = _at(document, ("compare", "variants"))
    changes = [dict(_flatten((), values)) for values in (variants.values() if isinstance(variants, dict) else ())]
    for path, kind in _SLOTS.items():
        choice = (*path, choice_of(path))
        for type_name in (_at(document, choice), *(values.get(choice) for values in changes)):
            used = registry.all(kind).get(str(type_name))
            if used is not None and used.missing() and used.spec.extra:
                extras[used.spec.extra] = None
    return dataclasses.replace(
        info,
        description=str(document.get("description", "")),
        model=str(_at(document, ("model", "type")) or _at(document, ("convert", "type")) or ""),
        data=str(_at(document, ("data", "type")) or ""),
        stages=tuple(stage for stage in STAGES if document.get(stage) is not None),
        extras=tuple(extras),
    )


def _at(document: Any, path: Iterable[str]) -> Any:
    for key in path:
        document = document.get(key) if isinstance(document, dict) else None
    return document


# -- checking ---------------------------------------------------------------------------------------------------------


def _check_required_plugins(names: Any, where: str) -> None:
    """Say that a plugin is missing before saying that its names are unknown."""
    found = {record.name: record for record in registry.plugins()}
    for name in names if isinstance(names, list) else ():
        record = found.get(str(name))
        if record is None:
            hint = did_you_mean(str(name), found) or f"install the distribution that offers it, e.g. spiking-lm-{name}"
            raise PluginError(f"{where}: needs the plugin {name!r}, which is not installed", hint=hint)
        if record.status != "active":
            raise PluginError(
                f"{where}: needs the plugin {name!r}, which is {record.status}: {record.error}", hint=record.hint
            )


def _check_task(recipe: Recipe, where: str) -> None:
    """Refuse a model that cannot read the data, what cannot be learned from it, and clips where text is needed."""
    data, model = recipe.data["type"], recipe.model["type"]
    clips = _holds_clips(data)
    if clips != ("clips" in registry.get("models", model).spec.capabilities):
        has, reads = ("clips of events", "tokens") if clips else ("text", "clips of events")
        raise RecipeError(f"{where}: the model {model!r} reads {reads}, but the dataset {data!r} holds {has}")
    can = registry.get("models", model).spec.capabilities
    if _task_of(data) == "pairs" and "seq2seq" not in can:
        raise RecipeError(
            f"{where}: the model {model!r} writes nothing from a source, and the dataset {data!r} holds pairs",
            hint="spikelm-seq2seq does",
        )
    if _task_of(data) != "pairs" and can == {"seq2seq"}:
        raise RecipeError(f"{where}: the model {model!r} learns from pairs, and the dataset {data!r} holds none")
    stages = [stage for stage in _TEXT_STAGES if clips and getattr(recipe, stage) is not None]
    if clips and recipe.compare is not None and recipe.compare.spikes:
        stages.append("compare.spikes")
    if stages:
        raise RecipeError(
            f"{where}: {', '.join(stages)}: works on tokens, and the dataset {data!r} holds clips of events",
            hint="clips can be trained on, evaluated, compared and reported",
        )


def _check_learning(recipe: Recipe, where: str) -> None:
    """Refuse a training that the data or the model cannot have, as far as their names alone tell."""
    train, data, model = recipe.train, recipe.data["type"], recipe.model.get("type", "")
    if train is None:
        return
    text = registry.get("datasets", data).spec.task == "text"
    wrong = {
        "objective: {type: masked}": train.objective.type == "masked" and not text,
        "label_smoothing": train.label_smoothing > 0 and text,
        "distill": train.distill is not None and _task_of(data) in ("clips", "pairs"),
    }
    for field in (field for field, present in wrong.items() if present):
        has = "running text" if text else "pairs" if _task_of(data) == "pairs" else "labelled examples"
        raise RecipeError(f"{where}: train.{field}: the dataset {data!r} holds {has}", hint="leave it out")
    can = registry.get("models", model).spec.capabilities
    if train.distill is not None and "encode" not in can:
        raise RecipeError(f"{where}: train.distill: the model {model!r} encodes no texts, so it cannot be a student")
    if text and train.distill is None:
        needed = "mlm" if train.objective.type == "masked" else "lm"
        if needed not in can:
            raise RecipeError(
                f"{where}: train.objective: the model {model!r} cannot learn {train.objective.type}",
                hint="encoders learn masked tokens" if needed == "lm" and "mlm" in can else None,
            )


def _holds_clips(dataset: Any) -> bool:
    """Say whether a dataset holds clips of events, which have no tokenizer."""
    return _task_of(dataset) == "clips"


def _task_of(dataset: Any) -> str | None:
    """Return what a dataset holds; None for one that is not registered."""
    entry = registry.all("datasets").get(str(dataset))
    return None if entry is None else cast(str, entry.spec.task)


def _check_data(data: dict[str, Any], where: str) -> dict[str, Any]:
    if _holds_clips(data.get("type")):
        if "tokenizer" in data:
            raise RecipeError(f"{where}: data: clips of events have no tokenizer", hint="leave it out")
        return _check_slot(("data",), data, where)
    values = {"tokenizer": {"type": "byte"}, **data}
    tokenizer = values.pop("tokenizer")
    return {**_check_slot(("data",), values, where), "tokenizer": _check_slot(("data", "tokenizer"), tokenizer, where)}


def _check_model(model: dict[str, Any], where: str) -> dict[str, Any]:
    checked = _check_slot(("model",), model, where)
    if isinstance(checked.get("neuron"), dict):
        checked["neuron"] = _check_slot(("model", "neuron"), checked["neuron"], where)
    return checked


def _check_conversion(recipe: Recipe, where: str) -> dict[str, Any]:
    """Return what a recipe says that converts a model: the converter's options, and what follows from them."""
    if recipe.train is not None:
        raise RecipeError(f"{where}: convert and train both make a model", hint="leave one of them out")
    convert = _check_slot(("convert",), recipe.convert, where)
    model = {"type": convert["type"]}
    if recipe.model not in ({}, model):
        raise RecipeError(f"{where}: model: it follows from convert", hint="leave it out; options stand in convert")
    if recipe.data.get("tokenizer", SOURCE_TOKENIZER) != SOURCE_TOKENIZER:
        raise RecipeError(f"{where}: data.tokenizer: a converted model brings its own", hint="leave it out")
    data = _check_data({**recipe.data, "tokenizer": {"type": "byte"}}, where)
    return {"convert": convert, "model": model, "data": {**data, "tokenizer": SOURCE_TOKENIZER}}


def _check_slot(path: tuple[str, ...], values: Any, where: str) -> dict[str, Any]:
    """Return ``values`` completed with the defaults of the configuration class that its ``type`` names."""
    where, choice = f"{where}: {'.'.join(path)}", choice_of(path)
    if not isinstance(values, dict):
        raise RecipeError(f"{where}: expected a mapping with a {choice!r}, got {values!r}")
    if not isinstance(values.get(choice), str):
        known = ", ".join(name for name, entry in registry.all(_SLOTS[path]).items() if _has_options(entry))
        raise RecipeError(f"{where}: the field {choice!r} is missing", hint=f"choose one of: {known}")
    name, rest = split_choice(values, choice)
    cls = _config_class(_SLOTS[path], name, where)
    unknown = {field for field in _FROM_DATA if rest.get(field) is None}
    standing_in = {field: _FROM_DATA[field] for field in unknown & cls.model_fields.keys()}
    config = parse_config(cls, {**rest, **standing_in}, where=where, error=RecipeError)
    return {choice: name, **config.model_dump(mode="json", exclude=set(standing_in))}


def _config_class(kind: str, name: str, where: str) -> type[StrictModel]:
    try:
        entry = registry.get(kind, name)
    except UnknownNameError as error:
        error.message = f"{where}.type: {error.message}"
        if "." in name or ":" in name:
            error.hint = f"{error.hint}. A type is a registered name; dotted paths are never imported"
        error.args = (error.message,)
        raise
    if not _has_options(entry):
        raise RecipeError(
            f"{where}: the converter {name!r} reads whole models, and has no stage in a recipe",
            hint="use it as spiking-lm convert SOURCE OUT",
        )
    cls: type[StrictModel] = entry.load("config")
    return cls


def _has_options(entry: registry.Registered) -> bool:
    """Say whether a registered thing can stand in a recipe: a converter of single files cannot."""
    return entry.spec.config is not None


# -- overriding -------------------------------------------------------------------------------------------------------


def _in_order(overrides: Overrides) -> list[tuple[tuple[str, ...], Any]]:
    """Return (path, value) pairs, choices of a ``type`` first: they decide which other paths exist."""
    pairs: list[tuple[tuple[str, ...], Any]] = []
    if isinstance(overrides, Mapping):
        pairs = list(_flatten((), overrides))
    else:
        for text in [overrides] if isinstance(overrides, str) else overrides:
            key, equals, value = text.partition("=")
            if not equals or not all(key.strip().split(".")):
                raise RecipeError(f"--set {text!r}: cannot be understood", hint="write --set path.to.field=value")
            pairs.append((tuple(key.strip().split(".")), _Written(value)))
    return sorted(pairs, key=lambda pair: len(pair[0]) if pair[0][-1] == choice_of(pair[0][:-1]) else 1000)


def _flatten(prefix: tuple[str, ...], values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in values.items():
        path = (*prefix, *str(key).split("."))
        if isinstance(value, Mapping) and value:
            yield from _flatten(path, value)
        else:
            yield path, value


class _Written(str):
    """A value as it was typed, still to be read by the type of its field."""


def _typed(annotation: Any, text: str, dotted: str) -> Any:
    """Read typed text as YAML where that suits the field, else as it is: a prompt may be ``no`` or ``12``."""
    try:
        value = safeyaml.parse(text, where=f"--set {dotted}")
    except RecipeError:
        value = text
    problem = ""
    for candidate in (value, text):
        try:
            TypeAdapter(annotation).validate_python(candidate)
        except ValidationError as error:  # noqa: PERF203
            problem = problem or error.errors()[0]["msg"]
        else:
            return candidate
    raise RecipeError(f"--set {dotted}={text}: {problem[:1].lower()}{problem[1:]}")


def _override(document: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    dotted = ".".join(path)
    annotation = _annotation(document, path)
    if isinstance(value, _Written):
        value = _typed(annotation, str(value), dotted)
    here = document
    for depth, key in enumerate(path[:-1], 1):
        if not isinstance(here.get(key), dict):
            here[key] = _default(document, path[:depth])
        here = here[key]
    if path[:-1] in _SLOTS and path[-1] == choice_of(path[:-1]) and here.get(path[-1]) != value:
        # A new type keeps only what it knows too; `--set model.neuron.type=x` need not spell out what to drop.
        known = _fields(path[:-1], str(value), f"--set {'.'.join(path[:-1])}")
        for key in [key for key in here if key not in known]:
            del here[key]
    here[path[-1]] = value


def _annotation(document: dict[str, Any], path: tuple[str, ...]) -> Any:
    """Return the type of the field at ``path`` (Any where the schema leaves it open); if none, name near ones."""
    annotation: Any = Recipe
    for depth, key in enumerate(path):
        fields = _fields_below(document, path[:depth], annotation)
        if fields is None:
            return Any
        if key not in fields:
            raise RecipeError(
                f"--set {'.'.join(path)}: unknown field {key!r}", hint=_near(document, path, depth, fields)
            )
        annotation = fields[key]
    return annotation


def _fields_below(document: dict[str, Any], path: tuple[str, ...], annotation: Any) -> dict[str, Any] | None:
    if path in _SLOTS:
        choice = choice_of(path)
        chosen = _at(document, (*path, choice)) or _at(_default(document, path), (choice,))
        if not isinstance(chosen, str):
            field = ".".join((*path, choice))
            raise RecipeError(f"{field} is not set", hint=f"--set {field}=... first")
        return _fields(path, chosen, ".".join(path))
    nested = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)]
    if nested:
        return {field.alias or name: field.annotation for name, field in nested[0].model_fields.items()}
    if any(a is Any or dict in (a, get_origin(a)) for a in (annotation, *get_args(annotation))):
        return None
    return {}


def _fields(path: tuple[str, ...], chosen: str, where: str) -> dict[str, Any]:
    """Return the fields of a slot when its type is ``chosen``: its configuration's, and the recipe's own."""
    cls = _config_class(_SLOTS[path], chosen, where)
    fields = {name: field.annotation for name, field in cls.model_fields.items()}
    with_tokenizer = path == ("data",) and not _holds_clips(chosen)
    return {**fields, choice_of(path): str, **({"tokenizer": dict} if with_tokenizer else {})}


def _default(document: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """Return what a mapping that the recipe leaves out stands for, so that one field of it can be set."""
    if path == ("data", "tokenizer"):
        return {"type": "byte"}
    if path == ("model", "neuron"):
        model = _at(document, ("model", "type"))
        if isinstance(model, str):
            field = _config_class("models", model, "model").model_fields.get("neuron")
            value = field.get_default(call_default_factory=True) if field is not None else None
            return copy.deepcopy(value) if isinstance(value, dict) else {}
    return {}


def _near(document: dict[str, Any], path: tuple[str, ...], depth: int, fields: Iterable[str]) -> str | None:
    """Offer the same field elsewhere (``train.lr`` is ``train.optimizer.lr``), else a field of similar name."""
    elsewhere = [known for known in _paths(document, (), Recipe) if known[-len(path[depth:]) :] == path[depth:]]
    elsewhere.sort(key=lambda known: (known[0] != path[0], len(known)))
    return f"did you mean {'.'.join(elsewhere[0])!r}?" if elsewhere else did_you_mean(path[depth], fields)


def _paths(document: dict[str, Any], path: tuple[str, ...], annotation: Any) -> Iterator[tuple[str, ...]]:
    try:
        fields = _fields_below(document, path, annotation)
    except SpikingLMError:
        return
    for key, below in (fields or {}).items():
        yield (*path, key)
        yield from _paths(document, (*path, key), below)
