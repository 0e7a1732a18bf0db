"""A model so small that a prediction takes a fraction of a second, and fixed numbers in place of what is measured on a machine."""

import copy
import dataclasses
import json

import pytest

from lowmem.config.load import load_run_config
from lowmem.config.schema import RunConfig
from lowmem.planning.base_cost import Base
from lowmem.planning.hardware import Rates, StorageRates
from lowmem.planning.predict import Prediction, predict_peak

TINY = [
    "device=cpu", "data.tokenizer=bytes", "data.seq_len=32", "model.dim=64", "model.num_layers=1", "model.num_heads=2", "optim.clip=1.0",
    "train.steps=3", "train.global_batch_size=4", "train.micro_batch_size=2", "train.precision=fp32", "train.eval_every=0",
]  # fmt: skip
I3 = ["model.name=i3", "model.num_heads=1", "model.attention_rank=16", "model.lorpt.rank=16"]
LAYERWISE = ["train.update=layerwise", "train.activation_checkpointing=block"]
ON_DISK = [*LAYERWISE, "train.weights_at=disk", "train.boundary_offload=disk"]
BASE_BYTES = 50 << 20
STORAGE_RATES = StorageRates(1e9, 5e8, 1e10, "measured")
RATES = Rates({"float32": 1e11, "bfloat16": 1e11}, 1e10, 1e-6, {"32": 1e8, "8": 1e8, "4": 1e8, "bitsandbytes": 1e7})


def small_config(*overrides: str) -> RunConfig:
    """The tiny model with changes."""
    return load_run_config(overrides=[*TINY, *overrides])


def stub_measurements(patch: pytest.MonkeyPatch) -> None:
    """No process is started and nothing is timed: a base cost of 50 MiB, round rates."""
    patch.setattr("lowmem.planning.predict.measured_base", lambda *arguments: Base(BASE_BYTES, "measured"))
    patch.setattr("lowmem.planning.base_cost.UNSEEN_BYTES", 0)
    patch.setattr("lowmem.planning.predict.rates_for", lambda config: RATES)
    patch.setattr("lowmem.planning.predict.storage_rates_for", lambda config: STORAGE_RATES)


def remember_predictions(patch: pytest.MonkeyPatch) -> None:
    """Predict each configuration once, whatever its budget of RAM, in the search, its estimates, and where a key is solved for."""
    known: dict[str, Prediction] = {}

    def predict(config: RunConfig, world_size: int = 1, **more: object) -> Prediction:
        values = dataclasses.asdict(config)
        budget = values.pop("budget")
        key = json.dumps([values, budget["vram"], world_size, str(more)])  # a budget of VRAM decides when segments are given back
        if key not in known:
            known[key] = predict_peak(config, world_size, **more)
        resolved = copy.deepcopy(known[key].config)
        resolved.budget = type(resolved.budget)(**budget)
        return dataclasses.replace(known[key], config=resolved)

    for module in ("search", "levers"):
        patch.setattr(f"lowmem.planning.{module}.predict_peak", predict)
