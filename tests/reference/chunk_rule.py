"""The published chunk rule, written as its description reads: one position at a time."""

TRIGRAMS = set(
    "the and ing ion tio for tha ter hat his ere ent her was you are not but can all whi one our out whe hav thi wit".split()  # noqa: SIM905
)


def chunk_at(text: str, pos: int) -> str:
    """The chunk that begins at `pos`."""
    if len(text) - pos >= 3:
        three = text[pos : pos + 3]
        after_space = pos > 0 and text[pos - 1] == " "
        before_space = pos + 3 < len(text) and text[pos + 3] == " "
        if three in TRIGRAMS or after_space or before_space:
            return three
        return text[pos : pos + 2]
    return text[pos : pos + 2]


def chunks(text: str) -> list[str]:
    """The whole text, cut."""
    found, pos = [], 0
    while pos < len(text):
        found.append(chunk_at(text, pos))
        pos += len(found[-1])
    return found


def encode(text: str, ids: dict[str, int], unknown: int) -> list[int]:
    """Ids by the published rule for unknown chunks: prefixes of 2, then 1, else unknown and on by one character."""
    found, pos = [], 0
    while pos < len(text):
        chunk = chunk_at(text, pos)
        for length in (len(chunk), 2, 1):
            if length <= len(chunk) and chunk[:length] in ids:
                found.append(ids[chunk[:length]])
                pos += length
                break
        else:
            found.append(unknown)
            pos += 1
    return found
