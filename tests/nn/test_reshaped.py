"""What models of transformers ask of attention and loss beyond lowmem's own: first keys, scales, soft-caps, fewer heads of keys."""

import pytest
import torch
import torch.nn.functional as F

from lowmem.nn import causal_attention as module
from lowmem.nn.causal_attention import blocked_attention, causal_attention, visible_attention
from lowmem.nn.loss import IGNORE_INDEX, CrossEntropyByRows, CrossEntropyOptions, chunked_cross_entropy
from lowmem.nn.rows import ResidentRows

ROWS, HEADS, TIME, WIDTH = 3, 4, 70, 8


def tensors(kv_heads: int = HEADS) -> list[torch.Tensor]:
    torch.manual_seed(0)
    made = [torch.randn(ROWS, heads, TIME, WIDTH, dtype=torch.float64) for heads in (HEADS, kv_heads, kv_heads)]
    made[1][:, :, 9] *= 30  # one key is louder than the others
    return [x.requires_grad_() for x in made]


def first_keys(kind: str) -> torch.Tensor | None:
    place = torch.arange(TIME)
    window = (place - 5).clamp_min(0).int().view(1, -1)
    if kind == "window":
        return window
    if kind == "segments":
        return torch.stack([torch.maximum(window[0], (place // size * size).int()) for size in (7, 30, 70)])
    return None


def definition(q, k, v, first, scale, softcap, prefix=0):
    k, v = (x.repeat_interleave(HEADS // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    key = torch.arange(TIME)
    hidden = (key > key.view(-1, 1)).expand(ROWS, -1, -1)
    if first is not None:
        hidden = hidden | ((key < first.unsqueeze(-1)) & (key >= prefix))
    return (torch.softmax(scores.masked_fill(hidden.unsqueeze(1), -torch.inf), -1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("heads_at_once", [2, 4, 12])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("kind, prefix", [("all", 0), ("window", 0), ("segments", 0), ("all", 3), ("window", 3), ("segments", 40)])
def test_attention_is_the_definition(monkeypatch, kind, prefix, softcap, kv_heads, heads_at_once):
    monkeypatch.setattr(module, "MAX_SCORES", heads_at_once * module.MIN_BLOCK * TIME)
    inputs, first, scale = tensors(kv_heads), first_keys(kind), 0.31
    out = causal_attention(*inputs, first_BT=first, prefix=prefix, scale=scale, softcap=softcap)
    expected = definition(*inputs, first, scale, softcap, prefix)
    grad = torch.randn_like(out)
    # 70 terms of up to 300 in fp64: 70 * 300 * 2**-53
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)
    for found, exact in zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-10)


def test_first_keys_and_segments_are_the_same_bits():
    inputs = tensors()
    segments = (torch.arange(TIME) // 13).expand(ROWS, -1)
    first = (torch.arange(TIME) // 13 * 13).int().view(1, -1)
    assert torch.equal(causal_attention(*inputs, segments_BT=segments), causal_attention(*inputs, first_BT=first))


def test_decoding_sees_what_the_mask_shows():
    inputs, first = [x.detach() for x in tensors(2)], first_keys("segments")
    key = torch.arange(TIME)
    visible = ((key <= key.view(-1, 1)) & (key >= first.unsqueeze(-1))).unsqueeze(1)
    for softcap in (0.0, 3.0):
        found = visible_attention(inputs[0][:, :, -4:], *inputs[1:], visible[:, :, -4:], 0.31, softcap)
        torch.testing.assert_close(found, definition(*inputs, first, 0.31, softcap)[:, -4:], rtol=0, atol=1e-11)


def test_contradicting_masks_are_refused():
    inputs = tensors()
    with pytest.raises(ValueError, match="found segments_BT and first_BT"):
        blocked_attention(*inputs, segments_BT=torch.ones(ROWS, TIME), first_BT=first_keys("window"))
    with pytest.raises(ValueError, match="or slopes and softcap"):
        blocked_attention(*inputs, (0.5,) * HEADS, softcap=2.0)


OPTIONS = [
    CrossEntropyOptions(5, scale=0.3),
    CrossEntropyOptions(5, softcap=2.0),
    CrossEntropyOptions(5, 0.1, 1e-2, scale=3.0, softcap=4.0),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_loss_of_scaled_and_capped_logits_is_the_definition(options, by_rows, bias):
    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(23, 8, dtype=torch.float64, requires_grad=True),
        torch.randn(37, 8, dtype=torch.float64, requires_grad=True),
    )
    offset = torch.randn(37, dtype=torch.float64, requires_grad=True) if bias else None
    targets = torch.randint(37, (23,))
    targets[::5] = IGNORE_INDEX
    logits = F.linear(hidden, weight, offset) * options.scale
    logits = options.softcap * torch.tanh(logits / options.softcap) if options.softcap else logits
    expected = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=options.label_smoothing)
    expected = expected + options.z_loss * (logits.logsumexp(1) ** 2)[targets != IGNORE_INDEX].sum()
    inputs = [x for x in (hidden, weight, offset) if x is not None]
    wanted = torch.autograd.grad(expected, inputs)
    if by_rows:
        work = CrossEntropyByRows(
            hidden, ResidentRows(weight), None if offset is None else offset.detach(), targets, options, torch.float64
        )
        loss, parts = work.loss, [(rows.clone(), part) for _, rows, part in work.gradients()]
        found = [work.grad_hidden, torch.cat([rows for rows, _ in parts]), *([work.grad_bias] if bias else [])]
    else:
        loss = chunked_cross_entropy(hidden, weight, offset, targets, 1.0, options)
        found = list(torch.autograd.grad(loss, inputs))
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    for gradient, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-11, atol=1e-13)


def test_options_that_change_nothing_leave_every_bit():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(23, 8), torch.randn(37, 8), torch.randint(37, (23,))
    assert torch.equal(
        chunked_cross_entropy(hidden, weight, None, targets, 1.0, CrossEntropyOptions(5)),
        chunked_cross_entropy(hidden, weight, None, targets, 1.0, CrossEntropyOptions(5, scale=1.0, softcap=0.0)),
    )
