"""Tries a foreign tokenizer in a process of its own: its patterns and replacements can take any time and any memory."""

import json
import os
import resource
import subprocess
import sys
from typing import Any

from lowmem.errors import DataError
from lowmem.units import format_bytes

CPU_SECONDS = 10  # the largest tokenizers load in two
MEMORY_BYTES = 2 * 1024**3
MAX_TOKENS_PER_CHARACTER = 64
_WALL_SECONDS = 600  # on a machine that others use, too
_RUN_CHARACTERS = 4096
_RUNS = ("a", "A", " ", "0", "\n", "-", ".", "_", "'", "é", "\u0301", "日", "🙂", "\u200d", "ab", "a ", "a1")
_PLAIN = (
    "The quick brown fox can't jump over 1234567 lazy dogs; naïve café, ÄÖÜ. 日本語テキスト\r\n\tdef f(x):\n        return x != 'y'  # 🙂\n"
)
_PATTERNS = ("Replace", "Split", "Precompiled")


def check_foreign_tokenizer(content: str, value: Any, name: str) -> None:
    """Load and use a tokenizer.json under limits of time and memory, if it has parts that could need them.

    Args:
        content: of the file.
        value: the same, parsed.
        name: the file, for the message.
    Raises:
        DataError: it cannot be loaded or used, or takes more than the limits.
    Memory: another process, at most 2 GiB while it runs.
    """
    if not _has_patterns({key: value.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")}):
        return
    command = [sys.executable, "-m", "lowmem.data.tokenizer_probe"]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"}
    try:
        done = subprocess.run(
            command, input=content.encode(), env=environment, capture_output=True, timeout=_WALL_SECONDS, check=False, close_fds=True
        )
    except subprocess.TimeoutExpired as error:
        raise _refusal(name, f"takes more than {_WALL_SECONDS} s for a few pages of text") from error
    except UnicodeEncodeError as error:
        raise _refusal(name, "holds a lone surrogate") from error
    lines = done.stdout.decode(errors="replace").splitlines()
    if done.returncode == 0:
        return
    if lines:
        raise _refusal(name, lines[-1])
    limits = f"{CPU_SECONDS} s of time or {format_bytes(MEMORY_BYTES)} of memory"
    raise _refusal(name, f"gives up on a few pages of text, or takes more than {limits} for them (exit status {done.returncode})")


def too_many_tokens(tokens: int, characters: int) -> bool:
    """Whether a text has become more tokens than any tokenizer that is meant for text makes of it."""
    return tokens > MAX_TOKENS_PER_CHARACTER * (characters + 16)


def _refusal(name: str, reason: str) -> DataError:
    return DataError(f"the tokenizer {name} cannot be used: it {reason}; choose another one")


def _has_patterns(part: Any) -> bool:
    if isinstance(part, dict):
        return part.get("type") in _PATTERNS or any(_has_patterns(inner) for inner in part.values())
    return isinstance(part, list) and any(_has_patterns(inner) for inner in part)


def probe_texts() -> list[str]:
    """Prose, and what patterns stumble over: long runs of one character, with and without something else after them."""
    runs = [run * (_RUN_CHARACTERS // len(run)) for run in _RUNS]
    return [_PLAIN * 8, *(run + end for run in runs for end in ("", "!"))]


def _problem(content: str) -> str:
    """What is wrong with a tokenizer.json; "" for nothing."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # the library raises plain Exception
        return f"is no tokenizer.json ({_line(error)})"
    for text in probe_texts():
        try:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            tokenizer.decode(ids, skip_special_tokens=False)
        except Exception as error:  # as above
            return f"fails on the text {text[:20]!r}... ({_line(error)})"
        if too_many_tokens(len(ids), len(text)):
            return f"makes {len(ids)} tokens of {len(text)} characters"
    return ""


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def main() -> int:
    """Probe the tokenizer.json on standard input; the problem goes to standard output, as one line."""
    for kind, most in ((resource.RLIMIT_CPU, CPU_SECONDS), (resource.RLIMIT_DATA, MEMORY_BYTES), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    problem = _problem(sys.stdin.buffer.read().decode())
    if problem:
        print(json.dumps(problem, ensure_ascii=True)[1:-1])
    return bool(problem)


if __name__ == "__main__":
    sys.exit(main())
