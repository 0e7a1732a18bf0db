"""`lowmem pretrain --model.path` with low-rank factors and with codes: resumed bit for bit, predicted, written from, exported."""

import json
from pathlib import Path

import pytest
import torch

from lowmem.cli.main import main
from lowmem.engine.run_model import load_run_model
from lowmem.nn.lorpt import LoRPtLinear
from lowmem.system.tensors import read_tensors
from tests.planning.small import stub_measurements
from tests.reference.tiny_families import save_tiny
from tests.train.tiny_run import losses_of_equal_runs, tiny_arguments, write_text

WIDE = {"hidden_size": 96, "intermediate_size": 96, "head_dim": 24}
SHAPES = {"llama": WIDE | {"tie_word_embeddings": True}, "qwen2": WIDE, "phi3": WIDE, "gpt2": {"n_embd": 96}}
SETTINGS = {
    "data.tokenizer": "bpe", "optim.schedule": "constant", "optim.lr": 5e-3, "optim.warmup_steps": 2, "train.steps": 6,
    "train.save_every": 3, "train.eval_every": 0, "train.seed": 1,
}  # fmt: skip
LOW_RANK, LAYERWISE = {"model.lorpt.rank": 8}, {"train.update": "layerwise", "optim.state_bits": 8}
WAYS = {
    "factors": ("llama", LOW_RANK),
    "factors, layerwise, bf16": ("phi3", LOW_RANK | LAYERWISE | {"train.weight_dtype": "bf16", "train.precision": "bf16"}),
    "factors that grow": ("qwen2", LOW_RANK | {"model.lorpt.schedule": "{2: 12, 4: 6}"}),
    "factors of transposed layers": ("gpt2", LOW_RANK),
    "int8": ("llama", {"train.weight_dtype": "int8"}),
    "int4, layerwise": ("qwen2", LAYERWISE | {"train.weight_dtype": "int4"}),
    "int8 factors": ("phi3", LAYERWISE | {"train.weight_dtype": "int8", "model.lorpt.rank": "auto"}),
}

FAST = ("factors", "int8")


def arguments(folder: Path, name: str, family: str, **overrides: object) -> list[str]:
    text, model = folder / "text.txt", folder / family
    if not model.exists():
        save_tiny(model, family, **SHAPES[family])
    given = tiny_arguments(folder / name, text if text.exists() else write_text(text), **(SETTINGS | {"model.path": model} | overrides))
    return [argument for argument in given if not argument.startswith(("--model.dim", "--model.num_"))]


def pretrain(*given: object, flags: tuple[str, ...] = ()) -> int:
    return main(["pretrain", "--quiet", *map(str, given), *flags])


def checkpoint(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step-*"))[-1] / "model.safetensors"


@pytest.mark.parametrize("way", [way if way in FAST else pytest.param(way, marks=pytest.mark.slow) for way in WAYS])
def test_a_run_in_two_parts_equals_one_in_one_and_is_exported(tmp_path, way, capsys):
    family, settings = WAYS[way]
    assert pretrain(*arguments(tmp_path, "whole", family, **settings)) == 0
    assert pretrain(*arguments(tmp_path, "parts", family, **settings, **{"train.steps": 3})) == 0
    assert pretrain(*arguments(tmp_path, "parts", family, **settings)) == 0
    losses = losses_of_equal_runs(tmp_path)
    assert losses[-1] < losses[0] - 0.5
    names = set(dict(read_tensors(checkpoint(tmp_path / "whole"))))
    coded, factored = "train.weight_dtype" in settings and settings["train.weight_dtype"] != "bf16", "model.lorpt.rank" in settings
    assert any(name.endswith(".codes") for name in names) == coded
    assert any(".up" in name.rpartition("layers.")[2] or name.endswith(".up") for name in names if "up_proj" not in name) == factored
    _exported(tmp_path, family, capsys, factored, torch.bfloat16 if "bf16" in way else torch.float32)


def _exported(folder: Path, family: str, capsys, factored: bool, dtype: torch.dtype) -> None:
    """An ordinary directory of the base's architecture, with the logits of the run."""
    from transformers import AutoModelForCausalLM

    run, tokens = load_run_model(folder / "whole"), torch.arange(3, 15).view(1, -1)
    assert any(isinstance(module, LoRPtLinear) for module in run.model.modules()) == factored
    capsys.readouterr()
    assert main(["export", "--run", str(folder / "whole"), "--out", str(folder / "out")]) == 0
    said = capsys.readouterr().out
    theirs = AutoModelForCausalLM.from_pretrained(folder / "out")
    base = AutoModelForCausalLM.from_pretrained(folder / family)
    assert type(theirs) is type(base)
    assert {name: t.shape for name, t in theirs.state_dict().items()} == {name: t.shape for name, t in base.state_dict().items()}
    assert ("low-rank factors multiplied out" in said) == factored
    assert f"{base.num_parameters():,} parameters" in said
    stored = dict(read_tensors(folder / "out" / "model.safetensors"))
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    with torch.no_grad():
        expected = run.model(tokens).float()
        # products in fp32, in another order; in bf16 every weight of a product is rounded, to 2^-9
        tolerance = (1e-4 if dtype == torch.float32 else 2**-4) * expected.abs().max().item()
        torch.testing.assert_close(theirs.float()(input_ids=tokens).logits, expected, rtol=0, atol=tolerance)
        torch.testing.assert_close(load_run_model(folder / "out").model(tokens).float(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("settings", [LOW_RANK, {"train.weight_dtype": "int8"}])
def test_a_run_is_written_from_and_merged_at_its_end(tmp_path, capsys, settings):
    assert pretrain(*arguments(tmp_path, "run", "llama", **settings, **{"train.steps": 2})) == 0
    for place in ("run", "run/merged"):
        capsys.readouterr()
        flags = ["--prompt", "some words", "--max_new_tokens", "4", "--device", "cpu", "--temperature", "0"]
        assert main(["generate", "--run", str(tmp_path / place), *flags]) == 0
        texts = {capsys.readouterr().out}
    assert len(texts) == 1
    assert main(["generate", "--run", str(tmp_path / "run"), "--prompt", "a", "--device", "cpu", "--dry_run", "--json"]) == 0
    predicted = json.loads(capsys.readouterr().out)
    assert predicted["predicted"]["weights_bytes"] == 4 * load_run_model(tmp_path / "run").model.num_parameters()
    assert main(["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--keep_factors"]) == 2
    assert "which is written with whole weights; leave it out" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_dry_run_counts_what_the_run_counts(tmp_path, capsys, monkeypatch, way):
    stub_measurements(monkeypatch)
    family, settings = WAYS[way]
    if "grow" in way:
        settings = LOW_RANK | {"model.lorpt.schedule": "{2: 12}"}  # predicted is the largest rank
    few = {"train.steps": 3, "train.save_every": 0, "train.eval_every": 0}
    given = arguments(tmp_path, "run", family, **settings, **few)
    capsys.readouterr()
    assert pretrain(*given, flags=("--dry_run", "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert pretrain(*given) == 0
    counted = json.loads((tmp_path / "run" / "memory.json").read_text())["measured"]["components"]
    for name in ("weights", "optimizer_states"):
        assert report["predicted"]["components"][name] == counted[name], name


@pytest.mark.slow
def test_the_largest_rank_that_fits_is_found(tmp_path, capsys, monkeypatch):
    stub_measurements(monkeypatch)
    given = arguments(tmp_path, "run", "llama", **LOW_RANK)
    capsys.readouterr()
    assert main(["plan", "--solve=model.lorpt.rank", "--budget.ram=8GB", *given]) == 0
    assert "model.lorpt.rank=24" in capsys.readouterr().out.replace(" ", "").replace(":", "=")  # below 32 of the narrowest, 48 x 96


def test_a_rank_schedule_that_goes_too_far_is_one_line(tmp_path, capsys):
    given = arguments(tmp_path, "run", "llama", **LOW_RANK, **{"model.lorpt.schedule": "{2: 40}"})
    capsys.readouterr()
    assert pretrain(*given) == 2
    captured = capsys.readouterr()
    assert "the rank schedule asks for 40, layer model.layers.0.self_attn.k_proj" in captured.err
    assert captured.err.count("\n") == 1
