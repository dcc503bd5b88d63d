"""Replay that runs no token twice: texts and thoughts go on from what the family's own cache keeps of them.

A recurrent state cannot be masked, but it can be copied. So a text is read from one thought position to the next, and the cache
is copied at each. The copies of all branches are stacked into one batch and take one token a forward: ordinary cached decoding.
Keys and values of unequal lengths are padded on the left, as `generate` pads prompts. The start-up check says whether that is
exact; if it is not, [`~branches.replay.Replay`] runs everything again.

R is the number of rows of such a batch, W the width of its keys.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from ..model.embeddings import embed_tokens
from ..model.family import cache_name, forward_arguments, position_offset
from ..text.batch import Text
from ..text.transfer import to_device
from .base import BranchCache, backbone_output
from .replay import Replay


class States:
    """
    A batch of rows that a model has read, each up to its own length, and what its cache keeps of them to go on from.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, in `eval()` mode.
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self.cache = model, None
        self.arguments = forward_arguments(model)
        self.width = 0  # W
        self.lengths = torch.zeros(0, dtype=torch.long, device=model.device)  # (R,)
        self.padded = False  # whether the keys of shorter rows begin with padding

    def read(self, embeds: torch.Tensor, by_token: bool = False) -> torch.Tensor:
        """
        Goes on by several tokens; the rows must be of one length.

        Args:
            embeds (`torch.Tensor` of shape `(R, Q, E)`):
                Embeddings of the tokens.
            by_token (`bool`):
                Whether a cache that holds something takes one token a forward, not all.

        Returns:
            Hidden states of shape `(R, Q, H)`.
        """
        if self.cache is None:
            self.lengths = self.lengths.new_zeros(len(embeds))
        pieces = embeds.split(1, dim=1) if by_token and self.cache is not None else (embeds,)
        return torch.cat([self._forward(piece) for piece in pieces], dim=1)

    def step(self, embeds: torch.Tensor) -> torch.Tensor:
        """Goes on by one token in each row, of embeddings `(R, E)`; rows may differ in length. Returns hidden states `(R, H)`."""
        return self._forward(embeds[:, None])[:, 0]

    def select(self, rows: torch.Tensor) -> "States":
        """Copies some rows, by an index of shape `(rows,)` in the host's memory; a row may be copied several times."""
        rows, taken = to_device(rows, self.lengths.device), copy.copy(self)
        taken.cache = map_tensors(lambda parts: parts[0].index_select(0, rows), self.cache)
        taken.lengths = self.lengths[rows]
        return taken

    @staticmethod
    def join(parts: Sequence["States"]) -> "States":
        """Stacks the rows of all parts, in order."""
        joined = copy.copy(parts[0])
        joined.padded = any(part.padded for part in parts)

        def stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
            # states of fixed size have equal shapes; keys and values differ in their width
            shape = [max(sizes) for sizes in zip(*(x.shape[1:] for x in tensors), strict=True)]
            joined.padded |= any(list(x.shape[1:]) != shape for x in tensors)
            return torch.cat([_pad_left(x, shape) for x in tensors])

        joined.cache = map_tensors(stack, *(part.cache for part in parts))
        joined.lengths = torch.cat([part.lengths for part in parts])
        joined.width = max(part.width for part in parts)  # shorter rows are padded to it
        return joined

    def _forward(self, embeds: torch.Tensor) -> torch.Tensor:
        Q, name = embeds.shape[1], cache_name(self.arguments)
        inputs: dict[str, Any] = {name: self.cache, "use_cache": True}
        if self.padded:
            column = torch.arange(self.width + Q, device=embeds.device)
            inputs["attention_mask"] = (column >= (self.width - self.lengths)[:, None]).long()
        if "position_ids" in self.arguments:
            position_ids = self.lengths[:, None] + torch.arange(Q, device=embeds.device)
            inputs["position_ids"] = position_ids + position_offset(self.model.config)
        hidden, output = backbone_output(self.model, embeds, **inputs)
        self.cache = output[name]
        self.width, self.lengths = self.width + Q, self.lengths + Q
        return hidden


def map_tensors(function: Callable[[Sequence[torch.Tensor]], torch.Tensor], *values: Any) -> Any:
    """
    Makes a cache from several of one structure. It shares nothing with them that a forward would change.

    Args:
        function (`Callable`):
            From the tensors at one place in all caches, rows first, to the tensor at this place in the new cache.
        values:
            The caches. A number in the new cache, such as a length, is the largest of theirs.
    """
    first = values[0]
    if isinstance(first, torch.Tensor):
        return function(values) if first.dim() > 1 else first
    if isinstance(first, dict):
        return type(first)((key, map_tensors(function, *(value[key] for value in values))) for key in first)
    if isinstance(first, (list, tuple)):
        return type(first)(map_tensors(function, *parts) for parts in zip(*values, strict=True))
    if isinstance(first, int):
        return max(values)
    if not isinstance(first, (Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin)):
        return first
    new = copy.copy(first)
    new.__dict__.update(map_tensors(function, *(vars(value) for value in values)))
    return new


def _pad_left(x: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """Zeros in front, up to a shape that does not count the rows."""
    missing = [wanted - size for wanted, size in zip(shape, x.shape[1:], strict=True)]
    return torch.nn.functional.pad(x, [width for size in reversed(missing) for width in (size, 0)])


class CachedReplay(Replay):
    """
    Replay whose sampling goes on from copies of the cache. Scoring still replays, since it needs gradient and families update
    their states in place.

    Args:
        by_token (`bool`):
            Whether a text that was begun is read on by one token a forward, for families that cannot continue a state by
            several.
    """

    def __init__(self, by_token: bool = False):
        self.by_token = by_token

    def read(self, model: PreTrainedModel, text: Text) -> BranchCache:
        return ForkedStates(model, text, self.by_token)


class ForkedStates:
    """Reads each text once, up to its last anchor, and copies the states at the anchors."""

    def __init__(self, model: PreTrainedModel, text: Text, by_token: bool):
        self.model, self.text, self.by_token = model, text, by_token
        self.forks: tuple[States, torch.Tensor] | None = None  # of all branches, and which of `B·N` each row is

    @functools.cached_property
    def text_hidden(self) -> torch.Tensor:
        return Replay().text_hidden(self.model, self.text)

    def select(self, rows: torch.Tensor, columns: torch.Tensor) -> "ForkedStates":
        assert self.forks is not None
        states, order = self.forks
        fresh, wanted = copy.copy(self), (rows[:, None] * self.branches + columns).flatten()
        fresh.forks = states.select(order.argsort()[wanted]), torch.arange(len(wanted))
        return fresh

    def again(self, rows: torch.Tensor | None = None) -> "ForkedStates":
        return ForkedStates(self.model, self.text if rows is None else self.text.rows(rows), self.by_token)

    @torch.no_grad()
    def extend(self, anchors: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        self.branches = anchors.shape[1]
        if self.forks is None:
            self.forks = self._read_text(anchors)
        states, order = self.forks
        order = to_device(order, embeds.device)
        hidden = states.step(embeds.flatten(0, 1)[order])  # rows stand in the order of their anchors
        return torch.empty_like(hidden).index_copy_(0, order, hidden).unflatten(0, anchors.shape)

    def _read_text(self, anchors: torch.Tensor) -> tuple[States, torch.Tensor]:
        """States of all branches at their anchors, and which of `B·N` each row is. All documents are read side by side from one
        anchor to the next; they stand at one place, so that nothing is padded."""
        text = self.text.host
        documents, rows = _documents(text, anchors.cpu())
        ends = text.position_ids.gather(1, anchors.cpu()).flatten() + 1
        embeds, states = embed_tokens(self.model, to_device(documents, self.model.device)), States(self.model)
        parts, order = [], []
        for end in ends.unique().tolist():
            states.read(embeds[:, states.width : end], self.by_token)
            order.append((ends == end).nonzero().flatten())
            parts.append(states.select(rows[order[-1]]))  # branches of one text at one anchor are equal copies
        return States.join(parts), torch.cat(order)


def _documents(text: Text, anchors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of the documents that hold an anchor, each from its first token on, with any tokens after its last; and which of
    these documents each of the `B·N` anchors is in. Text and anchors are in the host's memory."""
    numbers = text.document_ids.gather(1, anchors).clamp(min=1).flatten()  # anchors on padding count for nothing
    sequence = torch.arange(len(anchors)).repeat_interleave(anchors.shape[1])
    (sequence, numbers), rows = torch.stack([sequence, numbers]).unique(dim=1, return_inverse=True)
    starts = (text.document_ids[sequence] == numbers[:, None]).long().argmax(1)
    column = torch.arange(int(text.position_ids.max()) + 1)
    index = (starts[:, None] + column).clamp(max=text.input_ids.shape[1] - 1)
    return text.input_ids[sequence[:, None], index], rows
