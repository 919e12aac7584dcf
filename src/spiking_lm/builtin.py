"""The core's own plugin: neurons, kernels, datasets, tokenizers, metrics, recipes and checks that need no extra."""

from __future__ import annotations

from pathlib import Path

from spiking_lm.hookspecs import Register, hookimpl
from spiking_lm.records import DatasetSpec, NeuronSpec, RecipeSpec, TokenizerSpec


@hookimpl
def spiking_lm_datasets(register: Register) -> None:
    """Register the embedded corpora and the loaders of users' own files."""
    for name, config, factory, task, summary in (
        ("austen3", "EmbeddedConfig", "corpora:austen3", "text", "three novels by Jane Austen, embedded (1.6 MB)"),
    ):
        register(
            DatasetSpec(
                name=name,
                config=f"spiking_lm.data.configs:{config}",
                factory=f"spiking_lm.data.{factory}",
                task=task,
                summary=summary,
            )
        )


@hookimpl
def spiking_lm_tokenizers(register: Register) -> None:
    """Register bytes, characters, trained byte-pair encoding and Hugging Face files."""
    for name, config, factory, summary in (
        ("byte", "ByteConfig", "ByteTokenizer", "one token per UTF-8 byte"),
        ("char", "CharConfig", "CharTokenizer", "one token per character of the training text"),
        ("bpe", "BPEConfig", "train_bpe", "byte-level BPE, trained on the training text"),
        ("file", "FileConfig", "read_tokenizer_file", "any Hugging Face tokenizer.json"),
    ):
        register(
            TokenizerSpec(
                name=name,
                config=f"spiking_lm.data.configs:{config}",
                factory=f"spiking_lm.data.tokenizers:{factory}",
                summary=summary,
            )
        )


@hookimpl
def spiking_lm_neurons(register: Register) -> None:
    """Register the neuron that needs no framework."""
    register(
        NeuronSpec(
            name="lif",
            summary="leaky integrate-and-fire in plain PyTorch",
            config="spiking_lm.config:LIFConfig",
            factory="spiking_lm.neurons:LIF",
        )
    )


@hookimpl
def spiking_lm_recipes(register: Register) -> None:
    """Register the shipped recipes: ``spiking_lm/_recipes`` in a wheel, ``recipes/`` beside ``src`` when editable."""
    package = Path(__file__).parent
    folder = package / "_recipes"
    if not folder.is_dir() and (package.parents[1] / "pyproject.toml").is_file():
        folder = package.parents[1] / "recipes"
    for path in sorted(folder.rglob("*.yaml")):
        register(RecipeSpec(name=path.relative_to(folder).with_suffix("").as_posix(), path=path))
