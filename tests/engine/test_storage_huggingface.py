"""Models of transformers whose blocks live on a disk: read tensor by tensor, and trained to the bits of a resident run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowmem.config.schema import AdapterConfig, LorptConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from lowmem.data.batch import Batch
from lowmem.engine.from_config import build_configured_model, build_local_engine, open_storage
from lowmem.engine.layerwise import LayerwiseEngine
from lowmem.export.adapters import has_adapter, merge_problem, save_adapter, save_merged
from lowmem.nn import loss

CPU = torch.device("cpu")


def engine_of(path: Path, folder: Path, place: str, steps_of: str = "adamw", **settings: Any) -> LayerwiseEngine:
    rank = settings.pop("rank", 0)
    adapter = AdapterConfig(method=settings.pop("method", "none"), **settings.pop("adapter", {}))
    train = TrainConfig(
        update="layerwise", activation_checkpointing="block", loss_chunk_tokens=9, weights_at=place, **{"precision": "fp32", **settings}
    )
    config = RunConfig(
        run_dir=str(folder), model=ModelConfig(path=str(path), max_seq_len=64, lorpt=LorptConfig(rank=rank)), train=train,
        adapter=adapter,
        optim=OptimConfig(name=steps_of, lr=1e-2, state_bits=8),
    )  # fmt: skip
    config.data.seq_len = 12
    storage = open_storage(config, CPU)
    model = build_configured_model(config, (), storage)
    assert not any(type(module).__setattr__ is not torch.nn.Module.__setattr__ for module in model.blocks.modules())
    return build_local_engine(config, model, CPU, train.precision, 2, storage=storage)


def batch_of(step: int) -> Batch:
    windows = np.random.default_rng(step).integers(3, 300, (5, 13))
    windows[:, ::2] = 7
    return Batch.from_windows(windows)


def exported(engine: LayerwiseEngine, base: Path, folder: Path) -> dict[str, bytes]:
    """What a run leaves for others, in several files."""
    model = engine.model
    if has_adapter(model):
        save_adapter(model, base, folder / "adapter")
    if not merge_problem(model):
        save_merged(model, base, folder / "merged", shard_bytes=60_000, storage=engine.storage)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def saved(engine: LayerwiseEngine, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    engine.save(folder)
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}), ("gemma3_text", {"precision": "bf16", "weight_dtype": "bf16"}), ("gpt2", {}), ("falcon_h1", {}),
        ("llama", {"method": "lora"}), ("qwen3", {"method": "last_k", "adapter": {"last_k": 1}}),
        ("phi3", {"method": "lora", "weight_dtype": "nf4", "precision": "bf16"}), ("olmo2", {"steps_of": "spectron"}),
        ("qwen2", {"weight_dtype": "int8"}), ("llama", {"rank": 8}), ("llama", {"method": "prefix"}),
    ],
)  # fmt: skip
def test_runs_are_those_of_resident_blocks(family, settings, directories, tmp_path, monkeypatch):
    monkeypatch.setattr(loss, "GRAD_BLOCK_ROWS", 128)  # several blocks of rows
    resident = engine_of(directories(family), tmp_path, "device", **settings)
    streamed = engine_of(directories(family), tmp_path, "disk", **settings)
    for step in range(20):
        assert streamed.step(batch_of(step), 1e-2) == resident.step(batch_of(step), 1e-2)
    assert streamed.evaluate([batch_of(99)]) == resident.evaluate([batch_of(99)])
    assert saved(streamed, tmp_path / "a") == saved(resident, tmp_path / "b")
    files = exported(streamed, directories(family), tmp_path / "c")
    assert files
    assert files == exported(resident, directories(family), tmp_path / "d")
    assert saved(streamed, tmp_path / "e") == saved(resident, tmp_path / "f")  # nothing is changed by it
