"""What a dry run knows of weights, states and boundaries that are not on the device."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lowmem.config.schema import RunConfig
from lowmem.engine.local import LocalEngine
from lowmem.engine.storage.backing import NoBacking
from lowmem.engine.storage.blocks import Storage


@dataclass
class Elsewhere:
    """One backing of a dry run; see `NoBacking`.

    Attributes:
        place: "disk", or "host" for a GPU.
        holds: "blocks", which is weights and states, or "boundaries".
    """

    place: str
    holds: str
    backing: NoBacking


def elsewhere(config: RunConfig, storage: Storage, engine: LocalEngine) -> list[Elsewhere]:
    """The backings of a dry run."""
    backings = [
        (config.train.weights_at, "blocks", getattr(storage, "backing", None)),
        ("disk", "boundaries", getattr(engine, "disk", None)),
    ]
    return [Elsewhere(place, holds, backing) for place, holds, backing in backings if isinstance(backing, NoBacking)]


def transferred(parts: Sequence[Elsewhere]) -> tuple[Counter, Counter]:
    """Bytes read and written so far, by place."""
    read, written = Counter[str](), Counter[str]()
    for part in parts:
        read[part.place] += part.backing.bytes_read
        written[part.place] += part.backing.bytes_written
    return read, written
