"""The ``torchext`` command: ``train`` and ``info``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import torchext
from torchext.cli import info, train

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments, by default those of the process.

    Returns:
        The exit code: 0 is success, 1 a training that diverged, 2 a wrong option or file, 130 an
        interruption.
    """
    try:
        options = _parser().parse_args(argv)
    except SystemExit as end:  # argparse's --help, --version and errors
        return end.code if isinstance(end.code, int) else 0
    given = vars(options)
    run = given.pop("run")
    try:
        code: int = run(given)
        sys.stdout.flush()
    except BrokenPipeError:  # `torchext info | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, without the usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    # The name is given because `python -m torchext` would otherwise be called __main__.py.
    parser = _Parser(
        prog="torchext",
        description="Fused drop-in layers for PyTorch with native kernels.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"torchext {torchext.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="train|info", required=True)
    for name, summary, add_options, run in (
        ("train", "train 784-64-10 on handwritten digits", train.add_options, train.run),
        ("info", "show what this installation can do", info.add_options, info.run),
    ):
        command = commands.add_parser(
            name, help=summary, description=f"{summary.capitalize()}.", allow_abbrev=False
        )
        add_options(command)
        command.set_defaults(run=run)
    return parser
