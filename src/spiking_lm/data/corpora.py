"""Text corpora: the embedded one and the published layouts of the usual ones."""

from __future__ import annotations

from pathlib import Path

from spiking_lm.data.configs import EmbeddedConfig
from spiking_lm.data.sets import SPLITS, TextCorpus
from spiking_lm.data.sources import TextSource

EMBEDDED = Path(__file__).parent / "embedded"


def austen3(config: EmbeddedConfig) -> TextCorpus:
    """Return three novels by Jane Austen, 1.6 MB for training; no novel's end is in another split."""
    train, valid, test = (TextSource.of_file(EMBEDDED / f"austen3.{split}.txt.xz") for split in SPLITS)
    return TextCorpus(train, valid, test)
