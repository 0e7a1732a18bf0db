"""Configuration: YAML and overrides in, all problems out at once."""

import inspect
import re
import typing
from pathlib import Path

import pytest

from lowmem.config.dump import configuration_page, dump_config
from lowmem.config.keys import allowed, field_docs, hints, known_keys
from lowmem.config.load import load_run_config
from lowmem.config.schema import PhaseConfig, RunConfig, SourceConfig, resolve_micro_batch_size
from lowmem.system.errors import ConfigError

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
    path.write_text(dump_config(config, comments=comments))
    assert load_run_config(path) == config


@pytest.mark.parametrize("comments", [False, True])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_read_back_equal_one_key_a_line(tmp_path, path, comments):
    config = load_run_config(path)
    printed = dump_config(config, comments=comments)
    (tmp_path / "config.yaml").write_text(printed)
    assert load_run_config(tmp_path / "config.yaml") == config
    lines = [line.strip() for line in printed.splitlines() if not line.lstrip().startswith("#")]
    entries = len(config.data.sources) + len(config.phases)  # one line each, below their key
    assert len(lines) == len(field_docs()) + entries
    assert [line.partition(":")[0] for line in lines if not line.startswith("- {")] == [key.rpartition(".")[2] for key in field_docs()]


@pytest.mark.parametrize(
    "text", ["0", "2024", "1e-4", "1e9", "010", "true", "null", "", "a: b", "a #b", "[x]", "-", "'", "a\nb ", "é\u2028\t"]
)
def test_awkward_text_reads_back_equal(tmp_path, text):
    config = RunConfig(run_dir=text)
    config.data.val_source = config.train.tokens = config.data.sources[0].path = text
    config.model.lorpt.ranks = {text: 3, "*.down": 0}
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config, comments=True), encoding="utf-8")
    read = load_run_config(path, check=False)
    if text in ("0", "2024", "010", "1e-4", "1e9"):  # a count is a count, quoted or not
        assert float(read.train.tokens) == float(text)
        read.train.tokens = text
    assert read == config


def test_printed_comments_stand_above_their_keys():
    lines = dump_config(RunConfig(), comments=True).splitlines()
    assert max(map(len, lines)) <= 140
    key_lines = iter([number for number, line in enumerate(lines) if not line.lstrip().startswith(("#", "- "))])
    for key, doc in field_docs().items():
        number = next(key_lines)
        assert lines[number].strip().startswith(key.rpartition(".")[2] + ":")
        comment = []
        while number and lines[number - 1].lstrip().startswith("#"):
            number -= 1
            comment.insert(0, lines[number].strip().removeprefix("# "))
        assert " ".join(comment).startswith(doc if key != "data.sources" else doc[:40]), key
    sources = [line.strip() for line in lines[lines.index("data:") : lines.index("  sources:")]]
    for name in inspect.signature(SourceConfig).parameters:
        assert any(line.startswith(f"#   {name}: ") for line in sources), name


def test_unchecked_configurations_still_have_right_keys_and_types():
    assert load_run_config(check=False) == RunConfig()
    assert "set exactly one of the two" in problems_of()
    for override, expected in (("train.step=1", "not a known key"), ("train.steps=ten", "expected a whole number")):
        with pytest.raises(ConfigError, match=expected):
            load_run_config("", [override], check=False)


def test_scalars_in_text_fields_are_the_text_that_was_written(tmp_path):
    config = load_run_config(
        "", ["train.steps=1", "budget.vram=0", "run_dir=2024", "data.val_source=1e-4", "budget={ram: 0100B, vram: 00}"]
    )
    assert (config.run_dir, config.data.val_source, config.budget.ram, config.budget.vram) == ("2024", "1e-4", "0100B", "00")
    assert load_run_config("", ["train.steps=1", "budget.vram=1GiB", "budget.vram="]).budget.vram == ""
    path = tmp_path / "x.yaml"
    path.write_text(
        "run_dir: 010\ntrain: {steps: 3, tokens: 0}\nbudget: &sizes {vram: 0, ram: 4GiB}\n"
        "data: {tokenizer: yes, sources: [{path: 2024, weight: 2, text_field: 1.50}]}\n"
    )
    config = load_run_config(path)
    assert (config.run_dir, config.budget.vram, config.data.tokenizer, config.train.steps) == ("010", "0", "yes", 3)
    source = config.data.sources[0]
    assert (source.path, source.text_field, source.weight) == ("2024", "1.50", 2.0)


@pytest.mark.parametrize("value", ["[a]", "[0]", "{a: 1}", "null"])
def test_lists_and_maps_are_no_text(tmp_path, value):
    path = tmp_path / "x.yaml"
    path.write_text(f"run_dir: {value}\ntrain: {{steps: 1}}\n")
    assert "run_dir is " in (message := problems_of(path=path))
    assert "expected text" in message


@pytest.mark.parametrize("override", ["train.steps=", "optim.betas=null", "data.sources=null", "data.sources=[{path: a, subset: null}]"])
def test_no_key_is_null(override):
    assert "is null, expected " in problems_of("train.tokens=5M", override)


@pytest.mark.parametrize("text", ["optim:\ntrain: {steps: 1}\n", "model: {lorpt: }\ntrain: {steps: 1}\n"])
def test_no_section_is_null(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    assert "is null, expected a section with keys below it" in problems_of(path=path)


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
        ("optim.betas=[.nan,0.9]", "optim.betas has nan, must be in [0, 1)"),
        ("model.dim", "--model.dim has no value"),
        ("budget.vram=0 device=cuda", "budget.vram is 0 (no GPU), but device is cuda; set device=cpu or auto, or raise budget.vram"),
        ("budget.vram=6GiB device=cpu", "budget.vram is 6GiB, but device is cpu, which has none; leave it out, or set device=cuda or auto"),
        ("data.sources=[{path: a, max_bytes: -1}]", "data.sources[0].max_bytes is -1, must be at least 0, at most"),
        ("data.tokenizer_vocab_size=1", "data.tokenizer_vocab_size is 1, must be at least 2, at most 16777216"),
        ("data.document_mask=true model.name=i3", "data.document_mask needs model.name=decoder"),
        ("run_dir=", "run_dir is empty, must name a folder; such as runs/default"),
    ],
)
def test_contradictions_are_named(override, expected):
    assert expected in problems_of("train.steps=10", *_split(override))


@pytest.mark.parametrize("engine", [{}, {"engine.name": "deepspeed", "engine.zero_stage": 3}])
def test_nvme_offload_is_refused_with_its_reason_and_what_to_use(engine):
    message = problems_of("train.steps=10", *(f"{key}={value}" for key, value in engine.items()), "engine.offload=nvme")
    assert "engine.offload is 'nvme', expected none | cpu; DeepSpeed's NVMe offload trains wrongly" in message
    assert "train.update=layerwise and train.weights_at=disk" in message
    assert len(message.splitlines()) == 1


def test_a_value_without_a_reason_has_the_plain_message():
    assert problems_of("train.steps=10", "engine.offload=disk").endswith("engine.offload is 'disk', expected none | cpu")


def test_contradictions_are_found_beside_numbers_that_mean_nothing():
    message = problems_of("train.steps=3", "optim.lr=.nan", "model.num_heads=3", "data.seq_len=0")
    assert "3 problems" in message
    assert "model.dim is 256, not a multiple of model.num_heads (3)" in message


def _split(override: str) -> list[str]:
    """Several overrides in one string are separated by a space before model., train. or device=."""
    return re.split(r" (?=model\.|train\.|device=)", override)


@pytest.mark.parametrize("device, vram", [("cpu", "0"), ("cpu", ""), ("cuda", ""), ("cuda", "6GiB"), ("auto", "0"), ("auto", "6GiB")])
def test_device_and_its_memory_agree(device, vram):
    assert load_run_config("", ["train.steps=1", f"device={device}", f"budget.vram={vram}"]).budget.vram == vram


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


def test_the_page_of_ranges_is_the_table_of_the_checks():
    assert (ROOT / "docs/configuration.md").read_text() == configuration_page()


def test_every_number_has_a_range_that_help_shows():
    for cls in (RunConfig, SourceConfig, PhaseConfig):
        sections = {"": cls, **known_keys(cls)}
        for key, doc in field_docs(cls).items():
            section, _, name = key.rpartition(".")
            kind = hints(sections[section])[name]
            parts = {kind, *typing.get_args(kind)} if typing.get_origin(kind) is not typing.Literal else set()
            if {int, float} & parts:
                assert (found := allowed(sections[section], name)), f"{cls.__name__} {key}"
                assert doc.endswith(f" Allowed: {found}.")
