"""Fine-tuning takes no more memory than it must: the loss without logits, tensors read one by one, updates as gradients come; and what is
predicted is what it takes."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from lowmem.config.finetune import FinetuneConfig
from lowmem.finetune.base_model import load_base
from lowmem.finetune.hidden import plain_head
from lowmem.finetune.memory import predict_memory
from lowmem.finetune.methods import apply_method, parameter_groups
from lowmem.finetune.step import Stepper, batch_loss
from lowmem.finetune.write import write_model
from lowmem.system.errors import ConfigError
from tests.finetune.tiny import CPU, TOKENS, logits, make_config, packed
from tests.reference.random_models import SHAPES, make_run, save_theirs, tolerance


class Unknown(nn.Linear):
    """A head of which the loss knows nothing but that it can be called."""


@pytest.mark.parametrize("kind", ["llama", "gpt2", "alibi", "lowmem-tied", "prefix", "lora"])
def test_the_loss_needs_no_logits(kind, base, chat, tmp_path):
    """Against the loss from whole logits, which a head of an unknown class makes the model compute."""
    if kind in ("llama", "gpt2"):
        model = save_theirs(tmp_path / "m", kind)
    elif kind in ("alibi", "lowmem-tied"):
        from lowmem.export.hf import hf_model

        model = hf_model(make_run(SHAPES["alibi"][0] | {"tie_embeddings": kind == "lowmem-tied"}))
    else:
        model = apply_method(load_base(base, nf4=False), make_config(base, chat, tmp_path, f"method={kind}"), [])
    batch = packed(one_per_row=kind == "prefix")
    assert plain_head(model) is not None
    found = batch_loss(model.eval(), batch, 3.0, CPU)
    found.backward()
    trained = [p for p in model.parameters() if p.requires_grad and p.grad is not None]
    gradients = [p.grad.clone() for p in trained]
    assert gradients
    model.zero_grad()
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    if kind == "lowmem-tied":
        inner.config.logit_scale = 1.0  # what makes the loss ask for logits; nothing reads it
    else:
        inner.get_output_embeddings().__class__ = Unknown
    assert plain_head(model) is None
    expected = batch_loss(model, batch, 3.0, CPU)
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for parameter, gradient in zip(trained, gradients, strict=True):
        # fp32 sums of some hundred terms in another order
        assert torch.allclose(parameter.grad, gradient, rtol=0, atol=1e-5 * parameter.grad.abs().max().item() + 1e-8)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_updates_as_gradients_come_are_the_updates_of_a_whole_step(method, base, chat, tmp_path):
    """To the bit, where nothing is clipped; and no gradient is left."""
    ends = []
    for update in ("accumulate", "layerwise"):
        config = make_config(base, chat, tmp_path, f"method={method}", f"update={update}", "micro_batch_size=2", "optim.clip=0")
        model = apply_method(load_base(base, nf4=False), config, [])
        stepper = Stepper(model, parameter_groups(model, config), config, CPU)
        for _ in range(3):
            stepper.step(packed(), 0.01)
        assert all(parameter.grad is None for parameter in model.parameters())
        ends.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())
    assert any("lora_B" in name and value.any() for name, value in ends[0].items()) or method == "full"


@pytest.mark.parametrize("micro", [1, 2])
def test_micro_batches_add_up_to_the_batch(micro, base, chat, tmp_path):
    """Conversations have different numbers of targets: the mean is over all of them, whatever the micro-batch."""
    losses = []
    for size in (micro, 4):
        config = make_config(base, chat, tmp_path, "batch_size=4", f"micro_batch_size={size}")
        model = apply_method(load_base(base, nf4=False), config, [])
        stepper = Stepper(model, parameter_groups(model, config), config, CPU)
        losses.append([stepper.step(packed(4, 30), 0.01) for _ in range(3)])
    assert np.allclose(*losses, rtol=1e-4, atol=0)


def test_states_and_adapter_take_what_is_predicted(base, chat, tmp_path):
    for more in (["optim.state_bits=32"], ["optim.state_bits=8", "adapter.r=64"], ["optim.name=lion", "method=ia3"]):
        config = make_config(base, chat, tmp_path, *more)
        model = apply_method(load_base(base, nf4=False), config, [])
        stepper = Stepper(model, parameter_groups(model, config), config, CPU)
        stepper.step(packed(), 0.01)
        trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
        states = sum(v.nbytes for state in stepper.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor))
        predicted = predict_memory(config, base)
        assert predicted.components["adapter"] == trained
        assert predicted.components["optimizer_states"] == states


def test_numbers_in_4_bits_count_as_numbers(base, chat, tmp_path):
    counts = [predict_memory(make_config(base, chat, tmp_path, f"method={method}"), base) for method in ("lora", "qlora")]
    assert (counts[0].trainable, counts[0].total) == (counts[1].trainable, counts[1].total)
    model = apply_method(load_base(base, nf4=False), make_config(base, chat, tmp_path), [])
    assert counts[0].total == sum(parameter.numel() for parameter in model.parameters())


def test_levers_are_seen_by_the_prediction(base, chat, tmp_path):
    def predicted(*more: str) -> dict[str, int]:
        return predict_memory(make_config(base, chat, tmp_path, "seq_len=512", *more), base).components

    usual = predicted()
    assert predicted("gradient_checkpointing=false")["activations"] > 3 * usual["activations"]
    assert predicted("base_dtype=bf16")["base"] == usual["base"] // 2
    whole = predicted("method=full", "micro_batch_size=2")
    assert predicted("method=full", "micro_batch_size=2", "update=layerwise")["gradients"] < 0.2 * whole["gradients"]
    assert predicted("method=full")["optimizer_states"] == 2 * whole["base"]


@pytest.mark.parametrize("new_tokens", [False, True])
def test_a_4_bit_base_is_merged_as_it_is_written(new_tokens, base, chat, tmp_path):
    from transformers import AutoModelForCausalLM

    config = make_config(base, chat, tmp_path, "method=qlora")
    model = load_base(base, nf4=True)
    first = model.get_input_embeddings().weight.shape[0]
    if new_tokens:
        model.resize_token_embeddings(first + 2, mean_resizing=False)
    adapted = apply_method(model, config, [first, first + 1] if new_tokens else [])
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    write_model(adapted, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokens = torch.cat([TOKENS, torch.tensor([[first, first + 1]])], 1) if new_tokens else TOKENS
    expected = logits(merged, tokens)
    # 4-bit kernels sum in blocks of their own
    assert torch.allclose(logits(adapted, tokens), expected, rtol=0, atol=30 * tolerance(expected))


MEASURE = """
import sys
from pathlib import Path
from lowmem.system.errors import ConfigError
from lowmem.finetune.base_model import load_base
from lowmem.memory.allocator import set_up_host_memory
from lowmem.memory.measure import host_rss_bytes, measure_peak
from lowmem.system.files import compiled_root
import bitsandbytes, transformers
from transformers import LlamaForCausalLM
set_up_host_memory(compiled_root())
before = host_rss_bytes()
with measure_peak() as peak:
    model = load_base(Path(sys.argv[1]), nf4=sys.argv[2] == "nf4")
print(peak.host_peak_bytes - before)
"""


@pytest.mark.memory
def test_a_4_bit_base_is_never_whole_in_memory(tmp_path):
    save_theirs(tmp_path, "llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=8)
    took = {}
    for kind in ("nf4", "full"):
        result = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path), kind], capture_output=True, text=True, check=True)
        took[kind] = int(result.stdout.splitlines()[-1])
    predicted = {
        m: predict_memory(FinetuneConfig(base=str(tmp_path), data="-", method=m), tmp_path).components["base"] for m in ("lora", "qlora")
    }
    largest = 4 * 512 * 2048
    assert took["full"] == pytest.approx(predicted["lora"], rel=0.1)
    # code of bitsandbytes, and a few copies of the largest tensor, in fp32, while it is quantised
    assert took["nf4"] < predicted["qlora"] + 6 * largest + (16 << 20)


@pytest.mark.memory
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_run_takes_what_is_predicted(method, chat, tmp_path):
    save_theirs(tmp_path / "base", "llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=4)
    command = [
        sys.executable, "-m", "lowmem", "finetune", "--quiet", f"--base={tmp_path / 'base'}", f"--data={chat}",
        f"--out={tmp_path / 'out'}", f"--method={method}", "--steps=3", "--seq_len=256", "--batch_size=4", "--micro_batch_size=4",
        "--save_every=0",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    report = json.loads((tmp_path / "out/result.json").read_text())
    assert report["training_peak_bytes"] == pytest.approx(sum(report["predicted"].values()), rel=0.05)
    assert report["peaks"]["save"]["host_peak_bytes"] <= report["training_peak_bytes"]


def test_embeddings_do_not_decay_and_clipping_has_one_rule(base, chat, tmp_path):
    config = make_config(base, chat, tmp_path, "method=full", "optim.weight_decay=0.1")
    model = apply_method(load_base(base, nf4=False), config, [])
    decays = {id(p): group["weight_decay"] for group in parameter_groups(model, config) for p in group["params"]}
    assert decays[id(model.get_input_embeddings().weight)] == 0.0
    assert decays[id(model.model.layers[0].mlp.up_proj.weight)] == 0.1
    assert decays[id(model.model.norm.weight)] == 0.0
    with pytest.raises(ConfigError, match="optim.clip_by is block, must be auto here"):
        make_config(base, chat, tmp_path, "optim.clip_by=block")


def test_a_step_that_is_not_finite_leaves_the_norm_to_clip_by(base, chat, tmp_path):
    config = make_config(base, chat, tmp_path, "update=layerwise", "micro_batch_size=2")
    model = apply_method(load_base(base, nf4=False), config, [])
    stepper = Stepper(model, parameter_groups(model, config), config, CPU)
    _, norm = stepper.step(packed(), 0.01)
    adapters = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    head = model.get_base_model().get_output_embeddings().weight
    kept, kept_clipping = head.data.clone(), stepper.clipping.state()
    assert kept_clipping["shares"]
    head.data.fill_(torch.nan)
    loss, _ = stepper.step(packed(), 0.01)
    assert np.isnan(loss)
    assert all(torch.equal(p, adapters[name]) for name, p in model.named_parameters() if name in adapters)
    head.data.copy_(kept)
    assert norm > 0
    assert stepper.clipping.state() == kept_clipping
