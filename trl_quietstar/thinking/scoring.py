"""Scoring thoughts: one differentiable forward gives every number that training needs.

It runs inside the call of the wrapped model, so that DDP, FSDP and autocast see an ordinary forward.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch

from ..branches.base import BranchCache, BranchPath
from ..branches.shared_prefix import SharedPrefixCache
from ..model.embeddings import LookupTape, embed_tokens, weight_of
from ..model.heads import ThinkingModel, suppressed_tokens
from ..model.lm_head import Drawn, Prediction, prediction_statistics, token_statistics
from ..model.marks import Marks, after_thought, closing_mask, end_slots, filler_slots, start_slots
from ..model.routing import Routing, router_loss
from ..text.batch import Branches, Talk, Text, Thoughts, gather, gather_hidden, talk_after
from ..text.transfer import to_device
from .lengths import encode_by_length, grow_once, runs_as_one
from .sampling import ThoughtSampler


@dataclass(frozen=True)
class ScoreRequest:
    """
    What to score, given to the model's forward as `quietstar_request`.

    Parameters:
        text ([`Text`]):
            The batch.
        thoughts ([`Thoughts`] or [`~thinking.sampling.ThoughtSampler`]):
            Thoughts that were sampled before; or how to sample them in this pass (`SharedPrefix` only).
        talk_length (`int`):
            M.
        path ([`BranchPath`]):
            How to get the hidden states.
        temperature (`float`):
            The sampling temperature; the policy's log-probabilities are taken at it.
        prediction (`str`):
            `"mixed"` or `"thought"`.
        branch_batch_size (`int`, *optional*):
            How many branches of each row are scored at once, as in [`~branches.base.BranchPath.encode`].
        cache ([`~branches.base.BranchCache`], *optional*):
            The text as it was read before, without gradient; it is then not read again.
        whole_text (`bool`):
            Whether statistics of the whole text are wanted. Otherwise they are 0 but where a prediction is mixed with the text's.
    """

    text: Text
    thoughts: Thoughts | ThoughtSampler
    talk_length: int
    path: BranchPath
    temperature: float = 1.0
    prediction: str = "mixed"
    branch_batch_size: int | None = None
    cache: BranchCache | None = None
    whole_text: bool = True

    def __call__(self, model: ThinkingModel) -> "Scores":
        return score(model, self)


class Scores(NamedTuple):
    """
    What scoring yields; log-probabilities and entropies in nats, 0 at masked places.

    A tuple, since every engine looks for tensors in tuples: DDP and FSDP set their hooks there, and accelerate turns what
    autocast left in half precision into float32.

    Parameters:
        thought_logps, thought_entropies, thought_values (`torch.Tensor` of shape `(B, J, G, L)`):
            Log-probability of each thought token under the policy, the entropy that it was drawn at, and the value of the
            state that it was drawn in.
        talk_logps, talk_correct (`torch.Tensor` of shape `(B, J, G, M)`):
            Log-probability of each talk token after the thought, and whether it is the most likely one.
        reader_logps (`torch.Tensor` of shape `(B, J, G, M)`):
            Log-probability of each talk token by the thought's prediction alone.
        mixing_weights (`torch.Tensor` of shape `(B, J, G, M)`):
            Weight of the thought in the prediction (1 with `prediction="thought"`).
        text_logps, text_correct (`torch.Tensor` of shape `(B, T - 1)`):
            Log-probability of each text token but the first without thoughts, and whether it is the most likely one.
        similarity (`torch.Tensor` of shape `(B, J, G)`):
            Cosine of the thought's mean hidden state and the hidden state at its position; no gradient.
        thoughts ([`Thoughts`]):
            Those that were scored.
        router_loss (`torch.Tensor`, *optional*):
            Load-balancing loss of a mixture of experts, a scalar.
    """

    thought_logps: torch.Tensor
    thought_entropies: torch.Tensor
    thought_values: torch.Tensor
    talk_logps: torch.Tensor
    talk_correct: torch.Tensor
    reader_logps: torch.Tensor
    mixing_weights: torch.Tensor
    text_logps: torch.Tensor
    text_correct: torch.Tensor
    similarity: torch.Tensor
    thoughts: Thoughts
    router_loss: torch.Tensor | None = None


class ThoughtScores(NamedTuple):
    """The part of [`Scores`] that does without talk: `thought_logps`, of shape `(B, J, G, L)`, and `text_logps` and
    `text_correct`, of shape `(B, T - 1)`."""

    thought_logps: torch.Tensor
    text_logps: torch.Tensor
    text_correct: torch.Tensor


def score(model: ThinkingModel, request: ScoreRequest) -> Scores:
    """
    Runs a text with its branches, and takes every statistic from their hidden states.

    Args:
        model ([`ThinkingModel`]):
            A model with heads.
        request ([`ScoreRequest`]):
            What to score.

    Returns:
        [`Scores`].
    """
    return score_each(model, [request])[0]


def score_each(model: ThinkingModel, requests: list[ScoreRequest]) -> list[Scores]:
    """Does what [`score`] does, for several batches. All of them are encoded first: FSDP2 frees the LM head once the backward has
    come to the layer below it, so that no head's gradient may be left for later. The model does not run for a batch that asks
    nothing, if it runs for another one."""
    runs = [not _asks_nothing(request) for request in requests]
    if not any(runs) or runs_as_one(model):
        runs = [True] * len(requests)
    encoded = [_encoded(model, request) if run else None for request, run in zip(requests, runs, strict=True)]
    return [
        _no_scores(model, request) if own is None else _scored(model, request, own)
        for request, own in zip(requests, encoded, strict=True)
    ]


def _asks_nothing(request: ScoreRequest) -> bool:
    """Whether a batch has no thought, and nothing to predict, as that of [`~text.divided.without_thoughts`]."""
    thoughts, text = request.thoughts, request.text.host
    return isinstance(thoughts, Thoughts) and not bool(thoughts.positions.host.mask.any() or text.predicted().any())


def _no_scores(model: ThinkingModel, request: ScoreRequest) -> Scores:
    """The scores of a batch that asks nothing, all 0. Its values are the value head's, which engines then find in the loss; all else
    that is trained is in the scores of the other batch."""
    text, thoughts = request.text, cast(Thoughts, request.thoughts)
    exact = torch.promote_types(model.quietstar.start_embedding.dtype, torch.float32)
    of_thought = torch.zeros(thoughts.mask.shape, dtype=exact, device=thoughts.mask.device)
    states = of_thought.new_zeros(*thoughts.mask.shape, weight_of(model.get_output_embeddings()).shape[1])
    of_talk = of_thought.new_zeros(*thoughts.mask.shape[:3], request.talk_length)
    of_text = of_thought.new_zeros(len(text.input_ids), text.input_ids.shape[1] - 1)
    return Scores(
        thought_logps=of_thought,
        thought_entropies=of_thought,
        thought_values=model.quietstar.values(states) * thoughts.mask,
        talk_logps=of_talk,
        talk_correct=of_talk.bool(),
        reader_logps=of_talk,
        mixing_weights=of_talk,
        text_logps=of_text,
        text_correct=of_text.bool(),
        similarity=of_thought[..., 0],
        thoughts=thoughts,
    )


def _scored(model: ThinkingModel, request: ScoreRequest, encoded: "_Encoding") -> Scores:
    """Every statistic of a batch, from its hidden states."""
    thoughts, hidden, L = encoded.thoughts, encoded.branches, encoded.thoughts.mask.shape[3]
    drawn_from = hidden[..., :L, :]
    policy = token_statistics(
        *(model, drawn_from, thoughts.token_ids, thoughts.host_mask),
        *(request.temperature, encoded.drawn, suppressed_tokens(model)),
    )
    values = model.quietstar.values(drawn_from) * thoughts.mask
    predicted = _predict(model, request, encoded)
    return Scores(
        thought_logps=policy.logps,
        thought_entropies=policy.entropies,
        thought_values=values,
        talk_logps=predicted.talk.logps,
        talk_correct=predicted.talk.correct,
        reader_logps=predicted.reader_logps,
        mixing_weights=predicted.weights,
        text_logps=predicted.text.logps,
        text_correct=predicted.text.correct,
        similarity=_similarity(encoded.text.detach(), hidden[..., 1 : L + 1, :].detach(), thoughts),
        thoughts=thoughts,
        router_loss=router_loss(model.config, encoded.routings),
    )


class _Predicted(NamedTuple):
    """Predictions of text tokens, `(B, T - 1)`, and of talk tokens, `(B, J, G, M)`; the log-probability of each talk token by the
    thought's prediction alone; and the thought's weight in the mixed one."""

    text: Prediction
    talk: Prediction
    reader_logps: torch.Tensor
    weights: torch.Tensor


def _predict(model: ThinkingModel, request: ScoreRequest, encoded: "_Encoding") -> _Predicted:
    """Predictions without and after thoughts. Logits are mixed: `z = w·z_thought + (1 − w)·z_text` (Quiet-STaR, section 4.2)."""
    text, thoughts, M = request.text, encoded.thoughts, request.talk_length
    G = thoughts.mask.shape[2]
    talk = talk_after(text, thoughts.positions, M)
    read = after_thought(encoded.branches, thoughts, encoded.closed, model.thought_marks.after)
    mask, host_mask = (x.target_mask[:, :, None].expand(-1, -1, G, -1) for x in (talk, talk.host))
    targets = talk.token_ids[:, :, None].expand(-1, -1, G, -1)
    predicts = text.host.predicted()
    if not request.whole_text:
        predicts = predicts & _mixed_places(talk.host, thoughts, predicts.shape[1]) & (request.prediction == "mixed")
    text_hidden, text_targets = encoded.text[:, :-1], text.input_ids[:, 1:]
    if request.prediction == "thought":
        plain = token_statistics(model, text_hidden, text_targets, predicts).prediction
        said = token_statistics(model, read, targets, host_mask).prediction
        return _Predicted(plain, said, said.logps, torch.ones_like(said.logps) * mask)
    index = thoughts.positions.host.index[..., None] + torch.arange(M)
    index = index.clamp(max=predicts.shape[1] - 1)[:, :, None]
    base = gather_hidden(encoded.text, to_device(index, read.device).expand_as(mask))
    weights = model.quietstar.mixing_head(base, read)
    plain, said, reader_logps = prediction_statistics(
        *(model, text_hidden, text_targets, predicts),
        *(read, index.expand_as(host_mask), weights, targets, host_mask),
    )
    return _Predicted(plain, said, reader_logps, weights * mask)


@dataclass(frozen=True)
class _Encoding:
    """
    What the model made of a text and its thoughts.

    Parameters:
        thoughts ([`Thoughts`]):
            The thoughts.
        text (`torch.Tensor` of shape `(B, T, H)`):
            Hidden states of the text.
        branches (`torch.Tensor` of shape `(B, J, G, 1 + L + after + M - 1, H)`):
            Hidden states of the branches, from the last slot before the thought on.
        closed (`torch.Tensor` of shape `(B, J, G)`, *optional*):
            Which thoughts have closed themselves; None where none can.
        routings (`list` of [`~model.routing.Routing`]):
            As in [`~branches.base.Encoded`].
        drawn ([`~model.lm_head.Drawn`], *optional*):
            Statistics of the thought tokens, where they were drawn on the way.
    """

    thoughts: Thoughts
    text: torch.Tensor
    branches: torch.Tensor
    closed: torch.Tensor | None
    routings: list[Routing]
    drawn: Drawn | None = None


def _encoded(model: ThinkingModel, request: ScoreRequest) -> _Encoding:
    """Runs text and branches; of thoughts that were sampled before, or that are sampled now."""
    text, thoughts = request.text, request.thoughts
    if isinstance(thoughts, ThoughtSampler):
        return _sample_and_encode(model, request, thoughts)
    model.thought_marks.check(text, thoughts.positions)
    talk = talk_after(text, thoughts.positions, request.talk_length)
    closed, marks, L = _closed(model, thoughts), model.thought_marks, thoughts.mask.shape[3]
    # where tokens open and close thoughts too, one gradient of the table for all
    embed = functools.partial(embed_tokens, model) if marks == Marks() else LookupTape(model)
    branches = _full_branches(model, thoughts, closed, talk, embed)
    lengths, slots = thoughts.host_mask.sum(-1).flatten(1), slice(marks.before, marks.before + L)
    encoded = encode_by_length(
        *(model, text, request.path, branches, thoughts, lengths, slots, request.branch_batch_size, request.cache)
    )
    hidden = encoded.branches.unflatten(1, thoughts.mask.shape[1:3])[..., marks.before - 1 :, :]
    return _Encoding(thoughts, encoded.text, hidden, closed, encoded.routings)


def _closed(model: ThinkingModel, thoughts: Thoughts) -> torch.Tensor | None:
    """Which thoughts have closed themselves, of shape `(B, J, G)`; None where none can."""
    return None if thoughts.filler else model.thought_marks.closed(thoughts.token_ids, thoughts.mask)


def _sample_and_encode(model: ThinkingModel, request: ScoreRequest, sampler: ThoughtSampler) -> _Encoding:
    """
    Samples thoughts and goes on to their talk in one graph: every token is processed once.

    A token is drawn from the forward of the slot before it. So once thoughts are sampled, only their last token, the end and the
    talk have not run yet.
    """
    text, embed = request.text, LookupTape(model)
    read = request.cache
    cache = read.again() if isinstance(read, SharedPrefixCache) else SharedPrefixCache(model, text, embed)
    thoughts, drawn_from, drawn = sampler.sample_in_graph(model, text, cache, embed)
    model.thought_marks.check(text, thoughts.positions)
    talk, closed = talk_after(text, thoughts.positions, request.talk_length), _closed(model, thoughts)
    seen = model.thought_marks.before + thoughts.mask.shape[3] - 1
    rest = _full_branches(model, thoughts, closed, talk, embed, seen)
    tail = grow_once(cache, rest, thoughts).unflatten(1, thoughts.mask.shape[1:3])
    hidden = torch.cat([drawn_from, tail], dim=3)
    return _Encoding(thoughts, cache.text_hidden, hidden, closed, [], drawn)


def score_thoughts(
    model: ThinkingModel,
    text: Text,
    thoughts: Thoughts,
    path: BranchPath,
    temperature: float = 1.0,
    start: bool = True,
    branch_batch_size: int | None = None,
    cache: BranchCache | None = None,
) -> ThoughtScores:
    """
    Scores the thought tokens and the text, without talk: what a reference model is asked for.

    Args:
        model ([`ThinkingModel`]):
            A model with heads.
        text ([`Text`]):
            The batch.
        thoughts ([`Thoughts`]):
            The sampled thoughts.
        path ([`BranchPath`]):
            How to get the hidden states.
        temperature (`float`):
            Divides the thought tokens' logits.
        start (`bool`):
            Whether the thought is opened as it was when it was sampled. Otherwise it is judged as plain text, by the no-thought
            model.
        branch_batch_size (`int`, *optional*), cache ([`~branches.base.BranchCache`], *optional*):
            As in [`ScoreRequest`].

    Returns:
        [`ThoughtScores`].
    """
    B, J, G, L = thoughts.token_ids.shape
    embeds = embed_tokens(model, thoughts.token_ids)[..., :-1, :]  # of all, lest the table be asked for nothing
    mask = thoughts.mask[..., :-1]
    before = model.thought_marks.before if start else 0
    if start:
        embeds = torch.cat([start_slots(model, B, J, G), embeds], dim=3)
        mask = torch.cat([thoughts.mask[..., :1].expand(-1, -1, -1, before), mask], dim=3)
    anchors = model.thought_marks.anchors(thoughts.anchors) if start else thoughts.anchors
    branches = Branches(anchors, embeds.flatten(1, 2), mask.flatten(1, 2))
    lengths = (thoughts.host_mask.sum(-1).flatten(1) - 1).clamp(min=0)  # the last token is not read
    slots = slice(before, before + L - 1)
    encoded = encode_by_length(model, text, path, branches, thoughts, lengths, slots, branch_batch_size, cache)
    text_hidden, hidden = encoded.text, encoded.branches.unflatten(1, (J, G))[..., max(before - 1, 0) :, :]
    if not start:  # the first token is predicted by the text itself
        first = gather_hidden(text_hidden, thoughts.positions.index)[:, :, None, None].expand(-1, -1, G, -1, -1)
        hidden = torch.cat([first, hidden], dim=3)
    suppressed = suppressed_tokens(model) if start else ()
    logps = token_statistics(
        model, hidden, thoughts.token_ids, thoughts.host_mask, temperature, suppressed=suppressed
    ).logps
    plain = token_statistics(model, text_hidden[:, :-1], text.input_ids[:, 1:], text.host.predicted())
    return ThoughtScores(logps, plain.logps, plain.correct)


def at_talk(values: torch.Tensor, thoughts: Thoughts, talk_length: int) -> torch.Tensor:
    """
    Looks up a statistic of the text's own predictions at the talk tokens.

    Args:
        values (`torch.Tensor` of shape `(B, T - 1)`):
            A statistic of each text token but the first.
        thoughts ([`Thoughts`]):
            The talk follows their positions.
        talk_length (`int`):
            M.

    Returns:
        `torch.Tensor` of shape `(B, J, 1, M)`.
    """
    index = thoughts.positions.index[..., None] + torch.arange(talk_length, device=values.device)
    return gather(values, index.clamp(max=values.shape[1] - 1))[:, :, None]


def _full_branches(
    model: ThinkingModel,
    thoughts: Thoughts,
    closed: torch.Tensor | None,
    talk: Talk,
    embed: Callable[[torch.Tensor], torch.Tensor],
    seen: int = 0,
) -> Branches:
    """The branches `start, thought, end, first M - 1 talk tokens`. A thought that has `closed` itself has no end. Embeddings of the
    first `seen` slots are left out, since the cache has these slots already; the mask is of all."""
    marks, (G, L) = model.thought_marks, thoughts.token_ids.shape[2:]
    left = max(seen - marks.before, 0)
    # a token is read only where another follows: the text's last token would predict nothing
    spoken_ids, spoken_mask = (
        x[:, :, None].expand(-1, -1, G, -1) for x in (talk.token_ids[..., :-1], talk.input_mask[..., 1:])
    )
    tokens = embed(torch.cat([thoughts.token_ids[..., left:], spoken_ids], dim=3))  # one gradient of the table for all
    thought, spoken = tokens.split([L - left, spoken_ids.shape[3]], dim=3)
    each, exists = thoughts.mask.shape[:3], thoughts.mask[..., 0]
    start = [start_slots(model, *each, embed=embed)] if seen == 0 else []
    if thoughts.filler:
        thought = filler_slots(model, start[0], L)
    opening = exists[..., None].expand(*each, marks.before)
    closing = closing_mask(exists, closed, marks.after)
    return Branches(
        anchors=marks.anchors(thoughts.anchors),
        embeds=torch.cat([*start, thought, end_slots(model, *each, embed=embed), spoken], dim=3).flatten(1, 2),
        mask=torch.cat([opening, thoughts.mask, closing, spoken_mask], dim=3).flatten(1, 2),
    )


def _mixed_places(talk: Talk, thoughts: Thoughts, width: int) -> torch.Tensor:
    """Mask of shape `(B, width)`: the text's predictions that are mixed with one after a thought. On the host, as `talk` is."""
    index = thoughts.positions.host.index[..., None] + torch.arange(talk.target_mask.shape[2])
    index = index.clamp(max=width - 1)
    mixed = torch.zeros(len(index), width, dtype=torch.long)
    return mixed.scatter_add_(1, index.flatten(1), talk.target_mask.long().flatten(1)) > 0


def _similarity(text_hidden: torch.Tensor, thought_hidden: torch.Tensor, thoughts: Thoughts) -> torch.Tensor:
    """Cosine, of shape `(B, J, G)`, of a thought's mean hidden state and that of the text at its position."""
    mask = thoughts.mask[..., None].to(thought_hidden.dtype)
    mean = (thought_hidden * mask).sum(3) / mask.sum(3).clamp(min=1)
    context = gather_hidden(text_hidden, thoughts.positions.index)[:, :, None]
    return torch.cosine_similarity(mean, context, dim=-1)
