"""Results for people to read: tables of thoughts, metrics, validations and tasks on the terminal, and the model card.

Text from models and data is untrusted. Everything that is printed passes through [`printable`], and nothing of it is
read as markup.
"""

import math
import re
from typing import TYPE_CHECKING

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text as RichText
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from ..learning.metrics import BatchResult
from ..learning.rewards import masked_mean
from ..text.transfer import to_host
from .anti_theater import CONDITIONS, THRESHOLDS, AntiTheaterReport, Estimate
from .meaning import changes, contradictions, evaluation_rows


if TYPE_CHECKING:
    from ..config import QuietStarConfig
    from .harness import Outcome


CONTEXT_TOKENS = 16  # shown before a thought
# control characters could command a terminal; each becomes the picture that Unicode has of it
PICTURES = {
    **{code: 0x2400 + code for code in range(32) if code not in (9, 10)},
    127: 0x2421,
    **dict.fromkeys([*range(128, 160), *range(0xD800, 0xE000)], 0xFFFD),
}


def printable(text: str) -> str:
    """Makes control characters visible, except tabs and line ends. The text keeps its length."""
    return text.translate(PICTURES)


def thought_table(tokenizer: PreTrainedTokenizerBase, batch: BatchResult, count: int) -> dict[str, list]:
    """
    Makes a table of a few thoughts that are spread evenly over a batch.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Decodes the tokens.
        batch ([`BatchResult`]):
            The scored batch.
        count (`int`):
            Number of rows, if there are as many thought positions.

    Returns:
        `dict` of columns: `context` (the end of the text before the thought), `thought` (the first one at its position),
        `next` (the true next tokens), `with` and `without` (mean probability of these tokens with and without the
        thought, as far as rewards look at them), and `reward`.
    """
    text, experience, talk_logps = batch.text.host, batch.experience, batch.scores.talk_logps
    thoughts, talk_length = experience.thoughts, talk_logps.shape[-1]
    p_with = masked_mean(talk_logps.exp(), experience.score_mask.expand_as(talk_logps), dim=-1)
    p_without = masked_mean(experience.logps_without.exp(), experience.score_mask, dim=-1)
    # one copy from the device, since what follows reads single numbers
    token_ids, mask, p_with, p_without, rewards = to_host(
        [thoughts.token_ids, thoughts.mask, p_with, p_without, experience.rewards]
    )
    places = thoughts.positions.host.mask.nonzero().tolist()
    count = min(count, len(places))
    places = [places[i * len(places) // count] for i in range(count)]
    table: dict[str, list] = {name: [] for name in ("context", "thought", "next", "with", "without", "reward")}
    for b, j in places:
        at = int(thoughts.positions.host.index[b, j])
        # a packed row has other documents, which a thought cannot see
        document = text.document_ids[b] == text.document_ids[b, at]
        ids = text.input_ids[b]
        before = ids[: at + 1][document[: at + 1]][-CONTEXT_TOKENS:]
        after = ids[at + 1 :][document[at + 1 :]][:talk_length]
        thought = token_ids[b, j, 0][mask[b, j, 0]]
        for name, tokens in (("context", before), ("thought", thought), ("next", after)):
            table[name].append(tokenizer.decode(tokens.tolist()))
        table["with"].append(round(float(p_with[b, j, 0]), 4))
        table["without"].append(round(float(p_without[b, j, 0]), 4))
        table["reward"].append(round(float(rewards[b, j, 0]), 4))
    return table


def print_thoughts(columns: dict[str, list], title: str) -> None:
    """Prints the columns of [`thought_table`] below a title."""
    table = Table(title=RichText(printable(title)), show_lines=True)
    for name in columns:
        table.add_column(name, justify="right" if isinstance(next(iter(columns[name]), ""), float) else "left")
    for row in zip(*columns.values(), strict=True):
        table.add_row(
            *(RichText(f"{x:.4f}" if isinstance(x, float) else printable(str(x)).replace("\n", "↵")) for x in row)
        )
    Console().print(table)


def markdown_table(columns: dict[str, list]) -> str:
    """The columns of [`thought_table`] as a table in Markdown, in which their text stays text."""
    rows = [[_escaped(str(x)) for x in row] for row in zip(*columns.values(), strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in ([*columns], ["---"] * len(columns), *rows))


def _escaped(text: str) -> str:
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", printable(text)).replace("\n", "↵")  # punctuation of ASCII


class TerminalStreamer(BaseStreamer):
    """
    Prints tokens as they come.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Decodes the tokens.
        console ([`~rich.console.Console`]):
            Prints the text.
        thoughts (`bool`):
            Whether each `put` brings a whole thought, which is printed in brackets. Otherwise the first `put` brings the
            prompt, and each later one the next token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, console: Console, thoughts: bool = False):
        self.tokenizer, self.console, self.thoughts = tokenizer, console, thoughts
        self.token_ids: list[int] = []
        self.shown = 0

    def put(self, value: torch.Tensor) -> None:
        if self.thoughts:
            text = printable(str(self.tokenizer.decode(value.tolist()))).replace("\n", "↵")
            self._print(RichText(f"⟨{text}⟩", style="dim italic"))
            return
        self.token_ids += value.flatten().tolist()
        # all of it again, because what a token adds can depend on the tokens before it
        text = str(self.tokenizer.decode(self.token_ids, skip_special_tokens=True))
        if not text.endswith("�"):  # otherwise the rest of a character comes with the next token
            self._print(RichText(printable(text[self.shown :])))
            self.shown = len(text)

    def end(self) -> None:
        if not self.thoughts:  # which stand in the line of their text
            self.console.print()

    def _print(self, text: RichText) -> None:
        self.console.print(text, end="", soft_wrap=True)


def _shown(metrics: dict[str, float], key: str) -> str:
    """A metric as a cell of a table."""
    value = metrics[key]
    if math.isnan(value):
        return "not finite" if math.isnan(metrics.get("eval_loss", 0.0)) else "not measured"
    return f"{value:.4f}"


def card_section(
    model_id: str,
    adapter: bool,
    evaluation: dict[str, float] | None,
    thoughts: dict[str, list] | None,
    args: "QuietStarConfig",
) -> str:
    """
    Writes the section that a model card has beyond TRL's: how to load the model, what was measured, some thoughts.

    Args:
        model_id (`str`):
            Hub id or folder to load the model from.
        adapter (`bool`):
            Whether the repository holds an adapter.
        evaluation (`dict[str, float]`, *optional*):
            Metrics that `evaluate` returned.
        thoughts (`dict[str, list]`, *optional*):
            Columns of [`thought_table`].
        args ([`QuietStarConfig`]):
            Of the run.

    Returns:
        `str`: Markdown.
    """
    lines = [
        "",
        "## Thoughts",
        "",
        "This model thinks before it speaks, with `pip install trl-quietstar`:",
        "",
        "```python",
        "from transformers import AutoTokenizer",
        "from trl_quietstar import QuietStarForCausalLM",
        "",
        f"model = QuietStarForCausalLM.from_pretrained({model_id!r})",
        f"tokenizer = AutoTokenizer.from_pretrained({model_id!r})",
        'inputs = tokenizer("Twice seven is", return_tensors="pt")',
        "output = model.generate(**inputs, max_new_tokens=32, return_thoughts=True)",
        "print(tokenizer.decode(output.sequences[0]))",
        "```",
        "",
    ]
    if adapter:
        lines += ["The adapter loads without its thoughts as any other, with `peft`.", ""]
    else:
        lines += [
            "`AutoModelForCausalLM.from_pretrained` loads the base weights as usual, and thinks too with "
            "`trust_remote_code=True`.",
            "",
        ]
    if evaluation is not None:
        lines += ["| held-out | |", "| --- | --- |"]
        rows = evaluation_rows(evaluation, args)
        lines += [f"| {label} | {_shown(evaluation, key)} |" for label, key in rows.items()]
        lines += ["", *contradictions(evaluation, args), ""]
    if thoughts:
        lines += ["Some of its thoughts, in brackets, with the text before and after:", ""]
        shown = zip(thoughts["context"], thoughts["thought"], thoughts["next"], thoughts["reward"], strict=True)
        # an indented block shows text as it is, and no character in the text can end it
        lines += [
            "    " + printable("↵".join(f"{a} [{b}]{c}  (reward {r:+.4f})".splitlines())) for a, b, c, r in shown
        ]
        lines.append("")
    return "\n".join(lines)


def print_evaluation(metrics: dict[str, float], args: "QuietStarConfig", title: str = "Evaluation") -> None:
    """
    Prints an evaluation.

    Args:
        metrics (`dict[str, float]`):
            Metrics that `evaluate` returned.
        args ([`QuietStarConfig`]):
            That it was made with.
        title (`str`):
            Title of the table.
    """
    table = Table("held-out", "", title=title)
    for label, key in evaluation_rows(metrics, args).items():
        table.add_row(RichText(label), _shown(metrics, key))
    _print_with_notes(table, contradictions(metrics, args))


def print_comparison(before: dict[str, float], after: dict[str, float], title: str, args: "QuietStarConfig") -> None:
    """
    Prints what changed between two evaluations.

    Args:
        before, after (`dict[str, float]`):
            Metrics that `evaluate` returned.
        title (`str`):
            Title of the table.
        args ([`QuietStarConfig`]):
            Of the run.
    """
    table = Table(title=title)
    for name in ("held-out", "before", "after", "change"):
        table.add_column(name, justify="left" if name == "held-out" else "right")
    for label, key in evaluation_rows(after, args).items():
        known = before | {key: before.get(key, math.nan)}  # what a stage measures, the one before may not
        change = after[key] - known[key]
        table.add_row(
            RichText(label), _shown(known, key), _shown(after, key), "" if math.isnan(change) else f"{change:+.4f}"
        )
    _print_with_notes(table, contradictions(after, args) + changes(before, after))


def _print_with_notes(table: Table, notes: list[str]) -> None:
    console = Console()
    console.print(table)
    for note in notes:
        console.print(RichText(note))


def print_teaching(taught: int, rows: int) -> None:
    """
    Prints what of the thoughts was taught, and what was left to find.

    Args:
        taught (`int`), rows (`int`):
            Number of training rows that held a written thought, and of all rows.
    """
    own = "Thoughts of its own it wrote" + (" for the other rows" if taught else "")
    shown = f"{taught:,} of {rows:,} training rows held a written thought, which the model was taught to write. "
    reward = "rewarded only for how likely they made the true text after them."
    Console().print(RichText(f"{shown if taught else 'No thought was taught. '}{own}, {reward}"))


TEST_LABELS = {
    "divergence": "divergence from plain text",
    "ablation": "ablation: with − without",
    "correlation": "coherence ~ correctness",
    "content_gain": "content: real − shuffled",
}
CONDITION_LABELS = {
    "none": "no thought",
    "real": "its own thought",
    "shuffled": "another position's thought",
    "random": "random tokens",
    "filler": "filler (start repeated)",
    "truncated": "first half of the thought",
}


def print_anti_theater(report: AntiTheaterReport) -> None:
    """
    Prints three tables: the tests with their verdicts, the controls, and the gains.

    Args:
        report ([`~evaluation.anti_theater.AntiTheaterReport`]):
            The result of a validation.
    """
    verdict = "the thoughts are used" if report.passed else "theater"
    tests = Table(title=f"Anti-theater validation: {verdict} ({report.thoughts:,} thoughts, {report.texts:,} texts)")
    for name in ("test", "value", "95% interval", "wanted", ""):
        tests.add_column(name, justify="left" if name == "test" else "right")
    for name, threshold in THRESHOLDS.items():
        wanted = f"> {threshold:g}" if name != "content_gain" else "interval > 0"
        outcome = "failed" if name in report.failures else "passed"
        tests.add_row(TEST_LABELS[name], *_with_interval(report.estimates[name]), wanted, outcome)
    controls = Table(title="What stands in the thought's place")
    for name in ("condition", "accuracy", "NLL, nats"):
        controls.add_column(name, justify="left" if name == "condition" else "right")
    for name in CONDITIONS:
        accuracy, nll = report.estimates[f"accuracy_{name}"], report.estimates[f"nll_{name}"]
        controls.add_row(CONDITION_LABELS[name], f"{accuracy.value:.4f}", f"{nll.value:.4f}")
    gains = Table(title="Gains")
    for name in ("gain", "accuracy", "95% interval", "nats", "95% interval"):
        gains.add_column(name, justify="left" if name == "gain" else "right")
    for name, label in (("content_gain", "content: real − shuffled"), ("compute_gain", "compute: filler − none")):
        gains.add_row(label, *_with_interval(report.estimates[name]), *_with_interval(report.estimates[f"{name}_nll"]))
    for table in (tests, controls, gains):
        Console().print(table)


def _with_interval(estimate: Estimate) -> tuple[str, str]:
    """A value and its 95% interval, as two cells of a table."""
    if math.isnan(estimate.value):
        return "undefined", ""
    return f"{estimate.value:+.4f}", f"{estimate.low:+.4f} to {estimate.high:+.4f}"


def print_outcomes(thinking: "list[Outcome]", plain: "list[Outcome] | None", p_values: list[float]) -> None:
    """
    Prints the results of lm-eval's tasks.

    Args:
        thinking (`list` of [`~evaluation.harness.Outcome`]):
            Results with thoughts, or in the mode that the user asked for.
        plain (`list` of [`~evaluation.harness.Outcome`], *optional*):
            Results without thoughts on the same tasks and metrics, in the same order.
        p_values (`list[float]`):
            P-value of the paired test for each result; empty without `plain`.
    """
    title = "Tasks of lm-eval" + ("" if plain is None else ", with and without thoughts")
    table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))  # every number fits into 80 columns
    table.add_column("task, metric", overflow="fold")
    for name in ("value",) if plain is None else ("with", "without", "change", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    for i, outcome in enumerate(thinking):
        label = RichText(printable(f"{outcome.task}\n")).append(printable(outcome.metric), style="dim")
        row: list[str | RichText] = [label, _with_error(outcome)]
        if plain is not None:
            change = f"{outcome.value - plain[i].value:+.4f}"
            row += [_with_error(plain[i]), change, "–" if math.isnan(p_values[i]) else f"{p_values[i]:.3f}"]
        table.add_row(*row)
    Console().print(table)


def _with_error(outcome: "Outcome") -> str:
    """A value, and its standard error if it has one."""
    return f"{outcome.value:.4f}" + ("" if math.isnan(outcome.stderr) else f" ± {outcome.stderr:.4f}")
