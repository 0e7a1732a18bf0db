"""Watches the memory of a process and of everything below it from outside, in a process of its own.

    python -m lowmem.memory.watch --pid PID [--interval 0.05] [--out FILE.jsonl] [--nvml] [--parent PID]

One JSON object a sample, until PID ends: `t_s` since the start; `host_bytes` resident now; `host_peak_bytes` with the peaks that
processes had since the sample before; `processes`; `cgroup_bytes` where a version 2 control group tells it; with --nvml
`nvml_bytes`. PID "-" is read from standard input, so that the watcher is ready before the process it watches starts.

Memory: 9 MiB resident, of which 3 MiB are its own and the rest is the interpreter's files: it imports os, sys and time and runs as
`python -S -I watch.py`, which is what the command above turns itself into. With --nvml it loads pynvml as well.
Cost: a sample of one process reads a few small files (0.5 ms); of several it sums their shares of pages, about 15 ms per GiB
resident. After a sample that took c seconds of processor time the next one is at least 50 c away, so it stays near 2 % of a core;
2 GiB in two processes are sampled about twice a second.

What is exact: no process's high-water mark is reset here. Peaks between samples are seen through it, unless the process itself
resets it in between, as `measure_peak` does; what that reports in its own process misses nothing.
"""

import os
import sys
import time

if __package__:
    from lowmem.memory.procfs import cgroup_bytes, child_pids, rollup_bytes, start_time, status_bytes
else:  # by path, without site-packages and without lowmem's own imports
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from procfs import cgroup_bytes, child_pids, rollup_bytes, start_time, status_bytes  # type: ignore[import-not-found, no-redef]

INTERVAL_S = 0.05
_SHARE = 0.02  # of one core
_USAGE = "usage: python -m lowmem.memory.watch --pid PID [--interval SECONDS] [--out FILE] [--nvml] [--parent PID]"


class TreeMemory:
    """Memory of a process and of everything it started, also of what outlives its own parent there.

    A descendant counts from its second sample on: between vfork and exec it is its parent's memory under another number, and
    would count that twice.
    """

    def __init__(self, root: int):
        self._root = root
        self._root_started = start_time(root)
        self._started: dict[int, int] = {}
        self._high_water: dict[int, int] | None = None  # before the first sample

    def alive(self) -> bool:
        """Whether the root still runs; a process waited for by nobody does not."""
        return self._root_started is not None and start_time(self._root) == self._root_started

    def pids(self) -> list[int]:
        """The root first, then its descendants; those seen before stay, with what they started, until they end."""
        kept = {pid for pid, started in self._started.items() if start_time(pid) == started}
        found = dict.fromkeys([self._root])
        for pid in [self._root, *kept]:
            found |= dict.fromkeys([pid, *(child_pids(pid) or ())])
        found.pop(os.getpid(), None)  # the watcher may have been started from inside
        starts = {pid: start_time(pid) for pid in found if pid != self._root}
        self._started = {pid: started for pid, started in starts.items() if started is not None}
        return [self._root, *self._started]

    def sample(self) -> dict[str, int] | None:
        """host_bytes, host_peak_bytes and processes now; None when nothing is there any more."""
        counted, spikes, high_water = {}, 0, {}
        for pid in self.pids():
            status = status_bytes(pid)
            if status is None or "VmRSS" not in status:  # ended
                continue
            mark = high_water[pid] = status.get("VmHWM", 0)
            before = mark if self._high_water is None else self._high_water.get(pid)  # what was before the first sample is not counted
            if pid != self._root and (before is None or self._high_water is None):
                high_water[pid] = 0 if before is None else mark
                continue
            counted[pid] = status
            if mark != before:  # grown, or reset and grown since
                spikes += max(0, mark - status["VmRSS"])
        self._high_water = high_water
        if not counted:
            return None
        resident = _resident_bytes(counted)
        return {"host_bytes": resident, "host_peak_bytes": resident + spikes, "processes": len(counted)}


def _resident_bytes(processes: dict[int, dict[str, int]]) -> int:
    """Resident bytes of several processes, pages that they share counted once.

    Shares of anonymous and shared memory add up to that. Shares of files would leave out what processes outside map as well, such as
    another program that uses the same libraries; the process with the most file pages is a lower bound.
    """
    statuses = list(processes.values())
    if len(statuses) == 1:
        return statuses[0]["VmRSS"]
    anonymous, files = 0, 0
    for pid, status in processes.items():
        rollup = rollup_bytes(pid) or {}
        if "Pss_File" in rollup:
            anonymous += rollup["Pss_Anon"] + rollup["Pss_Shmem"]
            files += rollup["Pss_File"]
        else:
            anonymous += rollup.get("Pss", status["VmRSS"])
    return anonymous + max(files, max(status.get("RssFile", 0) for status in statuses) if files else 0)


def watch(pid: int, out, interval_s: float, device_bytes=None, parent: int = 0) -> None:
    """Write samples of `pid`'s tree to `out` until it ends.

    Args:
        out: a text file.
        device_bytes: pids to bytes or None, asked at every sample.
        parent: whose end is ours too; 0 is nobody.
    """
    tree, began = TreeMemory(pid), time.monotonic()
    while tree.alive() and parent in (0, os.getppid()):
        cost = time.process_time()
        at = time.monotonic() - began
        record = tree.sample()
        if record is not None:
            extra = {"cgroup_bytes": cgroup_bytes("memory.current", pid)}
            if device_bytes is not None:
                extra["nvml_bytes"] = device_bytes(tree.pids())
            numbers = record | {name: value for name, value in extra.items() if value is not None}
            out.write(f'{{"t_s": {at:.3f}, ' + ", ".join(f'"{name}": {value}' for name, value in numbers.items()) + "}\n")
            out.flush()
        time.sleep(max(interval_s, (time.process_time() - cost) / _SHARE))


def options(argv: list[str]) -> dict[str, str]:
    """Command line to values by name; argparse alone would add a megabyte."""
    values, words = {"interval": str(INTERVAL_S), "out": "", "nvml": "", "parent": "0"}, list(argv)
    while words:
        name, equals, value = words.pop(0).partition("=")
        if name == "--nvml":
            values["nvml"] = "yes"
        elif name in ("--pid", "--interval", "--out", "--parent") and (equals or words):
            values[name[2:]] = value if equals else words.pop(0)
        else:
            raise SystemExit(_USAGE)
    if "pid" not in values:
        raise SystemExit(_USAGE)
    return values


def main(argv: list[str]) -> int:
    """The command; 2 for bad usage."""
    try:
        values = options(argv)
        interval_s = float(values["interval"])
        text = sys.stdin.readline() if values["pid"] == "-" else values["pid"]
        pid, parent = int(text) if text else 0, int(values["parent"])
    except (SystemExit, ValueError) as error:
        print(error if isinstance(error, SystemExit) else _USAGE, file=sys.stderr)
        return 2
    device_bytes = None
    if values["nvml"]:
        if __package__:
            from lowmem.memory.measure import process_bytes
        else:
            from nvml import process_bytes  # type: ignore[import-not-found, no-redef]
        device_bytes = process_bytes
    if not pid:  # the one who started this has nothing to watch
        return 0
    if values["out"]:
        with open(values["out"], "w", encoding="ascii") as out:
            watch(pid, out, interval_s, device_bytes, parent)
    else:
        watch(pid, sys.stdout, interval_s, device_bytes, parent)
    return 0


if __name__ == "__main__":
    if __package__:  # started with -m, which has imported the package: become thin
        isolated = ["-I"] if "--nvml" in sys.argv else ["-S", "-I"]
        os.execv(sys.executable, [sys.executable, *isolated, os.path.abspath(__file__), *sys.argv[1:]])
    sys.exit(main(sys.argv[1:]))
