"""A disk that is full at any write is exit code 7 with one line, and leaves what was there before, whole; and no leftovers."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowmem.cli.main import main
from lowmem.engine.run_model import load_run_model
from lowmem.export.hf import export_run_model
from tests.reference.read_only import content
from tests.train.tiny_run import finetune_arguments, tiny_arguments, write_text

SIZES = (0, 200, 3000)  # bytes that a file may have: nothing at all, short JSON files, everything but weights and tokenizers


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Every write past `size` fails, in any library, as one on a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refused(capsys, *words: str) -> None:
    """The command ends with 7 and one line."""
    capsys.readouterr()
    assert main(list(words)) == 7
    error = capsys.readouterr().err
    assert error.startswith("lowmem: error: ")
    assert len(error.splitlines()) == 1, error


@pytest.mark.parametrize("size", SIZES)
def test_an_export_is_whole_or_the_one_before(size, imported, tmp_path, capsys):
    old = tmp_path / "old"
    export_run_model(load_run_model(imported), old)
    (old / "notes.txt").write_text("mine")
    before = content(old)
    words = ["export", "--run", str(imported), "--dtype=bf16", "--out"]
    with files_of_at_most(size):
        refused(capsys, *words, str(old), "--overwrite")
        refused(capsys, *words, str(tmp_path / "new" / "deep"))
    assert content(old) == before
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert main([*words, str(old), "--overwrite"]) == 0
    after = content(old)
    assert set(after) == set(before)
    assert after["notes.txt"] == b"mine"
    assert len(after["model.safetensors"]) < len(before["model.safetensors"])


@pytest.mark.parametrize("size", SIZES)
def test_an_import_is_whole_or_nothing(size, llama, tmp_path, capsys):
    with files_of_at_most(size):
        refused(capsys, "import", str(llama), "--out", str(tmp_path / "run"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_last_writes_of_finetuning(llama, chat, tmp_path, capsys):
    def words(run: Path) -> list[str]:
        return ["finetune", "--quiet", *finetune_arguments(llama, chat, run, train__steps=1)]

    def saved(run: Path) -> dict[str, dict[str, bytes]]:
        return {name: content(run / name) for name in ("adapter", "merged")}

    whole = tmp_path / "whole"
    assert main(words(whole)) == 0
    before = saved(whole)
    weights = [before["adapter"]["adapter_model.safetensors"], before["merged"]["model.safetensors"]]
    for size in (200, 3000, len(weights[1]) - 1):  # the last: everything but the merged weights
        run = tmp_path / f"run-{size}"
        with files_of_at_most(size):
            refused(capsys, *words(run))
            main(words(whole))
        assert saved(whole) == before
        assert saved(run)["merged"] == {}
        assert not [path for path in run.rglob("*") if "writing" in path.name or path.suffix == ".tmp"]
        assert main(words(run)) == 0
        again = saved(run)
        assert [again["adapter"]["adapter_model.safetensors"], again["merged"]["model.safetensors"]] == weights


def test_a_run_leaves_no_half_of_a_file(tmp_path, capsys):
    text = write_text(tmp_path / "text.txt")
    assert main(["pretrain", "--quiet", *tiny_arguments(tmp_path / "first", text, **{"train.steps": 1})]) == 0
    for size in (0, 1000):
        with files_of_at_most(size):
            refused(capsys, "pretrain", "--quiet", *tiny_arguments(tmp_path / f"run-{size}", text, **{"train.steps": 1}))
        left = {path.name for path in (tmp_path / f"run-{size}").rglob("*") if path.is_file()}
        assert not {name for name in left if name.endswith(".tmp")}
        assert "config.yaml" not in left  # it has more than 1000 bytes


def test_a_plan_that_cannot_be_written_is_whole_or_absent(tmp_path):
    from lowmem.system.files import replace_file

    path = tmp_path / "plan.yaml"
    path.write_text("old")
    with files_of_at_most(10), pytest.raises(OSError):
        replace_file(path, "x" * 100)
    assert content(tmp_path) == {"plan.yaml": b"old"}
    (tmp_path / "link").symlink_to(path)
    replace_file(tmp_path / "link", "new")
    assert path.read_text() == "new"
    replace_file(Path("/dev/null"), "a device stays a device")
    assert Path("/dev/null").is_char_device()
