"""The operator keeps torch's rules, dry runs allocate what real ones do, and training does not load the compiler of torch."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowmem.optim import AdamW, Lion
from lowmem.optim.kernels.formats import state_bytes

EVERY_FORM = pytest.mark.parametrize("kind, bits", [(kind, bits) for kind in (AdamW, Lion) for bits in kind.widths])


@EVERY_FORM
def test_a_dry_run_on_fake_tensors_allocates_what_the_formats_say(kind, bits):
    with FakeTensorMode():
        tensors = torch.empty(1000, 128, dtype=torch.bfloat16), torch.empty(100, 1000).t(), torch.empty(7), torch.empty(9000)
        weights = list(map(nn.Parameter, tensors))
        optimizer = kind(weights, state_bits=bits)
        for weight in weights:
            weight.grad = torch.empty(weight.shape, dtype=weight.dtype)
        optimizer.step()
    for weight in weights:
        tensors = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
        assert sum(tensor.nbytes for tensor in tensors) == state_bytes(weight.shape, bits) * len(optimizer.state_names)


@EVERY_FORM
def test_the_operator_keeps_the_rules_of_torch(kind, bits):
    weight = nn.Parameter(torch.linspace(-1, 1, 33 * 128).view(33, 128))
    weight.grad = weight.detach().clone()
    optimizer = kind([weight], state_bits=bits)
    optimizer.step()
    state = optimizer.state[weight]
    states = [state.get(key) for key in ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale")]
    flat = [None if tensor is None else tensor.view(-1) for tensor in states]
    floats = [0.01, 0.999, 0.9, 0.1, 0.99, 0.01, 1e-8, 1.0, 1.0]
    torch.library.opcheck(
        torch.ops.lowmem.optimizer_step.default, (weight.detach().view(-1), weight.grad.view(-1), *flat, floats, 5, 0, bits)
    )


def test_training_does_not_import_the_compiler_of_torch():
    """It takes 150 MB of memory."""
    code = """if True:
        import sys, torch
        from lowmem.optim import AdamW
        weight = torch.nn.Parameter(torch.ones(64, 64))
        optimizer = AdamW([weight])
        weight.grad = torch.ones(64, 64)
        optimizer.step(), optimizer.zero_grad(), repr(optimizer)
        optimizer.load_state_dict({"state": {0: optimizer.state[weight]}, "param_groups": [{**optimizer.param_groups[0], "params": [0]}]})
        assert "torch._dynamo" not in sys.modules
    """
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)
