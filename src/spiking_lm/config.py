"""Configuration base classes: frozen, JSON-able, strict, and free of torch.

Every configuration in spiking-lm (model, neuron, dataset, tokenizer, recipe stage) is one of these, so that a recipe
can be checked, and a typo named, before anything heavy is imported.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from spiking_lm.errors import ConfigError, SpikingLMError, did_you_mean

ConfigT = TypeVar("ConfigT", bound="StrictModel")


class StrictModel(BaseModel):
    """A frozen pydantic model that refuses unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class ModelConfig(StrictModel):
    """Base of model configurations; subclasses fix ``model_type`` to their registry name and add fields."""

    model_type: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-able form, ``model_type`` included."""
        return {"model_type": self.model_type, **self.model_dump(mode="json")}


class SurrogateConfig(StrictModel):
    """The surrogate gradient of a spike, as data: ``name`` from the closed table of :mod:`spiking_lm.kernels`.

    In a configuration the name alone will do: ``surrogate: atan``.
    """

    name: Literal["atan", "fast_sigmoid", "sigmoid", "triangle"] = "atan"
    alpha: float = Field(default=2.0, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class NeuronConfig(StrictModel):
    """Base of neuron configurations; subclasses add the parameters of their neuron."""


class LIFConfig(NeuronConfig):
    """A leaky integrate-and-fire neuron in discrete time: h = beta v + gain x, spike when h reaches the threshold.

    The defaults are SpikeGPT's: tau = 2 steps with decayed input, i.e. beta = 1 - 1/tau = 0.5 and gain = 1/tau = 0.5.
    """

    beta: float = Field(default=0.5, ge=0, le=1)
    """Membrane decay per step."""
    gain: float = 0.5
    """Input gain."""
    threshold: float = Field(default=1.0, gt=0)
    reset: Literal["zero", "subtract"] = "zero"
    compare: Literal[">=", ">"] = ">="
    """Whether a membrane exactly at the threshold fires."""
    surrogate: SurrogateConfig = SurrogateConfig()
    detach_reset: bool = False
    """True stops the gradient through the reset."""


class IFConfig(NeuronConfig):
    """An integrate-and-fire neuron without leak, whose reset subtracts the threshold."""

    threshold: float = Field(default=1.0, gt=0)
    compare: Literal[">=", ">"] = ">="
    """Whether a membrane exactly at the threshold fires."""
    surrogate: SurrogateConfig = SurrogateConfig()
    detach_reset: bool = False
    """True stops the gradient through the reset."""


class GIFConfig(NeuronConfig):
    """A Generalized Integrate-and-Fire neuron: ``levels`` sub-steps of an integrate-and-fire neuron in one step."""

    levels: int = Field(default=15, ge=1)
    """The most spikes of a step; 2^n - 1 fit n bits."""
    threshold: float = Field(default=1.0, gt=0)
    detach_reset: bool = False
    """True stops the gradient through the reset."""


class TernaryGIFConfig(NeuronConfig):
    """A Generalized Integrate-and-Fire neuron of one positive and one negative spike."""

    threshold: float = Field(default=1.0, gt=0)
    surrogate: SurrogateConfig = SurrogateConfig()
    """Of either spike."""
    detach_reset: bool = False
    """True stops the gradient through the reset."""


class BackendConfig(StrictModel):
    """Base of hardware backends' options; subclasses add how a model is placed and computed."""

    tokens: int = Field(default=2048, gt=0)
    """Tokens of the evaluation split that a recipe runs the program on."""


class ConverterConfig(StrictModel):
    """Base of converters' options in a recipe; subclasses add what they do to the model."""

    source: str | None = None
    """The file or folder of another tool. A recipe that is made for any model leaves it out; a run needs it."""


class DatasetConfig(StrictModel):
    """Base of dataset configurations; subclasses add e.g. ``path``."""


class TokenizerConfig(StrictModel):
    """Base of tokenizer configurations."""


def parse_config(
    cls: type[ConfigT], values: dict[str, Any], *, where: str, error: type[SpikingLMError] = ConfigError
) -> ConfigT:
    """Validate ``values`` as ``cls`` or raise ``error`` naming ``where`` and each bad field, with did-you-mean.

    Parameters: ``where`` is what a person would look at, e.g. ``"recipe spikegpt/austen, model"``.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as err:
        lines, hints = [], []
        for problem in err.errors():
            path = ".".join(str(part) for part in problem["loc"])
            if problem["type"] == "extra_forbidden":
                lines.append(f"unknown field {path!r}")
                near = did_you_mean(str(problem["loc"][-1]), _fields_at(cls, problem["loc"][:-1]))
                if near:
                    hints.append(near)
            else:
                text = problem["msg"][0].lower() + problem["msg"][1:]
                given = "" if problem["type"] == "missing" else f", got {problem['input']!r}"
                lines.append(f"{path or 'value'}: {text}{given}"[:300])
        raise error(f"{where}: " + "; ".join(lines), hint=" ".join(hints) or None) from None


def _fields_at(cls: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Names of the fields that are allowed at ``path`` below ``cls``."""
    for part in path:
        field = cls.model_fields.get(str(part))
        if field is None:
            break
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        nested = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
        if nested:
            cls = nested[0]
    return list(cls.model_fields)
