"""The loop over a thought's tokens: draw a token, embed it, run it, and draw the next one from its hidden state.

Training writes thoughts at all positions of a batch at once ([`PackedBranches`]). Generation writes one thought after each
growing text ([`~branches.decoders.Decoder`]). Both are [`Growing`], and [`Writer.write`] is the loop of both.

Packed branches whose thought has ended are left out as soon as they are half of what runs. On a CPU, without a graph, thoughts that say the
same so far run as one branch, from when that halves what runs: a confident policy draws most thoughts of a group alike.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from ..branches.base import BranchCache
from ..branches.memory import BUSY_REPLAYED, is_busy
from ..branches.shared_prefix import SharedPrefixCache, Slots
from ..model.embeddings import embed_tokens
from ..model.heads import ThinkingModel
from ..model.marks import start_slots
from ..text.batch import Text
from ..text.transfer import to_device, to_host
from .drawing import SamplingSettings, draw_tokens


TOKENS_BETWEEN_LOOKS = 4  # at ends of thoughts that only the device knows: each look waits for it
JOINED_TEXT = (
    2**15
)  # tokens of text that thoughts may have among them if they are to share branches, each with its copy


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
        """Copies of rows `(R,)` the branches at columns `(R, W)`, both in the host's memory; they go on by themselves. A row may be
        given several times where the text runs once for all branches ([`SharedPrefixCache`])."""
        return PackedBranches(self.cache.select(rows, columns), self.anchors[rows[:, None], columns])


class Stood(NamedTuple):
    """
    Which branches stand for which thoughts.

    Parameters:
        branch (`torch.Tensor` of shape `(B, N)`):
            The branch of each thought, as a place among `R·W`; of a thought that no longer runs, any.
        draw (`torch.Tensor` of shape `(B, N)`):
            Its draw, as a place among `R·W·K`.
        thoughts (`torch.Tensor` of shape `(R, W, K)`):
            The thoughts of each branch, as places among `B·N`; the first of them again where there are fewer than K.
    """

    branch: torch.Tensor
    draw: torch.Tensor
    thoughts: torch.Tensor

    def to(self, device: torch.device) -> "Stood":
        """The same on a device."""
        return Stood(*(to_device(x, device) for x in self))


class Layout(NamedTuple):
    """
    What is to run from a step on: branches at columns `(R', W')` of rows `(R',)`, and which thoughts they stand for; all in the host's
    memory.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    stood: Stood


@dataclass
class Running:
    """
    Thoughts that are being written, `(B, N)`, and the branches `(R, W)` that run for them: at first one for each.

    Parameters:
        branches ([`Growing`]):
            What runs.
        draws (`torch.Tensor` of shape `(B, N, L)`):
            Uniform numbers for the tokens of the thoughts.
        alive (`torch.Tensor` of shape `(B, N)`, bool):
            Which thoughts have not ended. If it is in the host's memory, the host waits for the device at every step.
        keeps (`bool`):
            Whether [`Running.take_back`] will be called.
        token_ids (`list` of `torch.Tensor` of shape `(B, N)`):
            The tokens of each step so far.
        masks (`list` of `torch.Tensor` of shape `(B, N)`, bool):
            Which tokens of each step exist.
        stood ([`Stood`], *optional*):
            Which branches stand for which thoughts. None: each for its own.
        on_host ([`Stood`], *optional*):
            The same in the host's memory.
        is_joined (`bool`):
            Whether thoughts that say the same share a branch.
    """

    branches: Growing
    draws: torch.Tensor
    alive: torch.Tensor
    keeps: bool = False
    token_ids: list[torch.Tensor] = field(default_factory=list)
    masks: list[torch.Tensor] = field(default_factory=list)
    stood: Stood | None = None
    on_host: Stood | None = None
    is_joined: bool = False

    def __post_init__(self):
        self.trunk = self.branches  # of all thoughts
        # by branches of earlier layouts, with the branch of each thought
        self._grown: list[tuple[Slots, torch.Tensor]] = []
        self._length = 0  # of branches as the layout began
        # (B·N,): equal for thoughts of one position that have said the same so far
        self.alike: torch.Tensor | None = None

    @property
    def can_join(self) -> bool:
        """Whether thoughts may share branches at all."""
        return isinstance(self.branches, PackedBranches) and can_join(self.branches.cache, self.alive.shape)

    def draws_at(self, step: int) -> torch.Tensor:
        """Uniform numbers for a step: `(B, N)`, or `(R, W, K)` for the thoughts that each branch stands for."""
        draws = self.draws[..., step]
        return draws if self.stood is None else draws.flatten()[self.stood.thoughts]

    def of_branches(self, values: torch.Tensor) -> torch.Tensor:
        """What each branch has, `(R, W, ...)`, for each thought, `(B, N, ...)`; anything for those that no longer run."""
        return values if self.stood is None else values.flatten(0, 1)[self.stood.branch]

    def of_draws(self, values: torch.Tensor) -> torch.Tensor:
        """What each draw has, in the shape of [`Running.draws_at`], for each thought, `(B, N)`."""
        return values if self.stood is None else values.flatten()[self.stood.draw]

    def last(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The last token of each branch, and whether it exists, both of shape `(R, W)`."""
        pair = self.token_ids[-1], self.masks[-1]
        return pair if self.stood is None else tuple(x.flatten()[self.stood.thoughts[..., 0]] for x in pair)  # type: ignore[return-value]

    def end(self, stop: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Notes which thoughts end with the token that was drawn last."""
        ended = stop(torch.stack(self.token_ids, dim=-1).flatten(0, 1)).view(self.alive.shape)
        self.alive = self.alive & ~ended.to(self.alive.device)

    def go_on(self, layout: Layout, is_joined: bool) -> None:
        """Goes on with some of the branches."""
        assert isinstance(self.branches, PackedBranches)
        self._note_grown()
        R, W = self.branches.anchors.shape
        if W > 1 or not torch.equal(layout.rows, torch.arange(R)):  # else the same branches go on
            self.branches = self.branches.select(layout.rows, layout.columns)
        self.on_host, self.stood, self.is_joined = layout.stood, layout.stood.to(self.draws.device), is_joined

    def take_back(self) -> None:
        """Adds all slots that have grown to the cache of all branches."""
        if self.stood is not None:
            self._note_grown()
            assert isinstance(self.trunk, PackedBranches) and isinstance(self.trunk.cache, SharedPrefixCache)
            self.trunk.cache.take_back(self._grown)

    def _note_grown(self) -> None:
        cache = self.branches.cache if isinstance(self.branches, PackedBranches) else None
        if self.keeps and isinstance(cache, SharedPrefixCache):
            if self.stood is not None:
                self._grown.append((cache.grown(self._length), self.stood.branch))
            self._length = cache.length


class Written(NamedTuple):
    """
    What was written.

    Parameters:
        token_ids, mask (`torch.Tensor` of shape `(B, N, l)`):
            Tokens, and which of them exist. The number of steps, l, is below L if all thoughts ended before.
        running ([`Running`]):
            What ran to the end. The tokens of the last step have not run yet.
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
            From hidden states `(R, W, H)`, uniform numbers as [`Running.draws_at`] gives them and the [`Running`] branches that they
            belong to, to tokens in the shape of the numbers.
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
        if isinstance(branches, PackedBranches) and isinstance(branches.cache, SharedPrefixCache):
            branches.cache.room = branches.cache.length + L
        now = Running(branches, draws, alive, self.finishes)
        for step in range(L):
            if step > 0:
                token_ids, exists = now.last()
                hidden = now.branches.extend(self.embed(token_ids), exists)
            now.token_ids.append(now.of_draws(self.draw(hidden, now.draws_at(step), now)))
            now.masks.append(now.alive)
            if step + 1 == L:
                break
            if stop is not None and self.settings.min_thought_length <= step + 1:
                now.end(stop)
                if now.alive.device.type == "cpu" or (step + 1) % TOKENS_BETWEEN_LOOKS == 0:
                    alive, exists = to_host([now.alive, now.masks[-1]])
                    if not self.greatest(int(alive.any())):
                        break
                    lay_out(now, exists if self.finishes else alive)
            elif now.can_join:
                lay_out(now, now.masks[-1])
        return Written(torch.stack(now.token_ids, dim=-1), torch.stack(now.masks, dim=-1), now)


def can_join(cache: BranchCache, shape: torch.Size) -> bool:
    """Whether branches of a shape `(B, N)` may be run once for several thoughts, which only the shared prefix can."""
    return isinstance(cache, SharedPrefixCache) and joins(cache.text, shape)


def joins(text: Text, shape: torch.Size) -> bool:
    """Whether thoughts may share branches: on a CPU, without a graph, where no long texts would be copied. On another device the host
    would have to wait for every token."""
    if text.input_ids.device.type != "cpu" or torch.is_grad_enabled():
        return False
    return shape[1] > 1 and shape.numel() * text.input_ids.shape[1] <= JOINED_TEXT


def lay_out(running: Running, going_on: torch.Tensor) -> None:
    """Leaves out branches of ended thoughts, and those that say the same as another, if that halves what runs. `going_on`, of shape `(B,
    N)` and in the host's memory, says which thoughts go on."""
    if not isinstance(running.branches, PackedBranches) or not fewer_are_faster(running.branches):
        return
    if running.is_joined or running.can_join:
        layout = joined(running, going_on)
        R, W = running.branches.anchors.shape
        if running.is_joined or 2 * len(layout.rows) <= R * W:
            return running.go_on(layout, is_joined=True)
    thoughts = None if running.on_host is None else running.on_host.thoughts
    fewer = fewer_branches(going_on if thoughts is None else going_on.flatten()[thoughts[..., 0]])
    if fewer is not None:
        rows, columns = fewer
        if thoughts is None:
            thoughts = torch.arange(going_on.numel()).view(*going_on.shape, 1)
        left = thoughts[rows[:, None], columns]
        branch = torch.zeros(going_on.numel(), dtype=torch.long)
        branch[left.flatten()] = torch.arange(left.numel())
        branch = branch.view(going_on.shape)
        running.go_on(Layout(rows, columns, Stood(branch, branch, left)), is_joined=False)


def fewer_are_faster(branches: PackedBranches) -> bool:
    """Whether a token of fewer branches takes less time; where it is replayed, only if its arithmetic takes longer than its launches, and
    its graph need not be recorded again for nothing."""
    cache = branches.cache
    if not isinstance(cache, SharedPrefixCache) or cache.token is None:
        return True
    return is_busy(cache.model, branches.anchors.numel(), BUSY_REPLAYED)


def joined(running: Running, going_on: torch.Tensor) -> Layout:
    """A branch in a row of its own for all thoughts that go on and say the same so far."""
    assert isinstance(running.branches, PackedBranches)
    (B, N), anchors = going_on.shape, running.branches.anchors
    W = anchors.shape[1]
    if running.alike is None:
        running.alike = (torch.arange(B)[:, None] * (int(anchors.max()) + 1) + anchors).flatten()
    places = going_on.flatten().nonzero().flatten()
    if len(places) == 0:  # another process goes on
        places = torch.zeros(1, dtype=torch.long)
    keys = running.alike[places] * 2**32 + running.token_ids[-1].flatten()[places]
    own = torch.unique(keys, return_inverse=True)[1]
    running.alike[places] = own
    counts = own.bincount()
    first, order = counts.cumsum(0) - counts, own.argsort(stable=True)
    rank = torch.arange(len(own)) - first[own[order]]
    thoughts = places[order][first][:, None].repeat(1, int(counts.max()))
    before = thoughts[:, 0] if running.stood is None else running.stood.branch.flatten()[thoughts[:, 0]]
    thoughts[own[order], rank] = places[order]
    branches, draws = (torch.zeros(B * N, dtype=torch.long) for _ in range(2))
    branches[places] = own
    draws[places[order]] = own[order] * thoughts.shape[1] + rank
    stood = Stood(branches.view(B, N), draws.view(B, N), thoughts[:, None])
    return Layout(before // W, (before % W)[:, None], stood)


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
