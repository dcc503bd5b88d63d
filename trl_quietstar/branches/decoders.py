"""Texts that grow token by token, with a branch after each; generation asks them for hidden states.

- [`CachedDecoder`]: text and branches share one KV cache, from which a branch is dropped as soon as it was used. For models
  that tell them apart by a mask.
- [`CachedReplayDecoder`]: the text's cache is copied for each branch, and the copy dropped. For recurrent models above all.
- [`ReplayDecoder`]: everything runs again at each call. For models whose cache is not exact.
"""

from typing import Protocol

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from ..model.embeddings import embed_tokens, weight_of
from ..model.family import cache_name, forward_arguments, position_offset
from ..model.heads import ThinkingModel
from ..text.batch import Branches, Text
from ..text.transfer import to_device
from .base import backbone
from .cached_replay import CachedReplay, States
from .masks import additive_masks
from .replay import Replay


class Decoder(Protocol):
    """
    B texts that grow, each with one branch or none.

    Masks are in the host's memory, so that the host knows what is kept without asking; token ids and embeddings are on the device.
    """

    def read(self, token_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """
        Appends tokens to the texts.

        Args:
            token_ids (`torch.Tensor` of shape `(B, Q)`):
                The tokens.
            mask (`torch.Tensor` of shape `(B, Q)`, bool):
                False on padding, which is on the left.

        Returns:
            Hidden states of the last tokens, of shape `(B, H)`.
        """
        ...

    def fork(self, rows: torch.Tensor, unread: int = 0) -> None:
        """
        Begins a branch in the rows of a mask `(B,)`, before the last `unread` tokens of the text. It takes the place of an older one.
        """
        ...

    def extend(self, embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """
        Appends slots to the branches.

        Args:
            embeds (`torch.Tensor` of shape `(B, Q, E)`):
                Input embeddings of the slots.
            mask (`torch.Tensor` of shape `(B, Q)`, bool):
                Which slots hold something.

        Returns:
            Hidden states of the slots, of shape `(B, Q, H)`; anything where the mask is False.
        """
        ...

    def drop(self, rows: torch.Tensor) -> None:
        """Ends the branches in the rows of a mask `(B,)`, if there are any."""
        ...


class CachedDecoder:
    """
    Texts and branches in one KV cache.

    Each slot of the cache has an owner: 0 for the text, or the number of a branch. A text sees its own earlier slots. A branch sees
    the text up to where it was forked, and its own earlier slots.

    Args:
        model ([`~model.heads.ThinkingModel`]):
            The model.
        rows (`int`):
            B.
    """

    def __init__(self, model: ThinkingModel, rows: int):
        self.model = model
        self.cache = DynamicCache()  # without the config: sliding layers must keep the whole text
        nothing = torch.zeros(rows, 0, dtype=torch.long, device=model.device)
        self.positions, self.owner, self.valid = nothing, nothing, nothing.bool()  # of each slot
        zeros = torch.zeros(rows, dtype=torch.long, device=model.device)
        self.length = zeros  # of each row's text
        self.branch = zeros  # number of each row's branch, 0 without one
        self.anchor = self.tip = zeros  # positions of the text that a branch follows, and of the branch's last slot
        self.forks = 0
        # the host's own copies, by which it knows what to drop
        self.host_owner = torch.zeros(rows, 0, dtype=torch.long)
        self.host_branch = torch.zeros(rows, dtype=torch.long)

    def read(self, token_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        mask = to_device(mask, token_ids.device)
        steps = mask.long().cumsum(1)
        positions = (self.length[:, None] + steps - 1).clamp(min=0)
        self.length = self.length + steps[:, -1]
        text = torch.zeros_like(self.branch)
        self._own(torch.zeros_like(self.host_branch), token_ids.shape[1])
        return self._forward(embed_tokens(self.model, token_ids), positions, mask, text, positions.amax(1))[:, -1]

    def fork(self, rows: torch.Tensor, unread: int = 0) -> None:
        self.forks += 1
        self.host_branch = torch.where(rows, self.forks, self.host_branch)
        rows = to_device(rows, self.branch.device)
        self.branch = torch.where(rows, self.forks, self.branch)
        last = self.length - 1 - unread
        self.anchor = torch.where(rows, last, self.anchor)
        self.tip = torch.where(rows, last, self.tip)

    def extend(self, embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        mask = to_device(mask, embeds.device)
        steps = mask.long().cumsum(1)
        positions = self.tip[:, None] + steps
        self.tip = self.tip + steps[:, -1]
        self._own(self.host_branch, embeds.shape[1])
        return self._forward(embeds, positions, mask, self.branch, self.anchor)

    def drop(self, rows: torch.Tensor) -> None:
        self.host_branch = self.host_branch.masked_fill(rows, 0)
        self.branch = self.branch.masked_fill(to_device(rows, self.branch.device), 0)
        keep = ((self.host_owner == 0) | (self.host_owner == self.host_branch[:, None])).any(0)
        kept = keep.nonzero().flatten()
        if len(kept) == len(keep):
            return
        index = to_device(kept, self.branch.device)
        if bool(keep[: len(kept)].all()):
            self.cache.crop(len(kept) - len(keep))
        else:
            for layer in self.cache.layers:
                assert isinstance(layer, CacheLayerMixin) and layer.keys is not None and layer.values is not None
                layer.keys, layer.values = layer.keys.index_select(2, index), layer.values.index_select(2, index)
        self.positions, self.owner, self.valid = (
            x.index_select(1, index) for x in (self.positions, self.owner, self.valid)
        )
        self.host_owner = self.host_owner[:, kept]

    def _own(self, owner: torch.Tensor, slots: int) -> None:
        """Notes on the host that each row has new slots of its owner, `(B,)`."""
        self.host_owner = torch.cat([self.host_owner, owner[:, None].expand(-1, slots)], dim=1)

    def _forward(
        self,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor,
        owner: torch.Tensor,
        anchor: torch.Tensor,
    ) -> torch.Tensor:
        """Runs new slots, `(B, Q, E)`, at positions `(B, Q)`. Those of a row's owner, `(B,)`, see text up to its anchor, `(B,)`."""
        Q = embeds.shape[1]
        self.positions = torch.cat([self.positions, positions], dim=1)
        self.owner = torch.cat([self.owner, owner[:, None].expand(-1, Q)], dim=1)
        self.valid = torch.cat([self.valid, mask.bool()], dim=1)
        seen = ((self.owner == 0) & (self.positions <= anchor[:, None])) | (self.owner == owner[:, None])
        earlier = self.positions[:, None] <= positions[..., None]
        own = torch.eye(Q, dtype=torch.bool, device=embeds.device)
        allowed = (seen & self.valid)[:, None] & earlier
        allowed[:, :, -Q:] |= own  # so that no row is empty
        config = self.model.config
        return backbone(
            self.model,
            embeds,
            attention_mask=additive_masks(config, allowed, positions, self.positions, embeds.dtype),
            position_ids=positions + position_offset(config),
            use_cache=True,
            **{cache_name(forward_arguments(self.model)): self.cache},
        )


class CachedReplayDecoder:
    """
    Texts in one batch of states, branches in another one.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        rows (`int`):
            B.
    """

    def __init__(self, model: PreTrainedModel, rows: int):
        self.model, self.rows = model, rows
        self.text: States | None = None
        self.branches: States | None = None
        self.owners = torch.zeros(0, dtype=torch.long)  # the text of each branch, in the host's memory

    def read(self, token_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if self.text is None:
            return self._read_prompts(token_ids, mask)
        return self.text.step(embed_tokens(self.model, token_ids[:, -1]))

    def fork(self, rows: torch.Tensor, unread: int = 0) -> None:
        self.drop(rows)
        assert self.text is not None and unread == 0  # no state of a text is kept from before its end
        owners = rows.nonzero().flatten()
        fresh = self.text.select(owners)
        self.branches = fresh if self.branches is None else States.join([self.branches, fresh])
        self.owners = torch.cat([self.owners, owners])

    def extend(self, embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.stack([self._step(*slot) for slot in zip(embeds.unbind(1), mask.unbind(1), strict=True)], dim=1)

    def drop(self, rows: torch.Tensor) -> None:
        keep = ~rows[self.owners]
        if bool(keep.all()):
            return
        assert self.branches is not None
        self.branches = self.branches.select(keep.nonzero().flatten()) if bool(keep.any()) else None
        self.owners = self.owners[keep]

    def _read_prompts(self, token_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Runs prompts of equal lengths together, so that none is padded; returns hidden states of their last tokens, `(B, H)`."""
        lengths = mask.sum(1)
        parts, order, hidden = [], [], []
        for length in lengths.unique().tolist():
            order.append((lengths == length).nonzero().flatten())
            parts.append(States(self.model))
            rows, places = mask[order[-1]].bool().nonzero().unbind(1)
            places = to_device(torch.stack([order[-1][rows], places]), token_ids.device)
            prompts = token_ids[tuple(places)].view(-1, length)
            hidden.append(parts[-1].read(embed_tokens(self.model, prompts))[:, -1])
        back = torch.cat(order).argsort()
        self.text = States.join(parts).select(back)
        return torch.cat(hidden).index_select(0, to_device(back, token_ids.device))

    def _step(self, embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Appends a slot, `(B, E)`, to the branches in the rows of a mask `(B,)`; returns hidden states `(B, H)`, 0 elsewhere."""
        assert self.branches is not None
        moves = mask[self.owners].bool()
        moving, waiting = moves.nonzero().flatten(), (~moves).nonzero().flatten()
        if len(moving) == 0:  # as where all thoughts have closed themselves
            return embeds.new_zeros(self.rows, weight_of(self.model.get_output_embeddings()).shape[1])
        states = self.branches if len(waiting) == 0 else self.branches.select(moving)
        hidden = states.step(embeds.index_select(0, to_device(self.owners[moving], embeds.device)))
        if len(waiting) > 0:
            self.branches = States.join([states, self.branches.select(waiting)])
        rows, self.owners = self.owners[moving], self.owners[torch.cat([moving, waiting])]
        rows = to_device(rows, hidden.device)
        return hidden.new_zeros(self.rows, hidden.shape[1]).index_copy_(0, rows, hidden)


class ReplayDecoder:
    """
    Runs texts and branches again at each call.

    Args:
        model ([`~model.heads.ThinkingModel`]):
            The model.
        rows (`int`):
            B.
    """

    def __init__(self, model: ThinkingModel, rows: int):
        self.model, self.path = model, Replay()
        self.token_ids = torch.zeros(rows, 0, dtype=torch.long, device=model.device)
        self.mask = self.slot_mask = torch.zeros(rows, 0, dtype=torch.bool)
        self.slots = embed_tokens(model, self.token_ids)
        self.anchors = torch.zeros(rows, dtype=torch.long)

    def read(self, token_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        self.token_ids = torch.cat([self.token_ids, token_ids], dim=1)
        self.mask = torch.cat([self.mask, mask.bool()], dim=1)
        return self.path.text_hidden(self.model, self._text())[:, -1]

    def fork(self, rows: torch.Tensor, unread: int = 0) -> None:
        self.anchors = torch.where(rows, self.mask.shape[1] - 1 - unread, self.anchors)
        self.drop(rows)

    def extend(self, embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        self.slots = torch.cat([self.slots, embeds], dim=1)
        self.slot_mask = torch.cat([self.slot_mask, mask.bool()], dim=1)
        mask = to_device(self.slot_mask, self.slots.device)
        branches = Branches(self.anchors[:, None], self.slots[:, None], mask[:, None])
        return self.path.branch_hidden(self.model, self._text(), branches)[:, 0, -embeds.shape[1] :]

    def drop(self, rows: torch.Tensor) -> None:
        mask = self.slot_mask & ~rows[:, None]
        used = mask.any(0).nonzero().flatten()
        self.slots = self.slots.index_select(1, to_device(used, self.slots.device))
        self.slot_mask = mask[:, used]

    def _text(self) -> Text:
        return Text.from_batch(self.token_ids, to_device(self.mask, self.token_ids.device))


def decoder_of(model: ThinkingModel, rows: int) -> Decoder:
    """A decoder for B `rows`: the fastest that the start-up check found exact on this model."""
    if model.branches_in_cache:
        return CachedDecoder(model, rows)
    if isinstance(model.thought_path, CachedReplay) and not model.thought_marks.unread:
        return CachedReplayDecoder(model, rows)
    return ReplayDecoder(model, rows)
