"""Prefix tuning (Li & Liang 2021): trained keys and values that every token attends beside its text, in every block and segment.

They are parameters of the blocks' attention, so that a block still is a function of its hidden states alone. PEFT keeps those of all
blocks in one matrix; without its reparameterisation (`prefix_projection`) the numbers are the same.

Shapes: P tokens of the prefix, L blocks, H heads of keys, D their width.
"""

from typing import Any

import torch

from lowmem.models.huggingface import HuggingFaceModel
from lowmem.models.huggingface_attention import UnsupportedModelError
from lowmem.system.errors import ConfigError

PROMPT_EMBEDDINGS = "prompt_embeddings"  # PEFT's name for the matrix


def add_prefix(model: HuggingFaceModel, count: int, *, seed: int) -> None:
    """Put a trainable prefix before every text. It begins as the keys and values of tokens drawn from the vocabulary: activations of words,
    related or not, are a better beginning than random numbers (Li & Liang, section 7.4).

    Args:
        count: P.
        seed: of the tokens that are drawn.
    Raises:
        ConfigError: blocks are not of one plain attention each, or learned positions end before a text begins.
    Memory: the prefix in fp32; activations of P tokens.
    """
    if 0 < model.position_limit <= count:
        raise ConfigError(
            f"adapter.num_virtual_tokens is {count}, but the learned positions of this {model.family} model end at {model.position_limit} "
            "and texts come after the prefix; lower it"
        )
    if 0 < (window := model.prefix_window()) <= count:
        raise ConfigError(f"adapter.num_virtual_tokens is {count}, the sliding window of this {model.family} model {window}; lower it")
    if model.device.type == "meta":
        tokens_P = torch.zeros(count, dtype=torch.int64, device="meta")
    else:
        generator = torch.Generator().manual_seed(seed)
        tokens_P = torch.randint(model.vocab_size, (count,), generator=generator, device="cpu").to(model.device)
    try:
        model.add_prefix(tokens_P)
    except UnsupportedModelError as error:
        raise ConfigError(f"adapter.method=prefix does not work with models of type {model.family}: {error}; use lora") from error
    model.set_training_rules({}, {name for name, parameter in model.named_parameters() if parameter.requires_grad})


def prefix_config(model: HuggingFaceModel) -> dict[str, Any]:
    """What PEFT's configuration of a prefix says of it."""
    count, _, heads, width = model.prefixes()[0].shape
    return {
        "peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": count, "num_layers": len(model.blocks),
        "num_attention_heads": heads, "token_dim": heads * width, "num_transformer_submodules": 1, "prefix_projection": False,
        "encoder_hidden_size": heads * width,
    }  # fmt: skip


def prompt_embeddings(model: HuggingFaceModel) -> torch.Tensor:
    """(P, L * 2 * H * D): the prefixes as PEFT keeps them: of each token the key and the value of each block in turn."""
    return torch.cat([prefix.detach().flatten(1) for prefix in model.prefixes()], 1)


@torch.no_grad()
def load_prompt_embeddings(model: HuggingFaceModel, embeddings: torch.Tensor) -> None:
    """The inverse of `prompt_embeddings`."""
    for prefix, part in zip(model.prefixes(), embeddings.chunk(len(model.blocks), 1), strict=True):
        prefix.copy_(part.reshape(prefix.shape))
