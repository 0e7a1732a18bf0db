"""Fine-tuning on a CUDA device: adapters on a full and on a 4-bit base learn, and others load what is saved."""

import json
from pathlib import Path

import pytest
import torch

from lowmem.finetune.base_model import load_base
from lowmem.finetune.train import finetune
from lowmem.system.devices import cuda_problem
from lowmem.train.display import NullDisplay
from tests.finetune.tiny import TOKENS, make_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(cuda_problem()), reason=f"no CUDA device to use: {cuda_problem()}")]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapters_learn_and_are_loaded_by_others(method: str, dtype: str, base: Path, chat: Path, tmp_path: Path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    done = finetune(make_config(base, chat, tmp_path, f"method={method}", f"base_dtype={dtype}", "steps=12"), NullDisplay())
    assert {parameter.device.type for parameter in done.model.parameters()} == {"cuda"}
    assert done.losses[12] < done.losses[0] - 0.05
    plain = load_base(base, nf4=method == "qlora", dtype=next(done.model.parameters()).dtype)
    adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).to("cuda").eval()
    with torch.no_grad():
        expected = done.model.eval()(input_ids=TOKENS.cuda()).logits.float()
        found = [model(input_ids=TOKENS.cuda()).logits.float() for model in (adapted, merged)]
    # The run's own model was merged when it was saved. fp32: sums in another order.
    # bf16 rounds weights and activations of three matrix products in a row to 8 bits.
    atol = (2.0**-6 if dtype == "bf16" else 1e-4) * expected.abs().max().item()
    for logits in found:
        torch.testing.assert_close(logits, expected, rtol=0, atol=4 * atol)


def test_a_run_goes_on_where_it_was_stopped(base: Path, chat: Path, tmp_path: Path):
    finetune(make_config(base, chat, tmp_path, "method=qlora", "steps=4"), NullDisplay())
    done = finetune(make_config(base, chat, tmp_path, "method=qlora", "steps=8"), NullDisplay())
    assert done.losses[6] < done.losses[0]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
