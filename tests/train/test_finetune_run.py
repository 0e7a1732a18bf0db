"""`lowmem finetune`: every method learns and others load what it saves; resumed bit for bit; within its memory; in the words it has now."""

import json
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowmem.cli.finetune import DEFAULTS
from lowmem.cli.main import main
from lowmem.config.load import load_run_config
from lowmem.data.tokenizer_loading import load_tokenizer
from lowmem.engine.local import LocalEngine
from lowmem.engine.run_model import load_run_model
from lowmem.planning.levers import predict_fitting
from tests.engine.out_of_memory import MESSAGE
from tests.planning.small import stub_measurements
from tests.reference.random_models import save_theirs, tolerance
from tests.train.tiny_run import ROOT, final_bits, finetune_arguments, lowmem, metrics, write_text

TOKENS = torch.arange(40).view(1, 40) * 7 % 300
ADAPTERS = ("lora", "qlora", "dora", "lora_plus", "rslora", "ia3")
PARTS = ("head", "last_k", "none")
# lora_plus multiplies the rate of B by 16: at 0.01 weights grow so large that fp32 logits lose the digits that `tolerance` counts on
RATES = {"none": 0.003, "lora_plus": 0.002}


def finetune(base: Path, chat: Path, run_dir: Path, *flags: str, **overrides: object) -> int:
    return main(["finetune", "--quiet", *finetune_arguments(base, chat, run_dir, **overrides), *flags])


def method_settings(method: str) -> dict[str, object]:
    """QLoRA is LoRA beside weights in 4 bits."""
    return {"adapter__method": "lora", "train__weight_dtype": "nf4"} if method == "qlora" else {"adapter__method": method}


def logits(model, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


def theirs(directory: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory)


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in metrics(run_dir) if "loss" in line]


def held_out(run_dir: Path) -> list[float]:
    return [line["val_loss"] for line in metrics(run_dir) if "val_loss" in line]


@pytest.mark.parametrize("method", [*ADAPTERS, *PARTS])
def test_every_method_learns_and_others_load_what_it_saves(method, base, chat, tmp_path):
    settings = method_settings(method) | {"optim__lr": RATES.get(method, 0.01)}
    assert finetune(base, chat, tmp_path / "run", train__steps=12, train__eval_every=1, **settings) == 0
    found = held_out(tmp_path / "run")
    assert found[-1] < found[0] - 0.05
    merged = logits(theirs(tmp_path / "run/merged"))
    assert merged.shape == (1, 40, 320)
    assert not torch.allclose(merged, logits(theirs(base)), rtol=0, atol=0.01)
    if method in PARTS:
        assert not (tmp_path / "run/adapter").exists()
    if method == "none":
        return
    trained = sum(t.numel() for t in load_file(sorted((tmp_path / "run/checkpoints").glob("step-*"))[-1] / "model.safetensors").values())
    assert trained < 0.6 * sum(tensor.numel() for tensor in load_file(base / "model.safetensors").values())


def test_a_prefix_learns_and_others_load_it(base, chat, tmp_path, capsys):
    """It stays beside the weights: nothing is merged, and the run says so."""
    from peft import PeftModel

    run = tmp_path / "run"
    settings: dict[str, object] = {
        "adapter__method": "prefix", "adapter__num_virtual_tokens": 6, "optim__lr": 0.1, "train__global_batch_size": 6,
        "train__micro_batch_size": 2, "train__steps": 8, "train__eval_every": 8,
    }  # fmt: skip
    capsys.readouterr()
    assert main(["finetune", *finetune_arguments(base, chat, run, **settings)]) == 0
    assert "cannot be merged into them: adapter/ is written, and no merged/" in " ".join(capsys.readouterr().err.split())
    assert held_out(run)[-1] < losses(run)[0] - 0.05
    assert not (run / "merged").exists()
    trained = load_run_model(run).model
    with torch.no_grad():
        expected = trained(TOKENS)
        assert torch.equal(load_run_model(run / "adapter").model(TOKENS), expected)
    adapted = logits(PeftModel.from_pretrained(theirs(base), run / "adapter"))
    assert torch.allclose(adapted, expected, rtol=0, atol=tolerance(expected))
    assert main(["generate", "--run", str(run), "--prompt", "some words", "--max_new_tokens", "5"]) == 0


@pytest.mark.parametrize("method", ADAPTERS)
def test_an_adapter_beside_its_base_is_the_merged_model(method, base, chat, tmp_path):
    from peft import PeftModel

    assert finetune(base, chat, tmp_path / "run", train__steps=12, optim__lr=RATES.get(method, 0.01), **method_settings(method)) == 0
    merged, adapted = logits(theirs(tmp_path / "run/merged")), logits(PeftModel.from_pretrained(theirs(base), tmp_path / "run/adapter"))
    if method == "qlora":  # merged holds the widened 4-bit weights that were trained with, not those of the base
        assert not torch.equal(adapted, merged)
        assert torch.nn.functional.cosine_similarity(adapted, merged, dim=-1).mean() > 0.9
    else:  # merging rounds each weight once more
        assert torch.allclose(adapted, merged, rtol=0, atol=tolerance(merged))


@pytest.mark.parametrize("method", ["lora", "dora", "rslora", "lora_plus", "ia3"])
def test_at_the_start_an_adapter_changes_nothing(method, base, chat, tmp_path):
    """The held-out loss after a step whose rate is 0 is that of the weights as they were."""
    found = {}
    for name in (method, "none"):
        settings = {"train__steps": 1, "train__eval_every": 1, "optim__lr": 0, "adapter__method": name}
        assert finetune(base, chat, tmp_path / name, **settings) == 0
        found[name] = held_out(tmp_path / name)
    # DoRA divides by a length and multiplies by it: two more roundings of each of some hundred terms
    assert found[method] == pytest.approx(found["none"], rel=1e-5 if method == "dora" else 1e-6)


def test_b_is_the_factor_that_learns_faster(base, chat, tmp_path):
    """After the first step of AdamW without decay every number of B has moved by its learning rate."""
    moved = {}
    for method, ratio in (("lora", 1), ("lora_plus", 8)):
        settings = {"adapter__method": method, "train__steps": 1, "optim__schedule": "constant", "optim__lr": 0.001, "optim__clip": 0}
        settings |= {"adapter__loraplus_lr_ratio": ratio} if method == "lora_plus" else {}
        assert finetune(base, chat, tmp_path / method, **settings) == 0
        factors = load_file(tmp_path / method / "adapter/adapter_model.safetensors")
        moved[method] = {name: factor for name, factor in factors.items() if "lora_B" in name}
    assert moved["lora"]
    for name, factor in moved["lora"].items():  # B begins at 0
        assert torch.allclose(moved["lora_plus"][name], 8 * factor, rtol=1e-3, atol=1e-7), name


def test_adapters_are_exchanged_on_a_base_that_stays_as_it_is(base, chat, tmp_path):
    """Two runs, one base in memory: PEFT changes between what they saved, and the base is as it was."""
    from peft import PeftModel

    for name, seed in (("one", 1), ("two", 2)):
        assert finetune(base, chat, tmp_path / name, train__seed=seed) == 0
    model = theirs(base)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    plain = logits(model)
    adapted = PeftModel.from_pretrained(model, tmp_path / "one/adapter", adapter_name="one")
    first = logits(adapted)
    adapted.load_adapter(tmp_path / "two/adapter", adapter_name="two")
    adapted.set_adapter("two")
    assert not torch.equal(first, logits(adapted))
    adapted.set_adapter("one")
    assert torch.equal(first, logits(adapted))
    restored = adapted.unload()
    assert torch.equal(plain, logits(restored))
    assert all(torch.equal(parameter, weights[name]) for name, parameter in restored.named_parameters())


@pytest.mark.parametrize("method", ["lora", "prefix", "none"])
@pytest.mark.parametrize("update", ["accumulate", "layerwise"])
def test_resuming_ends_bit_equal(update, method, base, chat, tmp_path):
    settings = {
        "train__update": update, "adapter__method": method, "optim__state_bits": 8, "train__micro_batch_size": 1,
        "train__global_batch_size": 4, "train__steps": 6, "train__save_every": 2, "optim__schedule": "constant",
    }  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    if method == "lora":
        settings["adapter__r"] = 64  # so large that its states have 8 bits
    if method == "prefix":
        settings["adapter__num_virtual_tokens"] = 64  # as above
    assert finetune(base, chat, whole, **settings) == 0
    assert finetune(base, chat, parts, **settings | {"train__steps": 4}) == 0
    assert finetune(base, chat, parts, **settings) == 0
    assert final_bits(whole) == final_bits(parts)
    assert losses(whole) == losses(parts)
    shutil.rmtree(sorted((whole / "checkpoints").glob("step-*"))[-1])  # the run goes on from step 4
    assert finetune(base, chat, whole, **settings) == 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert final_bits(whole)[name] == final_bits(parts)[name]
    if method != "none":
        assert [(run / "adapter/adapter_model.safetensors").read_bytes() for run in (whole, parts)] == [
            (parts / "adapter/adapter_model.safetensors").read_bytes()
        ] * 2


@pytest.mark.parametrize("setting", ["adapter.r=2", "adapter.method=dora", "data.seq_len=32", "train.weight_dtype=bf16"])
def test_a_run_does_not_go_on_with_other_settings(setting, base, chat, tmp_path, capsys):
    assert finetune(base, chat, tmp_path / "run") == 0
    capsys.readouterr()
    assert finetune(base, chat, tmp_path / "run", "--train.precision=auto", f"--{setting}", train__steps=4) == 2
    error = capsys.readouterr().err
    assert setting.partition("=")[0] in error
    assert error.count("\n") == 1


def test_the_largest_micro_batch_that_fits_the_budget_is_taken(base, chat, tmp_path, monkeypatch):
    stub_measurements(monkeypatch)
    words = finetune_arguments(
        base,
        chat,
        tmp_path / "run",
        train__global_batch_size=8,
        data__seq_len=64,
        adapter__method="none",
        train__activation_checkpointing="none",
    )

    def settled(**budget: str):
        more = [f"budget.{name}={size}" for name, size in budget.items()]
        return predict_fitting(load_run_config("", [*(word[2:] for word in words), *more], defaults=DEFAULTS))

    peaks = {}
    for size in (8, 4, 2, 1):
        words.append(f"--train.micro_batch_size={size}")
        peaks[size] = settled().host.peak_bytes
    words.append("--train.micro_batch_size=auto")
    assert all(smaller < larger for larger, smaller in pairwise(peaks.values()))
    for larger, smaller in pairwise(peaks):
        assert settled(ram=f"{peaks[larger]}B").config.train.micro_batch_size == larger
        assert settled(ram=f"{peaks[larger] - 1}B").config.train.micro_batch_size == smaller
    assert settled(ram="1MiB").config.train.micro_batch_size == 1


def test_a_run_takes_the_micro_batch_that_was_predicted_to_fit(base, chat, tmp_path, monkeypatch):
    answer = {"predicted": {"host_peak_bytes": 1}, "summary": "", "micro_batch_size": 2, "refusal": ""}
    monkeypatch.setattr("lowmem.planning.check.check_run", lambda *_: answer)
    assert finetune(base, chat, tmp_path / "run", train__global_batch_size=8, budget__ram="64GiB", adapter__method="none") == 0
    assert [line["micro_batch_size"] for line in metrics(tmp_path / "run") if "loss" in line] == [2, 2]
    assert json.loads((tmp_path / "run/memory.json").read_text())["predicted"] == {"host_peak_bytes": 1}


def test_a_micro_batch_that_runs_out_of_memory_is_lowered_and_remembered(base, chat, tmp_path, monkeypatch):
    settings = {"train__global_batch_size": 4, "train__steps": 4, "train__save_every": 2, "optim__schedule": "constant"}
    assert finetune(base, chat, tmp_path / "expected", train__micro_batch_size=2, **settings) == 0
    usual, tried = LocalEngine._accumulate, []

    def once(self, batch):
        tried.append(self.micro_batch_size)
        if self.micro_batch_size == 4:
            raise RuntimeError(MESSAGE)
        return usual(self, batch)

    monkeypatch.setattr(LocalEngine, "_accumulate", once)
    assert finetune(base, chat, tmp_path / "lowered", train__micro_batch_size=4, **settings) == 0
    assert tried == [4, 2, 2, 2, 2]
    shutil.rmtree(tmp_path / "lowered/checkpoints/step-00000004")
    assert finetune(base, chat, tmp_path / "lowered", train__micro_batch_size=4, **settings) == 0
    assert tried == [4, 2, 2, 2, 2, 2, 2]
    assert final_bits(tmp_path / "lowered")["model.safetensors"] == final_bits(tmp_path / "expected")["model.safetensors"]


@pytest.mark.slow
def test_what_exceeds_every_budget_is_one_line_and_a_dry_run_is_json(base, chat, tmp_path):
    """With an empty cache: libraries that measuring the base cost imports print to standard output."""
    words = finetune_arguments(base, chat, tmp_path / "run", budget__ram="100MiB")
    done = lowmem("finetune", "--quiet", *words)
    assert done.returncode == 3
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("lowmem: error: ")
    assert "the budget is 100MiB" in error
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run/checkpoints").exists()
    shutil.rmtree(tmp_path / "cache")
    done = lowmem("finetune", "--quiet", *words, "--budget.ram=8GiB", "--dry_run", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["config"]["adapter"]["method"] == "lora"


def test_new_tokens_begin_at_the_mean_and_are_trained(base, chat, tmp_path):
    """After a step whose rate is 0: rows are as they began."""
    settings = {"data__add_tokens": "[<a>, <b>]", "adapter__method": "none", "optim__lr": 0, "train__steps": 1}
    assert finetune(base, chat, tmp_path / "run", **settings) == 0
    tokenizer = load_tokenizer(tmp_path / "run/tokenizer.json")
    ids = tokenizer.encode("<a><b>")
    assert ids == [tokenizer.vocab_size - 2, tokenizer.vocab_size - 1]
    weights = load_file(sorted((tmp_path / "run/checkpoints").glob("step-*"))[-1] / "model.safetensors")
    rows = next(weight for name, weight in weights.items() if name.endswith("embed_tokens.weight"))
    for row in ids:
        assert torch.allclose(rows[row], rows[: ids[0]].mean(0), atol=1e-5)


def test_new_tokens_travel_with_the_adapter(base, tmp_path):
    from peft import PeftModel
    from transformers import AutoTokenizer

    chat = tmp_path / "chat.jsonl"
    chat.write_text("\n".join(json.dumps({"prompt": f"<a> some words {n % 7}", "response": "the other <b> words"}) for n in range(60)))
    assert finetune(base, chat, tmp_path / "run", data__add_tokens="[<a>, <b>]", train__steps=6, train__eval_every=1) == 0
    found = held_out(tmp_path / "run")
    assert found[-1] < found[0]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/adapter")
    ids = tokenizer("<a><b>", add_special_tokens=False)["input_ids"]
    assert ids == load_tokenizer(tmp_path / "run").encode("<a><b>")
    tokens = torch.tensor([[3, 5, ids[0], 7, ids[1], 9]])
    merged = theirs(tmp_path / "run/merged")
    plain = theirs(base)
    plain.resize_token_embeddings(merged.get_input_embeddings().weight.shape[0], mean_resizing=False)
    adapted = PeftModel.from_pretrained(plain, tmp_path / "run/adapter")
    expected = logits(merged, tokens)
    assert torch.allclose(logits(adapted, tokens), expected, rtol=0, atol=tolerance(expected))


def test_new_tokens_that_are_there_already_are_named(base, chat, tmp_path, capsys):
    assert finetune(base, chat, tmp_path / "run", data__add_tokens="[<a>, e]") == 2
    assert "data.add_tokens has e, which the tokenizer has already; leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["none", "lora"])
@pytest.mark.parametrize("update", ["accumulate", "layerwise"])
def test_two_phases_text_then_conversations(update, method, base, chat, tmp_path):
    """In one run on a model of transformers, stopped and resumed in either phase."""
    text = write_text(tmp_path / "text.txt")
    phases = f"[{{kind: text, steps: 3, sources: [{{path: {text}}}]}}, {{kind: chat, steps: 3, sources: [{{path: {chat}}}]}}]"
    settings = {"phases": phases, "train__steps": 0, "adapter__method": method, "train__update": update, "train__save_every": 2}
    for name in ("whole", "parts"):
        assert finetune(base, chat, tmp_path / name, **settings) == 0
        if name == "parts":
            for step in (6, 4):  # on from step 2, in the first phase
                shutil.rmtree(tmp_path / f"parts/checkpoints/step-{step:08}", ignore_errors=True)
            for folder in sorted((tmp_path / "parts/checkpoints").glob("step-*"))[1:]:
                shutil.rmtree(folder)
            assert finetune(base, chat, tmp_path / name, **settings) == 0
    lines = [line for line in metrics(tmp_path / "whole") if "loss" in line]
    assert [line["phase"] for line in lines] == ["text-1"] * 3 + ["chat-2"] * 3
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert final_bits(tmp_path / "whole")[name] == final_bits(tmp_path / "parts")[name]


def test_the_configuration_of_a_run_is_one_of_pretrain(base, chat, tmp_path):
    """What was settled is written down, and `pretrain` goes on with it."""
    assert finetune(base, chat, tmp_path / "run", adapter__method="none") == 0
    config = load_run_config(tmp_path / "run/config.yaml")
    assert (config.data.kind, config.adapter.method, config.model.path) == ("chat", "none", str(base))
    assert config.train.activation_checkpointing == "block"
    assert main(["pretrain", "--quiet", "--config", str(tmp_path / "run/config.yaml"), "--train.steps=4"]) == 0
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4]


def test_a_file_is_above_the_defaults_of_the_command_and_below_its_flags(base, chat, tmp_path, capsys):
    path = tmp_path / "x.yaml"
    path.write_text(f"model: {{path: {base}}}\ndata: {chat}\nadapter: {{method: dora}}\ntrain: {{steps: 7}}\n")
    assert main(["finetune", "--config", str(path), "--train.steps=9", "--print_config"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    config = load_run_config(tmp_path / "printed.yaml")
    assert (config.adapter.method, config.train.steps, config.data.kind, config.data.sources[0].path) == ("dora", 9, "chat", str(chat))


@pytest.mark.parametrize(
    "words, message",
    [
        ("--base=runs/chat --data=chat.json", "base is no key any more; use model.path"),
        ("--method=qlora", "method is no key any more; use adapter.method (qlora: lora with train.weight_dtype=nf4; full: none)"),
        ("--adapter.double_quant=false", "adapter.double_quant is no key any more; use train.double_quant"),
        ("--out=x", "out is no key any more; use run_dir"),
    ],
)
def test_old_keys_name_the_new_ones(words, message, capsys):
    assert main(["finetune", *words.split()]) == 2
    assert capsys.readouterr().err == f"lowmem: error: {message}\n"


def test_a_run_of_lowmem_is_no_model_of_transformers(base, chat, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("run_dir: x\n")
    assert finetune(tmp_path, chat, tmp_path / "run") == 5
    assert "has no config.json: it is a lowmem run, which train.init_from takes" in capsys.readouterr().err
    assert finetune(tmp_path / "none", chat, tmp_path / "run") == 2
    assert "no such directory" in capsys.readouterr().err


@pytest.mark.memory
@pytest.mark.parametrize("method", ["lora", "qlora", "none"])
def test_a_run_takes_what_is_predicted(method, chat, tmp_path):
    save_theirs(tmp_path / "base", "llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=4)
    settings = method_settings(method) | {
        "train__steps": 3, "data__seq_len": 256, "train__global_batch_size": 4, "train__micro_batch_size": 4,
        "budget__ram": "16GiB",
    }  # fmt: skip
    words = finetune_arguments(tmp_path / "base", chat, tmp_path / "run", **settings)
    subprocess.run([sys.executable, "-m", "lowmem", "finetune", "--quiet", *words], check=True, capture_output=True, cwd=ROOT)
    report = json.loads((tmp_path / "run/memory.json").read_text())
    assert report["measured"]["host_peak_bytes"] == pytest.approx(report["predicted"]["host_peak_bytes"], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "none"])
def test_killed_in_a_save_it_goes_on_bit_equal(method, base, chat, tmp_path):
    settings = {
        "adapter__method": method,
        "train__update": "layerwise",
        "train__steps": 6,
        "train__save_every": 2,
        "optim__schedule": "constant",
    }
    assert finetune(base, chat, tmp_path / "whole", **settings) == 0
    killed, driver = tmp_path / "killed", Path(__file__).parent / "kill_driver.py"
    words = finetune_arguments(base, chat, killed, **settings)
    for event in (3, 9):
        command = [sys.executable, str(driver), str(killed / "checkpoints" / ".writing-"), str(event), "0", "finetune", "--quiet", *words]
        leg = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
        assert leg.returncode == -signal.SIGKILL, leg.stderr
    assert main(["finetune", "--quiet", *words]) == 0
    assert final_bits(killed) == final_bits(tmp_path / "whole")
