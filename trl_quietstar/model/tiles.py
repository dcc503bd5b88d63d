"""Logits a slice of the vocabulary (a tile) at a time, and the gradients of their LM head.

A tile holds all rows and as much of the vocabulary as fits a CPU's cache, or keeps another device busy. What is wanted of a
row over the whole vocabulary is put together from its tiles.
"""

import functools
import threading
from typing import NamedTuple

import torch


TILE_ELEMENTS = 2**21  # logits held at once on a CPU, so that they stay in its cache (8 MB in float32)
GPU_TILE_ELEMENTS = 2**26  # logits held at once on any other device, which needs that much to be busy (256 MB)
LEAST_WIDTH = 256  # of a tile, however many rows it has
SUPPRESSED = -1e10  # the logit of a token without probability; times a probability of 0 it is 0, where infinity is NaN


class _Kept(threading.local):
    """Buffers by name and type; each thread has its own, and writes into no other's."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}


_kept = _Kept()


def tile_elements(device: torch.device) -> int:
    """How many logits are held at once."""
    return TILE_ELEMENTS if device.type == "cpu" else GPU_TILE_ELEMENTS


def scratch(name: str, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """
    A buffer of shape `(rows, width)` to write into. The next call with this name and type in this thread overwrites it.

    Memory that is fresh from the operating system costs more than what is computed in it: of a step's time on a CPU a quarter
    went into the first touch of temporary logits. Other devices keep freed memory themselves.
    """
    if device.type != "cpu":
        return torch.empty(rows, width, dtype=dtype, device=device)
    key, buffers = (name, dtype), _kept.buffers
    if key not in buffers or buffers[key].numel() < rows * width:
        with torch.inference_mode(False):  # a tensor of inference mode could not be written to outside of it
            buffers[key] = torch.empty(rows * width, dtype=dtype, device=device)
    return buffers[key][: rows * width].view(rows, width)


def suppress_(logits: torch.Tensor, at: slice, token_ids: tuple[int, ...]) -> torch.Tensor:
    """Takes all probability from tokens, in place, in logits of shape `(rows, width)` of a slice of the vocabulary."""
    for token_id in token_ids:
        if at.start <= token_id < at.stop:
            logits[:, token_id - at.start] = SUPPRESSED
    return logits


class Head(NamedTuple):
    """
    An LM head, and what its family does to the logits.

    Parameters:
        weight (`torch.Tensor` of shape `(V, H)`), bias (of shape `(V,)`, *optional*):
            Its parameters.
        scale (`float`), softcap (`float`, *optional*):
            As [`~model.family.logit_transform`] gives them.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None


def raw_logits(product: torch.Tensor, bias: torch.Tensor | None, scale: float, name: str) -> torch.Tensor:
    """
    From what a head's weight makes of hidden states to scaled logits before the soft-cap, in at least float32.

    Args:
        product (`torch.Tensor` of shape `(rows, width)`):
            The products; overwritten.
        bias (`torch.Tensor` of shape `(width,)`, *optional*), scale (`float`):
            Of the head.
        name (`str`):
            Of the [`scratch`] that logits of another type than the products' are written to.
    """
    logits = product if bias is None else product.add_(bias.to(product.dtype))
    exact = torch.promote_types(logits.dtype, torch.float32)
    if logits.dtype != exact:
        logits = scratch(name, logits.shape[0], logits.shape[1], exact, logits.device).copy_(logits)
    return logits if scale == 1 else logits.mul_(scale)


class RowGradient(NamedTuple):
    """
    A tile's gradient of some rows, on its way to what the tile was computed from.

    Parameters:
        logits (`torch.Tensor` of shape `(rows, width)`):
            Gradient of scaled logits; overwritten.
        hidden (`torch.Tensor` of shape `(rows, H)`):
            The hidden states, in the dtype of the products.
        total (`torch.Tensor` of shape `(rows, H)`):
            Where the gradient of the hidden states is summed up.
    """

    logits: torch.Tensor
    hidden: torch.Tensor
    total: torch.Tensor


class Tiles:
    """
    Logits of rows of hidden states, tile by tile, and the way back from their gradients.

    Args:
        head ([`Head`]):
            The LM head.
        dtype (`torch.dtype`):
            Of the products. The head is cast to it once, here, and the copy lasts as long as this object does.
        rows (`int`):
            Rows of logits held at once.
    """

    def __init__(self, head: Head, dtype: torch.dtype, rows: int):
        self.weight, self.dtype = head.weight.to(dtype), dtype
        self.bias = None if head.bias is None else head.bias.to(dtype)
        self.exact = torch.promote_types(dtype, torch.float32)  # of what is done with logits
        self.scale, self.softcap = head.scale, head.softcap
        V = head.weight.shape[0]
        self.width = width = min(max(tile_elements(head.weight.device) // max(rows, 1), LEAST_WIDTH), V)
        self.slices = [slice(start, min(start + width, V)) for start in range(0, V, width)]

    def scratch(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A buffer for something of a tile's shape; see [`scratch`]."""
        return scratch(name, like.shape[0], like.shape[1], self.exact, like.device)

    def raw(self, hidden: torch.Tensor, at: slice, name: str) -> torch.Tensor:
        """
        Scaled logits before the soft-cap, in at least float32.

        Args:
            hidden (`torch.Tensor` of shape `(rows, H)`):
                Hidden states, in `dtype`.
            at (`slice`):
                Of the vocabulary.
            name (`str`):
                Of the [`scratch`] that they are written to.
        """
        weight = self.weight[at]
        product = scratch(name, len(hidden), len(weight), self.dtype, hidden.device)
        torch.mm(hidden, weight.T, out=product)
        return raw_logits(product, None if self.bias is None else self.bias[at], self.scale, name)

    def back(self, heads: "HeadGradients", at: slice, *parts: RowGradient) -> None:
        """From gradients of a tile's logits to those of the hidden states, and of the head, which go to `heads`."""
        weight, pairs = self.weight[at], []
        for part in parts:
            grad = (part.logits if self.scale == 1 else part.logits.mul_(self.scale)).to(self.dtype)
            if part.total.dtype == self.dtype:
                part.total.addmm_(grad, weight)
            else:
                part.total.add_(grad @ weight)
            pairs.append((grad, part.hidden))
        heads.put(at, *pairs)


class HeadGradients:
    """
    Gradients of an LM head's weight and bias, filled tile by tile.

    Args:
        head ([`Head`]):
            The LM head.
        wanted (`tuple[bool, bool]`):
            Whether that of the weight, and of the bias, is wanted.
    """

    def __init__(self, head: Head, wanted: tuple[bool, bool]):
        self.weight = torch.empty_like(head.weight) if wanted[0] else None
        self.bias = torch.empty_like(head.bias) if wanted[1] and head.bias is not None else None

    def put(self, at: slice, *pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Fills a slice, from gradients of its logits, `(rows, width)`, each with the hidden states they came from."""
        if self.weight is not None:
            (grad, hidden), *others = pairs
            if grad.dtype == self.weight.dtype:
                torch.mm(grad.T, hidden, out=self.weight[at])
            else:
                self.weight[at] = grad.T @ hidden
            for grad, hidden in others:
                self.weight[at] += grad.T @ hidden
        if self.bias is not None:
            self.bias[at] = sum(grad.sum(0) for grad, _ in pairs)


class Targets:
    """
    Where the target of each row stands in the tiles.

    Args:
        token_ids (`torch.Tensor` of shape `(rows,)`):
            The targets.
        tiles ([`Tiles`]):
            The tiles.
    """

    def __init__(self, token_ids: torch.Tensor, tiles: Tiles):
        V, self.token_ids, self.width = len(tiles.weight), token_ids, tiles.width
        starts = torch.arange(0, V, tiles.width, device=token_ids.device)[:, None, None]
        last = (V - 1 - starts).clamp(max=tiles.width - 1)
        local = token_ids[:, None] - starts
        self.inside = (local >= 0) & (local <= last)  # (tiles, rows, 1)
        # (tiles, rows, 1): place in the tile; of a target that is in another tile, any place in this one
        self.index = torch.minimum(local.clamp(min=0), last)

    def add_(self, tile: int, grad: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """
        Adds to the gradient of a tile's logits, in place, what only the targets get.

        Args:
            tile (`int`):
                Which tile.
            grad (`torch.Tensor` of shape `(rows, width)`):
                Gradient of its logits.
            values (`torch.Tensor` of shape `(tiles, rows, 1)`):
                What to add; 0 where a target is not inside.
        """
        return grad.scatter_add_(1, self.index[tile], values[tile])


class OnlineSoftmax:
    """
    Of rows of logits, tile after tile: the logarithm of the sum of their exponentials, their greatest, and the target's.

    Args:
        token_ids (`torch.Tensor` of shape `(rows,)`):
            The targets.
        tiles ([`Tiles`]):
            The tiles.
    """

    def __init__(self, token_ids: torch.Tensor, tiles: Tiles):
        self.targets = Targets(token_ids, tiles)
        # of each tile:
        self.tops: list[torch.Tensor] = []  # the greatest logit of a row,
        self.places: list[torch.Tensor] = []  # where it is,
        self.totals: list[torch.Tensor] = []  # the sum of exponentials over it,
        self.found: list[torch.Tensor] = []  # and the logit of the target, if it is there

    def fold(self, logits: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """
        Takes the next tile in.

        Args:
            logits (`torch.Tensor` of shape `(rows, width)`):
                Its logits; overwritten unless `out` is given.
            out (`torch.Tensor` of shape `(rows, width)`, *optional*):
                Where to write the exponentials of the logits less the greatest of their row. Defaults to `logits`.

        Returns:
            `torch.Tensor` of shape `(rows,)`: the sum of these exponentials.
        """
        self.found.append(logits.gather(1, self.targets.index[len(self.found)]))
        top, place = logits.max(-1)
        shifted = torch.sub(logits, top[:, None], out=logits if out is None else out)
        self.tops.append(top)
        self.places.append(place)
        self.totals.append(shifted.exp_().sum(-1))
        return self.totals[-1]

    @functools.cached_property
    def parts(self) -> torch.Tensor:
        """Logarithm of the sum of exponentials of each tile, `(tiles, rows)`."""
        return torch.stack(self.tops) + torch.stack(self.totals).log()

    @functools.cached_property
    def log_z(self) -> torch.Tensor:
        """Logarithm of the sum of exponentials of all logits, `(rows,)`."""
        return self.parts.logsumexp(0)

    @property
    def logps(self) -> torch.Tensor:
        """Log-probabilities of the targets, `(rows,)`."""
        tile = self.targets.token_ids // self.targets.width
        return torch.cat(self.found, dim=1).gather(1, tile[:, None])[:, 0] - self.log_z

    @property
    def correct(self) -> torch.Tensor:
        """Whether the target is the likeliest token, `(rows,)`."""
        tile = torch.stack(self.tops).argmax(0, keepdim=True)  # the first of equals is the likeliest
        place = torch.stack(self.places).gather(0, tile) + tile * self.targets.width
        return torch.eq(place[0], self.targets.token_ids)
