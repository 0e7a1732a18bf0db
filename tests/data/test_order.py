"""Keyed hashes and permutations."""

import pytest

from lowmem.data.shards import KeyedPermutation, keyed_hash


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1000, 4097])
@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_a_permutation_is_a_bijection(size, key):
    permutation = KeyedPermutation(size, key)
    assert sorted(permutation[position] for position in range(size)) == list(range(size))


def test_other_keys_give_other_orders_without_pattern():
    size = 10_000
    orders = [[KeyedPermutation(size, key)[position] for position in range(0, size, 7)] for key in (1, 2)]
    # two random orders agree in one place on average; ten would happen about once in 10^7 trials (Poisson)
    assert sum(a == b for a, b in zip(*orders, strict=True)) < 10
    steps = {(b - a) % size for a, b in zip(orders[0], orders[0][1:], strict=False)}
    assert len(steps) > 0.9 * len(orders[0])  # neighbours do not stay at a fixed distance (random: about 93 % distinct)


def test_a_place_of_the_order_is_fair():
    # over many keys the first element is uniform over 0..7: 8000 draws, 1000 each, standard deviation sqrt(1000 * 7/8) = 30
    counts = [0] * 8
    for key in range(8000):
        counts[KeyedPermutation(8, key)[0]] += 1
    assert max(abs(count - 1000) for count in counts) < 5 * 30


def test_positions_outside_are_refused():
    for position in (-1, 5):
        with pytest.raises(IndexError, match=r"allowed 0\.\.4"):
            KeyedPermutation(5, 0)[position]
    with pytest.raises(ValueError, match="size 0"):
        KeyedPermutation(0, 0)


def test_the_hash_is_fixed_for_all_time():
    # saved runs depend on these values: a change would silently reorder the data of every run that resumes
    assert keyed_hash(0) == 0xE220A8397B1DCDAF  # SplitMix64's published first output for seed 0
    assert keyed_hash(1, 2, 3) == keyed_hash(1, 2, 3)
    assert keyed_hash(1, 2) != keyed_hash(2, 1)
