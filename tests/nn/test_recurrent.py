import time

import pytest
import torch

from lowmem.nn.recurrent import HybridCell, contraction, hybrid_loop, hybrid_scan, stable_decay
from tests.reference import model_oracles as oracles


def weights(w_scale, channels=6, states=4):
    torch.manual_seed(0)
    shapes = ((channels,), (states, states), (states, channels), (channels, states), (channels,))
    tensors = [torch.randn(*shape, dtype=torch.float64) for shape in shapes]
    tensors[0] *= w_scale
    tensors[1] *= 0.4
    return [x.requires_grad_() for x in tensors]


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def test_the_loop_is_the_definition():
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    parameters = weights(0.8)
    found, _ = hybrid_loop(x, *parameters)
    assert relative(found, oracles.hybrid_cell(x, *parameters)) < 1e-14  # 9 steps of 10 roundings of 2^-53


# w_mix beyond 1 grows: at 1.3 standard deviations of 3 channels are outside (-1, 1), and 50 steps reach 1e9
@pytest.mark.parametrize("w_scale", [0.5, 1.3])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 50, 96])
def test_scan_equals_loop(w_scale, length):
    parameters = weights(w_scale)
    x = torch.randn(2, length, 6, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, length, 6, dtype=torch.float64)
    expected = oracles.hybrid_cell(x, *parameters)
    found = hybrid_scan(x, *parameters)
    assert relative(found, expected) < 1e-10
    # one step gives w and A nothing to act on but the zero state: their gradients are 0 and x alone
    wanted = [x, *parameters]
    pairs = zip(torch.autograd.grad(found, wanted, grad), torch.autograd.grad(expected, wanted, grad), strict=True)
    for mine, exact in pairs:
        assert (mine - exact).norm().item() <= 1e-10 * exact.norm().item()


def test_gradcheck():
    parameters = weights(0.8, channels=3, states=2)
    x = torch.randn(1, 18, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(hybrid_scan, (x, *parameters))


def test_decoding_in_pieces_equals_the_whole():
    torch.manual_seed(0)
    cell = HybridCell(6, 4).double()
    x = torch.randn(2, 20, 6, dtype=torch.float64)
    state = cell.new_state(2)
    with torch.no_grad():
        pieces = [cell.step(part, state) for part in (x[:, :7], x[:, 7:8], x[:, 8:])]
        # 20 steps of 10 roundings of 2^-53
        torch.testing.assert_close(torch.cat(pieces, 1), cell(x), rtol=0, atol=1e-13)


def test_a_state_does_not_grow_with_the_sequence():
    cell = HybridCell(6, 4)
    state = cell.new_state(2)
    before = state.nbytes()
    with torch.no_grad():
        cell.step(torch.randn(2, 30, 6), state)
    assert state.nbytes() == before == 2 * (6 + 4) * 4


def test_published_initial_values_and_count():
    cell = HybridCell(512, 32)
    assert sum(p.numel() for p in cell.parameters()) == 34_816
    assert (cell.w_mix == 0.5).all()
    assert (cell.skip == 0.1).all()
    assert cell.w_in.std().item() == pytest.approx(0.01, rel=0.03)  # 16,384 draws: 0.55 %, five of them


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_the_recurrence_stays_wide_under_autocast(narrow):
    cell = HybridCell(16, 4)
    with torch.no_grad():
        cell.w_mix.fill_(0.999)
        cell.skip.fill_(1.0)
    x = torch.ones(1, 512, 16)
    with torch.autocast("cpu", narrow):
        y = cell(x)
    assert y.dtype == narrow
    # h = 1 - 0.999^512 = 0.4009; a bf16 state would stop where 0.001 * (1 - h) falls below half a unit: at 0.25 already
    assert y[0, -1].float().mean().item() == pytest.approx(1 - 0.999**512, abs=0.01)


@pytest.mark.slow
def test_scan_is_faster_than_the_loop():
    """Processor time of one thread, so that a busy machine does not matter; 8 to 10 times was measured."""
    torch.manual_seed(0)
    cell = HybridCell(512, 32)
    x = torch.randn(2, 256, 512, requires_grad=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def seconds(function):
        best = float("inf")
        for _ in range(7):
            start = time.process_time()
            torch.autograd.grad(function(x).sum(), [x, *cell.parameters()])
            best = min(best, time.process_time() - start)
        return best

    try:
        loop, scan = seconds(lambda x: hybrid_loop(x, *cell.parameters())[0]), seconds(cell)
    finally:
        torch.set_num_threads(threads)
    print(f"loop {1e3 * loop:.1f} ms, scan {1e3 * scan:.1f} ms")
    assert loop > 4 * scan


def test_within_the_stable_region_nothing_changes():
    w, matrix = torch.linspace(-1, 1, 41), torch.randn(5, 5)
    matrix /= torch.linalg.matrix_norm(matrix, 2) * 1.001
    assert torch.linalg.vector_norm(matrix) > 1  # the singular values are needed to tell
    assert torch.equal(stable_decay(w), w)
    assert torch.equal(contraction(matrix), matrix)
    assert torch.equal(contraction(0.1 * matrix), 0.1 * matrix)


def test_beyond_it_w_is_mirrored_and_the_matrix_divided():
    assert stable_decay(torch.tensor([2.0, -4.0, 1.0, 0.0])).tolist() == [0.5, -0.25, 1.0, 0.0]
    matrix = 3 * torch.randn(5, 5, dtype=torch.float64)
    made = contraction(matrix)
    assert torch.linalg.matrix_norm(made, 2).item() == pytest.approx(1, abs=1e-14)
    assert relative(made * torch.linalg.matrix_norm(matrix, 2), matrix) < 1e-14


def test_their_gradients_are_right():
    w = torch.tensor([0.0, 0.5, -0.9, 1.5, -3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(stable_decay, (w,))
    for scale in (0.1, 3.0):
        matrix = (scale * torch.randn(4, 4, dtype=torch.float64)).requires_grad_()
        assert torch.autograd.gradcheck(contraction, (matrix,))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_stays_so(value):
    matrix = torch.eye(3)
    matrix[1, 1] = value
    assert torch.equal(contraction(matrix).isfinite(), matrix.isfinite())
