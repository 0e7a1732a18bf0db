"""Which source is drawn: shares, schedules of weights, and the end of a source."""

from collections import Counter

import pytest

from lowmem.config.schema import SourceConfig
from lowmem.data.stream import EndOfData, Mixture
from lowmem.system.errors import CheckpointError


def draw(mixture: Mixture, count: int, step: int = 0) -> list[int]:
    numbers = []
    for _ in range(count):
        number = mixture.choose(step)
        mixture.take(number)
        numbers.append(number)
    return numbers


def within_sampling_error(found: int, draws: int, share: float) -> bool:
    """Five standard deviations of a binomial: one failure in about 10^6 seeds, and the seed is fixed."""
    return abs(found - draws * share) < 5 * (draws * share * (1 - share)) ** 0.5


def test_shares_match_the_weights():
    draws, weights = 20_000, (5.0, 3.0, 2.0)
    counts = Counter(draw(Mixture(weights, [None] * 3, seed=7), draws))
    for number, weight in enumerate(weights):
        assert within_sampling_error(counts[number], draws, weight / sum(weights))


def test_a_schedule_of_weights_goes_in_straight_lines():
    source = SourceConfig(path="a", weight_schedule={0: 1.0, 100: 3.0, 200: 0.0})
    assert [source.weight_at(step) for step in (0, 50, 100, 150, 200, 10**6)] == [1.0, 2.0, 3.0, 1.5, 0.0, 0.0]
    assert SourceConfig(path="a", weight=0.7).weight_at(5) == 0.7
    mixture = Mixture([source.weight_at, 1.0], [None, None], seed=3)
    for step, share in ((0, 0.5), (100, 0.75), (150, 0.6)):
        assert within_sampling_error(draw(mixture, 5000, step).count(0), 5000, share)
    assert draw(mixture, 500, step=200) == [1] * 500


def test_a_dropped_source_leaves_the_others_their_relative_shares():
    mixture = Mixture([8.0, 3.0, 1.0], [100, None, None], seed=1, exhausted="drop")
    numbers = draw(mixture, 8000)
    assert numbers.count(0) == 100
    assert mixture.epochs() == [1.0, None, None]
    after = numbers[1000:]
    assert 0 not in after
    assert within_sampling_error(after.count(1), len(after), 0.75)


def test_when_every_source_is_dropped_the_data_ends():
    mixture = Mixture([1.0, 1.0], [3, 5], seed=1, exhausted="drop")
    assert Counter(draw(mixture, 8)) == {0: 3, 1: 5}
    with pytest.raises(EndOfData):
        mixture.choose()


def test_stop_ends_with_the_first_exhausted_source_and_repeat_never():
    stopping, repeating = (Mixture([1.0, 1.0], [20, 5000], seed=2, exhausted=policy) for policy in ("stop", "repeat"))
    with pytest.raises(EndOfData):
        draw(stopping, 1000)
    assert stopping.drawn[0] == 20
    assert stopping.drawn[1] < 60
    draw(repeating, 1000)
    assert repeating.epochs()[0] > 20


@pytest.mark.parametrize("policy", ["repeat", "drop"])
def test_resuming_equals_going_on(policy):
    def make() -> Mixture:
        return Mixture([lambda step: 1 + step / 10, 2.0], [30, 400], seed=5, exhausted=policy)

    whole, first = make(), make()
    numbers = [draw(whole, 1, step)[0] for step in range(100)]
    assert [draw(first, 1, step)[0] for step in range(37)] == numbers[:37]
    resumed = make()
    resumed.load_state_dict(first.state_dict())
    assert [draw(resumed, 1, step)[0] for step in range(37, 100)] == numbers[37:]


def test_impossible_weights_and_states_are_refused():
    for weights in ([0.0, 0.0], [1.0, -1.0], []):
        with pytest.raises(ValueError, match="at least 0 and one above 0"):
            Mixture(weights, [None] * len(weights), seed=0)
    with pytest.raises(CheckpointError, match="positions of 1 sources, the run has 2"):
        Mixture([1.0, 1.0], [None, None], seed=0).load_state_dict({"position": 3, "drawn": [3]})
