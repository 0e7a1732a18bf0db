"""The run directory: one writer, comparable settings, metrics that end where the checkpoint is."""

import json
import os
from copy import deepcopy

import pytest

from lowmem.config.load import load_run_config
from lowmem.system.errors import CheckpointError, ConfigError, StorageError
from lowmem.train.run_dir import FREE_KEYS, RESOLVED_KEYS, RunDir, _flat


def config(**overrides):
    settings = {"train.steps": 10, "data.document_mask": True, **{key.replace("__", "."): value for key, value in overrides.items()}}
    return load_run_config("", [f"{key}={value}" for key, value in settings.items()])


def test_only_one_process_may_train_in_it(tmp_path):
    first = RunDir(tmp_path / "run")
    with pytest.raises(ConfigError, match="another process is training in"):
        RunDir(tmp_path / "run")
    first.close()
    RunDir(tmp_path / "run").close()


def test_a_change_that_alters_the_result_is_refused_with_both_values(tmp_path):
    run_dir = RunDir(tmp_path)
    run_dir.write_config(config())
    run_dir.check_compatible(config(), resolved=True)
    run_dir.check_compatible(config(train__steps=99, train__micro_batch_size=1, train__save_every=7), resolved=True)
    with pytest.raises(ConfigError) as caught:
        run_dir.check_compatible(config(optim__lr=0.5, train__seed=3), resolved=True)
    assert "optim.lr was 0.001, now 0.5; train.seed was 0, now 3" in str(caught.value)
    assert "--fresh" in str(caught.value)


def test_keys_that_setup_fills_in_are_compared_once_resolved(tmp_path):
    run_dir = RunDir(tmp_path)
    run_dir.write_config(config(model__vocab_size=300))
    run_dir.check_compatible(config(), resolved=False)
    with pytest.raises(ConfigError, match="model.vocab_size was 300, now 0"):
        run_dir.check_compatible(config(), resolved=True)


def test_free_keys_exist():
    from dataclasses import asdict

    assert set(_flat(asdict(config()))) >= {*FREE_KEYS, *RESOLVED_KEYS}


# Settings whose change on resuming is refused, because the result would silently be another one.
REFUSED = {
    "data": "kind template truncation add_tokens "
    "sources exhausted tokenizer tokenizer_vocab_size lowercase seq_len document_mask decode_errors val_fraction val_split "
    "val_source",
    "optim": "name lr matrix_lr momentum betas eps weight_decay state_bits backend clip clip_by schedule warmup_steps min_lr_ratio "
    "decay_fraction",
    "train": "global_batch_size seq_len_schedule update boundary_dtype precision weight_dtype label_smoothing z_loss "
    "double_quant distill.teacher distill.weight distill.temperature init_from seed",
    "adapter": "method r lora_alpha lora_dropout target_modules loraplus_lr_ratio last_k num_virtual_tokens",
    "engine": "name zero_stage offload config",
    "model": "path revision name dim hidden_dim num_layers num_heads num_kv_heads vocab_size max_seq_len positions rope_theta norm "
    "norm_eps activation bias tie_embeddings attention_rank state_dim lorpt.rank lorpt.targets lorpt.ranks lorpt.bottleneck lorpt.init "
    "lorpt.share_down",
}


def test_every_key_is_free_or_refused():
    """A new key must be put into one of the two: is the result the same if it changes when the run goes on?"""
    from dataclasses import asdict

    refused = {f"{section}.{name}" for section, names in REFUSED.items() for name in names.split()} | {"phases"}
    assert not refused & set(FREE_KEYS)
    assert refused | set(FREE_KEYS) == set(_flat(asdict(config())))


def test_a_run_from_before_documents_were_kept_apart_goes_on_without_the_mask_only(tmp_path):
    run_dir = RunDir(tmp_path)
    run_dir.write_config(config())
    path = tmp_path / "config.yaml"
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if "document_mask" not in line]
    assert len(kept) == len(lines) - 1
    path.write_text("".join(kept))
    run_dir.check_compatible(config(data__document_mask=False), resolved=True)
    with pytest.raises(ConfigError, match="data.document_mask was false, now true"):
        run_dir.check_compatible(config(), resolved=True)


def other(key, value):
    """A value of the same type that is not `value`."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return {"x": 1} if isinstance(value, dict) else ["x"] if isinstance(value, (list, tuple)) else f"{value}x"


def test_a_change_of_any_other_key_is_refused(tmp_path):
    from dataclasses import asdict

    run_dir = RunDir(tmp_path)
    written = config()
    run_dir.write_config(written)
    for key, value in _flat(asdict(written)).items():
        if key == "phases":
            continue
        changed = deepcopy(written)
        *parents, last = key.split(".")
        section = changed
        for parent in parents:
            section = getattr(section, parent)
        setattr(section, last, other(key, value))
        if key in FREE_KEYS:
            run_dir.check_compatible(changed, resolved=True)
        else:
            with pytest.raises(ConfigError, match=f"holds a run with other settings: {key} was"):
                run_dir.check_compatible(changed, resolved=True)


def test_starting_over_keeps_the_old_run(tmp_path):
    run_dir = RunDir(tmp_path / "run")
    assert run_dir.start_over() is None
    for number in (1, 2):
        run_dir.write_config(config(train__seed=number))
        assert run_dir.start_over() == tmp_path / f"run.old-{number}"
        assert load_run_config(tmp_path / f"run.old-{number}" / "config.yaml").train.seed == number
    assert not (tmp_path / "run" / "config.yaml").exists()
    with pytest.raises(ConfigError):
        RunDir(tmp_path / "run")


def test_metrics_are_cut_where_the_checkpoint_is(tmp_path):
    run_dir = RunDir(tmp_path)
    run_dir.truncate_metrics(5)
    for step in range(1, 6):
        run_dir.append_metrics({"step": step, "loss": 1.0 / step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    run_dir.truncate_metrics(3)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]


def test_a_path_that_cannot_be_written_is_a_storage_error(tmp_path, monkeypatch):
    import os

    def refuse(*args, **kwargs):
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError, match="Read-only file system"):
        RunDir(tmp_path / "run")


def test_checkpoints_without_their_configuration_are_neither_resumed_nor_lost(tmp_path):
    run_dir = RunDir(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(ConfigError, match="has checkpoints but no config.yaml"):
        run_dir.check_compatible(config(), resolved=True)
    assert run_dir.start_over() == tmp_path / "run.old-1"
    assert (tmp_path / "run.old-1" / "checkpoints" / "step-00000001").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "memory.json", "tokenizer.json"])
def test_a_pipe_among_the_files_of_a_run_is_refused_instead_of_waited_for(tmp_path, name):
    RunDir(tmp_path).close()
    os.mkfifo(tmp_path / name)
    for _ in range(2):  # and leaves no lock behind
        with pytest.raises(CheckpointError, match=f"{name} is a pipe or a device"):
            RunDir(tmp_path)
