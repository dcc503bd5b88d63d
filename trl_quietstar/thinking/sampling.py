"""Sampling thoughts: all positions at once, without gradient.

A token is drawn by inverting the distribution's cumulative sum at a given uniform number. So a thought is a function
of the model, the text up to its position, and its own random numbers: the same on either path and in any batch.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from ..branches.base import BranchCache, BranchPath
from ..model.embeddings import embed_tokens, embed_vector
from ..model.heads import ThinkingModel
from ..model.lm_head import Drawn, normalized_entropy
from ..text.batch import Positions, Text, Thoughts, gather_hidden
from ..text.positions import choose_positions
from ..text.transfer import to_device, to_host
from .drawing import SamplingSettings, draw_tokens, draw_with_statistics, uniforms


TOKENS_BETWEEN_LOOKS = 4  # for ends of thoughts on a device, each of which is waited for


@torch.no_grad()
def sample_thoughts(
    model: ThinkingModel,
    cache: BranchCache,
    text: Text,
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
        text ([`Text`]):
            The batch.
        positions ([`Positions`]):
            Where to think.
        settings ([`SamplingSettings`]):
            How.
        draws (`torch.Tensor` of shape `(B, J, G, L)`):
            A uniform number for each token, as [`uniforms`] or [`fixed_draws`] gives them, in the host's memory.
        greatest (`Callable`, *optional*):
            As in [`ThoughtSampler`].

    Returns:
        [`Thoughts`] with tensors of shape `(B, J, G, L)`.
    """

    def draw(hidden: torch.Tensor, u: torch.Tensor, running: _Running) -> torch.Tensor:
        return draw_tokens(model, hidden, u, settings)

    embed = functools.partial(embed_tokens, model)
    return _write(model, cache, positions, settings, draws, draw, embed, greatest)[0]


@dataclass(frozen=True)
class _Running:
    """
    Branches that the model runs on: all `(B, N)`, or a selection `(R, W)` of them where many have ended.

    Parameters:
        cache ([`BranchCache`]):
            Of these branches.
        places (`tuple` of `torch.Tensor`, *optional*):
            Row and column of each among those of `of`; None: these are all.
        anchors (`torch.Tensor` of shape `(R, W)`):
            As in [`BranchCache`].
        draws, token_ids, mask (`torch.Tensor` of shape `(R, W, L)`):
            Uniform numbers, tokens so far, and which of them exist.
        alive (`torch.Tensor` of shape `(R, W)`, bool):
            Which have not ended.
        of ([`_Running`], *optional*):
            What they were selected from.
    """

    cache: BranchCache
    anchors: torch.Tensor
    draws: torch.Tensor
    token_ids: torch.Tensor
    mask: torch.Tensor
    alive: torch.Tensor
    places: tuple[torch.Tensor, torch.Tensor] | None = None
    of: "_Running | None" = None

    def select(self, rows: torch.Tensor, columns: torch.Tensor) -> "_Running":
        """Of these rows, `(R,)`, the branches at columns, `(R, W)`; both in the host's memory."""
        device = self.token_ids.device
        places = (to_device(rows[:, None], device), to_device(columns, device))
        draws, token_ids, mask, alive = (x[places] for x in (self.draws, self.token_ids, self.mask, self.alive))
        cache, anchors = self.cache.select(rows, columns), self.anchors[rows[:, None], columns]
        return _Running(cache, anchors, draws, token_ids, mask, alive, places, self)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Values of these branches, `(R, W, ...)`, among all, `(B, N, ...)`, where others have 0."""
        if self.of is None or self.places is None:
            return values
        room = values.new_zeros(*self.of.alive.shape, *values.shape[2:])
        return self.of.spread(room.index_put(self.places, values))

    def everything(self) -> "_Running":
        """All branches, each as far as it was run."""
        now = self
        while now.of is not None and now.places is not None:
            for name in ("token_ids", "mask"):
                getattr(now.of, name)[now.places] = getattr(now, name)
            now = now.of
        return now


def _fewer(alive: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Rows and columns, for [`_Running.select`], of at most half as many branches with all that are `alive`, `(R, W)`, in the
    host's memory; None if there are none so few."""
    counts = alive.sum(1)
    rows, width = torch.arange(len(alive)), max(int(counts.max()), 1)
    if 2 * int((counts > 0).sum()) <= len(alive):  # of any fewer, the text's keys and values would be copied often
        rows = (counts > 0).nonzero().flatten() if bool(alive.any()) else rows[:1]
    if 2 * len(rows) * width > alive.numel():
        return None
    return rows, torch.argsort((~alive[rows]).int(), dim=1, stable=True)[:, :width]


def _write(
    model: ThinkingModel,
    cache: BranchCache,
    positions: Positions,
    settings: SamplingSettings,
    draws: torch.Tensor,
    draw: Callable[[torch.Tensor, torch.Tensor, _Running], torch.Tensor],
    embed: Callable[[torch.Tensor], torch.Tensor],
    greatest: Callable[[int], int],
    finishes: bool = False,
) -> tuple[Thoughts, _Running]:
    """
    The loop over a thought's tokens: `draw` gives them for hidden states `(R, W, H)`, uniform numbers `(R, W)` and the
    branches they are of; `embed` their embeddings. Thoughts that have ended are left out as soon as they are half of what is
    run; where the branches will go on, `finishes` has the last token run before.
    """
    (B, J), G, L = positions.index.shape, settings.num_thoughts, settings.thought_length
    shape, device = (B, J, G, L), positions.index.device
    token_ids = torch.zeros(B, J * G, L, dtype=torch.long, device=device)
    alive = positions.mask.repeat_interleave(G, dim=1)
    anchors = positions.host.index.repeat_interleave(G, dim=1)
    mask = torch.zeros_like(token_ids, dtype=torch.bool)
    now = _Running(cache, anchors, to_device(draws, device).flatten(1, 2), token_ids, mask, alive)
    embeds = embed_vector(model, model.quietstar.start_embedding).expand(B, J * G, -1)
    for step in range(L):
        now.mask[..., step] = now.alive
        drawn = draw(now.cache.extend(now.anchors, embeds), now.draws[..., step], now)
        now.token_ids[..., step] = drawn
        if settings.stop is not None and settings.min_thought_length <= step + 1 < L:
            now.alive.logical_and_(~settings.stop(now.token_ids[..., : step + 1].flatten(0, 1)).view(drawn.shape))
            if device.type == "cpu" or (step + 1) % TOKENS_BETWEEN_LOOKS == 0:
                alive, written = to_host([now.alive, now.mask[..., step]])
                if not greatest(int(alive.any())):
                    break
                fewer = _fewer(written if finishes else alive)
                if fewer is not None:
                    now = now.select(*fewer)
                    drawn = now.token_ids[..., step].clone()  # no view of what goes on changing: a graph may keep it
        if step + 1 < L:
            embeds = embed(drawn)
    whole = now.everything()
    thoughts = Thoughts(positions, (whole.token_ids * whole.mask).view(shape), whole.mask.view(shape))
    return _cut(thoughts, L, settings), now


def _cut(thoughts: Thoughts, length: int, settings: SamplingSettings) -> Thoughts:
    """The first tokens of thoughts. Where none ends early, the host knows which exist without asking the device."""
    cut = Thoughts(thoughts.positions, thoughts.token_ids[..., :length], thoughts.mask[..., :length])
    known = vars(thoughts).get("host_mask")
    if settings.stop is None:
        known = thoughts.positions.host.mask[..., None, None].expand(thoughts.mask.shape)
    if known is not None:
        vars(cut)["host_mask"] = known[
            ..., :length
        ]  # no field: `dataclasses.replace` must not carry it to another mask
    return cut


def unfinished(thoughts: Thoughts, settings: SamplingSettings) -> torch.Tensor:
    """
    Mask of shape `(B, J, G)`: thoughts that were cut at `thought_length` before they ended by themselves.

    Args:
        thoughts ([`Thoughts`]):
            The thoughts.
        settings ([`SamplingSettings`]):
            With which they were sampled.
    """
    cut = thoughts.mask[..., -1]
    if settings.stop is None or thoughts.mask.shape[-1] < settings.thought_length:
        return torch.zeros_like(cut)
    return cut & ~settings.stop(thoughts.token_ids.flatten(0, 2)).view(cut.shape)


@dataclass(frozen=True)
class ThoughtSampler:
    """
    How the thoughts of a batch are drawn, positions included; each row from its own random numbers.

    Parameters:
        settings ([`SamplingSettings`]):
            Of the thoughts.
        generators (`list[torch.Generator]`):
            One for each row.
        thought_positions, difficulty_threshold, min_thought_interval:
            As in [`QuietStarConfig`].
        greatest (`Callable`, *optional*):
            From a number to the greatest of all processes, where each must call the layers as often as the others. Defaults to
            this process's own.
        given (`tuple`, *optional*):
            [`Positions`] and uniform numbers of shape `(B, J, G, L)`, in place of those from the generators.
    """

    settings: SamplingSettings
    generators: list[torch.Generator]
    thought_positions: int | float | str
    difficulty_threshold: float = 0.6
    min_thought_interval: int = 3
    greatest: Callable[[int], int] = int
    given: tuple[Positions, torch.Tensor] | None = None

    def positions(self, text: Text) -> Positions:
        """Where thoughts will be, if no model is needed to tell; draws the generators' first numbers."""
        return choose_positions(text, self.thought_positions, self.generators)

    @torch.no_grad()
    def sample(self, model: ThinkingModel, text: Text, path: BranchPath, batch_size: int | None = None) -> Thoughts:
        """Reads the text and writes its thoughts, without gradient; of each row about `batch_size` at once, or all."""
        cache, device = path.read(model, text), text.input_ids.device
        positions = self._positions(model, text, cache)
        size = positions.index.shape[1] if batch_size is None else max(batch_size // self.settings.num_thoughts, 1)
        groups = (x.split(size, dim=1) for x in (positions.host.index, positions.host.mask, self._draws(positions)))
        parts: list[Thoughts] = []
        for index, mask, draws in zip(*groups, strict=True):
            if parts:
                cache = cache.again()
            places = Positions(index, mask).to(device)
            parts.append(sample_thoughts(model, cache, text, places, self.settings, draws, self.greatest))
        token_ids, mask = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("token_ids", "mask"))
        thoughts, longest = Thoughts(positions, token_ids, mask), self.settings.thought_length
        if self.settings.stop is not None:  # where all thoughts ended early, no slot is kept for more
            longest = self.greatest(max(int(thoughts.host_mask.sum(-1).max()), 1))
        return _cut(thoughts, longest, self.settings)

    def sample_in_graph(
        self, model: ThinkingModel, text: Text, cache: BranchCache, embed: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[Thoughts, torch.Tensor, Drawn]:
        """
        The same thoughts, keeping the graph of the forwards that they were drawn from.

        Args:
            model ([`ThinkingModel`]):
                A model with heads.
            text ([`Text`]):
                The batch.
            cache ([`BranchCache`]):
                The text as this model read it, with gradient; it has then seen all tokens of a thought but the last.
            embed (`Callable`):
                From token ids to embeddings.

        Returns:
            `tuple`: [`Thoughts`]; the hidden states that each token was drawn from, `(B, J, G, L, H)`; and what is known of
            each token, of shape `(B, J, G, L)`.
        """
        states: list[torch.Tensor] = []  # of each token, all branches
        drawn: list[tuple[torch.Tensor, ...]] = []

        def draw(hidden: torch.Tensor, draws: torch.Tensor, running: _Running) -> torch.Tensor:
            known = draw_with_statistics(model, hidden, draws, self.settings)
            states.append(running.spread(hidden))
            drawn.append(tuple(running.spread(getattr(known, field.name)) for field in fields(Drawn)))
            return known.token_ids

        positions = self._positions(model, text, cache)
        draws = self._draws(positions)
        args = (model, cache, positions, self.settings, draws, draw, embed, self.greatest)
        thoughts, running = _write(*args, finishes=True)
        while running.of is not None and running.places is not None:
            running.of.cache.take_back(running.cache, running.places)  # type: ignore[attr-defined]  # they branch
            running = running.of
        thoughts = _cut(thoughts, len(states), self.settings)
        shape = thoughts.mask.shape
        known = Drawn(*(torch.stack(x, dim=2).view(shape) for x in zip(*drawn, strict=True)))
        return thoughts, torch.stack(states, dim=2).unflatten(1, shape[1:3]), known

    def _positions(self, model: ThinkingModel, text: Text, cache: BranchCache) -> Positions:
        if self.given is not None:
            return self.given[0]
        positions = choose_positions(
            text,
            self.thought_positions,
            self.generators,
            lambda: normalized_entropy(model, cache.text_hidden[:, :-1]),
            self.difficulty_threshold,
            self.min_thought_interval,
        )
        J, host = positions.index.shape[1], positions.host
        missing = (0, self.greatest(J) - J)
        padded = Positions(*(torch.nn.functional.pad(x, missing) for x in (host.index, host.mask)))
        return padded.to(text.input_ids.device)

    def _draws(self, positions: Positions) -> torch.Tensor:
        if self.given is not None:
            return self.given[1]
        return uniforms(positions, self.settings, self.generators)


@torch.no_grad()
def greedy_continuation(model: ThinkingModel, cache: BranchCache, positions: Positions, length: int) -> torch.Tensor:
    """
    What the model would say after each position if it did not think: its most likely tokens, without start embedding.

    Args:
        model ([`ThinkingModel`]):
            A model with heads, in `eval()` mode.
        cache ([`BranchCache`]):
            The text as this model read it; not used again after this call.
        positions ([`Positions`]):
            Where.
        length (`int`):
            How many tokens.

    Returns:
        `torch.Tensor` of shape `(B, J, length)`.
    """
    greedy = SamplingSettings(length, do_sample=False)
    hidden = gather_hidden(cache.text_hidden, positions.index)
    unused = torch.zeros(positions.index.shape, device=hidden.device)
    tokens = [draw_tokens(model, hidden, unused, greedy)]
    while len(tokens) < length:
        hidden = cache.extend(positions.host.index, embed_tokens(model, tokens[-1]))
        tokens.append(draw_tokens(model, hidden, unused, greedy))
    return torch.stack(tokens, dim=-1)
