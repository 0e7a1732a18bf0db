"""`lowmem profile`: any command, and configurations, as a user meets it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowmem.cli import profile
from lowmem.memory.watched import WatchedRun
from lowmem.reporting.results import MetricsTail, last_words, prediction
from lowmem.system.errors import ConfigError, StoppedBySignal
from tests.memory.fresh_process import linux_only
from tests.reference.tiny_families import save_tiny
from tests.train.tiny_run import ROOT, write_text

MIB = 2**20
START = (
    "import sys; from lowmem.cli.main import run_command; from lowmem.cli.profile import profile_main; sys.exit(run_command(profile_main))"
)
TINY = """
device: cpu
model: {{dim: {dim}, num_layers: 2, num_heads: 2}}
data: {{sources: [{{path: {text}}}], tokenizer: bytes, seq_len: 32, val_fraction: 0.1, cache_dir: {cache}}}
train: {{global_batch_size: 4, micro_batch_size: 2, precision: fp32, eval_sequences: 8, threads: 1}}
budget: {{ram: {ram}}}
"""


def run(*arguments: object, **more) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", START, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, timeout=120, **more
    )


@linux_only
def test_a_command_s_peak_exit_code_and_streams():
    code = "import sys; b = bytearray(150 << 20); del b; print('out'); print('err', file=sys.stderr); sys.exit(int(input()))"
    result = run("--", sys.executable, "-c", code, input="7\n")
    assert (result.returncode, result.stdout) == (7, "out\n")
    assert result.stderr.startswith("err\nlowmem profile: peak host memory 1")
    assert result.stderr.endswith(", exit code 7\n")
    result = run("--json", "--", sys.executable, "-c", code, input="0\n")
    found = json.loads(result.stdout)
    assert result.returncode == found["exit_code"] == 0
    assert "out\n" in result.stderr
    assert 150 * MIB < found["host_peak_bytes"] < 180 * MIB  # and an interpreter
    assert found["samples"] >= 1
    assert not any(str(Path(sys.executable).parent) in str(value) for value in found.values())


@linux_only
@pytest.mark.parametrize("number, handled, code", [(signal.SIGTERM, True, 9), (signal.SIGINT, True, 9), (signal.SIGTERM, False, 143)])
def test_signals_reach_the_whole_group_once(number, handled, code):
    """A shell that waits for a program: both get it, as from a terminal."""
    program = f"import signal, sys, time; signal.signal({int(number)}, lambda *_: (print('got it', flush=True), sys.exit(9))); " * handled
    program += "import time; print('ready', flush=True); time.sleep(60)"
    shell = 'trap "" INT TERM; "$0" -c "$1"; exit $?' if handled else 'exec "$0" -c "$1"'
    command = [sys.executable, "-c", START, "--", "sh", "-c", shell, sys.executable, program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout.readline() == "ready\n"
        started = time.monotonic()
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert time.monotonic() - started < 20
    assert (process.returncode, out) == (code, "got it\n" * handled)
    assert err.startswith("lowmem profile: peak host memory")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no configuration; expected: lowmem profile CONFIG"),
        (["--"], "nothing after --; expected a command"),
        (["a.yaml", "--steps", "3", "--", "true"], "found a.yaml --steps before --"),
        (["--", "no-such-command-here"], "cannot start 'no-such-command-here': No such file"),
        (["nothing.yaml"], "no such file: nothing.yaml"),
        (["README.md/x.yaml"], "no such file: README.md/x.yaml"),
        (["configs/cpu/demo.yaml", "--steps", "1"], "--steps is 1; expected at least 2"),
        (["configs/cpu/demo.yaml", "--steps", "two"], "'two' is no whole number"),
        (["configs/cpu/demo.yaml", "--interval", "0"], "--interval is 0.0; expected 0.001 to 60"),
        (["configs/cpu/demo.yaml", "--optim.lrr=3"], "the nearest valid key is optim.lr"),
        (["configs/cpu/demo.yaml", "--train.steps=3"], "profile sets train.steps itself, use --steps"),
        (["configs/cpu/demo.yaml", "--run_dir", "x"], "profile sets run_dir itself, use --out"),
        (["configs/cpu/demo.yaml", "--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_usage_is_refused_before_anything_runs(arguments, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(profile, "_profile_config", lambda *_: pytest.fail("it ran"))
    with pytest.raises(ConfigError) as error:
        profile.profile_main(arguments)
    assert message in str(error.value)


def test_both_forms_of_an_override_are_understood():
    flags, overrides = profile._parse(
        ["a.yaml", "--train.seed", "3", "--optim.lr=0.1", "b.yaml", "--steps=4", "--device=cpu", "--budget.ram="]
    )
    assert (flags.configs, flags.steps) == (["a.yaml", "b.yaml"], 4)
    assert overrides == ["train.seed=3", "optim.lr=0.1", "device=cpu", "budget.ram="]


def test_configurations_of_one_name_are_kept_apart(tmp_path):
    paths = [tmp_path / folder / "x y.yaml" for folder in "ab"]
    for path in paths:
        path.parent.mkdir()
        path.write_text("device: cpu\n")
    assert list(profile._checked([str(path) for path in paths], 2, [])) == ["x-y", "x-y-2"]


@linux_only
@pytest.mark.slow
def test_configurations_are_measured_a_failing_one_is_told_and_the_others_go_on(tmp_path):
    text, out = write_text(tmp_path / "text.txt"), tmp_path / "out"
    values = {"text": text, "cache": tmp_path / "cache"}
    (tmp_path / "fits.yaml").write_text(TINY.format(dim=32, ram="4GiB", **values))
    (tmp_path / "not.yaml").write_text(TINY.format(dim=32, ram="20MiB", **values))
    result = run(tmp_path / "not.yaml", tmp_path / "fits.yaml", "--steps", 4, "--out", out, "--train.seed=5", "--json")
    assert result.returncode == 1, result.stderr
    failed, fits = json.loads(result.stdout)["configs"]
    assert (failed["exit_code"], failed["measured"]) == (3, None)
    assert "its limit is 20 MiB" in failed["message"]
    assert (fits["exit_code"], fits["steps"], fits["overrides"]) == (0, 4, ["train.seed=5"])
    assert fits["budget"] == {"ram_bytes": 4 * 1024 * MIB, "vram_bytes": None}
    measured = fits["measured"]
    # One process, no children: what it says of itself is what was seen of it from outside, but for a peak between two samples.
    assert 0.8 * measured["host_peak_bytes"] < fits["watched"]["host_peak_bytes"] <= 1.02 * measured["host_peak_bytes"]
    assert {"weights", "gradients", "optimizer_states"} <= set(measured["components"])
    assert fits["tokens_per_s"] > 0
    assert [span["phase"] for span in fits["spans"]] == ["load", "first_step", "steady_steps", "evaluation", "save"]
    assert len(fits["steps_at_s"]) == 4
    assert {path.name for path in out.iterdir()} == {
        "fits.json", "not.json", "fits-timeline.svg", "not-timeline.svg", "peaks.svg", "speed.svg", "profile.md", "profile.html",
    }  # fmt: skip
    assert str(tmp_path) not in (out / "profile.html").read_text() + (out / "fits.json").read_text()


@linux_only
@pytest.mark.slow
def test_a_configuration_of_a_model_of_transformers_is_measured(tmp_path):
    theirs = save_tiny(tmp_path / "llama", "llama")
    values = {"text": write_text(tmp_path / "text.txt"), "cache": tmp_path / "cache", "dim": 256, "ram": "4GiB"}
    config = "\n".join(line for line in TINY.format(**values).splitlines() if not line.startswith("model:")) + "\n"
    (tmp_path / "theirs.yaml").write_text(config)
    given = [f"--model.path={tmp_path / 'llama'}", "--data.tokenizer=bpe"]
    result = run(tmp_path / "theirs.yaml", "--steps", 3, "--out", tmp_path / "out", *given, "--json")
    assert result.returncode == 0, result.stderr
    (measured,) = json.loads(result.stdout)["configs"]
    assert measured["measured"]["components"]["weights"] == 4 * theirs.num_parameters()


def test_a_signal_ends_the_whole_profile_and_leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path / "x.yaml").write_text("device: cpu\n")
    monkeypatch.setattr(profile, "run_watched", lambda *_, **__: WatchedRun(143, 1.0, 0, [], int(signal.SIGTERM)))
    with pytest.raises(StoppedBySignal) as error:
        profile.profile_main([str(tmp_path / "x.yaml"), "--out", str(tmp_path / "out")])
    assert error.value.exit_code == 143
    assert os.listdir(tmp_path / "out") == []


def test_a_prediction_comes_from_a_dry_run_before_the_run(tmp_path, monkeypatch):
    (tmp_path / "x.yaml").write_text("device: cpu\n")
    stored: dict[str, object] = {}

    def finished(command, **_):
        folder = Path(next(word for word in command if word.startswith("--run_dir=")).partition("=")[2])
        folder.mkdir()
        (folder / "memory.json").write_text(json.dumps({"predicted": stored.get("predicted"), "measured": {"host_peak_bytes": 9}}))
        return WatchedRun(0, 1.0, 9, [], 0)

    monkeypatch.setattr(profile, "run_watched", finished)
    monkeypatch.setattr(profile, "_dry_run", lambda command: stored.get("dry"))

    def predicted():
        (name, (path, config)) = next(iter(profile._checked([str(tmp_path / "x.yaml")], 2, []).items()))
        return profile._profile_config(name, path, config, 2, tmp_path / "out", [], 0.05)["predicted"]

    assert predicted() is None
    stored["dry"] = {"components": {"weights": 3}}  # parts are no prediction of the peak
    assert predicted() is None
    stored["dry"] = {"host_peak_bytes": 5, "components": {}}
    assert predicted() == stored["dry"]
    stored["predicted"] = {"host_peak_bytes": 6, "components": {}}  # of a run that was forced: nobody looks there
    assert predicted() == stored["dry"]
    assert prediction(None) is None


def test_steps_and_phases_are_read_off_the_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    tail.poll(0.5)
    step = '{"step": 1, "step_time_s": 1.0, "tokens_per_s": %d}\n'
    path.write_text(step % 10)
    tail.poll(3.0)
    path.write_text(path.read_text() + step % 30 + step % 20 + '{"step": 3, "val_')
    tail.poll(5.5)
    path.write_text(path.read_text() + 'loss": 3.0}\n')
    tail.poll(6.0)
    assert tail.step_times() == [(2.0, 3.0), (3.5, 4.5), (4.5, 5.5)]
    assert [(span["phase"], span["from_s"], span["to_s"]) for span in tail.spans(8.0)] == [
        ("load", 0.0, 2.0), ("first_step", 2.0, 3.0), ("steady_steps", 3.0, 5.5), ("evaluation", 5.5, 6.0), ("save", 6.0, 8.0),
    ]  # fmt: skip
    assert tail.tokens_per_s() == 25
    assert MetricsTail(tmp_path / "none").spans(2.0) == [{"phase": "load", "from_s": 0.0, "to_s": 2.0}]


def test_the_message_of_a_failed_run_is_its_last_word():
    assert last_words("noise\nlowmem: error: memory ran out\n  allowed: 3\n") == "memory ran out"
    assert last_words("Traceback\nValueError: x\n\n") == "ValueError: x"
    assert last_words("") == ""
