"""Corrections to DeepSpeed's host-memory optimizers, against the real operators."""

import copy
import importlib.util

import pytest
import torch

from lowmem.engine.deepspeed_build import put_ninja_on_path
from lowmem.engine.deepspeed_optimizers import prepare_optimizer
from lowmem.engine.distributed import import_deepspeed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]


class FakeZero:
    """What prepare_optimizer reads of a DeepSpeed engine: its optimizer, with this rank's flat partitions."""

    def __init__(self, partitions: list[torch.Tensor]) -> None:
        self.optimizer = self
        self.single_partition_of_fp32_groups = partitions


def step(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer, number: int) -> None:
    parameter.grad = torch.randn(50, generator=torch.Generator().manual_seed(number))
    optimizer.step()


def test_cpu_adam_resumes_bit_identically_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncorrected, some differ in the last bit: the operator keeps a running product of betas that a new process lacks."""
    put_ninja_on_path()
    library = import_deepspeed("cpu").ops.adam
    import cpuinfo

    found = cpuinfo.get_cpu_info()  # every CPUAdam asks again, and that takes a second
    monkeypatch.setattr(cpuinfo, "get_cpu_info", lambda: found)

    def make(values: torch.Tensor) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        parameter = torch.nn.Parameter(values.clone())
        optimizer = library.DeepSpeedCPUAdam([parameter], lr=1e-2, betas=(0.9, 0.95))
        prepare_optimizer(FakeZero([parameter]), optimizer)
        return parameter, optimizer

    parameter, optimizer = make(torch.randn(50, generator=torch.Generator().manual_seed(0)))
    different: list[int] = []
    resumed_values: dict[int, torch.Tensor] = {}
    for number in range(1, 40):
        step(parameter, optimizer, number)
        resumed, resumed_optimizer = make(parameter.data)
        resumed_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        step(resumed, resumed_optimizer, number + 1)
        resumed_values[number + 1] = resumed.data.clone()
        if number in resumed_values and not torch.equal(parameter, resumed_values[number]):
            different.append(number)
    assert different == []


def test_cpu_lion_keeps_one_state_and_follows_the_published_rule() -> None:
    put_ninja_on_path()
    library = import_deepspeed("cpu").ops.lion
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 50))
    before = parameter.data.clone()
    optimizer = library.DeepSpeedCPULion([parameter], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    prepare_optimizer(FakeZero([parameter]), optimizer)
    step(parameter, optimizer, 1)
    assert set(optimizer.state[parameter]) == {"step", "exp_avg"}
    # Chen et al. 2023, arXiv:2302.06675, algorithm 2, from a zero average: sign(gradient) plus decay; two fp32 roundings of values below 2
    expected = before - 1e-2 * (parameter.grad.sign() + 0.1 * before)
    torch.testing.assert_close(parameter.data, expected, rtol=0, atol=4 * 2**-24)
    # the operator forms 1 - 0.99 in fp32: one rounding of 0.99 is 2**-25 / 0.01 of the difference
    torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], 0.01 * parameter.grad, rtol=100 * 2**-25 + 4 * 2**-24, atol=0)
