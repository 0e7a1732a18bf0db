"""Fine-tuning on a CUDA device: adapters on whole and on 4-bit weights learn, and others load what is saved."""

from pathlib import Path

import pytest
import torch

from lowmem.cli.main import main
from lowmem.system.devices import cuda_problem
from tests.train.tiny_run import finetune_arguments, metrics

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(cuda_problem()), reason=f"no CUDA device to use: {cuda_problem()}")]

TOKENS = torch.arange(40).view(1, 40) * 7 % 300


def finetune(base: Path, chat: Path, run_dir: Path, **overrides: object) -> None:
    words = finetune_arguments(base, chat, run_dir, device="cuda", train__eval_every=1, **overrides)
    assert main(["finetune", "--quiet", *words]) == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("weights", ["same", "nf4"])
@pytest.mark.parametrize("update", ["accumulate", "layerwise"])
def test_adapters_learn_and_are_loaded_by_others(update: str, weights: str, precision: str, base: Path, chat: Path, tmp_path: Path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    stored = precision if weights == "same" else weights
    settings = {"train__weight_dtype": stored, "train__precision": precision, "train__update": update, "train__steps": 12}
    finetune(base, chat, tmp_path / "run", **settings)
    lines = metrics(tmp_path / "run")
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    assert losses[-1] < losses[0] - 0.05
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run/merged", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = merged(input_ids=TOKENS).logits
    if stored == "nf4":  # the widened 4-bit weights, not those of the base
        return
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        found = PeftModel.from_pretrained(plain, tmp_path / "run/adapter").eval()(input_ids=TOKENS).logits
    # fp32: sums in another order. bf16 rounds the merged weights of three matrix products in a row to 8 bits
    atol = (2.0**-6 if precision == "bf16" else 1e-4) * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=4 * atol)


def test_a_run_goes_on_where_it_was_stopped(base: Path, chat: Path, tmp_path: Path):
    for steps in (4, 8):
        finetune(base, chat, tmp_path, train__weight_dtype="nf4", train__precision="bf16", train__steps=steps)
    lines = [line for line in metrics(tmp_path) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines[-1]["loss"] < lines[0]["loss"]
