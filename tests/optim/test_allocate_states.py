"""States allocated ahead are the ones that the optimizer's first step would make, in the same memory for good."""

import pytest
import torch
from torch import nn

from lowmem.config.schema import OptimConfig
from lowmem.optim.from_config import allocate_states, build_optimizer

CHOICES = [
    # name, bits, dtype of the weights, backend, the library it needs
    ("adamw", 32, torch.float32, "auto", "torch"),
    ("adamw", 32, torch.bfloat16, "auto", "torch"),
    ("adamw", 8, torch.float32, "auto", "torch"),
    ("lion", 8, torch.float32, "auto", "torch"),
    ("lion", 32, torch.float32, "auto", "lion_pytorch"),
    ("adamw", 8, torch.float32, "bitsandbytes", "bitsandbytes"),
    ("lion", 8, torch.float32, "bitsandbytes", "bitsandbytes"),
]


def make_model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 80), nn.LayerNorm(80), nn.Linear(80, 3)).to(dtype)  # 7680 numbers are enough for narrow states
    model[0].weight.data = model[0].weight.data.t().contiguous().t()  # not contiguous, as preserve_format keeps it
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


@pytest.mark.parametrize("name, bits, dtype, backend, library", CHOICES)
def test_states_are_those_of_the_first_step(name, bits, dtype, backend, library):
    pytest.importorskip(library)
    config = OptimConfig(name=name, state_bits=bits, backend=backend, lr=1e-2, betas=(0.9, 0.95))
    models = [make_model(dtype) for _ in range(2)]
    if backend == "bitsandbytes":  # it makes weights contiguous at its first step
        for model in models:
            model[0].weight.data = model[0].weight.data.contiguous()
    ahead, lazy = (build_optimizer(model, config, seed=3) for model in models)
    allocate_states(ahead)
    kept = {(p, key): value for p in models[0].parameters() for key, value in ahead.state[p].items() if isinstance(value, torch.Tensor)}
    assert kept
    addresses = {where: value.data_ptr() for where, value in kept.items()}
    for seed in range(3):
        if seed == 1:
            allocate_states(ahead)  # what exists stays
        step(models[0], ahead, seed)
        step(models[1], lazy, seed)
        for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(one, other)
            assert list(ahead.state[one]) == list(lazy.state[other])
            for key, value in ahead.state[one].items():
                expected = lazy.state[other][key]
                if isinstance(value, torch.Tensor):
                    assert (value.dtype, value.stride(), value.device) == (expected.dtype, expected.stride(), expected.device), key
                    assert torch.equal(value, expected), key
                    assert value.data_ptr() == addresses[one, key], key
                else:
                    assert value == expected, key


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(TypeError, match="states of SGD"):
        allocate_states(torch.optim.SGD(make_model(torch.float32).parameters(), lr=0.1))
