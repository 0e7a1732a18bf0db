"""Configuration: YAML and overrides in, all problems out at once."""

from pathlib import Path

import pytest

from lowmem.config import RunConfig, resolve_micro_batch_size
from lowmem.config_load import dump_run_config, field_docs, load_run_config
from lowmem.errors import ConfigError

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(ROOT.glob("configs/*/*.yaml"))


def problems_of(*overrides: str, path: Path | str = "") -> str:
    with pytest.raises(ConfigError) as caught:
        load_run_config(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_loads(path):
    assert load_run_config(path).total_steps() > 0


@pytest.mark.parametrize("comments", [False, True])
def test_printed_config_reads_back_equal(tmp_path, comments):
    config = load_run_config(
        "", ["train.steps=7", "optim.lr=1e-4", "data.sources=[{path: a b.txt, weight: 2}]", "model.lorpt.ranks={'blocks.0.*': 3}"]
    )
    assert config.optim.lr == 1e-4
    assert config.data.sources[0].stdlib is False
    path = tmp_path / "config.yaml"
    path.write_text(dump_run_config(config, comments=comments))
    assert load_run_config(path) == config


def test_every_field_is_documented():
    assert [key for key, doc in field_docs().items() if len(doc) < 10] == []
    assert len(field_docs()) > 60


def test_all_problems_are_reported_at_once(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("model: {dim: 130, nam: decoder}\ntrain: {steps: ten, lr: 3}\ndata: {sources: [{pth: x, weight: q}, 3]}\noptim: 5\n")
    message = problems_of("train.warmup_step=3", path=path)
    assert "8 problems" in message
    for expected in (
        "model.nam is not a known key; the nearest valid key is model.name",
        "train.lr is not a known key; the nearest valid key is optim.lr",
        "train.warmup_step is not a known key; the nearest valid key is optim.warmup_steps",
        "data.sources[0].pth is not a known key; the nearest valid key is path",
        "train.steps is 'ten', expected a whole number",
        "data.sources[0].weight is 'q', expected a number",
        "data.sources[1] is 3, expected keys such as path: FILE",
        "optim is 5, expected a section with keys below it",
    ):
        assert expected in message


@pytest.mark.parametrize(
    "override, expected",
    [
        ("model.num_heads=3", "model.dim is 256, not a multiple of model.num_heads (3)"),
        ("model.dim=12", "rope needs an even head width"),
        ("model.attention_rank=256", "model.attention_rank is 256, must be below model.dim / 2 (128)"),
        ("train.micro_batch_size=5", "which does not divide the 32 sequences of a rank; allowed: 1, 2, 4, 8, 16, 32 or auto"),
        ("train.tokens=5M", "set exactly one of the two"),
        ("train.tokens=many", "found 'many', expected a count"),
        ("budget.ram=4 apples", "budget.ram: found '4 apples', expected a size"),
        ("engine.zero_stage=2", "need engine.name=deepspeed"),
        ("data.val_fraction=1", "data.val_fraction is 1.0, must be in [0, 1)"),
        ("data.sources=[]", "data.sources is empty"),
        ("data.sources=[{path: a, stdlib: true}]", "data.sources[0] has path and stdlib; set exactly one"),
        ("optim.state_bits=5", "optim.state_bits is 5, expected 32 | 8"),
        ("train.weight_dtype=bf16 train.precision=fp32", "train.weight_dtype=bf16 needs train.precision bf16 or auto"),
        ("optim.betas=[0.9,1.0]", "optim.betas has 1.0, must be in [0, 1)"),
        ("model.dim", "--model.dim has no value"),
    ],
)
def test_contradictions_are_named(override, expected):
    assert expected in problems_of("train.steps=10", *_split(override))


def _split(override: str) -> list[str]:
    """Several overrides in one string are separated by a space before a section name."""
    head, *rest = override.split(" train.")
    return [head, *(f"train.{part}" for part in rest)]


def test_a_missing_file_names_those_that_exist(tmp_path):
    (tmp_path / "good.yaml").write_text("train: {steps: 1}\n")
    assert "good.yaml" in problems_of(path=tmp_path / "god.yaml")


@pytest.mark.parametrize("text", ["- a\n", "just text\n", "a: [1\n"])
def test_files_that_are_no_configuration(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    assert str(path) in problems_of(path=path)


def test_auto_micro_batch_is_the_largest_divisor_within_4096_tokens():
    config = RunConfig()
    config.train.global_batch_size, config.data.seq_len = 24, 512
    assert resolve_micro_batch_size(config, world_size=1) == 8
    assert resolve_micro_batch_size(config, world_size=2) == 6
    config.data.seq_len = 10_000
    assert resolve_micro_batch_size(config, world_size=1) == 1
    with pytest.raises(ValueError, match="5 ranks cannot share evenly"):
        resolve_micro_batch_size(config, world_size=5)


def test_tokens_are_rounded_up_to_whole_steps():
    config = load_run_config("", ["train.tokens=10k", "train.global_batch_size=4", "data.seq_len=64"])
    assert config.total_steps() == 40  # 10,000 / 256 = 39.06
