"""The last hidden state of a model of transformers and the matrix that makes logits of it, so that the loss needs no logits of all tokens.

Shapes: B rows, T time, C width, V vocabulary.
"""

from typing import Any

import torch
from torch import nn

# what some families do to their logits after the head
_SCALED = ("final_logit_softcapping", "logits_softcap", "logits_scaling", "logit_scale", "lm_head_multiplier")
_OWN_LOGITS = ("opt", "recurrent_gemma")  # model types that call parts of their body, or do other things with the head's logits


def plain_head(model: Any) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Weight (V, C) and bias of the head; None where logits are more than one product with it, or an adapter sits on it.

    Args:
        model: of transformers, or a peft.PeftModel around one.
    """
    inner = inner_model(model)
    head = inner.get_output_embeddings()
    if any(getattr(inner.config, name, None) is not None for name in _SCALED) or inner.config.model_type in _OWN_LOGITS:
        return None
    if head is None and getattr(inner.config, "model_type", "") == "lowmem" and inner.config.tie_word_embeddings:
        embedding = inner.get_input_embeddings()
        return (embedding.weight, None) if isinstance(embedding, nn.Embedding) else None
    return (head.weight, head.bias) if type(head) is nn.Linear else None


def last_hidden(model: Any, **arguments: Any) -> torch.Tensor:
    """(B, T, C): what the head would be given.

    Args:
        arguments: of the model's forward.
    Memory: logits of one token a row.
    """
    inner, found = inner_model(model), []
    body = inner.base_model if inner.base_model is not inner else inner.norm

    def keep(module: Any, inputs: Any, output: Any) -> None:
        found.append(output if isinstance(output, torch.Tensor) else output[0])

    hook = body.register_forward_hook(keep)
    try:
        model(**arguments, logits_to_keep=1)
    finally:
        hook.remove()
    return found[-1]


def inner_model(model: Any) -> Any:
    """The model of transformers inside a peft.PeftModel; any other as it is."""
    return model.get_base_model() if hasattr(model, "peft_config") else model
