"""Plain definitions of what lowmem.nn computes, written for reading: no fusion, no chunks, no saved memory."""

import math

import torch


def rms_norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def swiglu(gate, up):
    return gate / (1 + torch.exp(-gate)) * up


def rope(x_BTHD, theta, start=0):
    """Coordinates i and i + D/2 are one complex number, turned by position * theta^(-2i/D)."""
    time, width = x_BTHD.shape[1], x_BTHD.shape[3]
    first, second = x_BTHD.double().chunk(2, -1)
    frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.outer(torch.arange(start, start + time, dtype=torch.float64), frequencies)[:, None]
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], -1)


def alibi_bias(num_heads, time):
    """For a power of two of heads."""
    bias = torch.zeros(num_heads, time, time, dtype=torch.float64)
    for head in range(num_heads):
        for i in range(time):
            for j in range(i + 1):
                bias[head, i, j] = -(2 ** (-8 * (head + 1) / num_heads)) * (i - j)
    return bias


def attention(q_BHTD, k_BHTD, v_BHTD, bias=None):
    """(B, T, H * D)."""
    scores = q_BHTD @ k_BHTD.transpose(-1, -2) / math.sqrt(q_BHTD.shape[-1])
    if bias is not None:
        scores = scores + bias
    time = scores.shape[-1]
    future = torch.arange(time)[None] > torch.arange(time)[:, None]
    out = scores.masked_fill(future, float("-inf")).softmax(-1) @ v_BHTD
    return out.transpose(1, 2).flatten(2)


def hybrid_cell(x_BTC, w_mix, transition, w_in, w_out, skip):
    """i3's cell, one sequence and one step at a time."""
    outputs = []
    for x_TC in x_BTC:
        h, s = torch.zeros_like(x_TC[0]), torch.zeros_like(transition[0])
        rows = []
        for x in x_TC:
            h = w_mix * h + (1 - w_mix) * x
            s = transition @ s + w_in @ x
            rows.append(w_out @ s + h * skip)
        outputs.append(torch.stack(rows))
    return torch.stack(outputs)


def cross_entropy(hidden_NC, weight, bias, targets_N, denominator, smoothing=0.0, z_loss=0.0):
    """Sum over the tokens with a target >= 0, divided by the denominator."""
    logits = hidden_NC @ weight.t() + (0 if bias is None else bias)
    total = logits.new_zeros(())
    for row, target in zip(logits, targets_N.tolist(), strict=True):
        if target >= 0:
            log_z = torch.logsumexp(row, 0)
            log_p = row - log_z
            total = total - (1 - smoothing) * log_p[target] - smoothing * log_p.mean() + z_loss * log_z**2
    return total / denominator
