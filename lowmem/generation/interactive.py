"""Lines of a person at a terminal, one after the other, and the commands among them."""

import sys
from collections.abc import Callable, Mapping

from lowmem.errors import ConfigError, DataError
from lowmem.generation.settings import SETTINGS, Settings

_HELP = "{what}; /set NAME VALUE changes one of {names}; /show tells them; {more}/exit or Ctrl-D ends, Ctrl-C stops a text"


def converse(
    settings: Settings, what: str, reply: Callable[[str], None], commands: Mapping[str, Callable[[], str]], first: str | None = None
) -> None:
    """Answer lines of standard input until it ends, or until /exit.

    Args:
        what: to be typed, for the first line on standard error.
        reply: answers a line that is no command. Ctrl-C in it ends the answer; its ConfigError and DataError are told.
        commands: by name, beside /set, /show and /exit; each returns what to tell.
        first: answered before anything is read.
    """
    more = "".join(f"{name}, " for name in commands)
    usage = _HELP.format(what=what, names=", ".join(SETTINGS), more=more)
    print(usage, file=sys.stderr)
    line = first
    while True:
        if line is None:
            sys.stderr.write("> ")
            sys.stderr.flush()
            try:
                line = input()
            except EOFError:
                sys.stderr.write("\n")
                return
            except UnicodeDecodeError as error:
                print(f"that is not UTF-8 ({error.reason})", file=sys.stderr)
                continue
            except KeyboardInterrupt:  # at the prompt it only clears the line
                sys.stderr.write("\n")
                continue
        try:
            if line.split() == ["/exit"]:
                return
            if line.startswith("/"):
                print(_command(line.split(), settings, commands, usage), file=sys.stderr)
            else:
                reply(line)
        except KeyboardInterrupt:
            sys.stdout.write("\n")
        except (ConfigError, DataError) as error:
            print(error, file=sys.stderr)
        line = None


def _command(words: list[str], settings: Settings, commands: Mapping[str, Callable[[], str]], usage: str) -> str:
    """Carry out a command; returns the answer.

    Raises:
        ConfigError: there is no such command, or its setting or value is none.
    """
    if len(words) == 1 and words[0] in commands:
        return commands[words[0]]()
    if words == ["/show"]:
        return str(settings)
    if len(words) == 3 and words[0] == "/set":
        return settings.change(*words[1:])
    raise ConfigError(usage)
