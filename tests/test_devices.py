import types

import pytest
import torch

from lowmem.system import devices
from lowmem.system.errors import ConfigError

X86_CPUINFO = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu sse2 avx2 avx512f avx512_bf16\n"
ARM_CPUINFO = "processor\t: 0\nFeatures\t: fp asimd bf16\n"


@pytest.fixture
def fake_cuda(monkeypatch):
    """torch.cuda as on a machine with one device; the test sets its capability and the build's architectures."""
    state = types.SimpleNamespace(capability=(8, 0), architectures=["sm_80", "sm_90"], count=1)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: state.count > 0)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: state.count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: state.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: "Test GPU")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: state.architectures)
    monkeypatch.setattr(torch.version, "hip", None)
    return state


def test_auto_takes_a_usable_gpu_and_else_the_cpu(fake_cuda):
    assert devices.resolve_device("auto") == torch.device("cuda", 0)
    fake_cuda.count = 0
    assert devices.resolve_device("auto") == torch.device("cpu")
    assert devices.resolve_device("cpu") == torch.device("cpu")


def test_a_gpu_without_kernels_is_not_usable(fake_cuda):
    fake_cuda.capability, fake_cuda.architectures = (6, 1), ["sm_75", "sm_80", "compute_90"]
    assert devices.resolve_device("auto").type == "cpu"
    with pytest.raises(ConfigError, match=r"Test GPU \(compute capability 6\.1; it was built for sm_75 sm_80 compute_90\)"):
        devices.resolve_device("cuda")


@pytest.mark.parametrize(
    ("capability", "architectures", "usable"),
    [
        ((8, 6), ["sm_80"], True),  # binaries run on later minor versions
        ((8, 0), ["sm_86"], False),  # but not on earlier ones
        ((9, 0), ["sm_80"], False),  # nor on another major version
        ((9, 0), ["compute_80"], True),  # unless there is PTX to compile
        ((10, 0), ["sm_100a"], True),  # "a" is this very capability
        ((10, 3), ["sm_100a"], False),
    ],
)
def test_which_builds_run_on_which_device(capability, architectures, usable):
    assert devices._has_kernels_for(*capability, architectures) is usable


def test_explicit_cuda_that_cannot_be_used_says_why(fake_cuda, monkeypatch):
    with pytest.raises(ConfigError, match=r"device is cuda:3, but this machine has 1 CUDA device"):
        devices.resolve_device("cuda:3")
    fake_cuda.count = 0
    with pytest.raises(ConfigError, match="no CUDA device or no working driver; use device=cpu or auto"):
        devices.resolve_device("cuda")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(ConfigError, match="was built without CUDA"):
        devices.resolve_device("cuda")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:", "cuda:x", "cuda:-1", "cpu:0"])
def test_unknown_device_names_are_refused(name):
    with pytest.raises(ConfigError, match="allowed: auto, cpu, cuda, cuda:N"):
        devices.resolve_device(name)


@pytest.mark.parametrize(
    ("text", "found"), [(X86_CPUINFO, True), (ARM_CPUINFO, True), (X86_CPUINFO.replace("avx512_bf16", ""), False), ("", False)]
)
def test_native_bf16_from_cpuinfo_where_torch_does_not_tell(text, found, monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(devices, "_read_cpuinfo", lambda: text)
    assert devices.cpu_has_native_bf16() is found
    assert devices.cpu_features().get("avx512_f", False) is ("avx512f" in text)


def test_torch_and_cpuinfo_agree_on_this_machine(monkeypatch):
    if not devices._read_cpuinfo():
        pytest.skip("needs /proc/cpuinfo")
    told_by_torch = devices.cpu_has_native_bf16()
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert devices.cpu_has_native_bf16() == told_by_torch


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_precision_on_a_cpu(native, expected, monkeypatch):
    monkeypatch.setattr(devices, "cpu_has_native_bf16", lambda: native)
    assert devices.resolve_precision("auto", torch.device("cpu")) == expected


@pytest.mark.parametrize(("capability", "expected", "fp8"), [((7, 5), "fp16", False), ((8, 0), "bf16", False), ((8, 9), "bf16", True)])
def test_auto_precision_on_a_gpu(capability, expected, fp8, fake_cuda):
    fake_cuda.capability = capability
    assert devices.resolve_precision("auto", torch.device("cuda", 0)) == expected
    assert devices.cuda_has_native_fp8() is fp8


def test_explicit_precision_is_kept_or_refused():
    cpu = torch.device("cpu")
    assert [devices.resolve_precision(name, cpu) for name in ("fp32", "bf16")] == ["fp32", "bf16"]
    assert devices.resolve_precision("fp16", torch.device("cuda", 0)) == "fp16"
    with pytest.raises(ConfigError, match="fp16 on a CPU.*allowed there: fp32, bf16"):
        devices.resolve_precision("fp16", cpu)
    with pytest.raises(ConfigError, match="'fp4'; allowed: auto, fp32, bf16, fp16"):
        devices.resolve_precision("fp4", cpu)
