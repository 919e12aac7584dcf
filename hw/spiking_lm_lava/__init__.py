"""Lava: language models as Loihi-style processes, by a bit-exact integer simulator, and by Lava itself in a worker."""
