"""The DeepSpeed engine in real launches, on one rank and on two: the local engine's numbers, exact resume, skipped steps."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lowmem.engine.local import LocalEngine
from tests.engine.deepspeed_cases import CONFIGS, case, compare_checkpoints
from tests.engine.deepspeed_worker import GLOBAL_BATCH, launch, make_batch, make_model, run_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]

FILES = ["zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]
FLAT_FILES = ["zero1", "zero2_offload", "zero3", "zero3_offload"]
STEPS = list(range(20))
LOW_BIT: list[dict[str, Any]] = [
    {"name": "adamw", "lr": 1e-2, "state_bits": 8}, {"name": "adamw", "lr": 1e-2, "state_bits": 4},
    {"name": "lion", "lr": 1e-3, "state_bits": 8},
]  # fmt: skip
# Half of the smallest matrix still has 4096 numbers, from which states are narrow, and no partition is a whole number of blocks. No row is,
# either, so that where 4 bits are asked for states have 8.
LOW_BIT_DIM = 130
# fp32 sums of at most 48 tokens (times 67 classes) in another order: 48 * 2**-24 = 3e-6 in the loss and in each gradient. AdamW turns
# a relative error of a gradient into at most twice that of an update of at most lr = 1e-2, so 20 steps move a weight by
# 20 * 2 * 3e-6 * 1e-2 = 1.2e-6; in random directions that changes the loss by |gradient| * 1.2e-6 = 1.5e-6 of 4.4. DeepSpeed's
# clipping adds 1e-6 to the norm it divides by. Together below 1e-5; a wrong weight of one micro-batch shows as 1e-2.
TOLERANCE = 1e-5


def local_steps(of: dict[str, Any]) -> tuple[list[tuple[float, float]], float]:
    config = run_config({**of, "engine": {}})
    engine = LocalEngine(make_model(of), config.optim, device=torch.device("cpu"), precision="fp32", micro_batch_size=GLOBAL_BATCH)
    results = [engine.step(make_batch(step), config.optim.lr * (1 + step) / 20) for step in of["steps"]]
    return [(result.loss, result.grad_norm) for result in results], engine.evaluate([make_batch(1000), make_batch(1001).rows(0, 3)])


def check_equal_to_local(found: dict[str, Any], of: dict[str, Any]) -> None:
    expected, val_loss = local_steps(of)
    assert [skipped for _, _, skipped in found["steps"]] == [""] * len(expected)
    for (loss, norm, _), (local_loss, local_norm) in zip(found["steps"], expected, strict=True):
        assert loss == pytest.approx(local_loss, rel=TOLERANCE)
        assert norm == pytest.approx(local_norm, rel=TOLERANCE)
    assert found["val_loss"] == pytest.approx(val_loss, rel=TOLERANCE)


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_zero_file_computes_what_the_local_engine_computes(tmp_path: Path, ranks: int) -> None:
    cases = [case(file, "fp32", steps=STEPS) for file in FILES]
    for found in launch(cases, tmp_path, ranks):
        for one in cases:
            check_equal_to_local(found[one["name"]], one)
            assert found[one["name"]]["any_rank"] == [True, False]


@pytest.mark.parametrize("ranks", [1, 2])
def test_narrow_states_follow_the_local_engine_as_closely_as_they_follow_32_bits(tmp_path: Path, ranks: int) -> None:
    """Blocks and random numbers of a flat partition are others than those of its tensors, so states round differently.

    The two engines are then two runs of the 32-bit training with independent rounding errors of the same size. The local engine
    shows that size as its distance from 32 bits; the distance of the two from each other is at most twice as much.
    """
    cases = [
        case(file, f"{optim['name']}{optim['state_bits']}", steps=STEPS, dim=LOW_BIT_DIM, optim=optim)
        for file in FLAT_FILES for optim in LOW_BIT
    ]  # fmt: skip
    found = launch(cases, tmp_path, ranks)[0]
    for optim in LOW_BIT:
        wide = losses_of_local_engine(optim | {"state_bits": 32})
        narrow = losses_of_local_engine(optim)
        rounding = distance(narrow, wide)
        assert 0 < rounding < 0.01 * wide[0]
        for one in (one for one in cases if one["optim"] is optim):
            losses = [*(loss for loss, _, _ in found[one["name"]]["steps"]), found[one["name"]]["val_loss"]]
            assert 0 < distance(losses, narrow) <= 2 * rounding, one["name"]


def losses_of_local_engine(optim: dict[str, Any]) -> list[float]:
    steps, val_loss = local_steps({"steps": STEPS, "dim": LOW_BIT_DIM, "optim": optim})
    return [*(loss for loss, _ in steps), val_loss]


def distance(losses: list[float], others: list[float]) -> float:
    return max(abs(loss - other) for loss, other in zip(losses, others, strict=True))


@pytest.mark.parametrize("ranks", [1, 2])
def test_narrow_states_under_offload_take_the_bytes_of_their_format(tmp_path: Path, ranks: int) -> None:
    """Matrices and embeddings divided among ranks: codes and a scale per 128; norms and biases: 32 bits, as without ZeRO."""
    cases = [case("zero2_offload", f"{o['name']}{o['state_bits']}", steps=[0], dim=256, optim=o) for o in LOW_BIT]
    sizes = [parameter.numel() for parameter in make_model({"dim": 256}).parameters()]
    # first.weight, second and head decay; the embedding does not
    small, large = sum(size for size in sizes if size < 4096), [2 * 256 * 256 + 67 * 256, 67 * 256]
    assert small + sum(large) == sum(sizes)
    for found in launch(cases, tmp_path, ranks):
        for optim in LOW_BIT:
            bits, states = optim["state_bits"], {"adamw": 2, "lion": 1}[optim["name"]]
            per_state = 4 * small // ranks + sum(math.ceil(size // ranks / 128) * (128 * bits // 8 + 4) for size in large)
            measured = found[f"zero2_offload-{optim['name']}{bits}"]["memory"]["optimizer_states"]
            assert measured == states * per_state
            assert measured <= {8: 1.05, 4: 0.55}[bits] * states * sum(sizes) / ranks


def test_narrow_states_under_offload_compile_none_of_deepspeeds_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "operators"))
    launch([case("zero2_offload", "fresh", steps=[0], optim=LOW_BIT[0])], tmp_path / "out", ranks=1)
    assert not list(tmp_path.glob("operators/**/*.so"))


def test_memory_components_shrink_with_the_stage(tmp_path: Path) -> None:
    cases = [case(file, "memory", steps=[0]) for file in ("zero0", "zero1", "zero2", "zero3")]
    found = launch(cases, tmp_path, ranks=2)[0]
    memory = {one["name"].split("-")[0]: found[one["name"]]["memory"] for one in cases}
    weights = sum(parameter.numel() * 4 for parameter in make_model({}).parameters())
    states = {file: components["optimizer_states"] for file, components in memory.items()}
    assert memory["zero0"]["weights"] == weights == memory["zero0"]["gradients"]
    assert states["zero0"] >= 2 * weights > states["zero1"] >= weights  # two moments each; step counters are a few bytes
    assert memory["zero2"]["gradients"] < memory["zero1"]["gradients"]
    assert memory["zero3"]["weights"] < memory["zero2"]["weights"]


def test_decoders_with_tied_head_recomputation_and_low_rank_under_zero_3(tmp_path: Path) -> None:
    zero3 = json.loads((CONFIGS / "zero3.json").read_text())
    zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # gather even the smallest parameter
    path = tmp_path / "zero3.json"
    path.write_text(json.dumps(zero3))
    one = {"name": "decoder", "engine": {"config": str(path)}, "steps": STEPS[:5], "activation_checkpointing": "block"}
    one["model"] = {"dim": 32, "num_layers": 2, "num_heads": 2, "tie_embeddings": True}
    lorpt = {"rank": 4, "targets": ["attention", "mlp", "head"], "bottleneck": "silu"}
    low_rank = {**one, "name": "low rank", "activation_checkpointing": "none"}
    low_rank["model"] = {"dim": 32, "num_layers": 2, "num_heads": 2, "lorpt": lorpt}
    for found in launch([one, low_rank], tmp_path / "out", ranks=2):
        check_equal_to_local(found["decoder"], one)
        check_equal_to_local(found["low rank"], low_rank)


RESUMED = [
    *((file, {}) for file in FILES),
    ("zero2_offload", {"optim": {"name": "lion", "lr": 1e-3}}),
    ("zero3", {"optim": {"name": "lion", "lr": 1e-3}}),
    ("zero1", {"optim": {"state_bits": 8, "backend": "bitsandbytes"}, "dim": 96}),
    ("zero3", {"optim": {"state_bits": 8, "backend": "bitsandbytes"}, "dim": 96}),
    *((file, {"optim": optim, "dim": LOW_BIT_DIM}) for file in FLAT_FILES for optim in LOW_BIT),
    ("zero1", {"optim": LOW_BIT[0], "dim": LOW_BIT_DIM, "train": {"precision": "bf16"}}),
    ("zero2_offload", {"optim": LOW_BIT[1], "dim": LOW_BIT_DIM, "train": {"precision": "bf16"}}),
    ("zero0", {"optim": LOW_BIT[1], "dim": LOW_BIT_DIM, "train": {"precision": "bf16", "weight_dtype": "bf16"}}),
    *((file, {"train": {"precision": "bf16"}}) for file in FILES[1:]),
    ("zero0", {"train": {"precision": "bf16", "weight_dtype": "bf16"}}),
    ("zero0", {"train": {"precision": "bf16"}}),  # last: DeepSpeed remembers autocast for the whole process
]


@pytest.mark.parametrize("ranks", [1, 2])
def test_resumed_run_is_bit_identical(tmp_path: Path, ranks: int) -> None:
    chosen = RESUMED if ranks > 1 else RESUMED[::3]  # one rank runs the same code with nobody to talk to: every third is enough there
    straight = [
        case(file, f"{i}-straight", steps=[0, 1, 2, 3], save=str(tmp_path / f"{i}-straight"), **o) for i, (file, o) in enumerate(chosen)
    ]
    halves = [case(file, f"{i}-half", steps=[0, 1], save=str(tmp_path / f"{i}-half"), **o) for i, (file, o) in enumerate(chosen)]
    resumed = [
        case(file, f"{i}-resumed", steps=[2, 3], load=str(tmp_path / f"{i}-half"), save=str(tmp_path / f"{i}-resumed"), **o)
        for i, (file, o) in enumerate(chosen)
    ]
    interleaved = [one for pair in zip(straight, halves, strict=True) for one in pair]
    first = launch(interleaved, tmp_path / "first", ranks, timeout_s=400)
    second = launch(resumed, tmp_path / "second", ranks, timeout_s=400)
    for rank in range(ranks):
        for before, after in zip(straight, resumed, strict=True):
            one, other = first[rank][before["name"]], second[rank][after["name"]]
            assert one["steps"][2:] == other["steps"], after["name"]
            assert one["random"] == other["random"], after["name"]
            assert one["val_loss"] == other["val_loss"], after["name"]
            assert one["memory"] == other["memory"], after["name"]
            # below stage 3 every rank holds all weights, which the ranks must round alike
            assert one["weights_sha256"] == first[0][before["name"]]["weights_sha256"], before["name"]
    for index in range(len(chosen)):
        compare_checkpoints(tmp_path / f"{index}-straight", tmp_path / f"{index}-resumed")


def test_saved_weights_are_whole_fp32_and_named_as_in_the_module(tmp_path: Path) -> None:
    cases = [case(file, "save", steps=[0, 1], save=str(tmp_path / file), train={"precision": "bf16"}) for file in ("zero2", "zero3")]
    launch(cases, tmp_path / "out", ranks=2)
    expected = {name: tuple(tensor.shape) for name, tensor in make_model({}).state_dict().items()}
    for file in ("zero2", "zero3"):
        weights = load_file(tmp_path / file / "model.safetensors")
        assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == expected
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        # the master copy, not the 16-bit weights widened
        assert not torch.equal(weights["head.weight"], weights["head.weight"].bfloat16().float())


@pytest.mark.parametrize("ranks", [1, 2])
def test_bad_steps_leave_no_trace(tmp_path: Path, ranks: int) -> None:
    """An infinite loss, NaN gradients, both, each on the last rank only: every rank skips, and training goes on as if nothing was."""
    files = [*FILES[1:], FILES[0]]
    variants = [(file, precision) for file in files for precision in ("fp32", "bf16")]
    clean = [
        case(file, f"{precision}-clean", steps=[0, 1, 5], save=str(tmp_path / f"{file}-{precision}-clean"), train={"precision": precision})
        for file, precision in variants
    ]
    bad = [
        case(
            file, f"{precision}-bad", steps=[0, 2, 1, 3, 4, 5], poison={"2": "loss", "3": "gradient", "4": "both"},
            save=str(tmp_path / f"{file}-{precision}-bad"), train={"precision": precision},
        )
        for file, precision in variants
    ]  # fmt: skip
    for found in launch([*clean, *bad], tmp_path / "out", ranks):
        for good_case, bad_case in zip(clean, bad, strict=True):
            good, steps = found[good_case["name"]]["steps"], found[bad_case["name"]]["steps"]
            assert [skipped for _, _, skipped in steps] == ["", "nonfinite", "", "nonfinite", "nonfinite", ""]
            assert [steps[0], steps[2], steps[5]] == good
    for file, precision in variants:
        compare_checkpoints(tmp_path / f"{file}-{precision}-clean", tmp_path / f"{file}-{precision}-bad")
