"""The core's own plugin: neurons, kernels, datasets, tokenizers, metrics, recipes and checks that need no extra."""

from __future__ import annotations
