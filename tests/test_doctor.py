import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lowmem.cli import doctor
from lowmem.cli.doctor import doctor_main, examine
from lowmem.system.errors import ConfigError

GIB = 2**30
PARTS = ("cpu", "cuda", "memory", "disk", "libraries", "compiler", "kernels", "block_cache", "deepspeed")
PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


@pytest.fixture
def good_machine(monkeypatch):
    """Reports of a machine on which nothing is slow; the test breaks one part."""
    gpu = {
        "index": 0, "name": "Test GPU", "capability": "9.0", "total_bytes": 80 * GIB, "used_bytes": GIB,
        "native_bf16": True, "native_fp8": True, "problem": "",
    }  # fmt: skip
    reports = {
        "cpu": {
            "model": "Test CPU", "architecture": "x86_64", "usable_cores": 16, "logical_cores": 16, "physical_cores": 8,
            "torch_threads": 8, "instructions": ["AVX2", "AVX-512 BF16"], "native_bf16": True,
        },
        "cuda": {"problem": "", "torch_cuda": "13.0", "nvidia_driver": True, "devices": [gpu]},
        "memory": {
            "ram_total_bytes": 64 * GIB, "ram_available_bytes": 60 * GIB, "swap_total_bytes": 0, "swap_used_bytes": 0,
            "cgroup_limit_bytes": None, "usable_bytes": 60 * GIB,
        },
        "disk": [{"purpose": "working directory", "path": "/w", "free_bytes": 100 * GIB}],
        "libraries": [{"name": "torch", "version": "2", "extra": "", "purpose": "tensors", "install": None}],
        "compiler": {"cxx": "/usr/bin/c++"},
        "kernels": {"instructions": "avx512", "problem": ""},
        "block_cache": {"problem": ""},
        "deepspeed": {"installed": True, "operators": {"cpu_adam": "built"}},
    }  # fmt: skip
    reports = copy.deepcopy(reports)
    for name in PARTS:
        monkeypatch.setattr(doctor, f"{'library' if name == 'libraries' else name}_report", lambda name=name: reports[name])
    return reports


def test_nothing_to_say_about_a_good_machine(good_machine, capsys):
    assert examine()["notes"] == []
    assert doctor_main([]) == 0
    text = capsys.readouterr().out
    assert "Test GPU, 80.00 GiB, 1.00 GiB in use, compute capability 9.0, bf16: native, fp8: native" in text
    assert "nothing found" in text


@pytest.mark.parametrize(
    ("part", "changes", "note"),
    [
        ("cpu", {"instructions": []}, "no AVX2"),
        ("cpu", {"usable_cores": 4}, "may use 4 of 16 cores"),
        ("cuda", {"problem": "PyTorch finds no CUDA device", "devices": []}, "no GPU is used: PyTorch finds no CUDA device"),
        ("cuda", {"problem": "built without CUDA", "torch_cuda": None, "devices": []}, "install a CUDA build of torch"),
        ("memory", {"cgroup_limit_bytes": 8 * GIB}, "may use 8.00 GiB of 64.00 GiB"),
        ("memory", {"usable_bytes": 2 * GIB}, "2.00 GiB of RAM are free"),
        ("memory", {"swap_used_bytes": 61 * GIB}, "61.00 GiB are in swap and only 60.00 GiB"),
        ("block_cache", {"problem": "the cache of memory blocks does not compile"}, "memory blocks does not compile"),
        ("kernels", {"problem": "lowmem's CPU optimizer kernels are not compiled"}, "optimizer kernels are not compiled"),
        (
            "deepspeed",
            {"operators": {"cpu_adam": "not built"}},
            "about two minutes; beforehand: python -m lowmem.engine.deepspeed.operators",
        ),
    ],
)
def test_what_is_slow_is_named_with_its_numbers(part, changes, note, good_machine):
    good_machine[part].update(changes)
    assert any(note in found for found in examine()["notes"]), examine()["notes"]


def test_a_cpu_only_machine_without_bf16(good_machine):
    good_machine["cuda"].update(problem="none", devices=[])
    good_machine["cpu"].update(native_bf16=False, usable_cores=2, logical_cores=2)
    notes = "\n".join(examine()["notes"])
    assert "train.precision=auto computes in fp32" in notes
    assert "2 usable cores" in notes


def test_an_old_gpu_a_full_disk_and_no_compiler(good_machine):
    good_machine["cuda"]["devices"][0].update(native_bf16=False, name="T4")
    good_machine["disk"][0]["free_bytes"] = GIB
    good_machine["compiler"]["cxx"] = None
    good_machine["deepspeed"]["operators"]["cpu_adam"] = "cannot be built"
    good_machine["libraries"][0].update(version=None, install="pip install lowmem")
    notes = "\n".join(examine()["notes"])
    for expected in ("(T4) has no native bf16: train.precision=auto computes in fp16", "1.00 GiB are free for the working directory (/w)",
                     "no C++ compiler", "torch missing"):  # fmt: skip
        assert expected in notes


@pytest.mark.parametrize("part", PARTS)
def test_a_probe_that_fails_stops_nothing(part, good_machine, monkeypatch, capsys):
    def fail():
        raise OSError("strange machine")

    monkeypatch.setattr(doctor, f"{'library' if part == 'libraries' else part}_report", fail)
    assert doctor_main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report[part] == {"error": "OSError: strange machine"}
    assert all("error" not in report[other] for other in PARTS if other != part)
    assert doctor_main([]) == 0
    assert "could not be determined (OSError: strange machine)" in capsys.readouterr().out


def test_the_real_machine_in_json_and_nothing_else_on_stdout():
    result = subprocess.run(
        [sys.executable, "-c", "import sys; from lowmem.cli.doctor import doctor_main; sys.exit(doctor_main(['--json']))"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    report = json.loads(result.stdout)
    assert {name: report[name] for name in PARTS if "error" in report[name]} == {}
    assert 1 <= report["cpu"]["usable_cores"] <= report["cpu"]["logical_cores"]
    assert 0 < report["memory"]["usable_bytes"] <= report["memory"]["ram_total_bytes"]
    assert all(disk["free_bytes"] > 0 for disk in report["disk"])
    for row in report["libraries"]:
        assert (row["version"] is None) == (row["install"] is not None)


def test_libraries_and_extras_are_those_of_the_package():
    text = PYPROJECT.read_text(encoding="utf-8")
    for name, extra, _ in doctor.LIBRARIES:
        # an extra is one line; the dependencies are several, up to a bracket alone on a line
        pattern = rf"^{extra} = \[(.*)\]$" if extra else r"^dependencies = \[\n((?:    .*\n)+)\]$"
        block = re.search(pattern, text, re.MULTILINE)
        found = block is not None and re.search(rf'"{name}[\[><=]', block[1]) is not None
        assert found, f"{name} is not in {extra or 'the dependencies'}"


def test_unknown_options_are_refused():
    with pytest.raises(ConfigError, match="lowmem doctor: unrecognized arguments: --fix; see lowmem doctor --help"):
        doctor_main(["--fix"])
