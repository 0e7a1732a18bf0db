"""Renders chat templates in a process of its own, with limits on time, memory and output.

A template comes with a model or from a user and may loop for ever or double a string again and again. Jinja's sandbox keeps it from
code, not from work: one expression (`10**10**10`, `'a' * 10**9`, `x | center(10**9)`) is enough. The limits are therefore the kernel's, in
a child that knows nothing but Jinja. It starts with the first template, renders all of them, and is replaced after one that ended it.
"""

import contextlib
import json
import os
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from typing import Any

OPEN, CLOSE = "\ufdd0", "\ufdd1"  # around what {% generation %} marks; noncharacters of Unicode, which no record may hold
CPU_SECONDS = 10  # for one conversation; a tenth more for every 10 beginnings of it that are rendered, too
WALL_FACTOR = 20  # times the CPU time: a child that gets no processor for so long, or has stopped, is given up
MEMORY_BYTES = 128 * 2**20  # data of the child, plus MEMORY_FACTOR times the conversation
MEMORY_FACTOR = 16
OUTPUT_BYTES = 2**20  # characters of one rendering, plus OUTPUT_FACTOR times the conversation
OUTPUT_FACTOR = 16
_ADDRESS_BYTES = 2**30  # of libraries mapped on top of the data
_LENGTH = struct.Struct("<Q")
_MESSAGE_CHARS = 300
_SURROGATE = re.compile("[\ud800-\udfff]")
_LOCALS = re.compile(r"\b(\w+\.)+<locals>\.")  # where a function is defined here, which Python writes before its name


class TemplateFailure(Exception):
    """A template that does not compile, fails, or exceeds a limit; the text says which.

    Attributes:
        compiled: false where it is no template at all.
        missing: Jinja is not installed.
    """

    def __init__(self, reason: str, *, compiled: bool = True, missing: bool = False):
        super().__init__(reason)
        self.compiled, self.missing = compiled, missing


class TemplateWorker:
    """The parent's side: a child that is started when it is needed."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._stop: Callable[[], Any] = lambda: None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Have a request of `_answer` answered.

        Raises:
            TemplateFailure: by the template, or by a limit that it exceeds.
        Memory: the request and its answer, thrice; the child takes 12 MB and at most the limits above.
        """
        if self._child is None or self._child.poll() is not None:
            self._start()
        try:
            seconds = CPU_SECONDS * (1 + len(request.get("prefixes", ())) / 100)
            answer = self._exchange(json.dumps({"seconds": seconds, **request}).encode(), seconds)
        except BaseException:  # an interrupt, too, leaves an answer behind that nobody waits for
            self.close()
            raise
        if "error" in answer:
            raise TemplateFailure(answer["error"], compiled=answer.get("compiled", True), missing=answer.get("missing", False))
        return answer

    def close(self) -> int:
        """End the child, if there is one; the status it ended with."""
        child, self._child = self._child, None
        self._stop()
        return 0 if child is None or child.returncode is None else child.returncode

    def _start(self) -> None:
        self.close()
        code = f"import sys; sys.path[:] = {sys.path!r}; from lowmem.data.template_worker import serve; serve()"
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
            )
        except OSError as error:
            raise TemplateFailure(f"the process that is to render it cannot be started: {error.strerror}") from error
        self._stop = weakref.finalize(self, _end, self._child)

    def _exchange(self, data: bytes, seconds: float) -> dict[str, Any]:
        child = self._child
        assert child is not None
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            _write_all(child.stdin.fileno(), _LENGTH.pack(len(data)) + data)
            deadline = time.monotonic() + WALL_FACTOR * seconds
            (length,) = _LENGTH.unpack(_read(child.stdout.fileno(), _LENGTH.size, deadline))
            answer: dict[str, Any] = json.loads(_read(child.stdout.fileno(), length, deadline))
        except TimeoutError as error:
            raise TemplateFailure(f"it was not ready after {WALL_FACTOR * seconds:g} s") from error
        except (BrokenPipeError, EOFError) as error:
            status = self._wait()
            if status == -signal.SIGPROF:
                raise TemplateFailure(f"it takes more than {seconds:g} s") from error
            raise TemplateFailure(f"the process that renders it ended with status {status}") from error
        return answer

    def _wait(self) -> int:
        """The status of a child that has closed its end."""
        assert self._child is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(5)
        return self.close()


WORKER = TemplateWorker()


def serve() -> None:
    """The child: answers requests of standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; the parent decides
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(kind, (0, 0))
    compiled: dict[str, Any] = {}
    source, target = sys.stdin.fileno(), sys.stdout.fileno()
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            (length,) = _LENGTH.unpack(_read(source, _LENGTH.size))
            _limit_memory(length)
            try:
                request = json.loads(_read(source, length))
                signal.setitimer(signal.ITIMER_PROF, request["seconds"])  # ends the process: no code of the template's can catch it
                answer = json.dumps(_answer(request, length, compiled)).encode()
            except MemoryError:
                answer = json.dumps({"error": _too_much_memory(length)}).encode()
            _write_all(target, _LENGTH.pack(len(answer)) + answer)
            signal.setitimer(signal.ITIMER_PROF, 0)
            del request, answer


def _answer(request: dict[str, Any], size: int, compiled: dict[str, Any]) -> dict[str, Any]:
    """Compile a template, and render with it where variables are given.

    Args:
        request: holds source, and to render variables (of which messages is cut), prompt (add_generation_prompt of the whole) and
            prefixes: pairs of a number of messages and add_generation_prompt.
        size: bytes of the request.
    Returns:
        text, and for each of prefixes the length of its rendering where the text begins with that, -1 where it does not, and the failure
        where there is none; or error.
    """
    source = request["source"]
    stage = {"compiled": False}
    try:
        if source not in compiled:
            compiled[source] = _compile(source)
        template, stage = compiled[source], {}
        if "variables" not in request:
            return {}
        variables = request["variables"] | _functions()
        text = template.render(**variables, add_generation_prompt=request["prompt"])
        most = OUTPUT_BYTES + OUTPUT_FACTOR * size
        if len(text) > most:
            return {"error": f"it writes {len(text)} characters, allowed: {most} for this conversation"}
        # before JSON makes a character of two
        if not text.isascii() and (found := _SURROGATE.search(text)):
            return {"error": f"it writes the lone surrogate U+{ord(found[0]):04X}, which is no character"}
        return {"text": text, "prefixes": [_prefix(template, variables, text, *prefix) for prefix in request["prefixes"]]}
    except ImportError:
        return {"error": "Jinja is not installed", "missing": True}
    except MemoryError:
        return {"error": _too_much_memory(size), **stage}
    except RecursionError:
        return {"error": "it calls itself, or is nested, too deeply", **stage}
    except Exception as error:  # a template may raise whatever its operators and filters raise
        return {"error": _reason(error), **stage}


def _prefix(template: Any, variables: dict[str, Any], whole: str, count: int, prompt: bool) -> int | str:
    try:
        text = template.render(**{**variables, "messages": variables["messages"][:count]}, add_generation_prompt=prompt)
    except (MemoryError, RecursionError):
        raise
    except Exception as error:  # as above
        return _reason(error)
    return len(text) if whole.startswith(text) else -1


def _reason(error: Exception) -> str:
    told = error.msg if isinstance(error, SyntaxError) else str(error)  # less the place in the code that Jinja made
    told = _LOCALS.sub("", told)
    text = " ".join(told.split()) or "it fails without a reason"
    return text if len(text) <= _MESSAGE_CHARS else f"{text[:_MESSAGE_CHARS]}..."


def _too_much_memory(request_bytes: int) -> str:
    return f"it needs more memory than the {(MEMORY_BYTES + MEMORY_FACTOR * request_bytes) >> 20} MiB that a template may take"


def _functions() -> dict[str, Callable[..., Any]]:
    """What transformers gives every template; the time stands still for one conversation."""
    from datetime import datetime

    now = datetime.now()

    def raise_exception(message: Any = "it calls raise_exception without a message") -> None:
        raise ValueError(message)

    def strftime_now(format: str) -> str:
        return now.strftime(format)

    return {"raise_exception": raise_exception, "strftime_now": strftime_now}


def _compile(source: str) -> Any:
    import jinja2.ext
    import jinja2.utils
    from jinja2.nodes import CallBlock
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012 (Jinja's own attribute)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Callable[[], str]) -> str:
            return OPEN + caller() + CLOSE

    def tojson(value: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, sort_keys: Any = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    return environment.from_string(source)


def _limit_memory(request_bytes: int) -> None:
    data = MEMORY_BYTES + MEMORY_FACTOR * request_bytes
    for kind, wanted in ((resource.RLIMIT_DATA, data), (resource.RLIMIT_AS, data + _ADDRESS_BYTES)):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _read(file: int, length: int, deadline: float | None = None) -> bytes:
    """So many bytes of a pipe.

    Raises:
        EOFError: the other end is closed.
        TimeoutError: the deadline passed before.
    """
    parts, missing = [], length
    while missing:
        if deadline is not None and not select.select([file], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError
        part = os.read(file, min(missing, 2**20))
        if not part:
            raise EOFError
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view[: 2**20]) :]


def _end(child: "subprocess.Popen[bytes]") -> None:
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()
    child.kill()
    child.wait()
