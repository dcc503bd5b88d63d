"""How likely a given text is under the predictions that generation with thoughts would make.

All positions think at once, with the random numbers of greedy generation. So what greedy generation wrote gets the
log-probabilities that it was written with.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from ..branches.base import BranchCache, BranchPath
from ..branches.memory import CPU_TOKENS, Size, branches_without_graph, free_bytes, new_tokens
from ..branches.shared_prefix import SharedPrefix
from ..model.heads import ThinkingModel
from ..model.lm_head import normalized_entropy, token_statistics
from ..text.batch import Positions, Text, Thoughts, gather
from ..text.positions import is_difficult, positions_at, spaced
from ..text.transfer import to_device
from .drawing import SamplingSettings, fixed_draws, thought_sampling
from .sampling import ThoughtSampler, sample_thoughts
from .scoring import ScoreRequest, score
from .when import Thinking


# least positions of a group that ends where a row has no more of them, so that the row is left out of the groups that follow;
# on other devices than a CPU a few larger forwards cost less than many small ones
LEAST_GROUP = 16
GPU_LEAST_GROUP = 256


class TalkScores(NamedTuple):
    """The part of [`~thinking.scoring.Scores`] that is about talk tokens, each of shape `(B, J, G, M)`."""

    talk_logps: torch.Tensor
    talk_correct: torch.Tensor
    mixing_weights: torch.Tensor


@torch.no_grad()
def think_in_chunks(
    model: ThinkingModel,
    path: BranchPath,
    text: Text,
    positions: Positions,
    settings: SamplingSettings,
    draws: torch.Tensor,
    talk_length: int,
    prediction: str,
    cache: BranchCache | None = None,
) -> tuple[Thoughts, TalkScores]:
    """
    Writes and scores thoughts at any number of positions, as many at a time as memory allows.

    Args:
        model ([`ThinkingModel`]):
            A model with heads, in `eval()` mode.
        path ([`BranchPath`]):
            How to get hidden states.
        text ([`Text`]):
            The batch.
        positions ([`Positions`]):
            Where to think.
        settings ([`SamplingSettings`]):
            How thoughts are drawn.
        draws (`torch.Tensor` of shape `(B, J, G, L)`):
            A uniform number for each token, in the host's memory.
        talk_length (`int`):
            M.
        prediction (`str`):
            `"mixed"` or `"thought"`.
        cache ([`BranchCache`], *optional*):
            The text as this model read it. Without it the text is read here.

    Returns:
        `tuple`: [`Thoughts`] and [`TalkScores`].
    """
    cache = path.read(model, text) if cache is None else cache
    shape, device, host = draws.shape, text.input_ids.device, positions.host
    tokens = torch.zeros(shape, dtype=torch.long, device=device)
    mask = torch.zeros(shape, dtype=torch.bool, device=device)
    found: dict[str, torch.Tensor] = {}
    for i, (rows, at) in enumerate(_groups(model, path, text, positions, settings, talk_length)):
        everyone = len(rows) == shape[0]
        index = torch.tensor(rows)
        group = Positions(host.index[index, at], host.mask[index, at]).to(device)
        own = cache if i == 0 and everyone else cache.again(None if everyone else index)
        part = text if everyone else text.rows(index)
        request = ScoreRequest(
            part,
            _thoughts(model, path, part, group, settings, draws[index, at], own),
            talk_length,
            path,
            prediction=prediction,
            cache=own,
            whole_text=False,
        )
        scores = score(model, request)
        L = scores.thoughts.mask.shape[3]
        index = to_device(index, device)
        tokens[index, at, :, :L], mask[index, at, :, :L] = scores.thoughts.token_ids, scores.thoughts.mask
        for name in TalkScores._fields:
            values = getattr(scores, name)
            found.setdefault(name, values.new_zeros(*shape[:3], talk_length))[index, at] = values
    return Thoughts(positions, tokens, mask), TalkScores(**found)


def _thoughts(
    model: ThinkingModel,
    path: BranchPath,
    text: Text,
    positions: Positions,
    settings: SamplingSettings,
    draws: torch.Tensor,
    cache: BranchCache,
) -> Thoughts | ThoughtSampler:
    """The thoughts of a group; or, where a path can draw tokens in the forwards that score them, how to sample them there."""
    if type(path) is SharedPrefix:
        return ThoughtSampler(settings, [], "all", given=(positions, draws))
    return sample_thoughts(model, cache, positions, settings, draws)


def _groups(
    model: ThinkingModel,
    path: BranchPath,
    text: Text,
    positions: Positions,
    settings: SamplingSettings,
    talk_length: int,
) -> Iterator[tuple[list[int], slice]]:
    """
    Cuts positions into groups that fit into memory. A row that has no more positions is in no further group.

    Yields:
        `tuple`: the group's rows, and its slice of J.
    """
    counts = positions.host.mask.sum(1).tolist()
    counts = counts if any(counts) else [1] * len(counts)
    on_cpu, G = text.input_ids.device.type == "cpu", settings.num_thoughts
    marks = model.thought_marks
    slots = marks.slots(settings.thought_length, talk_length)
    new = talk_length + marks.after + 1 if type(path) is SharedPrefix else slots
    free, start = free_bytes(text.input_ids.device), 0
    while start < max(counts):
        rows = [row for row, count in enumerate(counts) if count > start]
        size = Size(len(rows), text.input_ids.shape[1], G * (max(counts) - start), slots)
        fitting = branches_without_graph(model, path, size, new, free)
        if on_cpu:
            fitting = min(fitting, CPU_TOKENS // (len(rows) * new_tokens(path, size, slots)))
        least = start + (LEAST_GROUP if on_cpu else GPU_LEAST_GROUP)
        # as far as the next row that ends, which is then left out
        wanted = min((count for count in counts if count >= least), default=max(counts))
        stop = min(wanted, start + max(fitting // G, 1))
        yield rows, slice(start, stop)
        start = stop


@torch.no_grad()
def log_likelihoods(
    model: ThinkingModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    score_mask: torch.Tensor | None = None,
    thinking: Thinking | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Computes log-likelihoods of texts, and thinks before their tokens as greedy generation would.

    Args:
        model ([`ThinkingModel`]):
            A thinking model, in `eval()` mode.
        input_ids (`torch.Tensor` of shape `(B, T)`):
            The texts.
        attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
            1 on text; padding on either side.
        score_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
            1 on the tokens to score, which are a run in each row; the tokens before it are the prompt. Defaults to all tokens
            but the first.
        thinking ([`~thinking.when.Thinking`], *optional*):
            When to think. Defaults to always.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            For models whose thoughts may end early. Defaults to the one beside the model.

    Returns:
        `tuple`: log-probabilities in nats and whether each token is the most likely one (bool), both of shape `(B, T - 1)`,
        for all tokens but the first; 0 and False where nothing is scored.
    """
    thinking, text = thinking or Thinking(), Text.from_batch(input_ids, attention_mask)
    wanted = text.host.predicted()
    if score_mask is not None:
        wanted &= score_mask[:, 1:].bool().cpu()
    if tokenizer is not None:
        model.thought_tokenizer(tokenizer)  # by which the check of the paths below opens thoughts
    path = model.thought_path
    cache = path.read(model, text)
    plain = token_statistics(model, cache.text_hidden[:, :-1], input_ids[:, 1:], wanted)
    logps, correct = plain.logps, plain.correct
    positions = _positions(model, cache.text_hidden[:, :-1], wanted, thinking)
    if not bool(positions.mask.any()):
        return logps, correct
    settings = thought_sampling(model.quietstar_settings, model.thought_tokenizer(tokenizer))
    if thinking.greedy:
        settings = replace(settings, do_sample=False)
    draws = fixed_draws(text.host.position_ids.gather(1, positions.index), settings)
    ends = _ends(wanted, positions)
    reach = min(thinking.span, int((ends - positions.index).max()))
    _, scores = think_in_chunks(
        model,
        path,
        text,
        positions.to(input_ids.device),
        settings,
        draws,
        reach,
        model.quietstar_settings.prediction,
        cache,
    )
    served = positions.index[..., None] + torch.arange(reach)  # (B, J, M): the places that each thought is read for
    valid = positions.mask[..., None] & (served < ends[..., None])
    valid &= gather(wanted, served.clamp(max=wanted.shape[1] - 1))
    b, j, m = to_device(valid.nonzero().T.contiguous(), logps.device).unbind()
    place = to_device(served[valid], logps.device)
    logps[b, place] = scores.talk_logps[b, j, 0, m].to(logps.dtype)
    correct[b, place] = scores.talk_correct[b, j, 0, m].to(correct.dtype)
    return logps, correct


def _positions(model: ThinkingModel, hidden: torch.Tensor, wanted: torch.Tensor, thinking: Thinking) -> Positions:
    """
    Where generation would think, in the host's memory: at the first place where a thought is due, and again as soon as one may
    follow it.

    `hidden`, of shape `(B, T - 1, H)`, predicts the tokens that are `wanted`, a mask of shape `(B, T - 1)` on the host.
    """
    due = wanted
    if thinking.mode == "never":
        due = torch.zeros_like(wanted)
    elif thinking.mode == "adaptive":
        due = wanted & is_difficult(normalized_entropy(model, hidden), thinking.threshold).cpu()
    return positions_at(spaced(due, thinking.distance))


def _ends(wanted: torch.Tensor, positions: Positions) -> torch.Tensor:
    """Of shape `(B, J)`: where a thought's predictions end at the latest, at the next thought or the last wanted token."""
    last = (wanted * torch.arange(1, wanted.shape[1] + 1)).amax(1, keepdim=True)
    following = torch.where(positions.mask, positions.index, last)[:, 1:]
    return torch.where(positions.mask, torch.cat([following, last], dim=1), positions.index)
