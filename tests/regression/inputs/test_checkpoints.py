"""Checkpoints that were damaged, or made by somebody else: whoever reads one says so in one line, with exit code 5."""

import hashlib
import json
import os
import shutil

import pytest
import torch

from lowmem.cli.main import main
from lowmem.engine.manifest import damage, file_hashes
from lowmem.system.tensors import read_tensors, write_tensors
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
    "finetune": lambda run, place: [
        "finetune", "--quiet", *tiny_arguments(run.parent / "new", place / "chat.jsonl", train__steps=1), f"--train.init_from={run}",
        f"--data.tokenizer={run}/tokenizer.json", "--adapter.method=none", "--data.val_fraction=0",
    ],
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


def test_an_import_is_sealed_and_keeps_what_ends_an_answer(llama, tmp_path, capsys):
    shutil.copytree(llama, tmp_path / "theirs")
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
    "values",
    [
        {"step": "2"}, {"step": -1}, {"engine": {}}, {"engine": 3}, {"data": []}, {"phase_ends": 3}, {"engine": {"random": 3}},
        {"step": 10**30}, {"step": 3}, {"step": 2.0}, {"best_step": 10**30}, {"phase_start": 3}, {"skipped_steps": 10**9},
        {"phase": 10**30}, {"phase_ends": ["a"]}, {"phase_ends": [10**30]}, {"tokenizer_sha256": 3},
    ],
)  # fmt: skip
def test_a_state_of_other_types_is_one_line(values, run, place, capsys):
    path = newest(run) / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    seal(newest(run))
    assert main(["pretrain", "--quiet", *tiny_arguments(run, place / "a.txt", train__steps=3)]) == 5
    assert "state.json " in capsys.readouterr().err


def test_a_state_is_of_the_step_of_its_folder(run, place, capsys):
    """Also where manifest and state agree, and the folder has another name: it would stand for steps that were never done."""
    newest(run).rename(run / "checkpoints/step-00000009")
    (run / "checkpoints/latest").write_text("step-00000009")
    arguments = ["pretrain", "--quiet", *tiny_arguments(run, place / "a.txt", train__steps=9)]
    assert main(arguments) == 5
    assert "state.json has step 2, its manifest 2, and its folder is step-00000009" in capsys.readouterr().err


def other_alphabet(run) -> None:
    """A tokenizer of as many tokens, of which one or two are others."""
    path = run / "tokenizer.json"
    values = json.loads(path.read_text())
    if values.get("lowmem_tokenizer") == "chars":
        values["characters"] = values["characters"].replace("f", "\u0144")
    else:
        vocab = values["model"]["vocab"]
        one, two = [name for name in vocab if vocab[name] < 100][-2:]
        vocab[one], vocab[two] = vocab[two], vocab[one]
    path.write_text(json.dumps(values))


@pytest.fixture(scope="module")
def runs(place, llama):
    """A run for each kind of tokenizer that a file can be swapped of: trained on the text, and imported."""
    text = place / "a.txt"
    assert main(["pretrain", "--quiet", *tiny_arguments(place / "chars", text, train__steps=1, data__tokenizer="chars")]) == 0
    more = {"data__tokenizer": "bpe", "data__tokenizer_vocab_size": 300, "train__steps": 1}
    assert main(["pretrain", "--quiet", *tiny_arguments(place / "bpe", text, **more)]) == 0
    assert main(["import", str(llama), f"--out={place / 'imported'}"]) == 0
    return place


@pytest.mark.parametrize(
    "reader, kind", [(r, k) for r in READERS for k in ("chars", "bpe", "imported") if (r, k) != ("teacher", "imported")]
)
def test_the_tokenizer_of_another_run_is_found_by_every_reader(reader, kind, runs, tmp_path, capsys):
    (runs / "chat.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    run = tmp_path / "run"
    shutil.copytree(runs / kind, run)
    if reader in ("generate", "export"):
        assert main(READERS[reader](run, runs)) == 0
        shutil.rmtree(f"{run}-exported", ignore_errors=True)
    other_alphabet(run)
    capsys.readouterr()
    code = main(READERS[reader](run, runs))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 5, error
    assert f"{run}/tokenizer.json is not the tokenizer that {newest(run)} was trained with (SHA-256 " in error
    assert error.endswith("restore the run's own")


def test_checkpoints_of_earlier_versions_have_no_hash_of_a_tokenizer(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "chars", run)
    path = newest(run) / "state.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "tokenizer_sha256"}))
    seal(newest(run))
    assert main(READERS["generate"](run, runs)) == 0
    assert main(["pretrain", "--quiet", *tiny_arguments(run, runs / "a.txt", train__steps=2, data__tokenizer="chars")]) == 0
    assert json.loads((newest(run) / "state.json").read_text())["tokenizer_sha256"]


def test_a_tokenizer_that_the_library_would_write_otherwise_is_the_same(runs, tmp_path, monkeypatch):
    """As another version of the tokenizers library may: what counts is the file, which is as it was written."""
    from lowmem.data.hf_tokenizer import HuggingFaceTokenizer

    plain = HuggingFaceTokenizer.to_json
    monkeypatch.setattr(HuggingFaceTokenizer, "to_json", lambda tokenizer: plain(tokenizer) | {"new": None})
    for kind in ("bpe", "imported"):
        assert main(READERS["generate"](runs / kind, runs)) == 0


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.bool])
@pytest.mark.parametrize("reader", READERS)
def test_weights_of_another_dtype_are_refused_by_every_reader(reader, dtype, run, place, capsys):
    (place / "chat.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    rewrite(run, "model.safetensors", lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()}))
    assert main(READERS[reader](run, place)) == 5
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f" is {dtype}, expected one of torch.float32, torch.bfloat16, torch.float16" in error


def test_weights_of_several_dtypes_are_widened(run, place):
    rewrite(run, "model.safetensors", lambda tensors: tensors.update({"norm.weight": tensors["norm.weight"].half()}))
    assert main(READERS["generate"](run, place)) == 0


@pytest.mark.parametrize("content", [b"\xff\xfe", None, b"a" * 5000, "folder"])
def test_a_pointer_that_is_no_text_is_told_in_words(content, run, place, capsys):
    pointer = run / "checkpoints/latest"
    pointer.unlink()
    if content is None:
        os.mkfifo(pointer)
    elif content == "folder":
        pointer.mkdir()
    else:
        pointer.write_bytes(content)
    assert main(READERS["generate"](run, place)) == 5
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert "Error" not in error
    assert "checkpoints/latest " in error
    assert error.endswith(": 2")
