"""`lowmem plan` as a user meets it. Base cost and rates are stubbed with fixed numbers, so that nothing is measured."""

import json
from dataclasses import asdict

import pytest

from lowmem.cli.main import main
from lowmem.config.load import load_run_config
from lowmem.planning.predict import predict_peak
from lowmem.planning.search import Plan
from lowmem.system.units import format_bytes, parse_bytes
from tests.planning.small import BASE_BYTES, ON_DISK, TINY, remember_predictions, small_config, stub_measurements

MIB = 1 << 20
MODEL = [
    f"--{setting}" for setting in (*TINY, "model.num_layers=1") if not setting.startswith(("device", "train.precision", "train.steps"))
]
ON_CPU = [*MODEL, "--device=cpu", "--train.precision=fp32"]


@pytest.fixture(scope="module", autouse=True)
def measurements():
    with pytest.MonkeyPatch.context() as patch:
        stub_measurements(patch)
        yield


@pytest.fixture(scope="module")
def remembered(measurements):
    with pytest.MonkeyPatch.context() as patch:
        remember_predictions(patch)
        yield


def plan(*arguments: str, ram: int = 60 * MIB) -> int:
    return main(["plan", *ON_CPU, f"--budget.ram={ram}B", *arguments])


def test_a_table_with_the_fastest_plan_first(remembered, capsys):
    assert plan() == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == "86,336 parameters"  # 2 * 257 * 64 + 4 * 64^2 + 3 * 64 * 192 + 3 * 64
    assert lines[1].split() == ["plan", "RAM", "VRAM", "disk", "tokens/s", "settings"]
    assert lines[2].startswith("fastest ")
    assert "micro_batch_size=4 activation_checkpointing=none update=accumulate state_bits=32 weight_dtype=fp32 precision=fp32" in lines[2]
    assert [line.split("  ")[0] for line in lines[3:6]] == ["other 1", "other 2", "other 3"]
    assert any(line.startswith("predicted peak of RAM: ") and "base cost measured" in line for line in lines)
    assert lines[-1].startswith("afterwards, writing 1 text of 32 tokens: ")


def test_json_is_one_object_on_standard_output(remembered, capsys):
    assert plan("--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["fits"] is True
    assert answer["missing_bytes"] == {}
    assert set(answer["plan"]) == {
        "config",
        "budget",
        "parameters",
        "trained_parameters",
        "parameters_by_component",
        "flops_per_token",
        "predicted",
    }
    assert answer["plan"]["predicted"]["host_peak_bytes"] <= 60 * MIB * 0.97
    assert len(answer["alternatives"]) == 3


def test_a_written_plan_is_a_configuration_that_pretrain_takes(remembered, tmp_path, capsys):
    path = tmp_path / "planned.yaml"
    assert plan("--json", f"--write={path}") == 0
    answer = json.loads(capsys.readouterr().out)
    text = path.read_text()
    assert text.startswith("# Written by lowmem plan.\n# parameters: 86,336\n# predicted peak of RAM: ")
    assert main(["pretrain", "--config", str(path), "--print_config"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    config = load_run_config(path)
    assert load_run_config(printed) == config
    for section in ("model", "train", "engine", "budget"):
        assert asdict(getattr(config, section)) == answer["plan"]["config"][section]
    assert main(["plan", f"--config={path}", "--json"]) == 0  # and it plans for itself
    assert json.loads(capsys.readouterr().out)["plan"]["config"]["train"] == answer["plan"]["config"]["train"]


def test_nothing_fits(remembered, tmp_path, capsys):
    path = tmp_path / "planned.yaml"
    ram = BASE_BYTES + 200_000
    assert plan("--budget.disk=0", f"--write={path}", ram=ram) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lowmem: error: nothing fits: the smallest plan lacks ")
    assert f"of RAM (budget {ram}B)" in captured.err
    assert "The nearest plans:\n" in captured.err
    nearest = captured.err.split("The nearest plans:\n")[1].splitlines()
    assert len([line for line in nearest if " of disk: micro_batch_size=" in line]) == 4
    assert "lowmem plan --solve=" in captured.err
    assert "Traceback" not in captured.err
    assert not path.exists()

    assert plan("--budget.disk=0", "--json", ram=ram) == 3
    answer = json.loads(capsys.readouterr().out)
    assert answer["fits"] is False
    peak = answer["plan"]["predicted"]["host_peak_bytes"]
    assert answer["missing_bytes"] == {"ram": round(peak - ram * 0.97)}


@pytest.mark.parametrize("arguments, code, expected", [
    (["--hardware=abacus"], 2, "--hardware is 'abacus'; known: t4, "),
    (["--budget.ram=1GiB", "--solve=model.heads"], 2, "--solve is 'model.heads'; allowed: model.dim, model.num_layers, "),
    (["--budget.ram=1GiB", "--model.dimm=64"], 2, "model.dimm is not a known key; the nearest valid key is model.dim"),
    (["--budget.ram=lots"], 2, "budget.ram: "),
    (["--budget.ram=1GiB", "--hardwear=t4"], 2, "hardwear is not a known key"),
    (["stray"], 2, "found 'stray'"),
    (["--config=nowhere.yaml"], 2, "nowhere.yaml does not exist"),
])  # fmt: skip
def test_mistakes_get_one_message_and_the_right_code(capsys, arguments, code, expected):
    assert main(["plan", *ON_CPU, *arguments]) == code
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("  ") or "lowmem: error: " in captured.err
    assert expected in captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err


def test_a_file_that_cannot_be_written(remembered, tmp_path, capsys):
    path = tmp_path / "missing" / "planned.yaml"
    assert plan(f"--write={path}") == 7
    assert f"--write={path} cannot be written (there is no folder {path.parent})" in capsys.readouterr().err


def test_solve_tells_the_largest_value(remembered, tmp_path, capsys):
    path = tmp_path / "planned.yaml"
    assert plan("--solve=model.num_layers", f"--write={path}", ram=BASE_BYTES + 6 * MIB) == 0
    lines = capsys.readouterr().out.splitlines()
    value = load_run_config(path).model.num_layers
    assert lines[0].startswith(f"model.num_layers={value} is the largest that fits: ")
    assert lines[1] == f"{value + 1} does not"
    assert plan("--solve=model.num_layers", "--json", ram=BASE_BYTES + 6 * MIB) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["key"], answer["value"], answer["next"]) == ("model.num_layers", value, value + 1)
    assert answer["predicted"]["host_peak_bytes"] <= (BASE_BYTES + 6 * MIB) * 0.97
    assert plan("--solve=model.num_layers", ram=BASE_BYTES) == 3
    assert "not even model.num_layers=1 fits: " in capsys.readouterr().err


def test_solve_plans_for_this_machine_without_a_budget(remembered, monkeypatch, capsys):
    from lowmem.planning.hardware import Hardware

    monkeypatch.setattr("lowmem.planning.hardware.this_hardware", lambda: Hardware(1 << 30, 0))
    assert main(["plan", *ON_CPU, "--solve=train.micro_batch_size"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "planning for 1.00 GiB of RAM, no GPU\n"
    assert "train.micro_batch_size=4 is the largest that fits" in captured.out
    assert "no larger value is allowed" in captured.out


def test_a_t4_computes_in_fp16_and_needs_not_be_here(capsys):
    arguments = ["--hardware=t4", "--train.global_batch_size=2", "--solve=train.micro_batch_size", "--json"]
    assert main(["plan", *MODEL, *arguments]) == 0
    captured = capsys.readouterr()
    config = json.loads(captured.out)["config"]
    assert (config["device"], config["train"]["precision"]) == ("cuda", "fp16")
    assert parse_bytes(config["budget"]["vram"]) == pytest.approx(14.2 * 2**30, abs=MIB)
    assert captured.err == "planning for 12.00 GiB of RAM, 14.20 GiB of VRAM, 60.00 GiB of disk, assumed\n"


def test_without_a_model_the_largest_of_a_few_that_fits_is_planned(monkeypatch, capsys):
    prediction, tried = predict_peak(small_config()), []

    def search(config):
        tried.append((config.model.dim, config.model.num_layers, config.data.seq_len))
        return Plan(prediction, len(tried) == 3, {"ram": 1})

    monkeypatch.setattr("lowmem.planning.search.plan", search)
    assert main(["plan", "--budget.ram=4GiB", "--budget.vram=0"]) == 0
    assert tried == [(1024, 12, 512), (512, 8, 512), (384, 4, 256)]
    captured = capsys.readouterr()
    assert "no model was given: planning for a 13M decoder" in captured.err
    assert f"RAM: {format_bytes(prediction.host.peak_bytes)}" in captured.out


def test_models_whose_weights_alone_are_too_much_are_not_searched(monkeypatch, capsys):
    prediction, tried = predict_peak(small_config("budget.ram=300MiB")), []

    def search(config):
        tried.append(config.model.dim)
        return Plan(prediction, False, {"ram": 1})

    monkeypatch.setattr("lowmem.planning.search.plan", search)
    assert main(["plan", "--budget.ram=300MiB", "--budget.vram=0"]) == 3
    assert tried == [384, 256]  # 3 * 58M and 250 MB of any process are more than 300 MiB
    assert "nothing fits: the smallest plan lacks 1 B of RAM (budget 300MiB)" in capsys.readouterr().err


def test_steps_are_taken_instead_of_tokens(remembered, capsys):
    assert plan("--train.steps=3", "--solve=train.micro_batch_size", "--json") == 0
    train = json.loads(capsys.readouterr().out)["config"]["train"]
    assert (train["steps"], train["tokens"]) == (3, 0)


def test_a_budget_of_disk_decides_how_many_layers(remembered, capsys):
    on_disk = [f"--{setting}" for setting in ON_DISK]
    arguments = ["--solve=model.num_layers", "--budget.disk=6MiB", *on_disk]
    assert plan(*arguments) == 0
    captured = capsys.readouterr()
    assert " of RAM and " in captured.out
    assert " of disk\n" in captured.out
    assert captured.err == ""
    assert plan(*arguments[:2]) == 0
    assert "with blocks on a disk there may be more: --solve=model.num_layers --train.weights_at=disk" in capsys.readouterr().err


def test_named_hardware_sets_budgets_and_rates(remembered, monkeypatch, capsys):
    from lowmem.planning.hardware import planned_hardware

    seen = []

    def search(config):
        seen.append((config.budget, planned_hardware()))
        return Plan(predict_peak(small_config()), True, {})

    monkeypatch.setattr("lowmem.planning.search.plan", search)
    assert main(["plan", *MODEL, "--hardware=rtx4060", "--budget.ram=30GiB"]) == 0
    budget, hardware = seen[0]
    assert (budget.ram, parse_bytes(budget.vram) >> 20, budget.disk) == ("30GiB", 7372, "204800MiB")
    assert hardware.storage.source == "assumed"
    assert planned_hardware() is None


def test_with_a_disk_larger_models_are_tried(monkeypatch, capsys):
    tried = []

    def search(config):
        tried.append(config.model.dim)
        return Plan(predict_peak(small_config()), True, {})

    monkeypatch.setattr("lowmem.planning.search.plan", search)
    assert main(["plan", "--budget.ram=4GiB", "--budget.vram=0", "--budget.disk=40GiB"]) == 0
    assert main(["plan", "--budget.ram=4GiB", "--budget.vram=0", "--budget.disk=100GiB"]) == 0
    assert main(["plan", "--budget.ram=4GiB", "--budget.vram=0", "--budget.disk=0"]) == 0
    assert tried == [2048, 4096, 1024]
    assert "planning for a 6.7B decoder" in capsys.readouterr().err


def test_help_names_the_options(capsys):
    assert main(["plan", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("--hardware", "--solve", "--write", "--json"))
