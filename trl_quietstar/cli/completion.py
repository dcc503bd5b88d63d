"""`trl-quietstar completion`: what a shell needs to complete commands and flags, written by shtab.

eval "$(trl-quietstar completion bash)"
"""

import argparse

from .commands import COMMANDS
from .help import parser_of_help


def run(argv: list[str]) -> None:
    """Prints the script of a shell."""
    try:
        import shtab
    except ImportError as error:
        raise ImportError(
            "`completion` needs shtab; install it with `pip install trl-quietstar[completion]`."
        ) from error
    if len(argv) != 1 or argv[0] not in shtab.SUPPORTED_SHELLS:
        raise ValueError(
            f"`completion {' '.join(argv)}` is not known; give one of {', '.join(shtab.SUPPORTED_SHELLS)}."
        )
    parser = argparse.ArgumentParser(prog="trl-quietstar", add_help=False)
    commands = parser.add_subparsers()
    for name, command in COMMANDS.items():
        commands.add_parser(name, parents=[parser_of_help(name, command)], add_help=False, help=command.summary)
    print(shtab.complete(parser, argv[0]))
