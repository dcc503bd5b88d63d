"""A plain causal LM that thinks by itself, made of a thinking model: learned start and end become two tokens.

The model thinks once, at the end of a prompt, and its thought alone predicts what follows. That is an ordinary text: prompt, start,
thought, end, answer. So a plain model writes it, if the chat template ends a prompt with what asks for a thought and its start, and
if the end follows the thought. Text ends itself. A learned end is written by `generation_config.sequence_bias`, which Transformers
follows: it forces the end token after the stop string, and forbids it everywhere else. The tokenizer's `response_template` tells
Transformers' server and pipeline which part of an answer is the thought.
"""

from collections import defaultdict
from collections.abc import Iterator
from itertools import islice

import torch
from transformers import AddedToken, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..settings import QuietStarSettings
from .embeddings import embed_tokens, embedding_inputs, weight_of
from .family import eos_ids
from .heads import ThinkingModel
from .marks import Marks, end_slots, start_slots
from .turns import quoted, with_turn


# Names of start and end: those that parsers of reasoning know, unless the tokenizer, or text around a thought, has them already
NAMES = (("<think>", "</think>"), ("<thought>", "</thought>"), ("<hidden_thought>", "</hidden_thought>"))
BIAS = 1e4  # nats: above any difference of logits, and small enough to be added to them in float32
MOST_SPELLINGS = 10_000  # ways to end a thought by its string, each of which the generation config names


def check_writing(settings: QuietStarSettings, otherwise: str) -> None:
    """
    Refuses thoughts that no plain model writes by going on from a prompt.

    Args:
        settings ([`~settings.QuietStarSettings`]):
            How the model thinks.
        otherwise (`str`):
            What to do instead of training another way.

    Raises:
        `ValueError`: if it thinks elsewhere than at the end of a prompt, or goes on past what ends a thought.
    """
    if settings.thought_positions != "prompt_end":
        never = settings.thought_positions == "none"
        raise ValueError(
            f"`thought_positions` is {settings.thought_positions!r}: the model "
            f"{'never thinks' if never else 'thinks inside its text, and a plain model cannot'}. "
            f"Train with `thought_positions='prompt_end'`, or {otherwise}."
        )
    if (settings.min_thought_length or 1) > 1:
        raise ValueError(
            f"`min_thought_length` is {settings.min_thought_length}: before so many tokens `thought_stop_string` does not end a "
            f"thought, and in a plain model it does. Train with `min_thought_length=1`, or {otherwise}."
        )


def check_settings(settings: QuietStarSettings) -> None:
    """
    Refuses a model that no plain model can equal.

    Args:
        settings ([`~settings.QuietStarSettings`]):
            How the model thinks. Whether a mixing head takes part is not looked at.

    Raises:
        `ValueError`: if it thinks elsewhere than at the end of a prompt, drops a thought before the end of the text, or ends it by its
            length or by the EOS token.
    """
    if settings.thought_positions == "none":
        raise ValueError(
            "`thought_positions` is 'none': the model never thinks, and its folder is a plain model already."
        )
    check_writing(settings, "generate with this package")
    if settings.talk_length != "completion":
        raise ValueError(
            f"`talk_length` is {settings.talk_length}: the thought is dropped after so many tokens, and a plain model keeps it. "
            "Train with `talk_length='completion'`."
        )
    if settings.thought_stop_string is None:
        end = "a number of tokens" if settings.min_thought_length is None else "the EOS token"
        raise ValueError(
            f"`thought_stop_string` is None, so that thoughts end after {end}. A plain model counts no tokens, and stops at EOS. "
            "Train with a `thought_stop_string`."
        )


@torch.no_grad()
def make_plain(model: ThinkingModel, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """
    Turns a thinking model, in place, into the plain class of its family, with learned start and end among its tokens.

    The chat template asks for the thought and opens it at the end of a prompt. The generation config closes one with a learned end.
    It draws tokens unless it is told otherwise, as vLLM and llama.cpp do: otherwise Transformers' server would be greedy whatever
    temperature a client asks for.

    Args:
        model ([`ThinkingModel`]):
            What [`check_settings`] lets pass.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, which gains the two tokens.

    Returns:
        `tuple`: the start and the end token, or text.

    Raises:
        `ValueError`: if the family looks up an embedding for each layer, text may hold a token that thoughts do not, a thought's end
            can be written in too many ways, or the tokenizer joins what opens a thought with the text before it.
    """
    settings, marks = model.quietstar_settings, model.thought_marks
    others = set(settings.thought_suppress_tokens or ()) - set(model.generation_config.suppress_tokens or ())
    if others:
        raise ValueError(
            f"`thought_suppress_tokens` has {min(others)}, which text may hold, and a plain model writes both alike. Add it to "
            "`suppress_tokens` of the model's generation config, or train without it."
        )
    names = (settings.thought_start_text, settings.thought_end_text)
    if settings.thought_format == "embeddings":
        names = _make_tokens(model, tokenizer)
    _open(tokenizer, settings, marks, names[0])
    if tokenizer.chat_template is not None:
        tokenizer.response_template = _thought_apart(tokenizer, eos_ids(model, tokenizer), names[1])
    model.generation_config.do_sample = True
    model.__class__ = model._plain_class  # type: ignore[assignment]  # which the thinking class is made of
    del model.quietstar, model.config.quietstar
    return names


def _make_tokens(model: ThinkingModel, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Makes two tokens of the learned start and end, and has the generation config write the end; returns their names."""
    if getattr(model.config.get_text_config(), "hidden_size_per_layer_input", None):
        raise ValueError(
            f"A {model.config.model_type} reads an embedding of each token in every layer, and start and end have none there; "
            "generate with this package."
        )
    stop = str(model.quietstar_settings.thought_stop_string)
    endings = list(islice(spellings(tokenizer, stop), MOST_SPELLINGS + 1))
    if not 0 < len(endings) <= MOST_SPELLINGS:
        found = f"more than {MOST_SPELLINGS:,}" if endings else "no"
        raise ValueError(
            f"`thought_stop_string` is {stop!r}, which this tokenizer can write in {found} ways: the end token "
            "follows each by an entry of the generation config. Train with a string that is one token."
        )
    names = _unused_names(tokenizer, model.quietstar_settings)
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in names])
    ids = [tokenizer.get_vocab()[name] for name in names]
    _add_rows(model, ids)
    _close(model.generation_config, endings, *ids)
    return names


def _unused_names(tokenizer: PreTrainedTokenizerBase, settings: QuietStarSettings) -> tuple[str, str]:
    """The first names that mean nothing yet: a new token takes the place of its name in every text, also in the stop string."""
    used = (settings.thought_stop_string, settings.thought_prompt, str(tokenizer.chat_template))
    known = [*tokenizer.get_vocab(), *(text for text in used if text)]
    return next(pair for pair in NAMES if not any(name in text for name in pair for text in known))


def _thought_apart(tokenizer: PreTrainedTokenizerBase, ends: set[int], end: str) -> dict:
    """A response template, by which what stands before the first end is the thought, and the rest the answer, up to a token that ends a text.
    What an own template of the tokenizer says of other fields, such as calls of tools, stays."""
    stops = {tokenizer.decode([i]) for i in ends}
    whole = {"content_args": {"strip": False}}
    # the prompt is no part of the answer, which begins within the thought
    thought = {"open_pattern": r"\A", "close": [end, *sorted(stops - {end})], **whole}
    content = {"close": sorted(stops), **whole} if stops else whole
    fields = dict((getattr(tokenizer, "response_template", None) or {}).get("fields", {}))
    fields.pop("thinking", None)  # another name of the same
    fields |= {"reasoning_content": thought, "content": content}
    return {"defaults": {"role": "assistant"}, "start_anchor_pattern": r"\Z", "fields": fields}


def _open(tokenizer: PreTrainedTokenizerBase, settings: QuietStarSettings, marks: Marks, start: str) -> None:
    """Has the chat template, if there is one, ask for a thought and open it, by the tokens that it was asked for and opened by."""
    if tokenizer.chat_template is None:
        return
    messages = [{"role": "user", "content": "1 plus 1"}]
    before = _tokens(tokenizer, messages)
    content, role = settings.thought_prompt, settings.thought_prompt_role
    if content is not None and role is not None:
        tokenizer.chat_template = opened(with_turn(tokenizer.chat_template, content, role), start)
    else:
        tokenizer.chat_template = opened(tokenizer.chat_template, (content or "") + start)
    start_ids = (tokenizer.get_vocab()[start],) if marks.start is None else marks.start
    if _tokens(tokenizer, messages) != [*before[: len(before) - len(marks.unread)], *marks.prompt, *start_ids]:
        raise ValueError(
            f"`thought_start_text` {start!r}, or `thought_prompt`, is joined by the tokenizer with the text before it, and would be other "
            "tokens than in training. Train with strings that stand by themselves; or merge an adapter (`trl-quietstar merge`), and "
            "open thoughts by token ids."
        )


def _tokens(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> list[int]:
    """Of messages to be answered, by the chat template."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _add_rows(model: ThinkingModel, ids: list[int]) -> None:
    """Gives tokens the embeddings of start and end. An LM head of its own gets its mean row for them, by which neither is likelier
    than one in V, since the mean of exponentials is at least the exponential of the mean."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    V, mean, bias = len(weight_of(head)), weight_of(head).mean(0), getattr(head, "bias", None)
    mean_bias = None if bias is None else bias.mean()
    embeddings = torch.stack([model.quietstar.start_embedding, model.quietstar.end_embedding])
    scale = _scale(table)
    model.resize_token_embeddings(max(V, max(ids) + 1), mean_resizing=False)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if weight_of(head) is not weight_of(table):
        weight_of(head)[ids] = mean
    if mean_bias is not None:
        head.bias[ids] = mean_bias  # type: ignore[index,union-attr]  # it has one
    weight_of(table)[ids] = (embeddings / scale).to(weight_of(table).dtype)


def _scale(table: torch.nn.Module) -> torch.Tensor:
    """What a table multiplies its rows by; Gemma's by the square root of the width."""
    row = weight_of(table).norm(dim=1).argmax()
    weight = weight_of(table)[row].double()
    return (table(row[None])[0].double() * weight).sum() / weight.square().sum()


def opened(template, start: str):
    """A chat template, or a `dict` of them, that opens a thought where the model is to go on; None where there is none."""
    if isinstance(template, dict):
        return {name: opened(one, start) for name, one in template.items()}
    if template is None:
        return None
    # Jinja drops a newline at the end of a template, which would not be the end any more
    return template.removesuffix("\n") + "{% if add_generation_prompt %}{{ " + quoted(start) + " }}{% endif %}"


def _close(config: GenerationConfig, endings: list[tuple[int, ...]], start: int, end: int) -> None:
    """Forces the end token after each way to end a thought, and forbids it elsewhere and the start token everywhere."""
    config.suppress_tokens = [*(config.suppress_tokens or ()), start]
    forced = [[[*ending, end], 2 * BIAS] for ending in endings]
    config.sequence_bias = [*(config.sequence_bias or ()), [[end], -BIAS], *forced]


def spellings(tokenizer: PreTrainedTokenizerBase, string: str) -> Iterator[tuple[int, ...]]:
    """The shortest runs of tokens that hold a string, the last of which completes it. The first may begin, and the last may go on,
    beyond the string."""
    n, texts = len(string), _texts(tokenizer)
    # by how much of the string is done after the token, and for the others before it
    beginning, inner, ending = defaultdict(list), defaultdict(list), defaultdict(list)
    for token, text in enumerate(texts):
        if string in text:
            yield (token,)
            continue
        for done in range(1, n):
            if text.endswith(string[:done]):
                beginning[done].append(token)
            if text.startswith(string[done:]):
                ending[done].append(token)
            elif text and string.startswith(text, done):
                inner[done].append((token, done + len(text)))

    def completions(done: int) -> Iterator[tuple[int, ...]]:
        yield from ((token,) for token in ending[done])
        for token, further in inner[done]:
            yield from ((token, *rest) for rest in completions(further))

    for done, tokens in beginning.items():
        yield from ((token, *rest) for token in tokens for rest in completions(done))


def _texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each token adds to a text."""
    before = tokenizer("abcdef", add_special_tokens=False)["input_ids"]  # at the start of a text some lose their space
    length = len(tokenizer.decode(before))
    decoded = tokenizer.batch_decode([[*before, i] for i in range(len(tokenizer))], clean_up_tokenization_spaces=False)
    return [text[length:] for text in decoded]


# That nothing is lost


@torch.no_grad()
def thoughtful_logits(model: ThinkingModel, text: torch.Tensor) -> torch.Tensor:
    """
    What a thinking model predicts of a text with a thought in it.

    Args:
        model ([`ThinkingModel`]):
            The model.
        text (`torch.Tensor` of shape `(1, 3n)`):
            Tokens: a prompt, a thought and an answer of equal lengths.

    Returns:
        `torch.Tensor` of shape `(1, 3n + S, V)`: logits of all next tokens, in float32, with S slots around the thought.
    """
    prompt, thought, answer = (embed_tokens(model, part) for part in text.chunk(3, dim=1))
    inputs = embedding_inputs(
        model, torch.cat([prompt, start_slots(model, 1), thought, end_slots(model, 1), answer], dim=1)
    )
    return model(**inputs).logits.float()


@torch.no_grad()
def plain_logits(model: PreTrainedModel, text: torch.Tensor, start: list[int], end: list[int]) -> torch.Tensor:
    """As [`thoughtful_logits`], of a plain model with tokens before and after the thought."""
    opening, closing = (torch.tensor([tokens], device=text.device) for tokens in (start, end))
    prompt, thought, answer = text.chunk(3, dim=1)
    return model(input_ids=torch.cat([prompt, opening, thought, closing, answer], dim=1)).logits.float()


def largest_difference(before: torch.Tensor, after: torch.Tensor, added: list[int]) -> float:
    """Of the log-probabilities that logits `(1, T, V)` of a thinking model and those of a plain one give to tokens other than those
    `added`, in nats."""
    kept = [token for token in range(after.shape[-1]) if token not in added and token < before.shape[-1]]
    return float((after[..., kept].log_softmax(-1) - before[..., kept].log_softmax(-1)).abs().max())
