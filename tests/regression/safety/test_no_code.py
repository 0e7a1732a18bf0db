"""Directories of models bring weights and settings; what they bring as code is never run, and nobody is asked about it."""

import json
import pickle
import shutil
import sys

import pytest

from lowmem.cli.main import main
from lowmem.finetune.base_model import load_base
from lowmem.system.errors import CheckpointError


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
def test_code_of_a_base_is_not_run(model_type, llama, trap, tmp_path, capsys):
    mark, code = trap
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    (base / "code.py").write_text(code)
    config = json.loads((base / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}, "model_type": model_type}
    (base / "config.json").write_text(json.dumps(config))
    (tmp_path / "chat.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    assert main(["finetune", "--quiet", f"--base={base}", f"--data={tmp_path}/chat.jsonl", f"--out={tmp_path}/out"]) == 5
    assert "brings code of its own (auto_map) that is never run, lowmem finetune takes" in capsys.readouterr().err
    assert not mark.exists()


def test_code_of_a_tokenizer_is_not_run(llama, trap, tmp_path):
    from lowmem.config.finetune import FinetuneConfig
    from lowmem.finetune.data import tokenizer_folder

    mark, code = trap
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    (base / "code.py").write_text(code)
    values = {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}
    (base / "tokenizer_config.json").write_text(json.dumps(values))
    config = FinetuneConfig(base=str(base), out=str(tmp_path / "out"), add_tokens=["<new>"])
    with pytest.raises(CheckpointError, match="contains custom code which must be executed"):
        tokenizer_folder(config, base, load_base(base, nf4=False))
    assert not mark.exists()


class _Bomb:
    def __init__(self, mark: str):
        self.mark = mark

    def __reduce__(self):
        return open, (self.mark, "w")


def test_pickles_are_not_opened(llama, trap, tmp_path):
    """Weights of a base and of an adapter; without safetensors both are refused."""
    from lowmem.finetune.save import swap_adapter

    mark, _ = trap
    shutil.copytree(llama, tmp_path / "base")
    model = load_base(tmp_path / "base", nf4=False)
    (tmp_path / "base/model.safetensors").unlink()
    (tmp_path / "base/pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(str(mark))))
    with pytest.raises(CheckpointError, match=r"has no model.safetensors \(weights found: pytorch_model.bin\).* for some can carry code"):
        load_base(tmp_path / "base", nf4=False)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": "x"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(_Bomb(str(mark))))
    with pytest.raises(CheckpointError, match="has no adapter_model.safetensors; other formats are not read, for they can carry code"):
        swap_adapter(model, adapter, "one")
    assert not mark.exists()
