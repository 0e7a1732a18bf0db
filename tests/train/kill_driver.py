"""Runs a lowmem command and kills its own process (SIGKILL) at the n-th file operation on paths that begin with FOLDER.

usage: python kill_driver.py FOLDER EVENT DELAY_S COMMAND [ARGUMENTS]

Python's audit hooks report every open, rename, mkdir, remove and truncate, so EVENT reaches every moment of a save; DELAY_S
lets the kill fall inside the write that follows. With EVENT 0 nothing is killed and the number of events goes to standard output.
"""

import os
import signal
import sys
import threading

FOLDER, EVENT, DELAY_S = os.path.abspath(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
WATCHED = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.scandir"}
count = 0


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def on_audit(event: str, arguments: tuple) -> None:
    global count
    if event not in WATCHED or not isinstance(arguments[0], (str, os.PathLike)):
        return
    if os.path.abspath(os.fspath(arguments[0])).startswith(FOLDER):
        count += 1
        if count == EVENT:
            threading.Timer(DELAY_S, kill).start() if DELAY_S else kill()


if __name__ == "__main__":
    from lowmem.cli.main import main

    sys.addaudithook(on_audit)
    code = main(sys.argv[4:])
    if EVENT == 0:
        print(count)
    sys.exit(code)
