"""Sampling thoughts: all positions at once, without gradient.

A token is drawn by inverting the distribution's cumulative sum at a given uniform number. So a thought is a function
of the model, the text up to its position, and its own random numbers: the same on either path and in any batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList, PreTrainedTokenizerBase, StopStringCriteria
from transformers.generation import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .embeddings import embed_tokens, embed_vector
from .geometry import Positions, Text, Thoughts, gather_hidden, seeded_generators
from .heads import QuietStarSettings, ThinkingModel
from .lm_head import logits_of, row_chunk
from .paths import Reader


MODES = ("always", "never", "adaptive")


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
            warpers.append(TopPLogitsWarper(self.top_p))
        if self.min_p is not None:
            warpers.append(MinPLogitsWarper(self.min_p))
        return warpers


@dataclass(frozen=True)
class Thinking:
    """
    When to think.

    Parameters:
        mode (`str`):
            `"always"`, or `"adaptive"`: where the no-thought prediction is uncertain.
        every (`int`):
            M, the tokens that one thought serves.
        threshold (`float`):
            Least no-thought entropy, divided by log V, to think at (adaptive).

    Raises:
        `ValueError`: if a value is outside its limits.
    """

    mode: str = "always"
    every: int = 1
    threshold: float = 0.6

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"`think` is {self.mode!r}; choose one of {', '.join(MODES)}.")
        if self.every < 1:
            raise ValueError(f"`think_every` is {self.every}, below its limit of 1; raise it.")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"`thinking_threshold` is {self.threshold}; it lies between 0 and 1.")


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
    """
    criteria = None if stop_string is None else StopStringCriteria(tokenizer, [stop_string])
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
        settings ([`~heads.QuietStarSettings`]):
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
    """Random numbers of shape `(B, J, G, L)`; each sequence's come from its own generator, in position order."""
    B, J = positions.index.shape
    draws = torch.zeros(B, J, settings.num_thoughts, settings.thought_length, dtype=torch.float64)
    for row, count, generator in zip(draws, positions.mask.sum(1).tolist(), generators, strict=True):
        row[:count] = torch.rand(row[:count].shape, generator=generator, dtype=torch.float64)
    return draws.to(positions.index.device)


def fixed_draws(position_ids: torch.Tensor, settings: SamplingSettings, seed: int = 0) -> torch.Tensor:
    """
    The same random numbers for every thought at the same place of a text, whatever the batch and however far the text
    has come: what greedy generation and scoring think with.

    Args:
        position_ids (`torch.Tensor` of shape `(B, J)`):
            Of the thought positions.
        settings ([`SamplingSettings`]):
            How many thoughts and tokens.
        seed (`int`):
            Of all of them.

    Returns:
        `torch.Tensor` of shape `(B, J, G, L)`.
    """
    places, inverse = position_ids.cpu().unique(return_inverse=True)
    shape = (settings.num_thoughts, settings.thought_length)
    rows = [
        torch.rand(shape, generator=generator, dtype=torch.float64)
        for generator in seeded_generators(seed, 0, places.tolist())
    ]
    return torch.stack(rows)[inverse].to(position_ids.device)


@torch.no_grad()
def sample_thoughts(
    model: ThinkingModel,
    reader: Reader,
    text: Text,
    positions: Positions,
    settings: SamplingSettings,
    draws: torch.Tensor,
) -> Thoughts:
    """
    Writes `num_thoughts` thoughts at every position (Quiet-STaR, section 4.1: parallel generation).

    Args:
        model ([`ThinkingModel`]):
            A model with heads, in `eval()` mode.
        reader ([`Reader`]):
            The text as this model read it; not used again after this call.
        text ([`Text`]):
            The batch.
        positions ([`Positions`]):
            Where to think.
        settings ([`SamplingSettings`]):
            How.
        draws (`torch.Tensor` of shape `(B, J, G, L)`):
            A uniform number for each token, as [`uniforms`] or [`fixed_draws`] gives them.

    Returns:
        [`Thoughts`] with tensors of shape `(B, J, G, L)`.
    """
    B, J = positions.index.shape
    G, L = settings.num_thoughts, settings.thought_length
    anchors = positions.index.repeat_interleave(G, dim=1)
    draws = draws.flatten(1, 2)
    embeds = embed_vector(model, model.quietstar.start_embedding).expand(B, J * G, -1)
    token_ids = torch.zeros(B, J * G, L, dtype=torch.long, device=anchors.device)
    mask = positions.mask.repeat_interleave(G, dim=1)[..., None].repeat(1, 1, L)
    running = mask[..., 0].clone()
    for step in range(L):
        mask[..., step] &= running
        hidden = reader.extend(anchors, embeds)
        token_ids[..., step] = draw_tokens(model, hidden, draws[..., step], settings)
        if settings.stop is not None and step + 1 >= settings.min_thought_length:
            running &= ~settings.stop(token_ids[..., : step + 1].flatten(0, 1)).view(B, J * G)
        embeds = embed_tokens(model, token_ids[..., step])
    shape = (B, J, G, L)
    return Thoughts(positions, token_ids.view(shape), mask.view(shape))


@torch.no_grad()
def greedy_continuation(model: ThinkingModel, reader: Reader, positions: Positions, length: int) -> torch.Tensor:
    """
    What the model would say after each position if it did not think: its most likely tokens, without start embedding.

    Args:
        model ([`ThinkingModel`]):
            A model with heads, in `eval()` mode.
        reader ([`Reader`]):
            The text as this model read it; not used again after this call.
        positions ([`Positions`]):
            Where.
        length (`int`):
            How many tokens.

    Returns:
        `torch.Tensor` of shape `(B, J, length)`.
    """
    greedy = SamplingSettings(length, do_sample=False)
    hidden = gather_hidden(reader.text_hidden, positions.index)
    unused = torch.zeros(positions.index.shape, dtype=torch.float64, device=hidden.device)
    tokens = [draw_tokens(model, hidden, unused, greedy)]
    while len(tokens) < length:
        hidden = reader.extend(positions.index, embed_tokens(model, tokens[-1]))
        tokens.append(draw_tokens(model, hidden, unused, greedy))
    return torch.stack(tokens, dim=-1)


def draw_tokens(
    model: ThinkingModel, hidden: torch.Tensor, draws: torch.Tensor, settings: SamplingSettings
) -> torch.Tensor:
    """Token ids of shape `(B, N)` for hidden states of shape `(B, N, H)` and uniform numbers of shape `(B, N)`."""
    warpers, size = settings.warpers(), row_chunk(model)
    tokens = []
    for rows, u in zip(hidden.flatten(0, 1).split(size), draws.flatten().split(size), strict=True):
        logits = logits_of(model, rows)
        if not settings.do_sample:
            tokens.append(logits.argmax(-1))
            continue
        warped = warpers(None, logits)  # type: ignore[arg-type]  # no warper here reads the ids so far
        cumulative = warped.double().softmax(-1).cumsum_(-1)
        threshold = (u * cumulative[:, -1])[:, None]
        tokens.append(
            torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp_(max=logits.shape[-1] - 1)
        )
    return torch.cat(tokens).view(draws.shape)
