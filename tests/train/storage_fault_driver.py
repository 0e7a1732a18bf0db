"""Runs a lowmem command whose disk fails, or that dies, at the n-th call that writes, reserves, copies or flushes.

usage: python storage_fault_driver.py FAULT CALL COMMAND [ARGUMENTS]

FAULT is kill (SIGKILL) or full (this call and all later ones find no room). With CALL 0 nothing happens and the number of calls goes to
standard output.
"""

import os
import signal
import sys
import threading

FAULT, CALL = sys.argv[1], int(sys.argv[2])
count, lock = 0, threading.Lock()


def faulty(name: str) -> None:
    usual = getattr(os, name)

    def call(*arguments, **known):
        global count
        with lock:
            count += 1
            due = 0 < CALL <= count
        if due and FAULT == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if due:
            raise OSError(28, "No space left on device")
        return usual(*arguments, **known)

    setattr(os, name, call)


if __name__ == "__main__":
    from lowmem.cli.main import main

    for watched in ("pwritev", "posix_fallocate", "copy_file_range", "fsync", "fdatasync"):
        faulty(watched)
    code = main(sys.argv[3:])
    if CALL == 0:
        print(count)
    sys.exit(code)
