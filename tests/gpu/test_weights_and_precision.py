"""`lowmem pretrain` on a CUDA device with weights of 8 and 4 bits, and with products in fp8."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from lowmem.cli.main import main
from lowmem.system.devices import cuda_has_native_bf16, cuda_has_native_fp8, cuda_problem
from tests.nn.tensors import gradients, numbers
from tests.train.tiny_run import metrics, tiny_arguments, write_text

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(cuda_problem()), reason=f"no CUDA device to use: {cuda_problem()}")]
SETTINGS = {"device": "cuda", "model.dim": 64, "train.steps": 9, "train.save_every": 3, "train.eval_every": 9, "optim.schedule": "constant"}


def pretrain(run_dir: Path, text: Path, **overrides) -> list[float]:
    assert main(["pretrain", "--quiet", *tiny_arguments(run_dir, text, **{**SETTINGS, **overrides})]) == 0
    return [line["loss"] for line in metrics(run_dir) if "loss" in line]


@pytest.mark.parametrize("bits", [8, 4])
def test_layers_compute_with_codes_as_with_their_numbers(bits: int):
    from lowmem.nn.linear import split_linear
    from lowmem.nn.quantized import quantize

    weight = torch.nn.Parameter(quantize(numbers(60, 40, seed=2).cuda(), bits))
    assert weight.codes.device.type == "cuda"
    there = torch.nn.Parameter(quantize(numbers(60, 40, seed=2), bits))
    assert torch.equal(weight.dense(torch.float32).cpu(), there.dense(torch.float32))
    x = numbers(6, 40, seed=1).cuda().requires_grad_()
    plain = weight.dense(torch.float32).requires_grad_()
    found = gradients(lambda x, w: split_linear(x, w, None, (60,)), x, weight)
    expected = gradients(lambda x, w: split_linear(x, w, None, (60,)), x, plain)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantised_weights_learn_and_go_on(tmp_path: Path, weights: str):
    text = write_text(tmp_path / "text.txt")
    kind = {"train.weight_dtype": weights, "train.update": "layerwise", "train.activation_checkpointing": "block", "optim.state_bits": 8}
    start = pretrain(tmp_path / "run", text, **kind, **{"train.steps": 6})
    whole = pretrain(tmp_path / "run", text, **kind)
    assert whole[:6] == start
    assert whole[-1] < whole[0] - 1.0
    here = pretrain(tmp_path / "cpu", text, **kind, device="cpu")
    assert whole[0] == pytest.approx(here[0], rel=1e-4)  # the same codes; sums in another order
    counted = [json.loads((tmp_path / name / "memory.json").read_text())["measured"]["components"]["weights"] for name in ("run", "cpu")]
    assert counted[0] == counted[1]


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_a_run_in_fp8_is_near_one_in_bf16(tmp_path: Path):
    if cuda_problem() or not cuda_has_native_fp8() or not cuda_has_native_bf16():
        pytest.skip("this device does not multiply fp8")
    text = write_text(tmp_path / "text.txt")
    fp8, bf16 = (pretrain(tmp_path / name, text, **{"train.precision": name}) for name in ("fp8", "bf16"))
    assert fp8 != bf16
    assert fp8[-1] < fp8[0] - 1.0
    # e4m3 rounds operands by up to 2^-4, at random: a sum of 64 products errs by 2^-4 / 8 of its size. Later losses follow other paths.
    assert fp8[0] == pytest.approx(bf16[0], rel=2.0**-7)
