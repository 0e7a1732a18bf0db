"""Adapters and parts of models of transformers: what is trained, what is computed at the start, gradients, rows of new tokens, NF4."""

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowmem.config.load import load_run_config
from lowmem.config.schema import AdapterConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from lowmem.engine.from_config import build_configured_model
from lowmem.engine.huggingface_files import base_sha256
from lowmem.models.huggingface import HuggingFaceModel, own_logits
from lowmem.nn.nf4 import Nf4Linear, Nf4Weight
from lowmem.optim.from_config import build_optimizer, set_learning_rate
from lowmem.system.errors import ConfigError
from tests.reference.tiny_families import save_tiny

pytest.importorskip("peft")
FAMILIES = ("llama", "gpt2", "gemma3_text", "falcon_h1")
METHODS = ("lora", "dora", "rslora", "lora_plus", "ia3", "head", "last_k")
NF4_LORA = ("train.weight_dtype=nf4", "adapter.method=lora")
ROUNDINGS = 300 * 2**-24  # sums of some hundred numbers in another order


def config_of(path: Path, method: str = "none", nf4: bool = False, **adapter: Any) -> RunConfig:
    train = TrainConfig(precision="fp32", weight_dtype="nf4" if nf4 else "fp32")
    return RunConfig(model=ModelConfig(path=str(path), max_seq_len=64), adapter=AdapterConfig(method=method, **adapter), train=train)


def tokens(rows: int = 2, time: int = 12) -> torch.Tensor:
    """Some tokens are frequent, as in text."""
    generator = torch.Generator().manual_seed(rows)
    common, rare = (torch.randint(3, high, (rows, time), generator=generator) for high in (8, 300))
    return torch.where(torch.rand(rows, time, generator=generator) < 0.5, common, rare)


def close(found: torch.Tensor, expected: torch.Tensor, roundings: float = ROUNDINGS, largest: float = 0.0) -> None:
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=roundings * max(expected.abs().max().item(), largest))


def loud(model: HuggingFaceModel) -> None:
    """Take an adapter from its beginning, where half of its gradients are zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_the_start_is_the_base_and_exactly_the_method_is_trained(directories, family, method):
    base, model = (build_configured_model(config_of(directories(family), which)) for which in ("none", method))
    with torch.no_grad():
        close(model.eval()(tokens()), base.eval()(tokens()))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if method == "head":
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(model.head.weight)}
    elif method == "last_k":
        last = len(model.blocks) - 1
        expected = {id(p) for part in (model.blocks[last], model.norm) for p in part.parameters()}
        assert {id(p) for p in model.parameters() if p.requires_grad} == expected
    else:
        assert trained == {name for name in model.state_dict() for name in [f"lm.{name}"] if ".lora_" in name or ".ia3_l." in name}
        layers = [m for name, m in base.blocks.named_modules() if not (family == "falcon_h1" and name.endswith("out_proj"))]
        linears = [m for m in layers if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
        each = {"ia3": 1, "dora": 3}.get(method, 2)
        assert len(trained) == each * len(linears)
    assert model.num_trained_parameters() == sum(p.numel() for p in model.parameters() if p.requires_grad) > 0
    assert set(model.saved_tensors()) == {name.removeprefix("lm.") for name in trained}
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names))
    assert not any("peft" in name or "base_model" in name for name in names)
    assert sum(model.component_parameters().values()) == model.num_parameters()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_gradients_are_those_of_peft_through_the_models_own_forward(directories, family, method):
    model = build_configured_model(config_of(directories(family), method))
    loud(model)
    inputs = tokens()
    targets = inputs.roll(-1, 1)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    logits = own_logits(model, inputs)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / 7
    expected = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
    found_loss = model.train()(inputs, targets, 7.0)
    found = dict(zip(trained, torch.autograd.grad(found_loss, list(trained.values())), strict=True))
    assert found_loss.item() == pytest.approx(loss.item(), rel=ROUNDINGS)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        assert gradient.any(), name
        close(found[name], gradient, 20 * ROUNDINGS, largest / 20)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("new", [(7, 305), (321, 320)])
def test_rows_of_new_tokens_begin_at_the_mean_and_are_trained(directories, family, new):
    """The oracle is the same model with every row of embedding and head trained, of whose gradients these rows are a part."""
    base = build_configured_model(config_of(directories(family)))
    model = build_configured_model(config_of(directories(family), "lora"), new)
    oracle = build_configured_model(config_of(directories(family), "none"), new)
    old = base.lm.get_input_embeddings().weight[: min(new)].mean(0)
    for row in new:
        close(oracle.lm.get_input_embeddings().weight[row], old)
    assert model.vocab_size == max(320, max(new) + 1) == oracle.vocab_size
    inputs = tokens()
    inputs[0, 3:9:2], inputs[1, 2:6] = new[0], new[1]
    targets = inputs.roll(-1, 1)
    with torch.no_grad():
        close(model.eval()(inputs), oracle.eval()(inputs))
    loss, expected = model.train()(inputs, targets, 24.0), oracle.train()(inputs, targets, 24.0)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=ROUNDINGS)
    rows = [p for name, p in model.named_parameters() if "trainable_tokens_delta" in name]
    whole = [oracle.lm.get_input_embeddings().weight] + ([] if oracle.head_is_tied() else [oracle.head.weight])
    assert len(rows) == len(whole)
    for row, matrix in zip(rows, whole, strict=True):
        close(row.grad, matrix.grad[list(new)], 20 * ROUNDINGS)
    assert {id(row) for row in rows} <= model.undecayed()


def test_frequent_rows_of_a_16_bit_base_are_summed_in_32_bits(directories):
    """4,096 equal gradients of one row, which a sum in bf16 would lose after 256."""
    config = config_of(directories("llama"), "lora")
    config.train.precision = config.train.weight_dtype = "bf16"
    model = build_configured_model(config, (7,))
    inputs = torch.full((64, 64), 7)
    (delta,) = (p for name, p in model.named_parameters() if "embed_tokens.token_adapter.trainable" in name)
    assert delta.dtype == torch.float32
    (gradient,) = torch.autograd.grad(model.embed(inputs).sum(), delta)
    assert torch.equal(gradient, torch.full_like(gradient, 4096.0))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_lora_plus_has_its_own_rate_and_factors_at_one_do_not_decay(directories):
    optim = OptimConfig(weight_decay=0.5)
    model = build_configured_model(config_of(directories("llama"), "lora_plus", loraplus_lr_ratio=4.0))
    optimizer = build_optimizer(model, optim)
    set_learning_rate(optimizer, 0.01)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(rates)
    assert {(".lora_B." in name, rate) for name, rate in rates.items()} == {(True, 0.04), (False, 0.01)}
    factors = build_optimizer(build_configured_model(config_of(directories("llama"), "ia3")), optim)
    assert [group["weight_decay"] for group in factors.param_groups] == [0.0]


def test_the_seed_makes_the_adapter_and_leaves_other_random_numbers_alone(directories):
    config = config_of(directories("llama"), "lora")
    torch.manual_seed(1)
    first = build_configured_model(config).saved_tensors()
    after = torch.rand(3)
    torch.manual_seed(1)
    build_configured_model(config_of(directories("llama")))
    assert torch.equal(after, torch.rand(3))
    again = build_configured_model(config).saved_tensors()
    assert all(torch.equal(first[name], again[name]) for name in first)
    config.train.seed = 5
    assert any(not torch.equal(first[name], value) for name, value in build_configured_model(config).saved_tensors().items())


def test_dropout_of_the_adapter_alone_is_on_and_repeats_when_blocks_run_again(directories):
    model = build_configured_model(config_of(directories("llama"), "lora", lora_dropout=0.5)).train()
    loud(model)
    gradients = {}
    for mode in ("none", "block"):
        model.activation_checkpointing = mode
        torch.manual_seed(4)
        loss = model(tokens(), tokens().roll(-1, 1), 24.0)
        loss.backward()
        gradients[mode] = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        model.zero_grad()
    assert all(torch.equal(*pair) for pair in zip(*gradients.values(), strict=True))
    other = model(tokens(), tokens().roll(-1, 1), 24.0)
    assert other.item() != loss.item()


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_that_of_bitsandbytes(double, dtype):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from lowmem.nn.nf4 import store_linears_as_nf4
    from lowmem.nn.quantized import stored_bytes

    torch.manual_seed(0)
    plain = nn.Linear(96, 20_000, dtype=dtype)  # more numbers than are quantised at once
    theirs = bitsandbytes.nn.Linear4bit(96, 20_000, compute_dtype=dtype, compress_statistics=double, quant_type="nf4")
    theirs.weight = bitsandbytes.nn.Params4bit(plain.weight.data.clone(), quant_type="nf4", compress_statistics=double, module=theirs)
    theirs.bias, theirs.support_avx512bf16_for_cpu = plain.bias, False
    theirs = theirs.to("cpu")
    store_linears_as_nf4(nn.Sequential(plain), double)
    x = torch.randn(3, 96, dtype=dtype, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out, expected = plain(x), theirs(y)
    assert torch.equal(out, expected)
    out.sum().backward()
    expected.sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert plain.weight.numel() == 96 * 20_000
    outline = nn.Linear(96, 20_000, dtype=dtype, device="meta")
    store_linears_as_nf4(nn.Sequential(outline), double)
    blocks = 96 * 20_000 // 64
    assert stored_bytes([outline.weight]) == stored_bytes([plain.weight])
    assert stored_bytes([plain.weight]) == 48 * 20_000 + (blocks + 4 * -(-blocks // 256) + 4 if double else 4 * blocks)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_gradients_on_nf4_are_those_on_its_numbers(directories, family, method):
    pytest.importorskip("bitsandbytes")
    model = build_configured_model(config_of(directories(family), method, nf4=True))
    dense = copy.deepcopy(model)
    count = 0
    for layer in dense.modules():
        if isinstance(layer, Nf4Linear):
            assert isinstance(layer.weight, Nf4Weight)
            layer.__class__, layer.weight = nn.Linear, nn.Parameter(layer.weight.dense(torch.float32), requires_grad=False)
            count += 1
    assert count == 7 * 2
    assert not isinstance(model.head.weight, Nf4Weight)
    found = []
    for one in (model, dense):
        loud(one)
        one.train()(tokens(), tokens().roll(-1, 1), 24.0).backward()
        found.append({name: p.grad for name, p in one.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[1].items():
        close(found[0][name], gradient, 20 * ROUNDINGS)


def test_a_base_that_is_read_into_nf4_is_never_whole(directories, tmp_path):
    """Of the linear layers one at a time is there in full."""
    pytest.importorskip("bitsandbytes")
    alive, most = set(), 0
    from lowmem.nn import nf4

    usual = nf4.quantize_nf4

    def watched(tensor: torch.Tensor, double: bool) -> Nf4Weight:
        nonlocal most
        shapes = {tuple(module.weight.shape) for module in reference.blocks.modules() if isinstance(module, nn.Linear)}
        found = [x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter) and not x.is_meta and tuple(x.shape) in shapes]
        storages = {x.untyped_storage().data_ptr() for x in found} - known
        most = max(most, len(storages))
        alive.add(tuple(tensor.shape))
        return usual(tensor, double)

    reference = build_configured_model(config_of(directories("llama")))
    there = [x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter) and not x.is_meta]  # of earlier tests, too
    known = {x.untyped_storage().data_ptr() for x in there}
    nf4.quantize_nf4 = watched
    try:
        build_configured_model(config_of(directories("llama"), "lora", nf4=True))
    finally:
        nf4.quantize_nf4 = usual
    assert alive
    assert most <= 2  # what was read, and that in another dtype


@pytest.mark.parametrize("adapter, new, message", [
    ({"method": "lora", "target_modules": ["q_proj", "nothing"]}, (), "has nothing, which no layer of this llama model is called; there"),
    ({"method": "last_k", "last_k": 3}, (), "adapter.last_k is 3, the model has 2 blocks; use 1 to 2"),
    ({"method": "prefix"}, (7,), "data.add_tokens needs rows that are trained, which adapter.method=prefix does not train"),
    ({"method": "lora", "target_modules": ["q_proj", "lm_head"]}, (7,), "has lm_head, of which data.add_tokens trains rows"),
    ({"method": "dora", "target_modules": ["embed_tokens"]}, (7,), "has embed_tokens, of which data.add_tokens trains rows"),
    ({"method": "ia3"}, (7,), "data.add_tokens needs rows that are trained, which adapter.method=ia3 does not train"),
    ({"method": "lora", "target_modules": ["mlp"]}, (), "adapter.method=lora cannot be applied"),
])  # fmt: skip
def test_what_cannot_be_trained_is_said_in_one_line(directories, adapter, new, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build_configured_model(config_of(directories("llama"), **adapter), new)
    assert "\n" not in str(caught.value)


def test_models_without_adapters_are_refused(directories):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ConfigError, match="the blocks of this model have none"):
        build_configured_model(config_of(directories("gpt2"), "lora", nf4=True))
    with pytest.raises(ConfigError, match=r"adapter.method=lora needs a model of transformers; set model\.path"):
        build_configured_model(RunConfig(adapter=AdapterConfig(method="lora")))


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("ends", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("family, tied", [("llama", False), ("gemma3_text", True)])
def test_embedding_and_head_take_an_adapter_each(directories, family, tied, ends, method):
    model = build_configured_model(config_of(directories(family), method, target_modules=[*ends, "q_proj"]))
    assert model.head_is_tied() is tied
    loud(model)
    inputs = tokens()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = model.train()(inputs, inputs.roll(-1, 1), 24.0)
    expected = F.cross_entropy(own_logits(model, inputs).flatten(0, 1), inputs.roll(-1, 1).flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=ROUNDINGS)
    largest = max(gradient.abs().max().item() for gradient in torch.autograd.grad(expected, trained, retain_graph=True))
    for found, wanted in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained), strict=True):
        assert wanted.any()
        close(found, wanted, 20 * ROUNDINGS, largest / 20)
    embedded = {id(p) for p in model.embed_parameters()}
    count = len([1 for name, p in model.named_parameters() if "lora_embedding" in name and id(p) in embedded])
    assert count == (2 if "embed_tokens" in ends else 0)


def test_the_hash_of_a_base_follows_its_files(directories, tmp_path):
    save_tiny(tmp_path, "llama")
    before = base_sha256(tmp_path)
    assert before == base_sha256(tmp_path)
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text() + " ")
    assert base_sha256(tmp_path) != before


@pytest.mark.parametrize("overrides, message", [
    (["adapter.method=lora"], "adapter.method=lora needs a model of transformers; set model.path, or remove it"),
    (["data.add_tokens=[x]"], "data.add_tokens needs a model of transformers"),
    (["model.path=x", "adapter.method=prefix", "adapter.r=4"], "adapter.r is 4, which adapter.method=prefix does not use; remove it"),
    (["model.path=x", "adapter.method=lora", "adapter.num_virtual_tokens=4"], "num_virtual_tokens is 4, which adapter.method=lora does"),
    (["model.path=x", "adapter.method=prefix", "data.add_tokens=[x]"], "adapter.method=prefix does not train; use lora or its kin"),
    (["model.path=x", "adapter.method=lora", "optim.name=spectron"], "adapter.method=lora does not work with optim.name=spectron"),
    (["model.path=x", "train.weight_dtype=nf4"], "needs an adapter beside them, found adapter.method=none; use lora"),
    (["model.path=x", "train.weight_dtype=nf4", "adapter.method=head"], "needs an adapter beside them, found adapter.method=head"),
    (["model.path=x", *NF4_LORA, "engine.name=deepspeed", "engine.zero_stage=3"], "does not work with engine.zero_stage=3"),
    (["model.path=x", "adapter.method=lora", "adapter.lora_dropout=0.1", "train.update=layerwise"], "lora_dropout needs train.update"),
    (["model.path=x", "adapter.method=ia3", "data.add_tokens=[x]"], "adapter.method=ia3 does not train; use lora or its kin, or none"),
    (["model.path=x", "adapter.method=ia3", "adapter.r=4"], "adapter.r is 4, which adapter.method=ia3 does not use; remove it"),
    (["model.path=x", "train.double_quant=false"], "train.double_quant is false, which only train.weight_dtype=nf4 uses"),
])  # fmt: skip
def test_contradictions_are_found_before_anything_is_read(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_run_config(overrides=["train.steps=3", *overrides])
    assert len(str(caught.value).splitlines()) == 1, str(caught.value)


@pytest.mark.parametrize("overrides", [
    ["adapter.method=lora", "train.weight_dtype=nf4", "engine.name=deepspeed", "engine.zero_stage=2"],
    ["adapter.method=dora", "adapter.r=4", "adapter.target_modules=[q_proj]", "train.update=layerwise"],
    ["adapter.method=prefix", "adapter.num_virtual_tokens=3", "train.weight_dtype=nf4", "train.update=layerwise"],
    ["adapter.method=last_k", "adapter.last_k=2"], ["engine.name=deepspeed", "engine.zero_stage=3"],
])  # fmt: skip
def test_what_goes_together_is_taken(overrides):
    assert load_run_config(overrides=["train.steps=3", "model.path=x", *overrides]).model.path == "x"
