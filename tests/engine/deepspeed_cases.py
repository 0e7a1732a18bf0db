"""Cases for deepspeed_worker by the shipped configuration files, and checkpoints compared to the bit."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

CONFIGS = Path(__file__).parents[2] / "configs" / "deepspeed"


def case(file: str, name: str, **more: Any) -> dict[str, Any]:
    return {"name": f"{file}-{name}", "engine": {"config": str(CONFIGS / f"{file}.json")}, **more}


def compare_checkpoints(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    assert {Path(name).suffix for name in names} == {".json", ".safetensors"}  # no pickle, no script
    for name in (name for name in names if name.endswith(".safetensors")):
        left, right = load_file(one / name), load_file(other / name)
        assert left.keys() == right.keys()
        for key in left:
            assert left[key].dtype == right[key].dtype
            assert torch.equal(left[key], right[key]), f"{one / name}: {key}"
