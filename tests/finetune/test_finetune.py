"""Fine-tuning through PEFT: what is trained, what is saved, who loads it, and that it is resumed to the bit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lowmem.cli.main import main
from lowmem.data.chat import pack_conversations
from lowmem.finetune.base_model import load_base
from lowmem.finetune.memory import predict_memory
from lowmem.finetune.methods import apply_method, parameter_groups
from lowmem.finetune.save import swap_adapter
from lowmem.finetune.step import batch_loss
from lowmem.finetune.train import finetune
from lowmem.system.errors import ConfigError, MemoryBudgetError
from lowmem.train.display import NullDisplay
from tests.finetune.tiny import CPU, logits, make_config
from tests.reference.random_models import SHAPES, make_run, save_theirs, tolerance


@pytest.mark.parametrize("method", ["lora", "qlora", "dora", "lora_plus", "rslora", "prefix", "ia3", "head", "last_k", "full"])
def test_every_method_learns_and_others_load_what_it_saves(method, base, chat, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    # lora_plus multiplies the rate of B by 16: at 0.01 weights grow so large that fp32 logits lose the digits that `tolerance` counts on
    lr = {"full": 0.003, "prefix": 0.03, "lora_plus": 0.002}.get(method, 0.01)
    done = finetune(make_config(base, chat, tmp_path, f"method={method}", f"optim.lr={lr}", "steps=12"), NullDisplay())
    assert done.losses[12] < done.losses[0] - 0.05
    if method != "full":
        assert done.trainable < 0.6 * done.total
    if method == "prefix":
        assert not (tmp_path / "merged").exists()
    else:
        merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
        assert merged.shape == (1, 40, 320)
    if method in ("head", "last_k", "full"):
        assert torch.equal(merged, logits(done.model))
    else:
        nf4 = load_base(base, nf4=True) if method == "qlora" else AutoModelForCausalLM.from_pretrained(base)
        adapted = logits(PeftModel.from_pretrained(nf4, tmp_path / "adapter"))
        if method != "prefix":
            # merging rounds each weight once more: as in `tolerance`, and 4-bit kernels sum in blocks of their own
            assert torch.allclose(adapted, merged, rtol=0, atol=(30 if method == "qlora" else 1) * tolerance(merged))
            assert not torch.allclose(merged, logits(AutoModelForCausalLM.from_pretrained(base)), rtol=0, atol=0.01)


@pytest.mark.parametrize("method", ["lora", "dora", "rslora", "lora_plus", "ia3"])
def test_at_the_start_an_adapter_changes_nothing(method, base, chat, tmp_path):
    model = load_base(base, nf4=False)
    before = logits(model)
    adapted = apply_method(model, make_config(base, chat, tmp_path, f"method={method}"), [])
    assert torch.allclose(logits(adapted), before, rtol=0, atol=tolerance(before) if method == "dora" else 0.0)


def test_b_is_the_factor_that_learns_faster(base, chat, tmp_path):
    config = make_config(base, chat, tmp_path, "method=lora_plus", "adapter.loraplus_lr_ratio=8")
    model = apply_method(load_base(base, nf4=False), config, [])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scales = {names[id(p)]: group.get("lr_scale", 1.0) for group in parameter_groups(model, config) for p in group["params"]}
    assert all(scale == (8.0 if "lora_B" in name else 1.0) for name, scale in scales.items())
    with pytest.raises(ConfigError, match="loraplus_lr_ratio is .* must be at least 1, at most"):
        make_config(base, chat, tmp_path, "method=lora_plus", "adapter.loraplus_lr_ratio=0.5")


@pytest.mark.parametrize("update", ["accumulate", "layerwise"])
def test_resuming_ends_bit_equal(update, base, chat, tmp_path):
    more = [f"update={update}", "optim.state_bits=8", "adapter.lora_dropout=0.1", "micro_batch_size=2", "adapter.r=64"]
    finetune(make_config(base, chat, tmp_path / "whole", *more), NullDisplay())
    finetune(make_config(base, chat, tmp_path / "parts", *more, "steps=4"), NullDisplay())
    # as if it had been stopped there: the schedule is that of the longer run, which warm-up alone does not see
    finetune(make_config(base, chat, tmp_path / "again", *more), NullDisplay())
    for name in ("adapter_model.safetensors",):
        assert (tmp_path / "whole/adapter" / name).read_bytes() == (tmp_path / "again/adapter" / name).read_bytes()
    checkpoints = sorted((tmp_path / "whole/checkpoints").glob("step-*"))
    assert [int(path.name[-2:]) for path in checkpoints] == [4, 6]
    # drop the last checkpoint: the run goes on from step 4
    import shutil

    shutil.rmtree(checkpoints[-1])
    finetune(make_config(base, chat, tmp_path / "whole", *more), NullDisplay())
    assert (tmp_path / "whole/adapter/adapter_model.safetensors").read_bytes() == (
        tmp_path / "again/adapter/adapter_model.safetensors"
    ).read_bytes()
    with pytest.raises(ConfigError, match="adapter was .* choose another out"):
        finetune(make_config(base, chat, tmp_path / "whole", *more, "adapter.r=2"), NullDisplay())


def test_adapters_are_exchanged_on_a_base_that_stays_as_it_is(base, chat, tmp_path):
    for name, seed in (("one", 1), ("two", 2)):
        finetune(make_config(base, chat, tmp_path / name, f"seed={seed}"), NullDisplay())
    model = load_base(base, nf4=False)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    plain = logits(model)
    adapted = swap_adapter(model, tmp_path / "one/adapter", "one")
    first = logits(adapted)
    adapted = swap_adapter(adapted, tmp_path / "two/adapter", "two")
    assert not torch.equal(first, logits(adapted))
    assert torch.equal(first, logits(swap_adapter(adapted, tmp_path / "one/adapter", "one")))
    with adapted.disable_adapter():
        assert torch.equal(plain, logits(adapted))
    restored = adapted.unload()
    assert torch.equal(plain, logits(restored))
    assert all(torch.equal(parameter, weights[name]) for name, parameter in restored.named_parameters())


def test_new_tokens_begin_at_the_mean_and_travel_with_the_adapter(base, chat, tmp_path):
    from peft import PeftModel
    from transformers import AutoTokenizer

    from lowmem.finetune.data import tokenizer_folder

    config = make_config(base, chat, tmp_path, "add_tokens=['<a>', '<b>']")
    model = load_base(base, nf4=False)
    _, ids = tokenizer_folder(config, base, model)
    rows = model.get_input_embeddings().weight
    for row in ids:
        assert torch.allclose(rows[row], rows[: ids[0]].mean(0), atol=1e-6)
    done = finetune(config, NullDisplay())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert tokenizer("<a><b>", add_special_tokens=False)["input_ids"] == ids
    fresh = load_base(base, nf4=False)
    tokenizer_folder(make_config(base, chat, tmp_path / "x", "add_tokens=['<a>', '<b>']"), base, fresh)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    tokens = torch.tensor([[3, 5, ids[0], 7, ids[1], 9]])
    expected = logits(load_merged(tmp_path), tokens)
    assert torch.allclose(logits(loaded, tokens), expected, rtol=0, atol=tolerance(expected))
    assert done.losses[6] < done.losses[0]


def load_merged(out: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(out / "merged")


@pytest.mark.parametrize("family", ["llama", "gpt2", "alibi"])
def test_no_conversation_of_a_row_counts_for_another(family, tmp_path):
    if family == "alibi":
        from lowmem.export.hf import hf_model

        model = hf_model(make_run(SHAPES["alibi"][0]))
    else:
        model = save_theirs(tmp_path, family)
    random = np.random.default_rng(0)
    items = [(random.integers(1, 250, length), np.arange(length) > 2) for length in (9, 12, 7, 15)]
    packed = pack_conversations(items, 40).batch
    assert len(packed) < 4
    apart = [pack_conversations([item], len(item[0]) - 1).batch for item in items]
    together = batch_loss(model, packed, 1.0, CPU).item()
    assert together == pytest.approx(sum(batch_loss(model, batch, 1.0, CPU).item() for batch in apart), rel=1e-5)


def test_a_run_of_lowmem_is_a_base(chat, tmp_path, capsys):
    from tests.train.tiny_run import tiny_arguments, write_text

    run = tmp_path / "run"
    assert main(["pretrain", "--quiet", *tiny_arguments(run, write_text(tmp_path / "a.txt"), train__steps=2, data__seq_len=64)]) == 0
    arguments = ["finetune", "--quiet", f"--base={run}", f"--data={chat}", f"--out={tmp_path / 'out'}", "--seq_len=96", "--steps=2"]
    assert main([*arguments, "--batch_size=2"]) == 0
    assert json.loads((tmp_path / "out/result.json").read_text())["trainable"] > 0
    assert (tmp_path / "out/merged/tokenizer.json").is_file()
    assert main([*arguments[:-3], f"--out={tmp_path / 'none'}", "--budget.ram=100MiB"]) == 3
    assert "budget.ram is 100MiB; use method=qlora" in capsys.readouterr().err
    assert main(["finetune", f"--base={tmp_path}", f"--data={chat}"]) == 2
    assert "which has neither config.json (transformers) nor config.yaml (a lowmem run)" in capsys.readouterr().err


def test_nf4_is_as_small_as_predicted(base, chat, tmp_path):
    """The prediction counts what PyTorch holds, to the tables of 16 and 256 codes that bitsandbytes keeps per layer."""
    for double_quant in (True, False):
        config = make_config(base, chat, tmp_path, "method=qlora", f"adapter.double_quant={double_quant}")
        model = load_base(base, nf4=True, double_quant=double_quant)
        measured, layers = 0, 0
        for parameter in model.parameters():
            measured += parameter.numel() * parameter.element_size()
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                layers += 1
                measured += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
        predicted = predict_memory(config, base).components["base"]
        assert layers == 14
        assert abs(measured - predicted) <= 4 * layers  # a last block that is not full
    full = predict_memory(make_config(base, chat, tmp_path, "method=lora"), base).components["base"]
    assert predicted < 0.75 * full
    with pytest.raises(MemoryBudgetError, match="use method=qlora, a smaller seq_len or a larger budget"):
        finetune(make_config(base, chat, tmp_path / "b", "budget.ram=1MiB"), NullDisplay())
