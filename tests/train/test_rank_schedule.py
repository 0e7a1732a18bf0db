"""`lowmem pretrain` with a rank that changes: by schedule, on a plateau, when resumed; bit-identical across the change."""

from pathlib import Path

import pytest

from lowmem.cli.main import main
from lowmem.config.schema import LorptConfig
from lowmem.engine.run_model import load_run_model
from lowmem.train.run import TrainState
from lowmem.train.stages import count_evaluation, next_rank
from tests.reference.read_only import read_only
from tests.train.tiny_run import final_bits, metrics, tiny_arguments, write_text

LOW_RANK = {
    "model.lorpt.rank": 4, "model.lorpt.targets": "[attention, mlp]", "optim.schedule": "constant", "train.save_every": 4,
    "optim.state_bits": 8, "model.dim": 64,
}  # fmt: skip


def pretrain(folder: Path, name: str, *flags: str, **overrides) -> int:
    text = folder / "text.txt"
    arguments = tiny_arguments(folder / name, text if text.exists() else write_text(text), **{**LOW_RANK, **overrides})
    return main(["pretrain", "--quiet", *arguments, *flags])


CHANGES = {"model.lorpt.schedule": "{12: 12, 18: 6}", "train.steps": 20}


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """By the optimizer: the run directory of one that was not stopped."""
    folder = tmp_path_factory.mktemp("whole")
    for optimizer in ("adamw", "spectron"):
        assert pretrain(folder, optimizer, **CHANGES, **{"optim.name": optimizer}) == 0
    with read_only(folder):
        yield {optimizer: folder / optimizer for optimizer in ("adamw", "spectron")}


@pytest.mark.parametrize("optimizer", ["adamw", "spectron"])
@pytest.mark.parametrize("stop", [8, 12, 16])
def test_resuming_before_at_and_after_a_change_is_bit_identical(tmp_path, whole_runs, optimizer, stop):
    settings = {**CHANGES, "optim.name": optimizer}
    assert pretrain(tmp_path, "parts", **{**settings, "train.steps": stop}) == 0
    assert pretrain(tmp_path, "parts", **settings) == 0
    folders = (whole_runs[optimizer], tmp_path / "parts")
    whole, parts = map(final_bits, folders)
    assert whole["model.safetensors"] == parts["model.safetensors"]
    assert whole["optimizer.safetensors"] == parts["optimizer.safetensors"]
    losses = [[line["loss"] for line in metrics(folder) if "loss" in line] for folder in folders]
    assert losses[0] == losses[1]
    model = load_run_model(whole_runs[optimizer]).model
    assert {model.blocks[0].mlp.down.rank, model.blocks[1].attention.out.rank} == {6}


def test_the_schedule_may_change_when_a_run_goes_on_and_nothing_else(tmp_path, capsys):
    assert pretrain(tmp_path, "run", **{"train.steps": 8}) == 0
    assert pretrain(tmp_path, "run", **{"train.steps": 12, "model.lorpt.schedule": "{8: 2}"}) == 0
    assert load_run_model(tmp_path / "run").model.blocks[0].mlp.down.rank == 2
    capsys.readouterr()
    assert pretrain(tmp_path, "run", **{"train.steps": 14, "model.lorpt.rank": 2, "model.lorpt.schedule": "{8: 2}"}) == 2
    assert "model.lorpt.rank was 4, now 2" in capsys.readouterr().err


def test_a_plateau_doubles_the_rank_up_to_the_limit(tmp_path, capsys):
    # a learning rate of nothing: no evaluation after the first is better
    settings = {"model.lorpt.grow_to": 10, "model.lorpt.grow_patience": 2, "optim.lr": 0, "train.steps": 24, "train.eval_every": 2}
    arguments = tiny_arguments(tmp_path / "run", write_text(tmp_path / "text.txt"), **{**LOW_RANK, **settings})
    assert main(["pretrain", *arguments]) == 0
    shown = capsys.readouterr().err
    assert "rank 4 -> 8 after step 6" in shown
    assert "rank 8 -> 10 after step 10" in shown
    assert "rank 10 ->" not in shown


def test_when_the_rank_changes():
    lorpt, state = LorptConfig(rank=4, schedule={10: 8, 20: 2}), TrainState(step=9)
    assert next_rank(lorpt, state, 4) == 0
    state.step = 10
    assert next_rank(lorpt, state, 4) == 8
    state.rank, state.step = 8, 19
    assert next_rank(lorpt, state, 8) == 0
    state.step = 25
    assert next_rank(lorpt, state, 8) == 2
    growing, state = LorptConfig(rank=4, grow_to=6, grow_patience=2), TrainState()
    for loss, expected in ((4.0, 0), (3.9961, 0), (float("nan"), 6)):  # 3.9961 is better, but by less than a thousandth
        count_evaluation(state, loss)
        state.best_val_loss = 4.0
        assert next_rank(growing, state, 4) == expected
    count_evaluation(state, 3.99)
    assert next_rank(growing, state, 4) == 0
    assert next_rank(growing, state, 6) == 0


@pytest.mark.parametrize("overrides, message", [
    ({"model.lorpt.schedule": "{5: 32}"}, "asks for 32, layer blocks.0.attention.qkv.q"),
    ({"model.lorpt.schedule": "{0: 8}"}, "model.lorpt.schedule has 0: 8; allowed: keys at least 1"),
    ({"model.lorpt.schedule": "{5: 8}", "model.lorpt.grow_to": 8}, "are both set"),
    ({"model.lorpt.rank": 0, "model.lorpt.grow_to": 8}, "model.lorpt.rank is 0"),
    ({"model.lorpt.rank": "auto", "model.lorpt.grow_to": 8}, "model.lorpt.rank is auto, which differs by layer"),
    ({"model.lorpt.grow_to": 8, "train.eval_every": 0}, "waits for evaluations, but train.eval_every is 0"),
    ({"model.lorpt.grow_to": 8, "engine.name": "deepspeed"}, "need engine.name=local"),
    ({"optim.name": "spectron", "engine.name": "deepspeed"}, "optim.name=spectron does not work with engine.name=deepspeed"),
    ({"optim.matrix_lr": 0.1}, "optim.matrix_lr is 0.1, which only optim.name=spectron uses"),
    ({"train.activation_checkpointing": "low"}, "low_rank"),
])  # fmt: skip
def test_what_cannot_work_is_refused_in_one_line(tmp_path, capsys, overrides, message):
    assert pretrain(tmp_path, "refused", **overrides) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
