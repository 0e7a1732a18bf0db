"""lowmem: train language models inside a memory budget."""

import importlib

__version__ = "0.1.0"

__all__ = ["LoRPtLinear", "__version__", "lorptize", "memory", "merge_lorpt", "optim"]


def __getattr__(name: str):
    """Import what is asked for, when it is asked for: `import lowmem` loads no torch."""
    if name == "LoRPtLinear":
        return importlib.import_module("lowmem.nn.lorpt").LoRPtLinear
    if name in ("lorptize", "merge_lorpt"):
        return getattr(importlib.import_module("lowmem.nn.lorptize"), name)
    if name in ("memory", "optim"):
        return importlib.import_module(f"lowmem.{name}")
    raise AttributeError(f"module 'lowmem' has no attribute {name!r}")
