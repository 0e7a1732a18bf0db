"""Fine-tuning settles its micro-batch by the budget, lowers it when memory runs out, and loses nothing by that."""

import json
import shutil
from itertools import pairwise

import pytest
import torch

from lowmem.config.finetune import FinetuneConfig, finetune_problems, micro_batch_sizes
from lowmem.config.load import load_config
from lowmem.finetune.base_model import enable_checkpointing, load_base
from lowmem.finetune.methods import apply_method, parameter_groups
from lowmem.finetune.settle import choose_micro_batch, earlier_micro_batch
from lowmem.finetune.step import Stepper
from lowmem.finetune.train import finetune
from lowmem.system.errors import ConfigError, MemoryBudgetError
from lowmem.train.display import NullDisplay
from tests.engine.out_of_memory import MESSAGE, MemoryRunsOut, NothingLargerThan
from tests.finetune.tiny import CPU, make_config, packed

SIZES = [8, 4, 2, 1]


def make_stepper(config: FinetuneConfig, base) -> Stepper:
    """Always the same initial weights."""
    torch.manual_seed(0)
    model = apply_method(load_base(base, nf4=False), config, [])
    enable_checkpointing(model)
    return Stepper(model, parameter_groups(model, config), config, CPU)


def bits(stepper: Stepper) -> list[bytes]:
    """Trained numbers and optimizer states."""
    states = [value for state in stepper.optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return [tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in [*stepper.parameters, *states]]


def test_sizes_to_choose_from():
    assert micro_batch_sizes(FinetuneConfig(batch_size=8, seq_len=256)) == SIZES
    assert micro_batch_sizes(FinetuneConfig(batch_size=6, seq_len=1024)) == [3, 2, 1]
    assert micro_batch_sizes(FinetuneConfig(batch_size=8, seq_len=8192)) == [1]
    assert micro_batch_sizes(FinetuneConfig(batch_size=8, micro_batch_size=2)) == [2]
    assert micro_batch_sizes(FinetuneConfig(batch_size=8, seq_len=8192, update="layerwise")) == [8]


def test_the_largest_that_fits_the_budget_is_taken(base, chat, tmp_path, monkeypatch):
    monkeypatch.setattr("lowmem.finetune.memory.host_rss_bytes", lambda: 100 << 20)

    def settled(budget: int = 0, at_most: int = 0):
        more = [f"budget.ram={budget}B"] if budget else []
        config = make_config(base, chat, tmp_path, "batch_size=8", "seq_len=512", "gradient_checkpointing=false", *more)
        chosen, memory = choose_micro_batch(config, base, at_most=at_most)
        return chosen.micro_batch_size, memory

    peaks = {size: settled(at_most=size)[1].peak_bytes for size in SIZES}
    assert all(smaller < larger for larger, smaller in pairwise(peaks.values()))
    assert settled()[0] == 8
    for larger, smaller in pairwise(SIZES):
        assert settled(peaks[larger])[0] == larger
        assert settled(peaks[larger] - 1)[0] == smaller
    size, memory = settled(1 << 20)
    assert size == 1
    assert "1.0 MiB" in memory.missing(make_config(base, chat, tmp_path, "budget.ram=1.0 MiB"))


@pytest.mark.parametrize("more", [[], ["method=full", "optim.state_bits=8"], ["adapter.lora_dropout=0.2", "optim.clip=0.01"]])
def test_memory_that_runs_out_before_the_update_costs_a_smaller_micro_batch_and_nothing_else(more, base, chat, tmp_path):
    config = make_config(base, chat, tmp_path, "batch_size=4", "micro_batch_size=4", *more)
    small = make_config(base, chat, tmp_path, "batch_size=4", "micro_batch_size=2", *more)
    expected, whole = make_stepper(small, base), make_stepper(config, base)
    torch.manual_seed(1)
    results = [expected.step(packed(4), 0.01) for _ in range(2)]
    torch.manual_seed(1)
    with MemoryRunsOut() as counting:
        whole.step(packed(4), 0.01)
    for at in range(5, counting.count // 2, counting.count // 12):  # the first half has the forward pass and some of the backward one
        stepper = make_stepper(config, base)
        torch.manual_seed(1)
        with MemoryRunsOut(at) as failing:
            found = [stepper.step(packed(4), 0.01)]
        assert failing.failed
        found.append(stepper.step(packed(4), 0.01))
        assert found == results
        assert bits(stepper) == bits(expected), failing.failed
        assert stepper.messages == ["memory ran out with micro-batches of 4; going on with 2"]
        assert stepper.micro_batch_state() == {"size": 2, "failed": 4}


def test_an_evaluation_that_runs_out_of_memory_is_done_again(base, chat, tmp_path):
    config = make_config(base, chat, tmp_path, "batch_size=4", "micro_batch_size=4")
    stepper, expected = make_stepper(config, base), make_stepper(config, base)
    expected.set_micro_batch_size(2)
    with MemoryRunsOut(20) as failing:
        loss = stepper.evaluate([packed(4)])
    assert failing.failed
    assert loss == expected.evaluate([packed(4)])
    assert stepper.micro_batch_size == 2


@pytest.mark.parametrize(
    "update, message",
    [
        ("accumulate", r"with micro-batches of 1 sequence \(.*\), nothing smaller exists; use method=qlora, a shorter seq_len or a larger"),
        ("layerwise", r"while weights were updated.*; use batch_size=1, method=qlora, a shorter seq_len or a larger budget"),
    ],
)  # fmt: skip
def test_where_nothing_helps_one_line_says_what_would(update, message, base, chat, tmp_path):
    stepper = make_stepper(make_config(base, chat, tmp_path, f"update={update}"), base)
    before = bits(stepper)
    with NothingLargerThan(64), pytest.raises(MemoryBudgetError, match=message):
        stepper.step(packed(2), 0.01)
    assert bits(stepper) == before
    assert all(parameter.grad is None for parameter in stepper.parameters)


def test_a_resumed_run_goes_on_with_the_micro_batch_it_had(base, chat, tmp_path, monkeypatch):
    more = ["batch_size=4", "steps=4", "eval_every=0"]
    finetune(make_config(base, chat, tmp_path / "expected", *more, "micro_batch_size=2"), NullDisplay())
    usual, calls = Stepper._backward, []

    def once(self, batch):
        if self.device.type != "meta":  # which is the prediction
            calls.append(self.micro_batch_size)
            if self.micro_batch_size == 4:
                raise RuntimeError(MESSAGE)
        return usual(self, batch)

    monkeypatch.setattr(Stepper, "_backward", once)
    finetune(make_config(base, chat, tmp_path / "lowered", *more), NullDisplay())
    assert calls == [4, 2, 2, 2, 2]
    shutil.rmtree(tmp_path / "lowered/checkpoints/step-00000004")
    finetune(make_config(base, chat, tmp_path / "lowered", *more), NullDisplay())
    assert calls == [4, 2, 2, 2, 2, 2, 2]
    files = [tmp_path / name / "adapter/adapter_model.safetensors" for name in ("expected", "lowered")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_folder_remembers_what_was_settled(base, chat, tmp_path):
    config = make_config(base, chat, tmp_path, "steps=1", "batch_size=4")
    assert earlier_micro_batch(config, tmp_path) == 0
    finetune(config, NullDisplay())
    assert json.loads((tmp_path / "finetune.json").read_text())["micro_batch_size"] == 4
    assert earlier_micro_batch(config, tmp_path) == 4
    assert earlier_micro_batch(make_config(base, chat, tmp_path, "batch_size=4", "micro_batch_size=2", "steps=1"), tmp_path) == 0


@pytest.mark.parametrize("settings, message", [
    (["batch_size=8", "micro_batch_size=3"], r"micro_batch_size is 3, which does not divide batch_size \(8\)"),
    (["batch_size=8", "micro_batch_size=0"], "micro_batch_size is 0, must be at least 1"),
    (["batch_size=8", "micro_batch_size=2", "update=layerwise"], "leave micro_batch_size=auto, or use update=accumulate"),
])  # fmt: skip
def test_impossible_sizes_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        load_config(FinetuneConfig, "", ["base=b", "data=d", *settings], finetune_problems)
