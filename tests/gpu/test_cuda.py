"""The local engine, memory limits and generation on a CUDA device.

lowmem itself asks for no deterministic kernels: fused attention adds up its gradients in the order in which blocks finish.
Here `torch.use_deterministic_algorithms(True)` is on while runs are compared to the bit, as a user who wants exact resume on
a GPU has to have it. Sampling is left out of that: torch has no deterministic cumsum of floats on CUDA.
"""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lowmem.config.schema import LorptConfig, ModelConfig, OptimConfig
from lowmem.data.batch import Batch
from lowmem.data.tokenizers import ByteTokenizer
from lowmem.engine.local import LocalEngine
from lowmem.engine.state import optimizer_tensors
from lowmem.generation import generate
from lowmem.generation.sampling import SamplingOptions
from lowmem.memory.limits import limit_cuda_memory
from lowmem.memory.measure import cuda_allocated_bytes, cuda_reserved_bytes, measure_peak
from lowmem.models.base import LanguageModel
from lowmem.models.registry import build_model
from lowmem.nn.causal_attention import causal_attention
from lowmem.nn.layers import embedding_gradient
from lowmem.system.devices import Precision, cuda_has_native_bf16, cuda_problem
from tests.train.tiny_run import lowmem, tiny_arguments, write_text

# cuBLAS reads it once, at the first matrix product of the process, which another test file may do before this one.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(cuda_problem()), reason=f"no CUDA device to use: {cuda_problem()}")]

VOCAB, SEQ_LEN, GLOBAL_BATCH, LR = 67, 32, 8, 1e-2
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
MODELS = {
    "decoder": ModelConfig(dim=32, num_layers=2, num_heads=2),
    "i3": ModelConfig(name="i3", dim=32, num_layers=2, attention_rank=4, lorpt=LorptConfig(rank=4)),
    "lorpt": ModelConfig(dim=32, num_layers=2, num_heads=2, lorpt=LorptConfig(rank=4, targets=["attention", "mlp"], bottleneck="silu")),
}


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_model(name: str, vocab_size: int = VOCAB, max_seq_len: int = SEQ_LEN) -> LanguageModel:
    return build_model(MODELS[name], vocab_size=vocab_size, max_seq_len=max_seq_len, seed=0)


def make_engine(model: str, device: torch.device = CUDA, precision: Precision = "fp32", **optim) -> LocalEngine:
    config = OptimConfig(**{"lr": LR, **optim})
    return LocalEngine(make_model(model), config, device=device, precision=precision, micro_batch_size=GLOBAL_BATCH // 2)


def make_batch(seed: int) -> Batch:
    return Batch.from_windows(np.random.default_rng(seed).integers(0, VOCAB, (GLOBAL_BATCH, SEQ_LEN + 1)))


def bits(engine: LocalEngine) -> dict[str, bytes]:
    """Weights and optimizer states as they lie in memory."""
    tensors, _ = optimizer_tensors(engine.model, engine.optimizer)
    tensors |= {f"weights of {name}": parameter for name, parameter in engine.model.named_parameters()}
    return {name: tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def skip_without(precision: Precision) -> None:
    if precision == "bf16" and not cuda_has_native_bf16():
        pytest.skip("this device does not multiply bf16")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", MODELS)
def test_training_lowers_the_loss_and_resumes_bit_for_bit(deterministic, tmp_path: Path, name: str, precision: Precision):
    skip_without(precision)
    straight = make_engine(name, precision=precision)
    results = [straight.step(make_batch(0), LR) for _ in range(12)]
    updates = [result.loss for result in results if not result.skipped]
    assert {result.skipped for result in results} <= ({"", "loss_scale"} if precision == "fp16" else {""})
    assert len(updates) >= 6
    assert updates[-1] < updates[0] - 0.1
    torch.cuda.manual_seed(11)
    state = straight.save(tmp_path)
    expected_random = torch.rand(3, device=CUDA)
    resumed = make_engine(name, precision=precision)
    resumed.step(make_batch(99), LR)  # states that loading has to replace
    resumed.load(tmp_path, state)
    assert torch.equal(torch.rand(3, device=CUDA), expected_random)
    assert bits(resumed) == bits(straight)
    for seed in range(1, 5):
        assert resumed.step(make_batch(seed), LR) == straight.step(make_batch(seed), LR)
    assert bits(resumed) == bits(straight)
    assert resumed.scaler.state_dict() == straight.scaler.state_dict()


@pytest.mark.parametrize("name", MODELS)
def test_fp32_losses_are_those_of_the_cpu(name: str):
    assert not torch.backends.cuda.matmul.allow_tf32  # ten bits of mantissa would be another computation
    # With eps = 1 the update lr * m / (sqrt(v) + 1) is smooth in the gradient; with AdamW's usual eps the sign of a gradient that is
    # zero up to rounding would decide.
    here, there = make_engine(name, CPU, eps=1.0), make_engine(name, CUDA, eps=1.0)
    for step in range(8):
        one, other = here.step(make_batch(step), LR), there.step(make_batch(step), LR)
        # One loss: sums of at most 256 products in another order, in a chain of about 20 matrix products: rounding grows as
        # sqrt(256 * 20) * 2^-24 = 4e-6 relative. Eight updates of at most lr * |g| add lr * 8 * 4e-6, which is nothing beside that.
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)  # gradients cancel where losses do not: ten times more
    batches = [make_batch(100), make_batch(101).rows(0, 3)]
    assert there.evaluate(batches) == pytest.approx(here.evaluate(batches), rel=1e-5)


@pytest.mark.parametrize("precision, tolerance", [("bf16", 2**-6), ("fp16", 2**-9)])
@pytest.mark.parametrize("name", MODELS)
def test_narrow_losses_are_near_those_of_fp32(name: str, precision: Precision, tolerance: float):
    """bf16 keeps 8 bits of each factor, fp16 11: a logit of size 1 errs by a few of its last bits, 4 * 2^-8 and 4 * 2^-11, and the
    mean loss of 4.2 by no more than its worst logit."""
    skip_without(precision)
    expected = make_engine(name).evaluate([make_batch(0)])
    assert make_engine(name, precision=precision).evaluate([make_batch(0)]) == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("bits", [32, 8])
def test_spectron_steps_are_those_of_the_cpu_and_survive_a_change_of_rank(bits: int):
    here, there = (make_engine("lorpt", device, name="spectron", state_bits=bits) for device in (CPU, CUDA))
    for step in range(4):
        if step == 2:
            for engine in (here, there):
                engine.set_rank(6, {}, seed=1, step=0)
        one, other = here.step(make_batch(step), LR), there.step(make_batch(step), LR)
        # rounding of the gradients, 4e-6 as above, is amplified by at most 3.4445^5 = 485 where a singular value is small
        assert other.loss == pytest.approx(one.loss, rel=2e-3)


@pytest.mark.parametrize("mode", ["selective", "low_rank"])
def test_recomputation_changes_no_bit_of_a_low_rank_step(deterministic, mode: str):
    losses = []
    for chosen in ("none", mode):
        engine = make_engine("lorpt")
        engine.model.activation_checkpointing = chosen
        losses.append([engine.step(make_batch(step), LR).loss for step in range(3)])
    assert losses[0] == losses[1]


def test_a_checkpoint_of_the_gpu_goes_on_on_a_cpu(tmp_path: Path):
    engine, other = make_engine("decoder"), make_engine("decoder", CPU)
    engine.step(make_batch(0), LR)
    other.load(tmp_path, engine.save(tmp_path))
    assert bits(other) == bits(engine)
    assert other.step(make_batch(1), LR).skipped == ""
    assert {tensor.device for tensor in optimizer_tensors(other.model, other.optimizer)[0].values()} == {CPU}


def test_measured_peaks_count_what_was_alive_at_once():
    torch.zeros(1, device=CUDA)  # measuring never creates the CUDA context itself
    gc.collect()  # what earlier tests left must not go away in between
    before, size = cuda_allocated_bytes(), 64 << 20
    with measure_peak() as peak:
        one = torch.empty(size, dtype=torch.uint8, device=CUDA)
        two = torch.empty(size, dtype=torch.uint8, device=CUDA)
        del two
        assert cuda_allocated_bytes() >= before + size
        del one
    assert before + 2 * size <= peak.cuda_allocated_peak_bytes < before + 2 * size + (4 << 20)  # blocks are rounded up to 2 MiB
    assert peak.cuda_reserved_peak_bytes >= peak.cuda_allocated_peak_bytes
    torch.cuda.empty_cache()
    assert 0 <= cuda_allocated_bytes() <= cuda_reserved_bytes()
    with measure_peak() as later:
        torch.empty(1 << 20, dtype=torch.uint8, device=CUDA)
    assert before + (1 << 20) <= later.cuda_allocated_peak_bytes < before + size  # the earlier peak is not in it


def test_a_training_step_shows_in_the_peaks():
    engine = make_engine("decoder")
    with measure_peak() as peak:
        engine.step(make_batch(0), LR)
    components = engine.memory_components()
    assert peak.cuda_allocated_peak_bytes >= sum(components.values())
    assert components["optimizer_states"] >= 2 * components["weights"]


def test_a_limit_above_the_device_is_refused():
    total = torch.cuda.get_device_properties(CUDA).total_memory
    with pytest.raises(ValueError, match="budget.vram is .*, the device has "):
        limit_cuda_memory(total + (1 << 30), CUDA)


@pytest.mark.slow
def test_a_run_beyond_budget_vram_ends_with_3_and_one_within_it_trains(tmp_path: Path):
    text = write_text(tmp_path / "text.txt")
    cuda = {"device": "cuda", "budget.vram": "400MiB", "train.precision": "fp32", "train.steps": 3}
    # 12 layers of 1024: at least 12 * 12 * 1024^2 weights of 4 bytes = 604 MB before any gradient
    big = {"model.dim": 1024, "model.num_layers": 12, "model.num_heads": 8}
    refused = lowmem("pretrain", "--quiet", "--force", *tiny_arguments(tmp_path / "big", text, **cuda, **big))
    assert refused.returncode == 3, refused.stderr
    assert "memory ran out" in refused.stderr
    assert "budget.vram=400MiB" in refused.stderr
    assert "Traceback" not in refused.stderr
    fitting = lowmem("pretrain", "--quiet", *tiny_arguments(tmp_path / "small", text, **cuda))
    assert fitting.returncode == 0, fitting.stderr


@pytest.mark.parametrize("name", MODELS)
def test_cached_generation_equals_uncached(name: str):
    tokenizer = ByteTokenizer()
    model = make_model(name, vocab_size=tokenizer.vocab_size, max_seq_len=64).to(CUDA)
    result = generate(model, tokenizer, "def f", SamplingOptions(temperature=0), 40)
    ids = torch.tensor([tokenizer.encode("def f") + result.token_ids], device=CUDA)
    model.eval()
    with torch.no_grad():
        logits = model(ids)[0]
        cache = model.new_cache(1, 64)
        cached = torch.cat([model(ids[:, i : i + 1], cache=cache)[0] for i in range(ids.shape[1])])
    # Logits of size 0.5 after chains of products of at most 128 terms, summed in other orders by the kernels for one token and for
    # many: 16 times the 2^-24 of each keeps 1e-6 within 2e-5.
    torch.testing.assert_close(cached, logits, rtol=0, atol=2e-5)
    for position, token in enumerate(result.token_ids, start=result.prompt_tokens - 1):
        assert logits[position, token] >= logits[position].max() - 4e-5  # the best one, up to ties within rounding
    again = generate(model, tokenizer, "def f", SamplingOptions(temperature=0), 40)
    assert again.token_ids == result.token_ids


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_over_tokens_are_those_of_fp64(dtype: torch.dtype):
    """An embedding of which one row is chosen by half of all tokens, and attention of packed rows, at scores of std 3."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (2048,), generator=generator)
    tokens[::2] = 7
    grad = (0.03 + 0.1 * torch.randn(2048, 40, generator=generator)).to(dtype)
    exact = torch.zeros(VOCAB, 40, dtype=torch.float64).index_add_(0, tokens, grad.double())
    found = embedding_gradient(tokens.to(CUDA), grad.to(CUDA), VOCAB).cpu()
    unit = {torch.bfloat16: 2**-9, torch.float16: 2**-12}[dtype]
    assert ((found.double() - exact).norm() / exact.norm()).item() < unit

    segments = torch.arange(192).div(70, rounding_mode="floor").expand(2, -1).to(torch.int32)
    inputs = [(3**0.5 * torch.randn(2, 4, 192, 64, generator=generator)).to(dtype) for _ in range(3)]
    results = []
    for device, precision in ((CUDA, dtype), (CPU, torch.float64)):
        leaves = [x.to(device, precision).requires_grad_() for x in inputs]
        output = causal_attention(*leaves, (), segments.to(device))
        results.append([output, *torch.autograd.grad(output, leaves, torch.ones_like(output))])
    for mine, theirs in zip(*results, strict=True):
        # weights, gradients of weights, those of scores and the result are rounded; gradients of ones cancel to a third
        assert ((mine.cpu().double() - theirs).norm() / theirs.norm()).item() < 6 * unit
