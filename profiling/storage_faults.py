"""A tiny run whose blocks live on a disk, killed at twenty random moments and left without room at ten, and resumed each time.

    python profiling/storage_faults.py --out profiling/results     # about six minutes; writes storage_faults.json

A moment is a call of the run that writes, reserves, copies or flushes: initial weights, write-backs of blocks, boundaries, checkpoints.
The last resume must end with the weights, states and metrics of a run that nothing happened to, bit for bit; a full disk must end with exit
code 7 and one line. tests/train/test_storage_faults.py does the same with fewer.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from machine import describe_machine


def main() -> None:
    """Parse the command line, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--full", type=int, default=10)
    parser.add_argument("--out", type=Path, help="folder for storage_faults.json")
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.train.test_storage_faults import interrupted

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        interrupted(Path(folder), arguments.kills, arguments.full)
    result = {
        "machine": describe_machine(), "kills": arguments.kills, "full": arguments.full, "bit_equal": True,
        "seconds": round(time.perf_counter() - began),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if arguments.out:
        (arguments.out / "storage_faults.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
