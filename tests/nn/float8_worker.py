"""Checks fp8 layers in a process of its own: importing torchao is noisy. Prints a JSON object of numbers for test_float8.py."""

import json
import sys

import numpy as np
import torch

from lowmem.config.schema import ModelConfig, OptimConfig
from lowmem.data.batch import Batch
from lowmem.engine.local import LocalEngine
from lowmem.models.registry import build_model
from lowmem.nn.float8 import Float8Products, use_float8
from lowmem.nn.linear import Linear

DEVICE = torch.device(sys.argv[1])
EMULATE = DEVICE.type == "cpu"
SHAPE = ModelConfig(dim=32, num_layers=2, num_heads=2, hidden_dim=64)


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What fp8 with one scale makes of a tensor, in fp64."""
    scale = torch.finfo(dtype).max / x.abs().max().double()
    return (x.double() * scale).float().to(dtype).double() / scale


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, relative to the largest number."""
    return ((found.double() - wanted).abs().max() / wanted.abs().max()).item()


def layer_distances() -> dict[str, float]:
    """Of output and gradients from those of the same roundings multiplied exactly; and of the output from that without fp8."""
    torch.manual_seed(0)
    layer = Linear(64, 48, bias=True, splits=(16, 32)).to(DEVICE, torch.bfloat16)
    layer.float8 = Float8Products(emulate=EMULATE)
    with torch.no_grad():
        layer.bias.normal_(std=0.02)
    x = torch.randn(3, 7, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)  # 21 tokens: no multiple of 16
    outputs = layer(x)
    grads = [torch.randn_like(output) for output in outputs]
    torch.autograd.backward(outputs, grads)
    x8, weight = rounded(x.detach().view(21, 64), torch.float8_e4m3fn), layer.weight.detach()
    parts = [rounded(part, torch.float8_e4m3fn) for part in weight.split((16, 32))]
    grads8 = [rounded(grad.view(21, -1), torch.float8_e5m2) for grad in grads]
    wanted = torch.cat([x8 @ part.t() for part in parts], 1) + layer.bias.detach().double()
    found = torch.cat(outputs, -1).view(21, 48)
    return {
        "output": distance(found, wanted),
        "grad_x": distance(x.grad.view(21, 64), sum(g @ part for g, part in zip(grads8, parts, strict=True))),
        "grad_weight": distance(layer.weight.grad, torch.cat([g.t() @ x8 for g in grads8])),
        "grad_bias": distance(layer.bias.grad, torch.cat([g.view(21, -1).double().sum(0) for g in grads])),
        "from_bf16": distance(found, x.detach().view(21, 64).double() @ weight.double().t() + layer.bias.detach().double()),
    }


def losses(float8: bool) -> list[float]:
    """Of 15 steps on one batch."""
    model = build_model(SHAPE, vocab_size=64, max_seq_len=16, seed=0)
    if float8:
        use_float8(model.blocks, emulate=EMULATE)
    engine = LocalEngine(model, OptimConfig(lr=8e-3), device=DEVICE, precision="fp8" if float8 else "bf16", micro_batch_size=2)
    batch = Batch.from_windows(np.random.default_rng(0).integers(0, 64, (4, 17)))
    return [engine.step(batch, 8e-3).loss for _ in range(15)]


print(json.dumps({"layer": layer_distances(), "fp8": losses(True), "bf16": losses(False)}))
