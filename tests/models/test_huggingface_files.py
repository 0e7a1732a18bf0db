"""Directories of transformers: what they hold is loaded as it is, and what cannot be used is said in one line."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowmem.config.checks import config_problems
from lowmem.config.schema import ModelConfig, RunConfig, TrainConfig
from lowmem.engine.from_config import build_configured_model
from lowmem.engine.huggingface_files import load_model, model_facts, outline, resolve_model_path
from lowmem.engine.resolve import keeps_documents_apart, settled_model
from lowmem.engine.run_model import load_weights
from lowmem.models.huggingface import HuggingFaceModel
from lowmem.system.errors import CheckpointError, ConfigError
from tests.reference.tiny_families import save_tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    save_tiny(folder, "llama")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "llama")
    return tmp_path / "llama"


def rewrite(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder: Path, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match) as caught:
        load_model(resolve_model_path(str(folder)), torch.float32)
    assert "\n" not in str(caught.value)
    assert not re.search(r"\w+Error", str(caught.value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_the_files(saved, dtype):
    ours = HuggingFaceModel(load_model(saved, dtype))
    stored = load_file(saved / "model.safetensors")
    found = ours.state_dict()
    assert found.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(found[name], tensor.to(dtype)), name


def test_shards_are_read_and_a_tied_head_is_the_embedding(tmp_path):
    model = save_tiny(tmp_path, "llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors").unlink()
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ours = HuggingFaceModel(load_model(tmp_path, torch.float32))
    assert ours.head_is_tied()
    tokens = torch.arange(3, 15).view(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(tokens), model(input_ids=tokens).logits, rtol=0, atol=1e-5)


def test_an_outline_reads_no_weights_and_says_what_the_model_is(saved):
    with torch.device("meta"):
        model = HuggingFaceModel(outline(saved, torch.bfloat16))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(parameter.is_meta for parameter in model.parameters())
    facts = model_facts(str(saved))
    assert (facts.family, facts.vocab_size, facts.max_seq_len, facts.position_limit, facts.keeps_segments_apart) == (
        "llama",
        320,
        128,
        0,
        True,
    )


def test_a_checkpoint_goes_into_a_model_by_the_names_of_transformers(saved, tmp_path):
    with torch.device("cpu"):
        model = HuggingFaceModel(load_model(saved, torch.float32))
    tensors = {name: tensor + 1 for name, tensor in load_file(saved / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    load_weights(tmp_path / "model.safetensors", model, keep_bf16=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name])


def test_what_is_no_directory_of_a_model(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"^model.path is \S+/none: no such directory; give one with config.json"):
        resolve_model_path(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="no such directory"):
        resolve_model_path(str(folder / "config.json"))
    with pytest.raises(ConfigError, match="model.revision is main, but model.path is the directory"):
        resolve_model_path(str(folder), "main")
    (folder / "config.json").rename(folder / "config.yaml")
    with pytest.raises(CheckpointError, match=r"has no config.json: it is a lowmem run, which train.init_from takes"):
        resolve_model_path(str(folder))


def test_a_name_of_the_hub_that_cannot_be_had_is_one_line(monkeypatch):
    import huggingface_hub

    asked = {}

    def offline(name, **settings):
        asked.update(settings, name=name)
        raise ConnectionError("MaxRetryError: no\nroute to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        CheckpointError, match=r"^model.path is some/model: no such directory here, and the hub does not give it \(no route"
    ):
        resolve_model_path("some/model", "v2")
    assert asked["name"] == "some/model"
    assert asked["revision"] == "v2"
    assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in asked["allow_patterns"])


def test_a_name_of_the_hub_is_a_directory_of_its_files(saved, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(saved))
    assert resolve_model_path("some/model") == saved


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "nothing"}, "found model_type 'nothing', expected one that the installed transformers knows"),
        ({"model_type": "nothing", "auto_map": {"AutoConfig": "x.Y"}}, "brings code of its own .auto_map. that is never run"),
        ({"model_type": "t5"}, "found model_type 't5', which is no causal language model"),
        ({"model_type": None}, "found model_type None"),
        ({"model_type": "lowmem"}, "a model of lowmem's own kind; use the run it was exported from"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"has quantization_config \(fp8\); give the model with plain fp32"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, r"has quantization_config \(bitsandbytes\)"),
        ({"num_hidden_layers": 3}, "layers.2.*is missing; "),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, with 21 tensors in its files"),
        ({"hidden_size": 10**12}, "has hidden_size 1000000000000, expected at most"),
        ({"hidden_size": "wide"}, "is no model that transformers can read"),
        ({"intermediate_size": 40}, r"mlp.*has shape \(32, 48\), expected \(32, 40\)"),
        ({"vocab_size": 10**7}, "describes a model far larger than its files"),
        ({"attention_dropout": 7}, "has attention_dropout 7, expected 0 to 1"),
    ],
)
def test_a_config_json_that_does_not_fit_is_one_line(folder, changes, match):
    rewrite(folder, **changes)
    refused(folder, CheckpointError, match)


def test_damaged_files_are_one_line(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(folder, CheckpointError, "model.safetensors is damaged or missing")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    refused(folder, CheckpointError, r"has no model.safetensors \(weights found: pytorch_model.bin\)")
    (folder / "config.json").write_text("{")
    refused(folder, CheckpointError, "config.json cannot be read")


def test_weights_that_are_missing_surplus_infinite_or_codes(folder, capsys):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"extra": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"})
    load_model(folder, torch.float32)
    assert "in the files of" in (said := capsys.readouterr().err)
    assert said.endswith("and not in the model, left out: extra\n")
    save_file(tensors | {"model.norm.weight": torch.full((32,), float("inf"))}, folder / "model.safetensors", {"format": "pt"})
    refused(folder, CheckpointError, "holds weights that are not finite .model.norm.weight.")
    save_file(tensors | {"model.norm.weight": torch.ones(32, dtype=torch.uint8)}, folder / "model.safetensors", {"format": "pt"})
    refused(folder, CheckpointError, "holds quantised weights .model.norm.weight is U8.")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(folder, CheckpointError, "does not hold the model that its config.json describes: model.norm.weight is missing")


def test_a_model_that_fp16_cannot_hold_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.norm.weight": torch.full((32,), 1e6)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="not finite"):
        load_model(folder, torch.float16)


def configured(folder: Path, **train: object) -> RunConfig:
    config = RunConfig(model=ModelConfig(path=str(folder)), train=TrainConfig(steps=1, **train))  # type: ignore[arg-type]
    config.data.seq_len = 32
    return config


def test_the_configuration_takes_what_the_model_has(saved):
    config = settled_model(configured(saved))
    assert (config.model.vocab_size, config.model.max_seq_len) == (320, 128)
    assert config.data.tokenizer == str(saved)
    assert config.train.activation_checkpointing == "block"
    assert settled_model(config) == config
    assert settled_model(RunConfig()).train.activation_checkpointing == "selective"
    assert keeps_documents_apart(config, torch.device("cpu"))


def test_settings_that_contradict_the_model(saved, tmp_path):
    config = configured(saved)
    config.model.vocab_size = 77
    with pytest.raises(ConfigError, match="model.vocab_size is 77, but .* has 320 rows; remove it"):
        settled_model(config)
    save_tiny(tmp_path / "gpt2", "gpt2")
    config = configured(tmp_path / "gpt2")
    config.data.seq_len = 129
    with pytest.raises(ConfigError, match="data.seq_len is 129, but the learned positions of .* end at 128; lower it"):
        settled_model(config)
    save_tiny(tmp_path / "bloom", "bloom")
    config = configured(tmp_path / "bloom")
    assert not keeps_documents_apart(config, torch.device("cpu"))
    config.data.document_mask = True
    with pytest.raises(ConfigError, match="cannot keep texts of a row apart; set it to false"):
        keeps_documents_apart(config, torch.device("cpu"))


@pytest.mark.parametrize(
    ("section", "key", "value", "match"),
    [
        ("model", "dim", 512, "whose shape is its own; remove model.dim, or model.path"),
        ("model", "name", "i3", "remove model.name"),
        ("train", "activation_checkpointing", "selective", "train.activation_checkpointing=selective does not work with model.path"),
        ("train", "activation_checkpointing", "low_rank", "train.activation_checkpointing=low_rank does not work with model.path"),
        ("train", "precision", "fp8", "train.precision=fp8 does not work with model.path"),
        ("train", "init_from", "runs/x", "it has weights of its own"),
    ],
)
def test_settings_that_a_model_of_transformers_does_not_take(saved, section, key, value, match):
    config = configured(saved)
    assert not any("model.path" in problem for problem in config_problems(config))
    setattr(getattr(config, section), key, value)
    found = [problem for problem in config_problems(config) if "model.path" in problem]
    assert len(found) == 1
    assert match in found[0]


def test_a_revision_without_a_path():
    assert any("model.revision is v1, but model.path is empty" in p for p in config_problems(RunConfig(model=ModelConfig(revision="v1"))))


def test_a_model_on_the_meta_device_has_the_shapes_of_the_real_one(saved):
    config = settled_model(configured(saved, precision="fp32"))
    real = build_configured_model(config)
    with torch.device("meta"):
        meta = build_configured_model(config)
    assert {name: (t.shape, t.dtype) for name, t in real.state_dict().items()} == {
        name: (t.shape, t.dtype) for name, t in meta.state_dict().items()
    }
    assert meta.activation_checkpointing == "block"


@pytest.mark.parametrize("command", [["finetune", "--data=c.jsonl", "--model.path"], ["generate", "--prompt=a", "--run"]])
def test_without_transformers_one_line_says_what_to_install(command, tmp_path, monkeypatch, capsys):
    from lowmem.cli.main import main

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    monkeypatch.setattr("lowmem.engine.huggingface_files.find_spec", lambda name: None)
    assert main([*command[:-1], f"{command[-1]}={tmp_path}"]) == 2
    assert "needs transformers; run: pip install 'lowmem[finetune]'" in capsys.readouterr().err
