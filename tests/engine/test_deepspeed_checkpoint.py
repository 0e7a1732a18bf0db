"""DeepSpeed's nested states as JSON and safetensors: exact, explicit, and nothing in the files can run."""

import json
from collections import OrderedDict
from enum import IntEnum
from pathlib import Path

import pytest
import torch

from lowmem.engine.deepspeed.saving import load_state, save_state
from lowmem.system.errors import CheckpointError


class Stage(IntEnum):
    TWO = 2


class DynamicLossScaler:
    def __init__(self, cur_scale: float) -> None:
        self.cur_scale, self.cur_iter, self.dynamic = cur_scale, 7, True


def test_every_listed_type_returns_as_it_was(tmp_path: Path) -> None:
    state = {
        "state": {0: {"step": 3, "exp_avg": torch.randn(5), "absmax": torch.arange(4, dtype=torch.uint8)}, "name": None},
        "betas": (0.9, 0.95), "shape": torch.Size([2, 3]), "dtype": torch.bfloat16, "flags": [True, False, [1.5, float("inf")]],
        "ordered": OrderedDict(b=1, a=2), "scalar": torch.tensor(4.0), "half": torch.randn(3).bfloat16(), "stage": Stage.TWO,
    }  # fmt: skip
    save_state(state, tmp_path / "zero-rank0.json")
    loaded = load_state(tmp_path / "zero-rank0.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["zero-rank0.json", "zero-rank0.safetensors"]
    assert loaded.keys() == state.keys()
    for name in ("betas", "shape", "dtype", "flags", "stage"):
        assert loaded[name] == state[name]
    assert type(loaded["betas"]) is tuple
    assert type(loaded["shape"]) is torch.Size
    assert type(loaded["stage"]) is int
    assert list(loaded["ordered"].items()) == [("b", 1), ("a", 2)]
    assert loaded["state"]["name"] is None
    assert loaded["state"][0]["step"] == 3
    for one, other in (
        (loaded["state"][0]["exp_avg"], state["state"][0]["exp_avg"]),
        (loaded["state"][0]["absmax"], state["state"][0]["absmax"]),
        (loaded["scalar"], state["scalar"]),
        (loaded["half"], state["half"]),
    ):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_weights_and_conversion_data_are_left_out_and_stand_empty_when_read(tmp_path: Path) -> None:
    state = {
        "module": {"w": torch.ones(3)},
        "ds_config": object(),
        "optimizer_state_dict": {"fp32_flat_groups": [torch.ones(3)], "overflow": False},
    }
    save_state(state, tmp_path / "engine.json")
    assert not (tmp_path / "engine.safetensors").exists()
    assert load_state(tmp_path / "engine.json") == {
        "module": {}, "ds_config": None, "optimizer_state_dict": {"fp32_flat_groups": [], "overflow": False},
    }  # fmt: skip


def test_loss_scaler_takes_over_the_saved_values(tmp_path: Path) -> None:
    save_state({"loss_scaler": DynamicLossScaler(1024.0)}, tmp_path / "zero.json")
    mine = DynamicLossScaler(65536.0)
    mine.cur_iter = 0
    assert load_state(tmp_path / "zero.json", mine)["loss_scaler"] is mine
    assert (mine.cur_scale, mine.cur_iter) == (1024.0, 7)


def test_unknown_types_are_refused_with_their_place(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"builtins.set at /groups/1/ids, which has no JSON form"):
        save_state({"groups": [0, {"ids": {1, 2}}]}, tmp_path / "zero.json")


@pytest.mark.parametrize(
    "text",
    [
        '{"$type": "dict", "items": [["state", {"$type": "os.system", "items": ["true"]}]]}',
        '{"$type": "dtype", "name": "load"}',
        '{"$type": "tensor", "name": "/missing"}',
        '{"step": 3}',
        "{",
    ],
)
def test_damaged_or_foreign_files_are_checkpoint_errors(tmp_path: Path, text: str) -> None:
    (tmp_path / "zero.json").write_text(text)
    with pytest.raises(CheckpointError, match="zero.json is damaged"):
        load_state(tmp_path / "zero.json")


def test_missing_tensor_file_is_a_checkpoint_error(tmp_path: Path) -> None:
    save_state({"exp_avg": torch.ones(2)}, tmp_path / "zero.json")
    (tmp_path / "zero.safetensors").unlink()
    with pytest.raises(CheckpointError):
        load_state(tmp_path / "zero.json")


def test_files_are_json_and_tensors_only(tmp_path: Path) -> None:
    save_state({"state": {0: {"exp_avg": torch.ones(2)}}}, tmp_path / "zero.json")
    json.loads((tmp_path / "zero.json").read_text())
    header_length = int.from_bytes((tmp_path / "zero.safetensors").read_bytes()[:8], "little")
    assert "/state/0/exp_avg" in json.loads((tmp_path / "zero.safetensors").read_bytes()[8 : 8 + header_length])
