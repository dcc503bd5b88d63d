"""Looking inside: the thoughts after each token of a text, and what they did to the prediction of the next tokens.

This module makes plain data, which [`page`] shows. Thoughts are measured against the same model without thoughts: a
gain is the mean over the talk of `log p_with - log p_without`, in nats. Where one thought must stand for a position, it
is the first one, because that is the thought that generation would have written. The others are alternatives.
"""

import math
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from ..learning.rewards import masked_mean
from ..text.batch import Text, Thoughts, talk_after
from ..text.transfer import to_host
from ..thinking.scoring import Scores, at_talk


CONTEXT_TOKENS = 12  # shown before a thought among the extremes
EXTREMES = 5  # most helpful thoughts that are listed, and least helpful ones
UNFINISHED = "\ufffd"  # a decoder writes this for bytes that are not a whole character yet


def token_pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """
    Splits the readable text of tokens into one piece a token. The pieces joined are the text.

    A token that ends in the middle of a character gets an empty piece. The token that completes the character gets all
    of it.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Decodes the tokens.
        ids (`list[int]`):
            Token ids.
    """
    # decoded with the last finished piece before it, because some tokenizers write a space only after another token
    pieces, start, read = [], 0, 0
    for end in range(1, len(ids) + 1):
        before, after = decoded(tokenizer, ids[start:read]), decoded(tokenizer, ids[start:end])
        if after.endswith(UNFINISHED) and end < len(ids):  # bytes that the last token leaves unfinished are shown
            pieces.append("")
        else:
            pieces.append(after[len(before) :])
            start, read = read, end
    return pieces


def decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of token ids, with spaces as the model wrote them."""
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)  # type: ignore[return-value]  # one list, one string


class ShownScores(NamedTuple):
    """
    The part of [`~thinking.scoring.Scores`] that inspection shows.

    Parameters:
        talk_logps (`torch.Tensor` of shape `(B, J, G, M)`):
            Log-probability in nats of each talk token after the thought.
        mixing_weights (`torch.Tensor` of shape `(B, J, G, M)`):
            Weight of the thought in that prediction.
        text_logps (`torch.Tensor` of shape `(B, T - 1)`):
            Log-probability in nats of each text token but the first, without thoughts.
    """

    talk_logps: torch.Tensor
    mixing_weights: torch.Tensor
    text_logps: torch.Tensor


def inspect_texts(
    tokenizer: PreTrainedTokenizerBase, text: Text, thoughts: Thoughts, scores: Scores | ShownScores
) -> list[dict]:
    """
    Describes every text of a batch token by token.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Decodes the tokens.
        text ([`Text`]):
            The batch.
        thoughts ([`Thoughts`]):
            The thoughts of the batch.
        scores ([`~thinking.scoring.Scores`] or [`ShownScores`]):
            The scores of these thoughts.

    Returns:
        `list[dict]`: for each document of the batch its `tokens`. Each token is a `dict` with

        - `piece` (`str`): its part of the readable text,
        - `nll_without` (`float`, or None if the token is not predicted): its negative log-likelihood in nats without
          thoughts,
        - `nll_with` (`float`, or None if no thought stands right before the token): its negative log-likelihood in nats
          after the first thought there,
        - `thoughts` (`list[dict]`): the thoughts after the token. Each has its `text`, its `gain` in nats over the talk tokens
          that rewards look at, the mean mixing `weight` over its talk, and `nll_with` of each talk token.
    """
    shown = (scores.talk_logps, scores.mixing_weights, scores.text_logps)
    token_ids, mask, *values = to_host([thoughts.token_ids, thoughts.mask, *shown])
    # everything below is read number by number, so it is read in the host's memory
    text, thoughts = text.host, Thoughts(thoughts.positions.host, token_ids, mask)
    talk_logps, mixing_weights, text_logps = values
    written = _written(tokenizer, text, thoughts, ShownScores(talk_logps, mixing_weights, text_logps))
    texts = []
    for b, documents in enumerate(text.document_ids):
        for document in range(1, int(documents.max()) + 1):  # 0 is padding
            places = (documents == document).nonzero().flatten().tolist()
            texts.append(_document(tokenizer, text, text_logps, written, b, places))
    return texts


def _written(
    tokenizer: PreTrainedTokenizerBase, text: Text, thoughts: Thoughts, scores: ShownScores
) -> dict[tuple[int, int], list[dict]]:
    """The thoughts after each token, by the token's row and index in the batch."""
    talk_length = scores.talk_logps.shape[-1]
    talk = talk_after(text, thoughts.positions, talk_length)
    counted, scored = talk.target_mask[:, :, None], talk.score_mask[:, :, None]
    gains = masked_mean(scores.talk_logps - at_talk(scores.text_logps, thoughts, talk_length), scored, dim=-1)
    weights = masked_mean(scores.mixing_weights, counted, dim=-1)
    nlls = (-scores.talk_logps).masked_fill(~counted, torch.nan)
    written: dict[tuple[int, int], list[dict]] = {}
    for b, j in thoughts.positions.mask.nonzero().tolist():
        length = int(talk.input_mask[b, j].sum())  # of the talk, which ends with its document
        written[b, int(thoughts.positions.index[b, j])] = [
            {
                "text": decoded(tokenizer, thoughts.token_ids[b, j, g][thoughts.mask[b, j, g]].tolist()),
                "gain": _rounded(gains[b, j, g]),
                "weight": _rounded(weights[b, j, g]),
                "nll_with": [_rounded(nll) for nll in nlls[b, j, g, :length]],
            }
            for g in range(thoughts.mask.shape[2])
        ]
    return written


def _document(
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    text_logps: torch.Tensor,
    written: dict[tuple[int, int], list[dict]],
    b: int,
    places: list[int],
) -> dict:
    """One document, whose tokens stand at `places` of row `b`."""
    pieces = token_pieces(tokenizer, text.input_ids[b, places].tolist())
    predicted = text.predicted()[b].tolist()
    tokens = []
    for piece, at in zip(pieces, places, strict=True):
        known = at > 0 and predicted[at - 1]  # the token before predicts this one
        before = written.get((b, at - 1))
        tokens.append(
            {
                "piece": piece,
                "nll_without": _rounded(-text_logps[b, at - 1]) if known else None,
                "nll_with": before[0]["nll_with"][0] if known and before else None,
                "thoughts": written.get((b, at), []),
            }
        )
    return {"tokens": tokens}


def _rounded(value: torch.Tensor) -> float | None:
    """A number with the digits that are worth showing; None for NaN and infinity, which JSON cannot hold."""
    return round(float(value), 5) if math.isfinite(value) else None


def summarize(texts: list[dict]) -> dict:
    """
    Summarizes inspected texts over all thoughts, alternatives included.

    Args:
        texts (`list[dict]`):
            The result of [`inspect_texts`].

    Returns:
        `dict` with

        - `texts`, `positions`, `thoughts` (`int`): their numbers,
        - `nll_without`, `nll_with` (`float`): mean negative log-likelihood in nats, both over the same talk tokens,
        - `weight` (`float`): the mean mixing weight,
        - `helped`, `hurt` (`list[dict]`): the most and the least helpful thoughts in order, at most one of a position.
          Each has its `thought` and `gain`, the index of its `text` and of its `token` there, the `context` before the
          thought and the `next` text after it.

        Means are None if there are no thoughts.
    """
    places = [(t, i) for t, text in enumerate(texts) for i, token in enumerate(text["tokens"]) if token["thoughts"]]
    thoughts = [thought for t, i in places for thought in texts[t]["tokens"][i]["thoughts"]]
    pairs = [
        (texts[t]["tokens"][i + 1 + m]["nll_without"], nll_with)
        for t, i in places
        for thought in texts[t]["tokens"][i]["thoughts"]
        for m, nll_with in enumerate(thought["nll_with"])
        if nll_with is not None
    ]
    excerpts = [_excerpts(texts, t, i) for t, i in places]
    # one thought of a position, since its alternatives mostly say the same
    best = [max(x, key=_gain) for x in excerpts if x]
    worst = [min(x, key=_gain) for x in excerpts if x]
    return {
        "texts": len(texts),
        "positions": len(places),
        "thoughts": len(thoughts),
        "nll_without": _mean([without for without, _ in pairs]),
        "nll_with": _mean([nll for _, nll in pairs]),
        "weight": _mean([thought["weight"] for thought in thoughts]),
        "helped": sorted((x for x in best if x["gain"] > 0), key=_gain, reverse=True)[:EXTREMES],
        "hurt": sorted((x for x in worst if x["gain"] < 0), key=_gain)[:EXTREMES],
    }


def _excerpts(texts: list[dict], t: int, i: int) -> list[dict]:
    """The thoughts of a position with the text around them; without thoughts whose gain is undefined."""
    tokens = texts[t]["tokens"]
    around = {
        "text": t,
        "token": i,
        "context": "".join(token["piece"] for token in tokens[max(i + 1 - CONTEXT_TOKENS, 0) : i + 1]),
        "next": "".join(token["piece"] for token in tokens[i + 1 : i + 1 + len(tokens[i]["thoughts"][0]["nll_with"])]),
    }
    return [
        {**around, "thought": thought["text"], "gain": thought["gain"]}
        for thought in tokens[i]["thoughts"]
        if thought["gain"] is not None
    ]


def _gain(excerpt: dict) -> float:
    return excerpt["gain"]


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
