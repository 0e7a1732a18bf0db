"""Hand-made results of `lowmem profile`: a run with everything, one without a prediction, one that failed, one on a GPU."""

from typing import Any

MIB = 2**20
PARTS = {
    "base": 210 * MIB, "weights": 99 * MIB, "gradients": 99 * MIB, "optimizer_states": 198 * MIB, "activations": 180 * MIB,
    "logits": 34 * MIB, "workspace": 60 * MIB, "data": 12 * MIB,
}  # fmt: skip
GPU_PARTS = {"weights": 430 * MIB, "gradients": 430 * MIB, "optimizer_states": 220 * MIB, "activations": 900 * MIB}
COUNTED = {"weights": 99 * MIB, "gradients": 99 * MIB, "optimizer_states": 198 * MIB}
MACHINE = {"date": "2026-01-01", "processor": "a processor & more", "memory_bytes": 8 * 1024 * MIB, "versions": {"torch": "2.13.0"}}


def peaks(host: int, allocated: int = 0, reserved: int = 0, **more: Any) -> dict[str, Any]:
    return {"host_peak_bytes": host, "cuda_allocated_peak_bytes": allocated, "cuda_reserved_peak_bytes": reserved, **more}


def result(name: str, **changes: Any) -> dict[str, Any]:
    """A run of 3 steps that ended well."""
    timeline = [
        {"t_s": at / 10, "host_bytes": min(at * 20, 800) * MIB, "host_peak_bytes": min(at * 20, 800) * MIB + at % 3 * MIB, "processes": 1}
        for at in range(60)
    ]
    return {
        "name": name, "config": f"{name}.yaml", "steps": 3, "exit_code": 0, "message": "", "duration_s": 6.0,
        "budget": {"ram_bytes": 1024 * MIB, "vram_bytes": None}, "predicted": peaks(sum(PARTS.values()), components=PARTS),
        "measured": peaks(923 * MIB, components=COUNTED), "tokens_per_s": 800.4,
        "phases": {"load": peaks(400 * MIB), "first_step": peaks(923 * MIB)},
        "spans": [
            {"phase": "load", "from_s": 0.0, "to_s": 3.0}, {"phase": "first_step", "from_s": 3.0, "to_s": 4.0},
            {"phase": "steady_steps", "from_s": 4.0, "to_s": 5.5}, {"phase": "save", "from_s": 5.5, "to_s": 6.0},
        ],
        "steps_at_s": [4.0, 4.7, 5.5], "timeline": timeline, **changes,
    }  # fmt: skip


def all_results() -> list[dict[str, Any]]:
    return [
        result("whole"),
        result("unpredicted", predicted=None, measured=peaks(400 * MIB, components={})),
        result(
            "failed", predicted=None, measured=None, exit_code=3, message="memory ran out; <b>use</b> | less", tokens_per_s=None, phases={},
            spans=[], steps_at_s=[], timeline=[],
        ),
        result(
            "gpu <i>&", budget={"ram_bytes": 64 * 1024 * MIB, "vram_bytes": 2500 * MIB},
            predicted=peaks(1900 * MIB, 1800 * MIB, sum(GPU_PARTS.values()), components=GPU_PARTS),
            measured=peaks(1850 * MIB, 1900 * MIB, 2200 * MIB, components={"weights": 430 * MIB}),
        ),
    ]  # fmt: skip
