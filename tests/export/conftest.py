"""A model directory and the run that is imported from it: made once for each process and never changed."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lowmem.export.import_hf import import_directory
from tests.reference.random_models import save_theirs
from tests.reference.read_only import read_only


@pytest.fixture(scope="session")
def theirs(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("theirs") / "hf"
    save_theirs(folder)
    with read_only(folder):
        yield folder


@pytest.fixture(scope="session")
def run_dir(theirs, tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("imported") / "run"
    import_directory(theirs, folder)
    with read_only(folder):
        yield folder
