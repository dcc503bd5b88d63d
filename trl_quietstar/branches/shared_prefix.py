"""The fast path: the text runs once, and every branch attends to it and to itself ([`attention`])."""

import copy
from collections.abc import Callable

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..model.embeddings import embed_tokens
from ..model.family import position_offset
from ..model.routing import Routing, recorded_routing
from ..text.batch import Branches, Text, branch_position_ids
from ..text.transfer import to_device
from . import attention, interface
from .attention import BranchReading, KeysValues, SeenText, TextMemory, TextReading
from .base import BranchCache, Encoded, backbone, branch_places, run_group
from .cuda_graph import TokenGraph, records
from .masks import additive_masks, in_mask_form, local_layer_types, text_attention


Slots = dict[torch.nn.Module, KeysValues]  # of branches' slots, by attention module


class SharedPrefix:
    """Runs the text once, and all branches attending to it."""

    def read(self, model: PreTrainedModel, text: Text) -> BranchCache:
        return SharedPrefixCache(model, text)

    def encode(
        self,
        model: PreTrainedModel,
        text: Text,
        branches: Branches,
        batch_size: int | None = None,
        cache: BranchCache | None = None,
    ) -> Encoded:
        with recorded_routing(model) as calls:
            cache = cache.again() if isinstance(cache, SharedPrefixCache) else SharedPrefixCache(model, text)
        routings = [Routing(logits, text.attention_mask.flatten()) for logits in calls]

        def run(group: Branches) -> torch.Tensor:
            return cache.grow(group.anchors, group.embeds, group.mask)

        hidden = []
        for group in branches.split(batch_size):
            branch_hidden, calls = run_group(model, run, group, batch_size is not None)
            hidden.append(branch_hidden)
            routings += [Routing(logits, group.mask.flatten()) for logits in calls]
        return Encoded(cache.text_hidden, _AfterText.apply(torch.cat(hidden, dim=1), cache.text_hidden), routings)


class _AfterText(torch.autograd.Function):
    """
    Hands on the branches' hidden states; the backward sends zeros to the text's.

    Sharded layers gather their weights when a gradient comes to their output. Where no loss is on the text itself, its last
    layer would get gradients through keys and values alone, and find its weights away.
    """

    @staticmethod
    def forward(ctx, hidden, text_hidden):
        ctx.text_shape = text_hidden.shape
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad):
        return grad, grad.new_zeros(ctx.text_shape)


class SharedPrefixCache:
    """
    Keeps the text's keys and values, and those of the branches' slots, step after step.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The causal LM.
        text ([`Text`]):
            The batch.
        embed (`Callable`, *optional*):
            From token ids to embeddings. Defaults to [`~model.embeddings.embed_tokens`].
    """

    def __init__(self, model: PreTrainedModel, text: Text, embed: Callable | None = None):
        if not interface.enable(model):
            raise ValueError("The attention of this family cannot branch.")
        self.model, self.text, self.memory = model, text, TextMemory()
        self.own: Slots = {}
        self.length = 0  # slots that were kept
        self.room: int | None = None  # slots that branches will come to have, where it is known
        self.token: TokenGraph | None = None
        mask, position_ids = None, torch.arange(text.input_ids.shape[1], device=text.input_ids.device)[None]
        embeds = embed_tokens(model, text.input_ids) if embed is None else embed(text.input_ids)
        if not text.is_plain:  # else the family's own causal mask is right, and faster kernels take it
            position_ids = text.position_ids
            mask = additive_masks(model.config, text_attention(text), position_ids, position_ids, embeds.dtype)
        self.text_hidden = self._forward(embeds, TextReading(self.memory), mask, position_ids.expand(len(embeds), -1))
        _check_windows(model.config, self.memory)

    def again(self, rows: torch.Tensor | None = None) -> "SharedPrefixCache":
        fresh = copy.copy(self)  # which shares the text's keys and values: nothing writes into them
        fresh.own, fresh.length, fresh.room, fresh.token = {}, 0, None, None
        if rows is not None:
            index = to_device(rows, self.text_hidden.device)
            fresh.memory = self.memory.rows(index)
            fresh.text, fresh.text_hidden = self.text.rows(rows), self.text_hidden[index]
        return fresh

    def select(self, rows: torch.Tensor, columns: torch.Tensor) -> "SharedPrefixCache":
        """As in [`~branches.base.BranchCache`]; a text may be in several rows."""
        fresh, places = copy.copy(self), branch_places(rows, columns, self.text_hidden.device)
        fresh.token = None  # of other branches
        if not torch.equal(rows, torch.arange(len(self.text.input_ids))):
            fresh.text, fresh.memory = self.text.rows(rows), self.memory.rows(places[0][:, 0])
        used = slice(self.length)  # buffers may have room for more slots
        fresh.own = {
            module: pair.map(lambda x: x[:, :, :, used].transpose(1, 2)[places].transpose(1, 2))
            for module, pair in self.own.items()
        }
        return fresh

    def grown(self, start: int) -> Slots:
        """Keys and values of the slots from `start` on."""
        new = slice(start, self.length)
        return {module: pair.map(lambda x: x[:, :, :, new].clone()) for module, pair in self.own.items()}

    def take_back(self, grown: list[tuple[Slots, torch.Tensor]]) -> None:
        """
        Adds slots that were grown in caches that [`select`] gave.

        Args:
            grown (`list[tuple]`):
                In order, what [`grown`] gave of such a cache, and which of its branches, as a place among rows and columns, each
                branch here takes; of shape `(B, N)`.
        """
        for module, pair in self.own.items():
            parts = [pair.map(lambda x: x[:, :, :, : self.length])]
            for slots, branch in grown:
                parts.append(slots[module].map(lambda x: x.transpose(1, 2).flatten(0, 1)[branch].transpose(1, 2)))  # noqa: B023  # called at once
            self.own[module] = KeysValues(*(torch.cat(x, dim=3) for x in zip(*parts, strict=True)))
        self.token = None  # which writes elsewhere
        self.length += sum(next(iter(slots.values())).keys.shape[3] for slots, _ in grown)

    def extend(self, anchors: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        if self.token is None or self.length == self.token.room or torch.is_grad_enabled():
            self.token = TokenGraph(self, anchors, embeds) if records(self) else None
        if self.token is not None:
            hidden = self.token.extend(self, embeds)
            self.length += 1
            return hidden
        mask = torch.ones(*anchors.shape, self.length + 1, dtype=torch.bool, device=embeds.device)
        return self.grow(anchors, embeds[:, :, None], mask, keep=True)[:, :, 0]

    def grow(
        self, anchors: torch.Tensor, embeds: torch.Tensor, mask: torch.Tensor, keep: bool = False
    ) -> torch.Tensor:
        """
        Adds slots to every branch.

        Args:
            anchors (`torch.Tensor` of shape `(B, N)`):
                The text index each branch hangs off, in the host's memory.
            embeds (`torch.Tensor` of shape `(B, N, Q, E)`):
                Input embeddings of the new slots.
            mask (`torch.Tensor` of shape `(B, N, s + Q)`, bool):
                Which of the slots that were kept, and of the new ones, hold something.
            keep (`bool`):
                Whether later slots will see the new ones.

        Returns:
            Hidden states of the new slots, of shape `(B, N, Q, H)`.
        """
        if embeds[..., 0].numel() == 0:
            return self.text_hidden.new_zeros(*embeds.shape[:3], self.text_hidden.shape[-1])
        reading = self._branch_reading(anchors, mask, keep)
        hidden = self.run(embeds, reading)
        if keep:
            self.length += embeds.shape[2]
            self.token = None  # which counts its slots by itself
        return hidden

    def run(self, embeds: torch.Tensor, reading: BranchReading) -> torch.Tensor:
        """The forward over new slots of every branch, from embeddings `(B, N, Q, E)` to hidden states `(B, N, Q, H)`."""
        # four dimensions, which families hand through; the mask of a forward that looks packed would be built otherwise
        nothing = embeds.new_zeros(len(embeds), 1, 1, 1)
        masks = in_mask_form(self.model.config, nothing, dict.fromkeys(local_layer_types(self.model.config), nothing))
        hidden = self._forward(embeds.flatten(1, 2), reading, masks, reading.now.flatten(1))
        return hidden.unflatten(1, embeds.shape[1:3])

    def _branch_reading(self, anchors: torch.Tensor, mask: torch.Tensor, keep: bool) -> BranchReading:
        """How the new slots attend; the mask, `(B, N, s + Q)`, is that of kept and new slots."""
        slots, Q = mask.shape[2], mask.shape[2] - self.length
        # a new slot sees the valid slots before it, and itself even if masked: a softmax over nothing would be NaN
        causal = torch.ones(Q, slots, dtype=torch.bool, device=mask.device).tril(slots - Q)
        itself = torch.arange(slots - Q, slots, device=mask.device)[:, None] == torch.arange(slots, device=mask.device)
        text = self.seen_text(anchors, Q, slots)
        positions = branch_position_ids(self.text, text.last, mask)
        return BranchReading(
            memory=self.memory,
            own=self.own,
            text=text,
            slots=(causal & mask[:, :, None]) | itself,
            positions=positions,
            now=positions[:, :, self.length :],
            keep=keep,
        )

    def seen_text(self, anchors: torch.Tensor, new: int, slots: int) -> SeenText:
        """What branches see of the text, if `new` of their `slots` attend in a forward."""
        heads, device = self.model.config.get_text_config().num_attention_heads, self.text_hidden.device
        rows = len(anchors) * heads * min(new, attention.CHUNK_SLOTS)
        chunk = attention.chunk_size(rows, self.text.input_ids.shape[1] + slots, device)
        # what chunks see is worked out in the host's memory, so that no device has to be waited for
        anchors, host = anchors.cpu(), self.text.host
        first = anchors - host.position_ids.gather(1, anchors)  # where the anchor's document begins
        return SeenText(to_device(first, device), to_device(anchors, device), _spans(first, anchors, chunk), chunk)

    def _forward(self, embeds: torch.Tensor, reading, mask, position_ids: torch.Tensor) -> torch.Tensor:
        return backbone(
            self.model,
            embeds,
            attention_mask=mask,
            position_ids=position_ids + position_offset(self.model.config),
            use_cache=False,
            quietstar_reading=reading.attend,  # a function, since FSDP2 copies any dataclass on its way to a layer
        )


def _spans(first: torch.Tensor, last: torch.Tensor, chunk: int) -> list[tuple[int, int]]:
    """For each chunk of branches the least `first` and the greatest `last`, both of shape `(B, N)`."""
    least, greatest = first.amin(0), torch.maximum(first, last).amax(0)
    pairs = [torch.stack([a.amin(), b.amax()]) for a, b in zip(least.split(chunk), greatest.split(chunk), strict=True)]
    return [(start, end) for start, end in torch.stack(pairs).tolist()]


def _check_windows(config: PreTrainedConfig, memory: TextMemory) -> None:
    """
    Branches would see past a window that the layers do not name, and a text shorter than the window would not show it.

    Raises:
        `ValueError`: if the model has such a window.
    """
    kinds = local_layer_types(config)
    if "chunked_attention" in kinds or (kinds and not memory.has_windows):
        raise ValueError("The attention layers of this family do not name the window that they see.")
