import json
import shutil
from dataclasses import replace

import pytest
import torch

from lowmem.config.dump import dump_config
from lowmem.config.schema import ModelConfig, RunConfig
from lowmem.data.tokenizers import ByteTokenizer
from lowmem.engine.run_model import load_run_model
from lowmem.models.registry import build_model
from lowmem.system.errors import CheckpointError, DataError
from lowmem.system.tensors import write_tensors

MODEL = ModelConfig(dim=16, hidden_dim=24, num_layers=2, num_heads=2, vocab_size=260, max_seq_len=32)


def write_run(run_dir, model_config=MODEL, *, dtype=torch.float32, steps=(5, 10)):
    """A run directory as training leaves it; returns the newest model."""
    config = RunConfig(model=model_config)
    config.train.steps, config.data.seq_len = 10, 32
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(dump_config(config))
    ByteTokenizer().save(run_dir / "tokenizer.json")
    for step in steps:
        folder = run_dir / f"checkpoints/step-{step:08d}"
        folder.mkdir(parents=True)
        model = build_model(model_config, vocab_size=260, max_seq_len=32, seed=step).to(dtype)
        write_tensors(folder / "model.safetensors", dict(model.state_dict()))
    (run_dir / "checkpoints/latest").write_text(f"step-{steps[-1]:08d}\n")
    (run_dir / "checkpoints/best").write_text(f"step-{steps[0]:08d}\n")
    return model.eval()


def weights_of(path):
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


def rewrite(path, change):
    tensors = {name: tensor.clone() for name, tensor in weights_of(path).items()}
    change(tensors)
    write_tensors(path / "model.safetensors", tensors)


@pytest.mark.parametrize("positions", ["rope", "alibi", "learned"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_model_comes_back_bit_for_bit(tmp_path, positions, tied):
    saved = write_run(tmp_path / "run", replace(MODEL, positions=positions, tie_embeddings=tied))
    run = load_run_model(tmp_path / "run")
    tokens = torch.arange(12)[None]
    assert torch.equal(run.model(tokens), saved(tokens))
    assert (run.step, run.path.name, run.model.training) == (10, "step-00000010", False)
    assert run.tokenizer.encode("a") == [97]


def test_any_checkpoint_can_be_chosen(tmp_path):
    write_run(tmp_path / "run")
    for checkpoint, step in (("latest", 10), ("best", 5), (5, 5), (10, 10)):
        run = load_run_model(tmp_path / "run", checkpoint)
        assert run.step == step
        expected = build_model(MODEL, vocab_size=260, max_seq_len=32, seed=step)
        assert torch.equal(run.model.embedding.weight, expected.embedding.weight)


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bf16_weights_are_widened_where_bf16_is_slow(native, expected, tmp_path, monkeypatch):
    saved = write_run(tmp_path / "run", dtype=torch.bfloat16)
    monkeypatch.setattr("lowmem.engine.run_model.device_has_native_bf16", lambda device: native)
    loaded = load_run_model(tmp_path / "run").model
    assert {parameter.dtype for parameter in loaded.parameters()} == {expected}
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter.float(), saved.get_parameter(name).float())
    outline = load_run_model(tmp_path / "run", outline=True).model
    assert {parameter.device.type for parameter in outline.parameters()} == {"meta"}
    shapes = [[(name, parameter.shape, parameter.dtype) for name, parameter in model.named_parameters()] for model in (loaded, outline)]
    assert shapes[0] == shapes[1]


def break_shape(tensors):
    tensors["embedding.weight"] = tensors["embedding.weight"][:, :8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (break_shape, r"embedding\.weight has shape \(260, 8\), expected \(260, 16\)"),
        (lambda tensors: tensors.pop("embedding.weight"), r"embedding\.weight is missing"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "extra is unknown"),
        (lambda tensors: tensors.clear(), r"is missing; and \d+ more"),
    ],
)
def test_weights_of_another_model_are_refused(change, message, tmp_path):
    write_run(tmp_path / "run")
    rewrite(tmp_path / "run/checkpoints/step-00000010", change)
    with pytest.raises(CheckpointError, match=f"does not hold the model of the run's config.yaml: .*{message}"):
        load_run_model(tmp_path / "run")


def remove(run_dir, name):
    path = run_dir / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.yaml", "is no run directory: config.yaml is missing .found: checkpoints, tokenizer.json"),
        ("tokenizer.json", "tokenizer.json is missing"),
        ("checkpoints", r"latest is missing or unreadable \(No such file or directory\); steps with a checkpoint: none"),
        ("checkpoints/latest", "latest is missing or unreadable .*steps with a checkpoint: 5, 10"),
        ("checkpoints/step-00000010", "latest names 'step-00000010', which is no checkpoint; steps with one: 5"),
        ("checkpoints/step-00000010/model.safetensors", r"model.safetensors is missing; choose another checkpoint with --checkpoint=STEP"),
    ],
)
def test_what_is_missing_is_named(name, message, tmp_path):
    write_run(tmp_path / "run")
    remove(tmp_path / "run", name)
    with pytest.raises(CheckpointError, match=message) as error:
        load_run_model(tmp_path / "run")
    assert error.value.exit_code == 5


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(CheckpointError, match="config.yaml is missing .found: no such folder"):
        load_run_model(tmp_path / "absent")


def test_a_step_without_a_checkpoint(tmp_path):
    write_run(tmp_path / "run")
    with pytest.raises(CheckpointError, match="has no checkpoint of step 7; steps with one: 5, 10"):
        load_run_model(tmp_path / "run", 7)


@pytest.mark.parametrize("name", ["../../elsewhere", "step-10", ""])
def test_a_pointer_that_names_no_checkpoint(name, tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "run/checkpoints/latest").write_text(name)
    with pytest.raises(CheckpointError, match="which is no checkpoint; steps with one: 5, 10"):
        load_run_model(tmp_path / "run")


def test_a_truncated_file(tmp_path):
    write_run(tmp_path / "run")
    path = tmp_path / "run/checkpoints/step-00000010/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged or missing"):
        load_run_model(tmp_path / "run")


def test_a_tokenizer_of_another_run(tmp_path):
    write_run(tmp_path / "run", replace(MODEL, vocab_size=100))
    with pytest.raises(CheckpointError, match="model.vocab_size 100 and model.max_seq_len 32, the tokenizer has 257 tokens"):
        load_run_model(tmp_path / "run")


def test_a_damaged_tokenizer(tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "run/tokenizer.json").write_text(json.dumps({"lowmem_tokenizer": "unheard of"}))
    with pytest.raises(DataError, match="damaged tokenizer file"):
        load_run_model(tmp_path / "run")
