"""Gradients of 16-bit weights against sums in fp64: many tokens, one of them half of all, and terms that do not cancel."""

import numpy as np
import pytest
import torch
from torch import nn

from lowmem.config.schema import LorptConfig, ModelConfig, OptimConfig, TrainConfig
from lowmem.data.batch import Batch
from lowmem.engine.layerwise import LayerwiseEngine
from lowmem.models.registry import build_model
from lowmem.nn.causal_attention import causal_attention
from lowmem.nn.layers import LayerNorm
from lowmem.nn.positions import LearnedPositions, alibi_slopes
from lowmem.nn.quantized import WeightFormat

TOKENS, VOCAB, DIM = 32768, 256, 48
BF16, FP16 = torch.bfloat16, torch.float16
STORED = {"bf16": BF16, "fp16": FP16, "int8": WeightFormat(BF16, 8), "int4": WeightFormat(BF16, 4)}
# a sum in fp32 of 2^14 terms is off by 2^14 * 2^-24 of the terms' magnitudes at most, by far less as they round to either side;
# then it is rounded once, to 8 or 11 bits
ROUNDING = {BF16: 2**-8, FP16: 2**-11}


def zipf_tokens(rows: int) -> torch.Tensor:
    """(rows, TOKENS / rows): frequencies fall as 1 / rank, token 0 is half of all."""
    frequency = 1 / torch.arange(1, VOCAB + 1, dtype=torch.float64)
    frequency[0] = frequency[1:].sum()
    return torch.multinomial(frequency, TOKENS, replacement=True, generator=torch.Generator().manual_seed(0)).view(rows, -1)


def terms(rows: int, dtype: torch.dtype, width: int = DIM) -> torch.Tensor:
    """Gradients with a mean, so that they add up."""
    generator = torch.Generator().manual_seed(1)
    return (0.03 + 0.1 * torch.randn(rows, TOKENS // rows, width, generator=generator)).to(dtype)


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def decoder(stored, **choices) -> nn.Module:
    config = ModelConfig(dim=DIM, num_layers=1, num_heads=2, **choices)
    return build_model(config, vocab_size=VOCAB, max_seq_len=64, seed=0, dtype=STORED[stored])


def small_i3(stored) -> nn.Module:
    config = ModelConfig(name="i3", dim=DIM, num_layers=1, attention_rank=8, lorpt=LorptConfig(rank=8))
    return build_model(config, vocab_size=VOCAB, max_seq_len=64, seed=0, dtype=STORED[stored])


@pytest.mark.parametrize("make", [decoder, small_i3])
@pytest.mark.parametrize("stored", STORED)
def test_an_embedding_sums_its_gradient_in_fp32(make, stored):
    model, tokens = make(stored), zipf_tokens(512)
    weight = model.embedding.weight
    grad = terms(512, weight.dtype)
    (found,) = torch.autograd.grad(model.embed(tokens), weight, grad)
    exact = torch.zeros(VOCAB, DIM, dtype=torch.float64).index_add_(0, tokens.flatten(), grad.flatten(0, 1).double())
    assert found.dtype == weight.dtype
    assert relative(found, exact) < ROUNDING[weight.dtype]
    assert relative(found[0], exact[0]) < ROUNDING[weight.dtype]


@pytest.mark.parametrize("dtype", ROUNDING)
def test_learned_positions_of_segments_sum_their_gradient_in_fp32(dtype):
    positions = LearnedPositions(64, DIM).to(dtype)
    grad = terms(512, dtype)
    segments = torch.arange(64).div(8, rounding_mode="floor").expand(512, -1).to(torch.int32)  # 8 of 8 tokens a row
    hidden = torch.zeros(512, 64, DIM, dtype=dtype)
    (found,) = torch.autograd.grad(positions(hidden, 0, segments), positions.weight, grad)
    exact = torch.zeros(64, DIM, dtype=torch.float64)
    exact[:8] = grad.double().view(512, 8, 8, DIM).sum((0, 1))
    assert relative(found, exact) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("stored", ["same", "fp32"])
def test_a_layer_norm_sums_the_gradients_of_its_weights_in_fp32(dtype, stored):
    x, grad = terms(1, dtype)[0] + 0.5, terms(1, dtype)[0].flip(0)
    layer = LayerNorm(DIM).to(dtype if stored == "same" else torch.float32)
    of_weight, of_bias = torch.autograd.grad(layer(x), [layer.weight, layer.bias], grad)
    exact = LayerNorm(DIM).double()
    of_weight64, of_bias64 = torch.autograd.grad(exact(x.double()), [exact.weight, exact.bias], grad.double())
    assert relative(of_bias, of_bias64) < ROUNDING[dtype]
    assert relative(of_weight, of_weight64) < ROUNDING[dtype]


@pytest.mark.parametrize("kind", ["dense", "learned", "i3"])
def test_the_norm_of_a_layerwise_step_in_bf16_is_that_in_fp32(kind):
    """Bytes of Zipf's frequencies: the embedding's gradient is the larger part of the norm."""
    shape = {"dim": 32, "num_layers": 1}
    configs = {
        "dense": ModelConfig(**shape, num_heads=2),
        "learned": ModelConfig(**shape, num_heads=2, positions="learned"),
        "i3": ModelConfig(**shape, name="i3", attention_rank=8, lorpt=LorptConfig(rank=8)),
    }
    batch = Batch.from_windows(zipf_tokens(512).numpy().astype(np.int64))
    norms = []
    for dtype in (torch.float32, BF16):
        model = build_model(configs[kind], vocab_size=VOCAB, max_seq_len=63, seed=0, dtype=dtype)
        optim, train = OptimConfig(clip_by="previous"), TrainConfig(update="layerwise")
        precision = "fp32" if dtype == torch.float32 else "bf16"
        engine = LayerwiseEngine(model, optim, train, device=torch.device("cpu"), precision=precision, micro_batch_size=128)
        norms.append(engine.step(batch, 1e-3).grad_norm)
    # the mean of many roundings to 8 bits, weights included: far below one rounding, 0.4 %
    assert norms[1] == pytest.approx(norms[0], rel=3e-3)


def test_a_model_of_transformers_sums_the_gradients_of_embedding_and_norm_in_fp32(tmp_path):
    transformers = pytest.importorskip("transformers")
    from lowmem.engine.huggingface_files import load_model
    from lowmem.models.huggingface import HuggingFaceModel

    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=DIM, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = HuggingFaceModel(load_model(tmp_path, BF16)).lm
    tokens, grad = zipf_tokens(512), terms(512, BF16)
    embedding, norm = model.get_input_embeddings().requires_grad_(), model.transformer.ln_f.requires_grad_()
    device = embedding.weight.device
    (found,) = torch.autograd.grad(embedding(tokens.to(device)), embedding.weight, grad.to(device))
    exact = torch.zeros(VOCAB, DIM, dtype=torch.float64).index_add_(0, tokens.flatten(), grad.flatten(0, 1).double())
    assert relative(found.cpu(), exact) < ROUNDING[BF16]
    (found,) = torch.autograd.grad(norm(grad.flip(0).to(device)), norm.bias, grad.to(device))
    assert relative(found.cpu(), grad.double().sum((0, 1))) < ROUNDING[BF16]


HEADS, TIME, WIDTH = 4, 192, 64


def attended(dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v of scores whose standard deviation is 3, and the gradient of the output."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(2, HEADS, TIME, WIDTH)] * 3 + [(2, TIME, HEADS * WIDTH)]
    stds = (3**0.5, 3**0.5, 1.0, 1.0)
    return [(std * torch.randn(shape, generator=generator)).to(dtype) for std, shape in zip(stds, shapes, strict=True)]


def errors(function, dtype: torch.dtype) -> list[float]:
    """Of the output and of the gradients of q, k and v, against fp64."""
    *inputs, grad = attended(dtype)
    results = []
    for precision in (dtype, torch.float64):
        leaves = [x.to(precision, copy=True).requires_grad_() for x in inputs]
        output = function(*leaves)
        results.append([output, *torch.autograd.grad(output, leaves, grad.to(precision))])
    return [relative(found, exact) for found, exact in zip(*results, strict=True)]


def fused(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


SEGMENTS = torch.arange(TIME).div(70, rounding_mode="floor").expand(2, -1).to(torch.int32)
KINDS = {
    "plain": causal_attention,
    "alibi": lambda q, k, v: causal_attention(q, k, v, alibi_slopes(HEADS)),
    "segments": lambda q, k, v: causal_attention(q, k, v, (), SEGMENTS),
    "grouped": lambda q, k, v: causal_attention(q, *(x[:, ::2].repeat_interleave(2, dim=1) for x in (k, v))),
}


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_on_a_cpu_rounds_its_result_and_not_its_scores(kind, dtype):
    output, *gradients = errors(KINDS[kind], dtype)
    # a rounding is off by half a unit at most, by a quarter on average: 2^-9 in bf16, 2^-12 in fp16
    unit = {BF16: 2**-9, FP16: 2**-12}[dtype]
    assert output < unit
    # where a CPU multiplies bf16: the gradients of weights, those of scores and the result are rounded, a fourth time where grouped
    assert max(gradients) < 2 * unit


def test_attention_on_a_cpu_is_as_exact_as_the_fused_kernel():
    # two samples of the same kind of error, over 10^5 elements
    for found, theirs in zip(errors(causal_attention, BF16), errors(fused, BF16), strict=True):
        assert found < 1.02 * theirs
