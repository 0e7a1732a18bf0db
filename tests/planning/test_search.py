"""Plans for a tiny model over many budgets. Base cost and rates are stubbed, each configuration is predicted once."""

from itertools import pairwise

import pytest

from lowmem.config.checks import config_problems
from lowmem.planning import plan as plan_for
from lowmem.planning.levers import missing_bytes
from lowmem.planning.predict import predict_peak
from lowmem.planning.search import _UPDATES, WORTH, Plan, plan
from tests.planning.small import BASE_BYTES, remember_predictions, small_config, stub_measurements

KIB = 1 << 10
SETTINGS = ["model.num_layers=1", "train.precision=fp32", "train.global_batch_size=8", "train.micro_batch_size=8"]
LEVELS = [32, 8, 4]
BUDGETS_KIB = [600, 900, 1100, 1400, 1700, 2000, 2400, 3000, 4000, 8000]


@pytest.fixture(scope="module", autouse=True)
def measurements():
    with pytest.MonkeyPatch.context() as patch:
        stub_measurements(patch)
        remember_predictions(patch)
        yield


def budget(kib: int) -> int:
    return BASE_BYTES + kib * KIB


@pytest.fixture(scope="module")
def plans(measurements) -> dict[int, Plan]:
    return {kib: plan(small_config(*SETTINGS, f"budget.ram={budget(kib)}B"), margin=0.0) for kib in BUDGETS_KIB}


def weighed_seconds(found: Plan) -> float:
    """Seconds of a step, times what a plan that changes more of what is learned must be faster."""
    config = found.prediction.config
    return found.prediction.step_s * WORTH ** LEVELS.index(config.optim.state_bits)


def test_every_plan_fits_by_full_prediction(plans):
    assert {found.fits for found in plans.values()} == {True, False}
    for kib, found in plans.items():
        for prediction in [found.prediction, *found.alternatives] if found.fits else []:
            assert prediction.host.peak_bytes <= budget(kib)
            assert config_problems(prediction.config) == []
        assert found.missing == missing_bytes(found.prediction, 0.0)
    chosen = plans[1700].prediction
    assert predict_peak(chosen.config).host.peak_bytes == chosen.host.peak_bytes


def test_a_larger_budget_never_gives_a_slower_plan(plans):
    fitting = [weighed_seconds(plans[kib]) for kib in BUDGETS_KIB if plans[kib].fits]
    assert len(fitting) >= 4
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(fitting))
    assert fitting[-1] < fitting[0]


def test_whatever_fits_at_one_budget_fits_at_a_larger_one(plans):
    fits = [plans[kib].fits for kib in BUDGETS_KIB]
    assert fits == sorted(fits)


def test_with_room_for_everything_nothing_is_saved(plans):
    config = plans[BUDGETS_KIB[-1]].prediction.config
    assert (config.optim.state_bits, config.train.weight_dtype, config.train.update) == (32, "fp32", "accumulate")
    assert (config.train.micro_batch_size, config.train.activation_checkpointing) == (8, "none")


def test_what_the_search_does_not_choose_is_kept(plans):
    before = small_config(*SETTINGS, "data.document_mask=true")  # what auto is for a decoder on a CPU
    for found in plans.values():
        config = found.prediction.config
        assert (config.model.dim, config.model.num_layers, config.data, config.optim.lr) == (64, 1, before.data, before.optim.lr)
        assert (config.train.global_batch_size, config.train.precision) == (8, "fp32")


def test_an_impossible_budget_tells_what_is_missing_and_what_comes_nearest(plans):
    found = plans[BUDGETS_KIB[0]]
    assert not found.fits
    assert found.missing == {"ram": found.prediction.host.peak_bytes - budget(BUDGETS_KIB[0])}
    needs = [prediction.host.peak_bytes for prediction in [found.prediction, *found.alternatives]]
    assert len(needs) == 4
    assert needs == sorted(needs)
    # everything that is narrow is narrow, and one sequence is computed at a time; rows of 64 elements have no 4-bit states
    config = found.prediction.config
    assert config.optim.state_bits == 8
    assert config.train.micro_batch_size == 1


def test_alternatives_are_other_plans(plans):
    found = plans[4000]
    settings = [
        (p.config.train.update, p.config.train.activation_checkpointing, p.config.optim.state_bits, p.config.train.weight_dtype)
        for p in [found.prediction, *found.alternatives]
    ]
    assert len(settings) == len(set(settings)) == 4


def test_a_margin_is_kept_free():
    found = plan(small_config(*SETTINGS, f"budget.ram={budget(6000)}B"), margin=0.05)
    assert found.fits
    assert found.prediction.host.peak_bytes <= budget(6000) * 0.95


def test_from_python_with_a_budget_of_its_own():
    config = small_config(*SETTINGS)
    found = plan_for(config, type(config.budget)(ram=f"{2 * budget(8000)}B"))
    assert found.fits
    assert config == small_config(*SETTINGS)


@pytest.fixture
def by_blocks(monkeypatch):
    """Fewer candidates: those that keep least."""
    monkeypatch.setattr("lowmem.planning.search._UPDATES", _UPDATES[-1:])


def test_blocks_go_to_a_disk_where_nothing_else_fits(by_blocks):
    narrow = ["model.num_layers=4", "model.dim=128", "optim.state_bits=4", "train.global_batch_size=2"]

    def found(ram_kib: int, disk: str) -> Plan:
        return plan(small_config(*narrow, f"budget.ram={budget(ram_kib)}B", f"budget.disk={disk}"), margin=0.0, alternatives=1)

    assert not found(5000, "0").fits
    away = found(5000, "1GiB")
    assert away.fits
    train = away.prediction.config.train
    assert (train.weights_at, train.boundary_offload, train.update, train.activation_checkpointing) == (
        "disk",
        "disk",
        "layerwise",
        "block",
    )
    assert away.prediction.time.transfer > 0
    assert not found(5000, f"{away.prediction.disk_bytes - 1}B").fits
    roomy = found(100_000, "1GiB")
    assert {p.config.train.weights_at for p in [roomy.prediction, *roomy.alternatives]} == {"device"}


def test_blocks_of_a_gpu_go_to_host_memory_where_there_is_enough_of_it(by_blocks):
    """And to a disk where there is not, unless there is none."""
    narrow = ["optim.state_bits=4", "train.weight_dtype=bf16", "model.dim=256", "model.num_layers=4", "train.global_batch_size=1"]
    settings = ["device=cuda", "train.precision=bf16", "train.micro_batch_size=1", *narrow, "budget.vram=40MiB"]
    places = {}
    for ram, disk in ((40, "0"), (9, "4GiB"), (9, "0")):
        found = plan(small_config(*settings, f"budget.ram={BASE_BYTES + (ram << 20)}B", f"budget.disk={disk}"), margin=0.0)
        places[ram, disk] = found.prediction.config.train.weights_at if found.fits else ""
    assert places == {(40, "0"): "host", (9, "4GiB"): "disk", (9, "0"): ""}
