"""Checkpoints that were damaged, or made by somebody else: whoever reads one says so in one line, with exit code 5."""

import hashlib
import json
import os
import shutil

import pytest
import torch

from lowmem.cli import main
from lowmem.engine.manifest import damage, file_hashes
from lowmem.engine.tensor_file import read_tensors, write_tensors
from tests.train.tiny_run import tiny_arguments, write_text


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run of two steps, and its text."""
    folder = tmp_path_factory.mktemp("runs")
    text = write_text(folder / "a.txt")
    assert main(["pretrain", "--quiet", *tiny_arguments(folder / "run", text, train__steps=2)]) == 0
    return folder


@pytest.fixture
def run(place, tmp_path):
    shutil.copytree(place / "run", tmp_path / "run")
    return tmp_path / "run"


def newest(run):
    return run / "checkpoints" / (run / "checkpoints/latest").read_text().strip()


def rewrite(run, name: str, change) -> None:
    """Other tensors in a file of a checkpoint, with a manifest that knows them."""
    folder = newest(run)
    tensors = {key: tensor.clone() for key, tensor in read_tensors(folder / name)}
    change(tensors)
    write_tensors(folder / name, tensors)
    seal(folder)


def seal(folder) -> None:
    manifest = folder / "manifest.json"
    step = json.loads(manifest.read_text())["step"]
    manifest.unlink()
    manifest.write_text(json.dumps({"step": step, "files": file_hashes(folder)}))


READERS = {
    "generate": lambda run, place: ["generate", f"--run={run}", "--prompt=a", "--max_new_tokens=1"],
    "export": lambda run, place: ["export", f"--run={run}", f"--out={run}-exported"],
    "init_from": lambda run, place: [
        "pretrain", "--quiet", *tiny_arguments(run.parent / "new", place / "a.txt", train__steps=1), f"--train.init_from={run}",
        f"--data.tokenizer={run}/tokenizer.json",
    ],
    "teacher": lambda run, place: [
        "pretrain", "--quiet", *tiny_arguments(run.parent / "new", place / "a.txt", train__steps=1), f"--train.distill.teacher={run}",
        f"--data.tokenizer={run}/tokenizer.json",
    ],
    "finetune": lambda run, place: ["finetune", "--quiet", f"--base={run}", f"--data={place}/chat.jsonl", f"--out={run}-tuned"],
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
def test_one_flipped_bit_is_found_by_every_reader(reader, run, place, capsys):
    (place / "chat.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    weights = newest(run) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 4
    weights.write_bytes(content)
    assert main(READERS[reader](run, place)) == 5
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "is damaged: model.safetensors does not match its SHA-256; restore it, or give another checkpoint or run" in error


def test_states_of_another_shape_are_refused(run, place, capsys):
    def shorten(tensors):
        name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
        tensors[name] = tensors[name][:-1]

    rewrite(run, "optimizer.safetensors", shorten)
    assert main(["pretrain", "--quiet", *tiny_arguments(run, place / "a.txt", train__steps=3)]) == 5
    assert "the checkpoint has optimizer state " in (error := capsys.readouterr().err)
    assert "expected torch.float32 (" in error


def test_weights_that_are_not_finite_are_not_exported(run, capsys):
    rewrite(run, "model.safetensors", lambda tensors: [tensor.fill_(torch.nan) for tensor in tensors.values()])
    assert main(["export", f"--run={run}", f"--out={run}-exported"]) == 5
    assert "holds weights that are not finite in torch.float32 (" in capsys.readouterr().err
    assert not (run.parent / "run-exported").exists()


def test_numbers_that_do_not_fit_the_exported_dtype_are_refused(run, capsys):
    rewrite(run, "model.safetensors", lambda tensors: next(iter(tensors.values())).view(-1)[:1].fill_(1e6))
    assert main(["export", f"--run={run}", f"--out={run}-exported", "--dtype=fp16"]) == 5
    assert "holds weights that are not finite in torch.float16" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["/dev/zero", "../latest", "fifo"])
def test_manifests_name_plain_files_of_their_folder(name, run):
    folder = newest(run)
    os.mkfifo(folder / "fifo")
    manifest = json.loads((folder / "manifest.json").read_text())
    content = (folder / name).read_bytes() if name == "../latest" else b""
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert damage(folder)


@pytest.mark.parametrize("lacking", ["state.json", "model.safetensors", "optimizer.safetensors"])
def test_manifests_lack_nothing_that_is_read(lacking, run, place, capsys):
    folder = newest(run)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"][lacking]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert damage(folder) == f"its manifest does not have {lacking}"
    assert main(["pretrain", "--quiet", *tiny_arguments(run, place / "a.txt", train__steps=3)]) == 5
    assert f"is damaged: its manifest does not have {lacking}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, content",
    [
        ("manifest.json", '{"files": 3}'),
        ("manifest.json", "[" * 100_000),
        ("state.json", "[]"),
        ("state.json", "3"),
        ("state.json", "null"),
        ("state.json", "[" * 100_000),
    ],
)
def test_other_json_is_damage(name, content, run):
    (newest(run) / name).write_text(content)
    if name == "state.json":
        seal(newest(run))
    assert damage(newest(run))


def test_an_import_is_sealed_and_keeps_what_ends_an_answer(tmp_path, capsys):
    from tests.reference.tiny_families import save_tiny

    save_tiny(tmp_path / "theirs", "llama")
    settings = {"eos_token_id": [0, 2], "temperature": 0.7, "do_sample": True}
    (tmp_path / "theirs/generation_config.json").write_text(json.dumps(settings))
    assert main(["import", str(tmp_path / "theirs"), f"--out={tmp_path / 'run'}"]) == 0
    assert main(["export", f"--run={tmp_path / 'run'}", f"--out={tmp_path / 'back'}"]) == 0
    back = json.loads((tmp_path / "back/generation_config.json").read_text())
    assert {key: back[key] for key in settings} == settings
    weights = newest(tmp_path / "run") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert main(["export", f"--run={tmp_path / 'run'}", f"--out={tmp_path / 'again'}"]) == 5
    assert "does not match its SHA-256" in capsys.readouterr().err


@pytest.mark.parametrize(
    "values", [{"step": "2"}, {"step": -1}, {"engine": {}}, {"engine": 3}, {"data": []}, {"phase_ends": 3}, {"engine": {"random": 3}}]
)
def test_a_state_of_other_types_is_one_line(values, run, place, capsys):
    path = newest(run) / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    seal(newest(run))
    assert main(["pretrain", "--quiet", *tiny_arguments(run, place / "a.txt", train__steps=3)]) == 5
    assert "state.json " in capsys.readouterr().err
