"""Random bad input against every command: none may end in a traceback, a hang, a crash, or be accepted where it is known to be wrong.

    python profiling/fuzz.py --seconds 1800 --out profiling/results/fuzz.json
    python profiling/fuzz.py --kinds checkpoint --seed 7 --trials 100 --keep /tmp/faults

A trial is a function of its kind, its number and the seed. Most run in a process forked from one that has imported everything (a second
each); `signal` and `memory` start real ones. Faults are printed as they are found, with the command and, with --keep, its files.
"""

import argparse
import contextlib
import copy
import gzip
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process with a pool of threads cannot be forked
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

DONE, USAGE, BUDGET, DATA, CHECKPOINT, DIVERGED, STORAGE = 0, 2, 3, 4, 5, 6, 7
ANY = frozenset({DONE, USAGE, BUDGET, DATA, CHECKPOINT, DIVERGED, STORAGE})
REFUSED = ANY - {DONE}
# Held while this process forks and while it makes a trial, imports or prints: a fork would keep the locks of the other thread for ever.
UNDISTURBED = threading.Lock()
TIME_LIMIT_S = 60.0  # of one trial: ten times what the slowest takes on two busy cores
ADDRESS_SPACE = 12 << 30  # bytes that a forked trial may map
_PYTHON_NAMES = re.compile(
    r"\b(?:Key|Type|Value|Attribute|Index|Runtime|Assertion|UnicodeDecode|OS|Recursion|ZeroDivision|Overflow)Error\b"
)
_NOT_JSON = re.compile(r"[:\[,]\s*-?(?:NaN|Infinity)\b")


@dataclass
class Trial:
    """One command and the exit codes that are right for it.

    Attributes:
        what: the mutation, for people.
        command: arguments of `lowmem`.
        allowed: exit codes.
        act: what happens to a process of its own while it runs; None runs the command in a fork.
        then: a command that must succeed afterwards, such as going on with an interrupted run.
    """

    what: str
    command: list[str]
    allowed: frozenset[int] = ANY
    act: Callable[[subprocess.Popen, random.Random], None] | None = None
    then: list[str] | None = None


class Fixtures:
    """Small valid inputs, made once: a text, conversations, a run, and a directory of transformers."""

    def __init__(self, root: Path):
        self.text, self.chat, self.run, self.base = root / "text.txt", root / "chat.jsonl", root / "run", root / "base"
        lines = [f"def function_{n % 37}(x): return x * {n % 11} + {n * n % 101}\n" for n in range(300)]
        self.text.write_text("".join(lines))
        turns = [{"role": "user", "content": "what is {n}?"}, {"role": "assistant", "content": "it is {n}."}]
        records = [{"messages": [{**turn, "content": turn["content"].format(n=n)} for turn in turns]} for n in range(40)]
        self.chat.write_text("".join(json.dumps(record) + "\n" for record in records))
        for command in (self.pretrain(self.run, "--train.steps=2"), self.export(self.run, self.base)):
            code, output = run_forked(command, root)
            if code:
                raise SystemExit(f"a fixture cannot be made: {' '.join(command)}: exit code {code}\n{output[-2000:]}")

    def pretrain(self, run_dir: Path, *more: str, text: Path | str | None = None) -> list[str]:
        """A run of one step on the text."""
        values = {
            "run_dir": run_dir, "device": "cpu", "model.dim": 16, "model.num_layers": 1, "model.num_heads": 2, "data.tokenizer": "bytes",
            "data.sources": json.dumps([{"path": str(text or self.text)}]), "data.seq_len": 16,
            "data.cache_dir": self.text.parent / "cache",
            "train.steps": 1, "train.global_batch_size": 4, "train.micro_batch_size": 2, "train.precision": "fp32", "train.eval_every": 1,
            "train.eval_sequences": 4, "train.threads": 1, "train.save_every": 1,
        }  # fmt: skip
        keys = {argument[2:].partition("=")[0] for argument in more}
        return ["pretrain", *(f"--{key}={value}" for key, value in values.items() if key not in keys), *more, "--quiet"]

    def export(self, run: Path, out: Path) -> list[str]:
        """A run as a directory of transformers."""
        return ["export", "--run", str(run), "--format", "hf", "--out", str(out)]

    def finetune(self, out: Path, *more: str, base: Path | None = None, chat: Path | None = None) -> list[str]:
        """One step of LoRA on the directory."""
        values = {
            "model.path": base or self.base,
            "data": chat or self.chat,
            "run_dir": out,
            "data.cache_dir": self.text.parent / "cache",
            "data.seq_len": 96,
            "train.steps": 1,
            "train.global_batch_size": 2,
            "train.threads": 1,
            "device": "cpu",
        }
        keys = {argument[2:].partition("=")[0] for argument in more}
        return ["finetune", *(f"--{key}={value}" for key, value in values.items() if key not in keys), *more, "--quiet"]


# --- what is tried -----------------------------------------------------------------------------------------------------------------

NOT_NUMBERS = ["nan", ".nan", "inf", ".inf", "-.inf", "1e999", "abc", "[]", "{}", "[1, 2, {}]", "'1; 2'", str(10**23), str(-(10**23))]
ODD_VALUES = [*NOT_NUMBERS, "0", "-1", "-0.0", str(2**31), str(2**63), "1.5", "true", "null", "", " ", "*x", "&a", "@", "#",
              "!!python/none",
              "💥", "a" * 300, "\\x00", "1e-320", "{a: 1}", "../..", "/dev/null", "~", "4", "4XiB", "-3GiB"]  # fmt: skip


def numeric_keys(config: Any, prefix: str = "") -> Iterator[tuple[str, frozenset[int]]]:
    """Dotted names of the fields that hold a number by default, and the exit codes of one with too many digits for an integer."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from numeric_keys(value, f"{prefix}{field.name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + field.name, frozenset({USAGE}) if isinstance(value, int) else ANY


FINETUNE_VALUES = {
    "adapter.method": ["none", "lora", "dora", "rslora", "lora_plus", "prefix", "ia3", "head", "last_k"],
    "adapter.target_modules": ["[]", "[q_proj]", "[lm_head]", "[nothing]"], "adapter.last_k": ["1", "2", "4000"],
    "adapter.lora_dropout": ["0", "0.5"], "train.weight_dtype": ["fp32", "bf16", "fp16", "int8", "nf4"],
    "train.precision": ["fp32", "bf16", "auto"], "train.update": ["accumulate", "layerwise"], "optim.state_bits": ["32", "8", "4"],
    "optim.name": ["adamw", "lion", "spectron"], "data.add_tokens": ["[<new>]", "[a]", "['']"], "data.kind": ["text", "chat"],
    "train.activation_checkpointing": ["none", "block", "selective", "low_rank"], "train.micro_batch_size": ["1", "2", "3"],
}  # fmt: skip
"""Settings that are allowed by themselves: a run with some of them is done or refused in one line."""


def try_configuration(rng: random.Random, fixtures: Fixtures, at: Path) -> Trial:
    """Values out of their range, and YAML that is damaged."""
    from lowmem.config.dump import dump_config
    from lowmem.config.keys import field_docs
    from lowmem.config.schema import RunConfig

    kind = rng.choice(["number", "number", "value", "value", "yaml", "duplicate", "unknown", "finetune", "finetune"])
    if kind == "number":
        (key, digits), value = rng.choice(sorted(numeric_keys(RunConfig()), key=str)), rng.choice(NOT_NUMBERS)
        return Trial(
            f"{key}={value}", fixtures.pretrain(at / "run", f"--{key}={value}"), digits if value == str(10**23) else frozenset({USAGE})
        )
    if kind == "finetune" and rng.random() < 0.5:
        chosen = [f"--{key}={rng.choice(values)}" for key, values in rng.sample(sorted(FINETUNE_VALUES.items()), rng.randint(1, 3))]
        allowed = {DONE, USAGE, BUDGET, *([DATA] if "--data.kind=text" in chosen else [])}  # conversations are no documents
        return Trial(f"finetune {' '.join(chosen)}", fixtures.finetune(at / "out", *chosen), frozenset(allowed))
    if kind == "finetune":
        (key, digits), value = rng.choice(sorted(numeric_keys(RunConfig()), key=str)), rng.choice(NOT_NUMBERS)
        allowed = digits if value == str(10**23) else frozenset({USAGE})
        return Trial(f"finetune {key}={value}", fixtures.finetune(at / "out", f"--{key}={value}"), allowed)
    if kind == "value":
        keys = [key for key in field_docs(RunConfig) if not key.startswith(("logging", "train.steps"))]
        chosen = [f"--{rng.choice(keys)}={rng.choice(ODD_VALUES)}" for _ in range(rng.randint(1, 2))]
        return Trial(" ".join(chosen), fixtures.pretrain(at / "run", *chosen))
    lines = dump_config(RunConfig()).splitlines()
    path = at / "config.yaml"
    if kind == "unknown":
        key = rng.choice(list(field_docs(RunConfig))) + rng.choice("xyz")
        return Trial(f"unknown {key}", fixtures.pretrain(at / "run", f"--{key}=1"), frozenset({USAGE}))
    if kind == "duplicate":
        top = rng.choice([line for line in lines if line and line[0].isalpha()])
        path.write_text("\n".join([*lines, top.partition(":")[0] + ": {}"]) + "\n")
        return Trial(f"duplicate {top}", [*fixtures.pretrain(at / "run"), "--config", str(path)], frozenset({USAGE}))
    path.write_bytes(
        mutated("\n".join(lines).encode(), rng, [b"&a ", b"*a", b"- ", b"\t", b": ", b"{", b"[", b"\xff", b"!!", b"%", b"\x00"])
    )
    return Trial("damaged YAML", [*fixtures.pretrain(at / "run"), "--config", str(path)])


def mutated(data: bytes, rng: random.Random, pieces: list[bytes]) -> bytes:
    """A few bytes changed, removed, repeated, or replaced by one of `pieces`."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(data) + 1)
        stop = min(len(data), start + rng.choice([0, 1, 1, 4, 40]))
        match rng.randrange(4):
            case 0:
                del data[start:stop]
            case 1:
                data[start:stop] = rng.choice(pieces)
            case 2:
                data[start:start] = data[start:stop] * rng.choice([1, 2, 20])
            case _:
                data[start:stop] = bytes(rng.randrange(256) for _ in range(stop - start))
    return bytes(data)


def try_data(rng: random.Random, fixtures: Fixtures, at: Path) -> Trial:
    """Text sources that are damaged, or no text."""
    text, kind = fixtures.text.read_bytes(), rng.choice(["cut", "flip", "jsonl", "parquet", "utf8", "special", "zst"])
    path, allowed = at / "data.txt", ANY
    if kind in ("cut", "flip"):
        path, packed = at / "data.txt.gz", bytearray(gzip.compress(text, mtime=0))
        if kind == "cut":
            packed = packed[: rng.randrange(20, len(packed))]
        else:
            packed[rng.randrange(12, len(packed))] ^= 1 << rng.randrange(8)
        path.write_bytes(packed)
        allowed = frozenset({DATA})
    elif kind == "zst":
        import zstandard

        path, packed = at / "data.txt.zst", bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(text))
        path.write_bytes(packed[: rng.randrange(1, len(packed))])
        allowed = frozenset({DATA})
    elif kind == "jsonl":
        path = at / "data.jsonl"
        records = "".join(json.dumps({"text": line}) + "\n" for line in text.decode().splitlines()).encode()
        path.write_bytes(mutated(records, rng, [b"{", b"[" * 3000, b'"', b"\\ud800", b"null", b"NaN", b"\n", b"\xef\xbb\xbf", b"9" * 5000]))
    elif kind == "parquet":
        path = at / "data.parquet"
        path.write_bytes(mutated(parquet_of(text), rng, [b"PAR1", b"\x00" * 8, b"\xff" * 4]))
    elif kind == "utf8":
        path.write_bytes(text[: rng.randrange(len(text))] + rng.choice([b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\xf8\x88\x80\x80"]) + text)
        allowed = frozenset({DATA})
    else:
        path = at / "special.txt"
        make = rng.choice(["fifo", "device", "loop", "directory", "empty", "long", "nul", "none"])
        allowed = REFUSED
        if make == "fifo":
            os.mkfifo(path)
        elif make == "device":
            path.symlink_to(rng.choice(["/dev/zero", "/dev/urandom", "/dev/null", "/dev/tty", "/proc/self/mem"]))
        elif make == "loop":
            path.symlink_to(path)
        elif make == "directory":
            path.mkdir()
        elif make == "empty":
            path.write_bytes(b"")
        elif make == "long":
            path = at / ("x" * 300)
        elif make == "nul":
            return Trial("special nul", fixtures.pretrain(at / "run", '--data.sources=[{"path": "a\\0b"}]'), REFUSED)
    return Trial(f"{kind} {path.name}", fixtures.pretrain(at / "run", f"--data.cache_dir={at}/cache", text=path), allowed)


def parquet_of(text: bytes) -> bytes:
    """The lines of a text as a column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.table({"text": text.decode().splitlines()}), out)
    return out.getvalue()


ODD_CONTENT: list[Any] = [
    None,
    1,
    True,
    [],
    {},
    "",
    "\ud800",
    [{"type": "text", "text": "x"}],
    [{"type": "image"}],
    "<|im_end|>",
    "a" * 5000,
    1e999,
]
TEMPLATES = [
    "{{ 1 / 0 }}", "{% for i in range(999999999) %}x{% endfor %}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}", "{{ 'x' * 10**10 }}",
    "{{ messages[0].__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}", "{% include 'x' %}", "{{ raise_exception('no') }}",
    "{{ messages|tojson(indent=2) }}", "{{ strftime_now('%Y') }}", "{% if %}", "", "{{ 'x'|center(10**9) }}", "{{ messages.clear() }}",
    "{% generation %}",
    "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
    "{{ undefined_name }}", "{{ messages[0]['content'] ** 2 }}", "{{ '%s' % messages }}", "{{ [messages] * 10**9 }}", "{{ 9 ** 99999999 }}",
]  # fmt: skip


def try_conversations(rng: random.Random, fixtures: Fixtures, at: Path) -> Trial:
    """Chat records of odd shapes, and templates that misbehave."""
    records = [json.loads(line) for line in fixtures.chat.read_text().splitlines()]
    chat, more = at / "chat.jsonl", []
    kind = rng.choice(["field", "field", "bytes", "template"])
    allowed = ANY
    if kind == "field":
        for _ in range(rng.randint(1, 3)):
            record = rng.choice(records)
            record[rng.choice(["messages", "system", "history", "weight", "tools", "prompt", "text"])] = rng.choice(
                [*ODD_CONTENT, [{}], [1]]
            )
            if isinstance(record["messages"], list) and record["messages"] and isinstance(record["messages"][0], dict):
                key = rng.choice(["role", "content", "weight", "train", "tool_calls", "reasoning_content", "name"])
                record["messages"][rng.randrange(len(record["messages"]))][key] = copy.deepcopy(rng.choice(ODD_CONTENT))
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    if kind == "bytes":
        data = mutated(data, rng, [b"{", b"[" * 2000, b"null", b"\xff", b"\xef\xbb\xbf", b"NaN", b"\\ud800"])
    chat.write_bytes(data)
    if kind == "template":
        template = at / "template.jinja"
        template.write_bytes(
            mutated(rng.choice(TEMPLATES).encode(), rng, [b"{{", b"}}", b"%}", b"{%"])
            if rng.random() < 0.3
            else rng.choice(TEMPLATES).encode()
        )
        more = [f"--data.template={template}"]
    return Trial(f"chat {kind} {more}", fixtures.finetune(at / "out", *more, chat=chat), allowed)


def try_checkpoint(rng: random.Random, fixtures: Fixtures, at: Path) -> Trial:
    """A checkpoint with a bit flipped, a file cut, or another manifest, read by every command that reads one."""
    run = at / "run"
    shutil.copytree(fixtures.run, run, symlinks=True)
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    hashed = sorted(json.loads((newest / "manifest.json").read_text())["files"])
    kind = rng.choice(["flip", "flip", "cut", "remove", "manifest", "state", "config"])
    allowed = frozenset({CHECKPOINT})
    if kind in ("flip", "cut", "remove"):
        path = newest / rng.choice(hashed)
        data = bytearray(path.read_bytes())
        if kind == "flip":
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.unlink() if kind == "remove" else path.write_bytes(data if kind == "flip" else data[: rng.randrange(len(data))])
    else:
        path = {"manifest": newest / "manifest.json", "state": newest / "state.json", "config": run / "config.yaml"}[kind]
        path.write_bytes(mutated(path.read_bytes(), rng, [b"{", b"null", b"9" * 30, b"/dev/zero", b"../", b"NaN", b"\x00"]))
        allowed = ANY
    command = {
        "pretrain": fixtures.pretrain(run, "--train.steps=3"),
        "generate": ["generate", "--run", str(run), "--prompt", "def", "--max_new_tokens", "4"],
        "export": fixtures.export(run, at / "out"),
        "init_from": fixtures.pretrain(at / "next", f"--train.init_from={run}"),
    }
    which = rng.choice(sorted(command))
    if which != "pretrain" and path.name != "model.safetensors":
        allowed = ANY  # what is not read need not be checked
    return Trial(f"{kind} {path.name}, {which}", command[which], allowed)


def try_directory(rng: random.Random, fixtures: Fixtures, at: Path) -> Trial:
    """A directory of transformers whose configuration, weights or tokenizer are others than they say."""
    base = at / "base"
    shutil.copytree(fixtures.base, base)
    kind = rng.choice(["config", "quantized", "code", "weights", "header", "rows", "missing", "tokenizer", "stray"])
    allowed, config = ANY, json.loads((base / "config.json").read_text())
    if kind == "config":
        key = rng.choice(sorted(config))
        config[key] = rng.choice([None, "x", -1, 0, 10**9, 1.5, [], {}, True, "llama", "gpt2"])
    elif kind == "quantized":
        config["quantization_config"] = {"quant_method": rng.choice(["fp8", "bitsandbytes", "gptq", "awq", "unheard-of"]), "bits": 4}
        allowed = REFUSED
    elif kind == "code":
        config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        config["model_type"] = rng.choice(["unheard-of", config["model_type"]])
        (base / "evil.py").write_text(f"open({str(at / 'ran')!r}, 'w').close()\n")
    weights = base / "model.safetensors"
    data = weights.read_bytes()
    if kind == "header":
        (length,) = struct.unpack("<Q", data[:8])
        header = mutated(data[8 : 8 + length], rng, [b"F64", b"-1", b"9" * 20, b"null", b"[", b'"'])
        weights.write_bytes(struct.pack("<Q", rng.choice([len(header), length, 2**62])) + header + data[8 + length :])
    elif kind in ("weights", "rows", "missing"):
        from safetensors.numpy import load, save

        tensors = load(data)
        name = rng.choice(sorted(tensors))
        if kind == "weights":
            weights.write_bytes(data[: rng.randrange(len(data))])
        elif kind == "rows":
            tensors[name] = tensors[name][:-1].copy()
            weights.write_bytes(save(tensors))
        else:
            del tensors[name]
            weights.write_bytes(save(tensors))
        allowed = REFUSED
    elif kind == "tokenizer":
        path = rng.choice([base / "tokenizer.json", base / "tokenizer_config.json"])
        path.write_bytes(mutated(path.read_bytes(), rng, [b"{", b"null", b"[" * 500, b"-1", b'"']))
    elif kind == "stray":
        (base / "zz.safetensors").write_bytes(data[:100])
        allowed = frozenset({DONE})
    (base / "config.json").write_text(json.dumps(config))
    if rng.random() < 0.5 and kind not in ("stray", "code"):
        return Trial(f"import, {kind}", ["import", str(base), "--out", str(at / "imported")], allowed)
    return Trial(f"finetune, {kind}", fixtures.finetune(at / "out", base=base), allowed)


def try_signal(rng: random.Random, fixtures: Fixtures, at: Path) -> Trial:
    """Signals at any moment; the run must go on afterwards."""
    command = fixtures.pretrain(at / "run", "--train.steps=200", "--train.save_every=3")

    def act(process: subprocess.Popen, rng: random.Random) -> None:
        time.sleep(rng.uniform(0.1, 8.0))
        for which in rng.choice([[signal.SIGTERM], [signal.SIGINT], [signal.SIGHUP], [signal.SIGKILL], [signal.SIGINT] * 5]):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(which)
            time.sleep(rng.choice([0.0, 0.01, 0.2]))

    allowed = frozenset({DONE, 129, 130, 143, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP})
    return Trial("signal", command, allowed, act=act, then=fixtures.pretrain(at / "run", "--train.steps=201", "--train.save_every=3"))


def try_memory(rng: random.Random, fixtures: Fixtures, at: Path) -> Trial:
    """A budget between what Python takes and what the run takes."""
    budget, batch = rng.randrange(230, 600), rng.choice([128, 512])
    more = [f"--budget.ram={budget}MiB", "--force", f"--train.global_batch_size={batch}", f"--train.micro_batch_size={batch}"]
    shape = ["--model.dim=64", "--model.num_layers=2", "--data.seq_len=64", "--train.steps=2"]
    allowed = frozenset({DONE, BUDGET})
    return Trial(f"{budget} MiB, {batch} sequences", fixtures.pretrain(at / "run", *shape, *more), allowed, act=lambda process, rng: None)


KINDS: dict[str, tuple[Callable[[random.Random, Fixtures, Path], Trial], int]] = {
    "configuration": (try_configuration, 8), "data": (try_data, 5),
    "conversations": (try_conversations, 5), "checkpoint": (try_checkpoint, 5), "directory": (try_directory, 5),
    "signal": (try_signal, 1), "memory": (try_memory, 1),
}  # fmt: skip
"""Each kind and how often it is tried."""


# --- how it is tried ---------------------------------------------------------------------------------------------------------------


def run_forked(command: list[str], at: Path) -> tuple[int, str]:
    """Exit code (negative: signal) and output of `lowmem` in a fork of this process; a hang is ended and is -SIGALRM."""
    output = at / "output"
    with UNDISTURBED:
        child = os.fork()
    if not child:
        code = 1
        try:
            _become_command(output, at)
            from lowmem.cli.main import main

            code = main(command)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 0)
    deadline = time.monotonic() + TIME_LIMIT_S
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), output.read_text(errors="replace") if output.exists() else ""
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -signal.SIGALRM, output.read_text(errors="replace")
        time.sleep(0.01)


def _become_command(output: Path, at: Path) -> None:
    """A process group of its own, whose output goes to a file."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    out, nothing = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), os.open(os.devnull, os.O_RDONLY)
    for number, target in ((0, nothing), (1, out), (2, out)):
        os.dup2(target, number)
    os.chdir(at)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115


def run_fresh(trial: Trial, command: list[str], at: Path, rng: random.Random) -> tuple[int, str]:
    """As `run_forked`, in a process of its own, with what the trial does to it."""
    with open(at / "output", "w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "lowmem", *command], stdout=output, stderr=output, stdin=subprocess.DEVNULL, cwd=at,
            start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        if trial.act is not None:
            trial.act(process, rng)
        try:
            code = process.wait(timeout=2 * TIME_LIMIT_S)
        except subprocess.TimeoutExpired:
            code = -signal.SIGALRM
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        output.seek(0)
        return code, output.read()


def judge(trial: Trial, code: int, output: str, at: Path) -> str:
    """What is wrong with how a trial ended; empty if nothing is."""
    if code == -signal.SIGALRM:
        return f"hangs: not done after {TIME_LIMIT_S:.0f} s"
    if "Traceback (most recent call last)" in output:
        return "traceback: " + output.strip().splitlines()[-1][:300]
    if code not in trial.allowed:
        if code < 0:
            return f"crashes with signal {-code}"
        return f"{'is accepted' if code == 0 else f'exit code {code}'}; right: {sorted(trial.allowed)}: {output.strip()[-300:]}"
    if code and _PYTHON_NAMES.search(output):
        return f"names a Python class: {output.strip()[-300:]}"
    if len(output) > 6000 and code:
        return f"says {len(output)} characters"
    if (at / "ran").exists():
        return "ran code from a directory"
    for path in at.rglob("*.json*"):
        written = code == 0 and path.suffix in (".json", ".jsonl") and path.parent.name in ("run", "out")
        if written and _NOT_JSON.search(path.read_text(errors="replace")):
            return f"{path.name} holds NaN or infinity"
    return ""


def run_trial(kind: str, number: int, seed: int, fixtures: Fixtures, root: Path, keep: Path | None) -> dict[str, Any]:
    """One trial from its seed to its verdict."""
    rng, at = random.Random(f"{seed} {kind} {number}"), root / f"{kind}-{number}"
    at.mkdir()
    started = time.monotonic()
    try:
        with UNDISTURBED:
            trial = KINDS[kind][0](rng, fixtures, at)
        code, output = run_forked(trial.command, at) if trial.act is None else run_fresh(trial, trial.command, at, rng)
        fault = judge(trial, code, output, at)
        if not fault and trial.then:
            code, output = run_fresh(Trial("", []), trial.then, at, rng)
            fault = f"afterwards: {fault}" if (fault := judge(Trial("", [], frozenset({DONE})), code, output, at)) else ""
        result = {"kind": kind, "number": number, "what": trial.what[:200], "code": code, "seconds": round(time.monotonic() - started, 2)}
        if fault:
            result |= {"fault": fault, "command": trial.command}
            if keep is not None:
                shutil.copytree(at, keep / at.name, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns("special*"))
        return result
    finally:
        shutil.rmtree(at, ignore_errors=True)


def schedule(kinds: list[str]) -> Iterator[tuple[str, int]]:
    """Kinds in turn, each as often as its weight; numbers count up."""
    numbers: Counter[str] = Counter()
    most = max(KINDS[kind][1] for kind in kinds)
    while True:
        for turn in range(most):
            for kind in kinds:
                if turn * KINDS[kind][1] // most != (turn + 1) * KINDS[kind][1] // most:
                    yield kind, numbers[kind]
                    numbers[kind] += 1


def preload(kinds: list[str]) -> None:
    """Import once what trials use, before they are forked."""
    import torch

    import lowmem.cli.export
    import lowmem.cli.generate
    import lowmem.cli.import_model
    import lowmem.cli.pretrain
    import lowmem.train.setup

    torch.set_num_threads(1)
    if {"directory", "conversations", "configuration"} & set(kinds):
        import peft  # noqa: F401
        import transformers.models.llama.modeling_llama  # noqa: F401

        import lowmem.cli.finetune
        import lowmem.engine.huggingface_files  # noqa: F401


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no trial after this time")
    parser.add_argument("--trials", type=int, help="of all kinds together; without it as many as there is time for")
    parser.add_argument("--first", type=int, default=0, help="leave out the trials of each kind before this number")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="a folder for the files of trials that found a fault")
    parser.add_argument("--out", type=Path, help="JSON: counts by kind and exit code, and the faults")
    flags = parser.parse_args()
    preload(flags.kinds)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lowmem-fuzz-") as folder:
        root = Path(folder)
        os.environ["XDG_CACHE_HOME"] = str(root / "cache")
        fixtures, results = Fixtures(root), []

        def work(trials: Iterator[tuple[str, int]]) -> Iterator[dict[str, Any]]:
            for kind, number in trials:
                if time.monotonic() - started > flags.seconds:
                    return
                if number >= flags.first:
                    yield run_trial(kind, number, flags.seed, fixtures, root, flags.keep)

        def worker(index: int) -> None:
            planned = islice(schedule(flags.kinds), flags.trials)
            for result in work(one for place, one in enumerate(planned) if place % flags.jobs == index):
                results.append(result)
                if "fault" in result:
                    with UNDISTURBED:
                        print(
                            f"{result['kind']} {result['number']}: {result['fault']}\n    lowmem {' '.join(result['command'])}", flush=True
                        )

        with ThreadPoolExecutor(flags.jobs) as pool:
            list(pool.map(worker, range(flags.jobs)))
    return report(results, time.monotonic() - started, flags)


def report(results: list[dict[str, Any]], seconds: float, flags: argparse.Namespace) -> int:
    """Print what was found, write it, and return the exit code."""
    from profiling.machine import describe_machine

    counts = {kind: Counter(str(r["code"]) for r in results if r["kind"] == kind) for kind in flags.kinds}
    faults = [result for result in results if "fault" in result]
    for kind, by_code in counts.items():
        slowest = max((r["seconds"] for r in results if r["kind"] == kind), default=0.0)
        print(f"{kind:14} {sum(by_code.values()):6} trials, by exit code {dict(sorted(by_code.items()))}, slowest {slowest:.1f} s")
    print(f"{len(results)} trials in {seconds:.0f} s, {len(faults)} faults")
    if flags.out is not None:
        document = {
            "machine": describe_machine(),
            "seed": flags.seed,
            "seconds": round(seconds),
            "trials": len(results),
            "by_exit_code": counts,
        }
        flags.out.write_text(json.dumps(document | {"faults": faults}, indent=1) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
