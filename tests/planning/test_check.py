"""A run predicted in a process of its own: what comes back, and why a run is refused."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from lowmem.config.load import load_run_config
from lowmem.planning import check
from lowmem.planning.check import check_run, config_from
from lowmem.system.errors import ConfigError, MemoryBudgetError
from lowmem.system.units import format_bytes
from tests.planning.small import small_config
from tests.train.tiny_run import ROOT


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*pu/*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_survives_the_way_to_another_process(path):
    config = load_run_config(path, ["model.lorpt.ranks={blocks.0.mlp: 8}", "budget.ram=3GiB"])
    config.run_dir, config.data.sources[0].text_field = "a: b #c", "1e5"
    assert config_from(json.loads(json.dumps(asdict(config)))) == config


def answering(code: int, stdout: str = "", stderr: str = ""):
    return lambda command, **_: subprocess.CompletedProcess(command, code, stdout, stderr)


def test_a_prediction_that_fails_is_reported_with_its_last_line(monkeypatch):
    monkeypatch.setattr(check.subprocess, "run", answering(1, stderr="Traceback\nlowmem.system.errors.ConfigError: no such thing\n"))
    with pytest.raises(ConfigError, match="could not be predicted: lowmem.system.errors.ConfigError: no such thing"):
        check_run(small_config())
    monkeypatch.setattr(check.subprocess, "run", answering(9))
    with pytest.raises(ConfigError, match="exit code 9"):
        check_run(small_config())


def test_a_prediction_for_which_memory_does_not_suffice_is_a_refusal(monkeypatch):
    for code, words in ((-9, "was killed"), (137, "was killed"), (3, "does not fit")):
        monkeypatch.setattr(check.subprocess, "run", answering(code, stderr="first\nit does not fit\n"))
        with pytest.raises(MemoryBudgetError, match=words):
            check_run(small_config())


@pytest.mark.parametrize("code", [130, -2])
def test_ctrl_c_during_the_prediction_stops_the_run(monkeypatch, code):
    monkeypatch.setattr(check.subprocess, "run", answering(code))
    with pytest.raises(KeyboardInterrupt):
        check_run(small_config())


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """The base cost is measured here once."""
    return tmp_path_factory.mktemp("check")


@pytest.mark.memory
def test_a_run_that_fits_and_one_that_does_not(cache):
    settings = ["train.threads=1", f"data.cache_dir={cache}", "model.dim=256", "model.num_layers=8"]
    answer = check_run(small_config(*settings, "budget.ram=4GiB"))
    predicted = answer["predicted"]
    assert answer["refusal"] == ""
    assert sum(predicted["components"].values()) == predicted["host_peak_bytes"]
    assert 100e6 < predicted["components"]["base"] < 1e9
    assert predicted["base_is"] == "measured"
    assert predicted["tokens_per_s"] > 0

    half = predicted["host_peak_bytes"] // 2 >> 20
    refused = check_run(small_config(*settings, f"budget.ram={half}MiB"))
    assert refused["predicted"]["host_peak_bytes"] == predicted["host_peak_bytes"]
    text = refused["refusal"]
    assert text.startswith(f"the run needs {format_bytes(predicted['host_peak_bytes'])} (base ")
    assert f"optimizer states {format_bytes(predicted['components']['optimizer_states'])}" in text
    assert f"of RAM, the budget is {half}MiB. Largest saving: --" in text
    assert text.endswith("See: lowmem plan")
    assert "\n" not in text


@pytest.mark.memory
def test_a_vocabulary_that_only_the_text_tells_cannot_be_predicted(cache):
    with pytest.raises(ConfigError, match="data.tokenizer=chars has a size that only the text or the file tells; set model.vocab_size"):
        check_run(small_config("data.tokenizer=chars", f"data.cache_dir={cache}"))


@pytest.mark.memory
def test_this_process_is_not_made_larger(cache):
    code = """
import sys
from lowmem.config.load import load_run_config
from lowmem.planning.check import check_run
check_run(load_run_config(overrides=sys.argv[1:]))
print("torch" in sys.modules)
"""
    settings = ["train.steps=3", "train.precision=fp32", "device=cpu", "data.tokenizer=bytes", f"data.cache_dir={cache}", "train.threads=1"]
    result = subprocess.run([sys.executable, "-c", code, *settings], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "False"
