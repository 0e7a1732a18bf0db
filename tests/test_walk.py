"""The commands of docs/walk.md, as they are written there, on a tiny model."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/walk.md").read_text()
COMMANDS = [line.strip() for line in PAGE.splitlines() if line.startswith(("    lowmem ", "    python -c "))]


def run(command: str, folder: Path) -> str:
    """Standard output of a command of the page, in a fresh process."""
    name, *words = shlex.split(command)
    start = [sys.executable, "-m", "lowmem"] if name == "lowmem" else [sys.executable]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run([*start, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def test_the_page_has_six_commands():
    assert len(COMMANDS) == 6


@pytest.mark.slow
def test_the_walk_from_a_directory_to_a_conversation(base, chat, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    shutil.copytree(base, tmp_path / "model")
    shutil.copyfile(chat, tmp_path / "chat.jsonl")
    dry_run, finetune, generate, export, pipeline, peft = COMMANDS
    assert "# predicted" in run(dry_run, tmp_path)
    assert not (tmp_path / "runs").exists()
    run(finetune, tmp_path)
    assert run(generate, tmp_path).strip()
    run(export, tmp_path)
    assert "some words" in run(pipeline, tmp_path)
    assert "lora_A" in run(peft, tmp_path)
    tokens = torch.arange(3, 43).view(1, -1)
    plain, exported, merged = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("model", "exported", "runs/tuned/merged")
    )
    with torch.no_grad():
        before, *after = (model(input_ids=tokens).logits for model in (plain, exported, merged))
        adapted = PeftModel.from_pretrained(plain, tmp_path / "runs/tuned/adapter").eval()(input_ids=tokens).logits
    assert torch.equal(*after)
    assert not torch.allclose(before, after[0], rtol=0, atol=0.01)
    # merging rounds each weight once more
    assert torch.allclose(adapted, after[0], rtol=0, atol=1e-5 * float(before.abs().max()))
