"""`trl-quietstar convert`: makes a thinking model of a checkpoint of the published Quiet-STaR code."""

from dataclasses import dataclass
from typing import cast

import torch
from transformers import AddedToken, MistralConfig, PreTrainedTokenizerBase

from ..loading import load_tokenizer
from ..model.embeddings import weight_of
from ..model.heads import ThinkingModel
from ..model.published import FORWARDS_ASIDE, THOUGHT_TOKENS, PublishedModel, published_config
from ..model.saved import has_file
from ..modeling import attach_heads
from ..settings import QuietStarSettings
from .arguments import argument, check_new_folder, named, required, revision_of
from .parser import CommandParser


TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")


@dataclass
class ConvertArguments:
    """What to convert, and what its configuration does not say. What each field means stands in its `help`."""

    model: str | None = argument(None, "Local folder or id on the Hub of a checkpoint of the published code.")
    output: str | None = argument(None, "Folder to write the model to; new or empty.")
    n_ahead: int | None = argument(
        None, "`n_ahead` of its training: the tokens of a thought and 3. 8 for `ezelikman/quietstar-8-ahead`."
    )
    n_ahead_talk: int | None = argument(
        None,
        "`n_ahead_talk` of its training. By default what `max_thoughts` in its configuration leaves: less `n_ahead` and 1.",
    )
    tokenizer: str | None = argument(
        None,
        "Folder or id of its tokenizer, such as `mistralai/Mistral-7B-v0.1`. By default the one beside the checkpoint.",
    )
    untrained_embeddings: bool = argument(
        False,
        "Whether start and end become the embedding of `---`, as which they began. The published code does that whenever it "
        "loads a checkpoint, and so in its evaluation.",
    )
    revision: str | None = argument(None, "Revision of the checkpoint on the Hub.")


def run(argv: list[str]) -> None:
    """Converts a checkpoint: `PATH OUTPUT`, then flags."""
    (args,) = CommandParser((ConvertArguments,), "convert").parse_args_and_config(named(argv, "--model", "--output"))
    source, output = required(args, "model", "output")
    check_new_folder(output)
    hub = revision_of(args)
    config = published_config(source, **hub)
    lengths = _lengths(args, config)
    tokenizer = _tokenizer(args, config, hub)
    suppressed = [cast(int, tokenizer.convert_tokens_to_ids(token)) for token in THOUGHT_TOKENS]
    settings = QuietStarSettings(*lengths, mixing_head_type="published", thought_suppress_tokens=suppressed)
    model = converted(PublishedModel.load(source, **hub), settings)
    if args.untrained_embeddings:
        _undo_training(model, tokenizer)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(
        f"Saved to {output}: thoughts of {lengths[0]} tokens, each read for {lengths[1]}. "
        f"`trl-quietstar generate --model {output} --prompt TEXT` writes with it."
    )


def converted(published: PublishedModel, settings: QuietStarSettings) -> ThinkingModel:
    """The thinking model of a checkpoint, which is used up. Neither thoughts nor generated text hold suppressed tokens."""
    base, heads = published.take_apart()
    model = cast(ThinkingModel, attach_heads(base, settings))
    model.quietstar.load_state_dict({**model.quietstar.state_dict(), **heads})  # the value head stays as it is made
    model.generation_config.suppress_tokens = settings.thought_suppress_tokens
    return model


def _lengths(args: ConvertArguments, config: MistralConfig) -> tuple[int, int]:
    """L and M, in tokens."""
    if args.n_ahead is None or args.n_ahead <= FORWARDS_ASIDE:
        raise ValueError(
            f"`n_ahead` is {args.n_ahead}; give that of the training, `--n_ahead 8` for `quietstar-8-ahead`: {FORWARDS_ASIDE} more "
            "than a thought has tokens."
        )
    talk, max_thoughts = args.n_ahead_talk, getattr(config, "max_thoughts", None)
    if talk is None and max_thoughts is not None:
        talk = max_thoughts - args.n_ahead - 1
    if talk is None or talk < 1:
        raise ValueError(
            f"`n_ahead_talk` is {talk}, with `n_ahead` {args.n_ahead} and `max_thoughts` {max_thoughts} in the configuration; give "
            "that of the training, such as `--n_ahead_talk 4`."
        )
    return args.n_ahead - FORWARDS_ASIDE, talk


def _tokenizer(args: ConvertArguments, config: MistralConfig, hub: dict) -> PreTrainedTokenizerBase:
    """The tokenizer, with the two tokens that stand for start and end."""
    if args.tokenizer is None and not any(has_file(str(args.model), name, hub) for name in TOKENIZER_FILES):
        raise ValueError(
            f"There is no tokenizer beside {args.model!r}; give its base's, such as `--tokenizer mistralai/Mistral-7B-v0.1`."
        )
    tokenizer = load_tokenizer(str(args.model), **hub) if args.tokenizer is None else load_tokenizer(args.tokenizer)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in THOUGHT_TOKENS], special_tokens=True)
    if len(tokenizer) != config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens with {' and '.join(THOUGHT_TOKENS)}, and the checkpoint "
            f"{config.vocab_size}; give the one that it was trained with by `--tokenizer`."
        )
    return tokenizer


@torch.no_grad()
def _undo_training(model: ThinkingModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Sets start and end to what they began as: the embedding of the first token of three dashes."""
    first = tokenizer("---", add_special_tokens=False)["input_ids"][0]
    for embedding in (model.quietstar.start_embedding, model.quietstar.end_embedding):
        embedding.copy_(weight_of(model.get_input_embeddings())[first])
