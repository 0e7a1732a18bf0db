import pytest
import torch
from torch import nn

from lowmem import lorptize, merge_lorpt
from lowmem.config.schema import LorptConfig, ModelConfig
from lowmem.models.registry import build_model
from lowmem.nn.lorpt import LoRPtLinear
from lowmem.system.errors import ConfigError

transformers = pytest.importorskip("transformers")
TOKENS = torch.arange(24).view(2, 12) % 50


def hf_model(kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2)
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16
        )
        model = transformers.LlamaForCausalLM(config)
    return model.double().eval()


def low_rank_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, LoRPtLinear)]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_converting_and_merging_a_hugging_face_model(kind):
    model = hf_model(kind)
    before = model(TOKENS).logits
    untouched = {id(p) for name, p in model.named_parameters() if "norm" in name or "ln" in name or "embed" in name or "wte" in name}
    found = lorptize(model, rank=8, ranks={"*.0.*": 0})
    assert low_rank_names(model) == [layer.name for layer in found]
    assert len(found) == {"gpt2": 4, "llama": 7}[kind]  # all linear layers of the second block, and not the head
    assert not any("head" in layer.name for layer in found)
    assert all(0 < layer.retained_energy < 1 for layer in found)
    assert untouched <= {id(p) for p in model.parameters()}
    low = model(TOKENS).logits
    assert (low - before).abs().max() > 1e-6
    merged = merge_lorpt(model)
    assert merged == [layer.name for layer in found]
    assert low_rank_names(model) == []
    assert all(type(model.get_submodule(name)) is nn.Linear for name in merged)
    # products of 64 terms of numbers below 10, through two blocks, in fp64
    torch.testing.assert_close(model(TOKENS).logits, low, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_converted_model_trains_and_its_save_files_hold_the_factors(kind, tmp_path):
    model = hf_model(kind).train()
    lorptize(model, method="scratch", bottleneck="silu")
    loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert any(name.endswith(".down") for name in model.state_dict())


def test_svd_is_the_best_approximation_and_reports_its_energy():
    torch.manual_seed(0)
    layer = nn.Linear(20, 30).double()
    model = nn.Sequential(layer)
    left, values, right = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    (found,) = lorptize(model, rank=5)
    best = (left[:, :5] * values[:5]) @ right[:5]
    # SVD of numbers below 1 in fp64
    torch.testing.assert_close(model[0].merged_weight(), best, rtol=0, atol=1e-13)
    assert found.retained_energy == pytest.approx((values[:5].square().sum() / values.square().sum()).item(), rel=1e-12)
    assert torch.equal(model[0].bias, layer.bias)


def test_from_scratch_the_product_has_the_std_of_the_weight():
    torch.manual_seed(0)
    layer = nn.Linear(400, 400)
    nn.init.normal_(layer.weight, std=0.03)
    model = nn.Sequential(layer)
    (found,) = lorptize(model, rank=64, method="scratch")
    assert found.retained_energy is None
    # see test_initial_variance in test_lorpt.py
    assert model[0].merged_weight().std().item() == pytest.approx(0.03, rel=0.044)


def test_a_model_of_lowmem_becomes_low_rank_and_dense_again():
    config = ModelConfig(dim=32, num_layers=2, num_heads=2)
    model = build_model(config, vocab_size=50, max_seq_len=16, seed=0).double()
    lorptize(model, rank=8)
    assert low_rank_names(model)[:4] == [f"blocks.0.{n}" for n in ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")]
    logits = model(TOKENS)
    merge_lorpt(model)
    torch.testing.assert_close(model(TOKENS), logits, rtol=0, atol=1e-11)
    lorpt = LorptConfig(rank=4, bottleneck="linear", targets=["attention", "mlp", "head"])
    low = build_model(ModelConfig(dim=32, num_layers=1, num_heads=2, lorpt=lorpt), vocab_size=50, max_seq_len=16, seed=0).double()
    logits = low(TOKENS)
    merge_lorpt(low)
    dense = build_model(ModelConfig(dim=32, num_layers=1, num_heads=2), vocab_size=50, max_seq_len=16, seed=0)
    assert {n: p.shape for n, p in low.named_parameters()} == {n: p.shape for n, p in dense.named_parameters()}
    torch.testing.assert_close(low(TOKENS), logits, rtol=0, atol=1e-11)
    assert low(TOKENS, TOKENS, 24.0).isfinite()


def test_a_tied_or_shared_weight_is_left_alone_and_the_head_converts_only_by_name():
    model = hf_model("gpt2")  # its head is its embedding
    with pytest.raises(ConfigError, match="lm_head matches no linear layer"):
        lorptize(model, rank=8, targets=["lm_head"])
    llama = hf_model("llama")
    assert [layer.name for layer in lorptize(llama, rank=8, targets=["lm_head"])] == ["lm_head"]


def test_mistakes_are_refused_before_anything_changes():
    model = hf_model("llama")
    before = dict(model.named_parameters())
    for arguments, message in (
        ({"rank": 16}, r"layer model\.layers\.0\.self_attn\.q_proj: .* is 16.*16\.0"),
        ({"rank": 8, "targets": ["attn.*"]}, r"attn\.\* matches no linear layer"),
        ({"rank": 8, "ranks": {"*.nothing": 4}}, r"\*\.nothing matches no"),
        ({"bottleneck": "silu"}, "bottleneck is silu, which cannot reproduce"),
    ):
        with pytest.raises(ConfigError, match=message):
            lorptize(model, **arguments)
    assert all(dict(model.named_parameters())[name] is p for name, p in before.items())
    lorptize(model, method="scratch", bottleneck="silu", targets=["o_proj"])
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.o_proj has a LoRPt bottleneck=silu"):
        merge_lorpt(model)
