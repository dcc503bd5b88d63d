"""Sampling thoughts for training and scoring: at all positions of a batch at once.

[`sample_thoughts`] writes thoughts at given positions. [`ThoughtSampler`] also chooses the positions and draws the random
numbers, and can sample in the graph of the forward that scores the thoughts.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from ..branches.base import BranchCache, BranchPath
from ..model.heads import ThinkingModel
from ..model.lm_head import Drawn, normalized_entropy
from ..text.batch import Positions, Text, Thoughts, gather_hidden
from ..text.positions import choose_positions
from ..text.transfer import to_device
from .drawing import SamplingSettings, draw_with_statistics, uniforms
from .writing import PackedBranches, Running, Writer, open_branches


@torch.no_grad()
def sample_thoughts(
    model: ThinkingModel,
    cache: BranchCache,
    positions: Positions,
    settings: SamplingSettings,
    draws: torch.Tensor,
    greatest: Callable[[int], int] = int,
) -> Thoughts:
    """
    Writes `num_thoughts` thoughts at every position (Quiet-STaR, section 4.1: parallel generation).

    Args:
        model ([`ThinkingModel`]):
            A model with heads, in `eval()` mode.
        cache ([`BranchCache`]):
            The text as this model read it; not used again after this call.
        positions ([`Positions`]):
            Where to think.
        settings ([`SamplingSettings`]):
            How thoughts are drawn.
        draws (`torch.Tensor` of shape `(B, J, G, L)`):
            A uniform number for each token, as [`uniforms`] or [`fixed_draws`] gives them, in the host's memory.
        greatest (`Callable`, *optional*):
            As in [`ThoughtSampler`].

    Returns:
        [`Thoughts`] with tensors of shape `(B, J, G, L)`.
    """
    thoughts, _ = _drawn_by(Writer.of(model, settings, greatest), model, cache, positions, draws)
    return _resized(thoughts, settings.thought_length, settings)


def _drawn_by(
    writer: Writer, model: ThinkingModel, cache: BranchCache, positions: Positions, draws: torch.Tensor
) -> tuple[Thoughts, Running]:
    """Writes thoughts at positions; they have as many slots as were run. Also returns what ran to the end."""
    (B, J), G, device = positions.index.shape, writer.settings.num_thoughts, positions.index.device
    alive = positions.mask.repeat_interleave(G, dim=1)
    anchors = model.thought_marks.anchors(positions.host.index.repeat_interleave(G, dim=1))
    branches = PackedBranches(cache, anchors)
    draws = to_device(draws, device).flatten(1, 2)
    hidden = open_branches(model, branches, writer.embed)
    token_ids, mask, running = writer.write(branches, hidden, alive, draws)
    thoughts = Thoughts(positions, (token_ids * mask).view(B, J, G, -1), mask.view(B, J, G, -1))
    return _known(thoughts, writer.settings), running


def _known(thoughts: Thoughts, settings: SamplingSettings) -> Thoughts:
    """Returns the thoughts. Where none ends early, they remember which tokens exist, so that the host need not ask the device."""
    if settings.stop is None:
        exists = thoughts.positions.host.mask[..., None, None].expand(thoughts.mask.shape)
        vars(thoughts)["host_mask"] = exists  # no field: `dataclasses.replace` must not carry it to another mask
    return thoughts


def _resized(thoughts: Thoughts, length: int, settings: SamplingSettings) -> Thoughts:
    """Thoughts with `length` slots: cut, or with empty slots added."""
    missing = (0, length - thoughts.mask.shape[-1])
    if missing == (0, 0):
        return _known(thoughts, settings)
    pad = torch.nn.functional.pad  # cuts where the number is negative
    resized = Thoughts(thoughts.positions, pad(thoughts.token_ids, missing), pad(thoughts.mask, missing))
    if "host_mask" in vars(thoughts):
        vars(resized)["host_mask"] = pad(thoughts.host_mask, missing)
    return _known(resized, settings)


def unfinished(thoughts: Thoughts, settings: SamplingSettings) -> torch.Tensor:
    """
    Finds the thoughts that were cut at `thought_length` before they ended by themselves.

    Args:
        thoughts ([`Thoughts`]):
            The thoughts.
        settings ([`SamplingSettings`]):
            The settings that they were sampled with.

    Returns:
        `torch.Tensor` of shape `(B, J, G)`, bool.
    """
    cut = thoughts.mask[..., -1]
    if settings.stop is None or thoughts.mask.shape[-1] < settings.thought_length:
        return torch.zeros_like(cut)
    return cut & ~settings.stop(thoughts.token_ids.flatten(0, 2)).view(cut.shape)


@dataclass(frozen=True)
class ThoughtSampler:
    """
    Where the thoughts of a batch are written, and how they are drawn.

    Parameters:
        settings ([`SamplingSettings`]):
            How thoughts are drawn.
        generators (`list[torch.Generator]`):
            The random numbers of each row, for its positions first and then for its thoughts.
        thought_positions, difficulty_threshold, min_thought_interval:
            As in [`QuietStarConfig`].
        greatest (`Callable`, *optional*):
            From a number to the greatest of all processes, where each must call the layers as often as the others. Defaults to
            this process's own.
        given (`tuple`, *optional*):
            [`Positions`] and uniform numbers of shape `(B, J, G, L)`. The generators are then not read.
    """

    settings: SamplingSettings
    generators: list[torch.Generator]
    thought_positions: int | float | str
    difficulty_threshold: float = 0.6
    min_thought_interval: int = 3
    greatest: Callable[[int], int] = int
    given: tuple[Positions, torch.Tensor] | None = None

    def positions(self, text: Text) -> Positions:
        """Positions that can be chosen without the model, that is, not by difficulty. It draws from the generators, so that a
        sampler of its own is needed for the thoughts."""
        return self._as_many(choose_positions(text, self.thought_positions, self.generators))

    @torch.no_grad()
    def sample(self, model: ThinkingModel, text: Text, path: BranchPath, batch_size: int | None = None) -> Thoughts:
        """
        Reads a text and writes its thoughts, without gradient.

        Args:
            model ([`ThinkingModel`]):
                A model with heads, in `eval()` mode.
            text ([`Text`]):
                The batch.
            path ([`~branches.base.BranchPath`]):
                How to get hidden states.
            batch_size (`int`, *optional*):
                How many thoughts of each row are written at once, about. Defaults to all.

        Returns:
            [`Thoughts`] with as many slots as the longest one has tokens.
        """
        cache, device = path.read(model, text), text.input_ids.device
        positions = self._positions(model, text, cache)
        size = positions.index.shape[1] if batch_size is None else max(batch_size // self.settings.num_thoughts, 1)
        groups = (x.split(size, dim=1) for x in (positions.host.index, positions.host.mask, self._draws(positions)))
        parts: list[Thoughts] = []
        for index, mask, draws in zip(*groups, strict=True):
            if parts:
                cache = cache.again()
            places = Positions(index, mask).to(device)
            parts.append(sample_thoughts(model, cache, places, self.settings, draws, self.greatest))
        token_ids, mask = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("token_ids", "mask"))
        thoughts, longest = Thoughts(positions, token_ids, mask), self.settings.thought_length
        if self.settings.stop is not None:  # where all thoughts ended early, no slot is kept for more
            longest = self.greatest(max(int(thoughts.host_mask.sum(-1).max()), 1))
        return _resized(thoughts, longest, self.settings)

    def sample_in_graph(
        self, model: ThinkingModel, text: Text, cache: BranchCache, embed: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[Thoughts, torch.Tensor, Drawn]:
        """
        Writes the thoughts that [`sample`] writes, and keeps the graph of the forwards that they were drawn from.

        Args:
            model ([`ThinkingModel`]):
                A model with heads.
            text ([`Text`]):
                The batch.
            cache ([`BranchCache`]):
                The text as this model read it, with gradient. Afterwards it also holds all tokens of the thoughts but the last.
            embed (`Callable`):
                From token ids to embeddings.

        Returns:
            `tuple`: [`Thoughts`]; the hidden states that each token was drawn from, `(B, J, G, L, H)`; and
            [`~model.lm_head.Drawn`], of shape `(B, J, G, L)`.
        """
        states: list[torch.Tensor] = []  # `(B, N, H)` of each step
        drawn: list[tuple[torch.Tensor, ...]] = []

        def draw(hidden: torch.Tensor, draws: torch.Tensor, running: Running) -> torch.Tensor:
            known = draw_with_statistics(model, hidden, draws, self.settings)
            states.append(running.of_branches(hidden))
            drawn.append(tuple(running.of_draws(getattr(known, field.name)) for field in fields(Drawn)))
            return known.token_ids

        positions = self._positions(model, text, cache)
        writer = Writer(self.settings, draw, embed, self.greatest, finishes=True)
        thoughts, running = _drawn_by(writer, model, cache, positions, self._draws(positions))
        running.take_back()
        shape = thoughts.mask.shape
        known = Drawn(*(torch.stack(x, dim=2).view(shape) for x in zip(*drawn, strict=True)))
        return thoughts, torch.stack(states, dim=2).unflatten(1, shape[1:3]), known

    def _positions(self, model: ThinkingModel, text: Text, cache: BranchCache) -> Positions:
        if self.given is not None:
            return self.given[0]
        return self._as_many(
            choose_positions(
                text,
                self.thought_positions,
                self.generators,
                lambda: normalized_entropy(model, cache.text_hidden[:, :-1]),
                self.difficulty_threshold,
                self.min_thought_interval,
            )
        )

    def _as_many(self, positions: Positions) -> Positions:
        """As many columns as on the process with the most, of which those that are added exist in no row."""
        host, J = positions.host, positions.index.shape[1]
        missing = (0, self.greatest(J) - J)
        padded = Positions(*(torch.nn.functional.pad(x, missing) for x in (host.index, host.mask)))
        return padded.to(positions.index.device)

    def _draws(self, positions: Positions) -> torch.Tensor:
        if self.given is not None:
            return self.given[1]
        return uniforms(positions, self.settings, self.generators)


@torch.no_grad()
def greedy_continuation(model: ThinkingModel, cache: BranchCache, positions: Positions, length: int) -> torch.Tensor:
    """
    Writes what the model would say after each position if it did not think: its most likely tokens, after no start slot.

    Args:
        model ([`ThinkingModel`]):
            A model with heads, in `eval()` mode.
        cache ([`BranchCache`]):
            The text as this model read it; not used again after this call.
        positions ([`Positions`]):
            After which tokens.
        length (`int`):
            How many tokens to write.

    Returns:
        `torch.Tensor` of shape `(B, J, length)`.
    """
    hidden = gather_hidden(cache.text_hidden, positions.index)
    unused = hidden.new_zeros(1).expand(*positions.index.shape, length)  # the most likely token needs no random number
    writer = Writer.of(model, SamplingSettings(length, do_sample=False))
    return writer.write(PackedBranches(cache, positions.host.index), hidden, positions.mask, unused).token_ids
