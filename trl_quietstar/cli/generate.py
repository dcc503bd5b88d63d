"""`trl-quietstar generate`: writes on from a prompt, thinking."""

import sys
from dataclasses import dataclass
from typing import Annotated, cast

from rich.console import Console
from transformers import BatchEncoding, PreTrainedTokenizerBase, set_seed

from ..evaluation.report import TerminalStreamer
from ..loading import load_tokenizer, pad_token_id, warn_of_untrained_heads
from ..model.adapters import base_of
from ..model.heads import ThinkingModel
from ..modeling import QuietStarForCausalLM
from ..rules import Limits
from ..thinking.when import Thinking
from .arguments import ThinkerArguments, argument, check_model, check_numbers, required
from .parser import CommandParser


@dataclass
class GenerateArguments(ThinkerArguments):
    """What to write. What each field means stands in its `help`."""

    prompt: str | None = argument(None, "The text to go on from; `-` reads it from the standard input.")
    show_thoughts: bool = argument(False, "Whether to print each thought before the text that it served.")
    chat: bool = argument(False, "Whether the prompt is a user's message, to be put into the model's chat template.")
    max_new_tokens: Annotated[int, Limits(1)] = argument(64, "Largest number of visible tokens to write.")
    do_sample: bool = argument(False, "Whether to sample the visible text; otherwise it is the most likely tokens.")
    temperature: Annotated[float, Limits(1e-3)] = argument(1.0, "Temperature of the visible text, if it is sampled.")
    top_p: Annotated[float, Limits(1e-6, 1)] = argument(
        1.0, "Probability that nucleus sampling of the visible text keeps; 1.0 is off."
    )
    seed: Annotated[int, Limits(0, 2**32 - 1)] = argument(0, "Seed of sampling.")

    def __post_init__(self):
        check_numbers(self)
        for name in ("temperature", "top_p"):
            if getattr(self, name) != 1 and not self.do_sample:
                raise ValueError(
                    f"`{name}` has no effect without `do_sample`; give `--do_sample`, or leave `{name}` out."
                )


def run(argv: list[str]) -> None:
    """Writes on from a prompt, token by token as they come."""
    (args,) = CommandParser((GenerateArguments,), "generate").parse_args_and_config(argv)
    source, prompt = required(args, "model", "prompt")
    hub = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    check_model(source, revision=args.revision)
    model = QuietStarForCausalLM.from_pretrained(source, **hub).eval()
    base = cast(ThinkingModel, base_of(model))
    if base.fresh_thought_embeddings and args.think != "never":
        warn_of_untrained_heads(source)
    tokenizer = load_tokenizer(source, **hub)
    inputs = _tokenized(tokenizer, sys.stdin.read() if prompt == "-" else prompt, args.chat)
    set_seed(args.seed)
    console = Console()
    thinking = Thinking.of(base.quietstar_settings, args.think, args.think_every, args.thinking_threshold)
    print(f"Thinks {thinking}.", file=sys.stderr)  # the standard output is the text
    options = {"temperature": args.temperature, "top_p": args.top_p} if args.do_sample else {}
    if args.show_thoughts and thinking.mode != "never":
        options["thought_streamer"] = TerminalStreamer(tokenizer, console, thoughts=True)
    model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=args.max_new_tokens,
        do_sample=args.do_sample,
        pad_token_id=pad_token_id(tokenizer, base.config.get_text_config().vocab_size),
        think=thinking,
        tokenizer=tokenizer,
        streamer=TerminalStreamer(tokenizer, console),
        **options,
    )


def _tokenized(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> BatchEncoding:
    """A batch of one prompt, `(1, T)`, in a chat's template if it is a message."""
    if chat:
        messages = [{"role": "user", "content": prompt}]
        rendered = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        inputs = cast(BatchEncoding, rendered)  # by `return_dict`
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("`prompt` has no tokens; give at least one, since a thought follows a token.")
    return inputs
