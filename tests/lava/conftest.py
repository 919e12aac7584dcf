"""Makes ``lava_nets`` importable: pytest's importlib mode adds no folder of tests to the path."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
