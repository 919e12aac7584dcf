"""The options of every dataset and tokenizer that spiking-lm ships."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from spiking_lm.config import DatasetConfig, TokenizerConfig


class EmbeddedConfig(DatasetConfig):
    """A dataset that comes with the package: no options."""


class PathConfig(DatasetConfig):
    """A dataset in its published layout."""

    path: Path
    """The folder that holds the files, or the file."""


class WikiTextConfig(PathConfig):
    """WikiText-2 or WikiText-103: a folder with wiki.{train,valid,test}.tokens or .raw."""

    form: Literal["tokens", "raw"] | None = None
    """Which form to read; None takes the one that is there. Their scores are not comparable."""


class SplitConfig(PathConfig):
    """A dataset without published splits."""

    valid: float = Field(default=0.05, gt=0, lt=1)
    """Share of the text for validation, taken before the test text."""
    test: float = Field(default=0.05, gt=0, lt=1)
    """Share of the text for testing, taken from the end."""

    @model_validator(mode="after")
    def _something_to_train_on(self) -> SplitConfig:
        if self.valid + self.test >= 1:
            raise ValueError("valid + test must leave something to train on")
        return self


class TreebankConfig(PathConfig):
    """Stanford Sentiment Treebank: trees, ``label text`` lines or tab-separated files."""

    phrases: bool = False
    """Train on every labelled phrase of the trees, not only on whole sentences."""


class FoldConfig(PathConfig):
    """A labelled set without published splits, for cross-validation."""

    fold: int = Field(default=0, ge=0)
    """Which fold is the test set."""
    folds: int = Field(default=10, ge=2)
    valid: float = Field(default=0.1, gt=0, lt=1)
    """Share of the other folds that is held out for validation."""

    @model_validator(mode="after")
    def _fold_exists(self) -> FoldConfig:
        if self.fold >= self.folds:
            raise ValueError(f"fold {self.fold} does not exist: folds are numbered 0 to {self.folds - 1}")
        return self


class HeldOutConfig(PathConfig):
    """A labelled set with published training and test files."""

    valid: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training examples that is held out for validation when there is no validation file."""


class TableConfig(HeldOutConfig):
    """A labelled set in tab-separated files with a header: ``label`` and ``text`` (or ``sentence``)."""

    test: float = Field(default=0.1, gt=0, lt=1)
    """Share of the examples for testing when there is no test file."""


class PairsConfig(PathConfig):
    """Pairs in JSON lines or in tab-separated files with a header: ``source`` and ``target``."""

    valid: float = Field(default=0.05, gt=0, lt=1)
    """Share of the other sources that is held out for validation when there is no validation file."""
    test: float = Field(default=0.05, gt=0, lt=1)
    """Share of the sources for testing when there is no test file."""


class ByteConfig(TokenizerConfig):
    """One token per UTF-8 byte: no options."""


class CharConfig(TokenizerConfig):
    """One token per character."""

    characters: str | None = None
    """The vocabulary, in the order of the ids; None takes the characters of the training text by code point."""
    unknown: str | None = "<unk>"
    """What stands for every other character: ``<unk>``, a token of its own after the last character; a character of
    the vocabulary; or None, which refuses such text (the default with ``vocab``, to keep the size of the file)."""
    vocab: Path | None = None
    """A JSON file ``{"0": "character", ...}`` as the SpikeGPT reference writes it (UTF-8 or UTF-16)."""

    @model_validator(mode="before")
    @classmethod
    def _keep_the_size_of_a_file(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("vocab") is not None:
            return {"unknown": None, **values}
        return values

    @model_validator(mode="after")
    def _one_vocabulary(self) -> CharConfig:
        if self.characters is not None and self.vocab is not None:
            raise ValueError("give characters or vocab, not both")
        if self.characters is not None and len(set(self.characters)) != len(self.characters):
            raise ValueError("characters names a character twice")
        if self.unknown not in (None, "<unk>") and len(self.unknown) != 1:
            raise ValueError("unknown must be '<unk>', one character or null")
        if any("\ud800" <= character <= "\udfff" for character in (self.characters or "") + (self.unknown or "")):
            raise ValueError("a lone surrogate is not a character")
        return self


class BPEConfig(TokenizerConfig):
    """Byte-level byte-pair encoding trained on the training text."""

    vocab_size: int = Field(default=4096, ge=257)
    """Tokens in all, the 256 bytes included; fewer when the text has no more pairs to merge."""
    min_frequency: int = Field(default=2, ge=1)
    """How often a pair must occur to be merged."""
    mask: bool = False
    """Whether there is a token ``[MASK]``, for masked language modelling."""


class FileConfig(TokenizerConfig):
    """A tokenizer.json of the Hugging Face ``tokenizers`` library."""

    path: Path


class ModelTokenizerConfig(TokenizerConfig):
    """The tokenizer of a model folder or a run."""

    path: Path | None = None
    """None, in a recipe: the model that the train stage starts from, else the teacher."""
    keep: Literal["all", "seen"] = "all"
    """seen: only the tokens that the training text has, and the special ones, numbered anew in the same order. What is
    left out becomes the unknown token."""
    base: dict[str, Any] | None = None
    """The tokenizer.json of the whole vocabulary, where one was reduced; None reads ``path``."""
    kept: list[int] | None = None
    """The tokens of the whole vocabulary that are kept, in the order of the ids; None takes them from the text."""

    @model_validator(mode="after")
    def _whole_or_none(self) -> ModelTokenizerConfig:
        if (self.base is None) != (self.kept is None):
            raise ValueError("base and kept describe a reduced vocabulary together")
        if self.kept is not None and sorted(set(self.kept)) != self.kept:
            raise ValueError("kept must rise")
        return self


class WordConfig(TokenizerConfig):
    """One token per word."""

    lowercase: bool = False
    split: Literal["whitespace", "punctuation"] = "whitespace"
    """whitespace: what stands between white space. punctuation: words, and every punctuation mark by itself."""
    min_count: int = Field(default=1, ge=1)
    """Words that occur less often become ``<unk>``."""
    eos: bool = True
    """Whether a line end is the token ``<eos>``, as in the published figures on PTB and WikiText; else white space."""
    vocab_from: Literal["train", "all"] = "train"
    """The text whose words count: training text, or all three texts in the order train, valid, test."""
    mask: bool = False
    """Whether there is a token ``<mask>``, for masked language modelling."""
    words: list[str] | None = None
    """The vocabulary, in the order of the ids, ``<unk>`` included; None takes it from the text."""

    @model_validator(mode="after")
    def _each_word_once(self) -> WordConfig:
        if self.words is not None and len(set(self.words)) != len(self.words):
            raise ValueError("words names a word twice")
        return self
