"""Branches whose thoughts differ much in length, run in forwards of their own."""

import torch

from ..branches.base import BranchCache, BranchPath, Encoded
from ..model.heads import ThinkingModel
from ..model.routing import has_router_loss
from ..model.sharding import model_is_sharded
from ..text.batch import Branches, Text
from ..text.transfer import to_device


LEAST_SAVED = 4096  # tokens that a further forward must save on an accelerator, which runs fewer while it is launched


def encode_by_length(
    model: ThinkingModel,
    text: Text,
    path: BranchPath,
    branches: Branches,
    lengths: torch.Tensor,
    slots: slice,
    batch_size: int | None,
    cache: BranchCache | None,
) -> Encoded:
    """
    Runs text and branches; where thoughts differ much in length, long and short ones in forwards of their own.

    Args:
        model ([`ThinkingModel`]), text ([`Text`]), path ([`BranchPath`]), branches ([`Branches`]):
            What to run, and how.
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
    order = lengths.argsort(dim=1, descending=True, stable=True)
    blocks = _by_length(lengths.gather(1, order).amax(0).tolist())
    saved = N * S + T - sum((stop - start) * (S - L + longest) + T for start, stop, longest in blocks)
    worthwhile = branches.mask.device.type == "cpu" or B * saved >= LEAST_SAVED * len(blocks)
    if 2 * saved < N * S + T or not worthwhile or has_router_loss(model.config) or model_is_sharded(model):
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


def _by_length(longest: list[int]) -> list[tuple[int, int, int]]:
    """
    Cuts columns into blocks; the longest thought of a block has at least twice the length of the next block's.

    Args:
        longest (`list[int]`):
            Length of each column's longest thought, in descending order.

    Returns:
        `list` of `tuple`: of each block the first column, the last one plus one, and the length of its longest thought.
    """
    blocks, start = [], 0
    for column in range(1, len(longest) + 1):
        if column == len(longest) or (longest[column] < longest[start] and 2 * longest[column] <= longest[start]):
            blocks.append((start, column, longest[start]))
            start = column
    return blocks
