"""A plain causal LM that thinks by itself, made of a thinking model: learned start and end become two tokens.

The model thinks once, at the end of a prompt, and its thought alone predicts what follows. That is an ordinary text: prompt, start,
thought, end, answer. So a plain model writes it, if a prompt ends with the start token, and if the end token follows the thought.
What writes the end token is `generation_config.sequence_bias`, which Transformers follows: it forces the token after the stop
string, and forbids it everywhere else.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice

import torch
from transformers import AddedToken, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..settings import QuietStarSettings
from .embeddings import embed_tokens, embed_vector, embedding_inputs, weight_of
from .heads import ThinkingModel


# Names of start and end: those that parsers of reasoning know, unless the tokenizer has them already
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
        `ValueError`: if its thoughts are of text or have a prompt, it thinks elsewhere than at the end of a prompt, drops a thought
            before the end of the text, or ends it by its length or by the EOS token.
    """
    if settings.thought_format == "text":
        raise ValueError(
            f"`thought_format` is 'text': thoughts are ordinary tokens, and the saved folder is a plain model already (merge an "
            f"adapter with `trl-quietstar merge`). Open a thought by {(settings.thought_prompt or '') + settings.thought_start_text!r} "
            "after a prompt."
        )
    if settings.thought_prompt is not None:
        raise ValueError(
            f"`thought_prompt` is {settings.thought_prompt!r}, which an exported chat template does not put before a learned start. "
            "Train with `thought_format='text'`, or generate with this package."
        )
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
    Turns a thinking model, in place, into the plain class of its family, with start and end among its tokens.

    The chat template opens the thought at the end of a prompt, and the generation config closes it.

    Args:
        model ([`ThinkingModel`]):
            What [`check_settings`] lets pass.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, which gains the two tokens.

    Returns:
        `tuple`: the start and the end token.

    Raises:
        `ValueError`: if the family looks up an embedding for each layer, text may hold a token that thoughts do not, or a thought's end
            can be written in too many ways.
    """
    settings = model.quietstar_settings
    others = set(settings.thought_suppress_tokens or ()) - set(model.generation_config.suppress_tokens or ())
    if others:
        raise ValueError(
            f"`thought_suppress_tokens` has {min(others)}, which text may hold, and a plain model writes both alike. Add it to "
            "`suppress_tokens` of the model's generation config, or train without it."
        )
    if getattr(model.config.get_text_config(), "hidden_size_per_layer_input", None):
        raise ValueError(
            f"A {model.config.model_type} reads an embedding of each token in every layer, and start and end have none there; "
            "generate with this package."
        )
    stop = str(settings.thought_stop_string)
    endings = list(islice(spellings(tokenizer, stop), MOST_SPELLINGS + 1))
    if not 0 < len(endings) <= MOST_SPELLINGS:
        found = f"more than {MOST_SPELLINGS:,}" if endings else "no"
        raise ValueError(
            f"`thought_stop_string` is {stop!r}, which this tokenizer can write in {found} ways: the end token "
            "follows each by an entry of the generation config. Train with a string that is one token."
        )
    names = next(pair for pair in NAMES if not any(name in tokenizer.get_vocab() for name in pair))
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in names])
    ids = [tokenizer.get_vocab()[name] for name in names]
    _add_rows(model, ids)
    tokenizer.chat_template = opened(tokenizer.chat_template, names[0])
    _close(model.generation_config, endings, *ids)
    model.__class__ = model._plain_class  # type: ignore[assignment]  # which the thinking class is made of
    del model.quietstar, model.config.quietstar
    return names


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
    return template.removesuffix("\n") + "{% if add_generation_prompt %}{{ " + json.dumps(start) + " }}{% endif %}"


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
        `torch.Tensor` of shape `(1, 3n + 2, V)`: logits of all next tokens, in float32.
    """
    heads = model.quietstar
    start, end = (embed_vector(model, vector)[None, None] for vector in (heads.start_embedding, heads.end_embedding))
    prompt, thought, answer = (embed_tokens(model, part) for part in text.chunk(3, dim=1))
    inputs = embedding_inputs(model, torch.cat([prompt, start, thought, end, answer], dim=1))
    return model(**inputs).logits.float()


@torch.no_grad()
def plain_logits(model: PreTrainedModel, text: torch.Tensor, start_and_end: list[int]) -> torch.Tensor:
    """As [`thoughtful_logits`], of a plain model with tokens for start and end."""
    start, end = (torch.tensor([[token]], device=text.device) for token in start_and_end)
    prompt, thought, answer = text.chunk(3, dim=1)
    return model(input_ids=torch.cat([prompt, start, thought, end, answer], dim=1)).logits.float()


def largest_difference(before: torch.Tensor, after: torch.Tensor, start_and_end: list[int]) -> float:
    """Of the log-probabilities that logits `(1, T, V)` of a thinking model and those of a plain one give to tokens other than start
    and end, in nats."""
    kept = [token for token in range(after.shape[-1]) if token not in start_and_end and token < before.shape[-1]]
    return float((after[..., kept].log_softmax(-1) - before[..., kept].log_softmax(-1)).abs().max())
