"""The table of promises names tests that exist, and every row."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROWS = [
    *(f"L{n}" for n in range(1, 14)),
    *(f"T{n}" for n in range(1, 15)),
    *(f"I{n}" for n in range(1, 10)),
    *(f"A{n}" for n in range(1, 13)),
]


def test_every_row_is_there_and_every_test_exists():
    lines = [line for line in (ROOT / "docs/checklist.md").read_text().splitlines() if re.match(r"\| [LTIA]\d", line)]
    assert [line.split("|")[1].strip() for line in lines] == ROWS
    for line in lines:
        for path, _, name in (reference.partition("::") for reference in re.findall(r"`(tests/[^`]+)`", line)):
            assert (ROOT / path).is_file(), path
            assert not name or re.search(rf"^def {name}\b", (ROOT / path).read_text(), re.MULTILINE), f"{path}::{name}"
        for target in re.findall(r"\]\(([^)]+)\)", line):
            assert (ROOT / "docs" / target).exists(), target
