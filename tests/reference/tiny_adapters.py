"""Tiny models of transformers with adapters of PEFT whose numbers are not those of their beginning."""

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lowmem.data.hf_tokenizer import HuggingFaceTokenizer
from tests.reference.tiny_families import save_tiny

TOKENS = torch.arange(12).view(1, -1) * 7 % 250


@cache
def tokenizer_size() -> int:
    """Of the tokenizer that `save_tiny` writes."""
    return HuggingFaceTokenizer.train(["some words and the other words " * 20], 300).vocab_size


def save_base(folder: Path, family: str = "llama", **choices: Any) -> Any:
    """As `save_tiny`, with as many rows as the tokenizer has tokens, so that lowmem and transformers choose among the same."""
    return save_tiny(folder, family, **{"vocab_size": tokenizer_size(), "eos_token_id": 0, **choices})


def adapted(base: Path, method: str = "lora", **settings: Any) -> Any:
    """A peft.PeftModel in evaluation mode.

    Args:
        method: lora, dora, rslora or ia3.
    """
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    gpt2 = model.config.model_type == "gpt2"
    names = ["c_attn", "c_fc"] if gpt2 else ["q_proj", "down_proj"]
    common = {"target_modules": names, "task_type": "CAUSAL_LM", "fan_in_fan_out": gpt2, **settings}
    if method == "ia3":
        config: Any = peft.IA3Config(feedforward_modules=names[1:], **common)
    else:
        config = peft.LoraConfig(r=4, init_lora_weights=False, use_dora=method == "dora", use_rslora=method == "rslora", **common)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
    return made.eval()


def save_adapted(base: Path, folder: Path, method: str = "lora", **settings: Any) -> Any:
    """The model of `adapted`, and its adapter as PEFT writes it."""
    made = adapted(base, method, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.save_pretrained(folder)
    return made


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Of TOKENS, by a model of transformers or of PEFT."""
    return model(input_ids=TOKENS).logits
