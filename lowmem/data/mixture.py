"""Which source each training sequence comes from: weights that may change with the step, and what happens at the end of a source."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Literal

from lowmem.data.order import keyed_hash
from lowmem.data.storage import malformed
from lowmem.errors import CheckpointError

Exhausted = Literal["repeat", "drop", "stop"]
Weight = float | Callable[[int], float]
_RANGE = 1 << 64
_CHOICE = 3  # what a hash is for; windows.py has the others


class EndOfData(Exception):
    """No sequence is left, by the policy of the mixture."""


class Mixture:
    """A weighted, deterministic choice of sources that is resumed from a few numbers.

    Args:
        weights: relative shares of the sources, each a number or a function of the step.
        lengths: sequences in one pass over each source; None if nobody knows.
        seed: another seed draws in another order.
        exhausted: a source that has been gone through once is repeated, dropped (the others keep their relative shares), or stops
            the mixture.
    Attributes:
        position: sequences drawn so far.
        drawn: of each source.
    """

    def __init__(self, weights: Sequence[Weight], lengths: Sequence[int | None], *, seed: int, exhausted: Exhausted = "repeat"):
        self._weights, self._lengths, self._seed, self._exhausted = list(weights), list(lengths), seed, exhausted
        self.position, self.drawn = 0, [0] * len(self._weights)
        self._borders: tuple[tuple[float, ...] | None, list[int]] = (None, [])
        self._borders_of(tuple(self._weights_at(0)))

    def choose(self, step: int = 0) -> int:
        """Number of the source of the next sequence: a function of seed, position, weights and what is exhausted.

        Raises:
            EndOfData: nothing is left.
        """
        weights = self._weights_at(step)
        if self._exhausted == "drop":
            weights = [0.0 if self._is_exhausted(number) else weight for number, weight in enumerate(weights)]
            if not any(weights):
                raise EndOfData
        value = keyed_hash(self._seed, _CHOICE, self.position)
        number = next(number for number, border in enumerate(self._borders_of(tuple(weights))) if value < border)
        if self._exhausted == "stop" and self._is_exhausted(number):
            raise EndOfData
        return number

    def take(self, number: int) -> int:
        """Count a sequence of source `number`; how many were taken from it before."""
        before = self.drawn[number]
        self.drawn[number] += 1
        self.position += 1
        return before

    def epochs(self) -> list[float | None]:
        """How often each source has been gone through; None where its length is unknown."""
        return [drawn / length if length else None for drawn, length in zip(self.drawn, self._lengths, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"position": self.position, "drawn": list(self.drawn)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            CheckpointError: malformed, or of another number of sources.
        """
        try:
            position, drawn = int(state["position"]), [int(count) for count in state["drawn"]]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the data position in the checkpoint is malformed ({malformed(error)})") from error
        if min([position, *drawn]) < 0:
            raise CheckpointError("the data position in the checkpoint is malformed (a count is below 0)")
        if len(drawn) != len(self.drawn):
            raise CheckpointError(
                f"the checkpoint has positions of {len(drawn)} sources, the run has {len(self.drawn)}; restore data.sources"
            )
        self.position, self.drawn = position, drawn

    def _weights_at(self, step: int) -> list[float]:
        return [weight(step) if callable(weight) else weight for weight in self._weights]

    def _is_exhausted(self, number: int) -> bool:
        length = self._lengths[number]
        return length is not None and self.drawn[number] >= length

    def _borders_of(self, weights: tuple[float, ...]) -> list[int]:
        if self._borders[0] != weights:
            total = sum(weights)
            if not weights or min(weights) < 0 or not total > 0:
                raise ValueError(f"found weights {list(weights)}, each must be at least 0 and one above 0")
            borders = [int(_RANGE * (part / total)) for part in accumulate(weights)]
            last = max(number for number, weight in enumerate(weights) if weight)
            borders[last:] = [_RANGE] * (len(weights) - last)
            self._borders = weights, borders
        return self._borders[1]


def check_same_data(state: dict[str, Any], expected: dict[str, Any]) -> None:
    """Refuse the position of another stream.

    Args:
        state: from a checkpoint.
        expected: what it must say of the data.
    Raises:
        CheckpointError: it says something else, or nothing.
    """
    for key, value in expected.items():
        if key not in state:
            raise CheckpointError(f"the data position in the checkpoint is malformed ({key!r} is missing)")
        if state[key] != value:
            raise CheckpointError(
                f"the checkpoint was made with other data: {key} was {state[key]}, is {value}; "
                "restore data.* and train.seed as they were, or start another run"
            )
