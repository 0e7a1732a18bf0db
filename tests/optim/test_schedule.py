"""Learning-rate schedules against their definitions."""

import math

import pytest

from lowmem.config.schema import OptimConfig
from lowmem.optim.from_config import learning_rate


def rates(schedule: str, total: int = 100, **fields) -> list[float]:
    optim = OptimConfig(schedule=schedule, lr=2.0, warmup_steps=10, min_lr_ratio=0.1, **fields)
    return [learning_rate(optim, step, total) for step in range(1, total + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warmup_is_linear_and_the_end_is_reached(schedule):
    values = rates(schedule)
    assert values[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert values[-1] == pytest.approx(2.0 if schedule == "constant" else 0.2)
    assert max(values) <= 2.0


def test_cosine_is_half_way_in_the_middle():
    assert rates("cosine")[54] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5))))


def test_wsd_is_constant_until_its_last_share():
    """Of all steps: 22 of 110, whatever the warm-up takes."""
    values = rates("wsd", total=110, decay_fraction=0.2)
    assert values[10:88] == [2.0] * 78
    assert values[98] == pytest.approx(2.0 * (1 - 0.9 * 0.5))  # 11 of 22 steps later
    assert rates("wsd", total=110, decay_fraction=1.0)[10:] == pytest.approx(rates("linear", total=110)[10:])


def test_a_run_shorter_than_its_warmup_never_divides_by_zero():
    assert rates("cosine", total=5)[-1] == pytest.approx(2.0)
