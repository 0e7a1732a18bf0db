"""Runs of several phases and of growing sequences: one command, one folder, resumed to the bit in either."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lowmem.cli.pretrain import _parse
from lowmem.config.load import load_run_config
from lowmem.system.errors import ConfigError
from tests.train.tiny_run import ROOT, final_bits, lowmem, metrics, tiny_arguments, write_text


def write_chat(path: Path) -> Path:
    records = [{"instruction": f"add {n} and 1", "output": str(n + 1) + " it is" * (n % 5)} for n in range(80)]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def two_phases(run_dir: Path, steps: int = 6, **overrides: object) -> list[str]:
    text, chat = write_text(run_dir.parent / "text.txt"), write_chat(run_dir.parent / "chat.jsonl")
    chosen = {
        "phases": f"[{{name: pretrain, steps: 9}}, {{name: chat, kind: chat, steps: {steps}, lr: 0.003, sources: [{{path: {chat}}}]}}]",
        "train__steps": 0,
        "data__seq_len": 64,
        "train__seq_len_schedule": "{0: 16, 3: 32, 6: 64}",
        "train__eval_every": 5,
    }
    return tiny_arguments(run_dir, text, **chosen | overrides)


def drive(folder: Path, event: int, arguments: list[str]) -> subprocess.CompletedProcess:
    driver = Path(__file__).parent / "kill_driver.py"
    command = [sys.executable, str(driver), str(folder), str(event), "0", "pretrain", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


@pytest.mark.slow
def test_killed_in_either_phase_ends_bit_equal(tmp_path):
    """Killed while the checkpoints of steps 6 (between two lengths of pretraining) and 12 (amid chat) are written."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert lowmem("pretrain", *two_phases(whole)).returncode == 0
    lines = metrics(whole)
    steps = [line for line in lines if "loss" in line]
    assert [line["seq_len"] for line in steps] == [16] * 3 + [32] * 3 + [64] * 9
    assert [line["phase"] for line in steps] == ["pretrain"] * 9 + ["chat"] * 6
    assert len({line["tokens"] - 256 * line["step"] for line in steps}) == 1  # every step has 4 * 64 positions
    assert all(0 < line["target_tokens"] < 256 for line in steps[9:])
    assert steps[9]["lr"] == pytest.approx(0.003 / 5)  # its own peak and its own warm-up
    for step in (6, 12):
        leg = drive(killed / "checkpoints" / f".writing-step-{step:08d}", 3, two_phases(killed))
        assert leg.returncode == -signal.SIGKILL, leg.stderr
        assert int((killed / "checkpoints" / "latest").read_text().strip()[-2:]) < step
    last = lowmem("pretrain", *two_phases(killed))
    assert last.returncode == 0, last.stderr
    assert final_bits(killed) == final_bits(whole)
    assert metrics(killed) == metrics(whole)
    assert (whole / "checkpoints" / "step-00000009").is_dir()  # the end of a phase is kept
    assert "[INST]" in (whole / "chat_template.jinja").read_text()


def run(run_dir: Path, *arguments: str) -> list[dict]:
    from lowmem.cli.main import main

    assert main(["pretrain", "--quiet", *arguments]) == 0
    return [line for line in metrics(run_dir) if "loss" in line]


def test_the_micro_batch_changes_nothing_at_any_length(tmp_path):
    """In fp32 other orders of sums move a loss by some 1e-7 of itself, and training carries that on for 15 steps."""
    losses = []
    for name, micro_batch_size in (("one", 1), ("four", 4)):
        lines = run(tmp_path / name, *two_phases(tmp_path / name, train__micro_batch_size=micro_batch_size))
        losses.append([line["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][9]


def test_a_layerwise_update_keeps_conversations_apart_as_the_other_does(tmp_path):
    losses = []
    for update in ("accumulate", "layerwise"):
        lines = run(tmp_path / update, *two_phases(tmp_path / update, train__update=update, optim__clip=0))
        losses.append([line["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_phase_ends_with_its_data(tmp_path):
    run_dir = tmp_path / "run"
    arguments = two_phases(run_dir, steps=400, data__exhausted="stop", train__save_every=0)
    lines = run(run_dir, *arguments)
    chat = [line for line in lines if line["phase"] == "chat"]
    assert 3 <= len(chat) < 40
    state = json.loads(sorted((run_dir / "checkpoints").glob("step-*"))[-1].joinpath("state.json").read_text())
    assert state["data_ended"]
    assert state["step"] == lines[-1]["step"]
    assert run(run_dir, *arguments) == lines  # complete: nothing is trained again


def test_grow_plan_is_a_schedule_of_lengths():
    _, overrides = _parse(["--grow_plan", "256,512,768", "--grow_every_steps", "100", "--train.steps=300"], "pretrain")
    config = load_run_config("", overrides)
    assert config.train.seq_len_schedule == {0: 256, 100: 512, 200: 768}
    assert config.data.seq_len == 768
    assert [config.seq_len_at(step) for step in (0, 99, 100, 299)] == [256, 256, 512, 768]


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["train.steps=9", "train.seq_len_schedule={0: 64, 5: 128}"], r"reaches 128, but data.seq_len is 256; set data.seq_len=128"),
        (["train.steps=9", "train.seq_len_schedule={5: 256}"], "needs a length for step 0"),
        (
            ["train.steps=9", "train.seq_len_schedule={0: 100, 5: 256}", "train.global_batch_size=1"],
            "use lengths that divide .*, such as 64",
        ),
        (["train.steps=9", "phases=[{steps: 3}]"], "train.steps is 9 .* but each phase has its own; remove them here"),
        (["phases=[{steps: 3, tokens: 5}]"], r"phases\[0\].steps is 3 and phases\[0\].tokens is 5; set exactly one"),
        (["phases=[{kind: chat, steps: 3}]"], r"phases\[0\] is of kind chat and has no sources; name files of conversations"),
        (["phases=[{steps: 3, template: a.jinja}]"], "which only kind: chat uses"),
        (
            ["phases=[{kind: chat, steps: 3, sources: [{stdlib: true}]}]"],
            "has stdlib, which conversations do not have",
        ),
        (["phases=[{steps: 3, name: a}, {steps: 3, name: a}]"], "two phases are called 'a'"),
        (["phases=[{steps: 3, sources: [{pth: x}]}]"], r"phases\[0\].sources\[0\].pth is not a known key; the nearest valid key is path"),
        (["phases=[chat]"], r"phases\[0\] is 'chat', expected keys such as name: NAME"),
        (["train.steps=9", "data.sources=[{stdlib: true, weight_schedule: {0: 0}}]"], "all weights are 0 at step 0; leave one above 0"),
    ],
)
def test_contradictions_are_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_run_config("", overrides)
