"""Looking inside: what was thought after each token of a text, and what it did to the prediction of what follows.

Plain data for [`inspection_page`], measured against the model itself without thoughts. A gain is the mean over the talk
of `log p_with - log p_without`, in nats. Where one thought must stand for a position, it is the first, which is what
generation would have written; the others are alternatives.
"""

import math
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from ..learning.rewards import masked_mean
from ..text.batch import Text, Thoughts, talk_after
from ..text.transfer import to_host
from ..thinking.scoring import Scores, at_talk


CONTEXT_TOKENS = 12
EXTREMES = 5  # most and least helpful thoughts
UNFINISHED = "\ufffd"  # what a decoder gives for bytes that are no character yet


def token_pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """
    What each token adds to the readable text, so that the pieces together are that text.

    A token that ends in the middle of a character adds nothing; the one that completes the character adds it all.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Decodes.
        ids (`list[int]`):
            Token ids.
    """
    pieces, start, read = [], 0, 0  # the window holds the last finished piece, on which a space may depend
    for end in range(1, len(ids) + 1):
        before, after = decoded(tokenizer, ids[start:read]), decoded(tokenizer, ids[start:end])
        if after.endswith(UNFINISHED) and end < len(ids):
            pieces.append("")
        else:
            pieces.append(after[len(before) :])
            start, read = read, end
    return pieces


def decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of token ids, spaces as they are."""
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)  # type: ignore[return-value]  # one in, one out


class ShownScores(NamedTuple):
    """The part of [`~thinking.scoring.Scores`] that is shown: `talk_logps` and `mixing_weights`, of shape `(B, J, G, M)`, and
    `text_logps`, of shape `(B, T - 1)`."""

    talk_logps: torch.Tensor
    mixing_weights: torch.Tensor
    text_logps: torch.Tensor


def inspect_texts(
    tokenizer: PreTrainedTokenizerBase, text: Text, thoughts: Thoughts, scores: Scores | ShownScores
) -> list[dict]:
    """
    Every text of a batch, token by token.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Decodes.
        text ([`Text`]), thoughts ([`Thoughts`]), scores ([`Scores`] or [`ShownScores`]):
            The batch, its thoughts, and their scores.

    Returns:
        `list[dict]`: for each text its `tokens`, each a `dict` with

        - `piece` (`str`): what it adds to the text,
        - `nll_without`, `nll_with` (`float`, or None where it is not predicted): its negative log-likelihood in nats,
          without thoughts and after the first thought right before it,
        - `thoughts`: those written after it, each with its `text`, its `gain` in nats, the mean mixing `weight` over
          its talk, and `nll_with` of each token that follows, as far as it is read.
    """
    text, thoughts, shown = _on_host(text, thoughts, scores)
    talk = talk_after(text, thoughts.positions, shown.talk_logps.shape[-1])
    logps_without = at_talk(shown.text_logps, thoughts, shown.talk_logps.shape[-1])
    gains = masked_mean(shown.talk_logps - logps_without, talk.target_mask[:, :, None], dim=-1)
    weights = masked_mean(shown.mixing_weights, talk.target_mask[:, :, None], dim=-1)
    nlls = (-shown.talk_logps).masked_fill(~talk.target_mask[:, :, None], torch.nan)
    written: dict[tuple[int, int], list[dict]] = {}
    for b, j in thoughts.positions.mask.nonzero().tolist():
        length = int(talk.input_mask[b, j].sum())
        written[b, int(thoughts.positions.index[b, j])] = [
            {
                "text": decoded(tokenizer, thoughts.token_ids[b, j, g][thoughts.mask[b, j, g]].tolist()),
                "gain": _number(gains[b, j, g]),
                "weight": _number(weights[b, j, g]),
                "nll_with": [_number(nll) for nll in nlls[b, j, g, :length]],
            }
            for g in range(thoughts.mask.shape[2])
        ]
    texts = []
    for b, documents in enumerate(text.document_ids):
        for document in range(1, int(documents.max()) + 1):
            places = (documents == document).nonzero().flatten().tolist()
            texts.append(_inspect_text(tokenizer, text, shown, written, b, places))
    return texts


def _on_host(text: Text, thoughts: Thoughts, scores: Scores | ShownScores) -> tuple[Text, Thoughts, ShownScores]:
    """What is read number by number below, in the host's memory."""
    shown = (scores.talk_logps, scores.mixing_weights, scores.text_logps)
    token_ids, mask, *values = to_host([thoughts.token_ids, thoughts.mask, *shown])
    return text.host, Thoughts(thoughts.positions.host, token_ids, mask), ShownScores(*values)


def _inspect_text(tokenizer, text: Text, scores: ShownScores, written: dict, b: int, places: list[int]) -> dict:
    """One document, whose tokens are at `places` of row `b`."""
    pieces = token_pieces(tokenizer, text.input_ids[b, places].tolist())
    predicted = text.predicted()[b].tolist()
    tokens = []
    for piece, at in zip(pieces, places, strict=True):
        known = at > 0 and predicted[at - 1]
        before = written.get((b, at - 1))
        tokens.append(
            {
                "piece": piece,
                "nll_without": _number(-scores.text_logps[b, at - 1]) if known else None,
                "nll_with": before[0]["nll_with"][0] if known and before else None,
                "thoughts": written.get((b, at), []),
            }
        )
    return {"tokens": tokens}


def _number(value: torch.Tensor) -> float | None:
    """Rounded to what is worth showing; None for what JSON cannot hold."""
    return round(float(value), 5) if math.isfinite(value) else None


def summarize(texts: list[dict]) -> dict:
    """
    The whole of what [`inspect_texts`] gave, all alternatives included.

    Args:
        texts (`list[dict]`):
            As it gave them.

    Returns:
        `dict`: `texts`, `positions` and `thoughts` (how many); `nll_without`, `nll_with` (nats, over the same talk
        tokens) and `weight`, None where there are no thoughts; `helped` and `hurt`, the most and the least helpful
        thoughts, the extreme one of a position, in order. Each has the `text` and `token` it stands at, its `context`,
        `thought`, `next` text and `gain`.
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
    """The thoughts of a position whose gain is a number, with the text around them."""
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
