"""Tiny models of families of transformers, with random weights, as directories."""

import json
from pathlib import Path
from typing import Any

import torch

_ROWS = {"vocab_size": 320, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_USUAL = _ROWS | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 128,
}  # fmt: skip
_GPT = _ROWS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_LINEAR = {
    "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_WIDE = {"hidden_size": 64, "head_dim": 16}

USUAL = (
    "apertus", "arcee", "cohere", "ernie4_5", "gemma", "glm", "glm4", "gpt_neox", "helium", "hunyuan_v1_dense", "llama", "mistral",
    "nemotron", "olmo", "olmo2", "persimmon", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2", "biogpt",
)  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(USUAL, _USUAL),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), _GPT),
    **dict.fromkeys(("gptj", "codegen"), _GPT | {"n_embd": 64, "rotary_dim": 8}),
    **dict.fromkeys(("cohere2", "exaone4", "gemma2", "gemma3_text", "olmo3"), _USUAL | {"sliding_window": 64}),
    "bloom": _ROWS | {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gpt_neo": _ROWS | {
        "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 128, "attention_types": [[["global", "local"], 1]],
        "window_size": 4,
    },
    "granite": _USUAL | {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1},
    "lfm2": _USUAL | {"layer_types": ["conv", "full_attention"]},
    "opt": _ROWS | {
        "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128,
        "word_embed_proj_dim": 32,
    },
    "qwen3_5_text": _USUAL | _LINEAR,
    "recurrent_gemma": _USUAL | {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 64},
    "xglm": _ROWS | {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 128},
    # of no family that is trained
    "mixtral": _USUAL | _EXPERTS, "olmoe": _USUAL | _EXPERTS, "qwen3_moe": _USUAL | _EXPERTS, "gpt_oss": _USUAL | _EXPERTS,
    "qwen3_next": _USUAL | _LINEAR | _EXPERTS,
    "mamba": _ROWS | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "falcon_h1": _USUAL | _WIDE | {
        "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1,
    },
}  # fmt: skip


def save_tiny(folder: Path, family: str, **choices: Any) -> Any:
    """The model in evaluation mode, and its directory with a tokenizer of 300 tokens and a template."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from lowmem.data.hf_tokenizer import HuggingFaceTokenizer

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SHAPES[family] | choices)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    model.eval().save_pretrained(folder)
    HuggingFaceTokenizer.train(["some words and the other words " * 20], 300).save(folder / "tokenizer.json")
    template = "{% for message in messages %}{{ bos_token + message['content'] + eos_token }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "bos_token": "<s>"}))
    return model
