"""Peaks by phase and by component of hand-made traces, and loops that are cut short against loops that are not."""

import sys

import pytest

from lowmem.planning.allocators import CudaAllocator, HostAllocator, Peaks, live_peaks, replay
from lowmem.planning.predict import resolve_without_data
from lowmem.planning.trace import Storage, Trace, trace_run
from tests.planning.small import I3, LAYERWISE, small_config

MIB = 1 << 20


class Exact:
    """An allocator that takes what it is asked for."""

    def __init__(self):
        self.sizes, self.total = {}, 0

    def allocate(self, key, size):
        self.sizes[key] = size
        self.total += size

    def release(self, key):
        self.total -= self.sizes.pop(key)

    def release_kept(self):
        pass


def made(*steps: tuple[str, int, str] | int | str) -> Trace:
    """(category, size, ...) allocates, a number releases, a name begins a phase."""
    trace = Trace()
    for step in steps:
        if isinstance(step, str):
            trace.phases.append((step, len(trace.events)))
        elif isinstance(step, int):
            trace.events.append(~step)
        else:
            trace.events.append(len(trace.storages))
            trace.storages.append(Storage(step[1], (step[1],), False, step[0]))
    return trace


HAND_MADE = [
    "load", ("weights", 100), ("workspace", 30), 1,
    "first_step", ("activations", 50), ("activations", 40), ("gradients", 100), 2, 3, ("workspace", 20),
    "evaluation", 4, 5, ("activations", 10),
    "save",
]  # fmt: skip


def test_each_phase_has_its_peak_and_the_fullest_moment_has_its_components():
    peaks = replay(made(*HAND_MADE), Exact(), {"all": "total"})["all"]
    assert peaks.by_phase == {"load": 130, "first_step": 290, "evaluation": 120, "save": 110}
    assert peaks.peak_bytes == 290
    assert peaks.components == {"weights": 100, "activations": 90, "gradients": 100, "workspace": 0}
    assert live_peaks(made(*HAND_MADE), {"activations", "workspace"}) == {"load": 30, "first_step": 90, "evaluation": 20}


def test_what_an_allocator_adds_is_workspace_and_components_sum_to_the_peak():
    trace = made("load", ("weights", MIB + 1), ("activations", 3 * MIB), "first_step", 1, ("workspace", 100))
    peaks = replay(trace, CudaAllocator(), {"allocated": "allocated_bytes", "reserved": "reserved_bytes"})
    assert peaks["reserved"].by_phase == {"load": 20 * MIB, "first_step": 22 * MIB}
    assert peaks["allocated"].by_phase["load"] == 4 * MIB + 512
    assert peaks["reserved"].components["weights"] == MIB + 1
    for measure in peaks.values():
        assert sum(measure.components.values()) == measure.peak_bytes
    assert sum(replay(trace, HostAllocator(), {"host": "resident_bytes"})["host"].components.values()) == 4 * MIB + 4096 + 192


def test_what_loading_left_is_released_before_the_first_step():
    trace = made("load", ("weights", 2 * MIB), ("workspace", 8 * MIB), 1, "first_step", ("activations", 3 * MIB))
    host = replay(trace, HostAllocator(), {"host": "resident_bytes"})["host"]
    assert host.by_phase == {"load": 10 * MIB, "first_step": 5 * MIB}
    reserved = replay(trace, CudaAllocator(), {"reserved": "reserved_bytes"})["reserved"]
    assert reserved.by_phase == {"load": 20 * MIB, "first_step": 20 * MIB}  # one segment, which the weights keep


def test_peaks_are_added_to_and_multiplied():
    peaks = Peaks({"load": 5, "save": 7}, {"weights": 7})
    assert peaks.plus("base", 10) == Peaks({"load": 15, "save": 17}, {"weights": 7, "base": 10})
    assert peaks.plus("weights", 1).components == {"weights": 8}
    assert peaks.times(3) == Peaks({"load": 15, "save": 21}, {"weights": 21})
    assert Peaks().peak_bytes == 0


def everything(items, like, distinct=1):
    yield from items


def peaks_and_work(settings: list[str]) -> tuple:
    trace, _ = trace_run(resolve_without_data(small_config(*settings)))
    host = replay(trace, HostAllocator(), {"host": "resident_bytes"})["host"]
    cost = trace.costs["steady_steps"]
    categories = {"weights", "optimizer_states", "gradients", "activations", "logits", "workspace"}
    return len(trace.events), live_peaks(trace, categories), host.by_phase, cost.matmul_flops, cost.calls, cost.moved_bytes


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["train.precision=bf16", "train.loss_chunk_tokens=16"],
        [*LAYERWISE, "train.precision=bf16", "train.weight_dtype=bf16", "optim.state_bits=4", "train.loss_chunk_tokens=16"],
        ["train.update=layerwise", "train.activation_checkpointing=selective"],
        [*I3, *LAYERWISE, "model.num_layers=1"],
    ],
)
def test_loops_cut_short_have_the_peak_and_the_work_of_whole_ones(monkeypatch, settings):
    settings = ["train.global_batch_size=8", "train.eval_every=3", "train.eval_sequences=8", *settings]  # four micro-batches
    short = peaks_and_work(settings)
    for name, module in list(sys.modules.items()):
        if name.startswith("lowmem.") and name != "lowmem.system.dry_run" and hasattr(module, "representative"):
            monkeypatch.setattr(module, "representative", everything)
    whole = peaks_and_work(settings)
    assert short[0] < whole[0]
    assert short[1] == pytest.approx(whole[1], abs=2 * 4)  # the losses of two micro-batches, a number each
    # all blocks are small here and share one heap: it may end one hole of the largest block further
    assert short[2] == pytest.approx(whole[2], abs=257 * 64 * 4 + 80)
    assert short[3] == whole[3]
    assert short[4:] == pytest.approx(whole[4:], rel=0.02)
