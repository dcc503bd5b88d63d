"""Scoring sampled thoughts: one differentiable forward gives every number that training needs.

This is what runs inside the wrapped `model(...)` call, so that DDP, FSDP and autocast see an ordinary forward.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..branches.base import BranchCache, BranchPath, Encoded
from ..branches.shared_prefix import SharedPrefixCache
from ..model.embeddings import LookupTape, embed_tokens
from ..model.heads import ThinkingModel
from ..model.lm_head import Drawn, prediction_statistics, token_statistics
from ..model.routing import Routing, has_router_loss, router_loss
from ..model.sharding import model_is_sharded
from ..text.batch import Branches, Talk, Text, Thoughts, gather_hidden, talk_after
from ..text.transfer import to_device
from .sampling import ThoughtSampler
from .writing import end_slots, start_slots


LEAST_SAVED = 4096  # tokens: an accelerator runs fewer in the time that it takes to launch a forward of their own


@dataclass(frozen=True)
class ScoreRequest:
    """
    What to score, given to the model's forward as `quietstar_request`.

    Parameters:
        text ([`Text`]):
            The batch.
        thoughts ([`Thoughts`] or [`~thinking.sampling.ThoughtSampler`]):
            The sampled thoughts; or how to sample them in the same pass, whose graph is kept (`SharedPrefix` only).
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
            The text as it was read before, without gradient.
        whole_text (`bool`):
            Whether statistics of all of the text are wanted, or only of what predictions are mixed with.
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
    Runs `[text | start thought end talk]` and reads off every statistic.

    Args:
        model ([`ThinkingModel`]):
            A model with heads.
        request ([`ScoreRequest`]):
            What to score.

    Returns:
        [`Scores`].
    """
    text, M = request.text, request.talk_length
    if isinstance(request.thoughts, ThoughtSampler):
        encoded = _sample_and_encode(model, request, request.thoughts)
    else:
        encoded = _encode(model, request, request.thoughts)
    thoughts, text_hidden, hidden = encoded.thoughts, encoded.text, encoded.branches
    G, L = thoughts.token_ids.shape[2:]
    talk = talk_after(text, thoughts.positions, M)
    drawn_from = hidden[..., :L, :]
    policy = token_statistics(
        model, drawn_from, thoughts.token_ids, thoughts.host_mask, request.temperature, encoded.drawn
    )
    values = model.quietstar.values(drawn_from) * thoughts.mask

    read = hidden[..., L + 1 :, :]
    mask, host_mask = (x.target_mask[:, :, None].expand(-1, -1, G, -1) for x in (talk, talk.host))
    targets = talk.token_ids[:, :, None].expand(-1, -1, G, -1)
    predicts = text.host.predicted()
    if not request.whole_text:
        predicts = predicts & _mixed_with(talk.host, thoughts, predicts) & (request.prediction == "mixed")
    if request.prediction == "mixed":
        index = thoughts.positions.host.index[..., None] + torch.arange(M)
        index = index.clamp(max=predicts.shape[1] - 1)[:, :, None]
        base = gather_hidden(text_hidden, to_device(index, hidden.device).expand_as(mask))
        weights = model.quietstar.mixing_head(base, read)
        plain, said, reader_logps = prediction_statistics(
            *(model, text_hidden[:, :-1], text.input_ids[:, 1:], predicts),
            *(read, index.expand_as(host_mask), weights, targets, host_mask),
        )
    else:
        plain = token_statistics(model, text_hidden[:, :-1], text.input_ids[:, 1:], predicts).prediction
        said = token_statistics(model, read, targets, host_mask).prediction
        reader_logps, weights = said.logps, torch.ones_like(said.logps)
    return Scores(
        thought_logps=policy.logps,
        thought_entropies=policy.entropies,
        thought_values=values,
        talk_logps=said.logps,
        talk_correct=said.correct,
        reader_logps=reader_logps,
        mixing_weights=weights * mask,
        text_logps=plain.logps,
        text_correct=plain.correct,
        similarity=_similarity(text_hidden.detach(), hidden[..., 1 : L + 1, :].detach(), thoughts),
        thoughts=thoughts,
        router_loss=router_loss(model.config, encoded.routings),
    )


@dataclass(frozen=True)
class _Encoding:
    """Hidden states of the text, `(B, T, H)`, and of the thoughts' branches, `(B, J, G, S, H)`; what is known of thought
    tokens that were drawn on the way; and routings as in [`~branches.base.Encoded`]."""

    thoughts: Thoughts
    text: torch.Tensor
    branches: torch.Tensor
    routings: list[Routing]
    drawn: Drawn | None = None


def _encode(model: ThinkingModel, request: ScoreRequest, thoughts: Thoughts) -> _Encoding:
    """Runs text and branches of thoughts that were sampled before."""
    text = request.text
    talk = talk_after(text, thoughts.positions, request.talk_length)
    branches = _full_branches(model, thoughts, talk, functools.partial(embed_tokens, model))
    L = thoughts.mask.shape[3]
    lengths = thoughts.host_mask.sum(-1).flatten(1)
    encoded = _encode_by_length(
        *(model, text, request.path, branches, lengths, slice(1, L + 1), request.branch_batch_size, request.cache)
    )
    return _Encoding(thoughts, encoded.text, encoded.branches.unflatten(1, thoughts.mask.shape[1:3]), encoded.routings)


def _encode_by_length(
    model: ThinkingModel,
    text: Text,
    path: BranchPath,
    branches: Branches,
    lengths: torch.Tensor,
    slots: slice,
    batch_size: int | None,
    cache: BranchCache | None,
) -> Encoded:
    """
    What [`~branches.base.BranchPath.encode`] gives. Where the lengths of thoughts, `(B, N)` in the host's memory, differ much, long and short
    ones have forwards of their own, which leave out those of the thought's `slots` that none of them has.
    """
    (B, N, S), T, L = branches.mask.shape, text.input_ids.shape[1], slots.stop - slots.start
    order = lengths.argsort(dim=1, descending=True, stable=True)
    blocks = _by_length(lengths.gather(1, order).amax(0).tolist())
    saved = N * S + T - sum((stop - start) * (S - L + longest) + T for start, stop, longest in blocks)
    worthwhile = branches.mask.device.type == "cpu" or B * saved >= LEAST_SAVED * len(blocks)
    if 2 * saved < N * S + T or not worthwhile or has_router_loss(model.config) or model_is_sharded(model):
        return path.encode(model, text, branches, batch_size, cache)
    rows, parts, text_hidden = torch.arange(B)[:, None], [], None
    for start, stop, longest in blocks:
        columns, end = order[:, start:stop], slots.start + longest
        places = tuple(to_device(x, branches.mask.device) for x in (rows, columns))
        kept = to_device(torch.cat([torch.arange(end), torch.arange(slots.stop, S)]), branches.mask.device)
        embeds, mask = (x[places].index_select(2, kept) for x in (branches.embeds, branches.mask))
        block = Branches(branches.anchors.gather(1, columns), embeds, mask)
        encoded = path.encode(model, text, block, batch_size, cache)
        text_hidden, hidden = encoded.text if text_hidden is None else text_hidden, encoded.branches
        left_out = hidden.new_zeros(B, stop - start, L - longest, hidden.shape[-1])
        parts.append(torch.cat([hidden[:, :, :end], left_out, hidden[:, :, end:]], dim=2))
    back = tuple(to_device(x, branches.mask.device) for x in (rows, order.argsort(dim=1)))
    return Encoded(text_hidden, torch.cat(parts, dim=1)[back], [])  # type: ignore[arg-type]


def _by_length(longest: list[int]) -> list[tuple[int, int, int]]:
    """Runs of columns, by first and last plus one, whose lengths, in descending order, halve from one to the next; and the
    greatest length of each."""
    blocks, start = [], 0
    for column in range(1, len(longest) + 1):
        if column == len(longest) or (longest[column] < longest[start] and 2 * longest[column] <= longest[start]):
            blocks.append((start, column, longest[start]))
            start = column
    return blocks


def _sample_and_encode(model: ThinkingModel, request: ScoreRequest, sampler: ThoughtSampler) -> _Encoding:
    """
    Samples thoughts and goes on to their talk in one graph: every token is processed once.

    The forwards that draw the tokens are those of the slots before them; what is left is the last thought token, the end
    and the talk.
    """
    text, embed = request.text, LookupTape(model)
    read = request.cache
    cache = read.again() if isinstance(read, SharedPrefixCache) else SharedPrefixCache(model, text, embed)
    thoughts, drawn_from, drawn = sampler.sample_in_graph(model, text, cache, embed)
    talk = talk_after(text, thoughts.positions, request.talk_length)
    rest = _full_branches(model, thoughts, talk, embed, seen=thoughts.mask.shape[3])
    tail = cache.grow(rest.anchors, rest.embeds, rest.mask).unflatten(1, thoughts.mask.shape[1:3])
    hidden = torch.cat([drawn_from, tail], dim=3)
    return _Encoding(thoughts, cache.text_hidden, hidden, [], drawn)


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
    The thought tokens alone, and the text: what a reference model is asked for.

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
            Whether the start embedding precedes the thought. Without it the thought is judged as plain text, by the
            no-thought model.
        branch_batch_size (`int`, *optional*), cache ([`~branches.base.BranchCache`], *optional*):
            As in [`ScoreRequest`].

    Returns:
        [`ThoughtScores`].
    """
    B, J, G, L = thoughts.token_ids.shape
    embeds = embed_tokens(model, thoughts.token_ids[..., :-1])
    mask = thoughts.mask[..., :-1]
    if start:
        embeds = torch.cat([start_slots(model, B, J, G, 1), embeds], dim=3)
        mask = torch.cat([thoughts.mask[..., :1], mask], dim=3)
    branches = Branches(thoughts.anchors, embeds.flatten(1, 2), mask.flatten(1, 2))
    lengths = (thoughts.host_mask.sum(-1).flatten(1) - 1).clamp(min=0)  # the last token is not read
    slots = slice(int(start), int(start) + L - 1)
    encoded = _encode_by_length(model, text, path, branches, lengths, slots, branch_batch_size, cache)
    text_hidden, hidden = encoded.text, encoded.branches.unflatten(1, (J, G))
    if not start:  # the first token is predicted by the text itself
        first = gather_hidden(text_hidden, thoughts.positions.index)[:, :, None, None].expand(-1, -1, G, -1, -1)
        hidden = torch.cat([first, hidden], dim=3)
    logps = token_statistics(model, hidden, thoughts.token_ids, thoughts.host_mask, temperature).logps
    plain = token_statistics(model, text_hidden[:, :-1], text.input_ids[:, 1:], text.host.predicted())
    return ThoughtScores(logps, plain.logps, plain.correct)


def at_talk(values: torch.Tensor, thoughts: Thoughts, talk_length: int) -> torch.Tensor:
    """
    What the text's own predictions say of the talk tokens.

    Args:
        values (`torch.Tensor` of shape `(B, T - 1)`):
            A statistic of each text token but the first.
        thoughts ([`Thoughts`]):
            Whose positions are meant.
        talk_length (`int`):
            M.

    Returns:
        `torch.Tensor` of shape `(B, J, 1, M)`.
    """
    index = thoughts.positions.index[..., None] + torch.arange(talk_length, device=values.device)
    flat = index.clamp(max=values.shape[1] - 1).flatten(1)
    return values.gather(1, flat).view(index.shape)[:, :, None]


def _full_branches(
    model: ThinkingModel, thoughts: Thoughts, talk: Talk, embed: Callable[[torch.Tensor], torch.Tensor], seen: int = 0
) -> Branches:
    """`start, thought, end, first M - 1 talk tokens` at every position, without the embeddings of the first `seen`
    slots."""
    (G, L), left = thoughts.token_ids.shape[2:], max(seen - 1, 0)
    # a token is read only where another follows: the text's last token would predict nothing
    spoken_ids, spoken_mask = (
        x[:, :, None].expand(-1, -1, G, -1) for x in (talk.token_ids[..., :-1], talk.input_mask[..., 1:])
    )
    tokens = embed(torch.cat([thoughts.token_ids[..., left:], spoken_ids], dim=3))  # one gradient of the table for all
    thought, spoken = tokens.split([L - left, spoken_ids.shape[3]], dim=3)
    one_each = (*thoughts.mask.shape[:3], 1)
    start, end = start_slots(model, *one_each), end_slots(model, *one_each)
    if thoughts.filler:
        thought = start.expand_as(thought)
    exists = thoughts.mask[..., :1]
    return Branches(
        anchors=thoughts.anchors,
        embeds=torch.cat([*([start] if seen == 0 else []), thought, end, spoken], dim=3).flatten(1, 2),
        mask=torch.cat([exists, thoughts.mask, exists, spoken_mask], dim=3).flatten(1, 2),
    )


def _mixed_with(talk: Talk, thoughts: Thoughts, predicts: torch.Tensor) -> torch.Tensor:
    """Mask like that of the places that predict, `(B, T - 1)`: whose predictions are mixed with those after a thought."""
    offsets = torch.arange(talk.target_mask.shape[2], device=predicts.device)
    index = (thoughts.positions.host.index[..., None] + offsets).clamp(max=predicts.shape[1] - 1)
    mixed = torch.zeros_like(predicts, dtype=torch.long)
    return mixed.scatter_add_(1, index.flatten(1), talk.target_mask.long().flatten(1)) > 0


def _similarity(text_hidden: torch.Tensor, thought_hidden: torch.Tensor, thoughts: Thoughts) -> torch.Tensor:
    mask = thoughts.mask[..., None].to(thought_hidden.dtype)
    mean = (thought_hidden * mask).sum(3) / mask.sum(3).clamp(min=1)
    context = gather_hidden(text_hidden, thoughts.positions.index)[:, :, None]
    return torch.cosine_similarity(mean, context, dim=-1)
