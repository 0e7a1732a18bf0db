"""Rates of a disk as the scratch file meets it: measured once, kept, assumed where nothing can be measured."""

import json

import pytest

from lowmem.planning import storage_rates
from lowmem.planning.hardware import NAMED, StorageRates, planning_for
from lowmem.planning.storage_rates import ASSUMED, measure_storage, storage_folder, storage_rates_for
from tests.planning.small import small_config


def test_a_disk_is_measured_and_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(storage_rates, "_PIECE_BYTES", 1 << 20)
    rates = measure_storage(tmp_path)
    assert rates.source == "measured"
    assert 1e5 < rates.disk_read < 1e12
    assert 1e5 < rates.disk_written < 1e12
    assert list(tmp_path.iterdir()) == []


def test_rates_are_kept_by_disk_and_damaged_ones_made_anew(tmp_path, monkeypatch):
    made = []

    def measure(folder, copies):
        made.append(folder)
        return StorageRates(2e9, 1e9, 1e10, "measured")

    monkeypatch.setattr(storage_rates, "measure_storage", measure)
    config = small_config(f"data.cache_dir={tmp_path}", f"run_dir={tmp_path}/not/there")
    assert storage_folder(config) == tmp_path
    assert storage_rates_for(config) == storage_rates_for(config) == StorageRates(2e9, 1e9, 1e10, "measured")
    assert made == [tmp_path]
    (kept,) = (tmp_path / "rates").iterdir()
    for damaged in ("{", "[]", json.dumps({**json.loads(kept.read_text()), "disk_read": -1.0})):
        kept.write_text(damaged)
        assert storage_rates_for(config).disk_read == 2e9
    assert len(made) == 4
    with planning_for(NAMED["rtx4060"]):
        assert storage_rates_for(config) == NAMED["rtx4060"].storage


def test_where_nothing_can_be_written_rates_are_assumed(tmp_path, monkeypatch):
    def refuse(**_):
        raise OSError("no")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    assert storage_rates_for(small_config(f"data.cache_dir={tmp_path}", f"run_dir={tmp_path}")) == ASSUMED


@pytest.mark.parametrize("name", NAMED)
def test_named_hardware_has_rates_of_every_kind(name):
    hardware = NAMED[name]
    assert hardware.storage.source == "assumed"
    assert 1e8 < hardware.storage.disk_written <= hardware.storage.disk_read < 1e10
    assert (hardware.storage.copied > 1e9) == (hardware.vram_bytes > 0)
    assert {"float32", "bfloat16"} <= set(hardware.rates.matmul)
    assert {"32", "8", "4", "bitsandbytes"} == set(hardware.rates.updates)
