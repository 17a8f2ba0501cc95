"""Code that all commands share: exit codes, the parser, and error messages of one line."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

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
