"""docs/models.md: every family has every cell, no cell says no, and what needs no process of its own is so."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/models.md").read_text().splitlines()


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "profiling"))
    try:
        import models_table

        yield models_table
    finally:
        sys.path.remove(str(ROOT / "profiling"))


def test_every_family_has_every_cell(script):
    rows = {
        cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in PAGE if line.startswith("|"))
    }
    assert rows["family"] == list(script.COLUMNS)
    for title in script.FAMILIES:
        assert len(rows[title]) == len(script.COLUMNS)
        assert not [cell for cell in rows[title] if cell in ("", "not run") or cell.startswith("**no**")]


@pytest.mark.parametrize("title", ["Qwen3", "Gemma 2", "GPT-2"])
def test_what_the_page_says_is_so(script, title, tmp_path):
    columns = tuple(column for column in script.COLUMNS if column not in script.RUNS)
    found = script.row(title, tmp_path, columns)
    assert not [cell for cell in found.values() if cell.startswith("**no**")]
