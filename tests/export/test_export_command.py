"""`lowmem export`: what it says, what it refuses, and that each choice reaches the directory."""

import json

import pytest

from lowmem.cli.main import main
from tests.reference.random_models import read_header


def export(run_dir, out, *more: str) -> int:
    return main(["export", "--run", str(run_dir), "--out", str(out), *more])


def test_it_says_what_it_wrote_and_how_to_use_it(run_dir, tmp_path, capsys):
    out = tmp_path / "out"
    assert export(run_dir, out, "--dtype=fp16", "--checkpoint=0") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{out}: a plain Llama directory; ")
    assert "parameters, " in said[0]
    assert said[-1] == f'from transformers import pipeline; pipeline("text-generation", model="{out}")("Once")'
    assert {entry["dtype"] for name, entry in read_header(out / "model.safetensors").items() if name != "__metadata__"} == {"F16"}
    assert sorted(path.name for path in out.iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_it_says_why_a_directory_carries_code(theirs, run_dir, tmp_path, capsys):
    low = tmp_path / "low"
    assert main(["import", str(theirs), "--out", str(low), "--lorpt.rank=4"]) == 0
    assert export(low, tmp_path / "out", "--keep_factors") == 0
    said = capsys.readouterr().out
    assert "a directory that carries its model file, because its factors are kept; " in said
    assert ", trust_remote_code=True)" in said
    assert {"modeling_lowmem.py", "configuration_lowmem.py"} <= {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    "option, code, message",
    [
        ("--format=gguf", 2, "--format is gguf, allowed: hf, adapter"),
        ("--format=adapter", 2, "is a model of lowmem's own, which has none; use --format=hf"),
        ("--dtype=int8", 2, "--dtype is int8, allowed: fp32, bf16, fp16"),
        ("--checkpoint=newest", 2, "--checkpoint is newest, allowed: latest, best, or a step"),
        ("--checkpoint=7", 5, "has no checkpoint of step 7; steps with one: 0"),
        ("--factors", 2, "unrecognized arguments: --factors"),
    ],
)
def test_bad_usage_is_one_line(option, code, message, run_dir, tmp_path, capsys):
    assert export(run_dir, tmp_path / "out", option) == code
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_way_is_no_folder(run_dir, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert export(run_dir, tmp_path / "out") == 2
    assert "is a file; choose a folder" in capsys.readouterr().err
    assert export(run_dir, tmp_path / "out" / "below") == 7
    assert len(capsys.readouterr().err.splitlines()) == 1
