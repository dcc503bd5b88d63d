"""How the tokens of thoughts are drawn: settings, random numbers, and the arithmetic.

A token is drawn by inverting the distribution's cumulative sum at a given uniform number. So a thought is a function
of the model, the text up to its position, and its own random numbers: equal on every path and in any batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import LogitsProcessorList, PreTrainedTokenizerBase
from transformers.generation import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..model.heads import ThinkingModel
from ..model.lm_head import Drawn, logits_by_rows
from ..model.marks import string_end
from ..model.tiles import scratch, suppress_
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
            L, the most tokens of a thought.
        num_thoughts (`int`):
            G, the number of thoughts at a position.
        temperature, top_k, top_p, min_p:
            As in [`~transformers.GenerationConfig`]. With `top_k=0`, `top_p=1.0` and `min_p=None` no token is excluded.
        do_sample (`bool`):
            Whether to sample. Otherwise the most likely token is taken.
        min_thought_length (`int`):
            The least tokens of a thought that ends early.
        stop (`Callable`, *optional*):
            Whether thoughts end with their last token: from token ids of shape `(rows, length)` to a bool of shape `(rows,)`.
            By default thoughts have L tokens.
        suppressed (`tuple[int, ...]`):
            Ids of tokens that are never drawn.
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
    suppressed: tuple[int, ...] = ()

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
    Makes the `stop` of [`SamplingSettings`] that ends a thought at the EOS token, or at a string.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's tokenizer.
        stop_string (`str`, *optional*):
            A thought ends with the token that completes this string.

    Returns:
        `Callable` from token ids of shape `(rows, length)` to a bool of shape `(rows,)`.

    Raises:
        `ValueError`: if the string cannot be told from the tokenizer's tokens.
    """
    string = None if stop_string is None else string_end(tokenizer, stop_string, "`thought_stop_string`")
    eos = -1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id

    def ends(token_ids: torch.Tensor) -> torch.Tensor:
        ended = token_ids[:, -1] == eos
        return ended if string is None else ended | string(token_ids)

    return ends


def check_endings(settings: QuietStarSettings, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses, with a `ValueError`, thoughts that may end early where the tokenizer has nothing to end them with."""
    if (
        settings.min_thought_length is not None
        and settings.thought_stop_string is None
        and tokenizer.eos_token_id is None
    ):
        raise ValueError(
            f"`min_thought_length` is {settings.min_thought_length}, and the tokenizer has no EOS token that could end a thought; "
            "set `thought_stop_string`, or `tokenizer.eos_token`."
        )


def thought_sampling(
    settings: QuietStarSettings, tokenizer: PreTrainedTokenizerBase | None, num_thoughts: int = 1
) -> SamplingSettings:
    """
    [`SamplingSettings`] that draw thoughts as the model was trained to.

    Args:
        settings ([`~settings.QuietStarSettings`]):
            What the model remembers of its training.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The model's tokenizer. Without one, thoughts do not end early.
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
        suppressed=tuple(settings.thought_suppress_tokens or ()),
    )


def uniforms(positions: Positions, settings: SamplingSettings, generators: list[torch.Generator]) -> torch.Tensor:
    """
    Draws the random numbers that thoughts are written with; each sequence's come from its own generator.

    Args:
        positions ([`Positions`]):
            Where to think.
        settings ([`SamplingSettings`]):
            How many thoughts and tokens there are.
        generators (`list[torch.Generator]`):
            One for each sequence.

    Returns:
        `torch.Tensor` of shape `(B, J, G, L)`, between 0 and 1, in the host's memory.
    """
    B, J = positions.index.shape
    draws = torch.zeros(B, J, settings.num_thoughts, settings.thought_length, dtype=torch.float64)
    for row, count, generator in zip(draws, positions.host.mask.sum(1).tolist(), generators, strict=True):
        row[:count] = torch.rand(row[:count].shape, generator=generator, dtype=torch.float64)
    return draws


def fixed_draws(position_ids: torch.Tensor, settings: SamplingSettings, seed: int = 0) -> torch.Tensor:
    """
    Random numbers that depend on the place in a text alone, not on the batch or on what follows. Greedy generation and scoring
    think with them, so that a text has equal thoughts in both.

    Args:
        position_ids (`torch.Tensor` of shape `(B, J)`):
            Index of each thought position within its text; best in the host's memory.
        settings ([`SamplingSettings`]):
            How many thoughts and tokens there are.
        seed (`int`):
            Another seed gives other numbers.

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
    """
    Draws a token from each hidden state.

    Args:
        model ([`ThinkingModel`]):
            Whose LM head is used.
        hidden (`torch.Tensor` of shape `(B, N, H)`):
            Hidden states after the final norm.
        draws (`torch.Tensor` of shape `(B, N)` or `(B, N, K)`):
            Uniform numbers, one or several for each hidden state; not read with `do_sample=False`.
        settings ([`SamplingSettings`]):
            How to draw.

    Returns:
        `torch.Tensor` in the shape of `draws`: token ids.
    """
    warpers, u = settings.warpers(), _by_rows(draws)
    tokens = []
    for rows, logits in logits_by_rows(model, hidden.flatten(0, 1)):
        suppress_(logits, slice(0, logits.shape[1]), settings.suppressed)
        if settings.do_sample:
            warped = warpers(None, logits)  # type: ignore[arg-type]  # none reads the ids so far
            tokens.append(_invert(warped.sub_(warped.amax(-1, keepdim=True)).exp_(), u[rows]))
        else:
            tokens.append(logits.argmax(-1, keepdim=True).expand_as(u[rows]))
    return torch.cat(tokens).view(draws.shape)


@torch.no_grad()
def draw_with_statistics(
    model: ThinkingModel, hidden: torch.Tensor, draws: torch.Tensor, settings: SamplingSettings
) -> Drawn:
    """
    Draws the tokens that [`draw_tokens`] draws, and takes their statistics from the logits that they are drawn from.

    Args:
        model, hidden, draws, settings:
            As in [`draw_tokens`].

    Returns:
        [`~model.lm_head.Drawn`], of the policy at the sampling temperature: `top_k` and the like exclude tokens from drawing, and
        leave the statistics as they are.
    """
    # the temperature is applied below, before the statistics; the other warpers after them
    shapers, u = replace(settings, temperature=1.0).warpers(), _by_rows(draws)
    parts = []
    for rows, logits in logits_by_rows(model, hidden.flatten(0, 1)):
        logits = suppress_(logits.div_(settings.temperature), slice(0, logits.shape[1]), settings.suppressed)
        top = logits.amax(-1, keepdim=True)
        shifted = logits.sub_(top)
        mass = torch.exp(
            shifted, out=scratch("weights", len(shifted), shifted.shape[1], shifted.dtype, shifted.device)
        )
        total = mass.sum(-1)
        if not settings.do_sample:
            token_ids = shifted.argmax(-1, keepdim=True).expand_as(u[rows])
        else:
            token_ids = _invert(shapers(None, shifted).exp() if len(shapers) > 0 else mass, u[rows])  # type: ignore[arg-type]  # none reads the ids so far
        logps = shifted.gather(1, token_ids) - total.log()[:, None]
        entropies = total.log() - shifted.mul_(mass).sum(-1) / total
        of_rows = (x[:, None].expand_as(token_ids) for x in (entropies, top[:, 0] + total.log()))
        parts.append((token_ids, logps, *of_rows))
    return Drawn(*(torch.cat(x).view(draws.shape) for x in zip(*parts, strict=True)))


def _by_rows(draws: torch.Tensor) -> torch.Tensor:
    """Uniform numbers of shape `(B·N, K)`, from `(B, N)` or `(B, N, K)`."""
    return draws.flatten(0, 1) if draws.dim() == 3 else draws.reshape(-1, 1)


def _invert(probs: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """
    The least token k with `Σ_{i ≤ k} p_i > u · Σ_i p_i`, for probabilities of shape `(rows, V)`, whose greatest is 1, and each `u` of
    shape `(rows, K)`.

    The cumulative sum runs over blocks of the vocabulary first, then within a single block, so that no second array of
    `(rows, V)` is made. It adds whole numbers. A sum of fractions depends on the order, which a GPU does not keep, and MPS has no
    float64.
    """
    V = probs.shape[1]
    whole = V // BLOCK * BLOCK
    sums = torch.cat(
        [probs[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1), probs[:, whole:].sum(-1, keepdim=True)], dim=1
    )
    cumulative = _whole(sums).cumsum(-1)
    threshold = _share(cumulative, u)
    # nothing passes a sum that is NaN; clamping then draws some token, where the index would be none
    block = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=sums.shape[1] - 1)
    # within that block, the threshold as a share of the block's own mass
    mass = sums.gather(1, block)
    left = threshold - cumulative.gather(1, block) + _whole(mass)
    share = left.to(u.dtype) / _whole(mass)
    index = block[..., None] * BLOCK + torch.arange(BLOCK, device=probs.device)  # (rows, K, BLOCK)
    inside = probs.gather(1, index.clamp(max=V - 1).flatten(1)).view(index.shape)
    within = _whole(inside * (index < V) / mass[..., None]).cumsum(-1)
    offset = torch.searchsorted(within, _share(within, share.clamp(min=0)[..., None]), right=True)
    return (block * BLOCK + offset[..., 0]).clamp_(max=V - 1)


class _TopP(TopPLogitsWarper):
    """Transformers' own. On CUDA PyTorch refuses its cumulative sum under `full_determinism`; there whole numbers are added."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.device.type == "cpu" or not torch.are_deterministic_algorithms_enabled():
            return super().__call__(input_ids, scores)
        ascending, index = scores.sort(-1)
        below = _whole(ascending.softmax(-1)).cumsum(-1) <= int((1 - self.top_p) * 2**40)
        below[:, -1] = False  # the likeliest token stays
        return scores.masked_fill(below.scatter(1, index, below), self.filter_value)


def _whole(probs: torch.Tensor) -> torch.Tensor:
    """Probabilities as multiples of 2^-40. The sum of a vocabulary of them, below 2^23 tokens, fits into 64 bits."""
    return (probs * 2.0**40).long()


def _share(cumulative: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """The threshold at a share, from 0 to 1, of a cumulative sum's total. It is below the total, so that some token passes it."""
    total = cumulative[..., -1:]
    return torch.minimum((share * total).long(), total - 1)
