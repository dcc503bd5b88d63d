"""`trl-quietstar inspect`: writes a page of what a model thinks after each token of a text."""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedTokenizerBase

from ..config import QuietStarConfig
from ..data.score import SPAN, FindScore
from ..data.written import without_thoughts
from ..evaluation.inspection import ShownScores, inspect_texts
from ..evaluation.page import write_page
from ..loading import build_model, hub_kwargs
from ..model.adapters import base_of
from ..model.family import check_length, max_positions
from ..model.heads import ThinkingModel
from ..model.lm_head import normalized_entropy, token_statistics
from ..text.batch import Text, Thoughts
from ..text.positions import choose_positions, seeded_generators, talk_span
from ..thinking.check import choose_path
from ..thinking.drawing import fixed_draws, thought_sampling
from ..thinking.likelihood import think_in_chunks
from .arguments import argument, check_model, check_output, required, saved_fields, thinking_line
from .parser import CommandParser


@dataclass
class InspectArguments:
    """What to look at. What each field means stands in its `help`."""

    model: str | None = argument(
        None, "Id on the Hub or local folder of a thinking model, an adapter with its heads, or a plain causal LM."
    )
    text: str | None = argument(None, "UTF-8 file with the text, or - for standard input.")
    prompt: str | None = argument(
        None,
        "UTF-8 file with what stands before the text and is not predicted, such as a question. Needed where the model "
        "thinks at the end of a prompt.",
    )
    output: str = argument("report.html", "HTML file to write.")


def run(argv: list[str]) -> None:
    """Writes a page of what a model thinks after each token of a text, by its saved settings unless others are given."""
    inspect_args, args, is_trained = _parsed(argv)
    source, file = required(inspect_args, "model", "text")
    check_output("output", inspect_args.output)
    words, said = read_text(file), ""
    if args.thought_pattern is not None:  # a text is read as in training
        words, written = without_thoughts(words, args.thought_pattern)
        said = f" Written thoughts taken out: {len(written)}."
    prompt = "" if inspect_args.prompt is None else read_text(inspect_args.prompt)
    model, tokenizer = build_model(source, args, None, None, None)
    base = cast(ThinkingModel, base_of(model.to(args.device).eval()))
    ids = tokenizer(prompt + words)["input_ids"]
    kept, given = ids[: args.max_length], len(tokenizer(prompt)["input_ids"]) if prompt else 0
    _check_kept(len(kept), given, file, args.max_length)
    check_length(len(kept), args.thought_length, max_positions(base.config), around=base.thought_marks.around)
    token_ids = torch.tensor([kept])
    labels = token_ids.masked_fill(torch.arange(len(kept)) < given, -100)
    scored = _score_mask(prompt, words, tokenizer, args.score_pattern, len(kept))
    text = Text.from_batch(token_ids, labels=labels, score_mask=scored).to(args.device)
    texts = inspect_texts(tokenizer, text, *think_about(base, text, tokenizer, args))
    warnings = _warnings(source, is_trained, len(kept), len(ids))
    for warning in warnings:
        print(f"Warning: {warning}", file=sys.stderr)
    settings = f"Model {source}. {thinking_line(args)}{said}"
    print(settings)
    name = "standard input" if file == "-" else Path(file).name
    write_page(Path(inspect_args.output), f"Thoughts on {name}", texts, [settings, *warnings])
    print(f"Wrote {inspect_args.output}")


def _parsed(argv: list[str]) -> tuple[InspectArguments, QuietStarConfig, bool]:
    """What to look at, how to think by the saved settings and the flags, and whether the model was trained to think."""
    parser = CommandParser((InspectArguments, QuietStarConfig), "inspect")
    with tempfile.TemporaryDirectory() as scratch:
        parser.set_defaults(output_dir=scratch, report_to="none")
        inspect_args, args = parser.parse_args_and_config(argv)
        source, _ = required(inspect_args, "model", "text")
        check_model(source, **hub_kwargs(args))
        fields = saved_fields(source, **hub_kwargs(args))
        # a few random ones, which saves time in training alone
        if not isinstance(fields.get("thought_positions"), str):
            fields.pop("thought_positions", None)
        parser.set_defaults(**fields)
        inspect_args, args = parser.parse_args_and_config(argv)
    if args.thought_positions == "prompt_end" and inspect_args.prompt is None:
        raise ValueError(
            "`thought_positions` is 'prompt_end', and there is no prompt; give its file with `--prompt`, or "
            "`--thought_positions all` to think after every token."
        )
    return inspect_args, args, bool(fields)


def _check_kept(kept: int, given: int, name: str, max_length: int | None) -> None:
    """Whether a text has a token to predict, of those `kept` with the prompt's `given` ones."""
    if kept < max(given + 1, 2):
        raise ValueError(
            f"The text {name!r} has {kept - given} tokens within `max_length` ({max_length}) of which "
            f"the prompt takes {given}; give a longer one, or raise `max_length`."
            if given
            else f"The text {name!r} has fewer than two tokens; give a longer one."
        )


def _score_mask(
    prompt: str, words: str, tokenizer: PreTrainedTokenizerBase, pattern: str | None, count: int
) -> torch.Tensor | None:
    """Mask of shape `(1, count)`: the tokens that the gain of a thought is taken over. None: of all."""
    if pattern is None:
        return None
    find = FindScore("inspected", "prompt", "text", False, tokenizer, pattern)
    first, end = find({"prompt": prompt, "completion": words}, 0)[SPAN]
    if first >= min(end, count):
        raise ValueError(
            f"`score_pattern` ({pattern!r}) has no match within the {count:,} tokens that are shown; change the pattern, raise "
            "`max_length`, or leave it out."
        )
    at = torch.arange(count)
    return ((first <= at) & (at < end))[None]


def _warnings(model: str, trained: bool, shown: int, tokens: int) -> list[str]:
    """What a reader of the page must know."""
    warnings = []
    if shown < tokens:
        warnings.append(f"The text has {tokens:,} tokens, of which the first {shown:,} are shown; raise `max_length`.")
    if not trained:
        warnings.append(f"{model} was never trained to think: its heads, and so its thoughts, are untrained.")
    return warnings


def think_about(
    model: ThinkingModel, text: Text, tokenizer: PreTrainedTokenizerBase, args: QuietStarConfig
) -> tuple[Thoughts, ShownScores]:
    """
    A model's thoughts on a text, and what the page shows of their scores.

    Args:
        model ([`~model.heads.ThinkingModel`]):
            Whose thoughts they are.
        text ([`Text`]):
            Of one row.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Of the model.
        args ([`QuietStarConfig`]):
            How to think.
    """
    path = choose_path(model, args.thought_path)
    generators = seeded_generators(args.seed, 0, [0])
    with torch.no_grad():
        cache = path.read(model, text)
        text_logps = token_statistics(
            model, cache.text_hidden[:, :-1], text.input_ids[:, 1:], text.host.predicted()
        ).logps
        positions = choose_positions(
            text,
            args.thought_positions,
            generators,
            lambda: normalized_entropy(model, cache.text_hidden[:, :-1]),
            args.difficulty_threshold,
            args.min_thought_interval,
        )
    settings = thought_sampling(args.settings(), tokenizer, args.num_thoughts)
    # a position's draws are those of greedy generation there, so that the page shows what the model would think
    draws = fixed_draws(text.host.position_ids.gather(1, positions.host.index), settings, args.seed)
    talk_length = talk_span(text, args.talk_length, args.thought_positions)
    thoughts, scores = think_in_chunks(
        model, path, text, positions, settings, draws, talk_length, args.reward_prediction, cache
    )
    return thoughts, ShownScores(scores.talk_logps, scores.mixing_weights, text_logps)


def read_text(name: str) -> str:
    """
    A UTF-8 file, or standard input for `-`.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `ValueError`: if it is not UTF-8, or empty.
    """
    if name != "-" and not Path(name).is_file():
        raise FileNotFoundError(f"There is no text file {name!r}; give a UTF-8 file, or `-` for standard input.")
    raw = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    try:
        words = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"The text {name!r} is not UTF-8 ({error}); save it as UTF-8.") from None
    if not words.strip():
        raise ValueError(f"The text {name!r} is empty; give a longer one.")
    return words
