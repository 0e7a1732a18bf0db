"""Every combination of computed precision, stored weights and update that docs/precision.md promises, and every one it refuses."""

from functools import cache

import numpy as np
import pytest
import torch

from lowmem.config.checks import config_problems
from lowmem.config.schema import DataConfig, ModelConfig, OptimConfig, RunConfig, SourceConfig, TrainConfig
from lowmem.data.batch import Batch
from lowmem.engine.from_config import build_configured_model, build_local_engine
from tests.reference.markdown import table

UPDATES = ("accumulate", "layerwise")
STEPS = 12


def documented() -> dict[tuple[str, str, str], bool]:
    """(precision, update, weight_dtype) -> whether the table in docs/precision.md says that it works."""
    (_, *names), *rows = table("precision.md", r"stored \ computed")
    found = {}
    for stored, *cells in rows:
        for precision, cell in zip(names, cells, strict=True):
            assert cell in ("both", "layerwise", "no")
            found |= {(precision, update, stored): cell in ("both", update) for update in UPDATES}
    return found


TABLE = documented()
TRAINED = [combination for combination, works in TABLE.items() if works and combination[0] != "fp8"]


def config_of(precision: str, update: str, weight_dtype: str) -> RunConfig:
    train = TrainConfig(
        steps=STEPS,
        global_batch_size=4,
        micro_batch_size=2,
        precision=precision,
        update=update,
        weight_dtype=weight_dtype,
        eval_every=0,
    )
    return RunConfig(
        model=ModelConfig(dim=64, num_layers=2, num_heads=2, hidden_dim=128, vocab_size=64, max_seq_len=16),
        data=DataConfig(sources=[SourceConfig(stdlib=True)], seq_len=16),
        optim=OptimConfig(lr=6e-3, weight_decay=0.0, clip=0.0),
        train=train,
    )


@cache
def losses(precision: str, update: str, weight_dtype: str) -> tuple[float, ...]:
    """Of every applied step on one batch, and then of an evaluation."""
    config = config_of(precision, update, weight_dtype)
    model = build_configured_model(config)
    engine = build_local_engine(config, model, torch.device("cpu"), precision, 2)
    batch = Batch.from_windows(np.random.default_rng(0).integers(0, 64, (4, 17)))
    results = [engine.step(batch, config.optim.lr) for _ in range(STEPS)]
    assert {result.skipped for result in results} == {""}
    return (*(result.loss for result in results), engine.evaluate([batch]))


@pytest.mark.parametrize("combination", TABLE, ids="-".join)
def test_the_table_is_what_the_configuration_allows(combination):
    precision, update, weight_dtype = combination
    problems = config_problems(config_of(precision, update, weight_dtype))
    assert (not problems) is TABLE[combination], problems
    if problems:
        assert all("\n" not in problem for problem in problems)
        assert any(f"train.weight_dtype={weight_dtype}" in problem for problem in problems)


@pytest.mark.parametrize("combination", TRAINED, ids="-".join)
def test_losses_fall_and_stay_near_those_of_fp32(combination):
    weight_dtype = combination[2]
    found, reference = losses(*combination), losses("fp32", "accumulate", "fp32")
    assert found[-1] < found[0] / 4
    if combination[::2] == ("fp32", "fp32"):
        tolerance = 1e-4  # fp32 sums of 12 steps in another order
    else:
        assert found != reference  # the setting is in force
        tolerance = {"int4": 2.0**-4}.get(weight_dtype, 2.0**-6)  # bf16 and a code of 8 bits are off by 2^-8, a code of 4 by 2^-4
    assert max(abs(a - b) / b for a, b in zip(found, reference, strict=True)) < tolerance


def test_the_table_is_complete():
    assert len(TABLE) == 5 * 4 * 2
    assert len(TRAINED) == 19
