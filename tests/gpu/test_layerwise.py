"""Layerwise updates on a CUDA device: the CPU's losses, boundaries in host memory, fp16 weights, and the memory they are for."""

import numpy as np
import pytest
import torch

from lowmem.config.schema import ModelConfig, OptimConfig, TrainConfig
from lowmem.data.batch import Batch
from lowmem.engine.layerwise import LayerwiseEngine
from lowmem.engine.local import LocalEngine
from lowmem.engine.state import optimizer_tensors
from lowmem.memory.measure import measure_peak
from lowmem.models.registry import build_model
from lowmem.system.devices import cuda_has_native_bf16, cuda_problem

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(cuda_problem()), reason=f"no CUDA device to use: {cuda_problem()}")]

VOCAB, SEQ_LEN, GLOBAL_BATCH, LR = 67, 32, 8, 1e-2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_engine(device: str, *, stored="fp32", micro=2, dim=64, num_layers=3, offload="none", **optim) -> LayerwiseEngine:
    shape = ModelConfig(dim=dim, num_layers=num_layers, num_heads=2)
    model = build_model(shape, vocab_size=VOCAB, max_seq_len=SEQ_LEN, seed=0, dtype=DTYPES[stored])
    model.activation_checkpointing = "block"
    config, train = OptimConfig(**{"lr": LR, **optim}), TrainConfig(update="layerwise", boundary_offload=offload)
    return LayerwiseEngine(model, config, train, device=torch.device(device), precision=stored, micro_batch_size=micro)


def make_batch(seed: int) -> Batch:
    return Batch.from_windows(np.random.default_rng(seed).integers(0, VOCAB, (GLOBAL_BATCH, SEQ_LEN + 1)))


def test_fp32_losses_are_those_of_the_cpu():
    here, there = make_engine("cpu", eps=1.0), make_engine("cuda", eps=1.0)
    for step in range(6):
        one, other = here.step(make_batch(step), LR), there.step(make_batch(step), LR)
        assert other.loss == pytest.approx(one.loss, rel=1e-5)  # as in test_cuda.py: sums in another order, a smooth update


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_offloaded_boundaries_change_nothing(bits: int):
    torch.use_deterministic_algorithms(True)
    try:
        kept, offloaded = (make_engine("cuda", state_bits=bits, offload=offload) for offload in ("none", "cpu"))
        for step in range(4):
            assert kept.step(make_batch(step), LR) == offloaded.step(make_batch(step), LR)
        states = [optimizer_tensors(engine.model, engine.optimizer)[0] for engine in (kept, offloaded)]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("stored", ["bf16", "fp16"])
def test_narrow_weights_learn(stored: str):
    if stored == "bf16" and not cuda_has_native_bf16():
        pytest.skip("this device does not multiply bf16")
    engine = make_engine("cuda", stored=stored, state_bits=4)
    results = [engine.step(make_batch(0), LR) for _ in range(20)]
    losses = [result.loss for result in results if not result.skipped]
    assert len(losses) >= 10
    assert losses[-1] < losses[0] - 0.1


def test_gradients_take_one_block_of_device_memory():
    peaks = {}
    for update in ("accumulate", "layerwise"):
        engine = make_engine("cuda", dim=512, num_layers=10, state_bits=4)
        if update == "accumulate":
            engine = LocalEngine(engine.model, OptimConfig(state_bits=4), device=torch.device("cuda"), precision="fp32", micro_batch_size=2)
        engine.step(make_batch(0), 1e-3)
        with measure_peak() as peak:
            engine.step(make_batch(1), 1e-3)
        peaks[update] = peak.cuda_allocated_peak_bytes
        gradients = engine.memory_components()["gradients"]
        del engine
        torch.cuda.empty_cache()
    # ten blocks against the sum and the newest gradient of one, and the boundaries: 11 * 8 * 32 * 512 * 4 bytes = 6 MB
    assert peaks["accumulate"] - peaks["layerwise"] > 10 * gradients - 3 * gradients - (6 << 20)
