"""The demo's configuration under DeepSpeed's own launcher: one rank, two ranks, every ZeRO file; the local engine's losses."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowmem.cli.main import main
from tests.train.tiny_run import metrics

ROOT = Path(__file__).parent.parent
ZERO_FILES = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))
ZERO2 = (f"--engine.config={ROOT / 'configs/deepspeed/zero2.json'}",)
STEPS = 20
# The demo's model with less text per step, in fp32 so that only the order of sums differs between engines.
ARGUMENTS = [
    "--config", str(ROOT / "configs/cpu/demo.yaml"), "--data.sources=[{stdlib: true, max_bytes: 1000000}]", "--data.tokenizer=bytes",
    "--data.seq_len=64", "--train.global_batch_size=8", "--train.micro_batch_size=2", f"--train.steps={STEPS}",
    "--train.precision=fp32", "--train.eval_every=20", "--train.eval_sequences=8", "--train.save_every=10", "--device=cpu",
]  # fmt: skip
# Sums of at most 512 tokens in another order differ by 512 * 2^-24 = 3e-5 of a gradient in the worst case, about 22 * 2^-24 = 1.3e-6
# when errors have random signs. AdamW turns that into at most twice that share of an update of lr <= 2e-3, so 20 steps move a weight
# by 20 * 2 * 1.3e-6 * 2e-3 = 1e-7, and the loss, with gradients of norm about 1 to 3 over random directions, by less than 1e-5 of
# itself. Seen: 1.1e-7. A micro-batch counted twice or a missed division shows as 1e-1.
RELATIVE = 1e-5

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]


def losses(run_dir: Path) -> list[float]:
    return [line.get("loss", line.get("val_loss")) for line in metrics(run_dir)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    assert main(["pretrain", "--quiet", *ARGUMENTS, f"--run_dir={folder / 'local'}", f"--data.cache_dir={folder / 'cache'}"]) == 0
    return folder


def launch(folder: Path, name: str, *launcher: str, arguments: tuple[str, ...] = (), stop: int = 0) -> subprocess.CompletedProcess:
    """Run the launcher; with `stop`, send that signal to it and every rank, as a terminal does, once 8 steps are done."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [str(Path(sys.executable).parent / "deepspeed"), "-q", "--master_port", str(port), *launcher, "launch/pretrain.py"]
    command += [*ARGUMENTS, f"--run_dir={folder / name}", f"--data.cache_dir={folder / 'cache'}", *arguments]
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment, start_new_session=True
    )
    if stop:
        path = folder / name / "metrics.jsonl"
        while process.poll() is None and not (path.exists() and path.read_text().count("\n") >= 8):
            time.sleep(0.01)
        os.killpg(process.pid, stop)
    output, errors = process.communicate(timeout=400)
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def test_one_rank_without_any_file(workplace):
    result = launch(workplace, "one")
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(losses(workplace / "one")) == STEPS + 1
    assert losses(workplace / "one") == pytest.approx(losses(workplace / "local"), rel=RELATIVE)


@pytest.mark.parametrize("path", ZERO_FILES, ids=lambda path: path.stem)
def test_two_ranks_with_every_zero_file(workplace, path):
    result = launch(workplace, path.stem, "--num_gpus", "2", arguments=(f"--engine.config={path}",))
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(losses(workplace / path.stem)) == STEPS + 1
    assert losses(workplace / path.stem) == pytest.approx(losses(workplace / "local"), rel=RELATIVE)


@pytest.fixture(scope="module")
def two_ranks(workplace) -> Path:
    """The uninterrupted run on two ranks that others are compared with."""
    if not (workplace / "zero2").exists():
        assert launch(workplace, "zero2", "--num_gpus", "2", arguments=ZERO2).returncode == 0
    return workplace / "zero2"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_two_ranks_stopped_and_launched_again_end_bit_equal(workplace, two_ranks, number):
    stopped_run = workplace / f"stopped-{number}"
    stopped = launch(workplace, stopped_run.name, "--num_gpus", "2", arguments=ZERO2, stop=number)
    assert stopped.returncode != 0
    assert len(losses(stopped_run)) < STEPS
    if number == signal.SIGINT:  # asked politely, the run saves where it is
        assert "checkpoint saved" in stopped.stderr
        assert f"step-{len(losses(stopped_run)):08d}\n" == (stopped_run / "checkpoints" / "latest").read_text()
        assert "lowmem/train" not in stopped.stderr  # no traceback of ours; the launcher shows its own
    again = launch(workplace, stopped_run.name, "--num_gpus", "2", arguments=ZERO2)
    assert again.returncode == 0, again.stdout + again.stderr
    assert metrics(stopped_run) == metrics(two_ranks)
    assert final_files(stopped_run) == final_files(two_ranks)


def test_a_mistake_that_only_rank_0_sees_ends_all_ranks_with_its_code(workplace, two_ranks):
    result = launch(workplace, "zero2", "--num_gpus", "2", arguments=(*ZERO2, "--optim.lr=0.5"))
    assert result.returncode == 2
    assert "holds a run with other settings: optim.lr was 0.003, now 0.5" in result.stderr
    assert "Traceback" not in result.stderr


def final_files(run_dir: Path) -> dict[str, bytes]:
    newest = sorted((run_dir / "checkpoints").glob("step-????????"))[-1]
    return {path.name: path.read_bytes() for path in newest.iterdir()}
