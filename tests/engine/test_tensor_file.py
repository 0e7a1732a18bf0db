"""safetensors written as a stream: readable by the library, exact, and refused when damaged."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from lowmem.system.errors import CheckpointError
from lowmem.system.tensors import LazyTensor, load_into, read_tensors, write_tensors


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "odd.bf16": torch.randn(3, 5).bfloat16(),
        "matrix": torch.randn(7, 3),
        "transposed": torch.randn(4, 6).t(),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "flag": torch.tensor([True, False]),
        "step": torch.tensor(7),
        "half": torch.randn(3).half(),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.contiguous().reshape(-1).view(torch.uint8).equal(b.contiguous().reshape(-1).view(torch.uint8))


def test_the_library_reads_what_is_written(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, tensors())
    loaded = load_file(path)
    ours = dict(read_tensors(path))
    for name, tensor in tensors().items():
        assert same_bits(loaded[name], tensor), name
        assert same_bits(ours[name], tensor), name
    assert set(loaded) == set(tensors())


def test_lazy_tensors_are_made_once_and_checked(tmp_path):
    made = []

    def make():
        made.append(1)
        return torch.ones(2, 3)

    write_tensors(tmp_path / "a.safetensors", {"x": LazyTensor((2, 3), torch.float32, make)})
    assert made == [1]
    assert load_file(tmp_path / "a.safetensors")["x"].sum() == 6
    with pytest.raises(TypeError, match="announced as"):
        write_tensors(tmp_path / "b.safetensors", {"x": LazyTensor((3, 2), torch.float32, make)})
    with pytest.raises(TypeError, match="complex64"):
        write_tensors(tmp_path / "b.safetensors", {"x": torch.zeros(2, dtype=torch.complex64)})


def test_load_into_names_every_mismatch(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"w": torch.ones(2, 3), "b": torch.ones(3)})
    target = {"w": torch.zeros(2, 3), "b": torch.zeros(3)}
    load_into(path, target)
    assert target["w"].sum() == 6
    with pytest.raises(CheckpointError, match="lacks c"):
        load_into(path, {**target, "c": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="holds b, which this model does not have"):
        load_into(path, {"w": torch.zeros(2, 3)})
    with pytest.raises(CheckpointError, match=r"w is torch.float32 \(2, 3\), the model has torch.float32 \(3, 2\)"):
        load_into(path, {**target, "w": torch.zeros(3, 2)})


@pytest.mark.parametrize("cut", [0, 4, 20, -1])
def test_a_truncated_file_is_a_checkpoint_error(tmp_path, cut):
    path = tmp_path / "a.safetensors"
    write_tensors(path, tensors())
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="a.safetensors is damaged or missing"):
        list(read_tensors(path))


@pytest.mark.memory
def test_writing_needs_no_second_copy(tmp_path):
    """20 tensors of 10 MB: the peak while writing may grow by one tensor's buffers, not by the 200 MB of all of them."""
    code = f"""
import torch
from pathlib import Path
from lowmem.system.tensors import write_tensors
from lowmem.memory.measure import measure_peak, host_rss_bytes
tensors = {{str(i): torch.ones(2_500_000) for i in range(20)}}
write_tensors(Path({str(tmp_path / "warm.safetensors")!r}), {{"0": tensors["0"]}})
before = host_rss_bytes()
with measure_peak() as peak:
    write_tensors(Path({str(tmp_path / "a.safetensors")!r}), tensors)
print(peak.host_peak_bytes - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 20_000_000
