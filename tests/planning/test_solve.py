"""The largest value of each key that fits, for a tiny model. Base cost and rates are stubbed, each configuration is predicted once."""

import copy

import pytest

from lowmem.planning.levers import missing_bytes, set_key
from lowmem.planning.predict import predict_peak
from lowmem.planning.search import SOLVABLE, solve
from lowmem.system.errors import ConfigError
from tests.planning.small import BASE_BYTES, LAYERWISE, ON_DISK, remember_predictions, small_config, stub_measurements

MIB = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def measurements():
    with pytest.MonkeyPatch.context() as patch:
        stub_measurements(patch)
        remember_predictions(patch)
        yield


def peak(config, key: str, value: int) -> int:
    config = copy.deepcopy(config)
    set_key(config, key, value)
    if key == "data.seq_len":
        config.model.max_seq_len = max(config.model.max_seq_len, value)
    return predict_peak(config).host.peak_bytes


CASES = {
    "model.dim": ([], 6 * MIB),
    "model.num_layers": ([], 5 * MIB),
    "data.seq_len": ([], 8 * MIB),
    "train.micro_batch_size": (["train.global_batch_size=12", "train.activation_checkpointing=none"], 3 * MIB),
    "model.lorpt.rank": (["model.dim=256", "model.lorpt.rank=8", "model.lorpt.targets=[mlp]"], 14 * MIB),
}


@pytest.mark.parametrize("key", CASES)
def test_the_value_fits_and_the_next_does_not(key):
    settings, room = CASES[key]
    config = small_config("model.num_layers=1", *settings, f"budget.ram={BASE_BYTES + room}B")
    found = solve(config, key, margin=0.0)
    assert found.key == key
    assert 0 < found.value < found.beyond
    assert found.prediction.host.peak_bytes == peak(config, key, found.value) <= BASE_BYTES + room
    assert peak(config, key, found.beyond) > BASE_BYTES + room
    steps = {"model.dim": 64, "model.num_layers": 1, "data.seq_len": 64, "model.lorpt.rank": 8}
    if key in steps:
        assert found.beyond - found.value == steps[key]
        assert found.value % steps[key] == 0
    else:
        assert (found.value, found.beyond) in [(1, 2), (2, 3), (3, 4), (4, 6), (6, 12)]


def test_all_keys_are_here():
    assert sorted(CASES) == sorted(SOLVABLE)


def test_widths_are_divided_by_the_heads():
    config = small_config("model.num_layers=1", "model.dim=96", "model.num_heads=3", f"budget.ram={BASE_BYTES + 24 * MIB}B")
    found = solve(config, "model.dim")
    assert found.value % 192 == 0  # of 64 and of twice three heads
    assert found.prediction.config.model.dim == found.value


def test_not_even_the_smallest_fits():
    found = solve(small_config("model.num_layers=1", f"budget.ram={BASE_BYTES}B"), "model.num_layers")
    assert (found.value, found.beyond) == (0, 1)
    assert found.prediction.host.peak_bytes > BASE_BYTES


def test_everything_fits():
    found = solve(small_config("model.num_layers=1", "budget.ram=1GiB"), "train.micro_batch_size")
    assert (found.value, found.beyond) == (4, 0)


def test_ranks_that_save_nothing_are_not_tried():
    # 64 x 192: below 48; 64 x 64, which attention has: below 32
    for targets, expected in (("[mlp]", 40), ("[attention, mlp]", 24)):
        settings = ["model.num_layers=1", "model.lorpt.rank=8", f"model.lorpt.targets={targets}", "budget.ram=1GiB"]
        found = solve(small_config(*settings), "model.lorpt.rank")
        assert found.beyond == 0
        assert found.value == expected


@pytest.mark.parametrize("settings, key, message", [
    (["budget.ram=1GiB"], "model.heads", "--solve is 'model.heads'; allowed: model.dim, model.num_layers, data.seq_len, "),
    ([], "model.dim", "--solve needs a budget; give --budget.ram, --budget.vram or --budget.disk"),
])  # fmt: skip
def test_what_cannot_be_solved(settings, key, message):
    with pytest.raises(ConfigError) as raised:
        solve(small_config(*settings), key)
    assert str(raised.value).startswith(message)


def test_layers_within_a_budget_of_disk():
    """RAM holds two layers whatever their number; resident, it would hold no more than three."""
    room = f"budget.ram={BASE_BYTES + 9 * MIB}B"
    settings = [*ON_DISK, "model.dim=128", room, "budget.disk=22MiB"]
    found = solve(small_config(*settings), "model.num_layers", margin=0.0)
    assert (found.value, found.beyond) == (4, 5)
    assert found.prediction.disk_bytes <= 22 * MIB < predict_peak(with_layers(settings, 5)).disk_bytes
    assert missing_bytes(predict_peak(with_layers([*LAYERWISE, "model.dim=128", room], 4)), margin=0.0)


def with_layers(settings, layers: int):
    return small_config(*settings, f"model.num_layers={layers}")
