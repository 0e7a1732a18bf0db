import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem.config.schema import LorptConfig
from lowmem.nn import causal_attention as module
from lowmem.nn.attention import Attention, LayerCache, LowRankAttention
from lowmem.nn.causal_attention import blocked_attention, cached_attention, causal_attention
from lowmem.nn.lorpt import LinearFactory
from lowmem.nn.positions import RotaryTable, alibi_slopes
from lowmem.system.errors import ConfigError
from tests.reference import model_oracles as oracles


def inputs(time, dtype=torch.float64, heads=4, width=8):
    torch.manual_seed(0)
    return [torch.randn(2, heads, time, width, dtype=dtype, requires_grad=True) for _ in range(3)]


def oracle_gradients(tensors, bias, grad):
    exact = [x.detach().double().requires_grad_() for x in tensors]
    out = oracles.attention(*exact, bias)
    return out, torch.autograd.grad(out, exact, grad.double())


@pytest.mark.parametrize("function", [causal_attention, blocked_attention])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("time", [1, 7, 33, 150])
def test_equals_the_definition(function, alibi, time):
    tensors = inputs(time)
    bias = oracles.alibi_bias(4, time) if alibi else None
    out = function(*tensors, alibi_slopes(4) if alibi else ())
    grad = torch.randn_like(out)
    expected, expected_grads = oracle_gradients(tensors, bias, grad)
    # up to 150 terms of size 10: 150 * 10 * 2^-53 = 1.7e-13
    torch.testing.assert_close(out, expected, rtol=0, atol=5e-13)
    for found, exact in zip(torch.autograd.grad(out, tensors, grad), expected_grads, strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=5e-13)


def test_groups_of_heads_find_their_slopes(monkeypatch):
    monkeypatch.setattr(module, "MAX_SCORES", 2 * 32 * 33)  # two heads at a time
    test_equals_the_definition(blocked_attention, True, 33)


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("sequences, heads_at_once", [(6, 2), (6, 4), (6, 12), (6, 24), (5, 11)])
def test_every_sequence_of_a_group_finds_its_own_segments(monkeypatch, sequences, heads_at_once, alibi):
    """Groups of half a sequence, of one, of three and of all, and one whose room no number of sequences fills.

    One key is a hundred times the others, with either sign.
    """
    monkeypatch.setattr(module, "MAX_SCORES", heads_at_once * module.MIN_BLOCK * 33)
    torch.manual_seed(1)
    tensors = [torch.randn(sequences, 4, 33, 8, dtype=torch.float64) for _ in range(3)]
    tensors[1][::2, :, 5] *= 100
    tensors[1][1::2, :, 5] *= -100
    segments = torch.rand(sequences, 33).gt(0.8).cumsum(1)
    assert len(segments.unique(dim=0)) == sequences
    tensors = [x.requires_grad_() for x in tensors]
    bias = torch.zeros(sequences, 1, 33, 33, dtype=torch.float64).masked_fill(
        segments[:, None, :, None] != segments[:, None, None, :], -torch.inf
    )
    if alibi:
        bias = bias + oracles.alibi_bias(4, 33)
    out = blocked_attention(*tensors, alibi_slopes(4) if alibi else (), segments)
    grad = torch.randn_like(out)
    expected, expected_grads = oracle_gradients(tensors, bias, grad)
    # 33 terms of 10; the products with the large key are of 1,000: 33 * 1000 * 2^-53 = 4e-12
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)
    for found, exact in zip(torch.autograd.grad(out, tensors, grad), expected_grads, strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-11)


@pytest.mark.parametrize("native", [False, True])
def test_many_blocks_sum_their_gradients_in_fp32(monkeypatch, native):
    monkeypatch.setattr(module, "MAX_BLOCK", 32)
    monkeypatch.setattr(module, "_native_bf16", lambda: native)
    tensors = inputs(1024, torch.bfloat16, heads=1)
    out = blocked_attention(*tensors)
    grad = torch.randn_like(out)
    expected, expected_grads = oracle_gradients(tensors, None, grad)
    # where bf16 is multiplied: gradients of weights, of scores and the result lose 2^-9 each, sqrt(3) * 2^-9 = 0.34 %;
    # 32 blocks summed in bf16 would add sqrt(32) * 2^-9 = 1.1 %
    for found, exact in zip((out, *torch.autograd.grad(out, tensors, grad)), (expected, *expected_grads), strict=True):
        assert ((found.double() - exact).norm() / exact.norm()).item() < 0.004


def test_gradcheck():
    tensors = [torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: blocked_attention(*x, alibi_slopes(2)), tensors)


def test_nothing_comes_from_the_future():
    q, k, v = (x.detach() for x in inputs(40))
    before = blocked_attention(q, k, v)
    for x in (q, k, v):
        x[:, :, 25:] += 1.0
    after = blocked_attention(q, k, v)
    assert torch.equal(before[:, :25], after[:, :25])
    assert (before[:, 25:] != after[:, 25:]).any()


def test_never_holds_the_whole_score_matrix():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.elements = max(self.elements, out.numel())
            return out

    tensors = [torch.randn(1, 1, 512, 4, requires_grad=True) for _ in range(3)]
    with Largest() as largest:
        blocked_attention(*tensors).sum().backward()
    assert largest.elements == 512 * 128


@pytest.mark.parametrize("time", [1, 4])
@pytest.mark.parametrize("alibi", [False, True])
def test_cached_attention_is_the_tail_of_the_whole(alibi, time):
    q, k, v = inputs(9)
    whole = oracles.attention(q, k, v, oracles.alibi_bias(4, 9) if alibi else None)
    tail = cached_attention(q[:, :, -time:], k, v, alibi_slopes(4) if alibi else ())
    torch.testing.assert_close(tail, whole[:, -time:], rtol=0, atol=1e-13)  # 9 terms of size 10


def test_low_rank_shrinks_weights_and_cache():
    factory = LinearFactory(LorptConfig())
    full = Attention(64, 4, factory, "a")
    low = LowRankAttention(64, 4, factory, "a", rank=8, factor_std=0.1)
    assert sum(p.numel() for p in full.parameters()) == 4 * 64 * 64
    assert sum(p.numel() for p in low.parameters()) == 3 * (64 * 8 + 8 * 64) + 64 * 64
    caches = [LayerCache(2, 10, layer.cache_widths, torch.float32, torch.device("cpu")) for layer in (full, low)]
    assert [cache.nbytes() for cache in caches] == [2 * 10 * 2 * 64 * 4, 2 * 10 * 2 * 8 * 4]


@pytest.mark.parametrize("rank", [32, 64])
def test_a_rank_that_saves_nothing_is_refused(rank):
    with pytest.raises(ConfigError, match=rf"attention_rank is {rank}, .*below model.dim / 2 = 32"):
        LowRankAttention(64, 4, LinearFactory(LorptConfig()), "a", rank=rank, factor_std=0.1)


def test_low_rank_attention_is_full_attention_with_multiplied_maps():
    torch.manual_seed(0)
    low = LowRankAttention(16, 2, LinearFactory(LorptConfig()), "a", rank=3, factor_std=0.5, rotary=RotaryTable(8, 100.0)).double()
    full = Attention(16, 2, LinearFactory(LorptConfig()), "a", rotary=RotaryTable(8, 100.0)).double()
    with torch.no_grad():
        ups = (low.q_up.weight, low.k_up.weight, low.v_up.weight)
        full.qkv.weight.copy_(torch.cat([up @ down for up, down in zip(ups, low.latents.weight.split(3), strict=True)]))
        full.out.weight.copy_(low.out.weight)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(low(x), full(x), rtol=0, atol=1e-13)  # sums of 16 products of size 1 in another order


def test_a_full_cache_says_so():
    cache = LayerCache(2, 4, (3,), torch.float32, torch.device("cpu"))
    cache.append(torch.ones(2, 3, 3))
    with pytest.raises(ValueError, match=r"2 sequences of 3 \+ 2 tokens, the cache holds 2 of at most 4"):
        cache.append(torch.ones(2, 2, 3))
