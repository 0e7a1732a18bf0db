"""What models did wrong with their parameters and caches."""

import pytest
import torch

from lowmem.config import ModelConfig
from lowmem.models.registry import build_model
from lowmem.nn.lorpt import LoRPtLinear
from lowmem.nn.rank_change import change_rank


def small(positions: str = "rope", **choices):
    config = ModelConfig(**{"dim": 32, "num_layers": 1, "num_heads": 2, "positions": positions, **choices})
    return build_model(config, vocab_size=50, max_seq_len=16, seed=0)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_model_that_was_read_in_inference_mode_can_be_trained(stored):
    """What rotary positions keep was made in inference mode, and such tensors cannot be saved for backward."""
    model, tokens = small().to(stored), torch.arange(8).view(1, 8)
    with torch.inference_mode():
        expected = model(tokens, tokens)
    loss = model(tokens, tokens)
    loss.backward()
    assert torch.equal(loss, expected)
    assert all(parameter.grad is not None for parameter in model.parameters())


def wide_layer() -> LoRPtLinear:
    """Above its break-even, so that without gradients its product is kept."""
    return LoRPtLinear(8, 8, rank=6, bias=False, strict=False)


def kernel_update(tensor: torch.Tensor) -> None:
    """Writes through the address alone, as compiled kernels do."""
    tensor.detach().numpy()[:] *= 2


def test_a_product_of_factors_does_not_outlive_a_training_step():
    layer, x = wide_layer().eval(), torch.randn(1000, 8)
    with torch.no_grad():
        before = layer(x)
    layer.train()
    kernel_update(layer.up)
    layer.eval()
    with torch.no_grad():
        # the factor 2 is exact
        assert torch.equal(layer(x), 2 * before)


@pytest.mark.parametrize("change", ["load", "to", "rank"])
def test_a_product_of_factors_does_not_outlive_them(change):
    layer, x = wide_layer().eval(), torch.randn(1000, 8)
    with torch.no_grad():
        before = layer(x)
    kernel_update(layer.up)
    if change == "load":
        layer.load_state_dict({}, strict=False)
    elif change == "to":
        layer.to("cpu")
    else:
        change_rank(layer, 6, torch.Generator())
    with torch.no_grad():
        assert torch.equal(layer(x), 2 * before)


def test_a_layer_made_in_inference_mode_computes():
    with torch.inference_mode():
        layer, x = wide_layer(), torch.randn(1000, 8)
        first = layer(x)
        layer.up.mul_(2)
        assert torch.equal(layer(x), 2 * first)
