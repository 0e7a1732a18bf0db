"""lowmem: train language models inside a memory budget."""

__version__ = "0.1.0"

__all__ = ["LoRPtLinear", "__version__"]


def __getattr__(name: str):
    """Import torch only when something that needs it is asked for."""
    if name == "LoRPtLinear":
        from lowmem.nn.lorpt import LoRPtLinear

        return LoRPtLinear
    raise AttributeError(f"module 'lowmem' has no attribute {name!r}")
