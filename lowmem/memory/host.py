"""Resident memory of this process and of its children, watched by one sampler that all open measurements share."""

import os
import sys
import threading
import time

import psutil

from lowmem.memory.procfs import cgroup_limit_bytes, cgroup_room_bytes, child_pids, reset_high_water_mark, rollup_bytes, status_bytes
from lowmem.system.units import format_bytes

SAMPLE_INTERVAL_S = 0.1
_SAMPLER_SHARE = 0.01  # of one core: a sample that took c seconds is followed by at least c / share of sleep


def own_memory() -> tuple[int, int]:
    """Bytes of this process: resident now, and most ever resident since its start or the last reset (0 where unknown)."""
    status = status_bytes()
    if status is not None and "VmRSS" in status:
        return status["VmRSS"], status.get("VmHWM", 0)
    info = psutil.Process().memory_info()
    return info.rss, _lifetime_peak_bytes(info)


def _lifetime_peak_bytes(info) -> int:
    """The most ever resident, as systems without /proc tell it."""
    if hasattr(info, "peak_wset"):  # Windows
        return info.peak_wset
    try:
        import resource  # absent on Windows
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def granted_memory(budget_bytes: int, ranks: int = 1) -> tuple[int, str]:
    """The smaller of a budget and of what the limit of the container, or of its service, leaves to this process.

    Args:
        budget_bytes: 0 is none.
        ranks: processes of one run on this machine, which share both: what the others have is not taken off.
    Returns:
        Bytes, 0 if there is neither; and one line if it is not the budget that holds.
    """
    status = status_bytes() or {}
    own = status.get("RssAnon", 0) + status.get("RssShmem", 0)
    room = cgroup_limit_bytes() if ranks > 1 else cgroup_room_bytes(own)
    if room is None or 0 < budget_bytes <= room:
        return budget_bytes, ""
    instead = f", less than budget.ram={format_bytes(budget_bytes)}" if budget_bytes else ""
    return max(1, room), f"the memory limit of this container (its control group) leaves {format_bytes(room)}{instead}: that is the budget"


class ChildMemory:
    """Memory that the processes below this one add to it.

    A child counts from its second sample on: between vfork and exec it is its parent's memory under another number, and
    would count that twice.
    """

    def __init__(self) -> None:
        self._high_water: dict[int, int] = {}

    def accept_existing(self) -> None:
        """Count the children that there are now from their first sample on, without the peaks behind them."""
        for pid in child_pids() or ():
            self._high_water[pid] = (status_bytes(pid) or {}).get("VmHWM", 0)

    def sample(self) -> tuple[int, int]:
        """Bytes the children add now, and what their own peaks since the last sample add to that.

        Pages shared with this process or among the children count once, those of libraries proportionally. Only what a
        child does between the last sample and its end is missed.
        """
        pids = child_pids()
        if pids is None:
            return self._sample_with_psutil(), 0
        resident, spikes, high_water = 0, 0, {}
        for pid in pids:
            status = status_bytes(pid)
            if status is None or "VmRSS" not in status:  # ended
                continue
            if pid not in self._high_water:
                high_water[pid] = 0
                continue
            high_water[pid] = status.get("VmHWM", 0)
            if high_water[pid] > self._high_water[pid]:
                spikes += max(0, high_water[pid] - status["VmRSS"])
            rollup = rollup_bytes(pid)
            resident += rollup["Pss"] if rollup and "Pss" in rollup else status["VmRSS"]
        self._high_water = high_water
        return max(0, resident - _anonymous_pages_of_others()) if resident else 0, spikes

    def _sample_with_psutil(self) -> int:
        total = 0
        for child in psutil.Process().children(recursive=True):
            try:
                total += child.memory_info().rss
            except psutil.Error:  # ended, or not ours to see
                continue
        return total


def _anonymous_pages_of_others() -> int:
    """The part of our own resident memory that fork left in common with children; their shares of it are in their Pss."""
    own = rollup_bytes()
    return own["Anonymous"] - own["Pss_Anon"] if own and "Pss_Anon" in own and "Anonymous" in own else 0


class HostPeak:
    """The peak of one measured block.

    Attributes:
        peak_bytes: most resident at once, this process and its children.
        exact: the kernel's high-water mark covers this process's whole block; otherwise peaks between samples may be missed.
    """

    def __init__(self, exact: bool):
        self.peak_bytes = 0
        self.exact = exact


class HostMeter:
    """Feeds every open `HostPeak`; its thread runs only while there is one.

    Reading the high-water mark also resets it, so that the peaks of this process and of its children are only added when
    they fall into the same interval. Cost without children: about 0.1 ms of work per sample, half a percent of a core.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._lock = threading.RLock()
        self._open: list[HostPeak] = []
        self._children = ChildMemory()
        self._children_bytes = 0
        self._lifetime_bytes = 0
        self._last_high_water = 0
        self._can_reset = False
        self._wake = threading.Event()

    def lifetime_peak(self) -> int:
        """Most ever resident in this process, whatever was reset; with its children while there was an open measurement."""
        with self._lock:
            self._lifetime_bytes = max(self._lifetime_bytes, *own_memory())
            return self._lifetime_bytes

    def start(self, *, ask_children: bool = True) -> HostPeak:
        """Open a measurement that begins at what is resident now.

        Args:
            ask_children: look at the children too; without it, inside another measurement, they count as that saw them last.
        """
        with self._lock:
            ask_children = ask_children or not self._open
            self.sample(ask_children)  # what came before belongs to the measurements already open
            if ask_children:
                self._children.accept_existing()
            peak = HostPeak(exact=self._can_reset)
            self._open.append(peak)
            self.sample(ask_children)
            if len(self._open) == 1:
                self._wake = threading.Event()
                threading.Thread(target=self._run, args=(self._wake,), name="lowmem-memory", daemon=True).start()
            return peak

    def stop(self, peak: HostPeak, *, ask_children: bool = True) -> None:
        """Close a measurement after a last sample."""
        if os.getpid() != self.pid:  # a forked process leaves its parent's block
            return
        with self._lock:
            self.sample(ask_children or len(self._open) == 1)
            self._open.remove(peak)
            if not self._open:
                self._wake.set()
                self._children_bytes = 0

    def sample(self, children: bool = True) -> None:
        """Bring every open measurement up to date.

        Args:
            children: look at the children again; they may take milliseconds per GiB.
        """
        with self._lock:
            own = self._own_interval_peak()
            if children:
                self._children_bytes = sum(self._children.sample())
            self._lifetime_bytes = max(self._lifetime_bytes, own + self._children_bytes)
            for peak in self._open:
                peak.peak_bytes = max(peak.peak_bytes, own + self._children_bytes)

    def _own_interval_peak(self) -> int:
        """The most resident since the previous call; without resets only what is resident now, unless the record grew."""
        resident, high_water = own_memory()
        grown = high_water > self._last_high_water
        self._can_reset = reset_high_water_mark()
        self._last_high_water = resident if self._can_reset else high_water
        return max(resident, high_water) if grown else resident

    def _run(self, wake: threading.Event) -> None:
        pause = SAMPLE_INTERVAL_S
        while not wake.wait(pause):
            began = time.thread_time()
            try:
                self.sample()
            except MemoryError:  # the run has reached its limit and will say so itself; the high-water mark is not lost
                continue
            pause = max(SAMPLE_INTERVAL_S, (time.thread_time() - began) / _SAMPLER_SHARE)
