"""The memory of writing texts: the cache exactly, the rest by what it must be made of."""

import json
import os
import subprocess
import sys

import pytest
import torch

from lowmem.config.schema import LorptConfig, ModelConfig
from lowmem.models.registry import build_model
from lowmem.planning.generation_memory import generation_memory, generation_refusal
from lowmem.planning.hardware import Hardware
from lowmem.system.units import format_bytes

MODELS = {
    "decoder": {"num_heads": 4}, "low_rank": {"num_heads": 4, "attention_rank": 8},
    "i3": {"name": "i3", "num_heads": 1, "attention_rank": 8, "lorpt": LorptConfig(rank=8)},
}  # fmt: skip


def model(name, device="meta", dtype=torch.float32, vocab_size=64):
    with torch.device(device):
        return build_model(
            ModelConfig(dim=64, num_layers=3, **MODELS[name]), vocab_size=vocab_size, max_seq_len=128, seed=0, dtype=dtype
        ).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_the_cache_is_predicted_to_the_byte(name, dtype):
    memory = generation_memory(model(name, dtype=dtype), 5, 100, 32)
    assert memory.cache_bytes == model(name, "cpu", dtype).new_cache(5, 100).nbytes() > 0
    assert memory.weights_bytes == sum(parameter.nbytes for parameter in model(name, "cpu", dtype).parameters())
    assert memory.writing_bytes >= memory.weights_bytes + memory.cache_bytes + memory.logits_bytes
    twice = generation_memory(model(name, dtype=dtype), 10, 100, 32)
    assert twice.cache_bytes == 2 * memory.cache_bytes


def test_logits_are_of_the_larger_pass():
    assert generation_memory(model("decoder", vocab_size=1000), 5, 100, 32).logits_bytes == 32 * 1000 * 4
    assert generation_memory(model("decoder", vocab_size=1000), 40, 100, 32).logits_bytes == 40 * 1000 * 4
    assert generation_memory(model("decoder", vocab_size=1000), 1, 7, 32).logits_bytes == 7 * 1000 * 4


def test_a_gpu_has_its_own_memory():
    memory = generation_memory(model("decoder"), 5, 100, 32, "cuda")
    assert memory.vram_bytes == memory.writing_bytes >= memory.weights_bytes + memory.cache_bytes
    assert memory.ram_bytes == memory.load_bytes >= 4 * model("decoder").num_parameters()
    assert generation_memory(model("decoder"), 5, 100, 32).vram_bytes == 0


def refusal(batch_size, free):
    outline = model("decoder")
    memory = generation_memory(outline, batch_size, 100, 32)
    return memory, generation_refusal(outline, memory, Hardware(free, 0), 32)


def test_what_fits_is_not_refused_and_what_does_not_names_the_batch_that_does():
    memory = generation_memory(model("decoder"), 16, 100, 32)
    assert refusal(16, memory.ram_bytes)[1] == ""
    message = refusal(64, memory.ram_bytes)[1]
    assert message.startswith("writing 64 texts of 100 tokens: ")
    assert message.endswith(f"; {format_bytes(memory.ram_bytes)} of RAM are free; set --batch_size 16")
    assert "\n" not in message
    one = generation_memory(model("decoder"), 1, 1, 32)
    assert "shorten the prompt" in refusal(4, one.ram_bytes)[1]
    assert "the weights alone do not fit" in refusal(1, one.weights_bytes)[1]


MEASURE = """
import json, torch
from lowmem.config.schema import ModelConfig
from lowmem.data.tokenizers import ByteTokenizer
from lowmem.generation import PREFILL_TOKENS, generate_batch
from lowmem.memory.allocator import fix_malloc_thresholds
from lowmem.memory.measure import host_rss_bytes, measure_peak
from lowmem.models.registry import build_model
from lowmem.planning.generation_memory import generation_memory
from lowmem.generation.sampling import SamplingOptions

def build(**fields):
    return build_model(ModelConfig(num_layers=4, num_heads=8, **fields), vocab_size=8000, max_seq_len=512, seed=0)

def write(model, texts):
    generate_batch(model, ByteTokenizer(), ["a" * 400] * texts, SamplingOptions(temperature=0), 4, batch_size=texts)

fix_malloc_thresholds()
with torch.device("meta"):
    predicted = generation_memory(build(dim=512), 8, 404, PREFILL_TOKENS)
write(build(dim=64), 1)  # loads kernels
before = host_rss_bytes()
with measure_peak() as peak:
    write(build(dim=512), 8)
print(json.dumps([predicted.writing_bytes, peak.host_peak_bytes - before]))
"""


@pytest.mark.memory
def test_a_process_takes_what_was_predicted():
    result = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    predicted, measured = json.loads(result.stdout)
    # beside tensors: buffers of the matrix products and the heap of small objects, 10 MiB in four shapes from 80 to 450 MiB
    assert predicted - 2 * 2**20 <= measured <= predicted + 20 * 2**20
