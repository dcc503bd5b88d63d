"""`trl-quietstar COMMAND --help`: a command's options, its own first and in groups, then those of the Trainer."""

import argparse
import shutil

from .commands import COMMANDS, TASKS, Command
from .options import Option, is_deprecated, is_used, options_of


# what stands for a value, by what its type holds first
KINDS = {"bool": "BOOL", "list": "LIST", "dict": "JSON", "int": "INT", "float": "FLOAT", "": "TEXT"}


def parser_of_help(name: str, command: Command) -> argparse.ArgumentParser:
    """A parser that knows what to show of a command's options, and parses nothing."""
    width = min(shutil.get_terminal_size().columns, 120)
    parser = argparse.ArgumentParser(
        prog=f"trl-quietstar {name}",
        usage=f"trl-quietstar {name} {command.arguments}",
        description=f"{name} {command.summary}.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=width),
        add_help=False,
    )
    groups = {}
    shown = [o for o in options_of(command) if is_used(command, o) and not is_deprecated(o)]
    for option in shown:
        if option.section not in groups:
            groups[option.section] = parser.add_argument_group(option.section)
        groups[option.section].add_argument(f"--{option.name}", metavar=_metavar(option), help=_help(option))
    return parser


def print_help(name: str, argv: list[str]) -> None:
    """Prints the options of a command, given what follows its name on the command line."""
    command = TASKS if name == "eval" and names_tasks(argv) else COMMANDS[name]
    print(parser_of_help(name, command).format_help(), end="")


def names_tasks(argv: list[str]) -> bool:
    """Whether the flags of `eval` ask for tasks of lm-evaluation-harness."""
    return any(flag.split("=")[0] in ("--tasks", "--compare") for flag in argv)


def _metavar(option: Option) -> str:
    if option.choices:
        return "{" + ",".join(option.choices) + "}"
    return next(word for part, word in KINDS.items() if part in option.kind)


def _help(option: Option) -> str:
    default = "" if option.default is None else f" [{option.default!r}]"
    return (option.help + default).replace("%", "%%")
