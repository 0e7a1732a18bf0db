"""`lowmem pretrain` as a user meets it: training, stopping, resuming, mistakes and their exit codes."""

import json
import os
import resource
import signal
import threading
from pathlib import Path

import pytest
import torch

from lowmem.cli.main import main
from lowmem.system.tensors import read_tensors
from lowmem.train.run_dir import CheckpointStore, damage
from tests.planning.small import stub_measurements
from tests.train.tiny_run import final_bits, lowmem, metrics, tiny_arguments, write_text


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with the text, and the run that was never interrupted in `whole`."""
    folder = tmp_path_factory.mktemp("runs")
    write_text(folder / "text.txt")
    assert pretrain(folder, "whole") == 0
    return folder


def pretrain(folder: Path, name: str, *flags: str, **overrides) -> int:
    return main(["pretrain", "--quiet", *tiny_arguments(folder / name, folder / "text.txt", **overrides), *flags])


def test_loss_falls_and_the_run_directory_is_complete(workplace):
    run_dir = workplace / "whole"
    lines = metrics(run_dir)
    losses = [line["loss"] for line in lines if "loss" in line]
    evaluations = [line for line in lines if "val_loss" in line]
    assert len(losses) == 40
    assert losses[-1] < losses[0] - 1.0
    assert [line["step"] for line in evaluations] == [10, 20, 30, 40]
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"]
    assert {"config.yaml", "metrics.jsonl", "memory.json", "tokenizer.json", "checkpoints"} <= {p.name for p in run_dir.iterdir()}
    memory = json.loads((run_dir / "memory.json").read_text())
    assert memory["measured"]["host_peak_bytes"] > 50_000_000
    assert memory["measured"]["components"]["optimizer_states"] >= 2 * memory["measured"]["components"]["weights"]
    assert all(key in json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[0]) for key in (
        "step", "tokens", "loss", "lr", "grad_norm", "seq_len", "micro_batch_size", "step_time_s", "tokens_per_s", "host_peak_bytes",
        "cuda_allocated_bytes",
    ))  # fmt: skip


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_same_command_goes_on_bit_equal(workplace, number, code):
    name = f"stopped-{code}"
    # the stop must fall inside the run: it is sent when a fifth of the steps are written
    watcher = threading.Thread(target=_signal_after_lines, args=(workplace / name / "metrics.jsonl", 8, number))
    watcher.start()
    assert pretrain(workplace, name) == code
    watcher.join()
    assert 8 <= json.loads((workplace / name / "metrics.jsonl").read_text().splitlines()[-1])["step"] < 40
    assert pretrain(workplace, name) == 0
    assert final_bits(workplace / name) == final_bits(workplace / "whole")
    assert metrics(workplace / name) == metrics(workplace / "whole")


def _signal_after_lines(path: Path, lines: int, number: int) -> None:
    while not path.exists() or path.read_text().count("\n") < lines:
        pass
    os.kill(os.getpid(), number)


def test_running_a_finished_run_again_changes_nothing_and_mends_its_pointers(workplace):
    assert pretrain(workplace, "finished", train__steps=6) == 0
    run_dir = workplace / "finished"
    memory = json.loads((run_dir / "memory.json").read_text())["measured"]["host_peak_bytes"]
    before = final_bits(run_dir), metrics(run_dir)
    (run_dir / "checkpoints" / "latest").write_text("step-00000003\n")  # killed between publishing and pointing
    assert pretrain(workplace, "finished", train__steps=6) == 0
    assert (final_bits(run_dir), metrics(run_dir)) == before
    assert (run_dir / "checkpoints" / "latest").read_text() == "step-00000006\n"
    assert json.loads((run_dir / "memory.json").read_text())["measured"]["host_peak_bytes"] >= memory


def test_more_steps_go_on_as_if_asked_for_at_once(workplace):
    constant = {"optim__schedule": "constant"}
    assert pretrain(workplace, "long", train__steps=24, **constant) == 0
    assert pretrain(workplace, "short", train__steps=9, **constant) == 0
    assert pretrain(workplace, "short", train__steps=24, **constant) == 0
    assert final_bits(workplace / "short") == final_bits(workplace / "long")


@pytest.mark.parametrize(
    "overrides", [{"train__micro_batch_size": 1}, {"train__micro_batch_size": 4}, {"train__activation_checkpointing": "block"}]
)
def test_micro_batch_and_recompute_do_not_change_the_loss(workplace, overrides):
    assert pretrain(workplace, "other", "--fresh", train__steps=5, optim__warmup_steps=5, **overrides) == 0
    ours = [line["loss"] for line in metrics(workplace / "other") if "loss" in line]
    whole = [line["loss"] for line in metrics(workplace / "whole") if "loss" in line][:5]
    # fp32 sums in another order: each loss is a mean of 128 terms near 5.5, each good to a few 2^-24, and five Adam steps
    # with lr <= 0.01 pass on relative gradient differences of the same size
    assert ours == pytest.approx(whole, rel=2e-6)


def test_other_settings_are_refused_and_fresh_keeps_the_old_run(workplace, capsys):
    assert pretrain(workplace, "settings", train__steps=3) == 0
    assert pretrain(workplace, "settings", train__steps=3, optim__lr=0.5) == 2
    assert "optim.lr was 0.01, now 0.5" in capsys.readouterr().err
    assert pretrain(workplace, "settings", "--fresh", train__steps=3, optim__lr=0.5) == 0
    assert (workplace / "settings.old-1" / "metrics.jsonl").exists()
    assert metrics(workplace / "settings") != metrics(workplace / "settings.old-1")


def test_other_text_is_refused(workplace, capsys):
    text = write_text(workplace / "other.txt")
    arguments = ["pretrain", "--quiet", *tiny_arguments(workplace / "text-run", text, train__steps=3)]
    assert main(arguments) == 0
    write_text(text, lines=700)
    assert main(arguments) == 2
    assert "was trained on other text" in capsys.readouterr().err


def test_a_damaged_newest_checkpoint_stops_with_5_and_goes_on_when_told(workplace, capsys):
    assert pretrain(workplace, "damaged", train__keep_last=3) == 0
    newest = sorted((workplace / "damaged" / "checkpoints").glob("step-????????"))[-1]
    with open(newest / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    assert pretrain(workplace, "damaged", train__keep_last=3) == 5
    message = capsys.readouterr().err
    assert newest.name in message
    assert "--resume=last_valid goes on from step 39" in message
    assert pretrain(workplace, "damaged", "--resume=last_valid", train__keep_last=3) == 0
    assert final_bits(workplace / "damaged") == final_bits(workplace / "whole")
    assert newest.with_suffix(".damaged").exists()


def test_divergence_ends_with_6_and_keeps_the_last_good_checkpoint(workplace, capsys):
    code = pretrain(
        workplace,
        "diverged",
        optim__lr=1e25,
        optim__clip=0,
        optim__warmup_steps=0,
        optim__schedule="constant",
        train__max_bad_steps=4,
        train__save_every=1,
    )
    assert code == 6
    message = capsys.readouterr().err
    assert "4 steps in a row" in message
    assert "the last checkpoint is step" in message
    records = [json.loads(line) for line in (workplace / "diverged" / "metrics.jsonl").read_text().splitlines()]
    bad = [record["step"] for record in records if record.get("skipped") == "nonfinite"]
    assert bad[-4:] == list(range(bad[-4], bad[-4] + 4))
    store = CheckpointStore(workplace / "diverged", 2)
    newest = store.steps()[-1]
    assert damage(store.path(newest)) == ""
    assert newest < bad[-4]  # nothing was saved within the streak, so nothing good was pruned
    weights = read_tensors(store.path(newest) / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for _, tensor in weights)
    assert "with --fresh or in another run_dir" in message


@pytest.mark.slow
def test_a_full_disk_ends_with_7_and_the_older_checkpoint_is_intact(workplace):
    run_dir = workplace / "full"
    arguments = tiny_arguments(run_dir, workplace / "text.txt", train__save_every=20)
    size = (workplace / "whole" / "checkpoints" / "step-00000040" / "optimizer.safetensors").stat().st_size
    assert pretrain(workplace, "full", train__save_every=20, train__steps=20, optim__schedule="constant") == 0
    import subprocess
    import sys

    result = subprocess.run(
        [sys.executable, "-m", "lowmem", "pretrain", *arguments, "--optim.schedule=constant"],
        capture_output=True, text=True, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2)),
    )  # fmt: skip
    assert result.returncode == 7, result.stderr
    assert "checkpoints written before are intact" in result.stderr
    assert "Traceback" not in result.stderr
    assert pretrain(workplace, "full", train__save_every=20, optim__schedule="constant") == 0


@pytest.mark.slow
def test_memory_beyond_the_budget_ends_with_3(workplace):
    result = lowmem(
        "pretrain",
        "--force",
        *tiny_arguments(workplace / "big", workplace / "text.txt", model__dim=1024, model__num_layers=12, budget__ram="500MiB"),
    )
    assert result.returncode == 3, result.stderr
    assert "memory ran out (budget.ram=500MiB" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments, code, expected",
    [
        (["--config", "nowhere.yaml"], 2, "nowhere.yaml does not exist"),
        (["--train.stepz=3"], 2, "the nearest valid key is train.steps"),
        (["--resume=maybe"], 2, "--resume"),
        (["stray"], 2, "found 'stray'"),
        (["--train.steps=3", "--data.sources=[{path: missing.txt}]"], 4, "missing.txt"),
    ],
)
def test_mistakes_get_one_message_and_the_right_code(tmp_path, capsys, arguments, code, expected):
    assert main(["pretrain", "--quiet", f"--run_dir={tmp_path / 'run'}", *arguments]) == code
    message = capsys.readouterr().err
    assert expected in message
    assert message.startswith("lowmem: error: ")


def test_print_config_and_dry_run_train_nothing(tmp_path, capsys, monkeypatch):
    stub_measurements(monkeypatch)
    assert main(["pretrain", "--train.steps=3", f"--run_dir={tmp_path / 'run'}", "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert "# Peak learning rate." in printed
    assert main(["pretrain", "--train.steps", "3", "--data.tokenizer=bytes", f"--run_dir={tmp_path / 'run'}", "--dry_run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["predicted"]["components"]["weights"] == 4 * report["parameters"]
    assert sum(report["parameters_by_component"].values()) == report["parameters"]
    assert not (tmp_path / "run").exists()


def test_unknown_commands_are_named(capsys):
    assert main(["pretrian"]) == 2
    assert (
        "unknown command 'pretrian'; known: pretrain, plan, profile, generate, finetune, export, import, doctor" in capsys.readouterr().err
    )
