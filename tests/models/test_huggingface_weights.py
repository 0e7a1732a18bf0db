"""Weights of models of transformers as low-rank factors and as codes: what is stored, computed and trained, and what is never whole."""

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lowmem.config.checks import config_problems
from lowmem.config.load import load_run_config
from lowmem.config.schema import LorptConfig, OptimConfig, RunConfig, TrainConfig
from lowmem.data.batch import Batch
from lowmem.engine.from_config import build_configured_model
from lowmem.engine.huggingface_files import StoredTensor, load_model
from lowmem.engine.layerwise import LayerwiseEngine
from lowmem.engine.local import LocalEngine
from lowmem.models import huggingface_weights
from lowmem.models.huggingface import HuggingFaceModel, own_logits
from lowmem.models.huggingface_weights import Kept
from lowmem.nn import lorptize
from lowmem.nn.lorpt import LoRPtLinear
from lowmem.nn.quantized import QuantizedWeight, WeightFormat
from lowmem.planning.predict import resolve_without_data
from lowmem.system.errors import ConfigError
from tests.reference.tiny_families import save_tiny

# grouped heads and a tied head; biases; fused layers; transposed layers
WIDE = {"hidden_size": 96, "intermediate_size": 96, "head_dim": 24}  # matrices of fewer than 4096 numbers are not quantised
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": WIDE | {"tie_word_embeddings": True},
    "qwen2": WIDE,
    "phi3": WIDE,
    "gpt2": {"n_embd": 96},
}
RANK = 6
ROUNDINGS = 300 * 2**-24  # sums of some hundred numbers in another order
INT8, INT4 = "train.weight_dtype=int8", "train.weight_dtype=int4"


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for family, shape in FAMILIES.items():
        save_tiny(root / family, family, **shape)
    return {family: root / family for family in FAMILIES}


def config_of(directory: Path, *overrides: str) -> RunConfig:
    given = ["device=cpu", "data.seq_len=16", "train.steps=3", "train.precision=fp32", f"model.path={directory}", *overrides]
    return resolve_without_data(load_run_config(overrides=given))


def model_of(directory: Path, *overrides: str) -> HuggingFaceModel:
    model = build_configured_model(config_of(directory, *overrides))
    assert isinstance(model, HuggingFaceModel)
    return model


def tokens(rows: int = 3, time: int = 16) -> torch.Tensor:
    return torch.randint(3, 300, (rows, time), generator=torch.Generator().manual_seed(rows))


def close(found: torch.Tensor, expected: torch.Tensor, roundings: float = ROUNDINGS) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=roundings * expected.abs().max().item())


def factored(model: HuggingFaceModel) -> dict[str, LoRPtLinear]:
    return {name: layer for name, layer in model.named_layers() if isinstance(layer, LoRPtLinear)}


def stored_matrix(model: Any, name: str) -> torch.Tensor:
    """(out, in), in fp64."""
    layer = model.get_submodule(name)
    weight = layer.weight.detach().double()
    return weight.t() if type(layer).__name__ == "Conv1D" else weight


@pytest.mark.parametrize("family", FAMILIES)
def test_factors_are_the_best_approximation(directories, family):
    base, model = (load_model(directories[family], torch.float32), model_of(directories[family], f"model.lorpt.rank={RANK}"))
    layers = factored(model)
    assert len(layers) == 2 * {"llama": 7, "qwen2": 7, "phi3": 4, "gpt2": 4}[family]
    for name, layer in layers.items():
        weight = stored_matrix(base, name).numpy()
        left, values, right = np.linalg.svd(weight)
        best = (left[:, :RANK] * values[:RANK]) @ right[:RANK]
        # a singular subspace turns by rounding / gap; the product is better determined than that, by the error it makes
        close(layer.up.detach().double() @ layer.down.detach().double(), torch.from_numpy(best), 30 * ROUNDINGS)
        error = np.linalg.norm(weight - (layer.up.detach().double() @ layer.down.detach().double()).numpy())
        assert error <= np.sqrt((values[RANK:] ** 2).sum()) * (1 + 1e-5)
        torch.testing.assert_close(layer.up.norm(dim=0), layer.down.norm(dim=1), rtol=1e-4, atol=1e-5)  # sqrt(S) on either side
        bias = base.get_submodule(name).bias
        assert (layer.bias is None) == (bias is None)
        if bias is not None:
            assert torch.equal(layer.bias, bias)
    assert all(parameter.requires_grad for parameter in model.parameters())
    close(model.eval()(tokens()).detach(), own_logits(model, tokens()).detach())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_weight_of_low_rank_is_reproduced(tmp_path, family):
    """At its own rank a factored model computes what the dense one does."""
    lm = save_tiny(tmp_path, family, **FAMILIES[family])
    for layer in lm.base_model.modules():
        if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D":
            left, values, right = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
            layer.weight.data = ((left[:, :RANK] * values[:RANK]) @ right[:RANK]).float()
    lm.save_pretrained(tmp_path)
    dense, model = model_of(tmp_path).eval(), model_of(tmp_path, f"model.lorpt.rank={RANK}").eval()
    assert factored(model)
    assert not factored(dense)
    # singular vectors are orthogonal to some 50 roundings, in layers whose differences add up
    close(model(tokens()).detach(), dense(tokens()).detach(), 10 * ROUNDINGS)


def test_patterns_and_groups_choose_layers(directories):
    patterns = 'model.lorpt.ranks={"model.layers.0.*": 0, "*.q_proj": 3, "*.down_proj": "auto"}'
    layers = factored(model_of(directories["qwen2"], f"model.lorpt.rank={RANK}", patterns))
    ranks = {name.partition("layers.")[2]: layer.rank for name, layer in layers.items()}
    assert ranks == {
        "1.self_attn.q_proj": 3, "1.self_attn.k_proj": RANK, "1.self_attn.v_proj": RANK, "1.self_attn.o_proj": RANK,
        "1.mlp.gate_proj": RANK, "1.mlp.up_proj": RANK, "1.mlp.down_proj": 24,
    }  # fmt: skip
    layers = factored(model_of(directories["phi3"], "model.lorpt.rank=auto", "model.lorpt.targets=[mlp]"))
    assert {name.rpartition(".")[2] for name in layers} == {"gate_up_proj", "down_proj"}


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("weights", [INT8, INT4])
def test_codes_stand_for_the_weights(directories, family, weights):
    """The model computes what the dense one computes with the numbers that its codes stand for."""
    bits = 8 if weights == INT8 else 4
    dense, model = model_of(directories[family]).eval(), model_of(directories[family], weights).eval()
    inside = {id(parameter) for parameter in model.blocks.parameters()}
    targets, found = dict(dense.named_parameters()), 0
    for name, parameter in model.named_parameters():
        if isinstance(parameter, QuantizedWeight):
            found += 1
            assert parameter.bits == (bits if id(parameter) in inside else 8)
            largest = parameter.scale.max().item()  # the distance of two codes, of which rounding errs by half
            assert (parameter.dense(torch.float32) - targets[name]).abs().max() <= 0.5001 * largest
            targets[name].data = parameter.dense(torch.float32)
        else:
            assert torch.equal(parameter, targets[name])
            assert parameter.ndim < 2 or parameter.numel() < 4096
    assert found > 6
    assert model.head_is_tied() is (family == "llama")
    close(model(tokens()).detach(), dense(tokens()).detach())
    close(model(tokens()).detach(), own_logits(model, tokens()).detach())
    for one in (model.train(), dense.train()):
        one(tokens(), tokens().roll(-1, 1), 48.0).backward()
    for (name, parameter), expected in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert parameter.grad is not None, name
        close(parameter.grad, expected.grad, 30 * ROUNDINGS)


@pytest.mark.parametrize("overrides", [
    ("model.lorpt.rank=6",), (INT8,), (INT4,), (INT8, "model.lorpt.rank=auto"),
])  # fmt: skip
@pytest.mark.parametrize("family", FAMILIES)
def test_an_outline_has_the_shapes_of_the_model(directories, family, overrides):
    if family == "gpt2" and overrides in ((INT8,), (INT4,)):
        with pytest.raises(ConfigError, match=r"int. stores linear layers, and the blocks of this model have none \(GPT-2 .* Conv1D\)"):
            model_of(directories[family], *overrides)
        return
    real = model_of(directories[family], *overrides)
    with torch.device("meta"):
        meta = model_of(directories[family], *overrides)
    assert meta.device.type == "meta"
    assert [(name, p.shape, p.dtype, type(p)) for name, p in real.named_parameters()] == [
        (name, p.shape, p.dtype, type(p)) for name, p in meta.named_parameters()
    ]
    assert real.component_bytes() == meta.component_bytes()
    assert "other" not in real.component_bytes()
    assert [type(module) for module in real.modules()] == [type(module) for module in meta.modules()]


@pytest.mark.parametrize("overrides", [("model.lorpt.rank=6",), (INT8,), (INT4, "model.lorpt.rank=auto")])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_a_layerwise_update_is_the_accumulated_one(directories, family, overrides):
    """Three micro-batches; without clipping, whose norms differ by design. The rounding of codes is drawn alike."""
    results = []
    windows = torch.randint(3, 300, (3, 17), generator=torch.Generator().manual_seed(1)).numpy()
    for update in ("accumulate", "layerwise"):
        model = model_of(directories[family], *overrides)
        model.activation_checkpointing = "block"
        optim, place = OptimConfig(state_bits=8, clip=0.0), {"device": torch.device("cpu"), "precision": "fp32", "micro_batch_size": 1}
        engine = (
            LocalEngine(model, optim, seed=1, **place) if update == "accumulate"
            else LayerwiseEngine(model, optim, TrainConfig(update="layerwise", seed=1), **place)
        )  # fmt: skip
        loss = engine.step(Batch.from_windows(windows), 1e-2).loss
        results.append((loss, {name: p.detach().clone() for name, p in model.named_parameters()}))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for name, one in results[0][1].items():
        other = results[1][1][name]
        step = one.scale.max().item() if isinstance(one, QuantizedWeight) else 0.0  # a draw near its border may fall to the other code
        a, b = one.dense(torch.float32) if step else one, other.dense(torch.float32) if step else other
        # Adam's first step is lr * g / |g|: gradients near zero may change their sign, and are few
        differing = ((a - b).abs() > max(1e-5, 1e-5 * a.abs().max().item())).float().mean().item()
        assert differing < 0.01, (name, differing)


@pytest.mark.parametrize("overrides, module, name", [
    (("model.lorpt.rank=6",), lorptize, "_best_factors"), ((INT8,), huggingface_weights, "quantize"),
])  # fmt: skip
def test_a_model_that_is_read_is_never_whole(directories, monkeypatch, overrides, module, name):
    """Of the matrices that are read one at a time is there while it is factored or quantised; those that are kept as they are stay."""
    read: list[Any] = []
    get, usual, most = StoredTensor.__getitem__, getattr(module, name), 0

    def reading(tensor: StoredTensor, index: Any) -> torch.Tensor:
        made = get(tensor, index)
        if "layers" in tensor.name and made.ndim == 2:
            read.append(weakref.ref(made.untyped_storage()))
        return made

    def watching(*given: Any) -> Any:
        nonlocal most
        most = max(most, sum(reference() is not None for reference in read))
        return usual(*given)

    monkeypatch.setattr(StoredTensor, "__getitem__", reading)
    monkeypatch.setattr(module, name, watching)
    model_of(directories["qwen2"], *overrides)
    assert len(read) == 14
    assert most == 1


@pytest.mark.parametrize("kept", [Kept(WeightFormat(torch.float32, 8)), Kept(WeightFormat(torch.float32), lorpt=LorptConfig(rank=4))])
def test_a_model_that_is_gone_leaves_nothing(directories, kept):
    """Without a collection of cycles: classes that are made while a model is read must not hold it."""
    gc.collect()
    gc.disable()
    try:
        model = load_model(directories["llama"], torch.float32, kept=kept)
        gone = [weakref.ref(model), *(weakref.ref(part) for _, part in model.named_parameters())]
        del model
        assert not any(reference() is not None for reference in gone)
    finally:
        gc.enable()


def test_weights_that_are_not_finite_are_refused(directories, tmp_path):
    from lowmem.system.errors import CheckpointError

    lm = save_tiny(tmp_path, "llama", **FAMILIES["llama"])
    lm.model.layers[1].mlp.up_proj.weight.data[3, 2] = float("nan")
    lm.save_pretrained(tmp_path)
    for overrides in (("model.lorpt.rank=4",), (INT8,)):
        with pytest.raises(CheckpointError, match=r"holds weights that are not finite \(model.layers.1.mlp.up_proj.weight\)"):
            model_of(tmp_path, *overrides)


@pytest.mark.parametrize("overrides, message", [
    (("model.lorpt.rank=60",), r"model.lorpt, layer model.layers.0.self_attn.q_proj: the LoRPt rank of a 96x96 layer is 60"),
    (("model.lorpt.rank=4", 'model.lorpt.ranks={"*.query": 2}'), r"model.lorpt.ranks has \*.query, which matches no layer of"),
    (('model.lorpt.ranks={"*": 0}', "model.lorpt.rank=4"), "model.lorpt factors no layer of this llama model"),
])  # fmt: skip
def test_ranks_that_cannot_be_are_one_line(directories, overrides, message):
    for device in ("cpu", "meta"):
        with torch.device(device), pytest.raises(ConfigError, match=message) as raised:
            model_of(directories["llama"], *overrides)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("overrides, message", [
    (("model.lorpt.rank=4", "model.lorpt.bottleneck=silu"), "model.lorpt.bottleneck is silu, which does not work with model.path"),
    (("model.lorpt.rank=4", "model.lorpt.init=spectral"), "model.lorpt.init is spectral, which does not work with model.path"),
    (("model.lorpt.rank=4", "model.lorpt.share_down=true"), "model.lorpt.share_down is True, which does not work with model.path"),
    (("model.lorpt.rank=4", "model.lorpt.targets=[mlp,head]"), "only layers of its blocks are factored; leave out head"),
    (("model.lorpt.rank=4", "adapter.method=lora"), "model.lorpt trains factors of all weights and adapter.method=lora"),
    (('model.lorpt.ranks={"*.q_proj": 4}', "adapter.method=last_k"), "and adapter.method=last_k a part beside them"),
    (("model.lorpt.grow_to=8",), "but model.lorpt.rank is 0"),
    ((INT8, "adapter.method=lora"), "train.weight_dtype=int8 trains every weight, found adapter.method=lora; use train.weight_dtype=nf4"),
    ((INT4, 'data.add_tokens=["<a>"]'), "train.weight_dtype=int4 does not work with data.add_tokens"),
    ((INT8, "model.lorpt.rank=4", "model.lorpt.grow_to=8", "train.eval_every=2"), "does not work with model.lorpt.schedule and grow_to"),
    ((INT8, "engine.name=deepspeed"), "does not work with engine.name=deepspeed"),
])  # fmt: skip
def test_what_does_not_go_together_is_one_line(directories, overrides, message):
    with pytest.raises(ConfigError) as raised:
        config_of(directories["llama"], *overrides)
    lines = str(raised.value).splitlines()
    assert sum(message in line for line in lines) == 1


def test_what_goes_together_has_no_problems(directories):
    for overrides in (
        ("model.lorpt.rank=4", "model.lorpt.schedule={2: 6}"),
        (INT8, "model.lorpt.rank=auto"),
        (INT4, "train.update=layerwise"),
    ):
        assert config_problems(config_of(directories["qwen2"], *overrides)) == []
