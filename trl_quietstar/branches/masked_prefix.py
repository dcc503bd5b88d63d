"""The shared prefix by a 4D mask, for families whose attention does not come by Transformers' interface."""

import copy

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from ..model.embeddings import embed_tokens
from ..model.family import cache_name, forward_arguments, position_offset
from ..model.routing import Routing
from ..text.batch import Branches, Text, branch_position_ids
from ..text.transfer import to_device
from .base import BranchCache, Encoded, backbone, branch_places, run_group
from .masks import additive_masks, packed_attention, prefix_attention, text_attention
from .shared_prefix import SharedPrefix


class MaskedPrefix(SharedPrefix):
    """The text and all branches in one forward, told apart by a 4D mask."""

    def read(self, model: PreTrainedModel, text: Text) -> BranchCache:
        return MaskedPrefixCache(model, text)

    def encode(
        self,
        model: PreTrainedModel,
        text: Text,
        branches: Branches,
        batch_size: int | None = None,
        cache: BranchCache | None = None,
    ) -> Encoded:
        def run(group: Branches) -> torch.Tensor:
            return self._packed(model, text, group)

        T, hidden, routings = text.input_ids.shape[1], [], []
        for i, group in enumerate(branches.split(batch_size)):
            packed, calls = run_group(model, run, group, batch_size is not None)
            hidden.append((packed[:, :T], packed[:, T:].unflatten(1, group.mask.shape[1:])))
            text_mask = text.attention_mask & (i == 0)  # each group reads the text again
            mask = torch.cat([text_mask, group.mask.flatten(1)], dim=1).flatten()
            routings += [Routing(logits, mask) for logits in calls]
        return Encoded(hidden[0][0], torch.cat([part for _, part in hidden], dim=1), routings)

    @staticmethod
    def _packed(model: PreTrainedModel, text: Text, branches: Branches) -> torch.Tensor:
        """Hidden states of `[text | branches]`, `(B, T + N·S, H)`."""
        embeds = torch.cat([embed_tokens(model, text.input_ids), branches.embeds.flatten(1, 2)], dim=1)
        anchors = to_device(branches.anchors, embeds.device)
        branch_positions = branch_position_ids(text, anchors, branches.mask).flatten(1)
        position_ids = torch.cat([text.position_ids, branch_positions], dim=1)
        _check_slots(model.config, embeds.shape[1])
        # branches stand behind the text in one row, but their positions continue at the anchors
        allowed = packed_attention(text, anchors, branches.mask)
        return backbone(
            model,
            embeds,
            attention_mask=additive_masks(model.config, allowed, position_ids, position_ids, embeds.dtype),
            position_ids=position_ids + position_offset(model.config),
            use_cache=False,
        )


class MaskedPrefixCache:
    """Keeps the text and the branches' slots, step after step, in one KV cache (a 4D mask tells them apart)."""

    def __init__(self, model: PreTrainedModel, text: Text):
        self.model, self.text, self.branches = model, text, 0
        self.cache = DynamicCache()  # without the config: sliding layers must keep the whole text
        self.key_positions = text.position_ids
        embeds = embed_tokens(model, text.input_ids)
        self.text_hidden = self._forward(embeds, text_attention(text), text.position_ids)

    def select(self, rows: torch.Tensor, columns: torch.Tensor) -> "MaskedPrefixCache":
        T, fresh = self.text.input_ids.shape[1], copy.copy(self)
        slots = (self.key_positions.shape[1] - T) // self.branches
        # the cache holds the text, then one slot of every branch for each step: (step, branch)
        own = T + self.branches * torch.arange(slots)[:, None] + columns[:, None]  # (R, slots, W)
        index = torch.cat([torch.arange(T).expand(len(rows), T), own.flatten(1)], dim=1)
        places = branch_places(rows, index, self.text_hidden.device)
        # layers are copied too: a forward over the new cache must not append to the old
        fresh.cache, fresh.text = copy.copy(self.cache), self.text.rows(rows)
        fresh.cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in fresh.cache.layers:
            assert isinstance(layer, CacheLayerMixin) and layer.keys is not None and layer.values is not None
            layer.keys, layer.values = (x.transpose(1, 2)[places].transpose(1, 2) for x in (layer.keys, layer.values))
        fresh.key_positions = self.key_positions[places]
        return fresh

    def again(self, rows: torch.Tensor | None = None) -> "MaskedPrefixCache":
        return MaskedPrefixCache(self.model, self.text if rows is None else self.text.rows(rows))

    def extend(self, anchors: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        anchors, self.branches = to_device(anchors, embeds.device), anchors.shape[1]
        N, T = anchors.shape[1], self.text.input_ids.shape[1]
        steps = (self.key_positions.shape[1] - T) // N + 1
        position_ids = self.text.position_ids.gather(1, anchors) + steps
        # of the slots at every step a branch sees its own
        own = torch.eye(N, dtype=torch.bool, device=anchors.device).repeat(1, steps)
        allowed = torch.cat([prefix_attention(self.text, anchors), own.expand(len(anchors), -1, -1)], dim=2)
        self.key_positions = torch.cat([self.key_positions, position_ids], dim=1)
        _check_slots(self.model.config, self.key_positions.shape[1])
        return self._forward(embeds, allowed, position_ids)

    def _forward(self, embeds: torch.Tensor, allowed: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        masks = additive_masks(self.model.config, allowed, position_ids, self.key_positions, embeds.dtype)
        return backbone(
            self.model,
            embeds,
            attention_mask=masks,
            position_ids=position_ids + position_offset(self.model.config),
            use_cache=True,
            **{cache_name(forward_arguments(self.model)): self.cache},
        )


def _check_slots(config: PreTrainedConfig, slots: int) -> None:
    """
    Llama 4 scales its queries from a certain place on, and goes by their place in a forward, not by their position.

    Raises:
        `ValueError`: if a forward of so many slots reaches that place.
    """
    config = config.get_text_config()
    limit = config.floor_scale if getattr(config, "attn_temperature_tuning", False) else None
    if limit is not None and slots > limit:
        raise ValueError(
            f"A forward of {slots:,} tokens exceeds the {limit:,} up to which this family tells tokens apart by position; "
            "lower `branch_batch_size` or `max_length`, or set `thought_path='replay'`."
        )
