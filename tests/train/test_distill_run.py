"""`lowmem pretrain` with a teacher: it learns from it, its memory is counted and predicted, and mistakes are refused."""

import json
from pathlib import Path

import pytest

from lowmem.cli.main import main
from tests.planning.small import stub_measurements
from tests.reference.read_only import read_only
from tests.train.tiny_run import final_bits, metrics, tiny_arguments, write_text

STEPS = {"train.steps": 12, "train.save_every": 6, "train.eval_every": 12, "optim.schedule": "constant"}


def pretrain(folder: Path, name: str, *flags: str, **overrides) -> int:
    text = folder / "text.txt"
    arguments = tiny_arguments(folder / name, text if text.exists() else write_text(text), **{**STEPS, **overrides})
    return main(["pretrain", "--quiet", *arguments, *flags])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill")
    assert pretrain(folder, "teacher", **{"train.steps": 60, "model.dim": 64}) == 0
    with read_only(folder / "teacher"):
        yield folder / "teacher"


def distill(teacher, **more):
    return {"train.distill.teacher": teacher, "train.distill.weight": 0.7, **more}


def test_a_student_resumes_bit_for_bit_and_learns_from_its_teacher(tmp_path, teacher, capsys, monkeypatch):
    assert pretrain(tmp_path, "alone") == 0
    assert pretrain(tmp_path, "whole", **distill(teacher)) == 0
    assert pretrain(tmp_path, "parts", **distill(teacher, **{"train.steps": 6})) == 0
    assert pretrain(tmp_path, "parts", **distill(teacher)) == 0
    assert final_bits(tmp_path / "whole")["model.safetensors"] == final_bits(tmp_path / "parts")["model.safetensors"]
    assert final_bits(tmp_path / "whole")["model.safetensors"] != final_bits(tmp_path / "alone")["model.safetensors"]
    # the validation loss is the usual one, on the text alone: with a distance of 0.7 in it, it would be far from the other
    losses = {name: [line["val_loss"] for line in metrics(tmp_path / name) if "val_loss" in line][-1] for name in ("alone", "whole")}
    assert abs(losses["whole"] - losses["alone"]) < 0.5
    counted = json.loads((tmp_path / "whole" / "memory.json").read_text())["measured"]["components"]
    stub_measurements(monkeypatch)
    capsys.readouterr()
    assert pretrain(tmp_path, "dry", "--dry_run", "--json", **distill(teacher)) == 0
    predicted = json.loads(capsys.readouterr().out)["predicted"]["components"]
    assert predicted["teacher"] == counted["teacher"] > counted["weights"]


def test_a_perfect_copy_of_the_teacher_has_only_the_usual_loss_to_learn_from(tmp_path, teacher):
    """With share 1 a student that is its teacher has loss zero: here, one of the same shape that starts elsewhere gets nearer to it."""
    settings = {"model.dim": 64, "train.distill.weight": 1.0, "train.steps": 40}
    assert pretrain(tmp_path, "copy", **distill(teacher, **settings)) == 0
    losses = [line["loss"] for line in metrics(tmp_path / "copy") if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("overrides, message", [
    ({"train.distill.teacher": "nowhere"}, "train.distill.teacher is nowhere, which has no config.yaml"),
    ({"data.tokenizer": "chars"}, "tokenizer.json is another tokenizer than this run's; give the student data.tokenizer="),
    ({"model.vocab_size": 300}, "has model.vocab_size 257, the student 300"),
    ({"train.update": "layerwise"}, "train.distill needs train.update=accumulate and engine.name=local"),
    ({"train.distill.temperature": 0}, "train.distill.temperature is 0.0, must be at least 0.001"),
])  # fmt: skip
def test_mistakes_are_refused_in_one_line(tmp_path, teacher, capsys, overrides, message):
    assert pretrain(tmp_path, "refused", **{**distill(teacher), **overrides}) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_a_dry_run_refuses_a_teacher_that_is_not_there(tmp_path, capsys):
    assert pretrain(tmp_path, "refused", "--dry_run", **{"train.distill.teacher": "nowhere"}) == 2
    captured = capsys.readouterr()
    assert "train.distill.teacher is nowhere, which has no config.yaml" in captured.err
    assert (captured.err.count("\n"), captured.out) == (1, "")


def test_another_tokenizer_of_the_same_size_is_refused(tmp_path, capsys):
    assert pretrain(tmp_path, "chars", **{"data.tokenizer": "chars"}) == 0
    (tmp_path / "other.txt").write_text((tmp_path / "text.txt").read_text().replace("d", "D"))
    capsys.readouterr()
    overrides = {"data.tokenizer": "chars", "data.sources": f"[{{path: {tmp_path / 'other.txt'}}}]"}
    assert pretrain(tmp_path, "refused", **{**distill(tmp_path / "chars"), **overrides}) == 2
    assert "is another tokenizer than this run's" in capsys.readouterr().err
