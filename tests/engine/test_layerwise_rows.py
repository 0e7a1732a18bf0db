"""A layerwise step whose head and embedding go by rows: the gradients of plain accumulation, sums in fp32, no whole gradients."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem.config.schema import ModelConfig, OptimConfig, TrainConfig
from lowmem.data.batch import IGNORE_INDEX, Batch
from lowmem.engine.layerwise import LayerwiseEngine
from lowmem.engine.local import LocalEngine
from lowmem.models.base import LanguageModel, LossOptions
from lowmem.models.registry import build_model
from lowmem.nn import loss
from tests.reference.tiny_families import SHAPES

VOCAB, SEQ_LEN, GLOBAL_BATCH, LR, ROWS = 320, 16, 6, 1e-2, 32
CPU = torch.device("cpu")
MODELS = ("tied", "untied", "learned", "gemma2", "gpt2", "granite", "opt")


def make_model(name: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    if name in ("tied", "untied", "learned"):
        shape = ModelConfig(
            dim=32, num_layers=2, num_heads=2, tie_embeddings=name != "untied", positions="learned" if name == "learned" else "rope"
        )
        model = build_model(shape, vocab_size=VOCAB, max_seq_len=SEQ_LEN, seed=0, dtype=dtype)
    else:
        from transformers import AutoConfig, AutoModelForCausalLM

        from lowmem.models.huggingface import HuggingFaceModel

        torch.manual_seed(0)
        more = {"final_logit_softcapping": 3.0} if name == "gemma2" else {"tie_word_embeddings": True} if name == "granite" else {}
        model = HuggingFaceModel(AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **(SHAPES[name] | more))).to(dtype))
    model.activation_checkpointing, model.loss_options = "block", LossOptions(chunk_tokens=32)
    return model


def layerwise(model: LanguageModel, micro: int = 2, precision: str = "fp32", **optim: Any) -> LayerwiseEngine:
    config = OptimConfig(**{"lr": LR, "clip": 0.0, **optim})
    return LayerwiseEngine(model, config, TrainConfig(update="layerwise"), device=CPU, precision=precision, micro_batch_size=micro)


def make_batch(seed: int = 0) -> Batch:
    """Few tokens are most of the text, one of them the padding of the families; rows with different numbers of targets."""
    tokens = (np.random.default_rng(seed).pareto(0.7, (GLOBAL_BATCH, SEQ_LEN + 1)) * 2).astype(np.int64) % VOCAB
    batch = Batch.from_windows(tokens)
    targets = batch.targets.copy()
    for row in range(GLOBAL_BATCH):
        targets[row, : 2 * row % SEQ_LEN] = IGNORE_INDEX
    return Batch(batch.inputs, targets)


def applied_gradients(engine: LayerwiseEngine, batch: Batch, lr: float = 0.0) -> tuple[dict[str, torch.Tensor], Any]:
    """What the optimizer is given during one step, by the name of its parameter; each number exactly once."""
    names = {id(parameter): name for name, parameter in engine.model.named_parameters()}
    found: dict[str, torch.Tensor] = {}
    apply = engine.optimizer.apply

    def record(parameter: torch.Tensor, window: Any, grad: torch.Tensor, *, start: int = 0, grad_scale: float = 1.0) -> None:
        flat = found.setdefault(names[id(parameter)], torch.full((parameter.numel(),), math.nan))
        assert flat[start : start + grad.numel()].isnan().all()
        flat[start : start + grad.numel()] = grad.float() * grad_scale
        apply(parameter, window, grad, start=start, grad_scale=grad_scale)

    engine.optimizer.apply = record
    result = engine.step(batch, lr)
    return {name: flat.view(dict(engine.model.named_parameters())[name].shape) for name, flat in found.items()}, result


@pytest.fixture(autouse=True)
def _small_blocks_of_rows(monkeypatch):
    monkeypatch.setattr(loss, "GRAD_BLOCK_ROWS", ROWS)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_by_rows_are_those_of_accumulation(name):
    model = make_model(name)
    engine = layerwise(copy.deepcopy(model))
    assert engine.embedding.lookup is not None
    assert engine.head._by_rows(GLOBAL_BATCH * SEQ_LEN, engine.model.dense_head().weight)
    reference = LocalEngine(model, OptimConfig(lr=LR, clip=0.0), device=CPU, precision="fp32", micro_batch_size=GLOBAL_BATCH)
    reference._accumulate(make_batch())
    expected = {key: parameter.grad for key, parameter in model.named_parameters()}
    found, result = applied_gradients(engine, make_batch())
    assert found.keys() == expected.keys()
    whole = sum(gradient.norm() ** 2 for gradient in expected.values()) ** 0.5
    for key, gradient in found.items():
        # fp32 sums of the same terms in another order, as in test_layerwise_engine
        assert (gradient - expected[key]).norm() <= 2e-6 * max(expected[key].norm(), 1e-3 * whole), key
    assert result.grad_norm == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["tied", "untied", "gpt2"])
def test_no_tensor_of_the_size_of_the_embedding_comes_and_goes_but_the_share_of_a_tied_head(name, monkeypatch):
    engine = layerwise(make_model(name))
    engine.step(make_batch(), LR)
    size, made = engine.embedding.lookup.numel(), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            known = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage()._cdata not in known and out.numel() >= size:
                made.append((str(func), tuple(out.shape)))
            return out

    with Watch():
        engine.step(make_batch(1), LR)
    assert made == ([] if name == "untied" else [("aten.empty.memory_format", (VOCAB, 32))])


@pytest.mark.parametrize("dtype, state_bits", [(torch.bfloat16, 8), (torch.float32, 4), (torch.float32, 32)])
def test_an_embedding_by_rows_learns_what_a_whole_one_learns(dtype, state_bits):
    """Every row moves in every step, with a token or without."""
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    one, other = (layerwise(make_model("untied", dtype), precision=precision, eps=1.0, state_bits=state_bits) for _ in range(2))
    other.embedding.lookup = None
    for seed in range(4):
        results = [engine.step(make_batch(seed), LR) for engine in (one, other)]
        assert results[0].loss == pytest.approx(results[1].loss, rel=2**-8 if precision == "bf16" else 1e-5)
    assert one.optimizer.state[one.embedding.lookup]["step"] == 4


def test_frequent_tokens_of_bf16_lose_no_digits():
    model = make_model("untied", torch.bfloat16)
    tokens = torch.from_numpy((np.random.default_rng(0).zipf(1.3, (4, 4096)) - 1) % VOCAB)
    grad = torch.randn(4, 4096, 32, generator=torch.Generator().manual_seed(1)).bfloat16() + 0.1
    exact = torch.zeros(VOCAB, 32, dtype=torch.float64).index_add_(0, tokens.flatten(), grad.double().flatten(0, 1))
    engine = layerwise(model, precision="bf16")
    found: dict[int, torch.Tensor] = {}
    engine.updates.apply_rows = lambda matrix, first, rows, unscale: found.update({first: rows.clone()}) or True
    slices = [slice(0, 3), slice(3, 4)]
    engine.embedding.update(tokens, None, grad.clone(), {}, slices)
    new = torch.cat(list(found.values()))
    pairs = layerwise(make_model("untied", torch.bfloat16), precision="bf16").embedding._whole(tokens, None, grad, {})
    (old,) = (gradient for _, gradient in pairs)
    assert (new.dtype, old.dtype) == (torch.float32, torch.bfloat16)
    # fp32 sums of up to 5,000 terms of one sign; bf16 rounds each sum to 2^-9 of its size
    assert (new.double() - exact).norm() < 1e-5 * exact.norm()
    assert (old.double() - exact).norm() > 100 * (new.double() - exact).norm()


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_a_gradient_that_is_not_finite_leaves_the_whole_embedding(name):
    engine = layerwise(make_model(name), state_bits=8)
    engine.step(make_batch(), LR)
    weight = engine.embedding.lookup
    before = weight.detach().clone()
    read = engine.model.embed

    def infinite(*args: Any, **more: Any) -> torch.Tensor:
        hidden = read(*args, **more)
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: torch.full_like(gradient, math.inf))
        return hidden

    engine.model.embed = infinite
    result = engine.step(make_batch(1), LR)
    assert (result.skipped, math.isfinite(result.loss)) == ("nonfinite", True)
    assert torch.equal(weight, before)
    del engine.model.embed
    assert not engine.step(make_batch(2), LR).skipped


def test_a_tied_heads_gradient_that_is_not_finite_changes_nothing(monkeypatch):
    engine = layerwise(make_model("tied"))
    engine.step(make_batch(), LR)
    before = {name: parameter.detach().clone() for name, parameter in engine.model.named_parameters()}
    gradients = loss.CrossEntropyByRows.gradients
    monkeypatch.setattr(
        loss.CrossEntropyByRows,
        "gradients",
        lambda self: ((first, rows * (math.inf if first else 1), b) for first, rows, b in gradients(self)),
    )
    assert engine.step(make_batch(1), LR).skipped == "nonfinite"
    assert all(torch.equal(parameter, before[name]) for name, parameter in engine.model.named_parameters())


def test_a_frozen_tied_head_and_embedding_stay():
    model = make_model("gpt2")
    model.lm.get_input_embeddings().weight.requires_grad_(False)
    engine = layerwise(model)
    assert engine.embedding.lookup is None
    before = model.lm.get_input_embeddings().weight.detach().clone()
    assert not engine.step(make_batch(), LR).skipped
    assert torch.equal(model.lm.get_input_embeddings().weight, before)


@pytest.mark.parametrize("width", [128, 96])
def test_quantised_embeddings_go_by_rows(width):
    from lowmem.nn.quantized import QuantizedWeight, WeightFormat

    shape = ModelConfig(dim=width, num_layers=1, num_heads=2, tie_embeddings=True)
    model = build_model(shape, vocab_size=VOCAB, max_seq_len=SEQ_LEN, seed=0, dtype=WeightFormat(torch.bfloat16, 8))
    model.activation_checkpointing, model.loss_options = "block", LossOptions(chunk_tokens=32)
    engine = layerwise(model, precision="bf16", state_bits=8)
    assert isinstance(engine.embedding.lookup, QuantizedWeight)
    losses = [engine.step(make_batch(), LR).loss for _ in range(6)]
    assert losses[-1] < losses[0] - 0.2


def test_token_ids_used_for_more_than_a_lookup_keep_the_gradient_whole():
    model = make_model("gpt2")
    assert model.lookup_parameter() is model.lm.get_input_embeddings().weight
    words = model.lm.get_input_embeddings()
    words.register_forward_hook(lambda module, inputs, output: output * (inputs[0] != 7).unsqueeze(-1))
    assert model.lookup_parameter() is None
