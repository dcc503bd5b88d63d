"""The universal path, and the oracle that other paths are held against: every branch is run as an ordinary sequence
`text[: j + 1] + branch`."""

import copy
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from ..model.embeddings import embed_tokens
from ..model.routing import Routing, recorded_routing
from ..text.batch import Branches, Text, branch_position_ids, gather_hidden
from ..text.transfer import to_device
from .base import BranchCache, Encoded, backbone, branch_places, run_group


class Replay:
    """Runs every branch, and every document, as an ordinary right-padded sequence: nothing is shared, and no mask is made by
    hand."""

    def read(self, model: PreTrainedModel, text: Text) -> BranchCache:
        return ReplayCache(model, text)

    def encode(
        self,
        model: PreTrainedModel,
        text: Text,
        branches: Branches,
        batch_size: int | None = None,
        cache: BranchCache | None = None,
    ) -> Encoded:
        routings, hidden = [], []
        if cache is None:
            with recorded_routing(model) as calls:
                text_hidden, text_mask = self._text(model, text)
            routings = [Routing(logits, text_mask) for logits in calls]
        else:
            text_hidden = cache.text_hidden

        def run(group: Branches) -> tuple[torch.Tensor, torch.Tensor]:
            return self._branches(model, text, group)

        for group in branches.split(batch_size):
            (group_hidden, mask), calls = run_group(model, run, group, batch_size is not None)
            hidden.append(group_hidden)
            routings += [Routing(logits, mask) for logits in calls]
        return Encoded(text_hidden, torch.cat(hidden, dim=1), routings)

    def text_hidden(self, model: PreTrainedModel, text: Text) -> torch.Tensor:
        """Hidden states of the text, `(B, T, H)`."""
        return self._text(model, text)[0]

    def branch_hidden(self, model: PreTrainedModel, text: Text, branches: Branches) -> torch.Tensor:
        """Hidden states of the branches, `(B, N, S, H)`."""
        return self._branches(model, text, branches)[0]

    def _text(self, model: PreTrainedModel, text: Text) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states of the text, and which tokens of the forward count."""
        embeds = embed_tokens(model, text.input_ids)
        # each document is a branch without slots that hangs off the document's last token
        documents = int(text.host.document_ids.max())
        number = torch.arange(1, documents + 1, device=embeds.device)
        members = text.document_ids[:, None, :] == number[:, None]  # (B, documents, T)
        anchors = (members.long().cumsum(-1).argmax(-1)).masked_fill(~members.any(-1), 0)
        no_slots = embeds.new_zeros(len(embeds), documents, 0, embeds.shape[-1])
        branches = Branches(anchors, no_slots, no_slots[..., 0].bool())
        hidden = self._rows(model, text, embeds, branches)
        # back from a row for each document to where its tokens stand in the text; padding reads any
        rows = (text.document_ids - 1).clamp(min=0)
        sequence = torch.arange(len(embeds), device=embeds.device)[:, None]
        own = torch.arange(hidden.shape[2], device=embeds.device) < members.sum(-1, keepdim=True)
        return hidden[sequence, rows, text.position_ids], own.flatten()

    def _branches(self, model: PreTrainedModel, text: Text, branches: Branches) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states of the branches, and which tokens of the forward count."""
        embeds = embed_tokens(model, text.input_ids)
        branches = replace(branches, anchors=to_device(branches.anchors, embeds.device))
        hidden = self._rows(model, text, embeds, branches)
        index = branch_position_ids(text, branches.anchors, branches.mask).clamp(max=hidden.shape[2] - 1)
        slot = (
            torch.arange(hidden.shape[2], device=embeds.device)
            - text.position_ids.gather(1, branches.anchors)[..., None]
        )
        own = (slot > 0) & (slot <= branches.mask.sum(-1, keepdim=True))
        return hidden.gather(2, index[..., None].expand(*index.shape, hidden.shape[-1])), own.flatten()

    def _rows(self, model: PreTrainedModel, text: Text, embeds: torch.Tensor, branches: Branches) -> torch.Tensor:
        """Hidden states of shape `(B, N, W, H)` of the sequences `document[: anchor + 1] + valid slots`."""
        B, N, S = branches.mask.shape
        T = text.input_ids.shape[1]
        # `source` is where each column of a row comes from in the pool: the T text tokens, then the N·S slots
        prefix = (text.position_ids.gather(1, branches.anchors) + 1)[..., None]
        length = prefix + branches.mask.sum(-1, keepdim=True)
        column = torch.arange(int(length.max()), device=embeds.device)
        in_text = branches.anchors[..., None] + 1 - prefix + column
        source = in_text
        if S > 0:
            slots = torch.argsort((~branches.mask).int(), dim=-1, stable=True)  # valid ones first, in order
            slot = slots.gather(-1, (column - prefix).clamp(0, S - 1))
            in_branch = T + torch.arange(N, device=embeds.device)[:, None] * S + slot
            source = torch.where(column < prefix, in_text, in_branch)
        source = torch.where(column < length, source, 0)  # padding at the end, which the mask hides
        pool = torch.cat([embeds, branches.embeds.flatten(1, 2)], dim=1)
        hidden = backbone(
            model,
            gather_hidden(pool, source).flatten(0, 1),
            attention_mask=(column < length).flatten(0, 1).long(),
            use_cache=False,
        )
        return hidden.unflatten(0, (B, N))


class ReplayCache:
    """Runs every branch again from the text's start at each step."""

    def __init__(self, model: PreTrainedModel, text: Text):
        self.model, self.text, self.path = model, text, Replay()
        self.text_hidden = self.path.text_hidden(model, text)
        self.embeds: list[torch.Tensor] = []

    def select(self, rows: torch.Tensor, columns: torch.Tensor) -> "ReplayCache":
        fresh, places = copy.copy(self), branch_places(rows, columns, self.text_hidden.device)
        fresh.text, fresh.embeds = self.text.rows(rows), [x[places] for x in self.embeds]
        return fresh

    def again(self, rows: torch.Tensor | None = None) -> "ReplayCache":
        return ReplayCache(self.model, self.text if rows is None else self.text.rows(rows))

    def extend(self, anchors: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        self.embeds.append(embeds)
        slots = torch.stack(self.embeds, dim=2)
        branches = Branches(anchors, slots, torch.ones(slots.shape[:3], dtype=torch.bool, device=slots.device))
        return self.path.branch_hidden(self.model, self.text, branches)[:, :, -1]
