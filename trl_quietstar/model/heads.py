"""The heads a thinking model has beyond its base: thought embeddings, mixing head and value head.

They are one submodule, `model.quietstar`, kept in a file of their own, so that the base checkpoint stays what it was.
"""

from dataclasses import asdict, dataclass
from typing import get_args, get_type_hints

import torch
from torch import nn
from transformers import PreTrainedModel


VALUE_HEAD_TYPES = ("linear", "mlp", "transformer")
SAVED_TYPES: dict[str, tuple[type, ...]] = {  # of settings that are not simply of their default's type
    "talk_length": (int, str),
    "thought_positions": (str, int, float),
    **dict.fromkeys(("temperature", "top_p", "difficulty_threshold"), (int, float)),
    "min_p": (int, float, type(None)),
    "min_thought_length": (int, type(None)),
    "thought_stop_string": (str, type(None)),
}


@dataclass(frozen=True)
class QuietStarSettings:
    """
    What a saved model needs to think again; stored under `quietstar` in `config.json`.

    Parameters:
        thought_length (`int`):
            L, thought tokens.
        talk_length (`int` or `str`):
            M, text tokens a thought is read for; `"completion"`: all that follow.
        prediction (`str`):
            `"mixed"` (mixing head weighs the predictions with and without the thought) or `"thought"`.
        value_head_type (`str`):
            `"linear"`, `"mlp"` or `"transformer"`.
        value_head_hidden_size (`int`):
            Width of the last two.
        temperature, top_k, top_p, min_p, min_thought_length, thought_stop_string:
            How thoughts are drawn and end, as in [`QuietStarConfig`].
        thought_positions (`str`, `int` or `float`), difficulty_threshold (`float`), min_thought_interval (`int`):
            Where the model learned to think, as in [`QuietStarConfig`]; [`~thinking.sampling.Thinking.of`] says what generation and
            scoring make of it.
    """

    thought_length: int = 8
    talk_length: int | str = 4
    prediction: str = "mixed"
    value_head_type: str = "mlp"
    value_head_hidden_size: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float | None = None
    min_thought_length: int | None = None
    thought_stop_string: str | None = None
    thought_positions: str | int | float = "all"
    difficulty_threshold: float = 0.6
    min_thought_interval: int = 3

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: dict, source: str) -> "QuietStarSettings":
        """
        Settings that were saved.

        Args:
            saved (`dict`):
                The `quietstar` entry of a `config.json`, or what is saved beside an adapter.
            source (`str`):
                Where it is from, for errors.

        Raises:
            `ValueError`: if it has settings that this version does not know, or values of another kind.
        """
        where = f"What {source!r} saves as its `quietstar` settings"
        if not isinstance(saved, dict):
            raise ValueError(f"{where} is damaged: {saved!r} is no JSON object. Copy the file again.")
        hints = get_type_hints(cls)
        unknown = sorted(saved.keys() - hints.keys())
        if unknown:
            raise ValueError(
                f"{where} has {', '.join(unknown)}, which this version does not know: a newer version of trl-quietstar wrote it. "
                "Upgrade trl-quietstar."
            )
        for name, value in saved.items():
            kinds = (*get_args(hints[name]), hints[name])
            if isinstance(value, bool) or not isinstance(value, tuple(x for x in kinds if isinstance(x, type))):
                if not (isinstance(value, int) and float in kinds):
                    raise ValueError(f"{where} is damaged: `{name}` is {value!r}. Copy the file again.")
        return cls(**saved)


class MixingHead(nn.Module):
    """
    Weight of the thought in the prediction, from the hidden states without and with it (Quiet-STaR, section 4.2).

    Starts nearly closed, at `INITIAL_WEIGHT` whatever the input, so that an untrained model predicts as its base does.
    A gate that saturates passes no gradient and never opens again, and it would: reading thoughts is hard at first, and
    the likelihood closes the gate meanwhile. So the inputs are normalised and the output is divided by the square root
    of the width, which keeps the gate's pace the same for every model size, and `MIN_WEIGHT` always remains.
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


class QuietStarHeads(nn.Module):
    """
    Start and end embeddings, mixing head and value head.

    Args:
        hidden_size (`int`):
            H, the width the LM head reads.
        embedding_size (`int`):
            Width of the input embeddings.
        settings ([`QuietStarSettings`]):
            Kind and width of the value head.

    Raises:
        `ValueError`: if the value head's type is unknown.
    """

    def __init__(self, hidden_size: int, embedding_size: int, settings: QuietStarSettings):
        super().__init__()
        heads = {"linear": LinearValueHead, "mlp": MLPValueHead, "transformer": TransformerValueHead}
        if settings.value_head_type not in heads:
            raise ValueError(
                f"`value_head_type` is {settings.value_head_type!r}; choose one of {', '.join(VALUE_HEAD_TYPES)}."
            )
        self.start_embedding = nn.Parameter(torch.zeros(embedding_size))
        self.end_embedding = nn.Parameter(torch.zeros(embedding_size))
        self.mixing_head = MixingHead(hidden_size)
        self.value_head = heads[settings.value_head_type](hidden_size, settings.value_head_hidden_size)

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


class ThinkingModel(PreTrainedModel):
    """A causal LM with heads, for annotations; the real classes are made by `modeling.quietstar_class`."""

    quietstar: QuietStarHeads
