"""The heads a thinking model has beyond its base: thought embeddings, mixing head and value head.

They are one submodule, `model.quietstar`. They are saved in a file of their own, so that the base's files stay what they were.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase

from ..settings import QuietStarSettings
from .embeddings import weight_of


if TYPE_CHECKING:
    from ..branches.base import BranchPath
    from .marks import Marks


class MixingHead(nn.Module):
    """
    Weight of the thought in the prediction, from the hidden states without and with it (Quiet-STaR, section 4.2).

    The gate starts nearly closed, at `INITIAL_WEIGHT` whatever the input, so that an untrained model predicts as its base does.
    Reading thoughts is hard at first, and meanwhile the likelihood closes the gate further. A gate that saturates passes no
    gradient and never opens again. So the inputs are normalised, the output is divided by the square root of the width, by which
    the gate moves equally fast in models of every size, and `MIN_WEIGHT` always remains.
    """

    INITIAL_WEIGHT = 0.05
    MIN_WEIGHT = 0.01

    def __init__(self, hidden_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.hidden = nn.Linear(2 * hidden_size, hidden_size)
        self.out = nn.Linear(hidden_size, 1, bias=False)
        nn.init.zeros_(self.out.weight)
        opening = torch.tensor((self.INITIAL_WEIGHT - self.MIN_WEIGHT) / (1 - self.MIN_WEIGHT))
        self.bias = nn.Parameter(torch.logit(opening).view(1))  # FSDP2 shards no scalars

    def forward(self, base: torch.Tensor, thought: torch.Tensor) -> torch.Tensor:
        """Weights of shape `(...)`, between `MIN_WEIGHT` and 1, for two hidden states of shape `(..., H)`."""
        pair = torch.cat([self.norm(x.to(self.bias.dtype)) for x in (base, thought)], dim=-1)
        logit = self.out(torch.relu(self.hidden(pair))).squeeze(-1) / self.out.in_features**0.5 + self.bias
        return self.MIN_WEIGHT + (1 - self.MIN_WEIGHT) * torch.sigmoid(logit)


class PublishedMixingHead(nn.Sequential):
    """
    The mixing head of the published Quiet-STaR code (`talk_head.0`, whose names its parameters have), to go on from its models.

    It reads the two hidden states as they are. Nothing bounds its weight, which may be below 0 or above 1. It starts at 0
    whatever the input, so that an untrained model predicts exactly as its base does.
    """

    def __init__(self, hidden_size: int):
        H, out = hidden_size, nn.Linear(hidden_size, 1, bias=False)
        super().__init__(nn.Linear(2 * H, H), nn.ReLU(), nn.Linear(H, H), nn.ReLU(), out)
        nn.init.zeros_(out.weight)

    def forward(self, base: torch.Tensor, thought: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # of two tensors
        """Weights of shape `(...)` for two hidden states of shape `(..., H)`."""
        pair = torch.cat([base, thought], dim=-1)
        return super().forward(pair.to(next(self.parameters()).dtype)).squeeze(-1)


class LinearValueHead(nn.Module):
    """One linear map, in the layout of TRL's former `ValueHead` (`v_head.summary.*`)."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.summary = nn.Linear(hidden_size, 1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.summary(hidden).squeeze(-1)


class MLPValueHead(nn.Module):
    """Two layers; starts at value 0."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.hidden = nn.Linear(hidden_size, width)
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.out(torch.nn.functional.gelu(self.hidden(hidden))).squeeze(-1)


class TransformerValueHead(nn.Module):
    """One causal block over the thought's hidden states; starts at value 0."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.project = nn.Linear(hidden_size, width)
        heads = next(n for n in (4, 2, 1) if width % n == 0)
        self.block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = self.project(hidden).flatten(0, -3)  # (branches, L, width)
        mask = nn.Transformer.generate_square_subsequent_mask(rows.shape[1], device=rows.device, dtype=rows.dtype)
        values = self.out(self.block(rows, src_mask=mask, is_causal=True))
        return values.view(hidden.shape[:-1])


MIXING_HEADS = {"mlp": MixingHead, "published": PublishedMixingHead}
VALUE_HEADS = {"linear": LinearValueHead, "mlp": MLPValueHead, "transformer": TransformerValueHead}


class QuietStarHeads(nn.Module):
    """
    Start and end embeddings, mixing head and value head.

    Args:
        hidden_size (`int`):
            H, the width the LM head reads.
        embedding_size (`int`):
            Width of the input embeddings.
        settings ([`QuietStarSettings`]):
            Kinds of the heads, and the value head's width.

    Raises:
        `ValueError`: if the type of a head is unknown.
    """

    def __init__(self, hidden_size: int, embedding_size: int, settings: QuietStarSettings):
        super().__init__()
        for name, kinds in (("mixing_head_type", MIXING_HEADS), ("value_head_type", VALUE_HEADS)):
            if getattr(settings, name) not in kinds:
                raise ValueError(f"`{name}` is {getattr(settings, name)!r}; choose one of {', '.join(kinds)}.")
        self.start_embedding = nn.Parameter(torch.zeros(embedding_size))
        self.end_embedding = nn.Parameter(torch.zeros(embedding_size))
        # mean input embedding of shape (E,) that both embeddings begin as, until a tokenizer, a file or hand sets them
        self.fresh_embedding: torch.Tensor | None = None
        self.mixing_head = MIXING_HEADS[settings.mixing_head_type](hidden_size)
        self.value_head = VALUE_HEADS[settings.value_head_type](hidden_size, settings.value_head_hidden_size)

    def is_fresh(self, embedding: torch.Tensor) -> bool:
        """Whether a thought embedding is as [`give_heads`] left it, but for a change of its dtype."""
        fresh, now = self.fresh_embedding, embedding.detach().cpu().double()
        return fresh is not None and torch.allclose(now, fresh, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-7)

    def values(self, hidden: torch.Tensor) -> torch.Tensor:
        """
        Value of each thought state.

        Args:
            hidden (`torch.Tensor` of shape `(B, J, G, L, H)`):
                Hidden states from which each thought token was drawn. They are detached: the value loss trains this
                head only.

        Returns:
            `torch.Tensor` of shape `(B, J, G, L)`, in the head's dtype.
        """
        return self.value_head(hidden.detach().to(self.start_embedding.dtype))


class ThinkingModel(PreTrainedModel, GenerationMixin):
    """A causal LM with heads, for annotations. [`~modeling.QuietStarMixin`] has what is declared here, and
    `modeling.quietstar_class` makes the real classes."""

    quietstar: QuietStarHeads
    _plain_class: type[PreTrainedModel]  # the family's own
    _loaded_by: Mapping[str, Any]  # `revision` and the like that it was loaded with

    if TYPE_CHECKING:

        @property
        def quietstar_settings(self) -> QuietStarSettings: ...

        @property
        def thought_marks(self) -> "Marks": ...

        @property
        def thought_path(self) -> "BranchPath": ...

        @thought_path.setter
        def thought_path(self, path: "BranchPath") -> None: ...

        @property
        def branches_in_cache(self) -> bool: ...

        def thought_tokenizer(
            self, tokenizer: PreTrainedTokenizerBase | None = None
        ) -> PreTrainedTokenizerBase | None: ...

        def log_likelihoods(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]: ...

        def initialize_thought_embeddings(self, *args: Any, **kwargs: Any) -> None: ...

        def adopt_settings(
            self, settings: QuietStarSettings, tokenizer: PreTrainedTokenizerBase | None = None
        ) -> None: ...

        def save_heads(self, save_directory: str, state_dict: dict[str, torch.Tensor] | None = None) -> None: ...

        def load_heads(self, path: str | Path) -> None: ...


def mixing_weights(model: ThinkingModel, hidden: torch.Tensor, after_thought: torch.Tensor) -> torch.Tensor:
    """Weight of the thought in the next token, of shape `(B,)`, from the hidden states `(B, H)` without and with it: that of the
    mixing head, or 1 where the thought alone predicts."""
    if model.quietstar_settings.prediction == "mixed":
        return model.quietstar.mixing_head(hidden, after_thought)
    return torch.ones(len(hidden), dtype=model.quietstar.start_embedding.dtype, device=hidden.device)


def give_heads(model: PreTrainedModel, settings: QuietStarSettings) -> None:
    """
    Gives a causal LM fresh heads, in place of any that it has.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A decoder with an LM head.
        settings ([`QuietStarSettings`]):
            What the heads are; they become the model's.

    Raises:
        `ValueError`: if the settings suppress a token that the model does not have.
    """
    check_suppressed(model, settings)
    table, lm_head = weight_of(model.get_input_embeddings()), weight_of(model.get_output_embeddings())
    with torch.inference_mode(False), torch.no_grad():  # heads made in inference could never be trained
        heads = QuietStarHeads(lm_head.shape[1], table.shape[1], settings)
        mean = table.mean(0)  # overwritten as soon as a tokenizer is at hand
        heads.start_embedding.copy_(mean)
        heads.end_embedding.copy_(mean)
        dtype = torch.float64 if table.dtype == torch.float64 else torch.float32
        model.quietstar = heads.to(device=lm_head.device, dtype=dtype)
        heads.fresh_embedding = mean.detach().cpu().double()
    model.config.quietstar = settings.to_dict()


# Tokens that no thought holds


def suppressed_tokens(model: ThinkingModel) -> tuple[int, ...]:
    """Ids of the tokens that no thought of a model holds."""
    return tuple(model.quietstar_settings.thought_suppress_tokens or ())


def check_suppressed(model: PreTrainedModel, settings: QuietStarSettings) -> None:
    """
    Refuses settings by which a model cannot write.

    Raises:
        `ValueError`: if they suppress a token that it does not have, or all that it has.
    """
    V, suppressed = model.config.get_text_config().vocab_size, settings.thought_suppress_tokens or []
    wrong = [token_id for token_id in suppressed if not 0 <= token_id < V]
    if wrong:
        raise ValueError(
            f"`thought_suppress_tokens` has {wrong[0]}, but the model's tokens are 0 to {V - 1}; leave it out."
        )
    if len(set(suppressed)) == V:
        raise ValueError(f"`thought_suppress_tokens` has all {V} tokens of the model; leave some for its thoughts.")
