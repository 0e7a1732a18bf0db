"""The peak of each phase of a run, so that a peak has a place: load, first_step, steady_steps, evaluation, save.

    phases = PeakRecorder()
    with phases("evaluation"):
        ...
    phases.as_dict()["evaluation"]["host_peak_bytes"]

The names are those of PHASES by agreement; any other is recorded as well.
"""

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowmem.memory.host import ChildMemory, HostMeter, HostPeak, own_memory
from lowmem.memory.procfs import cgroup_bytes, rollup_bytes

_library: Any = None  # pynvml once it works, False once it is known not to


def process_bytes(pids: list[int] | None = None) -> int | None:
    """Device bytes of processes, summed over devices.

    Args:
        pids: default: this process.
    Returns:
        None without a GPU, a driver or pynvml (`pip install 'lowmem[nvidia]'`), and where the driver does not show these
        processes: inside a container it knows them under other numbers.
    """
    wanted = [os.getpid()] if pids is None else pids
    pynvml = _nvml()
    if not pynvml:
        return None
    found = []
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            device = pynvml.nvmlDeviceGetHandleByIndex(index)
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(device):
                if process.pid in wanted and process.usedGpuMemory is not None:
                    found.append(process.usedGpuMemory)
    except pynvml.NVMLError:  # the driver went away, or refuses
        return None
    return sum(found) if found else None


def _nvml() -> Any:
    """The library, initialised once for the life of the process (some 10 ms)."""
    global _library
    if _library is None:
        try:
            import pynvml
        except ImportError:
            _library = False
            return _library
        try:
            pynvml.nvmlInit()
            _library = pynvml
        except pynvml.NVMLError:
            _library = False
    return _library


_lock = threading.RLock()
_meter: HostMeter | None = None
_open_cuda: list["PeakMemory"] = []


class PeakMemory:
    """Peaks inside a `measure_peak` block: up to now while it runs, final afterwards.

    Attributes:
        host_peak_exact: True where this process's own share is the kernel's high-water mark; False where it was sampled,
            so that a peak shorter than 100 ms may be missing.
    """

    def __init__(self, meter: HostMeter, ask_children: bool):
        self._meter = meter
        self._host: HostPeak = meter.start(ask_children=ask_children)
        self._cuda_allocated_bytes = 0
        self._cuda_reserved_bytes = 0
        self._cuda_retries_before = 0
        self._cuda_retries = 0
        self._running = True

    @property
    def host_peak_exact(self) -> bool:
        return self._host.exact

    @property
    def host_peak_bytes(self) -> int:
        """Most resident at once: this process and its children, pages that they share counted once."""
        if self._running:
            self._meter.sample(children=False)
        return self._host.peak_bytes

    @property
    def cuda_allocated_peak_bytes(self) -> int:
        """Most that tensors of this process occupied, summed over its devices; 0 without CUDA."""
        self._refresh_cuda()
        return self._cuda_allocated_bytes

    @property
    def cuda_reserved_peak_bytes(self) -> int:
        """Most that PyTorch's allocator held of the devices; 0 without CUDA. The CUDA context itself is not in it."""
        self._refresh_cuda()
        return self._cuda_reserved_bytes

    def peaks(self) -> dict[str, int]:
        """The three peaks under the names used in metrics.jsonl and memory.json."""
        return {
            "host_peak_bytes": self.host_peak_bytes,
            "cuda_allocated_peak_bytes": self.cuda_allocated_peak_bytes,
            "cuda_reserved_peak_bytes": self.cuda_reserved_peak_bytes,
        }

    def as_dict(self) -> dict[str, int]:
        """The three peaks, and beside them whatever of the following has a value here. They overlap: never add them up.

        host_peak_exact: see above.
        cgroup_peak_bytes: the most that this process's control group (version 2) ever held, page cache and other processes included.
        cuda_alloc_retries: how often in the block the allocator found no room, emptied its cache and tried again.
        nvml_process_bytes: what the driver counts for this process now, the allocator's reserve and the context together.
        cuda_context_bytes: the part of that which is not the allocator's: context, kernels, communication buffers.
        pinned_host_peak_bytes: page-locked host memory of PyTorch since the process began; it rounds each block up to a power of
            two, and these are the rounded sizes.
        """
        self._refresh_cuda()
        driver = process_bytes() if _initialized_cuda() else None
        extra = {
            "host_peak_exact": self.host_peak_exact,
            "cgroup_peak_bytes": cgroup_bytes("memory.peak"),
            "cuda_alloc_retries": self._cuda_retries if _initialized_cuda() else None,
            "nvml_process_bytes": driver,
            "cuda_context_bytes": None if driver is None else max(0, driver - cuda_reserved_bytes()),
            "pinned_host_peak_bytes": _pinned_peak_bytes(),
        }
        return self.peaks() | {name: value for name, value in extra.items() if value is not None}

    def _refresh_cuda(self) -> None:
        if self._running:
            _fold_cuda_peaks()


@contextmanager
def measure_peak(*, ask_children: bool = True) -> Iterator[PeakMemory]:
    """Measure the peak memory of a block; blocks may be nested and may overlap in threads.

    What was freed before the block does not count, what is still resident does. Costs 0.2 ms at both ends and about half a
    percent of a core in between; with children a sample takes about 15 ms per GiB resident, and the pauses between samples
    grow so that it stays near one percent.
    Nothing else may reset VmHWM or PyTorch's peak statistics inside the block.

    Args:
        ask_children: look at child processes at both ends. Without it, inside another block, they count as its last sample saw them,
            and the ends take 0.1 ms whatever the children hold.
    """
    with _lock:
        peak = PeakMemory(_host_meter(), ask_children)
        peak._cuda_retries_before = _fold_cuda_peaks()
        _reset_cuda_peaks()
        _open_cuda.append(peak)
    try:
        yield peak
    finally:
        with _lock:
            _fold_cuda_peaks()
            _open_cuda.remove(peak)
            peak._meter.stop(peak._host, ask_children=ask_children)
            peak._running = False


def host_rss_bytes() -> int:
    """Resident bytes now: this process and its children, pages that they share counted once."""
    children = ChildMemory()
    children.accept_existing()
    return own_memory()[0] + children.sample()[0]


def shared_bytes() -> int:
    """Resident bytes that other processes have a share in, minus this one's share: what a sum over processes counts too often."""
    own = rollup_bytes()
    return own["Rss"] - own["Pss"] if own and "Pss" in own and "Rss" in own else 0


def host_peak_bytes() -> int:
    """Most resident at once since this process started, its children included while a `measure_peak` block was open.

    Takes about 40 microseconds: cheap enough for every training step.
    """
    return _host_meter().lifetime_peak()


def cuda_allocated_bytes() -> int:
    """Bytes that tensors of this process occupy now, summed over its devices; 0 without CUDA."""
    return _sum_over_devices("memory_allocated")


def cuda_reserved_bytes() -> int:
    """Bytes that PyTorch's allocator holds of the devices now; 0 without CUDA."""
    return _sum_over_devices("memory_reserved")


def _host_meter() -> HostMeter:
    """The process's only meter; a forked process starts its own, because the sampler thread is not forked along."""
    global _meter
    if _meter is None or _meter.pid != os.getpid():
        _meter = HostMeter()
    return _meter


def _sum_over_devices(function: str) -> int:
    cuda = _initialized_cuda()
    return 0 if cuda is None else sum(getattr(cuda, function)(index) for index in range(cuda.device_count()))


def _fold_cuda_peaks() -> int:
    """Carry the allocator's peaks since their last reset into every open measurement; returns its retries since the process began."""
    cuda = _initialized_cuda()
    stats = [cuda.memory_stats(index) for index in range(cuda.device_count())] if cuda else []
    allocated, reserved, retries = (
        sum(device.get(key, 0) for device in stats) for key in ("allocated_bytes.all.peak", "reserved_bytes.all.peak", "num_alloc_retries")
    )
    for peak in _open_cuda:
        peak._cuda_allocated_bytes = max(peak._cuda_allocated_bytes, allocated)
        peak._cuda_reserved_bytes = max(peak._cuda_reserved_bytes, reserved)
        peak._cuda_retries = retries - peak._cuda_retries_before
    return retries


def _reset_cuda_peaks() -> None:
    cuda = _initialized_cuda()
    for index in range(cuda.device_count() if cuda else 0):
        cuda.reset_peak_memory_stats(index)


def _pinned_peak_bytes() -> int | None:
    """Most that PyTorch's pool of page-locked memory held; None without CUDA, and in versions of PyTorch that do not count it."""
    cuda = _initialized_cuda()
    if cuda is None or not hasattr(cuda, "host_memory_stats"):
        return None
    return cuda.host_memory_stats().get("allocated_bytes.peak") or None


def read_memory(run_dir: Path) -> dict[str, Any]:
    """memory.json; {} if the run did not get as far, or the file is damaged."""
    try:
        value = json.loads((run_dir / "memory.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    parts = [value.get(name) for name in ("budget", "predicted", "measured")] if isinstance(value, dict) else [value]
    return value if all(part is None or isinstance(part, dict) for part in parts) and isinstance(value, dict) else {}


def combine_peaks(now: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    """`as_dict` of a run's last leg and of the legs before it, as one: the largest of each, retries added, exact only if all were."""
    combined = {name: max(value, before.get(name, value)) for name, value in {**before, **now}.items()}
    if "host_peak_exact" in now and "host_peak_exact" in before:
        combined["host_peak_exact"] = now["host_peak_exact"] and before["host_peak_exact"]
    if "cuda_alloc_retries" in now:
        combined["cuda_alloc_retries"] = now["cuda_alloc_retries"] + before.get("cuda_alloc_retries", 0)
    return combined


def _initialized_cuda():
    """torch.cuda if this process uses it already; measuring must neither import PyTorch nor create a CUDA context."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


PHASES = ("load", "first_step", "steady_steps", "evaluation", "save")


class PeakRecorder:
    """Peaks by the name of a phase. A phase may be visited often; the largest peak stays.

    Inside an open `measure_peak` a visit costs about 0.2 ms, and two reads of the allocator's statistics with CUDA: children are
    not asked again at its ends, what they had at the last sample of the surrounding measurement counts.
    """

    def __init__(self) -> None:
        self._peaks: dict[str, dict[str, int]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[PeakMemory]:
        """A visit of the phase `name`; recorded also when it ends with an error."""
        visit = None
        try:
            with measure_peak(ask_children=False) as visit:
                yield visit
        finally:
            if visit is not None:
                before = self._peaks.get(name, {})
                self._peaks[name] = {key: max(value, before.get(key, 0)) for key, value in visit.peaks().items()}

    @staticmethod
    def now() -> dict[str, int]:
        """host_peak_bytes of this process so far, and cuda_allocated_bytes at this moment."""
        return {"host_peak_bytes": host_peak_bytes(), "cuda_allocated_bytes": cuda_allocated_bytes()}

    def as_dict(self) -> dict[str, dict[str, int]]:
        """{phase: {host_peak_bytes, cuda_allocated_peak_bytes, cuda_reserved_peak_bytes}}, in the order of the first visits."""
        return {name: dict(peaks) for name, peaks in self._peaks.items()}
