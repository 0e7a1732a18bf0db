"""`lowmem pretrain --model.path`: trained in every way, resumed bit for bit, predicted, read back for generation."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowmem.cli.main import main
from lowmem.config.load import load_run_config
from lowmem.engine.run_model import load_run_model
from tests.planning.small import stub_measurements
from tests.reference.tiny_families import save_tiny
from tests.train.tiny_run import ROOT, final_bits, losses_of_equal_runs, metrics, tiny_arguments, write_text

SETTINGS = {
    "data.tokenizer": "bpe", "optim.schedule": "constant", "train.steps": 9, "train.save_every": 3, "train.eval_every": 6, "train.seed": 1,
}  # fmt: skip
WAYS = {
    "accumulate": ("llama", {}),
    "layerwise": ("gemma2", {"train.update": "layerwise"}),
    "bf16, layerwise, 8-bit states": ("gpt2", {"train.update": "layerwise", "train.weight_dtype": "bf16", "optim.state_bits": 8}),
    "bf16, 4-bit states, nothing again": (
        "qwen3",
        {"train.weight_dtype": "bf16", "optim.state_bits": 4, "train.activation_checkpointing": "none"},
    ),
    "a recurrent state": ("lfm2", {"train.update": "layerwise"}),
}


def arguments(folder: Path, name: str, family: str, **overrides: object) -> list[str]:
    text, model = folder / "text.txt", folder / family
    if not model.exists():
        save_tiny(model, family)
    values = SETTINGS | {"model.path": model} | overrides
    if values.get("train.weight_dtype") == "bf16":
        values["train.precision"] = "bf16"
    given = tiny_arguments(folder / name, text if text.exists() else write_text(text), **values)
    return [argument for argument in given if not argument.startswith(("--model.dim", "--model.num_"))]


def pretrain(*given: object, flags: tuple[str, ...] = ()) -> int:
    return main(["pretrain", "--quiet", *map(str, given), *flags])


@pytest.mark.parametrize("way", WAYS)
def test_a_run_in_two_parts_equals_one_in_one(tmp_path, way):
    family, settings = WAYS[way]
    assert pretrain(*arguments(tmp_path, "whole", family, **settings)) == 0
    assert pretrain(*arguments(tmp_path, "parts", family, **settings, **{"train.steps": 6})) == 0
    assert pretrain(*arguments(tmp_path, "parts", family, **settings)) == 0
    losses = losses_of_equal_runs(tmp_path)
    assert [line for line in metrics(tmp_path / "whole") if "loss" in line] == [
        line for line in metrics(tmp_path / "parts") if "loss" in line
    ]
    assert losses[-1] < losses[0] - 0.5
    config = load_run_config(tmp_path / "whole" / "config.yaml")
    assert config.data.tokenizer == str(tmp_path / family)
    assert config.data.document_mask is (family != "lfm2")


def test_what_is_trained_is_read_back_by_lowmem_and_by_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    assert pretrain(*arguments(tmp_path, "run", "llama", **{"train.steps": 2})) == 0
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1] / "model.safetensors"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    before = theirs.state_dict()["model.norm.weight"].clone()
    theirs.load_state_dict(load_file(newest), strict=True)
    assert not torch.equal(before, theirs.state_dict()["model.norm.weight"])
    run = load_run_model(tmp_path / "run")
    tokens = torch.arange(3, 15).view(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(run.model(tokens), theirs(input_ids=tokens).logits, rtol=0, atol=1e-4)
    assert 257 < run.tokenizer.vocab_size <= 300


def test_a_run_is_written_from(tmp_path, capsys):
    assert pretrain(*arguments(tmp_path, "run", "llama", **{"train.steps": 2})) == 0
    capsys.readouterr()
    assert main(["generate", "--run", str(tmp_path / "run"), "--prompt", "some words", "--max_new_tokens", "4", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("some words")


def test_a_run_is_exported_as_a_directory_of_transformers(tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    assert pretrain(*arguments(tmp_path, "run", "gemma2", **{"train.steps": 2})) == 0
    out = tmp_path / "out"
    assert main(["export", "--run", str(tmp_path / "run"), "--out", str(out)]) == 0
    assert "a gemma2 directory of transformers" in capsys.readouterr().out
    theirs = AutoModelForCausalLM.from_pretrained(out)
    run, tokens = load_run_model(tmp_path / "run"), torch.arange(3, 15).view(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(run.model(tokens), theirs(input_ids=tokens).logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(load_run_model(out).model(tokens), run.model(tokens), rtol=0, atol=1e-5)
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "gemma2" / "tokenizer.json").read_bytes()
    assert main(["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "other"), "--format=adapter"]) == 2
    assert "has no adapter to write" in capsys.readouterr().err


def test_a_model_of_transformers_teaches(tmp_path, capsys):
    """Another of the same tokenizer, as a directory or as a run."""
    given = arguments(tmp_path, "alone", "llama", **{"train.steps": 2})
    assert pretrain(*given) == 0
    losses = {}
    for name, teacher in (("directory", tmp_path / "llama"), ("run", tmp_path / "alone")):
        taught = [*given, f"--run_dir={tmp_path / name}", f"--train.distill.teacher={teacher}", "--train.distill.weight=1.0"]
        assert pretrain(*taught) == 0
        losses[name] = next(line["loss"] for line in metrics(tmp_path / name) if "loss" in line)
    # a model that is its own teacher has the entropy of its predictions to lose, and nothing to learn; a trained teacher differs
    usual = next(line["loss"] for line in metrics(tmp_path / "alone") if "loss" in line)
    assert losses["directory"] < usual
    assert losses["directory"] != losses["run"]
    save_tiny(tmp_path / "larger", "llama", vocab_size=384)
    capsys.readouterr()
    for teacher, message in (
        ("larger", "has model.vocab_size 384, the student 320; they must share a tokenizer"),
        ("nowhere", "no config.json"),
    ):
        assert pretrain(*given, f"--run_dir={tmp_path / 'new'}", f"--train.distill.teacher={tmp_path / teacher}") == 2
        assert message in capsys.readouterr().err
    tokenizer = json.loads((tmp_path / "llama" / "tokenizer.json").read_text())
    save_tiny(tmp_path / "other", "llama")
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps({**tokenizer, "normalizer": {"type": "NFC"}}))
    assert pretrain(*given, f"--run_dir={tmp_path / 'new'}", f"--train.distill.teacher={tmp_path / 'other'}") == 2
    assert "other/tokenizer.json is another tokenizer than this run's" in capsys.readouterr().err


@pytest.mark.parametrize("update", ["accumulate", "layerwise"])
def test_a_dry_run_counts_what_the_run_counts(tmp_path, capsys, monkeypatch, update):
    stub_measurements(monkeypatch)
    given = arguments(tmp_path, "run", "gemma2", **{"train.steps": 2, "train.save_every": 0, "train.eval_every": 0, "train.update": update})
    capsys.readouterr()
    assert pretrain(*given, flags=("--dry_run", "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert pretrain(*given) == 0
    counted = json.loads((tmp_path / "run" / "memory.json").read_text())["measured"]["components"]
    for name in ("weights", "optimizer_states"):
        assert report["predicted"]["components"][name] == counted[name], name
    assert report["parameters"] * 4 == counted["weights"]
    assert report["config"]["train"]["activation_checkpointing"] == "block"


@pytest.mark.parametrize("overrides, code, message", [
    ({"model.path": "/nowhere/at/all"}, 2, "model.path is /nowhere/at/all: no such directory"),
    ({"model.dim": 64}, 2, "whose shape is its own; remove model.dim, or model.path"),
    ({"train.activation_checkpointing": "selective"}, 2, "train.activation_checkpointing=selective does not work with model.path"),
    ({"data.seq_len": 129}, 2, "data.seq_len is 129, but the learned positions of"),
])  # fmt: skip
def test_what_cannot_be_is_one_line(tmp_path, capsys, overrides, code, message):
    given = arguments(tmp_path, "run", "gpt2")
    capsys.readouterr()
    assert pretrain(*given, *(f"--{key}={value}" for key, value in overrides.items())) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err


def test_a_directory_without_a_model_ends_with_5(tmp_path, capsys):
    given = arguments(tmp_path, "run", "llama")
    (tmp_path / "llama" / "model.safetensors").unlink()
    capsys.readouterr()
    assert pretrain(*given) == 5
    assert "has no model.safetensors" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_in_a_save_it_goes_on_bit_equal(tmp_path):
    settings = {"train.update": "layerwise"}
    assert pretrain(*arguments(tmp_path, "whole", "llama", **settings)) == 0
    killed, driver = tmp_path / "killed", Path(__file__).parent / "kill_driver.py"
    given = arguments(tmp_path, "killed", "llama", **settings)
    for event in (3, 9):
        place = killed / "checkpoints" / ".writing-"
        command = [sys.executable, str(driver), str(place), str(event), "0", "pretrain", *given]
        leg = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
        assert leg.returncode == -signal.SIGKILL, leg.stderr
    assert pretrain(*given) == 0
    assert final_bits(killed) == final_bits(tmp_path / "whole")


@pytest.mark.parametrize(
    "settings", [{}, {"adapter.method": "lora"}, {"adapter.method": "last_k"}, {"train.weight_dtype": "int8"}, {"model.lorpt.rank": 4}]
)
def test_a_run_whose_blocks_are_on_a_disk_leaves_what_a_resident_one_does(tmp_path, settings, capsys):
    left = []
    for place in ("device", "disk"):
        given = {"train.steps": 2, "train.update": "layerwise", "train.weights_at": place, "train.loss_chunk_tokens": 9, **settings}
        assert main(["pretrain", *map(str, arguments(tmp_path, place, "llama", **given))]) == 0
        assert ("--interactive --weights_at=disk" in capsys.readouterr().err) is (place == "disk")
        folders = [tmp_path / place / "merged", tmp_path / place / "adapter"]
        left.append({str(file.relative_to(tmp_path / place)): file.read_bytes() for folder in folders for file in folder.rglob("*")})
    assert "merged/model.safetensors" in left[0]
    assert left[0] == left[1]
    texts = []
    for place in ("device", "disk"):
        capsys.readouterr()
        asked = ["--prompt", "some words", "--temperature", "0", "--max_new_tokens", "6", "--device", "cpu", "--json"]
        assert main(["generate", "--run", str(tmp_path / "disk"), *asked, f"--weights_at={place}"]) == 0
        texts.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert texts[0] == texts[1]
    exported = []
    for more in ([], [f"--storage_dir={tmp_path / 'scratch'}"]):
        out = tmp_path / f"exported-{len(more)}"
        assert main(["export", "--run", str(tmp_path / "disk"), "--out", str(out), *more]) == 0
        exported.append({file.name: file.read_bytes() for file in out.iterdir()})
    assert exported[0] == exported[1]
    assert not list((tmp_path / "scratch").iterdir())
