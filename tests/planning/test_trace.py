"""A step on tensors without memory against the same step on real ones, whose storages are watched by a mode of this file's own.

Left out are storages of up to 8 KiB: a dry run copies batches to its device, makes rotary tables anew and does not look at targets.
"""

import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem.config.schema import RunConfig, resolve_micro_batch_size
from lowmem.data.batch import Batch
from lowmem.engine.from_config import build_configured_model, build_local_engine
from lowmem.planning.allocators import live_peaks
from lowmem.planning.predict import resolve_without_data
from lowmem.planning.trace import Trace, trace_run
from tests.planning.small import I3, small_config

SMALL = 8192
# One head: 64 wide, so that a CPU computes attention by blocks. 128 tokens at once: no activation has the shape of a weight.
SHAPE = ["model.num_layers=2", "model.num_heads=1", "train.global_batch_size=8", "train.micro_batch_size=4"]
MODELS = {"decoder": [], "tied": ["model.tie_embeddings=true"], "lorpt": ["model.lorpt.rank=16"], "i3": I3}


class Watch(TorchDispatchMode):
    """Sizes of the larger storages of real tensors in the order in which they come (+) and go (-), and the most there was at once."""

    def __init__(self):
        super().__init__()
        self.events, self.alive, self.now, self.peak, self.open = [], {}, 0, 0, True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive and storage.nbytes() > SMALL:
                    self._change(storage.nbytes())
                    self.alive[storage._cdata] = weakref.ref(storage, self._gone(storage._cdata, storage.nbytes()))
        return out

    def _gone(self, address, size):
        def gone(_):
            if self.open:
                del self.alive[address]
                self._change(-size)

        return gone

    def _change(self, size):
        self.events.append(size)
        self.now += size
        self.peak = max(self.peak, self.now)


def real_steps(config: RunConfig) -> Watch:
    """Building and two steps on a CPU."""
    watch = Watch()
    with watch:
        model = build_configured_model(config)
        engine = build_local_engine(config, model, torch.device("cpu"), config.train.precision, resolve_micro_batch_size(config, 1))
        # as many different tokens as there can be: the gradient of the embedding has a row for each, and a dry run assumes that
        starts = np.arange(config.train.global_batch_size)[:, None] * config.data.seq_len
        windows = (starts + np.arange(config.data.seq_len + 1)) % model.vocab_size
        for _ in range(2):
            engine.step(Batch.from_windows(windows, 0 if config.data.document_mask else None), config.optim.lr)
        watch.open = False
    return watch


def large_events(trace: Trace) -> list[int]:
    sizes = [trace.storages[event if event >= 0 else ~event].size_bytes * (1 if event >= 0 else -1) for event in trace.events]
    return [size for size in sizes if abs(size) > SMALL]


def positions(trace: Trace) -> dict[str, int]:
    """Number of large events before each phase."""
    large = [trace.storages[event if event >= 0 else ~event].size_bytes > SMALL for event in trace.events]
    return {name: sum(large[:position]) for name, position in trace.phases}


def largest_sum(changes: list[int]) -> int:
    now = peak = 0
    for change in changes:
        now += change
        peak = max(peak, now)
    return peak


NARROW = {
    "bf16": ["train.precision=bf16", "train.weight_dtype=bf16", "optim.state_bits=8"],
    "autocast": ["train.precision=bf16", "optim.state_bits=4"],
    "unmasked": ["data.document_mask=false"],
}
CASES = [(model, update, mode) for model in MODELS for update in ("accumulate", "layerwise") for mode in ("none", "block", "selective")]
CASES += [(name, *rest) for name in NARROW for rest in (("accumulate", "selective"), ("layerwise", "block"))]


@pytest.mark.parametrize("model, update, checkpointing", CASES)
def test_a_step_without_memory_makes_and_frees_what_a_real_one_does(model, update, checkpointing):
    settings = [*SHAPE, *{**MODELS, **NARROW}[model], f"train.update={update}", f"train.activation_checkpointing={checkpointing}"]
    if update == "layerwise":
        settings.append("train.micro_batch_size=8")  # one micro-batch: with more, a dry run goes through a block once only
    config = resolve_without_data(small_config(*settings))
    trace, _ = trace_run(config)
    ours, start = large_events(trace), positions(trace)
    real = real_steps(config)
    steps = ours[start["first_step"] : start["save"]]
    assert len(steps) > 100
    assert steps == real.events[-len(steps) :]
    assert largest_sum(ours) == real.peak


@pytest.mark.parametrize("settings", [
    ["model.positions=learned"],  # two heads of 32: PyTorch's fused kernel
    ["model.num_heads=1"],  # one of 64, more than 1024 positions: the same
    ["model.positions=alibi"],  # by blocks
    ["train.precision=bf16"],  # by blocks
])  # fmt: skip
def test_attention_over_long_sequences_keeps_no_scores_where_a_real_one_keeps_none(settings):
    config = resolve_without_data(small_config("model.num_layers=1", "data.seq_len=1088", "train.micro_batch_size=4", *settings))
    trace, _ = trace_run(config)
    apart = largest_sum(large_events(trace)) - real_steps(config).peak
    copied = 2 * 4 * 1088 * 8  # a dry run's copy of a micro-batch: inputs and targets
    assert abs(apart) <= copied + 4 * 1088 * 16 * 8  # and its rotary tables, with what they are made from


def test_weights_states_and_gradients_are_counted_to_the_byte():
    vocab, dim, hidden, layers = 257, 64, 192, 2
    matrices = 2 * vocab * dim + layers * (4 * dim * dim + 3 * dim * hidden)
    parameters = matrices + (2 * layers + 1) * dim  # norms
    config = resolve_without_data(small_config(*SHAPE, "train.micro_batch_size=8"))  # one micro-batch: no second gradient to add
    trace, model = trace_run(config)
    assert model.num_parameters() == parameters
    assert live_peaks(trace, {"weights"})["steady_steps"] == 4 * parameters
    assert live_peaks(trace, {"gradients"})["steady_steps"] == 4 * parameters
    counters = 3 * layers * 2 + 3 * layers
    states = live_peaks(trace, {"optimizer_states"})["steady_steps"] - 2 * 4 * parameters
    assert 0 <= states <= 8 * (4 * layers + counters + 4)  # AdamW of PyTorch counts steps, one number a tensor


@pytest.mark.parametrize("bits, width, a_block", [(8, 64, 128 + 4), (4, 64, 128 + 4), (8, 128, 128 + 4), (4, 128, 64 + 4)])
def test_low_bit_states_are_counted_to_the_byte(bits, width, a_block):
    """Where rows are no multiple of 128 elements, 4 bits are 8."""
    shape = [*SHAPE, f"model.dim={width}", f"model.hidden_dim={3 * width}"]
    trace, _ = trace_run(resolve_without_data(small_config(*shape, f"optim.state_bits={bits}")))
    matrices = [257 * width] * 2 + 2 * ([width * width] * 4 + [width * 3 * width] * 3)
    blocks = sum(-(-numel // 128) for numel in matrices)
    assert live_peaks(trace, {"optimizer_states"})["steady_steps"] == 2 * (blocks * a_block + 5 * width * 4)


def test_what_a_phase_computes_is_counted():
    config = resolve_without_data(small_config(*SHAPE, "train.activation_checkpointing=none", "train.micro_batch_size=8"))
    trace, model = trace_run(config)
    # 6 a token and weight: forward, gradient of the input, of the weight. The head's logits are not computed again; the embedding is looked
    # up. Attention is 6 products of half the scores; by blocks of 16 queries a little more than half, and 2 products are done twice.
    tokens = 8 * 32
    products = 6 * (model.num_parameters() - 257 * 64 - 5 * 64) * tokens
    counted = trace.costs["steady_steps"].matmul_flops["float32"]
    assert products < counted <= products + 2 * 8 * 32 * 32 * 64 * 2 * 8
    assert trace.costs["first_step"].matmul_flops == trace.costs["steady_steps"].matmul_flops


def test_nothing_is_recorded_after_the_end():
    trace = Trace()
    with torch.device("meta"), trace, trace.phase("load"):
        tensor = torch.zeros(10)
        view = tensor[2:]
    assert [storage.size_bytes for storage in trace.storages] == [40]
    del tensor, view
    assert trace.events == [0]
