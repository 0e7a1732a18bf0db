"""What a dry run knows of weights, states and boundaries that are not on the device."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lowmem.config.schema import RunConfig
from lowmem.engine.local import LocalEngine
from lowmem.engine.storage.backing import NoBacking
from lowmem.engine.storage.blocks import Storage, StreamedBlocks


@dataclass
class Elsewhere:
    """One backing of a dry run; see `NoBacking`.

    Attributes:
        place: "disk", or "host" for a GPU.
        holds: "blocks", which is weights and states, of matrices beside them too, or "boundaries".
        of_blocks: bytes of the blocks alone.
    """

    place: str
    holds: str
    backing: NoBacking
    of_blocks: int = 0


def elsewhere(config: RunConfig, storage: Storage, engine: LocalEngine) -> list[Elsewhere]:
    """The backings of a dry run."""
    found = []
    if isinstance(storage, StreamedBlocks) and isinstance(storage.backing, NoBacking):
        of_blocks = sum(part.size for sections in (storage.weights, storage.states) for part in sections.parts.values())
        found.append(Elsewhere(config.train.weights_at, "blocks", storage.backing, of_blocks))
    disk = getattr(engine, "disk", None)
    return [*found, Elsewhere("disk", "boundaries", disk)] if isinstance(disk, NoBacking) else found


def transferred(parts: Sequence[Elsewhere]) -> tuple[Counter, Counter]:
    """Bytes read and written so far, by place."""
    read, written = Counter[str](), Counter[str]()
    for part in parts:
        read[part.place] += part.backing.bytes_read
        written[part.place] += part.backing.bytes_written
    return read, written
