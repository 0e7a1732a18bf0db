"""Where the weights and optimizer states of blocks live (D12): on the device, or elsewhere and on the device one block at a time.

A block that is elsewhere has parameters of its shapes and dtypes whose elements are all NaN and take no memory. `fetch` gives it its
weights, for an update its states, too, while the next block is on its way; `release` and `write_back` take them away again. Two blocks
are on the device at most: the one that is computed with, and the one before or after it, which is read or written meanwhile.

Source: the order of execution of L2L, Pudipeddi et al. 2020, arXiv:2002.05645; states on disk, Rajbhandari et al. 2021, arXiv:2104.07857.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from lowmem.engine.storage.backing import Backing
from lowmem.engine.storage.disk_file import DiskFile, aligned_buffer, aligned_size
from lowmem.engine.storage.host_memory import Done
from lowmem.nn.quantized import CodedWeight, stored_tensors
from lowmem.system.dry_run import is_fake, note
from lowmem.system.tensors import LazyTensor

_BETWEEN_TENSORS = 64  # bytes: kernels of 512 bits read aligned


class Storage:
    """Blocks that stay on the device: nothing happens.

    Attributes:
        streams: whether blocks are elsewhere.
    """

    streams = False

    def place(self, block: nn.Module, index: int) -> nn.Module:
        """Take over block number `index`, which has its weights; the block itself, without its elements where they are elsewhere."""
        return block

    def adopt(self, blocks: nn.ModuleList, optimizer: torch.optim.Optimizer) -> None:
        """Take over the optimizer states of blocks, before any exist."""

    @contextmanager
    def block(self, index: int, *, states: bool = False, ahead: int | None = None, blank: bool = False) -> Iterator["Visit"]:
        """Block `index` on the device.

        Args:
            states: with the optimizer states of what is trained in it.
            ahead: the block that comes next, which is fetched meanwhile in the same form.
            blank: all that it has will be filled by whoever asked for it, and is not fetched.
        Yields:
            What says whether the block was changed.
        """
        yield Visit()

    def saved(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor | LazyTensor]:
        """For a checkpoint: `tensors` as they are stored, with those that are elsewhere to be read from there one by one."""
        return dict(stored_tensors(tensors))

    def saved_states(self, names: Mapping[str, torch.Tensor]) -> dict[str, LazyTensor]:
        """For a checkpoint: by "parameter.state" name the states that are elsewhere.

        Args:
            names: parameters by name.
        """
        return {}

    def each_part(self, tensors: Mapping[str, torch.Tensor], *, changed: bool = False) -> Iterator[dict[str, torch.Tensor]]:
        """`tensors` in parts, each while its elements are on the device.

        Args:
            tensors: parameters of the model, by name.
            changed: each part is filled by whoever asked for it.
        """
        yield dict(tensors)

    def each_state(self, names: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        """The optimizer states that are elsewhere, in parts, each to be filled; see `saved_states`."""
        yield from ()

    def component_bytes(self) -> dict[str, int]:
        """Bytes that blocks take elsewhere, and that buffers for them take here."""
        return {}

    def flush(self) -> None:
        """Return once all that was changed is kept."""

    def close(self) -> None:
        """Give back what is held elsewhere."""


@dataclass
class Visit:
    """A stay of a block on the device.

    Attributes:
        changed: its weights and states are to be written back.
    """

    changed: bool = False


@dataclass(frozen=True)
class _Piece:
    """One tensor inside a section: what puts it into place, and what takes it away again."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype
    attach: Callable[[torch.Tensor], None]
    detach: Callable[[], None]

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)


Key = tuple[int, str]  # id of a parameter, and what is added to its name


@dataclass
class _Section:
    """Tensors that are read and written together.

    Attributes:
        start: where it begins in the backing.
        size: bytes; a multiple of ALIGNMENT once it is complete.
        written: bytes from its start that an update changes.
    """

    start: int = 0
    size: int = 0
    written: int = 0
    pieces: dict[Key, _Piece] = field(default_factory=dict)

    def add(self, key: Key, like: torch.Tensor, attach: Callable[[torch.Tensor], None], detach: Callable[[], None]) -> None:
        offset = -(-self.size // _BETWEEN_TENSORS) * _BETWEEN_TENSORS
        self.pieces[key] = _Piece(offset, like.shape, like.dtype, attach, detach)
        self.size = offset + self.pieces[key].nbytes


@dataclass
class _Slot:
    """A buffer for the section of one block.

    Attributes:
        staging: on the host, where a disk is read for another device.
        holds: the block whose bytes it has, or will have when `transfer` has ended; -1 is none.
    """

    buffer: torch.Tensor | None = None
    staging: torch.Tensor | None = None
    holds: int = -1
    transfer: Any = field(default_factory=Done)


class StreamedBlocks(Storage):
    """Blocks that live in a backing.

    Frozen weights are read only; a block's other weights and its states are written after its update. Calls of a block's module outside
    of `block` bring it here for as long as they last.

    Args:
        backing: on a disk, in host memory, or nowhere in a dry run.
        device: that computes.
    Memory: on the device, twice the largest block's weights, and twice its states once there are any; where a disk serves a GPU, as much
        pinned host memory.
    """

    streams = True

    def __init__(self, backing: Backing, device: torch.device):
        self.backing, self.device = backing, device
        self._weights: dict[int, _Section] = {}
        self._states: dict[int, _Section] = {}
        self._weight_slots, self._state_slots = (_Slot(), _Slot()), (_Slot(), _Slot())
        self._here: set[int] = set()
        self._stays: dict[int, Any] = {}  # of blocks that are here for a call of their module
        self._writes: list[Any] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._parameters: dict[int, torch.Tensor] = {}

    def place(self, block: nn.Module, index: int) -> nn.Module:
        section = _Section()
        for parameter in block.parameters():
            for suffix, part in _parts(parameter).items():
                attach, detach = partial(_attach, parameter, suffix), partial(_detach, parameter, suffix, self.device)
                section.add((id(parameter), suffix), part, attach, detach)
        self._weights[index] = self._kept(
            section, {(id(p), suffix): part for p in block.parameters() for suffix, part in _parts(p).items()}
        )
        block.register_forward_pre_hook(partial(self._before_call, index))
        block.register_forward_hook(partial(self._after_call, index), always_call=True)
        return block

    def adopt(self, blocks: nn.ModuleList, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        for index, block in enumerate(blocks):
            weights, section = self._weights[index], _Section()
            trained = [p for p in block.parameters() if p.requires_grad and any(key[0] == id(p) for key in weights.pieces)]
            values: dict[Key, torch.Tensor] = {}
            with self.block(index):
                for parameter in trained:
                    optimizer._allocate(parameter)  # type: ignore[attr-defined]  # lowmem's own: others cannot update a part of a model
            for parameter in trained:
                self._parameters[id(parameter)] = parameter
                state = optimizer.state[parameter]
                for name in [name for name, value in state.items() if isinstance(value, torch.Tensor)]:
                    values[id(parameter), f".{name}"] = state[name]
                    attach, detach = partial(_set_state, optimizer, parameter, name), partial(_drop_state, optimizer, parameter, name)
                    section.add((id(parameter), f".{name}"), state[name], attach, detach)
            self._states[index] = self._kept(section, values)
            ends = [piece.offset + piece.nbytes for key, piece in weights.pieces.items() if key[0] in {id(p) for p in trained}]
            weights.written = aligned_size(max(ends, default=0))

    def _kept(self, section: _Section, values: Mapping[Key, torch.Tensor]) -> _Section:
        """Room for a section, with its first elements, which are taken away from where they are."""
        section.size = section.written = aligned_size(section.size)
        section.start = self.backing.reserve(section.size)
        for key, piece in section.pieces.items():
            value = values[key].detach()
            if not is_fake(value) and value.count_nonzero():  # the backing is zero
                self.backing.put(section.start + piece.offset, value.to("cpu").contiguous())
            piece.detach()
        self.backing.settle()
        return section

    @contextmanager
    def block(self, index: int, *, states: bool = False, ahead: int | None = None, blank: bool = False) -> Iterator[Visit]:
        visit, parts = Visit(), self._sections(index, states)
        self._check_writes()
        self._here.add(index)
        try:
            for sections, slots in parts:
                self._start(sections, slots, index, blank)
            if ahead in self._weights and (ahead - index) % 2:  # else it has the slot of this one
                for sections, slots in self._sections(ahead, states):
                    self._start(sections, slots, ahead)
            for sections, slots in parts:
                self._attach(sections[index], slots[index % 2])
            yield visit
        finally:
            self._here.discard(index)
            for sections, slots in parts:
                for piece in sections[index].pieces.values():
                    piece.detach()
                if visit.changed:
                    self._write(sections[index], slots[index % 2])
                elif blank:
                    slots[index % 2].holds = -1

    def _sections(self, index: int, states: bool) -> list[tuple[dict[int, _Section], tuple[_Slot, _Slot]]]:
        both = [(self._weights, self._weight_slots), (self._states, self._state_slots)]
        return [(sections, slots) for sections, slots in both[: 1 + states] if sections[index].size]

    def _start(self, sections: dict[int, _Section], slots: tuple[_Slot, _Slot], index: int, blank: bool = False) -> None:
        """Begin to read a section, unless its slot has it."""
        slot, section = slots[index % 2], sections[index]
        if slot.holds == index:
            return
        assert slot.holds not in self._here, "two blocks of one slot at once"
        if slot.buffer is None:
            largest = max(part.size for part in sections.values())
            slot.buffer = (
                aligned_buffer(largest) if self.device.type != "cuda" else torch.empty(largest, dtype=torch.uint8, device=self.device)
            )
            if isinstance(self.backing, DiskFile) and self.device.type == "cuda":
                slot.staging = aligned_buffer(largest, pinned=True)
            note(slot.buffer, "weights" if sections is self._weights else "optimizer_states")
        if blank:  # nothing may be on its way from or to this buffer; a read would come after it
            self._check_writes(wait=True)
            slot.transfer.result()
        slot.holds = index
        slot.transfer = Done() if blank else self._read(section.start, slot, section.size)

    def _attach(self, section: _Section, slot: _Slot) -> None:
        try:
            slot.transfer.result()
        except BaseException:
            slot.holds = -1
            raise
        slot.transfer = Done()
        assert slot.buffer is not None
        for piece in section.pieces.values():
            piece.attach(piece.view(slot.buffer))

    def _read(self, start: int, slot: _Slot, size: int) -> Any:
        assert slot.buffer is not None
        if slot.staging is None:
            return self.backing.read(start, slot.buffer[:size])
        assert isinstance(self.backing, DiskFile)
        return self.backing.read(start, slot.staging[:size], partial(_to_device, slot.staging[:size], slot.buffer[:size], self._computed()))

    def _write(self, section: _Section, slot: _Slot) -> None:
        assert slot.buffer is not None
        size = section.written
        if not size:
            return
        if slot.staging is None:
            self._writes.append(self.backing.write(section.start, slot.buffer[:size]))
            return
        assert isinstance(self.backing, DiskFile)
        before = partial(_to_device, slot.buffer[:size], slot.staging[:size], self._computed())
        self._writes.append(self.backing.write(section.start, slot.staging[:size], before))

    def _computed(self) -> Any:
        """What is computed until now on a GPU."""
        return torch.cuda.current_stream(self.device).record_event()

    def _check_writes(self, wait: bool = False) -> None:
        """Raise what a write met; a transfer that has not ended is left alone, or waited for."""
        left = []
        for write in self._writes:
            if wait or getattr(write, "done", bool)() or isinstance(write, Done):
                write.result()
            else:
                left.append(write)
        self._writes = left

    def _before_call(self, index: int, module: nn.Module, inputs: Any) -> None:
        if index not in self._here:
            stay = self.block(index, ahead=(index + 1) % len(self._weights))
            stay.__enter__()
            self._stays[index] = stay

    def _after_call(self, index: int, module: nn.Module, inputs: Any, output: Any) -> None:
        stay = self._stays.pop(index, None)
        if stay is not None:
            stay.__exit__(None, None, None)

    def flush(self) -> None:
        """Return once the backing holds all that was changed.

        Raises:
            StorageError: it could not be written.
        """
        self._check_writes(wait=True)
        self.backing.wait()

    def saved(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor | LazyTensor]:
        self.flush()
        places = self._places(self._weights)
        found: dict[str, torch.Tensor | LazyTensor] = {}
        for name, tensor in tensors.items():
            for suffix, part in _parts(tensor).items():
                place = places.get((id(tensor), suffix))
                found[name + suffix] = part if place is None else self._lazy(*place)
        return found

    def saved_states(self, names: Mapping[str, torch.Tensor]) -> dict[str, LazyTensor]:
        by_id = {id(parameter): name for name, parameter in names.items()}
        return {by_id[key[0]] + key[1]: self._lazy(*place) for key, place in self._places(self._states).items()}

    def each_part(self, tensors: Mapping[str, torch.Tensor], *, changed: bool = False) -> Iterator[dict[str, torch.Tensor]]:
        owners = {key[0]: index for index, section in self._weights.items() for key in section.pieces}
        yield {name: tensor for name, tensor in tensors.items() if id(tensor) not in owners}
        for index, section in sorted(self._weights.items()):
            part = {name: tensor for name, tensor in tensors.items() if owners.get(id(tensor)) == index}
            if part:
                whole = {id(tensor) for tensor in part.values()} == {key[0] for key in section.pieces}
                following = index + 1 if index + 1 in self._weights and not changed else None
                with self.block(index, ahead=following, blank=changed and whole) as visit:
                    yield part
                    visit.changed = changed

    def each_state(self, names: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        by_id = {id(parameter): name for name, parameter in names.items()}
        for index, section in sorted(self._states.items()):
            if section.size:
                with self.block(index, states=True) as visit:
                    assert self._optimizer is not None
                    yield {by_id[key[0]] + key[1]: self._optimizer.state[self._parameters[key[0]]][key[1][1:]] for key in section.pieces}
                    visit.changed = True

    def _places(self, sections: dict[int, _Section]) -> dict[Key, tuple[_Section, _Piece]]:
        return {key: (section, piece) for section in sections.values() for key, piece in section.pieces.items()}

    def _lazy(self, section: _Section, piece: _Piece) -> LazyTensor:
        offset = section.start + piece.offset

        def get() -> torch.Tensor:
            made = torch.empty(piece.shape, dtype=piece.dtype)
            self.backing.get(offset, made)
            return made

        return LazyTensor(tuple(piece.shape), piece.dtype, get, partial(self._copy_to, offset, piece.nbytes))

    def _copy_to(self, offset: int, size: int, file: int) -> None:
        self.backing.copy_to(file, offset, size)

    def component_bytes(self) -> dict[str, int]:
        slots = (*self._weight_slots, *self._state_slots)
        return {
            "elsewhere": sum(section.size for section in (*self._weights.values(), *self._states.values())),
            "buffers": sum(slot.buffer.numel() for slot in slots if slot.buffer is not None),
        }

    def close(self) -> None:
        self.backing.close()


def _parts(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """What memory holds of a parameter, by what is added to its name."""
    return parameter.parts() if isinstance(parameter, CodedWeight) else {"": parameter}


def _attach(parameter: torch.Tensor, suffix: str, value: torch.Tensor) -> None:
    if isinstance(parameter, CodedWeight):
        setattr(parameter, parameter.PARTS[suffix], value)
    else:
        parameter.data = value


def _detach(parameter: torch.Tensor, suffix: str, device: torch.device) -> None:
    """Elements that whoever uses them notices, and that take no memory."""
    part = _parts(parameter)[suffix]
    fill = float("nan") if part.is_floating_point() else 0
    _attach(parameter, suffix, torch.full((), fill, dtype=part.dtype, device=device).expand(part.shape))


def _set_state(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, name: str, value: torch.Tensor) -> None:
    optimizer.state[parameter][name] = value


def _drop_state(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, name: str) -> None:
    optimizer.state[parameter].pop(name, None)


def _to_device(source: torch.Tensor, to: torch.Tensor, computed: Any) -> None:
    """Copy between host and device in the thread of the disk, once what was computed by then is done."""
    stream = torch.cuda.Stream(to.device if to.is_cuda else source.device)
    stream.wait_event(computed)
    with torch.cuda.stream(stream):
        to.copy_(source, non_blocking=True)
    stream.synchronize()
