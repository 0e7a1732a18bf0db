"""Settings that save memory: which there are, that each saves where it should, and what is missing from a budget."""

from dataclasses import replace

import pytest

from lowmem.config.checks import config_problems
from lowmem.planning.allocators import Peaks
from lowmem.planning.hardware import GIB, NAMED, Hardware, describe, named_hardware, this_hardware
from lowmem.planning.levers import changed, get_key, lever, levers, missing_bytes, refusal, set_key, sizes
from lowmem.planning.predict import predict_peak
from lowmem.system.errors import ConfigError
from lowmem.system.units import format_bytes
from tests.planning.small import BASE_BYTES, ON_DISK, small_config, stub_measurements


@pytest.fixture(autouse=True)
def measurements(monkeypatch):
    stub_measurements(monkeypatch)


BY_BLOCKS = "--train.update=layerwise --train.activation_checkpointing=block"
ON_A_DISK = f"--train.weights_at=disk --train.boundary_offload=disk {BY_BLOCKS}"
IN_HOST_MEMORY = f"--train.weights_at=host --train.boundary_offload=cpu {BY_BLOCKS}"


def texts(*settings: str) -> list[str]:
    return [candidate.text for candidate in levers(small_config(*settings))]


def test_every_lever_that_is_not_in_force_is_there():
    assert texts("train.precision=bf16") == [
        "--train.micro_batch_size=1",
        "--train.activation_checkpointing=block",
        "--train.update=layerwise --train.activation_checkpointing=block",
        "--optim.state_bits=8 --optim.backend=lowmem",
        "--optim.state_bits=4 --optim.backend=lowmem",
        "--train.precision=bf16 --train.weight_dtype=bf16",
        "--train.loss_chunk_tokens=256",
        ON_A_DISK,
    ]


def test_what_is_in_force_or_impossible_is_not_offered():
    strictest = [
        "train.micro_batch_size=1", "train.update=layerwise", "train.activation_checkpointing=block", "optim.state_bits=4",
        "train.loss_chunk_tokens=256",
    ]  # fmt: skip
    more = "--optim.state_bits=8 --optim.backend=lowmem"  # more memory, which the refusal finds out
    assert texts(*strictest) == [more, ON_A_DISK]
    assert texts(*strictest, "budget.disk=0") == [more]
    assert texts(*strictest, "train.weights_at=disk", "train.boundary_offload=disk") == [more]
    assert IN_HOST_MEMORY not in texts()
    assert {IN_HOST_MEMORY, ON_A_DISK} < set(texts("device=cuda", "train.precision=bf16"))
    assert not any("weight_dtype" in text for text in texts("train.precision=fp32"))
    zero = texts("engine.name=deepspeed", "engine.zero_stage=1", "train.precision=bf16")
    assert "--engine.offload=cpu --engine.zero_stage=2" in zero
    assert not any("layerwise" in text or "weights_at" in text for text in zero)  # ZeRO needs whole gradients
    assert not any("weight_dtype=fp16" in text for text in texts("device=cuda", "train.precision=fp16"))  # needs layerwise updates


@pytest.mark.parametrize("settings", [["train.precision=bf16"], ["engine.name=deepspeed", "engine.zero_stage=1"]])
def test_levers_are_sound_and_leave_the_configuration_alone(settings):
    config = small_config(*settings)
    for candidate in levers(config):
        other = changed(config, candidate)
        assert config_problems(other) == []
        for word in candidate.text.split():
            key, _, value = word.removeprefix("--").partition("=")
            assert str(get_key(other, key)) == value
    assert config == small_config(*settings)


def test_keys_are_set_and_read():
    config = small_config()
    set_key(config, "model.lorpt.rank", 8)
    set_key(config, "run_dir", "elsewhere")
    assert (get_key(config, "model.lorpt.rank"), config.run_dir) == (8, "elsewhere")
    assert lever(train__seed=3, optim__lr=0.5).text == "--train.seed=3 --optim.lr=0.5"
    assert list(sizes(12)) == [12, 6, 4, 3, 2, 1]


def test_missing_bytes_are_those_beyond_the_budget_less_its_margin():
    prediction = predict_peak(small_config("device=cuda", "train.precision=bf16", "budget.ram=40MiB", "budget.vram=8MiB"))
    vram, ram = prediction.cuda_reserved.peak_bytes, prediction.host.peak_bytes
    assert missing_bytes(prediction, margin=0) == {"ram": ram - (40 << 20), "vram": vram - (8 << 20)}
    assert missing_bytes(prediction, margin=0.5) == {"ram": ram - (20 << 20), "vram": vram - (4 << 20)}
    prediction.config.budget.ram, prediction.config.budget.vram = f"{ram}B", ""
    assert missing_bytes(prediction, margin=0) == {}
    assert missing_bytes(prediction, margin=0.03) == {"ram": round(ram - ram * 0.97)}


def test_a_refusal_names_need_budget_components_and_the_largest_saving():
    config = small_config("model.dim=96", "budget.ram=52MiB", "train.micro_batch_size=1", "model.vocab_size=600")
    prediction = predict_peak(config)
    paragraph = refusal(prediction)
    assert paragraph.startswith(f"the run needs {format_bytes(prediction.host.peak_bytes)} (base 50 MiB, ")
    savings = {x.text: prediction.host.peak_bytes - predict_peak(changed(prediction.config, x)).host.peak_bytes for x in levers(config)}
    best = max(savings, key=savings.__getitem__)
    assert f") of RAM, the budget is 52MiB. Largest saving: {best} (-{format_bytes(savings[best])}). " in paragraph
    assert paragraph.endswith("See: lowmem plan")
    assert refusal(predict_peak(small_config(f"budget.ram={BASE_BYTES + (8 << 20)}B"))) == ""


def test_named_hardware_and_this_machine():
    assert named_hardware("t4").vram_bytes == round(14.2 * GIB)
    assert not named_hardware("t4").bf16
    assert all(hardware.ram_bytes >= 3 * GIB for hardware in NAMED.values())
    with pytest.raises(ConfigError, match="--hardware is 'z9'; known: t4, .*laptop-16; or give --budget.ram"):
        named_hardware("z9")
    here = this_hardware()
    assert here.ram_bytes > 100 << 20
    assert describe(Hardware(3 * GIB, 0)) == "3.00 GiB of RAM, no GPU"
    assert describe(named_hardware("t4")) == "12.00 GiB of RAM, 14.20 GiB of VRAM, 60.00 GiB of disk, assumed"


@pytest.mark.parametrize("room, disk, named", [
    (25, "", "--optim.state_bits=8 --optim.backend=lowmem (-30 MiB)"), (50, "", ON_A_DISK + " (-60 MiB)"),
    (50, "4GiB", ON_A_DISK + " (-60 MiB)"), (50, "0", "--optim.state_bits=8 --optim.backend=lowmem (-30 MiB)"),
    (50, "1MiB", "--optim.state_bits=8 --optim.backend=lowmem (-30 MiB)"),
])  # fmt: skip
def test_blocks_elsewhere_are_named_where_nothing_else_is_enough_and_the_disk_has_room(room, disk, named, monkeypatch):
    """A run of 100 MiB that needs `room` less; 8-bit states save 30 MiB, a disk 60."""
    whole = predict_peak(small_config(f"budget.disk={disk}", f"budget.ram={100 - room}MiB"))

    def predict(config, *more):
        saved = 60 if config.train.weights_at == "disk" else 30 if config.optim.state_bits == 8 else 0
        scratch = {"scratch": 8 << 20} if config.train.weights_at == "disk" else {}
        return replace(whole, config=config, host=Peaks({"steady_steps": (100 - saved) << 20}), disk=scratch)

    monkeypatch.setattr("lowmem.planning.levers.predict_peak", predict)
    assert f"Largest saving: {named}. " in refusal(predict(whole.config))


def test_a_budget_of_disk_is_refused_with_both_figures(monkeypatch):
    config = small_config(*ON_DISK, "model.num_layers=2", "train.steps=1000", "budget.disk=1MiB")
    prediction = predict_peak(config)
    assert prediction.disk_bytes == prediction.disk["scratch"] + prediction.disk["checkpoints"]
    assert missing_bytes(prediction) == {"disk": prediction.disk_bytes - (1 << 20)}
    prediction.config.budget.disk = f"{prediction.disk_bytes}B"
    assert missing_bytes(prediction) == {}  # no margin: sizes on disks are exact
    prediction.config.budget.disk = "1MiB"
    saved = prediction.disk_bytes - (1 << 20)
    monkeypatch.setattr(
        "lowmem.planning.levers.predict_peak", lambda config, *more: replace(prediction, config=config, disk=one_less(prediction, config))
    )
    paragraph = refusal(prediction)
    assert paragraph.startswith(f"the run needs {format_bytes(prediction.disk_bytes)} (checkpoints ")
    assert f") of disk, the budget is 1MiB. Largest saving: --train.keep_last=1 (-{format_bytes(saved)}). " in paragraph
    assert any(line.startswith("predicted use of disks: ") for line in prediction.lines())
    assert prediction.report()["predicted"]["disk_components"] == prediction.disk


def one_less(prediction, config) -> dict[str, int]:
    return prediction.disk if config.train.keep_last > 1 else {"checkpoints": 1 << 20}


def test_no_disk_and_blocks_on_it_contradict_each_other():
    with pytest.raises(ConfigError, match=r"budget.disk is 0 \(no disk\), but train.weights_at is disk"):
        small_config(*ON_DISK, "budget.disk=0")
    with pytest.raises(ConfigError, match="but train.boundary_offload is disk"):
        small_config("train.update=layerwise", "train.boundary_offload=disk", "budget.disk=0")


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="--hardware is 'RTX 4060'; the nearest is rtx4060; known: t4, .* or give --budget.ram"):
        named_hardware("RTX 4060")
