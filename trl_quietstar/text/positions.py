"""Where to think: after which tokens of a text thoughts are written."""

from collections.abc import Callable

import numpy as np
import torch

from .batch import Positions, Text, gather


def usable_positions(text: Text, thought_positions: int | float | str = "all") -> torch.Tensor:
    """
    Text tokens that a thought may follow: the next token is a label of the same document, and the data allow a thought.

    Args:
        text ([`Text`]):
            The batch.
        thought_positions (`int`, `float` or `str`):
            As in [`choose_positions`]. With `"prompt_end"` only the last token before each run of labels is usable, with
            `"none"` no token.

    Returns:
        `torch.Tensor` of shape `(B, T - 1)`, bool.
    """
    usable = text.predicted() & text.thought_mask[:, :-1]
    if thought_positions == "none":
        return torch.zeros_like(usable)
    return usable & (text.labels[:, :-1] == -100) if thought_positions == "prompt_end" else usable


def talk_span(
    text: Text, talk_length: int | str, thought_positions: int | float | str, positions: Positions | None = None
) -> int:
    """
    M for a batch. With `"completion"` a thought is read up to the last label of its document, so that M is the greatest distance
    of a position from there.

    Args:
        text ([`Text`]):
            The batch.
        talk_length (`int` or `str`):
            M, or `"completion"`.
        thought_positions (`int`, `float` or `str`):
            Which positions are usable, as in [`usable_positions`].
        positions ([`Positions`], *optional*):
            Where the thoughts are. By default they may be at all usable positions.
    """
    if talk_length != "completion":
        return int(talk_length)
    text = text.host
    index = torch.arange(text.labels.shape[1])
    ends = torch.where(text.labels != -100, index, 0)
    last = torch.zeros_like(ends).scatter_reduce(1, text.document_ids, ends, "amax")  # by document
    spans = (gather(last, text.document_ids) - index)[:, :-1]
    if positions is not None:
        return max(int((gather(spans, positions.host.index) * positions.host.mask).max()), 1)
    return max(int((spans * usable_positions(text, thought_positions)).max()), 1)


def seeded_generators(seed: int, step: int, indices: list[int]) -> list[torch.Generator]:
    """
    Makes a random generator for each sequence. What it draws depends on the three arguments alone: not on the batch that the
    sequence came in, its padding or the process, nor on whether training was resumed.

    Args:
        seed (`int`):
            The run's seed.
        step (`int`):
            Optimizer step; 0 throughout evaluation, which so is deterministic.
        indices (`list[int]`):
            Index of each sequence within the step's global batch, or within the evaluation set.
    """
    states = (np.random.SeedSequence([seed, step, index]).generate_state(1, np.uint64)[0] for index in indices)
    return [torch.Generator().manual_seed(int(state >> np.uint64(1))) for state in states]


def choose_positions(
    text: Text,
    thought_positions: int | float | str,
    generators: list[torch.Generator],
    entropy: Callable[[], torch.Tensor] | None = None,
    difficulty_threshold: float = 0.6,
    min_interval: int = 3,
) -> Positions:
    """
    Chooses the text tokens after which thoughts are written, among those that [`usable_positions`] finds.

    Args:
        text ([`Text`]):
            The batch.
        thought_positions (`int`, `float` or `str`):
            `"all"`; a number of positions in each sequence, at random; a fraction of the usable ones, from 0 to 1, at random and at
            least one; `"prompt_end"`; `"none"`; or `"difficulty"`.
        generators (`list[torch.Generator]`):
            One for each sequence; used by the random choices only.
        entropy (`Callable`, *optional*):
            Gives the entropy of the no-thought prediction divided by log V, of shape `(B, T - 1)`; called with
            `"difficulty"` only.
        difficulty_threshold (`float`):
            The least such entropy to think at.
        min_interval (`int`):
            Least distance of two positions with `"difficulty"`, in tokens.

    Returns:
        [`Positions`] as [`positions_at`] gives them, on the text's device.

    Raises:
        `ValueError`: for another string, or `"difficulty"` without `entropy`.
    """
    usable = usable_positions(text.host, thought_positions)
    if thought_positions == "difficulty" and entropy is not None:
        chosen = spaced(usable & is_difficult(entropy().cpu(), difficulty_threshold), min_interval)
    elif thought_positions in ("all", "prompt_end", "none"):
        chosen = usable
    elif isinstance(thought_positions, str):
        raise ValueError(
            f"`thought_positions` is {thought_positions!r}; give 'all', a number, a fraction, 'prompt_end', 'none', or "
            "'difficulty' together with `entropy`."
        )
    else:
        chosen = torch.stack([_draw(row, thought_positions, g) for row, g in zip(usable, generators, strict=True)])
    return positions_at(chosen).to(text.input_ids.device)


def positions_at(chosen: torch.Tensor) -> Positions:
    """[`Positions`] in ascending order from a mask of shape `(B, T - 1)`; J is the largest number in any row, at least 1."""
    width = max(int(chosen.sum(1).max()), 1)
    order = torch.argsort((~chosen).int(), dim=1, stable=True)[:, :width]
    return Positions(order, chosen.gather(1, order))


def is_difficult(entropies: torch.Tensor, threshold: float) -> torch.Tensor:
    """
    Where the next token is uncertain enough to think before it.

    Args:
        entropies (`torch.Tensor`):
            Entropy of the no-thought prediction divided by log V.
        threshold (`float`):
            The least that is enough.

    Returns:
        `torch.Tensor` of bools, of the shape of `entropies`.
    """
    return entropies >= threshold


def spaced(wanted: torch.Tensor, distance: int) -> torch.Tensor:
    """
    Chooses places greedily from the left, so that a later token never changes an earlier choice.

    Args:
        wanted (`torch.Tensor` of shape `(B, T)`, bool):
            Places to choose from, in the host's memory.
        distance (`int`):
            Least distance of two chosen places, in tokens.

    Returns:
        `torch.Tensor` of shape `(B, T)`, bool.
    """
    chosen = torch.zeros_like(wanted)
    free = torch.zeros(len(wanted), dtype=torch.long)  # from where on a row may choose again
    for t in range(wanted.shape[1]):
        chosen[:, t] = wanted[:, t] & (t >= free)
        free = torch.where(chosen[:, t], t + distance, free)
    return chosen


def most_positions(text: Text, thought_positions: int | float | str, min_interval: int) -> int:
    """The most positions that [`choose_positions`] can choose in any row of a batch; at least 1."""
    usable = int(usable_positions(text.host, thought_positions).sum(1).max())
    if thought_positions == "difficulty":
        usable = -(-usable // min_interval)
    elif isinstance(thought_positions, int):
        usable = min(thought_positions, usable)
    elif isinstance(thought_positions, float):
        usable = round(thought_positions * usable)
    return max(usable, 1)


def _draw(usable: torch.Tensor, amount: int | float, generator: torch.Generator) -> torch.Tensor:
    """Mask of shape `(T - 1,)` with `amount` of the usable places, drawn without replacement."""
    places = usable.nonzero().flatten()
    count = amount if isinstance(amount, int) else max(round(amount * len(places)), 1)
    drawn = places[torch.rand(len(places), generator=generator).argsort()[:count]]
    return torch.zeros_like(usable).index_fill_(0, drawn, True)
