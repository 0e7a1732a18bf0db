"""What ZeRO makes of a model's memory, against bytes worked out by hand for a model of 86,336 parameters."""

import pytest

from lowmem.planning.allocators import live_peaks
from lowmem.planning.predict import Prediction, predict_peak, resolve_without_data, zero_peaks
from lowmem.planning.trace import trace_run
from tests.planning.small import BASE_BYTES, small_config, stub_measurements

MATRICES = 2 * 257 * 64 + 4 * 64 * 64 + 3 * 64 * 192
NORMS = 3 * 64
N = MATRICES + NORMS
LARGEST = 2 * 64 * 192  # two matrices of the MLP are one parameter
BLOCKS = MATRICES // 128 + 1  # of 128 numbers with a scale; embedding and head end with half a block each
BUCKET = 4_000_000  # elements of a communication buffer, configs/deepspeed


def peaks(*settings: str, ranks: int = 2):
    config = resolve_without_data(small_config("engine.name=deepspeed", *settings))
    from lowmem.planning.predict import as_computed

    trace, model = trace_run(as_computed(config), ranks)
    assert model.num_parameters() == N
    dynamic = live_peaks(trace, {"activations", "logits", "workspace"})["steady_steps"]
    return zero_peaks(config, trace, model, ranks), dynamic


def test_stage_0_keeps_everything_on_every_rank():
    (whole, offloaded), dynamic = peaks("engine.zero_stage=0")
    assert offloaded.peak_bytes == 0
    assert whole.components["weights"] == 4 * N
    assert whole.components["optimizer_states"] == 2 * 4 * N
    assert whole.components["gradients"] == 4 * N
    assert whole.components["activations"] == max(dynamic, 4 * N)  # gradients are averaged in a flat copy, after backward
    alone = peaks("engine.zero_stage=0", ranks=1)
    assert alone[0][0].components["activations"] == alone[1]


@pytest.mark.parametrize("stage, bits, states", [
    (1, 32, 2 * 4 * N),
    (2, 32, 2 * 4 * N),
    (2, 8, 2 * (BLOCKS * 132 + 4 * NORMS)),
    (2, 4, 2 * (BLOCKS * 132 + 4 * NORMS)),  # no row is a multiple of 128
    (3, 32, 2 * 4 * N),
])  # fmt: skip
def test_stages_with_16_bit_weights(stage, bits, states):
    (whole, _), dynamic = peaks("train.precision=bf16", f"engine.zero_stage={stage}", f"optim.state_bits={bits}")
    share = N // 2
    master, summed = 4 * share, 4 * share
    small = NORMS + 64 * 64  # stage 3 keeps whole what has up to 10,000 numbers: norms and the output map of attention
    weights = 2 * (share + small) if stage == 3 else 2 * N
    gathered = 2 * N if stage == 3 else 0  # the whole model is less than what may be gathered ahead
    gradients = N * (2 + 4) + summed if stage == 1 else summed
    transient = 2 * LARGEST if stage > 1 else 0
    update = 2 * 4 * share if stage == 1 else 4 * share
    components = {
        "weights": weights + master,
        "optimizer_states": states // 2,
        "gradients": gradients + transient,
        "activations": max(dynamic, update),
        "workspace": 2 * BUCKET + gathered,
    }
    assert whole.components == components
    assert whole.by_phase["steady_steps"] == whole.by_phase["first_step"] == sum(components.values())
    assert whole.by_phase["save"] == whole.by_phase["steady_steps"]  # the blocks of a step are kept
    assert whole.by_phase["load"] == sum(components.values()) - components["activations"] - gradients + weights


def test_a_rank_with_an_odd_share_rounds_up():
    (three, _), _ = peaks("train.precision=bf16", "engine.zero_stage=2", "train.global_batch_size=3", "train.micro_batch_size=1", ranks=3)
    assert three.components["weights"] == 2 * N + 4 * (N // 3 + 1)


def test_offload_moves_master_states_and_gradients_to_the_host():
    settings = ["device=cuda", "train.precision=fp16", "engine.zero_stage=2"]
    (whole, nothing), _ = peaks(*settings)
    (device, host), dynamic = peaks(*settings, "engine.offload=cpu")
    assert nothing.peak_bytes == 0
    share = N // 2
    assert host.components == {"weights": 4 * share, "optimizer_states": 4 * N, "gradients": 2 * 4 * share}
    assert host.peak_bytes == sum(host.components.values())
    assert device.components["weights"] == 2 * N
    assert sum(device.components.values()) == device.peak_bytes
    assert device.peak_bytes == 2 * N + 2 * BUCKET + 2 * LARGEST + max(dynamic, 4 * share)
    assert device.peak_bytes < whole.peak_bytes


def predicted(monkeypatch, *settings: str, ranks: int) -> Prediction:
    stub_measurements(monkeypatch)
    return predict_peak(small_config("engine.name=deepspeed", *settings), ranks)


def test_the_ranks_of_a_machine_are_added_up(monkeypatch):
    settings = ("engine.zero_stage=2", "train.precision=bf16", "train.micro_batch_size=1")
    two = predicted(monkeypatch, *settings, ranks=2)
    one_of_them, _ = peaks(*settings)
    batches = 3 * 8 * 4 * 33 * 2
    assert two.host.peak_bytes == 2 * one_of_them[0].peak_bytes + BASE_BYTES + batches
    assert sum(two.host.components.values()) == two.host.peak_bytes
    assert two.as_dict()["cuda_reserved_peak_bytes"] == 0


def test_a_gpu_has_its_own_peak(monkeypatch):
    settings = ("device=cuda", "train.precision=fp16", "engine.zero_stage=2", "engine.offload=cpu", "train.micro_batch_size=1")
    prediction = predicted(monkeypatch, *settings, ranks=1)
    assert prediction.cuda_reserved.peak_bytes >= prediction.cuda_allocated.peak_bytes > 2 * N
    assert prediction.host.components["optimizer_states"] == 2 * 4 * N
    answer = prediction.as_dict()
    assert sum(answer["components"].values()) == answer["cuda_reserved_peak_bytes"]
    assert sum(answer["host_components"].values()) == answer["host_peak_bytes"]
