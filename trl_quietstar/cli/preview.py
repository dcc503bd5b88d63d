"""What a run is made of, for people to look at: the fields that were set, and rows of its data as the model sees them."""

from enum import Enum
from itertools import islice
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text as RichText

from ..evaluation.inspection import decoded, token_pieces
from ..evaluation.report import printable
from ..trainer import QuietStarREINFORCETrainer
from ..training.preflight import PreflightCallback
from .arguments import thinking_line
from .commands import COMMANDS
from .options import options_of


if TYPE_CHECKING:
    from .train import Asked

PLACE = "◆"
SHOWN = 240  # tokens of a row at most, from both of its ends
SECRET = "token"  # in the name of a field whose value is not shown


def changed_fields(asked: "Asked", command: str) -> dict[str, tuple]:
    """The fields that were given another value than their default, with both."""
    values = {name: value for part in asked[:3] for name, value in vars(part).items()}
    defaults = {option.name: option.default for option in options_of(COMMANDS[command])}
    pairs = {name: (_plain(values[name]), defaults.get(name)) for name in asked.given if SECRET not in name}
    return {name: pair for name, pair in pairs.items() if str(pair[0]) != str(pair[1])}


def _plain(value):
    return value.value if isinstance(value, Enum) else value


def print_fields(asked: "Asked", command: str) -> None:
    """Prints the fields that differ from the defaults, in the order in which they were given."""
    fields = ", ".join(f"{name}={value!r}" for name, (value, _) in changed_fields(asked, command).items())
    _console().print(RichText.assemble(("Set: ", "bold"), printable(fields or "nothing"), "."))


def print_rows(trainer: QuietStarREINFORCETrainer, count: int) -> None:
    """
    Prints the first rows of the training data as the model sees them: what is only read is dim, what rewards look at bold, and
    places of thoughts are marked.

    Args:
        trainer ([`QuietStarREINFORCETrainer`]):
            With its data prepared.
        count (`int`):
            Number of rows.
    """
    console, preflight, dataset = _console(), PreflightCallback(trainer), trainer.train_dataset
    total = f" of {len(dataset)}" if hasattr(dataset, "__len__") else ""  # type: ignore[arg-type]  # not of a stream
    if trainer.args.thought_positions != "none":
        console.print(thinking_line(trainer.args))
    for number, row in enumerate(islice(dataset, count)):  # type: ignore[arg-type]  # there is one
        places = [] if trainer.args.thought_positions == "none" else preflight.places(row)
        console.print(RichText(f"Row {number}{total}: {_counts(trainer, row, places)}", "bold"))
        console.print(_shown(trainer, row, places))


def _counts(trainer: QuietStarREINFORCETrainer, row: dict, places: list[int]) -> str:
    """What there is in a row, in a line."""
    labels = [label != -100 for label in row["labels"]]
    parts = [
        f"{len(labels)} tokens",
        f"{sum(labels)} to be predicted",
        f"{len(places)} {'place' if len(places) == 1 else 'places'} for a thought ({PLACE})",
    ]
    written = sum(map(bool, row.get("written_ids") or ()))
    if written:
        parts.append(f"{written} with written thoughts")
    if "score_mask" in row:
        marked = zip(row["input_ids"], row["score_mask"], labels, strict=True)
        scored = [token for token, counts, is_label in marked if counts and is_label]
        parts.append(f"rewards look at {decoded(trainer.processing_class, scored)!r}")
    return ", ".join(parts)


def _shown(trainer: QuietStarREINFORCETrainer, row: dict, places: list[int]) -> RichText:
    """A row's text with its marks."""
    ids, labels, scored = row["input_ids"], row["labels"], row.get("score_mask")
    pieces, marks, text = token_pieces(trainer.processing_class, ids), set(places), RichText()
    thoughts = dict(zip(row.get("written_at") or (), row.get("written_ids") or (), strict=False))
    for at, piece in enumerate(pieces):
        if SHOWN // 2 <= at < len(ids) - SHOWN // 2:
            text.append(" … " if at == SHOWN // 2 else "", "dim")
            continue
        is_bold = scored is not None and scored[at]
        text.append(printable(piece), "dim" if labels[at] == -100 else "bold" if is_bold else "")
        if at in marks or at in thoughts:
            thought = decoded(trainer.processing_class, thoughts[at]) if at in thoughts else ""
            text.append(PLACE + (f"⟨{printable(thought)}⟩" if thought else ""), "cyan")
    return text


def _console() -> Console:
    return Console(highlight=False, markup=False)
