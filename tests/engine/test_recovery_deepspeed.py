"""Under DeepSpeed all ranks repeat a step if memory runs out on one, where that is possible; where it is not, a clear error."""

import importlib.util
from pathlib import Path

import pytest

from tests.engine.deepspeed_cases import case, compare_checkpoints
from tests.engine.deepspeed_worker import launch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]

VARIANTS = [(file, precision) for file in ("zero0", "zero1", "zero2", "zero2_offload") for precision in ("fp32", "bf16")]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_forward_pass_that_runs_out_of_memory_on_one_rank_restarts_the_step_on_all(tmp_path: Path, ranks: int) -> None:
    """In the second micro-batch, when the gradients of the first are there; equal to the bit to a run that meant to."""
    failing, meant = [], []
    for file, precision in VARIANTS:
        # 8-bit states, because DeepSpeed would compile an optimizer for offloaded ones of 32 bits
        common = {"steps": [0, 1, 2], "train": {"precision": precision}, "optim": {"state_bits": 8}}
        save = str(tmp_path / f"{file}-{precision}")
        failing.append(case(file, f"{precision}-failing", runs_out={"step": 1, "call": 2}, save=f"{save}-failing", **common))
        meant.append(case(file, f"{precision}-meant", micro={"1": 1}, save=f"{save}-meant", **common))
    for found in launch([*failing, *meant], tmp_path / "out", ranks):
        for one, other in zip(failing, meant, strict=True):
            left, right = found[one["name"]], found[other["name"]]
            assert left["steps"] == right["steps"], one["name"]
            assert left["val_loss"] == right["val_loss"], one["name"]
            assert left["messages"] == ["memory ran out with micro-batches of 2; going on with 1"]
            assert left["micro_batch"] == left["state"]["micro_batch"] == {"size": 1, "failed": 2}
    for file, precision in VARIANTS:
        compare_checkpoints(tmp_path / f"{file}-{precision}-failing", tmp_path / f"{file}-{precision}-meant")


def test_a_backward_pass_is_repeated_on_one_rank_without_zero_only(tmp_path: Path) -> None:
    failing = {"step": 1, "call": 2, "backward": True}
    whole = case("zero0", "failing", steps=[0, 1, 2], runs_out=failing)
    meant = case("zero0", "meant", steps=[0, 1, 2], micro={"1": 1})
    found = launch([whole, meant], tmp_path / "whole", 1)[0]
    assert found["zero0-failing"]["steps"] == found["zero0-meant"]["steps"]
    assert found["zero0-failing"]["weights_sha256"] == found["zero0-meant"]["weights_sha256"]
    for file, where in (("zero2", {"backward": True}), ("zero3", {"backward": False})):
        error = launch([case(file, "fails", steps=[0, 1], runs_out={"step": 1, "call": 2, **where})], tmp_path / file, 1)[0]
        assert "cannot be done again under DeepSpeed; go on from the last checkpoint; use " in error[f"{file}-fails"]["error"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_smallest_micro_batch_that_does_not_fit_ends_every_rank(tmp_path: Path, ranks: int) -> None:
    one = case("zero1", "fails", steps=[0], train={"micro_batch_size": 1}, runs_out={"step": 0, "call": 2})
    for found in launch([one], tmp_path, ranks):
        assert found["zero1-fails"]["error"].startswith("memory ran out with micro-batches of 1 sequence (")
