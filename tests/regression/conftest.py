"""A model directory and the run that is imported from it: made once for each process and never changed."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reference.read_only import read_only


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Iterator[Path]:
    from tests.reference.tiny_families import save_tiny  # imports torch

    folder = tmp_path_factory.mktemp("llama") / "llama"
    save_tiny(folder, "llama")
    with read_only(folder):
        yield folder


@pytest.fixture(scope="session")
def imported(llama, tmp_path_factory) -> Iterator[Path]:
    from lowmem.export.import_hf import import_directory  # imports torch

    folder = tmp_path_factory.mktemp("imported") / "run"
    import_directory(llama, folder)
    with read_only(folder):
        yield folder
