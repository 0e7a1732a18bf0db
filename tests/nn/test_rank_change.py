import pytest
import torch

from lowmem.nn.lorpt import LoRPtLinear
from lowmem.nn.lorptize import adopt_ranks, change_rank, check_rank, following_layers
from lowmem.system.errors import ConfigError


def generator():
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("bottleneck", ["linear", "silu"])
def test_growing_changes_nothing_that_is_computed_and_every_new_number_can_learn(bottleneck):
    torch.manual_seed(0)
    layer = LoRPtLinear(24, 32, rank=4, bottleneck=bottleneck).double()
    x = torch.randn(50, 24, dtype=torch.float64)
    before, down, up = layer(x).detach(), layer.down, layer.up
    change_rank(layer, 7, generator())
    assert (layer.rank, layer.down is down, layer.up is up) == (7, True, True)
    # the same products and zeros added, in another order: 28 roundings of numbers below 10
    torch.testing.assert_close(layer(x), before, rtol=0, atol=28 * 10 * 2**-52)
    layer(x).square().sum().backward()
    assert (layer.up.grad[:, 4:] != 0).all()
    assert layer.down[4:].std().item() == pytest.approx(layer.down[:4].std().item(), rel=0.5)


def test_shrinking_keeps_the_best_approximation_of_the_product():
    torch.manual_seed(0)
    layer = LoRPtLinear(24, 32, rank=8)
    left, values, right = torch.linalg.svd(layer.merged_weight().double(), full_matrices=False)
    best = (left[:, :3] * values[:3] @ right[:3]).float()
    change_rank(layer, 3, generator())
    # QR, SVD and products in fp32 of numbers below 1: 100 roundings
    torch.testing.assert_close(layer.merged_weight(), best, rtol=0, atol=100 * 2**-24)
    torch.testing.assert_close(layer.up.norm(dim=0), layer.down.norm(dim=1), rtol=1e-4, atol=0)


def test_shrinking_with_a_bottleneck_drops_the_latents_of_smallest_weight():
    torch.manual_seed(0)
    layer = LoRPtLinear(24, 32, rank=5, bottleneck="silu")
    with torch.no_grad():
        layer.up[:, 1] *= 1e-3
        layer.down[3] *= 1e-3
    kept = layer.up[:, [0, 2, 4]].clone()
    change_rank(layer, 3, generator())
    assert torch.equal(layer.up, kept)


def test_gradients_must_be_gone():
    layer = LoRPtLinear(24, 32, rank=4)
    layer(torch.randn(2, 24)).sum().backward()
    with pytest.raises(ValueError, match="gradients are alive"):
        change_rank(layer, 5, generator())


def test_which_layers_follow_and_which_ranks_are_refused():
    model = torch.nn.ModuleDict({"a": LoRPtLinear(24, 32, 4), "b": LoRPtLinear(24, 24, 4), "c": torch.nn.Linear(2, 2)})
    assert [name for name, _ in following_layers(model, {})] == ["a", "b"]
    layers = list(following_layers(model, {"a": 2}))
    assert [name for name, _ in layers] == ["b"]
    check_rank(layers, 11)
    with pytest.raises(ConfigError, match=r"asks for 12, layer b \(24x24\) allows 1 to below in\*out/\(in\+out\) = 12\.0"):
        check_rank(layers, 12)
    with pytest.raises(ConfigError, match="no low-rank layer"):
        check_rank([], 3)


def test_adopting_the_ranks_of_a_file():
    model = torch.nn.ModuleDict({"a": LoRPtLinear(24, 32, 4), "b": LoRPtLinear(24, 24, 4)})
    shapes = {"a.down": (9, 24), "a.up": (32, 9), "b.down": (9, 25), "b.up": (24, 9)}
    adopt_ranks(model, shapes)
    assert (model["a"].rank, model["b"].rank) == (9, 4)  # what fits neither is for the reader of the file to refuse
