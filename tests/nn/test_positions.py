import pytest
import torch
from torch._subclasses import FakeTensorMode

from lowmem.nn.positions import LearnedPositions, RotaryTable, alibi_bias, alibi_slopes, rotate
from lowmem.system.errors import ConfigError
from tests.reference import model_oracles as oracles


def test_rotation_equals_complex_multiplication():
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    rotated = rotate(x, *RotaryTable(8, 100.0).get(4, 5, x))
    assert rotated.is_contiguous()
    # angles up to 9 rad and one product: 20 roundings of 2^-53
    torch.testing.assert_close(rotated.transpose(1, 2), oracles.rope(x, 100.0, start=4), rtol=0, atol=1e-14)


def test_rotation_gradcheck():
    x = torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    tables = RotaryTable(4, 100.0).get(0, 3, x)
    assert torch.autograd.gradcheck(lambda x: rotate(x, *tables), (x,))


def test_scores_depend_on_distance_alone():
    q, k = torch.randn(2, 8, dtype=torch.float64)
    table = RotaryTable(8, 100.0)

    def score(i, j):
        rotated = [rotate(x.view(1, 1, 1, 8), *table.get(start, 1, q)).flatten() for x, start in ((q, i), (k, j))]
        return (rotated[0] @ rotated[1]).item()

    # angles up to 120 rad carry an error of 120 * 2^-53 = 1.3e-14, products of size 10
    assert score(3, 1) == pytest.approx(score(120, 118), abs=1e-12)
    assert abs(score(3, 1) - score(3, 2)) > 1e-3


def test_the_table_of_a_dry_run_is_not_kept():
    table = RotaryTable(8, 100.0)
    x = torch.randn(2, 8)
    real = table.get(0, 5, x)
    with FakeTensorMode() as mode:
        fake = table.get(0, 5, mode.from_tensor(x))
    assert type(fake[0]) is not torch.Tensor
    assert table.get(0, 5, x)[0] is real[0]


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_alibi_is_minus_slope_times_distance(heads):
    bias = alibi_bias(alibi_slopes(heads), range(6), range(6), torch.zeros(1, dtype=torch.float64))
    assert torch.equal(bias.tril(), oracles.alibi_bias(heads, 6))
    assert (bias[:, 5, 0] < 0).all()


def test_alibi_slopes_of_twelve_heads_lie_between_those_of_powers_of_two():
    # eight heads, then every other slope of sixteen
    expected = [2.0 ** -(i + 1) for i in range(8)] + [2.0 ** -(i + 0.5) for i in range(4)]
    assert alibi_slopes(12) == pytest.approx(expected)


def test_learned_positions_end():
    positions = LearnedPositions(6, 4)
    hidden = torch.zeros(1, 3, 4)
    assert torch.equal(positions(hidden, 2)[0], positions.weight[2:5])
    with pytest.raises(ConfigError, match=r"sequence of 7 tokens.*max_seq_len = 6"):
        positions(hidden, 4)
