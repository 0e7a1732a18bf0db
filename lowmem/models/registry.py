"""From a configuration to a model with its initial weights."""

import torch

from lowmem.config.schema import ModelConfig
from lowmem.models.base import LanguageModel, Place, stays
from lowmem.models.decoder import Decoder
from lowmem.models.i3 import I3
from lowmem.nn.quantized import WeightFormat

MODELS: dict[str, type[LanguageModel]] = {"decoder": Decoder, "i3": I3}


def build_model(
    config: ModelConfig,
    *,
    vocab_size: int,
    max_seq_len: int,
    seed: int,
    dtype: torch.dtype | WeightFormat = torch.float32,
    place: Place = stays,
) -> LanguageModel:
    """A model whose initial weights depend on `seed` alone.

    Args:
        config: the shape; its own vocab_size and max_seq_len are not read, 0 there means "decided elsewhere".
        vocab_size: rows of the embedding.
        max_seq_len: longest sequence, in tokens.
        seed: of the initial weights; the global generator is left as it was.
        dtype: what is stored; values are drawn in fp32 and rounded, whatever it is. A format may quantise matrices.
        place: is given each block as soon as it is there, and says where it lives.
    Raises:
        ConfigError: the configuration contradicts itself or the model it names.
    Memory: the weights, and one block, head or embedding in fp32, on the CPU unless a device context says otherwise.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return MODELS[config.name](config, vocab_size=vocab_size, max_seq_len=max_seq_len, dtype=dtype, place=place)  # type: ignore[call-arg]
