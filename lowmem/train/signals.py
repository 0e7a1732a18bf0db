"""SIGTERM and Ctrl-C ask a run to stop after the step in progress; a second one, later, stops at once."""

import signal
import time
from types import FrameType

from lowmem.errors import EXIT_INTERRUPTED, EXIT_TERMINATED

# DeepSpeed's launcher answers a terminal's Ctrl-C with a SIGTERM of its own: two signals for one wish.
_SAME_WISH_S = 2.0
_EXIT_CODES = {signal.SIGINT: EXIT_INTERRUPTED, signal.SIGTERM: EXIT_TERMINATED}


class StopRequest:
    """Remembers the first signal; use as a context manager around the loop.

    Attributes:
        exit_code: 0 until a signal came, then 130 or 143.
    """

    def __init__(self) -> None:
        self.exit_code = 0
        self._asked_at = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in _EXIT_CODES:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.exit_code:
            if time.monotonic() - self._asked_at < _SAME_WISH_S:
                return
            raise KeyboardInterrupt
        self._asked_at = time.monotonic()
        self.exit_code = _EXIT_CODES[signal.Signals(number)]
