"""Files that several tests share: what one of them changed would be another's input."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def content(path: Path) -> dict[str, bytes]:
    """Every file below a folder, or the one file, by its name."""
    if path.is_file():
        return {path.name: path.read_bytes()}
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@contextmanager
def read_only(path: Path) -> Iterator[Path]:
    """For a shared fixture to yield from: fails when the last test that uses it is over and any has changed a file."""
    before = content(path)
    yield path
    after = content(path)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    assert not changed, f"tests share {path} and one changed {', '.join(changed)}; have it copy the folder first"
