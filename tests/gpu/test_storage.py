"""Blocks in pinned host memory and on a disk while a CUDA device computes: the bits of a resident run, and the memory saved."""

import numpy as np
import pytest
import torch

from lowmem.config.schema import ModelConfig, OptimConfig, TrainConfig
from lowmem.data.batch import Batch
from lowmem.engine.layerwise import LayerwiseEngine
from lowmem.engine.storage.blocks import Storage, StreamedBlocks
from lowmem.engine.storage.disk_file import DiskFile
from lowmem.engine.storage.host_memory import HostMemory
from lowmem.memory.measure import measure_peak
from lowmem.models.base import LossOptions
from lowmem.models.registry import build_model
from lowmem.system.devices import cuda_problem

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(cuda_problem()), reason=f"no CUDA device to use: {cuda_problem()}")]

VOCAB, SEQ_LEN, SEQUENCES, LR = 4099, 32, 8, 1e-2


def make_engine(place: str, folder, *, dim=64, num_layers=5, offload="none", **optim) -> LayerwiseEngine:
    device = torch.device("cuda")
    backing = {"host": lambda: HostMemory(device), "disk": lambda: DiskFile(folder)}.get(place)
    storage = StreamedBlocks(backing(), device) if backing else Storage()
    shape = ModelConfig(dim=dim, num_layers=num_layers, num_heads=2)
    model = build_model(shape, vocab_size=VOCAB, max_seq_len=SEQ_LEN, seed=0, dtype=torch.bfloat16, place=storage.place)
    model.activation_checkpointing, model.loss_options = "block", LossOptions(chunk_tokens=32)
    config, train = OptimConfig(**{"lr": LR, **optim}), TrainConfig(update="layerwise", boundary_offload=offload)
    disk = DiskFile(folder) if offload == "disk" else None
    return LayerwiseEngine(model, config, train, device=device, precision="bf16", micro_batch_size=2, storage=storage, disk=disk)


def make_batch(seed: int) -> Batch:
    return Batch.from_windows(np.random.default_rng(seed).integers(0, VOCAB, (SEQUENCES, SEQ_LEN + 1)))


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize(("place", "offload"), [("host", "none"), ("host", "cpu"), ("disk", "disk")])
def test_blocks_elsewhere_change_nothing(place, offload, bits, tmp_path):
    torch.use_deterministic_algorithms(True)
    try:
        here, there = make_engine("device", tmp_path, state_bits=bits), make_engine(place, tmp_path, state_bits=bits, offload=offload)
        for step in range(6):
            assert there.step(make_batch(step), LR) == here.step(make_batch(step), LR)
        for name, engine in (("here", here), ("there", there)):
            (tmp_path / name).mkdir()
            engine.save(tmp_path / name)
        for file in ("model.safetensors", "optimizer.safetensors"):
            assert (tmp_path / "here" / file).read_bytes() == (tmp_path / "there" / file).read_bytes()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("place", ["host", "disk"])
def test_two_blocks_are_on_the_device(place, tmp_path):
    peaks = {}
    for where in ("device", place):
        with measure_peak() as peak:
            engine = make_engine(where, tmp_path, dim=512, num_layers=24)
            engine.step(make_batch(0), LR)
        peaks[where] = peak.cuda_allocated_peak_bytes
        del engine
        torch.cuda.empty_cache()
    assert peaks[place] < 0.5 * peaks["device"]
