import pytest
import torch
from torch import nn

from lowmem.nn import layers as module
from lowmem.nn.layers import Embedding, embedding, embedding_gradient, use_exact_gradients


@pytest.fixture
def narrow_blocks(monkeypatch):
    """Blocks of two columns, so that five columns need three."""
    monkeypatch.setattr(module, "WIDE_BYTES", 1)
    monkeypatch.setattr(module, "MIN_COLUMNS", 2)


def skewed(tokens: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of which half are 3, and what their gradients are."""
    indices = torch.randint(0, 7, (tokens,))
    indices[::2] = 3
    return indices, (0.05 + 0.1 * torch.randn(tokens, 5)).bfloat16()


def test_gradcheck():
    indices = torch.tensor([[0, 3, 3], [1, 0, 6]])
    weight = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: embedding(indices, w), (weight,))


def test_blocks_of_columns_are_the_exact_sum_rounded_once(narrow_blocks):
    indices, grad = skewed()
    exact = torch.zeros(7, 5, dtype=torch.float64).index_add_(0, indices, grad.double())
    # half a unit of 8 bits, and 2^11 terms of fp32 that may cancel to a tenth of their magnitudes
    torch.testing.assert_close(embedding_gradient(indices, grad, 7).double(), exact, rtol=2**-8, atol=2**-9)


def test_the_same_bits_always():
    indices, grad = skewed()
    assert torch.equal(embedding_gradient(indices, grad, 7), embedding_gradient(indices, grad, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [3, -4])
def test_a_padding_row_has_no_gradient(dtype, padding, narrow_blocks):
    indices, grad = skewed()
    layer, plain = Embedding(7, 5, padding_idx=padding).to(dtype), nn.Embedding(7, 5, padding_idx=padding)
    layer(indices).backward(grad.to(dtype))
    plain(indices).backward(grad.float())
    assert not layer.weight.grad[3].any()
    torch.testing.assert_close(layer.weight.grad.float(), plain.weight.grad, rtol=2**-8, atol=2**-9)


def test_it_runs_on_tensors_without_memory(narrow_blocks):
    indices, grad = torch.empty(2, 3, dtype=torch.int64, device="meta"), torch.empty(2, 3, 5, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(7, 5, dtype=torch.bfloat16, device="meta", requires_grad=True)
    embedding(indices, weight).backward(grad)
    assert weight.grad.shape == (7, 5)
    assert weight.grad.dtype == torch.bfloat16


def test_only_indices_are_saved():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        Embedding(7, 5)(torch.tensor([1, 2]))
    assert [tensor.tolist() for tensor in saved] == [[1, 2]]


class Scaled(nn.Embedding):
    """As in Gemma."""

    def forward(self, input):
        return super().forward(input) * 4


def test_modules_of_other_libraries_keep_what_they_compute():
    model = nn.ModuleList(
        [nn.Embedding(7, 5), Scaled(7, 5), nn.LayerNorm(5), nn.LayerNorm(5, bias=False), nn.LayerNorm(5, elementwise_affine=False)]
    )
    model = model.bfloat16()
    indices, grad = skewed()
    x = grad.flip(0)
    before = [layer(indices if isinstance(layer, nn.Embedding) else x) for layer in model]
    names = [type(layer).__name__ for layer in model]
    use_exact_gradients(model)
    use_exact_gradients(model)
    assert type(model[1]).__name__ == names[1]
    assert list(model.state_dict()) == ["0.weight", "1.weight", "2.weight", "2.bias", "3.weight"]
    exact = torch.zeros(7, 5, dtype=torch.float64).index_add_(0, indices, grad.double())
    for index, (layer, old) in enumerate(zip(model, before, strict=True)):
        new = layer(indices if index < 2 else x)
        # weights of one: the norms' statistics alone may differ, by their own rounding to 8 bits before
        torch.testing.assert_close(new, old, rtol=2**-7 if index >= 2 else 0, atol=2**-7 if index >= 2 else 0)
        if new.requires_grad:
            new.backward(grad)
    torch.testing.assert_close(model[0].weight.grad.double(), exact, rtol=2**-8, atol=2**-9)
    # Scaled multiplies each gradient before it is summed; by a power of two, so without a rounding
    torch.testing.assert_close(model[1].weight.grad.double(), 4 * exact, rtol=2**-8, atol=2**-7)
    torch.testing.assert_close(model[2].bias.grad.double(), grad.double().sum(0), rtol=2**-8, atol=2**-7)
    torch.testing.assert_close(model[2].weight.grad, model[3].weight.grad, rtol=0, atol=0)


def test_embeddings_that_do_more_are_left_alone():
    model = nn.ModuleList([nn.Embedding(7, 5, max_norm=1.0), nn.Embedding(7, 5, sparse=True), nn.LayerNorm((3, 5))])
    use_exact_gradients(model)
    assert [type(layer) for layer in model] == [nn.Embedding, nn.Embedding, nn.LayerNorm]
