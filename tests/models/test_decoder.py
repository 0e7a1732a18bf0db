import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem.config.schema import LorptConfig, ModelConfig
from lowmem.models.base import LossOptions
from lowmem.models.registry import build_model
from lowmem.system.errors import ConfigError

V, T = 29, 12


def make(seed=0, vocab_size=V, max_seq_len=T, **fields):
    fields = {"dim": 32, "num_layers": 2, "num_heads": 4, **fields}
    return build_model(ModelConfig(**fields), vocab_size=vocab_size, max_seq_len=max_seq_len, seed=seed)


def tokens(batch=3, time=T, seed=1):
    return torch.randint(0, V, (batch, time), generator=torch.Generator().manual_seed(seed))


ALL_LOW_RANK = LorptConfig(rank=4, targets=["attention", "mlp", "head"])
VARIANTS = [
    {"positions": positions, "norm": norm, "activation": activation, "tie_embeddings": tied, "attention_rank": rank, "lorpt": lorpt}
    for positions, (norm, activation), tied, rank, lorpt in itertools.product(
        ("rope", "alibi", "learned"),
        (("rmsnorm", "swiglu"), ("layernorm", "gelu")),
        (False, True),
        (0, 4),
        (LorptConfig(), ALL_LOW_RANK),
    )
    if not (tied and lorpt.rank)
] + [{"lorpt": LorptConfig(rank=4, bottleneck="silu")}, {"tie_embeddings": True, "lorpt": LorptConfig(rank=4)}]


@pytest.mark.parametrize("fields", VARIANTS)
def test_loss_counts_and_cache_of_every_variant(fields):
    model, inputs, targets = make(**fields), tokens(), tokens(seed=2)
    targets[0, :5] = -100
    with torch.no_grad():
        logits = model(inputs)
        expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / 10
        # a loss near 10 from 31 tokens: 31 * 2^-24 * 10 = 2e-5
        assert model(inputs, targets, 10.0).item() == pytest.approx(expected.item(), abs=2e-5)
        cache = model.new_cache(3, T)
        pieces = [model(inputs[:, :5], cache=cache)] + [model(inputs[:, i : i + 1], cache=cache) for i in range(5, T)]
        # logits of size 0.5 after 2 blocks of sums of up to 128 products: 128 * 0.5 * 2^-24 = 4e-6
        torch.testing.assert_close(torch.cat(pieces, 1), logits, rtol=0, atol=4e-6)
    assert cache.length == T
    assert sum(model.component_parameters().values()) == model.num_parameters()
    assert "other" not in model.component_parameters()
    assert model.component_bytes() == {name: 4 * count for name, count in model.component_parameters().items()}


@pytest.mark.parametrize("fields", VARIANTS[::5])
def test_nothing_comes_from_the_future(fields):
    model, inputs = make(**fields), tokens()
    changed = inputs.clone()
    changed[:, 7] = (changed[:, 7] + 1) % V
    with torch.no_grad():
        before, after = model(inputs), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert all((before[:, i] != after[:, i]).any() for i in range(7, T))


@pytest.mark.parametrize("mode", ["block", "selective"])
@pytest.mark.parametrize("fields", [{}, {"norm": "layernorm", "activation": "gelu", "positions": "alibi"}, {"lorpt": ALL_LOW_RANK}])
def test_recomputation_changes_no_bit_of_the_gradients(mode, fields):
    model, inputs, targets = make(**fields), tokens(), tokens(seed=2)
    results = []
    for choice in ("none", mode):
        model.activation_checkpointing = choice
        loss = model(inputs, targets, 36.0)
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_micro_batches_add_up_to_the_batch():
    model, inputs, targets = make().double(), tokens(4), tokens(4, seed=2)
    model(inputs, targets, 48.0).backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for rows in (slice(0, 1), slice(1, 4)):
        model(inputs[rows], targets[rows], 48.0).backward()
    for parameter, expected in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-15)


def test_the_parts_driven_one_by_one_are_the_whole():
    model, inputs, targets = make(), tokens(), tokens(seed=2)
    hidden = model.embed(inputs)
    for block in model.blocks:
        hidden = block(hidden)
    assert torch.equal(model.head_loss(hidden, targets, 36.0), model(inputs, targets, 36.0))


def test_loss_options_apply_in_training_only():
    model, inputs, targets = make(), tokens(), tokens(seed=2)
    plain = model(inputs, targets).item()
    model.loss_options = LossOptions(chunk_tokens=5, label_smoothing=0.1, z_loss=0.01)
    assert model(inputs, targets).item() > plain + 0.01  # z-loss adds 36 * 0.01 * log(29)^2 = 4
    model.eval()
    assert model(inputs, targets).item() == pytest.approx(plain, rel=1e-6)


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = make(seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    again, other = make(seed=3), make(seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.head.weight, other.head.weight)


def test_initial_scale_and_loss():
    model = make(dim=256, num_layers=8, vocab_size=1000)
    block = model.blocks[0]
    # 65,536 draws or more: relative error of the estimate below 0.28 %, five of them 1.4 %
    for weight in (model.embedding.weight, block.attention.qkv.weight, block.mlp.gate_up.weight, model.head.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.014)
    for weight in (block.attention.out.weight, block.mlp.down.weight):
        assert weight.std().item() == pytest.approx(0.02 / 4, rel=0.014)  # sqrt(2 * 8 layers)
    # logits have std 0.02 * sqrt(256) = 0.32: log(1000) + 0.32^2 / 2 = 6.96
    assert model(tokens(), tokens(seed=2), 36.0).item() == pytest.approx(6.96, abs=0.25)


def test_positions_matter_and_extrapolate_where_they_can():
    longer = tokens(time=2 * T)
    for positions in ("rope", "alibi"):
        assert make(positions=positions)(longer).isfinite().all()
    with pytest.raises(ConfigError, match=r"sequence of 24 tokens.*max_seq_len = 12"):
        make(positions="learned")(longer)
    repeated = torch.zeros(1, T, dtype=torch.int64)
    repeated[0, 0] = 1
    for positions in ("rope", "alibi", "learned"):
        logits = make(positions=positions)(repeated)
        assert (logits[0, 5] != logits[0, 9]).any()


class Products(TorchDispatchMode):
    """Floating point operations of all two-dimensional matrix products."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = args[:2] if func.overloadpacket is torch.ops.aten.mm else args[1:3]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fields", [{}, {"tie_embeddings": True}, {"lorpt": ALL_LOW_RANK}, {"attention_rank": 4, "activation": "gelu"}])
def test_flops_are_those_of_every_matrix_product(fields):
    model = make(**fields)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    with Products() as products:
        torch.autograd.grad(model(tokens(), tokens(seed=2)), matrices)
    # attention is 2 layers of 2 products forward and 4 backward over (T + 1) / 2 keys of 32 channels, in batched products
    attention = 2 * (2 + 4) * 2 * 32 * (T + 1) // 2
    assert products.flops == (model.flops_per_token(T) - attention) * 3 * T


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["none", "block", "selective"])
def test_autocast(dtype, mode):
    model, inputs, targets = make(), tokens(), tokens(seed=2)
    exact = model(inputs, targets, 36.0)
    exact_grads = torch.autograd.grad(exact, list(model.parameters()))
    model.activation_checkpointing = mode
    with torch.autocast("cpu", dtype):
        loss = model(inputs, targets, 36.0)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    assert loss.dtype == torch.float32
    # a dozen roundings of 2^-9 (mean, bf16) on the way to a gradient: sqrt(12) * 2^-9 = 0.7 %; 3 % for the smallest ones
    assert loss.item() == pytest.approx(exact.item(), rel=2e-3)
    for grad, expected in zip(grads, exact_grads, strict=True):
        assert grad.dtype == torch.float32
        assert ((grad - expected).norm() / expected.norm()).item() < 0.03


def test_pure_bf16_weights():
    model, inputs, targets = make(), tokens(), tokens(seed=2)
    exact = model(inputs, targets, 36.0)
    model.bfloat16()
    loss = model(inputs, targets, 36.0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=2e-3)
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("mode", ["none", "block", "selective"])
def test_runs_without_data(mode):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        model = make(positions="alibi" if mode == "none" else "rope")
        model.activation_checkpointing = mode
        fake = torch.zeros(2, T, dtype=torch.int64)
        loss = model(fake, fake, 24.0)
        loss.backward()
    assert type(loss) is not torch.Tensor
    assert all(p.grad.shape == p.shape for p in model.parameters())


def test_lorpt_patterns_reach_the_layers_they_name():
    lorpt = LorptConfig(rank=4, targets=["attention", "mlp"], ranks={"blocks.0.*": 0, "*.down": 8})
    model = make(lorpt=lorpt)
    first, second = model.blocks
    assert first.mlp.down.weight.shape == (32, 128)
    assert (second.mlp.down.rank, second.mlp.gate_up.gate.rank, second.attention.qkv.q.rank) == (8, 4, 4)
    with pytest.raises(ConfigError, match=r"nothing\.\*"):
        make(lorpt=LorptConfig(rank=4, ranks={"nothing.*": 2}))


def test_a_rank_that_saves_nothing_names_layer_and_break_even():
    # 32 * 32 / 64 = 16
    with pytest.raises(ConfigError, match=r"blocks\.0\.attention\.qkv\.q.*is 16.*16\.0"):
        make(lorpt=LorptConfig(rank=16, targets=["attention"]))
    with pytest.raises(ConfigError, match=r"attention_rank is 16.*= 16"):
        make(attention_rank=16)


def test_settings_that_would_be_ignored_are_refused():
    with pytest.raises(ConfigError) as error:
        make(state_dim=16, positions="alibi", rope_theta=500.0, tie_embeddings=True, lorpt=LorptConfig(rank=4, targets=["head"]))
    for found in ("state_dim is 16", "rope_theta is 500.0", "targets has head"):
        assert found in str(error.value)
