"""What tests of several folders share, made once for each process and never changed."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.reference.read_only import read_only


@pytest.fixture(scope="session")
def chat(tmp_path_factory) -> Iterator[Path]:
    """Conversations to fine-tune on."""
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    path.write_text(
        "\n".join(json.dumps({"prompt": f"some words {n % 7}", "response": "the other words " * (n % 3 + 1)}) for n in range(60))
    )
    with read_only(path):
        yield path


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Iterator[Path]:
    """A Llama directory to fine-tune, whose matrices are large enough for 4 bits."""
    from tests.reference.random_models import save_theirs  # imports torch, which the tests of the command line do without

    folder = tmp_path_factory.mktemp("base") / "hf"
    save_theirs(folder, "llama", hidden_size=64, intermediate_size=64)
    with read_only(folder):
        yield folder


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directories of tiny models of transformers, by family; each is made once a file."""
    from tests.reference.tiny_families import save_tiny  # imports torch

    made: dict[str, Path] = {}

    def directory(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("models") / family
            save_tiny(made[family], family)
        return made[family]

    return directory
