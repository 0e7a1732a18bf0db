"""A table of a page in docs/, as its cells: for tests that hold a page to what the code does."""

from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def table(page: str, corner: str) -> list[list[str]]:
    """The rows of the one table in `docs/page` whose first column is headed `corner`, head first, cells stripped, without the rule."""
    lines = (DOCS / page).read_text().splitlines()
    (start,) = [number for number, line in enumerate(lines) if line.startswith(f"| {corner} |")]
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [rows[0], *rows[2:]]
