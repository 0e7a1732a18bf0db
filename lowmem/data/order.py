"""Order without state: keyed hashes and permutations, so that resuming needs one integer (D7)."""

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 6


def keyed_hash(*values: int) -> int:
    """A 64-bit hash of whole numbers, the same on every machine and in every version of Python.

    Source: the finaliser of SplitMix64, Steele et al. 2014, doi:10.1145/2660193.2660195, chained over the values.
    """
    state = 0
    for value in values:
        state = (state ^ (value & _MASK)) + _GOLDEN & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


class KeyedPermutation:
    """A shuffle of 0..size-1 that computes each element when asked.

    A Feistel network permutes the next power of four; what falls outside is permuted again until it falls inside, which
    takes fewer than four rounds on average.

    Args:
        size: at least 1.
        key: 64 bits; another key is another shuffle.
    Memory: none that grows with `size`.
    Source: Black & Rogaway 2002, "Ciphers with arbitrary finite domains", doi:10.1007/3-540-45760-7_9 (cycle walking).
    """

    def __init__(self, size: int, key: int):
        if size < 1:
            raise ValueError(f"found size {size}, allowed 1 or more")
        self._size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half_mask = (1 << self._half_bits) - 1
        self._keys = [keyed_hash(key, number) for number in range(_ROUNDS)]

    def __getitem__(self, position: int) -> int:
        """The element at `position`.

        Raises:
            IndexError: `position` is outside 0..size-1.
        """
        if not 0 <= position < self._size:
            raise IndexError(f"found position {position}, allowed 0..{self._size - 1}")
        value = self._permute(position)
        while value >= self._size:
            value = self._permute(value)
        return value

    def __len__(self) -> int:
        return self._size

    def _permute(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._half_mask
        for key in self._keys:
            left, right = right, left ^ (keyed_hash(key, right) & self._half_mask)
        return left << self._half_bits | right
