"""The table of promises names tests that exist, and every row."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
OURS = {path.name for base in (ROOT, ROOT / "lowmem") for path in base.iterdir() if path.is_dir()}
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


def test_pages_name_files_that_exist():
    """Links, and paths of the repository or of the package in backquotes."""
    missing = []
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("profiling/*.md")]:
        if page.name in ("CHANGELOG.md", "LOG.md"):  # what was
            continue
        text = page.read_text()
        links = [target for target in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in target]
        missing += [f"{page.name}: {target}" for target in links if not (page.parent / target).exists()]
        for path in re.findall(r"`([\w./-]+/[\w./-]*\.(?:py|yaml|json|md))", text):
            if path.split("/")[0] in OURS and not any((base / path).exists() for base in (ROOT, ROOT / "lowmem")):
                missing.append(f"{page.name}: {path}")
    assert missing == []
