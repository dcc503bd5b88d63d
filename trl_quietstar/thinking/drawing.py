"""How the tokens of thoughts are drawn: settings, random numbers, and the arithmetic.

A token is drawn by inverting the distribution's cumulative sum at a given uniform number. So a thought is a function
of the model, the text up to its position, and its own random numbers: equal on every path and in any batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import LogitsProcessorList, PreTrainedTokenizerBase, StopStringCriteria
from transformers.generation import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..model.heads import ThinkingModel
from ..model.lm_head import Drawn, logits_by_rows
from ..model.tiles import scratch
from ..settings import QuietStarSettings
from ..text.batch import Positions
from ..text.positions import seeded_generators


BLOCK = 128  # tokens of the vocabulary whose probabilities are summed first when one is drawn


@dataclass(frozen=True)
class SamplingSettings:
    """
    How thoughts are drawn.

    Parameters:
        thought_length (`int`):
            L, the most tokens.
        num_thoughts (`int`):
            G, thoughts a position.
        temperature, top_k, top_p, min_p:
            As in [`~transformers.GenerationConfig`]; `top_k=0`, `top_p=1.0` and `min_p=None` switch theirs off.
        do_sample (`bool`):
            Whether to sample; otherwise the most likely token is taken.
        min_thought_length (`int`):
            Least tokens before `stop` may end a thought.
        stop (`Callable`, *optional*):
            From token ids of shape `(rows, length)` to a bool of shape `(rows,)`: whether the thought ends here.
    """

    thought_length: int
    num_thoughts: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float | None = None
    do_sample: bool = True
    min_thought_length: int = 1
    stop: Callable[[torch.Tensor], torch.Tensor] | None = None

    def warpers(self) -> LogitsProcessorList:
        """Transformers' own logits warpers, in the order `generate` applies them."""
        warpers = LogitsProcessorList()
        if self.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k > 0:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            warpers.append(_TopP(self.top_p))
        if self.min_p is not None:
            warpers.append(MinPLogitsWarper(self.min_p))
        return warpers


def thought_end(tokenizer: PreTrainedTokenizerBase, stop_string: str | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    When a thought ends early: at the EOS token or a string.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Of the model.
        stop_string (`str`, *optional*):
            The string.

    Returns:
        `Callable` from thoughts so far, of shape `(rows, length)`, to a bool of shape `(rows,)`.

    Raises:
        `ValueError`: if the string cannot be told from the tokenizer's tokens.
    """
    try:
        criteria = None if stop_string is None else StopStringCriteria(tokenizer, [stop_string])
    except ValueError as error:  # it puts letters before each token and looks for them in what is decoded
        raise ValueError(
            f"`thought_stop_string` is {stop_string!r}, but this tokenizer does not decode what it was given, so that no "
            "string can be looked for; leave it out and set `min_thought_length`, at which the EOS token ends a thought."
        ) from error
    eos = -1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id

    def ends(token_ids: torch.Tensor) -> torch.Tensor:
        ended = token_ids[:, -1] == eos
        return ended if criteria is None else ended | criteria(token_ids, None)

    return ends


def thought_sampling(
    settings: QuietStarSettings, tokenizer: PreTrainedTokenizerBase | None, num_thoughts: int = 1
) -> SamplingSettings:
    """
    How a model draws its thoughts, by the settings it was trained with.

    Args:
        settings ([`~settings.QuietStarSettings`]):
            The model's.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Needed where thoughts may end early.
        num_thoughts (`int`):
            G.
    """
    stop = None
    if settings.min_thought_length is not None and tokenizer is not None:
        stop = thought_end(tokenizer, settings.thought_stop_string)
    return SamplingSettings(
        thought_length=settings.thought_length,
        num_thoughts=num_thoughts,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        min_thought_length=settings.min_thought_length or 1,
        stop=stop,
    )


def uniforms(positions: Positions, settings: SamplingSettings, generators: list[torch.Generator]) -> torch.Tensor:
    """Random numbers of shape `(B, J, G, L)`, in the host's memory; each sequence's come from its own generator, in
    position order."""
    B, J = positions.index.shape
    draws = torch.zeros(B, J, settings.num_thoughts, settings.thought_length, dtype=torch.float64)
    for row, count, generator in zip(draws, positions.host.mask.sum(1).tolist(), generators, strict=True):
        row[:count] = torch.rand(row[:count].shape, generator=generator, dtype=torch.float64)
    return draws


def fixed_draws(position_ids: torch.Tensor, settings: SamplingSettings, seed: int = 0) -> torch.Tensor:
    """
    The same random numbers for every thought at the same place of a text, whatever the batch and however far the text
    has come: what greedy generation and scoring think with.

    Args:
        position_ids (`torch.Tensor` of shape `(B, J)`):
            Of the thought positions; best in the host's memory.
        settings ([`SamplingSettings`]):
            How many thoughts and tokens.
        seed (`int`):
            Of all of them.

    Returns:
        `torch.Tensor` of shape `(B, J, G, L)`, in the host's memory.
    """
    places, inverse = position_ids.cpu().unique(return_inverse=True)
    shape = (settings.num_thoughts, settings.thought_length)
    rows = [
        torch.rand(shape, generator=generator, dtype=torch.float64)
        for generator in seeded_generators(seed, 0, places.tolist())
    ]
    return torch.stack(rows)[inverse]


@torch.no_grad()
def draw_tokens(
    model: ThinkingModel, hidden: torch.Tensor, draws: torch.Tensor, settings: SamplingSettings
) -> torch.Tensor:
    """Token ids of shape `(B, N)` for hidden states of shape `(B, N, H)` and uniform numbers of shape `(B, N)`."""
    warpers, u = settings.warpers(), draws.flatten()
    tokens = []
    for rows, logits in logits_by_rows(model, hidden.flatten(0, 1)):
        if settings.do_sample:
            warped = warpers(None, logits)  # type: ignore[arg-type]  # none reads the ids so far
            tokens.append(_invert(warped.sub_(warped.amax(-1, keepdim=True)).exp_(), u[rows]))
        else:
            tokens.append(logits.argmax(-1))
    return torch.cat(tokens).view(draws.shape)


@torch.no_grad()
def draw_with_statistics(
    model: ThinkingModel, hidden: torch.Tensor, draws: torch.Tensor, settings: SamplingSettings
) -> Drawn:
    """The same tokens, and what the policy at the sampling temperature says of them, from one set of logits."""
    shapers, u = replace(settings, temperature=1.0).warpers(), draws.flatten()
    parts = []
    for rows, logits in logits_by_rows(model, hidden.flatten(0, 1)):
        logits.div_(settings.temperature)
        top = logits.amax(-1, keepdim=True)
        shifted = logits.sub_(top)
        mass = torch.exp(
            shifted, out=scratch("weights", len(shifted), shifted.shape[1], shifted.dtype, shifted.device)
        )
        total = mass.sum(-1)
        if not settings.do_sample:
            token_ids = shifted.argmax(-1)
        else:
            token_ids = _invert(shapers(None, shifted).exp() if len(shapers) > 0 else mass, u[rows])  # type: ignore[arg-type]
        logps = shifted.gather(1, token_ids[:, None])[:, 0] - total.log()
        entropies = total.log() - shifted.mul_(mass).sum(-1) / total
        parts.append((token_ids, logps, entropies, top[:, 0] + total.log()))
    return Drawn(*(torch.cat(x).view(draws.shape) for x in zip(*parts, strict=True)))


def _invert(probs: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """
    The token at which the cumulative probability passes `u`, of shape `(rows,)`; probabilities, `(rows, V)`, are relative to
    the greatest, which is 1.

    The sum runs over blocks of the vocabulary first, then within one, so that no second array of `(rows, V)` is made. It is a
    sum of whole numbers: that of others depends on the order, which a GPU does not keep, and MPS knows no float64.
    """
    V = probs.shape[1]
    whole = V // BLOCK * BLOCK
    sums = torch.cat(
        [probs[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1), probs[:, whole:].sum(-1, keepdim=True)], dim=1
    )
    cumulative = _whole(sums).cumsum(-1)
    threshold = _share(cumulative, u[:, None])
    # of a sum that is NaN nothing is passed: a token as good as any is drawn
    block = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=sums.shape[1] - 1)
    mass = sums.gather(1, block)
    left = threshold - cumulative.gather(1, block) + _whole(mass)
    share = left.to(u.dtype) / _whole(mass)
    index = block * BLOCK + torch.arange(BLOCK, device=probs.device)
    within = _whole(probs.gather(1, index.clamp(max=V - 1)) * (index < V) / mass).cumsum(-1)
    offset = torch.searchsorted(within, _share(within, share.clamp(min=0)), right=True)
    return (block * BLOCK + offset)[:, 0].clamp_(max=V - 1)


class _TopP(TopPLogitsWarper):
    """Transformers' own, whose sum PyTorch refuses on CUDA under `full_determinism`; there it is of whole numbers."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.device.type == "cpu" or not torch.are_deterministic_algorithms_enabled():
            return super().__call__(input_ids, scores)
        ascending, index = scores.sort(-1)
        below = _whole(ascending.softmax(-1)).cumsum(-1) <= int((1 - self.top_p) * 2**40)
        below[:, -1] = False  # the likeliest token stays
        return scores.masked_fill(below.scatter(1, index, below), self.filter_value)


def _whole(probs: torch.Tensor) -> torch.Tensor:
    """Probabilities as multiples of 2^-40; a vocabulary of them still fits into 64 bits."""
    return (probs * 2.0**40).long()


def _share(cumulative: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """A share, from 0 to 1, of a cumulative sum's total, and always less than that: something is left to be passed."""
    total = cumulative[:, -1:]
    return torch.minimum((share * total).long(), total - 1)
