"""Written thoughts: those that the data hold, to be imitated. Rows that hold any are set apart from those that are sampled."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch

from .batch import Positions, Text, Thoughts
from .positions import positions_at


@dataclass(frozen=True)
class Written:
    """
    The rows of a batch that hold written thoughts.

    Parameters:
        text ([`Text`]):
            Those rows, R of them.
        thoughts ([`Thoughts`] of shape `(R, J, 1, L)`):
            The thoughts that are written for them. Several at one place are several positions with the same index.
    """

    text: Text
    thoughts: Thoughts

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name, in the host's memory; [`Written.of`] takes them back."""
        text, positions, thoughts = self.text.host, self.thoughts.positions.host, self.thoughts
        own = {field.name: getattr(text, field.name) for field in fields(text)}
        own |= {"index": positions.index, "exists": positions.mask}
        return own | {"thought_ids": thoughts.token_ids.cpu(), "mask": thoughts.host_mask}

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], device: torch.device) -> "Written":
        """The rows whose tensors [`Written.tensors`] gave, on a device."""
        text = Text(*(tensors[field.name] for field in fields(Text))).to(device)
        positions = Positions(tensors["index"], tensors["exists"])
        thoughts = Thoughts.of_host(positions, tensors["thought_ids"], tensors["mask"], device)
        return cls(text, thoughts)


def joined(parts: Sequence[Mapping[str, torch.Tensor]], device: torch.device) -> Written:
    """The rows of all parts on a device; each part, of which there is at least one, is as [`Written.tensors`] gives it."""
    stacked = {name: _stacked([part[name] for part in parts], -100 if name == "labels" else 0) for name in parts[0]}
    return Written.of(stacked, device)


def _stacked(tensors: list[torch.Tensor], fill: int) -> torch.Tensor:
    """One after another along the first dimension, filled up at the end of the others."""
    shape = [max(sizes) for sizes in zip(*(x.shape[1:] for x in tensors), strict=True)]
    whole, first = tensors[0].new_full((sum(len(x) for x in tensors), *shape), fill), 0
    for x in tensors:
        whole[(slice(first, first + len(x)), *(slice(size) for size in x.shape[1:]))] = x
        first += len(x)
    return whole


@dataclass(frozen=True)
class Divided:
    """
    A batch by what happens to its rows.

    Parameters:
        sampled ([`Text`]):
            The rows whose thoughts are sampled. Where there are none, the first row with nothing to predict, so that every
            process and every step computes the same terms.
        rows (`list[int]`):
            The index of each sampled row in the batch.
        written ([`Written`], *optional*):
            The rows whose thoughts are written in the data. None: there are none.
    """

    sampled: Text
    rows: list[int]
    written: Written | None = None

    @classmethod
    def undivided(cls, text: Text) -> "Divided":
        """A batch whose rows are all sampled."""
        return cls(text, list(range(len(text.input_ids))))

    def columns(self, inputs: Mapping) -> dict[str, list] | None:
        """Columns of the data for the sampled rows, where the collated batch has columns."""
        columns = inputs.get("columns")
        return columns and {name: [values[row] for row in self.rows] for name, values in columns.items()}


def no_thoughts(text: Text, num_thoughts: int) -> Thoughts:
    """
    The thoughts of a batch without a place for any: one slot each, which holds nothing.

    Args:
        text ([`Text`]):
            The batch.
        num_thoughts (`int`):
            G.
    """
    (B, T), device = text.input_ids.shape, text.input_ids.device
    positions = positions_at(torch.zeros(B, T - 1, dtype=torch.bool))
    nothing = torch.zeros(B, 1, num_thoughts, 1, dtype=torch.long)
    return Thoughts.of_host(positions, nothing, nothing.bool(), device)


def has_written(inputs: Mapping) -> bool:
    """Whether a collated batch comes from data with written thoughts; the same on every process."""
    return "written_ids" in inputs


def divide(text: Text, inputs: Mapping, always: bool = False) -> Divided:
    """
    Sets the rows with written thoughts apart.

    Args:
        text ([`Text`]):
            The batch.
        inputs (`Mapping`):
            The collated batch. Its `written_ids`, of shape `(B, K, L)`, are the tokens of the thoughts; its `written_at`, of shape
            `(B, K)`, are the indices of the text tokens that they follow. Both hold -1 where there is nothing.
        always (`bool`):
            Whether a batch without written thoughts gives a row with none of them, for processes that must run as many
            layers as others.

    Returns:
        [`Divided`].
    """
    exists = inputs["written_at"] >= 0
    holds = exists.any(1)
    if not holds.any():
        nothing = without_thoughts(text) if always else None
        return replace(Divided.undivided(text), written=nothing)
    written = _of_rows(text, inputs, holds.nonzero().flatten())
    left = (~holds).nonzero().flatten()
    if len(left) == 0:
        return Divided(_without_labels(text), [0], written)
    return Divided(text.rows(left), left.tolist(), written)


def without_thoughts(text: Text) -> Written:
    """A row of a batch without a thought, with nothing to predict."""
    row = _without_labels(text)
    return Written(row, no_thoughts(row, 1))


def _of_rows(text: Text, inputs: Mapping, rows: torch.Tensor) -> Written:
    """The written thoughts of some rows, in as few slots as hold them."""
    at, ids = inputs["written_at"][rows], inputs["written_ids"][rows]
    mask = (ids >= 0) & (at >= 0)[..., None]
    ids, mask = (x[..., : max(int(mask.sum(-1).max()), 1)][:, :, None] for x in (ids.clamp(min=0), mask))
    positions = Positions(at.clamp(min=0), at >= 0)
    thoughts = Thoughts.of_host(positions, ids * mask, mask, text.input_ids.device)
    return Written(text.rows(rows), thoughts)


def _without_labels(text: Text) -> Text:
    """The first row, with nothing to predict and no place for a thought."""
    row = text.rows(torch.tensor([0])).host
    return replace(row, labels=torch.full_like(row.labels, -100)).to(text.input_ids.device)
