"""One exception class and one exit code per failure that a user can cause.

Every message says what was found, what is allowed and what to do about it. `lowmem.cli.main` prints the message on one
line and exits with `exit_code`; `--debug` shows the traceback as well.
"""

EXIT_BROKEN_PIPE = 141  # the reader of the output has gone, as shells report it
EXIT_HUNG_UP = 129  # SIGHUP, after saving a checkpoint
EXIT_INTERRUPTED = 130  # Ctrl-C, after saving a checkpoint
EXIT_TERMINATED = 143  # SIGTERM, after saving a checkpoint


class LowmemError(Exception):
    """Base of every failure that is reported without a traceback."""

    exit_code = 1


class ConfigError(LowmemError):
    """Bad usage or configuration; the message lists every problem found, one a line."""

    exit_code = 2


class MemoryBudgetError(LowmemError):
    """The run does not fit the memory it was given."""

    exit_code = 3


class DataError(LowmemError):
    """Text, tokenizer or token shards missing or malformed; the message names the file and the line."""

    exit_code = 4


class CheckpointError(LowmemError):
    """A checkpoint is missing or damaged, or belongs to another run."""

    exit_code = 5


class DivergedError(LowmemError):
    """The loss or the gradients stayed non-finite for `train.max_bad_steps` steps in a row."""

    exit_code = 6


class StorageError(LowmemError):
    """The disk is full or not writable."""

    exit_code = 7


class StoppedBySignal(LowmemError):
    """A signal asked the run to stop; a checkpoint was saved first.

    Args:
        exit_code: 129 after SIGHUP, 130 after SIGINT, 143 after SIGTERM.
    """

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code
