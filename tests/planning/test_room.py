"""Room on disks before a run begins: what is counted, what is refused, and in which words."""

import json
from types import SimpleNamespace

import pytest

from lowmem.cli.main import main
from lowmem.planning.disk_space import checkpoints_at_once, disk_components
from lowmem.planning.predict import predict_peak
from lowmem.planning.room import check_room, sizes_without_a_step
from lowmem.system.errors import StorageError
from lowmem.system.units import format_bytes
from tests.planning.small import ON_DISK, TINY, small_config, stub_measurements

MIB = 1 << 20


def free(monkeypatch, size: int) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=size))


def needs(prediction) -> int:
    return prediction.disk.get("scratch", 0) + prediction.disk["checkpoints"]


@pytest.mark.parametrize("settings, count", [
    (["train.steps=10", "train.save_every=100"], 1), (["train.steps=10", "train.save_every=0"], 1),
    (["train.steps=10", "train.save_every=6"], 2),
    (["train.steps=1000"], 3), (["train.steps=1000", "train.eval_every=50"], 4), (["train.steps=1000", "train.keep_last=1"], 2),
    (["train.steps=10", "train.eval_every=2", "train.save_every=0"], 4),
])  # fmt: skip
def test_checkpoints_that_are_there_at_once(settings, count):
    assert checkpoints_at_once(small_config(*settings)) == count


def test_shards_are_counted_where_their_size_is_known(tmp_path):
    (tmp_path / "text.txt").write_text("abc" * 100)
    config = small_config(f"data.sources=[{{path: {tmp_path}/text.txt}}]")
    assert disk_components(config, 10, 0) == {"checkpoints": 10, "shards": 600}
    config.data.tokenizer = "bpe"
    assert disk_components(config, 10, 7) == {"scratch": 7, "checkpoints": 10}


@pytest.mark.parametrize("settings, remedies", [
    ([], "free space there, lower train.keep_last, raise train.save_every, or name a larger disk with run_dir"),
    (ON_DISK, "free space there, name a larger disk with train.storage_dir, lower train.keep_last, raise train.save_every, or name a "
     "larger disk with run_dir"),
])  # fmt: skip
def test_a_disk_without_room_is_refused_with_both_figures(settings, remedies, tmp_path, monkeypatch):
    stub_measurements(monkeypatch)
    config = small_config(*settings, f"run_dir={tmp_path}/run", "model.num_layers=2", "train.steps=1000")
    need = needs(predict_peak(config))
    free(monkeypatch, need)
    check_room(config)
    free(monkeypatch, need - 1)
    with pytest.raises(StorageError) as refusal:
        check_room(config)
    message = str(refusal.value)
    assert message.startswith(f"the run will take {format_bytes(need)} of a disk (")
    assert f", which has {format_bytes(need - 1)} free; {remedies}" in message
    assert "\n" not in message
    assert ("scratch file" in message) == bool(settings)
    assert not (tmp_path / "run").exists()


def test_checkpoints_that_are_there_take_no_more_room(tmp_path, monkeypatch):
    config = small_config(f"run_dir={tmp_path}", "train.steps=1000")
    checkpoint, _ = sizes_without_a_step(predict_config(config, monkeypatch))
    for step in (100, 200):
        folder = tmp_path / "checkpoints" / f"step-{step:08}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"0" * checkpoint)
    free(monkeypatch, checkpoint)
    check_room(config)
    with pytest.raises(StorageError, match="the run will take"):
        check_room(config, fresh=True)


def predict_config(config, monkeypatch):
    stub_measurements(monkeypatch)
    return predict_peak(config).config


def test_two_disks_are_asked_each_for_its_own(tmp_path, monkeypatch):
    config = small_config(*ON_DISK, f"run_dir={tmp_path}/run", f"train.storage_dir={tmp_path}/scratch")
    monkeypatch.setattr("lowmem.planning.room._by_disk", lambda uses: [[use] for use in uses])
    free(monkeypatch, 1000)
    with pytest.raises(StorageError, match=r"scratch file .*/scratch\), which .*free space there, or name a larger .*train.storage_dir$"):
        check_room(config)


def test_a_vocabulary_that_only_the_text_tells_is_taken_as_small(tmp_path, monkeypatch):
    config = small_config("data.tokenizer=chars", f"run_dir={tmp_path}")
    free(monkeypatch, 100 * MIB)
    check_room(config)
    free(monkeypatch, 1000)
    with pytest.raises(StorageError):
        check_room(config)


def test_a_run_ends_with_code_7_before_any_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("some text " * 100)
    run = [f"--{setting}" for setting in (*TINY, f"data.sources=[{{path: {tmp_path}/text.txt}}]", f"run_dir={tmp_path}/run")]
    free(monkeypatch, 1000)
    assert main(["pretrain", *run]) == 7
    (line,) = capsys.readouterr().err.splitlines()
    assert "which has 1000 B free; free space there, lower train.keep_last" in line
    assert not (tmp_path / "run").exists()


def test_a_run_beyond_its_budget_of_disk_ends_with_code_3(tmp_path, monkeypatch, capsys):
    stub_measurements(monkeypatch)
    (tmp_path / "text.txt").write_text("some text " * 100)
    run = [f"--{setting}" for setting in (*TINY, f"data.sources=[{{path: {tmp_path}/text.txt}}]", f"run_dir={tmp_path}/run")]
    assert main(["pretrain", *run, "--dry_run", "--json", "--budget.disk=100KiB"]) == 3
    captured = capsys.readouterr()
    components = json.loads(captured.out)["predicted"]["disk_components"]
    assert components["shards"] == 2000
    assert f"the run needs {format_bytes(sum(components.values()))}" in captured.err
    assert "of disk, the budget is 100KiB. Largest saving: " in captured.err
