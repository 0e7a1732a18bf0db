"""Tiny models of random weights: runs of lowmem of every shape, and directories of transformers."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from lowmem.config.schema import LorptConfig, ModelConfig, RunConfig
from lowmem.data.hf_tokenizer import HuggingFaceTokenizer
from lowmem.data.tokenizers import ByteTokenizer
from lowmem.engine.run_model import RunModel
from lowmem.models.registry import build_model

GPT2 = {"positions": "learned", "norm": "layernorm", "activation": "gelu_tanh"}
LINEAR = LorptConfig(rank=4, bottleneck="linear")
SHAPES = {
    "llama": ({}, "llama"),
    "llama-tied": ({"tie_embeddings": True, "norm_eps": 1e-5, "rope_theta": 500.0}, "llama"),
    "llama-biased": ({"bias": True, "tie_embeddings": True, "num_kv_heads": 2}, "llama"),
    "llama-grouped-lorpt": ({"num_kv_heads": 1, "lorpt": LINEAR}, "llama"),
    "llama-from-lorpt": ({"lorpt": replace(LINEAR, targets=["attention", "mlp", "head"])}, "llama"),
    "llama-from-shared-lorpt": ({"lorpt": replace(LINEAR, share_down=True)}, "llama"),
    "llama-from-low-rank-attention": ({"attention_rank": 8}, "llama"),
    "gpt2": ({**GPT2, "bias": True}, "gpt2"),
    "gpt2-tied": ({**GPT2, "activation": "gelu", "tie_embeddings": True, "attention_rank": 8}, "gpt2"),
    "gpt2-grouped": ({**GPT2, "num_kv_heads": 2}, "lowmem"),
    "silu": ({"lorpt": LorptConfig(rank=4)}, "lowmem"),
    "silu-some": ({"lorpt": LorptConfig(rank=4, ranks={"blocks.0.*": 0, "*.q": 0})}, "lowmem"),
    "alibi": ({"positions": "alibi", "attention_rank": 8}, "lowmem"),
    "rope-layernorm": ({"norm": "layernorm", "activation": "gelu", "bias": True}, "lowmem"),
    "i3": ({"name": "i3", "num_heads": 1, "attention_rank": 8, "state_dim": 4, "lorpt": LorptConfig(rank=4)}, "lowmem"),
}  # fmt: skip


def make_run(choices: dict, tokenizer=None) -> RunModel:
    """A model of random weights, norms and biases included."""
    tokenizer = tokenizer or ByteTokenizer()
    config = RunConfig(model=ModelConfig(**{"dim": 32, "num_layers": 2, "num_heads": 4, **choices}))
    model = build_model(config.model, vocab_size=tokenizer.vocab_size, max_seq_len=48, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return RunModel(model.eval(), tokenizer, config, 0, Path("none/checkpoints/step-00000000"))


def tolerance(logits: torch.Tensor) -> float:
    """fp32 sums of a few hundred terms in two layers, in another order: some 1e-6 of the largest logit; and ten times that."""
    return 1e-5 * logits.abs().max().item()


TEMPLATE = "{% for message in messages %}{{ bos_token + message['content'] + eos_token }}{% endfor %}"


def save_theirs(folder, family: str = "llama", dtype=torch.float32, **choices):
    """A model of random weights, norms and biases included, and its directory."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    shards = {"max_shard_size": choices.pop("max_shard_size", "1GB")}
    torch.manual_seed(0)
    if family == "llama":
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=320, max_position_embeddings=64, **(shape | choices)))
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=64, n_embd=32, n_layer=2, n_head=4, **choices))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    model.eval().to(dtype).save_pretrained(folder, **shards)
    HuggingFaceTokenizer.train(["some words and the other words " * 20], 300).save(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "bos_token": "<s>"}))
    return model.float()


def read_header(path) -> dict:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
