"""What the preparation of data tells while it runs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DataProgress:
    """One report; reports come after every bounded piece of work.

    Attributes:
        stage: tokenizer (its vocabulary is trained), tokens (shards are written), check (hashes are computed),
            waiting (another process builds the same shards), warning (`message` should be shown to the user).
        source: which source, as the user named it.
        bytes_done: bytes of input files read, compressed where they are; of text where `max_bytes` is the limit.
        bytes_total: what `bytes_done` ends at; None when nobody knows.
        tokens: tokens written so far.
        message: one line for people, or empty.
    """

    stage: Literal["tokenizer", "tokens", "check", "waiting", "warning"]
    source: str
    bytes_done: int = 0
    bytes_total: int | None = None
    tokens: int = 0
    message: str = ""


ProgressCallback = Callable[[DataProgress], None]


def ignore_progress(report: DataProgress) -> None:
    """The callback of those who do not listen."""
