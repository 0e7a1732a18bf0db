import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem.config.schema import LorptConfig, ModelConfig
from lowmem.models.registry import build_model
from lowmem.nn import lorpt
from lowmem.nn.recompute import cheap, run_block


class Block(torch.nn.Module):
    """A linear layer, a cheap activation, dropout, another linear layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

    def forward(self, x):
        return x + self.second(F.dropout(cheap(F.gelu, self.first(x)), 0.5))


@pytest.mark.parametrize("mode", ["block", "selective"])
def test_gradients_are_bit_equal_with_random_numbers_inside(mode):
    torch.manual_seed(0)
    block, x = Block(), torch.randn(5, 8)
    results = []
    for choice in ("none", mode):
        torch.manual_seed(1)
        hidden = x.clone().requires_grad_()
        out = run_block(block, hidden, choice)
        results.append((out, torch.rand(1), *torch.autograd.grad(out.square().sum(), [hidden, *block.parameters()])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Allocations(TorchDispatchMode):
    """Which storages that appeared inside are still alive, those of `known` tensors aside."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def live_bytes(self):
        return sum(size for key, (reference, size) in self.made.items() if key not in self.known and not reference.expired())


def test_each_mode_keeps_what_the_table_says(monkeypatch):
    monkeypatch.setattr("lowmem.nn.causal_attention._prefers_fused", lambda *_: False)
    width, hidden_dim, tokens = 16, 48, 2 * 32
    config = ModelConfig(dim=width, hidden_dim=hidden_dim, num_layers=1, num_heads=2)
    block = build_model(config, vocab_size=10, max_seq_len=32, seed=0).blocks[0]
    hidden = torch.randn(2, 32, width, requires_grad=True)
    block(hidden)  # makes the rotary table, which is kept anyway
    numbers = {}
    for mode in ("none", "selective", "block"):
        with Allocations([hidden, *block.parameters()]) as allocations:
            out = run_block(block, hidden, mode)
        numbers[mode] = (allocations.live_bytes() - out.nbytes) / tokens / 4
        del out
    # sum after attention, q, k, v, attention output; gate, up; one number per row for each norm
    assert numbers["selective"] == 5 * width + 2 * hidden_dim + 2
    assert numbers["none"] == numbers["selective"] + 2 * width + hidden_dim
    assert numbers["block"] * tokens * 4 < 8192  # nothing but the state of the random generator


def low_rank_block(width, hidden_dim, rank, heads=2, bottleneck="linear"):
    lorpt = LorptConfig(rank=rank, targets=["attention", "mlp"], bottleneck=bottleneck)
    config = ModelConfig(dim=width, hidden_dim=hidden_dim, num_layers=1, num_heads=heads, lorpt=lorpt)
    return build_model(config, vocab_size=10, max_seq_len=32, seed=0).blocks[0]


@pytest.mark.parametrize("bottleneck", ["linear", "silu"])
@pytest.mark.parametrize("fused", [False, True])
def test_low_rank_gradients_are_bit_equal(bottleneck, fused, monkeypatch):
    monkeypatch.setattr("lowmem.nn.causal_attention._prefers_fused", lambda *_: fused)
    block, x = low_rank_block(16, 48, 4, bottleneck=bottleneck), torch.randn(2, 32, 16)
    results = []
    for mode in ("none", "low_rank"):
        hidden = x.clone().requires_grad_()
        out = run_block(block, hidden, mode)
        results.append((out, *torch.autograd.grad(out.square().sum(), [hidden, *block.parameters()])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_low_rank_keeps_the_latents_and_nothing_that_is_computed_from_them(monkeypatch):
    monkeypatch.setattr("lowmem.nn.causal_attention._prefers_fused", lambda *_: False)
    width, hidden_dim, tokens, rank = 16, 48, 2 * 32, 4
    block = low_rank_block(width, hidden_dim, rank)
    hidden = torch.randn(2, 32, width, requires_grad=True)
    block(hidden)
    numbers = {}
    for mode in ("none", "selective", "low_rank"):
        with Allocations([hidden, *block.parameters(), *block.attention.rotary._tables]) as allocations:
            out = run_block(block, hidden, mode)
        numbers[mode] = (allocations.live_bytes() - out.nbytes) / tokens / 4
        del out
    # sum after attention, attention output; a latent of each of the seven layers; one number per row for each norm
    assert numbers["low_rank"] == 2 * width + 7 * rank + 2
    assert numbers["selective"] == numbers["low_rank"] + 3 * width + 2 * hidden_dim
    assert numbers["none"] == numbers["selective"] + 2 * width + hidden_dim


def test_low_rank_computes_each_upward_product_once_more(monkeypatch):
    block = low_rank_block(16, 48, 4)
    hidden = torch.randn(2, 32, 16, requires_grad=True)
    calls = []
    expand = lorpt._expand
    monkeypatch.setattr(lorpt, "_expand", lambda *a: calls.append(1) or expand(*a))
    out = run_block(block, hidden, "low_rank")
    assert len(calls) == 7
    out.sum().backward()
    # q, k, v, gate, up; the outputs of the other two are added to the residual stream and not asked for
    assert len(calls) == 7 + 5


def test_a_dense_layer_beside_low_rank_ones_is_kept_as_selective_keeps_it():
    lorpt = LorptConfig(rank=4, targets=["mlp"])
    config = ModelConfig(dim=16, hidden_dim=48, num_layers=1, num_heads=2, lorpt=lorpt, activation="gelu", positions="alibi")
    block, x = build_model(config, vocab_size=10, max_seq_len=32, seed=0).blocks[0], torch.randn(2, 32, 16)
    results = []
    for mode in ("none", "low_rank"):
        hidden = x.clone().requires_grad_()
        out = run_block(block, hidden, mode)
        results.append((out, *torch.autograd.grad(out.square().sum(), [hidden, *block.parameters()])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def gradients(mode, block, hidden, seed=3):
    torch.manual_seed(seed)
    out = run_block(block, hidden, mode)
    return torch.autograd.grad(out.float().square().sum(), [x for x in (hidden, *block.parameters()) if x.requires_grad])


def test_parameters_of_a_block_whose_input_needs_no_gradient_get_theirs():
    block, hidden = Block(), torch.randn(5, 8)
    found, wanted = gradients("block", block, hidden), gradients("none", block, hidden)
    assert len(found) == len(wanted) == 4
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_frozen_parameters_get_none():
    block, hidden = Block(), torch.randn(5, 8, requires_grad=True)
    block.first.requires_grad_(False)
    found, wanted = gradients("block", block, hidden), gradients("none", block, hidden)
    assert len(found) == len(wanted) == 3
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_block_is_computed_again_under_the_autocast_of_its_first_run():
    block, hidden = Block(), torch.randn(5, 8, requires_grad=True)
    results = []
    for mode in ("none", "block"):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = run_block(block, hidden, mode)
        results.append(torch.autograd.grad(out.float().square().sum(), [hidden, *block.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_going_back_leaves_the_random_numbers_that_follow_as_they_were():
    block, hidden = Block(), torch.randn(5, 8, requires_grad=True)
    drawn = []
    for mode in ("none", "block"):
        torch.manual_seed(1)
        run_block(block, hidden, mode).sum().backward()
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_a_graph_that_is_kept_is_gone_through_twice():
    block, hidden = Block(), torch.randn(5, 8, requires_grad=True)
    torch.manual_seed(1)
    loss = run_block(block, hidden, "block").square().sum()
    inputs = [hidden, *block.parameters()]
    first, second = torch.autograd.grad(loss, inputs, retain_graph=True), torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, inputs)


def test_what_a_block_computes_without_gradients_is_kept_by_nobody():
    class Gated(Block):
        def forward(self, x):
            with torch.no_grad():
                scale = self.first(x).sigmoid().mean()
            return super().forward(x) * scale

    block, hidden = Gated(), torch.randn(5, 8, requires_grad=True)
    found, wanted = gradients("block", block, hidden), gradients("none", block, hidden)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_the_second_run_ends_where_the_last_tensor_that_backward_needs_is_known():
    runs = []

    class Counted(Block):
        def forward(self, x):
            runs.append("begun")
            out = super().forward(x)
            runs.append("ended")
            return out

    run_block(Counted(), torch.randn(5, 8, requires_grad=True), "block").sum().backward()
    assert runs == ["begun", "ended", "begun"]


def test_a_second_run_that_keeps_less_is_an_error_and_not_a_wrong_gradient():
    class Changing(Block):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) if self.calls == 1 else x * 2

    out = run_block(Changing(), torch.randn(5, 8, requires_grad=True), "block")
    with pytest.raises(RuntimeError, match="a block kept 6 tensors for backward in its first run and 0 in its second"):
        out.sum().backward()


def test_tensors_of_the_second_run_go_with_the_nodes_that_needed_them():
    block, hidden = Block(), torch.randn(5, 8, requires_grad=True)
    with Allocations([hidden, *block.parameters()]) as allocations:
        out = run_block(block, hidden, "block")
        grad = torch.ones_like(out)
        known = allocations.live_bytes()
        torch.autograd.grad(out, hidden, grad)
        del out
        assert allocations.live_bytes() <= known
