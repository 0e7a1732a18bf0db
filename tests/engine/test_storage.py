"""Blocks whose weights and states live on a disk or in host memory: the bits of a resident run, from one file to the next."""

import gc
import os

import numpy as np
import pytest
import torch

from lowmem.config.schema import LorptConfig, ModelConfig, OptimConfig, TrainConfig
from lowmem.data.batch import Batch
from lowmem.engine.boundaries import Boundaries
from lowmem.engine.layerwise import LayerwiseEngine
from lowmem.engine.storage.blocks import Storage, StreamedBlocks
from lowmem.engine.storage.disk_file import ALIGNMENT, DiskFile, aligned_buffer
from lowmem.engine.storage.host_memory import HostMemory
from lowmem.models.base import LossOptions
from lowmem.models.registry import build_model
from lowmem.nn import loss
from lowmem.nn.quantized import CodedWeight, WeightFormat
from lowmem.system.errors import ConfigError, StorageError

CPU = torch.device("cpu")
VOCAB, SEQ_LEN, SEQUENCES = 67, 16, 6
MODELS = {
    "decoder": ModelConfig(dim=64, num_layers=3, num_heads=2),
    "even": ModelConfig(dim=64, num_layers=4, num_heads=2, tie_embeddings=True, positions="learned"),
    "lorpt": ModelConfig(dim=64, num_layers=3, num_heads=2, lorpt=LorptConfig(rank=8, targets=["attention", "mlp", "head"])),
    "i3": ModelConfig(name="i3", dim=64, num_layers=3, num_heads=1, attention_rank=8, lorpt=LorptConfig(rank=8)),
}
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": WeightFormat(torch.float32, 8), "int4": WeightFormat(torch.bfloat16, 4)}


@pytest.fixture(autouse=True)
def _few_rows_a_block(monkeypatch):
    """Five blocks of the vocabulary, the last of them short."""
    monkeypatch.setattr(loss, "GRAD_BLOCK_ROWS", 16)


def make_storage(place: str, tmp_path) -> Storage:
    return {
        "device": Storage,
        "host": lambda: StreamedBlocks(HostMemory(CPU), CPU),
        "disk": lambda: StreamedBlocks(DiskFile(tmp_path), CPU),
    }[place]()


def make_model(storage: Storage, shape="decoder", stored="fp32"):
    return build_model(MODELS[shape], vocab_size=VOCAB, max_seq_len=SEQ_LEN, seed=0, dtype=FORMATS[stored], place=storage.place)


def make_engine(storage: Storage, shape="decoder", stored="fp32", *, micro=2, disk=None, **optim) -> LayerwiseEngine:
    model = make_model(storage, shape, stored)
    model.activation_checkpointing, model.loss_options = "block", LossOptions(chunk_tokens=32)  # the head goes by rows
    train = TrainConfig(update="layerwise", seed=5, boundary_offload="disk" if disk else "none")
    precision = "bf16" if stored in ("bf16", "int4") else "fp32"
    config = OptimConfig(**{"lr": 1e-2, "clip": 1.0, **optim})
    return LayerwiseEngine(model, config, train, device=CPU, precision=precision, micro_batch_size=micro, storage=storage, disk=disk)


def make_batch(seed: int) -> Batch:
    return Batch.from_windows(np.random.default_rng(seed).integers(0, VOCAB, (SEQUENCES, SEQ_LEN + 1)))


def saved_bytes(engine: LayerwiseEngine, directory) -> dict[str, bytes]:
    directory.mkdir()
    engine.save(directory)
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


@pytest.mark.parametrize("place", ["disk", "host"])
@pytest.mark.parametrize(
    ("name", "stored", "optim"),
    [
        ("decoder", "fp32", {}), ("even", "fp32", {"state_bits": 8}), ("lorpt", "bf16", {"state_bits": 4}), ("i3", "fp32", {}),
        ("decoder", "int8", {"state_bits": 8}), ("even", "int4", {"state_bits": 4}), ("lorpt", "fp32", {"name": "spectron"}),
        ("decoder", "bf16", {"name": "lion", "state_bits": 8}),
    ],
)  # fmt: skip
def test_losses_norms_and_checkpoints_are_those_of_a_resident_run(place, name, stored, optim, tmp_path):
    resident = make_engine(Storage(), name, stored, **optim)
    streamed = make_engine(make_storage(place, tmp_path), name, stored, **optim)
    for step in range(20):
        assert streamed.step(make_batch(step), 1e-2) == resident.step(make_batch(step), 1e-2)
    assert streamed.evaluate([make_batch(99)]) == resident.evaluate([make_batch(99)])
    assert saved_bytes(streamed, tmp_path / "a") == saved_bytes(resident, tmp_path / "b")


@pytest.mark.parametrize(("first", "then"), [("disk", "disk"), ("disk", "device"), ("device", "host")])
def test_a_checkpoint_goes_on_wherever_the_blocks_live(first, then, tmp_path):
    """To the bit, boundaries and all."""
    whole = make_engine(Storage(), "even", "bf16", state_bits=8)
    begun = make_engine(make_storage(first, tmp_path), "even", "bf16", state_bits=8, disk=DiskFile(tmp_path))
    for step in range(3):
        whole.step(make_batch(step), 1e-2)
        begun.step(make_batch(step), 1e-2)
    state = begun.save(tmp_path)
    resumed = make_engine(make_storage(then, tmp_path), "even", "bf16", state_bits=8)
    resumed.load(tmp_path, state)
    assert resumed.weights_are_finite()
    for step in range(3, 6):
        assert resumed.step(make_batch(step), 1e-2) == whole.step(make_batch(step), 1e-2)
    assert saved_bytes(resumed, tmp_path / "a") == saved_bytes(whole, tmp_path / "b")


def test_elements_that_are_not_there_are_nan_and_take_no_memory(tmp_path):
    for stored in ("fp32", "int8"):
        engine = make_engine(make_storage("disk", tmp_path), "decoder", stored)
        weight = engine.model.blocks[1].mlp.down.weight
        assert weight.shape[0] == 64
        held = [part for p in engine.model.blocks.parameters() for part in (p.parts().values() if isinstance(p, CodedWeight) else (p,))]
        assert {part.untyped_storage().nbytes() for part in held} <= {part.element_size() for part in held}
        values = weight.dense(torch.float32) if isinstance(weight, CodedWeight) else weight
        assert values.isnan().all()
        state = engine.optimizer.state[weight]
        assert not any(isinstance(value, torch.Tensor) for value in state.values())


def test_a_model_called_as_a_whole_brings_each_block_for_its_turn(tmp_path):
    tokens = torch.from_numpy(make_batch(0).inputs)
    resident, streamed = (make_model(storage) for storage in (Storage(), make_storage("disk", tmp_path)))
    with torch.no_grad():
        for _ in range(2):
            assert streamed(tokens).equal(resident(tokens))
        cache, other = streamed.new_cache(len(tokens), SEQ_LEN), resident.new_cache(len(tokens), SEQ_LEN)
        for part in (slice(0, 5), slice(5, 6), slice(6, 7)):
            assert streamed(tokens[:, part], cache=cache).equal(resident(tokens[:, part], cache=other))
    assert all(parameter.isnan().all() for parameter in streamed.blocks.parameters())


def test_what_was_never_changed_is_not_written(tmp_path):
    storage = make_storage("disk", tmp_path)
    engine = make_engine(storage)
    before = storage.backing.bytes_written
    engine.evaluate([make_batch(0)])
    engine.rehearse(make_batch(0))
    assert storage.backing.bytes_written == before
    engine.step(make_batch(0), 1e-2)
    storage.flush()
    assert storage.backing.bytes_written - before == storage.component_bytes()["elsewhere"]


def test_a_block_is_read_once_on_the_way_up_and_its_states_once_on_the_way_down(tmp_path):
    storage = make_storage("disk", tmp_path)
    engine = make_engine(storage)  # three blocks, two of which are there when the way down begins
    engine.step(make_batch(0), 1e-2)
    before, block, states = storage.backing.bytes_read, storage.weights.parts[0].size, storage.states.parts[0].size
    rows = sum(part.size for matrix in storage._matrices.values() for part in matrix.weights.parts.values())
    moments = sum(part.size for matrix in storage._matrices.values() for part in matrix.states.parts.values())
    engine.step(make_batch(1), 1e-2)
    # up: the first two are there, which were updated last; down: the last two are; the head twice, the embedding once
    assert storage.backing.bytes_read - before <= (1 + 1) * block + 3 * states + 1.5 * rows + moments


def test_a_block_that_is_spoilt_is_left_as_it_was(tmp_path):
    """A gradient that is not finite: nothing of this block and those below is written."""
    resident, streamed = make_engine(Storage()), make_engine(make_storage("disk", tmp_path))
    for engine in (resident, streamed):
        engine.step(make_batch(0), 1e-2)
        differentiate, calls = engine._differentiate, []

        def spoilt(index, *more, differentiate=differentiate, calls=calls):
            differentiate(index, *more)
            calls.append(index)
            if index == 1:
                more[-1].totals[0].fill_(float("inf"))

        engine._differentiate = spoilt
        assert engine.step(make_batch(1), 1e-2).skipped == "nonfinite"
        engine._differentiate = differentiate
    assert streamed.step(make_batch(2), 1e-2) == resident.step(make_batch(2), 1e-2)
    assert saved_bytes(streamed, tmp_path / "a") == saved_bytes(resident, tmp_path / "b")


def test_memory_that_runs_out_in_a_block_is_met_with_a_smaller_micro_batch(tmp_path):
    resident, streamed = make_engine(Storage()), make_engine(make_storage("disk", tmp_path))
    for engine in (resident, streamed):
        differentiate = engine._differentiate

        def failing(index, *more, engine=engine, differentiate=differentiate):
            if index == 1 and engine.block_micro_batches[1] == 2:
                raise torch.OutOfMemoryError("injected")
            differentiate(index, *more)

        engine._differentiate = failing
        engine.step(make_batch(0), 1e-2)
        assert engine.block_micro_batches == [2, 1, 2]
    assert saved_bytes(streamed, tmp_path / "a") == saved_bytes(resident, tmp_path / "b")


def test_the_rank_of_blocks_elsewhere_does_not_change(tmp_path):
    engine = make_engine(make_storage("disk", tmp_path), "lorpt")
    with pytest.raises(ConfigError, match="train.weights_at=device"):
        engine.set_rank(4, {}, seed=0, step=1)


@pytest.mark.parametrize("folder", ["disk", "memory"])
def test_a_file_gives_back_what_it_was_given(folder, tmp_path, monkeypatch):
    """Through O_DIRECT and without it."""
    if folder == "memory":
        opened = os.open
        monkeypatch.setattr(os, "open", lambda name, flags, *more, **known: _refuse(flags, opened, name, *more, **known))
    file = DiskFile(tmp_path)
    assert file.direct == (folder == "disk")
    assert not list(tmp_path.iterdir())  # it has no name
    start, more = file.reserve(3 * ALIGNMENT - 5), file.reserve(1)
    assert (start, more, file.size) == (0, 3 * ALIGNMENT, 4 * ALIGNMENT)
    buffer, back = aligned_buffer(2 * ALIGNMENT), aligned_buffer(2 * ALIGNMENT)
    buffer.copy_(torch.arange(2 * ALIGNMENT, dtype=torch.int32).to(torch.uint8))
    file.read(ALIGNMENT, back).result()
    assert not back.any()
    file.write(ALIGNMENT, buffer)
    file.read(ALIGNMENT, back).result()
    assert back.equal(buffer)
    numbers = torch.arange(100, dtype=torch.float32)
    file.put(17, numbers)
    file.get(17, found := torch.empty(100))
    assert found.equal(numbers)
    with open(tmp_path / "copy", "wb", buffering=0) as copy:
        file.copy_to(copy.fileno(), 17, 400)
        file.copy_to(copy.fileno(), ALIGNMENT, 100)
    assert (tmp_path / "copy").read_bytes() == numbers.numpy().tobytes() + buffer[:100].numpy().tobytes()
    file.close()


def _refuse(flags, opened, name, *more, **known):
    if flags & os.O_DIRECT:
        raise OSError(22, "Invalid argument")
    return opened(name, flags, *more, **known)


def test_a_folder_that_is_none_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="scratch file for weights in .*/file cannot be created.*train.storage_dir"):
        DiskFile(tmp_path / "file")


def _no_room(*_):
    raise OSError(28, "No space left on device")


def test_a_disk_without_room_says_so_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", _no_room)
    with pytest.raises(StorageError, match="cannot grow to .*No space left.*checkpoints written before are intact"):
        make_engine(make_storage("disk", tmp_path))


@pytest.mark.parametrize(("call", "what"), [("pwritev", "written"), ("preadv", "read")])
def test_a_disk_that_fails_later_says_so(call, what, tmp_path, monkeypatch):
    engine = make_engine(make_storage("disk", tmp_path))
    monkeypatch.setattr(os, call, _no_room)

    def steps():
        for step in range(2):
            engine.step(make_batch(step), 1e-2)

    with pytest.raises(StorageError, match=f"cannot be {what}: No space left.*run the same command again"):
        steps()


def test_a_write_that_fails_last_is_noticed_by_the_read_behind_it(tmp_path, monkeypatch):
    """Of a boundary in one micro-batch: the read would give back what an earlier step left there."""
    disk = DiskFile(tmp_path)
    boundaries, hidden = Boundaries(2, CPU, disk=disk), torch.ones(2, 4, 8)
    boundaries.write(0, slice(0, 2), hidden)
    assert boundaries.read(0, slice(0, 2)).equal(hidden)
    monkeypatch.setattr(os, "pwritev", _no_room)
    boundaries.write(0, slice(0, 2), 2 * hidden)
    with pytest.raises(StorageError, match="cannot be written"):
        boundaries.read(0, slice(0, 2))


def test_two_blocks_of_one_buffer_are_refused(tmp_path):
    storage = make_storage("disk", tmp_path)
    make_model(storage)
    with storage.block(0), storage.block(1), pytest.raises(ValueError, match="block 2 needs the buffer of one of them"), storage.block(2):
        pass


def test_a_file_that_nobody_holds_gives_its_room_back(tmp_path):
    file = DiskFile(tmp_path)
    descriptors = {file._raw, file._buffered, file._scattered}
    file.reserve(ALIGNMENT)
    del file
    gc.collect()
    for descriptor in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_without_direct_access_what_is_written_is_on_the_disk(tmp_path, monkeypatch):
    opened, synced, sync = os.open, [], os.fdatasync
    monkeypatch.setattr(os, "open", lambda name, flags, *more, **known: _refuse(flags, opened, name, *more, **known))
    file = DiskFile(tmp_path)
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: synced.append(descriptor) or sync(descriptor))
    file.reserve(ALIGNMENT)
    file.write(0, aligned_buffer(ALIGNMENT)).result()
    assert synced == [file._buffered]
