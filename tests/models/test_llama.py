"""Llama's weights are ours, split: the same logits and gradients as transformers' LlamaForCausalLM."""

import pytest
import torch

from lowmem.config.schema import ModelConfig
from lowmem.models.registry import build_model

transformers = pytest.importorskip("transformers")


def llama_like(model, config):
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=config.dim,
            intermediate_size=config.hidden_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            vocab_size=model.vocab_size,
            max_position_embeddings=model.max_seq_len,
            rms_norm_eps=model.norm.eps,
            rope_theta=config.rope_theta,
            tie_word_embeddings=config.tie_embeddings,
            attention_bias=False,
        )
    ).double()
    weights = {"model.embed_tokens.weight": model.embedding.weight, "model.norm.weight": model.norm.weight}
    weights["lm_head.weight"] = model.embedding.weight if config.tie_embeddings else model.head.weight
    for index, block in enumerate(model.blocks):
        prefix = f"model.layers.{index}."
        q, k, v = block.attention.qkv.weight.split(config.dim)
        gate, up = block.mlp.gate_up.weight.split(config.hidden_dim)
        named = {
            "input_layernorm": block.attention_norm.weight, "post_attention_layernorm": block.mlp_norm.weight,
            "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "self_attn.o_proj": block.attention.out.weight,
            "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": block.mlp.down.weight,
        }  # fmt: skip
        weights.update({f"{prefix}{name}.weight": value for name, value in named.items()})
    with torch.no_grad():
        reference.load_state_dict(weights)
    return reference


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
def test_equals_hugging_face(tied):
    config = ModelConfig(dim=32, hidden_dim=48, num_layers=2, num_heads=4, rope_theta=500.0, tie_embeddings=tied)
    model = build_model(config, vocab_size=29, max_seq_len=20, seed=0).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # at the initial scale attention is nearly uniform and would hide an error of position
    reference = llama_like(model, config)
    tokens = torch.randint(0, 29, (2, 20), generator=torch.Generator().manual_seed(1))
    expected = reference(input_ids=tokens, labels=tokens)
    # transformers computes its rotary table and norms in fp32 even for fp64 weights: 2^-24 = 6e-8 relative to logits of size 10,
    # carried through two blocks
    torch.testing.assert_close(model(tokens), expected.logits, rtol=0, atol=2e-4)
    loss = model(tokens[:, :-1], tokens[:, 1:], 2 * 19.0)
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    (ours,) = torch.autograd.grad(loss, [model.blocks[0].attention.qkv.weight])
    expected.loss.backward()
    layer = reference.model.layers[0].self_attn
    theirs = torch.cat([part.weight.grad for part in (layer.q_proj, layer.k_proj, layer.v_proj)])
    assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-4
