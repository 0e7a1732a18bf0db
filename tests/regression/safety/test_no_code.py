"""Directories of models bring weights and settings; what they bring as code is never run, and nobody is asked about it."""

import json
import pickle
import shutil
import sys

import pytest
import torch

from lowmem.cli.main import main
from lowmem.engine.huggingface_files import load_model
from lowmem.system.errors import CheckpointError
from tests.train.tiny_run import finetune_arguments


class _Unreadable:
    """A standard input on which a question would hang: reading it fails instead."""

    def readline(self, *_: object) -> str:
        raise AssertionError("standard input was read")

    read = readline

    def isatty(self) -> bool:
        return True


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A file that stays absent unless code of a directory runs, and the text of such code."""
    mark = tmp_path / "ran"
    monkeypatch.setattr(sys, "stdin", _Unreadable())
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return mark, f"open({str(mark)!r}, 'w').close()\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"


@pytest.mark.parametrize("model_type", ["own", None])
def test_code_of_a_base_is_not_run(model_type, llama, chat, trap, tmp_path, capsys):
    mark, code = trap
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    (base / "code.py").write_text(code)
    config = json.loads((base / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}, "model_type": model_type}
    (base / "config.json").write_text(json.dumps(config))
    assert main(["finetune", "--quiet", *finetune_arguments(base, chat, tmp_path / "run")]) == 5
    assert "brings code of its own (auto_map) that is never run, expected one that" in capsys.readouterr().err
    assert not mark.exists()


def test_code_of_a_tokenizer_is_not_run(llama, chat, trap, tmp_path):
    """tokenizer.json is all that is read of it, with new tokens and without."""
    mark, code = trap
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    (base / "code.py").write_text(code)
    values = {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}
    (base / "tokenizer_config.json").write_text(json.dumps(values))
    for number, tokens in enumerate(("[]", "[<new>]")):
        words = finetune_arguments(base, chat, tmp_path / f"run-{number}", data__add_tokens=tokens, train__steps=1)
        assert main(["finetune", "--quiet", *words]) == 0
        assert not mark.exists()


class _Bomb:
    def __init__(self, mark: str):
        self.mark = mark

    def __reduce__(self):
        return open, (self.mark, "w")


def test_pickles_are_not_opened(llama, trap, tmp_path, capsys):
    """Weights of a model and of an adapter; without safetensors both are refused."""
    mark, _ = trap
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(llama, base)
    adapter.mkdir()
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(_Bomb(str(mark))))
    assert main(["generate", f"--run={adapter}", "--prompt=some words", "--max_new_tokens=1", "--device=cpu"]) == 5
    assert capsys.readouterr().err.count("\n") == 1
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(str(mark))))
    with pytest.raises(CheckpointError, match=r"has no model.safetensors \(weights found: pytorch_model.bin\).* for some can carry code"):
        load_model(base, torch.float32)
    assert not mark.exists()
