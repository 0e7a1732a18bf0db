"""Blocks whose weights and states live on a disk or in host memory: the bits of a resident run, from one file to the next."""

import dataclasses

import numpy as np
import pytest
import torch

from lowmem.config.schema import LorptConfig, ModelConfig, OptimConfig, TrainConfig
from lowmem.data.batch import Batch
from lowmem.engine.layerwise import LayerwiseEngine
from lowmem.engine.storage.blocks import Storage, StreamedBlocks
from lowmem.engine.storage.disk_file import ALIGNMENT, DiskFile, aligned_buffer
from lowmem.engine.storage.host_memory import HostMemory
from lowmem.models.registry import build_model
from lowmem.nn.quantized import CodedWeight, WeightFormat
from lowmem.system.errors import ConfigError, StorageError

CPU = torch.device("cpu")
VOCAB, SEQ_LEN, SEQUENCES = 67, 16, 6
MODELS = {
    "decoder": ModelConfig(dim=64, num_layers=3, num_heads=2),
    "even": ModelConfig(dim=64, num_layers=4, num_heads=2, tie_embeddings=True, positions="learned"),
    "lorpt": ModelConfig(dim=64, num_layers=3, num_heads=2, lorpt=LorptConfig(rank=8, targets=["attention", "mlp", "head"])),
    "i3": ModelConfig(name="i3", dim=64, num_layers=3, num_heads=1, attention_rank=8, lorpt=LorptConfig(rank=8)),
}
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": WeightFormat(torch.float32, 8), "int4": WeightFormat(torch.bfloat16, 4)}


def make_storage(place: str, tmp_path) -> Storage:
    return {
        "device": Storage,
        "host": lambda: StreamedBlocks(HostMemory(CPU), CPU),
        "disk": lambda: StreamedBlocks(DiskFile(tmp_path), CPU),
    }[place]()


def make_engine(storage: Storage, shape="decoder", stored="fp32", *, micro=2, disk=None, **optim) -> LayerwiseEngine:
    model = build_model(MODELS[shape], vocab_size=VOCAB, max_seq_len=SEQ_LEN, seed=0, dtype=FORMATS[stored], place=storage.place)
    model.activation_checkpointing = "block"
    train = TrainConfig(update="layerwise", seed=5, boundary_offload="disk" if disk else "none")
    precision = "bf16" if stored in ("bf16", "int4") else "fp32"
    config = OptimConfig(**{"lr": 1e-2, "clip": 1.0, **optim})
    return LayerwiseEngine(model, config, train, device=CPU, precision=precision, micro_batch_size=micro, storage=storage, disk=disk)


def make_batch(seed: int) -> Batch:
    return Batch.from_windows(np.random.default_rng(seed).integers(0, VOCAB, (SEQUENCES, SEQ_LEN + 1)))


def saved_bytes(engine: LayerwiseEngine, directory) -> dict[str, bytes]:
    directory.mkdir()
    engine.save(directory)
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


@pytest.mark.parametrize("place", ["disk", "host"])
@pytest.mark.parametrize(
    ("name", "stored", "optim"),
    [
        ("decoder", "fp32", {}), ("even", "fp32", {"state_bits": 8}), ("lorpt", "bf16", {"state_bits": 4}), ("i3", "fp32", {}),
        ("decoder", "int8", {"state_bits": 8}), ("even", "int4", {"state_bits": 4}), ("lorpt", "fp32", {"name": "spectron"}),
        ("decoder", "bf16", {"name": "lion", "state_bits": 8}),
    ],
)  # fmt: skip
def test_losses_norms_and_checkpoints_are_those_of_a_resident_run(place, name, stored, optim, tmp_path):
    resident = make_engine(Storage(), name, stored, **optim)
    streamed = make_engine(make_storage(place, tmp_path), name, stored, **optim)
    for step in range(20):
        assert streamed.step(make_batch(step), 1e-2) == resident.step(make_batch(step), 1e-2)
    assert streamed.evaluate([make_batch(99)]) == resident.evaluate([make_batch(99)])
    assert saved_bytes(streamed, tmp_path / "a") == saved_bytes(resident, tmp_path / "b")
