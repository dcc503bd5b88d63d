"""Branches whose thoughts differ much in length are run in forwards of their own, and those that say the same once."""

import torch

from ..branches.base import BranchCache, BranchPath, Encoded
from ..branches.shared_prefix import SharedPrefix, SharedPrefixCache
from ..model.heads import ThinkingModel
from ..model.routing import has_router_loss
from ..model.sharding import model_is_sharded
from ..text.batch import Branches, Text, Thoughts
from ..text.transfer import to_device
from .writing import can_join, joins


LEAST_SAVED = 4096  # tokens that a further forward must save on an accelerator, which runs fewer while it is launched


def runs_as_one(model: ThinkingModel) -> bool:
    """Whether all branches must run in the forward that was asked for: each process runs layers as often as the others, or a router's
    loss watches each forward."""
    return has_router_loss(model.config) or model_is_sharded(model)


def encode_by_length(
    model: ThinkingModel,
    text: Text,
    path: BranchPath,
    branches: Branches,
    thoughts: Thoughts,
    lengths: torch.Tensor,
    slots: slice,
    batch_size: int | None,
    cache: BranchCache | None,
) -> Encoded:
    """
    Runs text and branches; where thoughts differ much in length, long and short ones in forwards of their own. Without a graph, thoughts
    that say the same run once, as [`grow_once`] does it.

    Args:
        model ([`ThinkingModel`]), text ([`Text`]), path ([`BranchPath`]), branches ([`Branches`]):
            What to run, and how.
        thoughts ([`Thoughts`] of shape `(B, J, G, L)`):
            What the branches say, N of each text.
        lengths (`torch.Tensor` of shape `(B, N)`):
            Tokens of each branch's thought; in the host's memory.
        slots (`slice`):
            Where the thought's tokens stand in a branch. A forward leaves out those that none of its thoughts has.
        batch_size (`int`, *optional*), cache ([`~branches.base.BranchCache`], *optional*):
            As in [`~branches.base.BranchPath.encode`].

    Returns:
        [`~branches.base.Encoded`], with zeros in the slots that were left out.
    """
    (B, N, S), T, L = branches.mask.shape, text.input_ids.shape[1], slots.stop - slots.start
    may_join = type(path) is SharedPrefix and batch_size is None and joins(text, branches.anchors.shape)
    if may_join and not runs_as_one(model):
        read = cache.again() if isinstance(cache, SharedPrefixCache) else SharedPrefixCache(model, text)
        return Encoded(read.text_hidden, grow_once(read, branches, thoughts), [])
    order = lengths.argsort(dim=1, descending=True, stable=True)
    blocks = _by_length(lengths.gather(1, order).amax(0).tolist())
    saved = N * S + T - sum((stop - start) * (S - L + longest) + T for start, stop, longest in blocks)
    worthwhile = branches.mask.device.type == "cpu" or B * saved >= LEAST_SAVED * len(blocks)
    if 2 * saved < N * S + T or not worthwhile or runs_as_one(model):
        return path.encode(model, text, branches, batch_size, cache)
    rows, parts, texts = torch.arange(B)[:, None], [], []
    for start, stop, longest in blocks:
        columns, end = order[:, start:stop], slots.start + longest
        places = tuple(to_device(x, branches.mask.device) for x in (rows, columns))
        kept = to_device(torch.cat([torch.arange(end), torch.arange(slots.stop, S)]), branches.mask.device)
        embeds, mask = (x[places].index_select(2, kept) for x in (branches.embeds, branches.mask))
        block = Branches(branches.anchors.gather(1, columns), embeds, mask)
        encoded = path.encode(model, text, block, batch_size, cache)
        texts.append(encoded.text)
        hidden = encoded.branches
        left_out = hidden.new_zeros(B, stop - start, L - longest, hidden.shape[-1])
        parts.append(torch.cat([hidden[:, :, :end], left_out, hidden[:, :, end:]], dim=2))
    back = tuple(to_device(x, branches.mask.device) for x in (rows, order.argsort(dim=1)))
    return Encoded(texts[0], torch.cat(parts, dim=1)[back], [])


def grow_once(cache: SharedPrefixCache, branches: Branches, thoughts: Thoughts) -> torch.Tensor:
    """
    Adds slots, `(B, N, Q, E)`, to the branches of thoughts. On a CPU, without a graph, thoughts that say the same run once, long and short
    branches in forwards of their own, and slots that hold nothing are left out, if that saves a quarter of what runs.

    Returns:
        `torch.Tensor` of shape `(B, N, Q, H)`: hidden states of the new slots; anything where a slot holds nothing.
    """
    (B, N), Q, G = branches.anchors.shape, branches.embeds.shape[2], thoughts.mask.shape[2]
    if not can_join(cache, branches.anchors.shape):
        return cache.grow(branches.anchors, branches.embeds, branches.mask)
    first = thoughts.alike().long().argmax(3)  # of those of its position that say the same
    runs = (first == torch.arange(G)).flatten(1)
    rows, columns = runs.nonzero().unbind(1)
    counts = branches.mask[rows, columns, -Q:].sum(1).clamp(min=1)
    order = counts.argsort(descending=True, stable=True)
    blocks = _by_length(counts[order].tolist())
    if 4 * sum((stop - start) * longest for start, stop, longest in blocks) > 3 * B * N * Q:
        return cache.grow(branches.anchors, branches.embeds, branches.mask)
    hidden = cache.text_hidden.new_zeros(len(rows), Q, cache.text_hidden.shape[-1])
    for start, stop, longest in blocks:
        own = order[start:stop]
        hidden[own] = _grown(cache, branches, rows[own], columns[own], longest)
    stands = first.flatten() + torch.arange(B * N) // G * G  # which thought runs for each
    return hidden[(runs.flatten().cumsum(0) - 1)[stands]].unflatten(0, (B, N))


def _grown(
    cache: SharedPrefixCache, branches: Branches, rows: torch.Tensor, columns: torch.Tensor, width: int
) -> torch.Tensor:
    """Hidden states `(R, Q, H)` of the new slots of the branches at columns `(R,)` of rows `(R,)`, which hold something in at most
    `width` of them."""
    Q, at = branches.embeds.shape[2], (rows[:, None], columns[:, None])
    exists = branches.mask[rows, columns, -Q:]
    slots = torch.argsort((~exists).int(), dim=1, stable=True)[:, :width]  # those that hold something first, in order
    mask = torch.cat([branches.mask[rows, columns, :-Q], exists.gather(1, slots)], dim=1)
    embeds = branches.embeds[(*at, slots)][:, None]
    hidden = cache.select(rows, at[1]).grow(branches.anchors[at], embeds, mask[:, None])[:, 0]
    ran = (exists.cumsum(1) - 1).clamp(min=0)  # where each slot was run
    return hidden[torch.arange(len(rows))[:, None], ran]


def _by_length(longest: list[int]) -> list[tuple[int, int, int]]:
    """
    Cuts columns of branches, or single ones, into blocks; the longest of a block has at least twice the length of the next block's.

    Args:
        longest (`list[int]`):
            Length of each, that of a column's longest, in descending order.

    Returns:
        `list` of `tuple`: of each block the first one, the last one plus one, and the greatest length.
    """
    blocks, start = [], 0
    for column in range(1, len(longest) + 1):
        if column == len(longest) or (longest[column] < longest[start] and 2 * longest[column] <= longest[start]):
            blocks.append((start, column, longest[start]))
            start = column
    return blocks
