"""AdamW and Lion behave as any torch optimizer, at every width of their states.

u is 2^-24, the largest relative error of one fp32 rounding.
"""

import json

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from lowmem.optim import AdamW, Lion
from lowmem.optim.kernels.formats import MIN_QUANTIZED_NUMEL, state_bytes
from lowmem.optim.low_bit import LowBitOptimizer

U = 2.0**-24
KINDS = {"adamw": AdamW, "lion": Lion}
BOTH = pytest.mark.parametrize("name", KINDS)
FORMS = pytest.mark.parametrize("name, bits", [(name, bits) for name, kind in KINDS.items() for bits in kind.widths])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def optimizer_of(name: str, params, **settings) -> LowBitOptimizer:
    return KINDS[name](params, **{"lr": 0.01, "weight_decay": 0.1, **settings})


def train(optimizer: LowBitOptimizer, first: int, last: int) -> None:
    """Steps first, ..., last - 1, each with its own gradients."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step in range(first, last):
        for index, parameter in enumerate(parameters):
            parameter.grad = randn(*parameter.shape, seed=100 * step + index).to(parameter.dtype)
        optimizer.step()


def equal(left, right) -> bool:
    """The same numbers with the same dtypes and shapes; tensors, scalars, and dictionaries of them."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return left == right


def two_weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """One that gets narrow states and one that does not."""
    return [nn.Parameter(randn(70, 128, seed=1).to(dtype)), nn.Parameter(randn(80, seed=2).to(dtype))]


def test_32_bits_equal_torch_adamw():
    own, other = (nn.Parameter(randn(70, 80, seed=1).clamp(-2, 2)) for _ in range(2))
    settings = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    pairs = [(own, AdamW([own], **settings, state_bits=32)), (other, torch.optim.AdamW([other], **settings, foreach=False, fused=False))]
    moved = 0.0
    for step in range(50):
        grad = randn(70, 80, seed=step)
        grad = grad.sign() * grad.abs().clamp(0.5, 2)
        before = other.detach().clone()
        for parameter, optimizer in pairs:
            optimizer.param_groups[0]["lr"] = 1e-3 / (1 + step % 3)
            parameter.grad = grad
            optimizer.step()
        moved += (other.detach() - before).abs().mean().item()
    # With 0.5 <= |g| <= 2 the root of the corrected exp_avg_sq is in [0.5, 2], and exp_avg errs by at most 4 roundings of 2 per step,
    # which sum to 80u (1 - beta1^t): 160u of the quotient. exp_avg_sq errs by 4u a step, 200u in fifty, and its root by half of that,
    # times a quotient of at most 4: 400u. Some ten roundings are left, of at most 4. An update errs by 600u lr and the weight, below
    # 2.1, by three roundings, 6.3u. Both sides err, in each of fifty steps.
    assert (own - other).abs().max().item() <= 2 * 50 * U * (600 * 1e-3 + 6.3)
    assert moved > 100 * 2 * 50 * U * (600 * 1e-3 + 6.3)


def test_32_bits_equal_lion_pytorch():
    library = pytest.importorskip("lion_pytorch")
    own, other = (nn.Parameter(randn(70, 80, seed=1)) for _ in range(2))
    settings = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1}
    optimizers = Lion([own], **settings, state_bits=32), library.Lion([other], **settings)
    momentum, least = torch.zeros(70, 80, dtype=torch.float64), torch.full((70, 80), torch.inf, dtype=torch.float64)
    for step in range(20):
        own.grad = other.grad = grad = randn(70, 80, seed=step)
        least = least.minimum((momentum * 0.9 + grad.double() * (1 - 0.9)).abs())
        momentum = momentum * 0.99 + grad.double() * (1 - 0.99)
        for optimizer in optimizers:
            optimizer.step()
    # exp_avg, below 5, errs by three roundings a step, 300u in twenty on either side; where the interpolation came nearer to zero
    # than that its sign is anyone's. Elsewhere: three roundings a step of a weight below 6, on both sides.
    sure = least > 300 * U
    assert sure.double().mean() > 0.99
    assert (own - other).abs()[sure].max() <= 2 * 20 * 3 * 6 * U


@BOTH
def test_a_closure_runs_once_with_gradients_and_its_loss_comes_back(name):
    weight = nn.Parameter(torch.ones(3))
    optimizer = optimizer_of(name, [weight])
    calls = []

    def closure() -> torch.Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = (weight * 2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 6.0
    assert len(calls) == 1
    assert (weight < 1).all()


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "strided": lambda x: torch.stack([x, x], dim=-1)[..., 1],
    "permuted": lambda x: x.view(3, -1, x.shape[1]).permute(2, 0, 1).contiguous().permute(1, 2, 0),
}


@pytest.mark.parametrize("rows, columns", [(69, 80), (300, 403)])  # 120,900 numbers pass through the staging buffer in two parts
@pytest.mark.parametrize("layout", LAYOUTS)
@BOTH
def test_strides_do_not_change_a_bit(name, layout, rows, columns):
    arrange = LAYOUTS[layout]
    for dtype in (torch.float32, torch.bfloat16):
        for bits in KINDS[name].widths:
            values = randn(rows, columns, seed=1).to(dtype)
            shape = arrange(values).shape
            weights = [nn.Parameter(values.view(shape).clone()), nn.Parameter(arrange(values)), nn.Parameter(arrange(values))]
            assert not weights[1].is_contiguous()
            optimizers = [optimizer_of(name, [weight], state_bits=bits) for weight in weights]
            for step in range(3):
                grad = randn(rows, columns, seed=10 + step).to(dtype)
                weights[0].grad = weights[1].grad = grad.view(shape)
                weights[2].grad = arrange(grad)
                for optimizer in optimizers:
                    optimizer.step()
            for weight, optimizer in zip(weights[1:], optimizers[1:], strict=True):
                assert torch.equal(weight, weights[0])
                assert equal(optimizer.state_dict(), optimizers[0].state_dict())


@FORMS
def test_empty_scalar_and_single_numbers(name, bits):
    weights = [nn.Parameter(torch.full(shape, 2.0)) for shape in ((0, 5), (), (1,), (1, 1))]
    optimizer = optimizer_of(name, weights, state_bits=bits, lr=0.5, weight_decay=0.0)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    # the first update of both is lr, AdamW's after some ten roundings of numbers below 2
    assert [weight.sum().item() for weight in weights] == pytest.approx([0.0, 1.5, 1.5, 1.5], abs=20 * U)


def test_small_and_one_dimensional_tensors_keep_32_bits_narrow_rows_8_and_repr_says_so():
    shapes = [(31, 128), (MIN_QUANTIZED_NUMEL,), (9000,), (32, 128), (16, 2, 128), (64, 96)]
    weights = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = optimizer_of("adamw", weights, state_bits=4)
    train(optimizer, 0, 1)
    assert [optimizer.bits_of(weight) for weight in weights] == [32, 32, 32, 4, 4, 8]
    for weight in weights:
        sizes = [value.nbytes for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
        assert sum(sizes) == 2 * state_bytes(weight.shape, 4)
    assert "4-bit for 2 tensors of 8,192 numbers, 8-bit for 1 tensors of 6,144 numbers, 32-bit for 3 tensors" in repr(optimizer)


def test_state_bits_may_differ_by_group_and_a_group_may_come_later():
    weights = [nn.Parameter(randn(32, 128, seed=1)) for _ in range(4)]
    groups = [{"params": weights[:1], "state_bits": 32}, {"params": weights[1:2], "state_bits": 4}]
    optimizer = optimizer_of("adamw", [*groups, {"params": weights[2:3]}])
    train(optimizer, 0, 1)
    optimizer.add_param_group({"params": weights[3:], "state_bits": 4})
    train(optimizer, 1, 3)
    for weight, bits in zip(weights, (32, 4, 8, 4), strict=True):
        assert optimizer.bits_of(weight) == bits
        sizes = {key: value.nbytes for key, value in optimizer.state[weight].items() if isinstance(value, torch.Tensor)}
        assert sum(sizes.values()) == state_bytes((32, 128), bits) * len(optimizer.state_names)


def through_safetensors(state_dict: dict) -> dict:
    """Written and read: tensors as safetensors, everything else as JSON."""
    states = {f"{number} {key}": value for number, state in state_dict["state"].items() for key, value in state.items()}
    tensors = {name: value for name, value in states.items() if isinstance(value, torch.Tensor)}
    rest, groups = json.loads(json.dumps([{name: states[name] for name in states.keys() - tensors}, state_dict["param_groups"]]))
    restored: dict[int, dict] = {}
    for name, value in {**load(save(tensors)), **rest}.items():
        restored.setdefault(int(name.split()[0]), {})[name.split()[1]] = value
    return {"state": restored, "param_groups": groups}


@FORMS
@DTYPES
def test_a_saved_state_continues_bit_for_bit(name, bits, dtype):
    weights = two_weights(dtype)
    optimizer = optimizer_of(name, weights, state_bits=bits)
    train(optimizer, 0, 3)
    copies = [nn.Parameter(weight.detach().clone()) for weight in weights]
    saved, unchanged = (through_safetensors(optimizer.state_dict()) for _ in range(2))
    restored = optimizer_of(name, copies, state_bits=bits, lr=0.5)
    restored.load_state_dict(saved)
    assert equal(restored.state_dict()["state"], optimizer.state_dict()["state"])
    train(optimizer, 3, 6)
    assert not equal(saved["state"], optimizer.state_dict()["state"])
    train(restored, 3, 6)
    assert all(map(equal, copies, weights))
    assert equal(restored.state_dict()["state"], optimizer.state_dict()["state"])
    assert equal(saved["state"], unchanged["state"])


@FORMS
def test_the_seed_decides_the_bits(name, bits):
    def trained(seed: int) -> list[nn.Parameter]:
        weights = two_weights(torch.bfloat16)
        train(optimizer_of(name, weights, state_bits=bits, seed=seed), 0, 3)
        return weights

    assert all(map(equal, trained(1), trained(1)))
    assert not any(map(torch.equal, trained(1), trained(2)))


@FORMS
@DTYPES
def test_slices_in_any_order_equal_the_whole(name, bits, dtype):
    whole, parts = (nn.Parameter(randn(41, 128, seed=1).to(dtype)) for _ in range(2))
    optimizers = [optimizer_of(name, [weight], state_bits=bits) for weight in (whole, parts)]
    for step in range(3):
        grad = randn(41, 128, seed=10 + step)
        optimizers[0].begin(whole)
        optimizers[0].update(whole, grad / 4)
        optimizers[1].begin(parts)
        for first, last in ((17, 41), (0, 16), (16, 17)):
            optimizers[1].update(parts, grad[first:last], start=first * 128, grad_scale=0.25)
        assert torch.equal(whole, parts)
        assert equal(optimizers[0].state_dict(), optimizers[1].state_dict())


@FORMS
def test_rows_without_gradient_only_decay(name, bits):
    weight = nn.Parameter(randn(40, 256, seed=1))
    before = weight.detach().clone()
    optimizer = optimizer_of(name, [weight], state_bits=bits, lr=0.5, weight_decay=0.5)
    for step in range(2):
        weight.grad = randn(40, 256, seed=step)
        weight.grad[3::5] = 0.0
        optimizer.step()
    assert torch.equal(weight[3::5], before[3::5] * 0.75 * 0.75)
    assert weight.isfinite().all()
    assert (weight != before * 0.75 * 0.75)[4::5].all()
    if bits != 32:
        assert (optimizer.state[weight]["exp_avg_scale"].view(40, 2)[3::5] == 0).all()


def test_a_sparse_gradient_and_a_start_inside_a_block_are_refused():
    embedding = nn.Embedding(64, 100, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    optimizer = AdamW(embedding.parameters())
    with pytest.raises(ValueError, match=r"the gradient is sparse.*use nn.Embedding\(sparse=False\)"):
        optimizer.step()
    with pytest.raises(ValueError, match="start is 100, must be a multiple of 128"):
        optimizer.update(embedding.weight, torch.ones(1, 100), start=100)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"state_bits": 16}, "state_bits is 16; allowed: 32, 8, 4"),
        ({"lr": -0.5}, "lr is -0.5, must be finite and 0 or more"),
        ({"lr": float("nan")}, "lr is nan, must be finite and 0 or more"),
        ({"betas": (0.9, 1.0)}, r"betas has 1.0, must be in \[0, 1\)"),
        ({"eps": -1e-8}, "eps is -1e-08, must be finite and 0 or more"),
        ({"params": [nn.Parameter(torch.ones(3).double())]}, "a parameter is torch.float64; allowed: fp32, bf16, fp16"),
        (
            {"weight_decay": -0.1, "lr": -2.0},
            "lr is -2.0, must be finite and 0 or more; weight_decay is -0.1, must be finite and 0 or more",
        ),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AdamW(**{"params": [nn.Parameter(torch.ones(3))], **settings})


@FORMS
def test_states_allocated_in_advance_change_nothing(name, bits):
    left, right = two_weights(torch.bfloat16), two_weights(torch.bfloat16)
    optimizers = [optimizer_of(name, weights, state_bits=bits) for weights in (left, right)]
    optimizers[0].allocate_states()
    sizes = [value.nbytes for state in optimizers[0].state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    assert sum(sizes) == (state_bytes((70, 128), bits) + state_bytes((80,), bits)) * len(optimizers[0].state_names)
    for optimizer in optimizers:
        train(optimizer, 0, 2)
    assert equal(optimizers[0].state_dict(), optimizers[1].state_dict())
    assert all(map(equal, left, right))


def test_every_width_that_is_offered_follows_a_gradient_that_turns():
    """As in tests/regression/numerics/test_optimizer_states.py, with the widths that followed it before, too."""
    for kind, bits in ((AdamW, 32), (AdamW, 8), (AdamW, 4), (Lion, 32), (Lion, 8)):
        weight = nn.Parameter(torch.full((32, 128), -1.0))
        optimizer = kind([weight], lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, state_bits=bits)
        before, after = (0.33, -0.3) if kind is AdamW else (0.155, -0.1)
        for step in range(1000):
            weight.grad = torch.full((32, 128), before if step < 300 else after)
            weight.grad[:, 0] = 8.0
            optimizer.step()
            if step == 299:
                turned = weight.detach().clone()
        assert (weight.detach() - turned)[:, 1:].min() > 0, (kind.__name__, bits)


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("kind", [AdamW, Lion])
def test_8_bits_end_a_quadratic_where_32_bits_do(kind, noise):
    """4,096 elements with curvatures of a decade, one of ten in each block; the last distance from the minimum."""

    def distance(bits: int) -> float:
        curvature = 0.1 + 0.9 * torch.rand(32, 128, generator=torch.Generator().manual_seed(1)).square()
        curvature[:, 0] = 10.0
        weight = nn.Parameter(randn(32, 128, seed=2))
        optimizer = kind([weight], lr=0.01, betas=(0.9, 0.99), weight_decay=0.0, state_bits=bits)
        for step in range(500):
            optimizer.param_groups[0]["lr"] = 0.01 * (1 - 0.9 * step / 500)
            weight.grad = curvature * weight.detach() + noise * randn(32, 128, seed=step)
            optimizer.step()
        return weight.detach().norm().item()

    assert distance(8) <= 1.15 * distance(32)
