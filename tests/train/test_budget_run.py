"""Runs with a budget, in fresh processes: refused before they start, forced all the same, and what memory.json says afterwards."""

import json
from pathlib import Path

import pytest

from tests.train.tiny_run import lowmem, tiny_arguments, write_text

pytestmark = pytest.mark.memory
MIB = 1 << 20
PEAKS = ("host_peak_bytes", "cuda_allocated_peak_bytes", "cuda_reserved_peak_bytes")
BIG = {"model.dim": 512, "model.num_layers": 6, "model.num_heads": 8, "train.steps": 3, "train.eval_every": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The text, and one cache, so that the base cost is measured once."""
    path = tmp_path_factory.mktemp("budget")
    write_text(path / "text.txt")
    return path


def run(folder: Path, name: str, *flags: str, ram: str, **settings: object):
    values = {**settings, "budget.ram": ram, "data.cache_dir": folder / "cache"}
    return lowmem("pretrain", *flags, *tiny_arguments(folder / name, folder / "text.txt", **values))


def test_within_its_budget_memory_json_has_predicted_and_measured(folder):
    result = run(folder, "fits", ram="2GiB", **{"train.steps": 6, "train.eval_every": 3})
    assert result.returncode == 0, result.stderr
    assert "predicted peak of RAM: " in result.stderr
    report = json.loads((folder / "fits" / "memory.json").read_text())
    assert report["budget"] == {"ram": "2GiB", "vram": "", "disk": ""}
    predicted, measured = report["predicted"], report["measured"]
    for peaks in (predicted, measured):
        assert set(PEAKS) <= set(peaks)
        assert {"weights", "gradients", "optimizer_states"} <= set(peaks["components"])
    assert {"activations", "workspace", "base", "data"} <= set(predicted["components"])
    assert sum(predicted["components"].values()) == predicted["host_peak_bytes"]
    assert predicted["cuda_reserved_peak_bytes"] == measured["cuda_reserved_peak_bytes"] == 0
    assert {"load", "first_step", "steady_steps", "evaluation", "save"} == set(measured["phases"])
    assert max(phase["host_peak_bytes"] for phase in measured["phases"].values()) <= measured["host_peak_bytes"]
    # such a run is nothing but its base cost, which varies by what the system shares between processes
    assert predicted["host_peak_bytes"] == pytest.approx(measured["host_peak_bytes"], rel=0.05)
    assert predicted["components"]["weights"] == measured["components"]["weights"]


def test_beyond_its_budget_it_does_not_start(folder):
    result = run(folder, "refused", "--quiet", ram="300MiB", **BIG)
    assert result.returncode == 3, result.stderr
    message = result.stderr
    assert message.startswith("lowmem: error: the run needs ")
    assert "optimizer states" in message
    assert "base" in message
    assert "of RAM, the budget is 300MiB. Largest saving: --" in message
    assert "See: lowmem plan; --force starts it all the same" in message
    assert len(message.strip().splitlines()) == 1
    assert result.stdout == ""
    assert not (folder / "refused").exists()


@pytest.mark.parametrize("ram", ["300MiB", "420MiB", "520MiB"])
def test_forced_it_ends_in_order(folder, ram):
    result = run(folder, f"forced-{ram}", "--quiet", "--force", ram=ram, **BIG)
    assert result.returncode in (0, 3), (result.returncode, result.stderr)
    assert "Traceback" not in result.stderr
    if result.returncode == 3:
        assert result.stderr.startswith("lowmem: error: ")
        assert "memory" in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    else:
        report = json.loads((folder / f"forced-{ram}" / "memory.json").read_text())
        assert report["predicted"] is None
        assert report["measured"]["host_peak_bytes"] > 0


def test_without_a_budget_nothing_is_predicted(folder):
    result = run(folder, "free", "--quiet", ram="", **{"train.steps": 2})
    assert result.returncode == 0, result.stderr
    report = json.loads((folder / "free" / "memory.json").read_text())
    assert report["predicted"] is None
    assert report["measured"]["host_peak_bytes"] > 0
