"""The parser of a command's fields: keys of a recipe and flags, which win. What it refuses is said in a line, with what may have
been meant."""

from argparse import Action
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml
from trl import TrlParser

from ..other_trainers import ended, meant_by
from .commands import COMMANDS, Command
from .options import is_used, options_of
from .recipes import advice


class CommandParser(TrlParser):
    """
    TrlParser for a command.

    Args:
        kinds (`tuple` of dataclasses):
            Whose fields are flags.
        name (`str`):
            Name of the command.
        command ([`~cli.commands.Command`], *optional*):
            Which options it uses, and defaults of its own. Defaults to the one of that name.
    """

    def __init__(self, kinds: tuple[type, ...], name: str, command: Command | None = None):
        hints = [hint for kind in kinds for hint in get_type_hints(kind).items()]
        self.switches = {f"--{name}" for name, hint in hints if hint == bool | None}
        # help is shown before this is imported; and a new field would change what an abbreviation means
        super().__init__(kinds, prog=f"trl-quietstar {name}", add_help=False, allow_abbrev=False)  # type: ignore[arg-type]  # it asks for a `NewType` that no class is of
        self.command = COMMANDS[name] if command is None else command
        self.names = [field.name for kind in kinds for field in fields(kind)]
        self.set_defaults(**self.command.defaults)
        self.given: list[str] = []  # fields that flags or a recipe set, once they are parsed

    def add_argument(self, *names: str, **options: Any) -> Action:  # type: ignore[override]  # of names alone
        if names[0] in self.switches:  # which may be None, and may stand alone too, as others do
            options = {"nargs": "?", "const": True, **options}
        return super().add_argument(*names, **options)

    def parse_args_and_config(self, args: Iterable[str] | None = None, **kwargs: Any) -> tuple:  # type: ignore[override]  # it returns what it is asked for alone
        """
        Objects of the classes, in their order, from flags and the recipe that `--config` names.

        Raises:
            `FileNotFoundError`: if there is no such recipe.
            `ValueError`: if the recipe is no YAML mapping, or for a flag or key that is unknown or has no effect.
        """
        argv = _complete([part for flag in args or [] for part in _split(flag)])
        keys = _recipe(argv)
        for key in keys:
            if key not in self.names:
                raise ValueError(f"The recipe sets `{key}`, which is no field{self._meant(key)}")
        *parsed, remaining = super().parse_args_and_config(argv, return_remaining_strings=True)
        flags = [_name(part) for part in argv if part.startswith("--")]
        for part in remaining:
            if part.startswith("-"):
                raise ValueError(f"There is no flag `{part.split('=')[0]}`{self._meant(_name(part))}")
            raise ValueError(f"{part!r} follows no flag; options are given as `--name value`.")
        # a recipe is written for training, and other commands take from it what they use
        self._refuse_unused(flags + keys if self.command.used is None else flags)
        self.given = [name for name in dict.fromkeys(keys + flags) if name in self.names]
        return tuple(parsed)

    def error(self, message: str) -> NoReturn:
        """Raises what `argparse` would print below a usage of two hundred flags."""
        raise ValueError(f"{message[:1].upper()}{message[1:]}; `{self.prog} --help` lists all flags.")

    def _meant(self, name: str) -> str:
        return ended(meant_by(name, self.names), f"; `{self.prog} --help` lists all.")

    def _refuse_unused(self, given: list[str]) -> None:
        unused = {option.name for option in options_of(self.command) if not is_used(self.command, option)}
        for name in given:
            if name in unused:
                raise ValueError(f"`{name}` has no effect in `{self.prog}`; leave it out.")


def _split(part: str) -> list[str]:
    """`--config=PATH` as TRL reads it, in two."""
    return part.split("=", 1) if part.startswith("--config=") else [part]


def _complete(argv: list[str]) -> list[str]:
    """Flags with the values that stand for none: the last checkpoint to resume from."""
    following = [*argv[1:], "--"]
    return [
        part
        for flag, after in zip(argv, following, strict=False)
        for part in ([flag, "true"] if _name(flag) == "resume_from_checkpoint" and after.startswith("--") else [flag])
    ]


def _name(flag: str) -> str:
    """The field of a flag, which may be written with dashes and with its value."""
    return flag.split("=")[0].lstrip("-").replace("-", "_")


def _recipe(argv: list[str]) -> list[str]:
    """The fields that the recipe sets, which is known to be one; none without a recipe."""
    if "--config" not in argv:
        return []
    given = argv[argv.index("--config") + 1 :][:1]
    if not given or given[0].startswith("--"):
        raise ValueError("`--config` names no recipe; give its file.")
    path = Path(given[0])
    if not path.is_file():
        raise FileNotFoundError(f"There is no recipe {str(path)!r}; {advice(path.stem)}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The recipe {str(path)!r} is no valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"The recipe {str(path)!r} is no mapping of fields to values; give lines such as `max_steps: 100`."
        )
    return [str(key) for key in content if key != "env"]  # which sets variables of the environment
