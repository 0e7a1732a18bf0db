"""SIGTERM, SIGHUP and Ctrl-C ask a run to stop after the step in progress; a second one, later, stops at once."""

import signal
import time
from types import FrameType

from lowmem.process import SAME_WISH_S, SIGNALS


class StopRequest:
    """Remembers the first signal; use as a context manager around the loop.

    Attributes:
        exit_code: 0 until a signal came, then 128 and its number: 129, 130 or 143.
    """

    def __init__(self) -> None:
        self.exit_code = 0
        self._asked_at = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN or number != signal.SIGHUP:  # nohup: a lost terminal is no wish
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.exit_code:
            if time.monotonic() - self._asked_at < SAME_WISH_S:
                return
            before = self._previous[number]
            if callable(before):  # that of the command, which raises once and not again while it cleans up
                before(number, frame)
                return
            raise KeyboardInterrupt
        self._asked_at = time.monotonic()
        self.exit_code = 128 + number
