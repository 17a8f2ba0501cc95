"""Code that all commands share: exit codes, the parser, and error messages of one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from fastlenet.errors import InputError, MissingPackageError

DEVICE_HELP = "where to run: 'auto' (a GPU if there is one), 'cpu', 'cuda', 'cuda:1', ..."
OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and where to read more."""
        self.exit(BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def print_error(program: str, problem: Exception | str, code: int) -> int:
    """Print one line on stderr."""
    print(f"{program}: error: {' '.join(str(problem).split())}", file=sys.stderr)
    return code


def exit_code(program: str, command: Callable[[], int]) -> int:
    """Run a command and return its exit code; bad input gets one line, and so does an interruption."""
    try:
        code = command()
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse's way to end after --help or an error
        return int(stop.code or OK)
    except (InputError, MissingPackageError) as error:
        return print_error(program, error, BAD_INPUT)
    except BrokenPipeError:  # a reader such as `head` has seen enough; what Python still holds goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        return print_error(program, "interrupted", INTERRUPTED)
