"""Peak memory of preparing a corpus of a given size, in a fresh process, as one JSON object on standard output.

    python profiling/data_memory.py --megabytes 1000 --tokenizer bpe
    python profiling/data_memory.py --sizes 10 150 1000 --out profiling/results     # some minutes; writes data_memory.json

Text of that size is generated in a temporary folder (set TMPDIR to choose the disk), tokenised into shards there, and a few
thousand training windows are read back.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

BLOCK_BYTES = 1_000_000
WINDOWS = 4096


def main() -> None:
    """Parent: generate and start the child. Child: prepare and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100, help="size of the corpus in 10^6 bytes")
    parser.add_argument("--tokenizer", default="bpe", help="bpe, chunk, bytes or chars")
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--sizes", type=int, nargs="+", help="several sizes, one after the other")
    parser.add_argument("--out", type=Path, help="with --sizes: folder for data_memory.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sizes:
        compare(options)
        return
    if options.child:
        print(json.dumps(measure(Path(options.child), options.tokenizer, options.seq_len)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder) / "corpus.txt", options.megabytes)
        command = [sys.executable, __file__, *sys.argv[1:], "--child", folder]
        child = subprocess.run(command, check=True, capture_output=True, text=True)
    print(json.dumps({"megabytes": options.megabytes, "tokenizer": options.tokenizer, **json.loads(child.stdout)}))


def compare(options: argparse.Namespace) -> None:
    """Each size in processes of its own; how far the largest peak lies above the smallest."""
    from machine import describe_machine

    rows = []
    for size in options.sizes:
        command = [sys.executable, __file__, "--megabytes", str(size), "--tokenizer", options.tokenizer, "--seq_len", str(options.seq_len)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(json.dumps(rows[-1]), flush=True)
    growth = rows[-1]["host_peak_bytes"] - rows[0]["host_peak_bytes"]
    result = {"machine": describe_machine(), "growth_bytes": growth, "rows": rows}
    print(json.dumps({"growth_bytes": growth}))
    if options.out:
        (options.out / "data_memory.json").write_text(json.dumps(result, indent=1) + "\n")


def write_text(path: Path, megabytes: int) -> None:
    """Made-up words, the frequent ones short, with a long tail; the same text for the same size."""
    random = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(random.choice(letters, size=2 + min(10, rank // 2000))) for rank in range(20_000)]
    weights = 1 / np.arange(10, 10 + len(words))
    weights /= weights.sum()
    with open(path, "w", encoding="ascii") as file:
        for _ in range(megabytes):
            text = " ".join(words[index] for index in random.choice(len(words), size=BLOCK_BYTES // 4, p=weights))
            file.write(text[: BLOCK_BYTES - 1] + "\n")


def measure(folder: Path, tokenizer: str, seq_len: int) -> dict:
    """Prepare the corpus in this process.

    Returns:
        host_peak_bytes (VmHWM), the same before and after each part, tokens and seconds.
    """
    from lowmem.config.schema import DataConfig, SourceConfig
    from lowmem.data.prepare import prepare_data

    config = DataConfig(
        sources=[SourceConfig(path=str(folder / "corpus.txt"))], tokenizer=tokenizer, seq_len=seq_len, cache_dir=str(folder / "cache")
    )
    base, start = peak_bytes(), time.perf_counter()
    data = prepare_data(config, seed=0)
    prepared, prepare_s = peak_bytes(), time.perf_counter() - start
    data.train.next(WINDOWS)
    facts = data.description["sources"][0]
    return {
        "base_peak_bytes": base,
        "prepared_peak_bytes": prepared,
        "host_peak_bytes": peak_bytes(),
        "text_bytes": facts["text_bytes"],
        "tokens": facts["tokens"],
        "seq_len": seq_len,
        "windows_read": WINDOWS,
        "prepare_s": round(prepare_s, 2),
    }


def peak_bytes() -> int:
    """High-water mark of this process's resident memory (VmHWM)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM: this measurement needs Linux")


if __name__ == "__main__":
    main()
