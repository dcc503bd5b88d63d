"""What a batch is: texts, thoughts at positions of them, the branches that thoughts run in, and the talk after them.

Everything here is integer bookkeeping on a padded batch of texts; nothing runs a model. Letters, everywhere in this
package: B sequences, T text tokens, J thought positions, G thoughts a position, N = J·G branches, L thought tokens,
M talk tokens, S branch slots, E embedding, H hidden, V vocabulary.

A branch is `start, thought (L), end, first M - 1 talk tokens`; start and end take one slot each, or several of text
([`~model.marks.Marks`]). A slot predicts what the next slot holds. The last thought token predicts nothing, and the last slot of the end
predicts the first talk token; where a thought of text has closed itself, it has no end, and its last token predicts it.
"""

import functools
from dataclasses import dataclass, fields

import torch

from .transfer import Placed, to_device


@dataclass(frozen=True)
class Text(Placed):
    """
    A padded batch of texts, each row holding one document or several packed ones.

    Parameters:
        input_ids (`torch.Tensor` of shape `(B, T)`):
            Token ids; any at padded places.
        attention_mask (`torch.Tensor` of shape `(B, T)`, bool):
            True on text, False on padding (left or right).
        labels (`torch.Tensor` of shape `(B, T)`):
            Token ids, or -100 where a token is not to be predicted (a prompt, say).
        position_ids (`torch.Tensor` of shape `(B, T)`):
            Index of each token within its own document; 0 starts a document.
        document_ids (`torch.Tensor` of shape `(B, T)`):
            Number of the document that a token belongs to, from 1 in each row; 0 on padding.
        thought_mask (`torch.Tensor` of shape `(B, T)`, bool):
            Whether a thought may follow a token, as far as the data say.
        score_mask (`torch.Tensor` of shape `(B, T)`, bool):
            Whether rewards look at a token, if it is a label.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    document_ids: torch.Tensor
    thought_mask: torch.Tensor
    score_mask: torch.Tensor

    @classmethod
    def from_batch(
        cls,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        thought_mask: torch.Tensor | None = None,
        score_mask: torch.Tensor | None = None,
    ) -> "Text":
        """
        Builds a batch from what a collator gives.

        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`):
                Token ids.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
                1 on text. Defaults to all text.
            labels (`torch.Tensor` of shape `(B, T)`, *optional*):
                -100 where a token is not to be predicted. Defaults to `input_ids`. Padding is never predicted.
            position_ids (`torch.Tensor` of shape `(B, T)`, *optional*):
                Positions that restart at 0 with each packed document. By default each row is one document.
            thought_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
                1 where a thought may follow. Defaults to everywhere.
            score_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
                1 on tokens that rewards look at. Defaults to all text.
        """
        mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        labels = input_ids if labels is None else labels
        if position_ids is None:
            position_ids = mask.long().cumsum(1) - 1
        position_ids = position_ids.masked_fill(~mask, 0)
        document_ids = ((position_ids == 0) & mask).long().cumsum(1).masked_fill(~mask, 0)
        labels = labels.masked_fill(~mask, -100)
        thought_mask, score_mask = (mask if x is None else x.bool() for x in (thought_mask, score_mask))
        return cls(input_ids, mask, labels, position_ids, document_ids, thought_mask, score_mask)

    @property
    def is_plain(self) -> bool:
        """Whether no row is packed or padded on the left, so that a causal mask is enough."""
        mask, documents = self.host.attention_mask, self.host.document_ids
        return bool((documents <= 1).all() and mask[:, 0].all() and (mask[:, 1:] <= mask[:, :-1]).all())

    def rows(self, index: torch.Tensor) -> "Text":
        """A batch of some of the rows, by an index of shape `(rows,)` in the host's memory."""
        chosen = (getattr(self.host, field.name)[index] for field in fields(self))
        return Text(*chosen).to(self.input_ids.device)

    def predicted(self) -> torch.Tensor:
        """Mask of shape `(B, T - 1)`: whether the next token belongs to the token's own document and is a label."""
        same_document = self.document_ids[:, :-1] == self.document_ids[:, 1:]
        return self.attention_mask[:, :-1] & same_document & (self.labels[:, 1:] != -100)


@dataclass(frozen=True)
class Positions(Placed):
    """
    Where thoughts are written.

    Parameters:
        index (`torch.Tensor` of shape `(B, J)`):
            Index of the text token that a thought follows.
        mask (`torch.Tensor` of shape `(B, J)`, bool):
            Which positions exist: rows have unequal numbers of them.
    """

    index: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class Thoughts:
    """
    Thoughts at positions.

    Parameters:
        positions ([`Positions`]):
            Where they are.
        token_ids (`torch.Tensor` of shape `(B, J, G, L)`):
            Their tokens.
        mask (`torch.Tensor` of shape `(B, J, G, L)`, bool):
            Which tokens exist: none at a position that does not, and none after a thought's end.
        filler (`bool`):
            Whether the start, over and over, takes the place of the tokens. A control: compute without content.
    """

    positions: Positions
    token_ids: torch.Tensor
    mask: torch.Tensor
    filler: bool = False

    @classmethod
    def of_host(
        cls, positions: Positions, token_ids: torch.Tensor, mask: torch.Tensor, device: torch.device
    ) -> "Thoughts":
        """Sends thoughts that stand in the host's memory to a device; they remember their mask there. Positions may be there already."""
        thoughts = cls(positions.to(device), to_device(token_ids, device), to_device(mask, device))
        vars(thoughts)["host_mask"] = mask  # no field: `dataclasses.replace` must not carry it to another mask
        return thoughts

    def alike(self) -> torch.Tensor:
        """Which thoughts of a position say the same; of shape `(B, J, G, G)`, bool."""
        ids = self.token_ids.masked_fill(~self.mask, -1)
        return (ids[:, :, :, None] == ids[:, :, None]).all(-1)

    @functools.cached_property
    def host_mask(self) -> torch.Tensor:
        """The mask in the host's memory. It is copied once, and not at all where the host knows it already."""
        return self.mask.cpu()

    @property
    def anchors(self) -> torch.Tensor:
        """Index of the text token that each thought follows, of shape `(B, J·G)`, in the host's memory."""
        return self.positions.host.index.repeat_interleave(self.mask.shape[2], dim=1)


@dataclass(frozen=True)
class Branches:
    """
    What runs through the model after positions of a text.

    Parameters:
        anchors (`torch.Tensor` of shape `(B, N)`):
            Index of the text token that a branch follows, in the host's memory.
        embeds (`torch.Tensor` of shape `(B, N, S, E)`):
            Input embeddings of the slots, as [`~model.embeddings.embed_tokens`] gives them.
        mask (`torch.Tensor` of shape `(B, N, S)`, bool):
            False on slots that hold nothing. They take no position: later slots move up.
    """

    anchors: torch.Tensor
    embeds: torch.Tensor
    mask: torch.Tensor

    def split(self, size: int | None) -> list["Branches"]:
        """Splits the branches of each row into groups of `size`; None gives one group."""
        if size is None:
            return [self]
        parts = (x.split(size, dim=1) for x in (self.anchors, self.embeds, self.mask))
        return [Branches(*part) for part in zip(*parts, strict=True)]


@dataclass(frozen=True)
class Talk(Placed):
    """
    The text's own tokens after each position, which are read after a thought and predicted with it.

    Parameters:
        token_ids (`torch.Tensor` of shape `(B, J, M)`):
            The tokens.
        input_mask (`torch.Tensor` of shape `(B, J, M)`, bool):
            Which of them exist in the position's document.
        target_mask (`torch.Tensor` of shape `(B, J, M)`, bool):
            Which of them exist and are labels.
        score_mask (`torch.Tensor` of shape `(B, J, M)`, bool):
            Which of those labels rewards look at.
    """

    token_ids: torch.Tensor
    input_mask: torch.Tensor
    target_mask: torch.Tensor
    score_mask: torch.Tensor


def talk_after(text: Text, positions: Positions, talk_length: int) -> Talk:
    """
    Gathers the next M tokens of the text after each position.

    Args:
        text ([`Text`]):
            The batch.
        positions ([`Positions`]):
            Thought positions.
        talk_length (`int`):
            M.

    Returns:
        [`Talk`], on the text's device.
    """
    device, text, positions = text.input_ids.device, text.host, positions.host
    index = positions.index[..., None] + torch.arange(1, talk_length + 1)
    inside = index < text.input_ids.shape[1]
    index = index.clamp(max=text.input_ids.shape[1] - 1)
    token_ids, labels, documents, scored = (
        gather(x, index) for x in (text.input_ids, text.labels, text.document_ids, text.score_mask)
    )
    own = gather(text.document_ids, positions.index)[..., None]
    input_mask = inside & (documents == own) & positions.mask[..., None]
    target_mask = input_mask & (labels != -100)
    return Talk(token_ids, input_mask, target_mask, target_mask & scored).to(device)


def branch_position_ids(text: Text, anchors: torch.Tensor, slot_mask: torch.Tensor) -> torch.Tensor:
    """Position ids of branch slots, `(B, N, S)`: they go on from the anchor, and leave out slots that hold nothing."""
    start = gather(text.position_ids, anchors)[..., None]
    return start + slot_mask.long().cumsum(-1).clamp(min=1)


def gather(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`values[b, index[b, ...]]` for `values` of shape `(B, T)` and `index` of shape `(B, ...)`."""
    return values.gather(1, index.flatten(1)).view(index.shape)


def gather_hidden(hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`hidden[b, index[b, ...]]` for `hidden` of shape `(B, T, H)`: shape `(B, ..., H)`."""
    rows = torch.arange(hidden.shape[0], device=index.device).view(-1, *[1] * (index.dim() - 1))
    return hidden[rows, index]
