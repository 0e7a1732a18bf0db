"""Estimates from short traces against full predictions. Base cost and rates are stubbed with fixed numbers."""

import pytest

from lowmem.planning.predict import predict_peak, resolve_without_data
from lowmem.planning.search import Estimate, Estimator, with_settings
from tests.planning.small import BASE_BYTES, LAYERWISE, small_config, stub_measurements


@pytest.fixture(autouse=True)
def measurements(monkeypatch):
    stub_measurements(monkeypatch)


# Tensors without memory cost the same time at any size: one at which blocks are mapped one by one, and fill segments.
SHAPE = [
    "model.num_layers=4", "model.dim=512", "model.num_heads=8", "model.vocab_size=8000", "data.seq_len=256", "train.global_batch_size=8",
]  # fmt: skip


@pytest.mark.parametrize("settings", [[], [*LAYERWISE, "train.precision=bf16", "train.weight_dtype=bf16", "optim.state_bits=4"]])
def test_an_estimate_is_close_to_the_full_prediction(settings):
    config = resolve_without_data(small_config(*SHAPE, *settings))
    estimate, full = Estimator(config).estimate((), 4), predict_peak(with_settings(config, (), 4))
    # 3 layers instead of 2 add what every layer adds, but the highest moment of a step may be another one in deeper models
    assert estimate.host_bytes - BASE_BYTES == pytest.approx(full.host.peak_bytes - BASE_BYTES, rel=0.1)
    assert estimate.step_s == pytest.approx(full.step_s, rel=0.1)


def test_an_estimate_for_a_gpu_is_close_as_well():
    config = resolve_without_data(small_config(*SHAPE, "device=cuda", "train.precision=bf16"))
    estimate, full = Estimator(config).estimate((), 4), predict_peak(with_settings(config, (), 4))
    assert estimate.cuda_bytes == pytest.approx(full.cuda_reserved.peak_bytes, rel=0.1)


def test_an_estimate_for_the_whole_batch_at_once_is_close_as_well():
    # one micro-batch: its activations go while the gradients come, where a second would find all gradients there
    config = resolve_without_data(small_config(*SHAPE))
    estimate, full = Estimator(config).estimate((), 8), predict_peak(with_settings(config, (), 8))
    assert estimate.host_bytes - BASE_BYTES == pytest.approx(full.host.peak_bytes - BASE_BYTES, rel=0.1)


def test_models_of_three_layers_are_traced_as_they_are():
    config = resolve_without_data(small_config())
    for size in (1, 2):
        full = predict_peak(with_settings(config, (), size))
        assert Estimator(config).estimate((), size) == Estimate(full.host.peak_bytes, 0, pytest.approx(full.step_s), full.disk_bytes)


def test_traces_are_shared(monkeypatch):
    calls = []
    monkeypatch.setattr("lowmem.planning.search.predict_peak", lambda config: calls.append(config) or predict_peak(config))
    estimator = Estimator(resolve_without_data(small_config("model.num_layers=4", "train.global_batch_size=8")))
    sizes = [estimator.estimate((), size).host_bytes for size in (1, 2, 4, 8)]
    assert len(calls) == 6  # the batch as a whole is traced as it is
    traced = {(config.model.num_layers, config.train.micro_batch_size) for config in calls}
    assert traced == {(2, 1), (2, 2), (2, 8), (3, 1), (3, 2), (3, 8)}
    assert sizes[:3] == sorted(sizes[:3])
    estimator.estimate((("optim.state_bits", 8),), 4)
    assert len(calls) == 10


def test_an_odd_batch_has_only_micro_batches_of_one_to_learn_from():
    config = resolve_without_data(small_config("train.global_batch_size=3", "train.micro_batch_size=1"))
    estimator = Estimator(config)
    assert estimator.estimate((), 1).host_bytes == predict_peak(config).host.peak_bytes
    three = predict_peak(with_settings(config, (), 3)).host.peak_bytes
    assert estimator.estimate((), 3).host_bytes == pytest.approx(three, rel=0.1)
