"""How quickly weights come from a disk, and from host memory to a GPU: measured once for a disk, and kept in the cache."""

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lowmem.config.schema import RunConfig
from lowmem.engine.storage.disk_file import DiskFile, aligned_buffer
from lowmem.planning.hardware import StorageRates, planned_hardware
from lowmem.system.devices import cpu_model
from lowmem.system.errors import StorageError
from lowmem.system.files import cache_root, cached_json, existing_folder, json_sha256

_PIECE_BYTES, _PIECES = 32 << 20, 6  # as large as a small block, and 192 MiB in all
_ENOUGH_S = 0.7  # of one direction; a slow disk is not written to for long
ASSUMED = StorageRates(0.45e9, 0.35e9, 12e9, "assumed")  # a SATA SSD in use; 16 lanes of PCIe 3.0, three quarters of them


def storage_folder(config: RunConfig) -> Path:
    """Where scratch files of a run are, or the nearest folder above it that exists."""
    return existing_folder(Path(config.train.storage_dir or config.run_dir))


def storage_rates_for(config: RunConfig) -> StorageRates:
    """Of the machine that is planned for; of a disk here as `DiskFile` finds it where scratch files of the run would be.

    Where nothing can be written, or there is no GPU here, rates are assumed.
    """
    named = planned_hardware()
    if named is not None and named.storage is not None:
        return named.storage
    folder = storage_folder(config)
    copies = config.device == "cuda" and torch.cuda.is_available()
    card = torch.cuda.get_device_name(0) if copies else ""
    try:
        key = json_sha256(["storage", cpu_model(), folder.stat().st_dev, card])
        path = cache_root(config.data.cache_dir) / "rates" / f"storage-{key[:24]}.json"
        return cached_json(path, _storage_rates, lambda: asdict(measure_storage(folder, copies)))
    except (StorageError, OSError):
        return ASSUMED


def measure_storage(folder: Path, copies: bool = False) -> StorageRates:
    """Time what a step does: pieces as large as a block, one after the other, written and then read past the page cache.

    Args:
        copies: between host memory and the GPU, too.
    Raises:
        StorageError: nothing can be written there.
    Memory: two pieces of 32 MiB, which may be pinned, and one on the GPU.
    """
    file = DiskFile(folder)
    try:
        buffer = aligned_buffer(_PIECE_BYTES)
        buffer.random_()  # some disks compress
        offsets = [file.reserve(_PIECE_BYTES) for _ in range(_PIECES)]
        written = _bytes_per_s([lambda at=at: file.write(at, buffer).result() for at in offsets])
        read = _bytes_per_s([lambda at=at: file.read(at, buffer).result() for at in offsets])
    finally:
        file.close()
    return StorageRates(read, written, _copy_rate() if copies else ASSUMED.copied, "measured")


def _bytes_per_s(transfers: list[Any]) -> float:
    began, done = time.perf_counter(), 0
    for transfer in transfers:
        transfer()
        done += 1
        if time.perf_counter() - began > _ENOUGH_S:
            break
    return done * _PIECE_BYTES / (time.perf_counter() - began)


def _copy_rate() -> float:
    host, device = aligned_buffer(_PIECE_BYTES, pinned=True), torch.empty(_PIECE_BYTES, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return _PIECE_BYTES / min(times)


def _storage_rates(value: Any) -> StorageRates:
    """What a file of the cache says.

    Raises:
        TypeError, ValueError: it says nothing that can be true.
    """
    rates = StorageRates(**value)
    numbers = (rates.disk_read, rates.disk_written, rates.copied)
    if not all(isinstance(number, float) and 0 < number < math.inf for number in numbers) or rates.source != "measured":
        raise ValueError("rates are positive numbers")
    return rates
