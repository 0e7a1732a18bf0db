"""What a dry run says is read, written and kept of blocks and boundaries that are elsewhere, against files of a real run."""

from collections import Counter

import pytest
import torch

from lowmem.config.schema import resolve_micro_batch_size
from lowmem.data.batch import longest_batch
from lowmem.engine.from_config import build_configured_model, build_local_engine, open_storage
from lowmem.engine.storage.backing import NoBacking
from lowmem.planning.predict import StepTime, predict_peak, resolve_without_data, step_time
from lowmem.planning.room import sizes_without_a_step
from lowmem.planning.trace import EVALUATION_BATCH, Trace, trace_run
from lowmem.system.dry_run import representative
from tests.planning.small import I3, LAYERWISE, ON_DISK, RATES, STORAGE_RATES, small_config, stub_measurements

CPU = torch.device("cpu")
DEEP = ["model.num_layers=3", "train.eval_every=3"]


def real_traffic(config, trace: Trace, folder) -> dict[str, tuple[int, int]]:
    """Bytes read and written in each phase of a run on a disk; checks sizes of its files on the way."""
    storage = open_storage(config, CPU)
    model = build_configured_model(config, storage=storage)
    engine = build_local_engine(config, model, CPU, "fp32", resolve_micro_batch_size(config, 1), None, storage)
    files = [file for file in (getattr(storage, "backing", None), engine.disk) if file is not None]
    mask, found = config.data.document_mask is True, {}

    def note(phase):
        now = tuple(sum(getattr(file, name) for file in files) for name in ("bytes_read", "bytes_written"))
        before = [sum(parts) for parts in zip(*found.values(), strict=True)] or [0, 0]
        found[phase] = (now[0] - before[0], now[1] - before[1])

    note("load")
    for phase in ("first_step", "steady_steps"):
        engine.step(longest_batch(config.train.global_batch_size, config.data.seq_len, packed=mask), 1e-3)
        note(phase)
    engine.evaluate([longest_batch(EVALUATION_BATCH, config.data.seq_len, packed=mask)])
    note("evaluation")
    engine.save(folder)
    assert trace.scratch_bytes() == sum(file.size for file in files)
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in folder.glob("*.safetensors"))
    assert trace.checkpoint_bytes == sum(path.stat().st_size for path in folder.glob("*.safetensors")) - headers
    for file in files:
        file.close()
    return found


@pytest.mark.parametrize("settings", [
    [*ON_DISK, "train.global_batch_size=4"],
    [*ON_DISK, "train.global_batch_size=6", "train.boundary_dtype=bf16"],
    [*ON_DISK, "train.global_batch_size=8", "optim.state_bits=8", "model.num_layers=4"],
    [*ON_DISK, "train.global_batch_size=5", "train.micro_batch_size=1", "model.tie_embeddings=true"],
    [*ON_DISK, "model.vocab_size=2100", "model.num_layers=1"],  # two blocks of rows, which are not read again
    [*ON_DISK, "model.vocab_size=6200", "model.tie_embeddings=true", "model.num_layers=1"],  # four; the last is smaller
    [*ON_DISK, "model.vocab_size=4100", "model.num_layers=1", "optim.state_bits=8"],  # three, of which one stays
    [*ON_DISK, "train.global_batch_size=2", "model.num_layers=1"],
    [*LAYERWISE, "train.weights_at=disk", "train.global_batch_size=6"],
    [*LAYERWISE, "train.boundary_offload=disk", "train.global_batch_size=6"],
    [*LAYERWISE, *I3, "train.weights_at=disk"],
])  # fmt: skip
def test_traffic_and_sizes_are_those_of_a_real_run(settings, tmp_path):
    config = resolve_without_data(small_config(*DEEP, *settings, f"train.storage_dir={tmp_path}"))
    trace, _ = trace_run(config)
    found = real_traffic(config, trace, tmp_path)
    assert {
        name: (costs.storage_read_bytes["disk"], costs.storage_written_bytes["disk"])
        for name, costs in trace.costs.items()
        if name != "save"
    } == found
    assert found["steady_steps"][0] > 0
    assert sizes_without_a_step(config) == (trace.checkpoint_bytes, trace.scratch_bytes())


def test_a_run_on_the_device_moves_nothing():
    config = resolve_without_data(small_config(*DEEP, *LAYERWISE))
    trace, _ = trace_run(config)
    assert {sum((costs.storage_read_bytes + costs.storage_written_bytes).values()) for costs in trace.costs.values()} == {0}
    assert sizes_without_a_step(config) == (trace.checkpoint_bytes, 0)


def test_a_read_counts_for_the_passes_that_wait_for_it():
    backing, like = NoBacking(), torch.zeros(1, device="meta")
    buffer, begun = torch.empty(10, dtype=torch.uint8, device="meta"), {}
    for position in representative(range(7), like, distinct=2):
        begun.setdefault(position, backing.read(0, buffer)).result()
        begun[position + 1] = backing.read(0, buffer)
    begun[2].result()  # given up: the last pass begins no read
    assert backing.bytes_read == 70
    for _ in representative(range(7), like):
        backing.write(0, buffer)
    assert backing.bytes_written == 70
    assert backing.reserve(5) == 0
    assert (backing.reserve(1), backing.size, backing.pieces) == (4096, 8192, [4096, 4096])


def test_a_step_takes_the_longer_of_computing_and_transfer_and_the_first_fetch():
    assert StepTime(5.0).total == 5
    assert StepTime(5.0, 4.0, 1.0).total == 6
    assert StepTime(5.0, 12.0, 1.0).total == 12


@pytest.fixture
def measurements(monkeypatch):
    stub_measurements(monkeypatch)


def test_seconds_of_a_step_are_bytes_over_rates(measurements):
    config = resolve_without_data(small_config(*DEEP, *ON_DISK))
    trace, model = trace_run(config)
    time, cost = step_time(config, trace, model, 1), trace.costs["steady_steps"]
    assert (time.read_bytes, time.written_bytes) == (cost.storage_read_bytes["disk"], cost.storage_written_bytes["disk"])
    assert time.transfer == pytest.approx(time.read_bytes / 1e9 + time.written_bytes / 5e8)
    held = next(part for part in trace.elsewhere if part.holds == "blocks")
    matrices = 2 * 3 * 257 * 64 * 4  # embedding and head: weights and two states, none of them of a block
    assert held.of_blocks <= held.backing.size - matrices
    assert time.first == pytest.approx(held.of_blocks / 3 / 1e9)
    assert (time.rates, RATES.call_s, STORAGE_RATES.disk_read) == ("measured", 1e-6, 1e9)


@pytest.mark.parametrize("place", ["host", "disk"])
def test_blocks_of_a_gpu_are_copied_from_pinned_memory(place, measurements):
    settings = [*LAYERWISE, "model.num_layers=6", "model.dim=256", "model.hidden_dim=1024", "device=cuda", "train.precision=bf16"]
    here, away = (predict_peak(small_config(*settings, f"train.weights_at={where}")) for where in ("device", place))
    assert away.cuda_reserved.by_phase["steady_steps"] < here.cuda_reserved.by_phase["steady_steps"]
    trace, _ = trace_run(resolve_without_data(away.config))
    backing = trace.elsewhere[0].backing
    moved = away.time.read_bytes + away.time.written_bytes
    if place == "host":
        assert away.host.components["elsewhere"] >= backing.size
        assert away.time.transfer == pytest.approx(moved / 1e10)
        assert Counter(away.disk) == Counter(here.disk)  # checkpoints only
    else:
        assert away.host.components["elsewhere"] < backing.size * 2
        # two for weights of blocks, two for their states; embedding and head, of one block of rows each, have one for each
        assert len(backing.buffers) == 4 + 2 * 2
        assert away.time.transfer == pytest.approx(moved / 1e10 + away.time.read_bytes / 1e9 + away.time.written_bytes / 5e8)
        assert away.disk["scratch"] == backing.size
