"""The loop over a thought's tokens: draw a token, embed it, run it, and draw the next one from its hidden state.

Training writes thoughts at all positions of a batch at once ([`PackedBranches`]). Generation writes one thought after each
growing text ([`~branches.decoders.Decoder`]). Both are [`Growing`], and [`Writer.write`] is the loop of both.

Packed branches whose thought has ended are left out as soon as they are half of what runs.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from ..branches.base import BranchCache, branch_places
from ..branches.shared_prefix import SharedPrefixCache
from ..model.embeddings import embed_tokens
from ..model.heads import ThinkingModel
from ..model.marks import start_slots
from ..text.transfer import to_host
from .drawing import SamplingSettings, draw_tokens


TOKENS_BETWEEN_LOOKS = 4  # at ends of thoughts that only the device knows: each look waits for it


class Growing(Protocol):
    """Branches that grow by a slot at a time."""

    def extend(self, embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """
        Adds a slot to every branch.

        Args:
            embeds (`torch.Tensor` of shape `(R, W, E)`):
                Input embeddings of the new slots.
            mask (`torch.Tensor` of shape `(R, W)`, bool):
                Which slots hold something.

        Returns:
            Hidden states of the new slots, of shape `(R, W, H)`; anything where the mask is False.
        """
        ...


@dataclass(frozen=True)
class PackedBranches:
    """
    Branches of a batch of texts, W after each of R texts. All of them run: nobody reads what comes after the end of a thought.

    Parameters:
        cache ([`~branches.base.BranchCache`]):
            The texts as they were read, and the branches' slots.
        anchors (`torch.Tensor` of shape `(R, W)`):
            The text index that each branch hangs off, in the host's memory.
    """

    cache: BranchCache
    anchors: torch.Tensor

    def extend(self, embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.cache.extend(self.anchors, embeds)

    def select(self, rows: torch.Tensor, columns: torch.Tensor) -> "PackedBranches":
        """Copies of rows `(R,)` the branches at columns `(R, W)`, both in the host's memory; they go on by themselves."""
        return PackedBranches(self.cache.select(rows, columns), self.anchors[rows[:, None], columns])

    def take_back(self, grown: "PackedBranches", places: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Adds the slots that a selection of these branches has grown. Branches at other places get zeros."""
        assert isinstance(self.cache, SharedPrefixCache) and isinstance(grown.cache, SharedPrefixCache)
        self.cache.take_back(grown.cache, places)


@dataclass
class Running:
    """
    Branches that are being written: all, `(B, N)`, or a selection `(R, W)` of them.

    Parameters:
        branches ([`Growing`]):
            Where they run.
        draws (`torch.Tensor` of shape `(R, W, L)`):
            Uniform numbers for their tokens.
        alive (`torch.Tensor` of shape `(R, W)`, bool):
            Which thoughts have not ended. If it is in the host's memory, the host waits for the device at every step.
        token_ids (`list` of `torch.Tensor` of shape `(R, W)`):
            The tokens of each step so far.
        masks (`list` of `torch.Tensor` of shape `(R, W)`, bool):
            Which tokens of each step exist.
        first (`int`):
            The step at which the selection begins; tokens of the steps before were written by the parent.
        parent ([`Running`], *optional*):
            What the selection was taken from.
        places (`tuple` of `torch.Tensor`, *optional*):
            Rows and columns of the selection in its parent.
    """

    branches: Growing
    draws: torch.Tensor
    alive: torch.Tensor
    token_ids: list[torch.Tensor] = field(default_factory=list)
    masks: list[torch.Tensor] = field(default_factory=list)
    first: int = 0
    parent: "Running | None" = None
    places: tuple[torch.Tensor, torch.Tensor] | None = None

    def end(self, stop: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Notes which thoughts end with the token that was drawn last."""
        ended = stop(torch.stack(self.token_ids, dim=-1).flatten(0, 1)).view(self.alive.shape)
        self.alive = self.alive & ~ended.to(self.alive.device)

    def select(self, rows: torch.Tensor, columns: torch.Tensor) -> "Running":
        """Selects of rows `(R,)` the branches at columns `(R, W)`, both in the host's memory, to go on with them alone."""
        assert isinstance(self.branches, PackedBranches)
        at = branch_places(rows, columns, self.draws.device)
        token_ids, masks = (list(torch.stack(x)[:, at[0], at[1]].unbind()) for x in (self.token_ids, self.masks))
        branches = self.branches.select(rows, columns)
        return Running(branches, self.draws[at], self.alive[at], token_ids, masks, len(token_ids), self, at)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Puts values of these branches, `(R, W, ...)`, to their places among all, `(B, N, ...)`; the other branches get 0."""
        return values if self.parent is None else self.parent.spread(self._in_parent(values))

    def written(self, name: str) -> torch.Tensor:
        """`"token_ids"` or `"masks"` of all branches, of shape `(B, N, steps)`; 0 where a branch no longer ran."""
        now, steps = self, self._own(name)
        while now.parent is not None:
            steps = torch.cat([now.parent._own(name), now._in_parent(steps)], dim=-1)
            now = now.parent
        return steps

    def take_back(self) -> None:
        """Adds the slots that selections have grown to the cache of all branches."""
        now = self
        while now.parent is not None:
            assert isinstance(now.branches, PackedBranches) and isinstance(now.parent.branches, PackedBranches)
            assert now.places is not None
            now.parent.branches.take_back(now.branches, now.places)
            now = now.parent

    def _own(self, name: str) -> torch.Tensor:
        return torch.stack(getattr(self, name)[self.first :], dim=-1)

    def _in_parent(self, values: torch.Tensor) -> torch.Tensor:
        assert self.parent is not None and self.places is not None
        return values.new_zeros(*self.parent.alive.shape, *values.shape[2:]).index_put(self.places, values)


class Written(NamedTuple):
    """
    What was written.

    Parameters:
        token_ids, mask (`torch.Tensor` of shape `(B, N, l)`):
            Tokens, and which of them exist. The number of steps, l, is below L if all thoughts ended before.
        running ([`Running`]):
            The branches that ran to the end. The tokens of the last step have not run yet.
    """

    token_ids: torch.Tensor
    mask: torch.Tensor
    running: Running


@dataclass(frozen=True)
class Writer:
    """
    How the tokens of thoughts are written.

    Parameters:
        settings ([`~thinking.drawing.SamplingSettings`]):
            How long thoughts are, and when they end.
        draw (`Callable`):
            From hidden states `(R, W, H)`, uniform numbers `(R, W)` and the [`Running`] branches that they belong to, to
            tokens `(R, W)`.
        embed (`Callable`):
            From tokens to embeddings.
        greatest (`Callable`, *optional*):
            From a number to the greatest of all processes, where each must call the layers as often as the others. Defaults to
            this process's own.
        finishes (`bool`):
            Whether a branch runs its last token before it is left out, for a talk that goes on from there.
    """

    settings: SamplingSettings
    draw: Callable[[torch.Tensor, torch.Tensor, Running], torch.Tensor]
    embed: Callable[[torch.Tensor], torch.Tensor]
    greatest: Callable[[int], int] = int
    finishes: bool = False

    @classmethod
    def of(cls, model: ThinkingModel, settings: SamplingSettings, greatest: Callable[[int], int] = int) -> "Writer":
        """A writer that draws from a model's LM head and keeps nothing but the tokens."""

        def draw(hidden: torch.Tensor, draws: torch.Tensor, running: Running) -> torch.Tensor:
            return draw_tokens(model, hidden, draws, settings)

        return cls(settings, draw, functools.partial(embed_tokens, model), greatest)

    def write(self, branches: Growing, hidden: torch.Tensor, alive: torch.Tensor, draws: torch.Tensor) -> Written:
        """
        Writes a thought in each branch, token by token.

        Args:
            branches ([`Growing`]):
                Where the tokens run.
            hidden (`torch.Tensor` of shape `(B, N, H)`):
                Hidden states that the first tokens are drawn from.
            alive (`torch.Tensor` of shape `(B, N)`, bool):
                Which branches have a thought.
            draws (`torch.Tensor` of shape `(B, N, L)`):
                A uniform number for each token.

        Returns:
            [`Written`].
        """
        stop, L = self.settings.stop, self.settings.thought_length
        now = Running(branches, draws, alive)
        for step in range(L):
            if step > 0:
                hidden = now.branches.extend(self.embed(now.token_ids[-1]), now.masks[-1])
            now.token_ids.append(self.draw(hidden, now.draws[..., step], now))
            now.masks.append(now.alive)
            if stop is not None and self.settings.min_thought_length <= step + 1 < L:
                now.end(stop)
                if now.alive.device.type == "cpu" or (step + 1) % TOKENS_BETWEEN_LOOKS == 0:
                    alive, exists = to_host([now.alive, now.masks[-1]])
                    if not self.greatest(int(alive.any())):
                        break
                    now = self._without_ended(now, exists if self.finishes else alive)
        return Written(now.written("token_ids"), now.written("masks"), now)

    @staticmethod
    def _without_ended(running: Running, going_on: torch.Tensor) -> Running:
        """Leaves out ended branches if that halves what runs. `going_on`, in the host's memory, says which have not ended."""
        fewer = fewer_branches(going_on) if isinstance(running.branches, PackedBranches) else None
        return running if fewer is None else running.select(*fewer)


def fewer_branches(going_on: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """
    Finds rows and columns that hold all branches that go on, and at most half of the branches that run.

    Args:
        going_on (`torch.Tensor` of shape `(R, W)`, bool):
            Which branches go on; in the host's memory.

    Returns:
        `tuple`: rows `(r,)` and columns `(r, w)`; None where half of the branches cannot hold all that go on.
    """
    counts = going_on.sum(1)
    rows, width = torch.arange(len(going_on)), max(int(counts.max()), 1)
    if 2 * int((counts > 0).sum()) <= len(going_on):  # of any fewer, the text's keys and values would be copied often
        rows = (counts > 0).nonzero().flatten() if bool(going_on.any()) else rows[:1]
    if 2 * len(rows) * width > going_on.numel():
        return None
    return rows, torch.argsort((~going_on[rows]).int(), dim=1, stable=True)[:, :width]


def open_branches(
    model: ThinkingModel, branches: PackedBranches, embed: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Gives packed branches the slots before a thought, which `embed` embeds where they are tokens. Returns the hidden states that
    the first tokens of thoughts are drawn from, `(R, W, H)`."""
    slots = start_slots(model, *branches.anchors.shape, embed=embed).unbind(2)
    exists = torch.ones(branches.anchors.shape, dtype=torch.bool)
    return [branches.extend(slot, exists) for slot in slots][-1]
