"""What every way of running branches offers, and what all of them use.

A path answers one question: what are the hidden states of a text and of the branches that hang off it? Sampling and
scoring (`thinking`) are the same code on every path, and all paths must agree.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeVar

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..model.concurrency import without_head
from ..model.embeddings import embedding_inputs
from ..model.routing import Routing, has_router_loss, recorded_routing
from ..text.batch import Branches, Text
from ..text.transfer import to_device


Result = TypeVar("Result")  # of a group's forward


class BranchCache(Protocol):
    """A text that was read, and branches that grow token by token after it."""

    @property
    def text_hidden(self) -> torch.Tensor:
        """Hidden states of the text, `(B, T, H)`."""
        ...

    def extend(self, anchors: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """
        Adds one slot to every branch.

        Args:
            anchors (`torch.Tensor` of shape `(B, N)`):
                The text index each branch hangs off, in the host's memory; equal at every call.
            embeds (`torch.Tensor` of shape `(B, N, E)`):
                Input embeddings of the new slots.

        Returns:
            Hidden states of the new slots, of shape `(B, N, H)`.
        """
        ...

    def select(self, rows: torch.Tensor, columns: torch.Tensor) -> "BranchCache":
        """
        A cache with some of the branches, as long as they are; this cache keeps all.

        Args:
            rows (`torch.Tensor` of shape `(R,)`):
                Which texts, in the host's memory.
            columns (`torch.Tensor` of shape `(R, W)`):
                Which of each text's branches, in the host's memory.
        """
        ...

    def again(self, rows: torch.Tensor | None = None) -> "BranchCache":
        """
        A cache of the text without branches.

        Args:
            rows (`torch.Tensor` of shape `(R,)`, *optional*):
                Which texts, in the host's memory. Defaults to all.
        """
        ...


@dataclass(frozen=True)
class Encoded:
    """
    What the model made of a text and its branches.

    Parameters:
        text (`torch.Tensor` of shape `(B, T, H)`), branches (`torch.Tensor` of shape `(B, N, S, H)`):
            Hidden states; anything at masked slots.
        routings (`list` of [`~model.routing.Routing`]):
            Where a mixture of experts sent each token, once; empty without a router loss.
    """

    text: torch.Tensor
    branches: torch.Tensor
    routings: list[Routing]


class BranchPath(Protocol):
    """A way to run texts and branches through a model's backbone."""

    def read(self, model: PreTrainedModel, text: Text) -> BranchCache:
        """Reads a text to sample from."""
        ...

    def encode(
        self,
        model: PreTrainedModel,
        text: Text,
        branches: Branches,
        batch_size: int | None = None,
        cache: BranchCache | None = None,
    ) -> Encoded:
        """
        Runs the text and its branches, with gradient.

        Args:
            model ([`~transformers.PreTrainedModel`]):
                The causal LM.
            text ([`Text`]), branches ([`Branches`]):
                What to run.
            batch_size (`int`, *optional*):
                How many branches of each row run at once; their activations are computed again in the backward, so
                that memory holds the activations of one group only. Defaults to all, whose activations are kept.
            cache ([`BranchCache`], *optional*):
                What [`read`] gave for this text, so that a path that can do without need not read it again; routings
                are then of the branches alone.
        """
        ...


def backbone(model: PreTrainedModel, embeds: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """
    The model's own forward without its LM head: what the head reads, `(B, T, H)`, for embeddings as
    [`~model.embeddings.embed_tokens`] gives them.

    The hidden states are taken at the head and not from `base_model`, since some families (BERT's) transform them in
    between.
    """
    return backbone_output(model, embeds, **inputs)[0]


def backbone_output(model: PreTrainedModel, embeds: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor, ModelOutput]:
    """What [`backbone`] gives, and what the model's own forward returned: its cache, for example."""
    if has_router_loss(model.config):  # not by the family's forward, which misreads a 4D mask
        inputs["output_router_logits"] = False
    with without_head(model.get_output_embeddings()) as taken:
        output = type(model).forward(model, **embedding_inputs(model, embeds), **inputs)
    return taken[0], output


def run_group(
    model: PreTrainedModel, function: Callable[[Branches], Result], group: Branches, again: bool
) -> tuple[Result, list[tuple[torch.Tensor, ...]]]:
    """
    Runs a group of branches.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The causal LM.
        function (`Callable`):
            The group's forward.
        group ([`Branches`]):
            What to run.
        again (`bool`):
            Whether the backward computes the group's activations again, in place of keeping them.

    Returns:
        `tuple`: what the function gave, and the router logits of its forwards, as in [`~model.routing.recorded_routing`].
    """

    def run(*tensors: torch.Tensor) -> tuple[Result, list[tuple[torch.Tensor, ...]]]:
        with recorded_routing(model) as calls:
            return function(Branches(*tensors)), calls

    tensors = [getattr(group, field.name) for field in fields(group)]
    if not (again and torch.is_grad_enabled()):
        return run(*tensors)

    # by its tensors `checkpoint` tells which device's random numbers, those of dropout, have to come again
    return checkpoint(run, *tensors, use_reentrant=False)


def branch_places(
    rows: torch.Tensor, columns: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """An index into tensors of shape `(B, N, ...)`: the branches at columns `(R, W)` of rows `(R,)`."""
    return to_device(rows[:, None], device), to_device(columns, device)
