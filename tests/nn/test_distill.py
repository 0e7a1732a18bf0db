import pytest
import torch
import torch.nn.functional as F

from lowmem.nn.loss import IGNORE_INDEX, CrossEntropyOptions, SoftTargets, chunked_cross_entropy

N, C, V = 13, 6, 11


def tensors(dtype=torch.float64):
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, C, dtype=dtype).requires_grad_() for n in (N, V))
    bias = torch.randn(V, dtype=dtype).requires_grad_()
    targets = torch.randint(V, (N,))
    targets[[2, 7]] = IGNORE_INDEX
    teacher = torch.randn(N, 4, dtype=dtype), torch.randn(V, 4, dtype=dtype), torch.randn(V, dtype=dtype)
    return hidden, weight, bias, targets, teacher


def plain_loss(hidden, weight, bias, targets, teacher, share, temperature, smoothing=0.0):
    live = targets != IGNORE_INDEX
    logits = (hidden @ weight.t() + bias)[live]
    hard = F.cross_entropy(logits, targets[live], reduction="sum", label_smoothing=smoothing)
    soft = F.softmax((teacher[0] @ teacher[1].t() + teacher[2])[live] / temperature, 1)
    distance = F.kl_div(F.log_softmax(logits / temperature, 1), soft, reduction="sum")
    return (1 - share) * hard + share * temperature**2 * distance


@pytest.mark.parametrize("share, temperature, smoothing", [(0.5, 1.0, 0.0), (0.3, 2.5, 0.1), (1.0, 0.7, 0.0), (0.0, 1.0, 0.0)])
@pytest.mark.parametrize("chunk_tokens", [0, 4])
def test_loss_and_gradients_are_those_of_whole_logits(share, temperature, smoothing, chunk_tokens):
    hidden, weight, bias, targets, teacher = tensors()
    options = CrossEntropyOptions(chunk_tokens, smoothing, soft_targets=SoftTargets(*teacher, share, temperature))
    loss = chunked_cross_entropy(hidden, weight, bias, targets, 3.0, options)
    expected = plain_loss(hidden, weight, bias, targets, teacher, share, temperature, smoothing) / 3.0
    # sums of N * V numbers below 50 in fp64
    torch.testing.assert_close(loss, expected, rtol=0, atol=N * V * 50 * 2**-52)
    found = torch.autograd.grad(loss, (hidden, weight, bias))
    wanted = torch.autograd.grad(expected, (hidden, weight, bias))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=N * V * 50 * 2**-52)


def test_a_student_that_agrees_with_its_teacher_has_no_distance():
    hidden, weight, bias, targets, _ = tensors()
    soft = SoftTargets(hidden.detach(), weight.detach(), bias.detach(), 1.0, 2.0)
    loss = chunked_cross_entropy(hidden, weight, bias, targets, 1.0, CrossEntropyOptions(soft_targets=soft))
    assert abs(loss.item()) < N * V * 2**-48
    grad = torch.autograd.grad(loss, hidden)[0]
    assert grad.abs().max() < V * 2**-48


def test_narrow_logits_stay_close():
    hidden, weight, bias, targets, teacher = tensors(torch.float32)
    soft = SoftTargets(*(t.bfloat16() for t in teacher), 0.5, 1.0)
    narrow = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight, bias)]
    loss = chunked_cross_entropy(*narrow, targets, 1.0, CrossEntropyOptions(soft_targets=soft))
    expected = plain_loss(*(t.float() for t in narrow), targets, [t.bfloat16().float() for t in teacher], 0.5, 1.0)
    # logits below 8 rounded to bf16: 2^-6 each, for 11 live tokens, of student and teacher
    assert abs(loss.item() - expected.item()) < 11 * 2 * 2**-6
