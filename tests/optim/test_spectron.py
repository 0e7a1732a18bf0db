import copy

import pytest
import torch

from lowmem.config.schema import LorptConfig, ModelConfig, OptimConfig
from lowmem.models.registry import build_model
from lowmem.optim.from_config import allocate_states, build_optimizer, set_learning_rate, spectron_groups
from lowmem.optim.spectron import UPDATE_RMS, Spectron, orthogonalize, spectral_norm


def test_orthogonalised_matrices_keep_their_vectors_and_lose_their_scale():
    torch.manual_seed(0)
    matrices = torch.randn(3, 16, 40) * torch.tensor([1e-4, 1.0, 1e4]).view(3, 1, 1)
    result = orthogonalize(matrices)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    projected = left.mT @ result @ right.mT
    diagonal = projected.diagonal(dim1=1, dim2=2)
    # five steps of the quintic map [0.02, 1] into [0.65, 1.25]; a random 16x40 matrix has no singular value below 0.02 of its norm
    assert ((diagonal > 0.65) & (diagonal < 1.25)).all()
    # odd polynomials keep singular vectors: what is off the diagonal is rounding, amplified by at most 3.4445^5
    assert (projected - torch.diag_embed(diagonal)).abs().max() < 500 * 40 * 2**-24
    assert orthogonalize(torch.zeros(1, 4, 8)).eq(0).all()


def test_spectral_norm_converges_from_below():
    torch.manual_seed(0)
    matrices = torch.randn(2, 10, 30)
    vectors = torch.full((2, 10), 10**-0.5)
    exact = torch.linalg.matrix_norm(matrices, 2)
    estimates = [spectral_norm(matrices, vectors) for _ in range(200)]
    assert all((estimate <= exact * (1 + 1e-6)).all() for estimate in estimates)
    torch.testing.assert_close(estimates[-1], exact, rtol=1e-4, atol=0)


def pair(dtype=torch.float32, rank=8, in_features=96, out_features=64):
    torch.manual_seed(0)
    down, up = torch.randn(rank, in_features) * 0.1, torch.randn(out_features, rank) * 0.1
    return [torch.nn.Parameter(p.to(dtype)) for p in (down, up)]


def with_gradients(parameters, seed=1):
    torch.manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape).to(p.dtype)


def test_one_step_is_the_formula():
    down, up = pair()
    with_gradients([down, up])
    old = down.detach().clone(), up.detach().clone()
    optimizer = Spectron([{"params": [down, up], "rule": "factors", "weight_decay": 0.1}], lr=0.01, momentum=0.9)
    sigmas = [torch.linalg.matrix_norm(p.detach(), 2) for p in (down, up)]
    optimizer.step()
    for p, before in zip((down, up), old, strict=True):
        flat = p.grad if p.shape[0] <= p.shape[1] else p.grad.mT
        direction = orthogonalize(0.1 * flat.unsqueeze(0))[0]
        direction = direction if p.shape[0] <= p.shape[1] else direction.mT
        rho = 0.01 * UPDATE_RMS * 96**0.5 / (sum(sigmas) + 1)
        # ten power iterations find sigma to a few per cent, from below
        torch.testing.assert_close(before * (1 - 0.001) - p.detach(), rho * direction, rtol=0.05, atol=2**-23)


def test_the_product_moves_no_further_than_the_bound():
    down, up = pair()
    before = up.detach() @ down.detach()
    with_gradients([down, up])
    Spectron([{"params": [down, up], "rule": "factors"}], lr=0.01).step()
    moved = torch.linalg.matrix_norm(up.detach() @ down.detach() - before, 2)
    # |O| <= 1.25 and sigma from below by at most 5 %: 1.25 * 1.05 of lr * s
    assert 0 < moved <= 1.25 * 1.05 * 0.01 * UPDATE_RMS * 96**0.5


def test_alike_matrices_in_one_batch_move_as_each_alone():
    torch.manual_seed(0)
    together = [torch.nn.Parameter(torch.randn(shape)) for shape in ((16, 32), (32, 16), (16, 32))]
    alone = copy.deepcopy(together)
    with_gradients(together)
    with_gradients(alone)
    Spectron([{"params": together, "rule": "matrix"}], lr=0.01).step()
    for p in alone:
        Spectron([{"params": [p], "rule": "matrix"}], lr=0.01).step()
    for a, b in zip(together, alone, strict=True):
        # batched and single products may sum in another order: 32 terms below 1, through five steps that amplify by 3.4445
        torch.testing.assert_close(a, b, rtol=0, atol=0.01 * 500 * 32 * 2**-24)


def test_a_fused_matrix_moves_like_its_parts():
    torch.manual_seed(0)
    parts = [torch.nn.Parameter(torch.randn(16, 16)) for _ in range(3)]
    fused = torch.nn.Parameter(torch.cat([p.detach() for p in parts]))
    with_gradients(parts)
    fused.grad = torch.cat([p.grad for p in parts])
    Spectron([{"params": [fused], "rule": "matrix", "splits": [(16, 16, 16)]}], lr=0.01).step()
    Spectron([{"params": parts, "rule": "matrix"}], lr=0.01).step()
    torch.testing.assert_close(fused.detach(), torch.cat([p.detach() for p in parts]), rtol=0, atol=0.01 * 500 * 16 * 2**-24)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_of_each_width_and_narrow_weights(bits, dtype):
    down, up = pair(dtype, rank=64, in_features=96, out_features=96)
    optimizer = Spectron([{"params": [down, up], "rule": "factors"}], lr=0.01, state_bits=bits)
    exact = [torch.nn.Parameter(p.detach().float()) for p in (down, up)]
    reference = Spectron([{"params": exact, "rule": "factors"}], lr=0.01)
    for seed in range(3):
        with_gradients([down, up], seed)
        for p, q in zip((down, up), exact, strict=True):
            q.grad = p.grad.float()
        optimizer.step()
        reference.step()
    size = {32: 4, 8: 1}[bits] * 64 * 96 + (0 if bits == 32 else 4 * 64 * 96 / 128)
    state = optimizer.state[down]
    assert sum(state[name].nbytes for name in state if name.startswith("exp_avg")) == size
    assert "exp_avg_sq" not in state
    for p, q in zip((down, up), exact, strict=True):
        moved, wanted = p.detach().float(), q.detach()
        assert torch.nn.functional.cosine_similarity(moved.flatten(), wanted.flatten(), 0) > 0.999


def test_a_step_by_updates_equals_a_step():
    """What a layerwise engine does: begin, then update with the whole gradient."""
    one, other = pair(), pair()
    with_gradients(one)
    with_gradients(other)
    whole = Spectron([{"params": one, "rule": "factors"}], lr=0.01)
    parts = Spectron([{"params": other, "rule": "factors"}], lr=0.01)
    whole.step()
    for p in other:
        parts.begin(p)
        parts.update(p, p.grad * 2, grad_scale=0.5)
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=0)
    # the second factor's rho sees the first one's new sigma: it moved by at most lr * s
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=0.01 * 0.05)
    with pytest.raises(ValueError, match="needs the whole one"):
        parts.update(other[0], other[0].grad.view(-1)[:128], start=0)


def test_state_dict_round_trip_is_bit_exact():
    one, other = pair(), pair()
    first = Spectron([{"params": one, "rule": "factors"}], lr=0.01, state_bits=8)
    second = Spectron([{"params": other, "rule": "factors"}], lr=0.01, state_bits=8)
    with_gradients(one)
    first.step()
    with torch.no_grad():
        for p, q in zip(one, other, strict=True):
            q.copy_(p)
    second.load_state_dict(first.state_dict())
    with_gradients(one, 2)
    with_gradients(other, 2)
    first.step()
    second.step()
    assert all(torch.equal(p, q) for p, q in zip(one, other, strict=True))


def test_mistakes_are_named():
    down, up = pair()
    for groups, message in (
        ([{"params": [up, down], "rule": "factors"}], "in such pairs"),
        ([{"params": [down], "rule": "factors"}], "in such pairs"),
        ([{"params": [torch.nn.Parameter(torch.zeros(3))], "rule": "matrix"}], "found one of 1 dimensions"),
        ([{"params": [down], "rule": "muon"}], "rule is muon; allowed: adamw, matrix, factors"),
    ):
        with pytest.raises(ValueError, match=message):
            Spectron(groups)


LORPT = LorptConfig(rank=4, targets=["attention", "mlp", "head"], ranks={"blocks.0.mlp.*": 0})


def test_which_parameters_follow_which_rule():
    model = build_model(ModelConfig(dim=32, num_layers=2, num_heads=2, lorpt=LORPT), vocab_size=50, max_seq_len=16, seed=0)
    groups = {g["rule"]: g for g in spectron_groups(model, OptimConfig(name="spectron", lr=0.01, matrix_lr=0.03)) if "rule" in g}
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in groups["matrix"]["params"]] == ["blocks.0.mlp.gate_up.weight", "blocks.0.mlp.down.weight"]
    assert groups["matrix"]["splits"] == [(128, 128), ()]
    factors = [names[id(p)] for p in groups["factors"]["params"]]
    assert factors[:2] == ["blocks.0.attention.qkv.q.down", "blocks.0.attention.qkv.q.up"]
    assert factors[-2:] == ["head.down", "head.up"]
    optimizer = build_optimizer(model, OptimConfig(name="spectron", lr=0.01, matrix_lr=0.03))
    assert len({id(p) for g in optimizer.param_groups for p in g["params"]}) == len(list(model.parameters()))
    set_learning_rate(optimizer, 0.02)
    assert {g["rule"]: round(g["lr"], 9) for g in optimizer.param_groups} == {"factors": 0.06, "matrix": 0.06, "adamw": 0.02}


def test_a_dense_or_tied_head_and_the_embedding_are_left_to_adamw():
    for tied in (False, True):
        model = build_model(ModelConfig(dim=32, num_layers=1, num_heads=2, tie_embeddings=tied), vocab_size=50, max_seq_len=16, seed=0)
        optimizer = build_optimizer(model, OptimConfig(name="spectron"))
        rules = {id(p): g["rule"] for g in optimizer.param_groups for p in g["params"]}
        found = {name: rules[id(p)] for name, p in model.named_parameters() if p.ndim == 2}
        expected = {name: "matrix" if name.startswith("blocks") else "adamw" for name in found}
        assert found == expected


def test_states_can_be_allocated_ahead_and_on_the_meta_device():
    with torch.device("meta"):
        model = build_model(ModelConfig(dim=32, num_layers=1, num_heads=2, lorpt=LORPT), vocab_size=50, max_seq_len=16, seed=0)
        optimizer = build_optimizer(model, OptimConfig(name="spectron", state_bits=8))
        allocate_states(optimizer)
        x = torch.zeros(1, 16, dtype=torch.int64)
        model(x, x, 16.0).backward()
        optimizer.step()
    assert {"step", "exp_avg", "vector", "sigma"} <= set(optimizer.state[model.head.down])
