"""Stop strings in text that arrives in pieces."""

from collections.abc import Sequence

from lowmem.errors import ConfigError


class StopFilter:
    """Passes text on up to the first stop string, and holds back what may turn out to be the beginning of one.

    The stop string whose last character comes first counts, of several that end there the longest; so where text is cut into pieces does
    not matter.

    Args:
        stop: strings, none empty.
    Attributes:
        found: the stop string that ended the text; None so far.
    Raises:
        ConfigError: an empty string, which would be found everywhere.
    """

    def __init__(self, stop: Sequence[str]):
        if "" in stop:
            raise ConfigError('a stop string is ""; give at least one character, or leave --stop out')
        self.found: str | None = None
        self._stop = tuple(stop)
        self._held = ""

    def push(self, text: str) -> str:
        """What can be shown of the text so far and was not shown yet; nothing once a stop string was found."""
        if self.found is not None:
            return ""
        text = self._held + text
        ends = [(text.index(stop) + len(stop), -len(stop), stop) for stop in self._stop if stop in text]
        if ends:
            end, _, self.found = min(ends)
            self._held = ""
            return text[: end - len(self.found)]
        keep = max((size for stop in self._stop for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The rest: no stop string came of it."""
        rest, self._held = self._held, ""
        return rest
