"""Optimizer states to a file and back: bit for bit, with their own dtypes, and independent of the file afterwards."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lowmem.config.schema import OptimConfig
from lowmem.engine.state import load_optimizer_tensors, optimizer_tensors
from lowmem.optim import AdamW
from lowmem.optim.from_config import build_optimizer
from lowmem.optim.kernels.formats import BLOCK, FORMATS
from lowmem.optim.kernels.reference import decode_signed
from lowmem.system.errors import CheckpointError
from lowmem.system.tensors import read_tensors, write_tensors

WIDTH = 96  # 9,216 weights: above the 4,096 from which bitsandbytes keeps 8-bit states; the bias stays below
KINDS = [("adamw", 32), ("lion", 32), ("adamw", 8), ("lion", 8)]
EXTRA = {"lion-32": "lion_pytorch"}


def trained(name: str, bits: int, dtype: torch.dtype = torch.float32, steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A layer and its optimizer after some steps."""
    if f"{name}-{bits}" in EXTRA:
        pytest.importorskip(EXTRA[f"{name}-{bits}"])
    model = nn.Linear(WIDTH, WIDTH)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) / 10)
    model.to(dtype)
    optimizer = build_optimizer(model, OptimConfig(name=name, state_bits=bits, lr=0.01))
    for step in range(steps):
        take_step(model, optimizer, step)
    return model, optimizer


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    inputs = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(100 + seed))
    model(inputs.to(next(model.parameters()).dtype)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def bits_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    """dtype, shape and bytes of each tensor."""
    return {name: (t.dtype, tuple(t.shape), t.detach().contiguous().view(-1).view(torch.uint8).tolist()) for name, t in tensors.items()}


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, tuple], dict]:
    tensors, scalars = optimizer_tensors(model, optimizer)
    return bits_of(tensors), scalars


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name, bits", KINDS)
def test_states_return_bit_for_bit_and_training_goes_on_as_if_never_stopped(tmp_path: Path, name: str, bits: int, dtype: torch.dtype):
    model, optimizer = trained(name, bits, dtype)
    tensors, scalars = optimizer_tensors(model, optimizer)
    assert tensors
    write_tensors(tmp_path / "optimizer.safetensors", tensors)
    again, other = trained(name, bits, dtype, steps=0)
    again.load_state_dict(model.state_dict())
    load_optimizer_tensors(again, other, read_tensors(tmp_path / "optimizer.safetensors"), scalars)
    assert states(again, other) == states(model, optimizer)
    for seed in (7, 8):
        take_step(model, optimizer, seed)
        take_step(again, other, seed)
    assert states(again, other) == states(model, optimizer)
    assert bits_of(dict(again.named_parameters())) == bits_of(dict(model.named_parameters()))


def test_eight_bit_states_are_bytes_and_fp32_states_of_bf16_weights_stay_fp32(tmp_path: Path):
    model, optimizer = trained("adamw", 8, torch.bfloat16)
    tensors, scalars = optimizer_tensors(model, optimizer)
    write_tensors(tmp_path / "optimizer.safetensors", tensors)
    again, other = trained("adamw", 8, torch.bfloat16, steps=0)
    load_optimizer_tensors(again, other, read_tensors(tmp_path / "optimizer.safetensors"), scalars)
    found, _ = optimizer_tensors(again, other)
    assert (found["weight.exp_avg"].dtype, found["weight.exp_avg_sq"].dtype) == (torch.int8, torch.uint8)
    narrow = {found[f"weight.{key}_scale"].dtype for key in ("exp_avg", "exp_avg_sq")}
    assert (
        narrow == {found[f"bias.{key}"].dtype for key in ("exp_avg", "exp_avg_sq")} == {torch.float32}
    )  # torch's own load would give bf16


def test_nothing_refers_to_the_file_once_it_is_loaded(tmp_path: Path):
    path = tmp_path / "optimizer.safetensors"
    model, optimizer = trained("adamw", 32)
    tensors, scalars = optimizer_tensors(model, optimizer)
    write_tensors(path, tensors)
    load_optimizer_tensors(model, optimizer, read_tensors(path), scalars)
    maps = Path("/proc/self/maps")
    if maps.exists():  # a mapped state would turn the rest of this test into a bus error
        assert str(path) not in maps.read_text()
    before = states(model, optimizer)
    path.write_bytes(bytes(path.stat().st_size))  # in place: other bytes, then none, then no file
    assert states(model, optimizer) == before
    path.write_bytes(b"")
    assert states(model, optimizer) == before
    path.unlink()
    take_step(model, optimizer, 5)


def test_a_state_of_an_unknown_parameter_is_named():
    model, optimizer = trained("adamw", 32)
    with pytest.raises(CheckpointError, match="optimizer state for other, which this model does not have"):
        load_optimizer_tensors(model, optimizer, [("other.exp_avg", torch.ones(2))], {})
    with pytest.raises(CheckpointError, match="optimizer state for other, which this model does not have"):
        load_optimizer_tensors(model, optimizer, [], {"other": {"step": 3}})


def test_a_state_that_json_cannot_hold_is_refused():
    model, optimizer = trained("adamw", 32)
    optimizer.state[model.weight]["history"] = [torch.ones(1)]
    with pytest.raises(TypeError, match="optimizer state history of weight is a list"):
        optimizer_tensors(model, optimizer)


@pytest.mark.parametrize("shape, held, kept", [((8192,), 8, 32), ((64, 96), 4, 8)])
def test_states_of_an_older_width_are_converted(shape: tuple[int, ...], held: int, kept: int):
    """Norms once had narrow states, and matrices 4-bit ones whatever the width of their rows."""

    def made(flattened: bool) -> tuple[nn.Module, AdamW]:
        model = nn.Module()
        model.weight = nn.Parameter(torch.ones(shape))
        return model, AdamW([{"params": [model.weight], "flattened": flattened}], state_bits=held)

    old, old_optimizer = made(flattened=True)
    for seed in range(3):
        old.weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        old_optimizer.step()
    tensors, scalars = optimizer_tensors(old, old_optimizer)
    values = decode_signed(tensors["weight.exp_avg"].view(-1, BLOCK * held // 8), tensors["weight.exp_avg_scale"], FORMATS[held])
    new, new_optimizer = made(flattened=False)
    load_optimizer_tensors(new, new_optimizer, [(name, tensor.clone()) for name, tensor in tensors.items()], scalars)
    state = new_optimizer.state[new.weight]
    assert state["step"] == 3
    assert new_optimizer.bits_of(new.weight) == kept
    if kept == 32:
        assert torch.equal(state["exp_avg"], values.view(shape))
    else:
        found = decode_signed(state["exp_avg"].view(-1, BLOCK), state["exp_avg_scale"], FORMATS[8])
        # a value moves to a neighbour of 8 bits: c^2 and (c + 1)^2 of 127^2
        allowed = (2 * (values.abs() / state["exp_avg_scale"].unsqueeze(1)).sqrt() + 2) * state["exp_avg_scale"].unsqueeze(1)
        assert ((found - values).abs() <= allowed).all()
    new.weight.grad = torch.ones(shape)
    new_optimizer.step()
