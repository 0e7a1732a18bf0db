"""Optimizers inside ZeRO: lowmem's own, and corrections to DeepSpeed's host-memory ones against the real operators."""

import copy
import importlib.util
from typing import Any

import pytest
import torch

from lowmem.engine.deepspeed.engine import prepare_optimizer, separate_by_state_width
from lowmem.engine.deepspeed.operators import put_ninja_on_path
from lowmem.engine.deepspeed.processes import import_deepspeed
from lowmem.optim import AdamW

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]


class FakeZero:
    """What prepare_optimizer reads of a DeepSpeed engine: its optimizer, with this rank's flat partitions; stage 0 has none."""

    def __init__(self, partitions: list[torch.Tensor], rank: int = 0) -> None:
        self.optimizer, self.global_rank = self, rank
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


def second_moments(rank: int, partitioned: bool = True) -> list[torch.Tensor]:
    """Codes of exp_avg_sq of two parameters of two groups after an update by equal gradients, one group at a time as in ZeRO."""
    parameters = [torch.nn.Parameter(torch.zeros(8192)) for _ in range(2)]
    optimizer = AdamW([{"params": [parameter], "flattened": True} for parameter in parameters], state_bits=8, seed=3)
    prepare_optimizer(FakeZero(parameters if partitioned else [], rank), optimizer)
    groups = optimizer.param_groups
    for parameter, group in zip(parameters, groups, strict=True):
        parameter.grad = torch.randn(8192, generator=torch.Generator().manual_seed(0))
        optimizer.param_groups = [group]
        optimizer.step()
    return [optimizer.state[parameter]["exp_avg_sq"] for parameter in parameters]


def test_every_partition_of_every_rank_has_random_numbers_of_its_own() -> None:
    """Equal values round to equal codes only where the random numbers are equal."""
    found = [*second_moments(rank=0), *second_moments(rank=1)]
    for index, codes in enumerate(found):
        assert not any(torch.equal(codes, other) for other in found[:index])
    for codes, again in zip(found, [*second_moments(rank=0), *second_moments(rank=1)], strict=True):
        assert torch.equal(codes, again)


def test_ranks_that_update_equal_weights_have_equal_random_numbers() -> None:
    for one, other in zip(second_moments(0, partitioned=False), second_moments(1, partitioned=False), strict=True):
        assert torch.equal(one, other)


def test_groups_that_zero_flattens_have_one_width_of_states() -> None:
    shapes = {"matrix": (64, 128), "odd": (64, 96), "bias": (9000,), "embedding": (33, 128), "small": (4, 128)}
    parameters = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    names = {id(parameter): name for name, parameter in parameters.items()}

    def groups_of(optimizer: torch.optim.Optimizer, ranks: int = 1) -> list[tuple[list[str], float, int]]:
        separate_by_state_width(optimizer, ranks)
        return [
            ([names[id(parameter)] for parameter in group["params"]], group["weight_decay"], group.get("state_bits", 32))
            for group in optimizer.param_groups
        ]

    def groups() -> list[dict[str, Any]]:
        decayed, rest = (["matrix", "odd", "bias"], ["embedding", "small"])
        return [{"params": [parameters[name] for name in part], "weight_decay": decay} for part, decay in ((decayed, 0.1), (rest, 0.0))]

    untouched = [(["matrix", "odd", "bias"], 0.1, 32), (["embedding", "small"], 0.0, 32)]
    assert groups_of(AdamW(groups(), state_bits=32)) == untouched == groups_of(torch.optim.AdamW(groups()))
    expected = [(["matrix"], 0.1, 4), (["embedding"], 0.0, 4), (["odd"], 0.1, 8), (["bias"], 0.1, 32), (["small"], 0.0, 32)]
    assert groups_of(AdamW(groups(), state_bits=4)) == expected
    # 33 blocks cannot be divided between two ranks
    expected[1] = (["embedding"], 0.0, 8)
    assert groups_of(AdamW(groups(), state_bits=4), ranks=2) == expected


def test_a_flattened_group_keeps_its_width_and_a_state_dict_without_the_mark_does_not_take_it() -> None:
    def optimizer() -> AdamW:
        return AdamW([{"params": [torch.nn.Parameter(torch.zeros(8192))], "flattened": True}], state_bits=4)

    one, other = optimizer(), optimizer()
    one.allocate_states()
    saved = one.state_dict()
    del saved["param_groups"][0]["flattened"]
    other.load_state_dict(saved)
    for each in (one, other):
        (parameter,) = each.param_groups[0]["params"]
        assert each.bits_of(parameter) == 4
        parameter.grad = torch.ones(8192)
        each.step()
