"""Whether two ways to run branches agree: on every score, on every gradient, and on what they cost."""

import torch

from trl_quietstar.branches.base import BranchPath
from trl_quietstar.branches.replay import Replay
from trl_quietstar.branches.shared_prefix import SharedPrefix
from trl_quietstar.thinking.scoring import ScoreRequest

from .tiny import mixed_text, positions_of, think


FIELDS = (
    "thought_logps",
    "thought_entropies",
    "thought_values",
    "talk_logps",
    "text_logps",
    "mixing_weights",
    "similarity",
)


TRAINED = FIELDS[:-1]  # similarity is only logged


TOLERANCE = 1e-9


FAST = SharedPrefix()


def assert_same(ours: torch.Tensor, oracle: torch.Tensor, name: str, tolerance: float = TOLERANCE) -> None:
    """Equal within `tolerance`, relative to the largest magnitude where that is above 1."""
    difference = (ours - oracle).abs().max().item()
    assert difference <= tolerance * max(1.0, oracle.abs().max().item()), f"{name} differs by {difference:.1e}"


def assert_same_scores(ours, oracle, tolerance: float = TOLERANCE) -> None:
    """Every field within `tolerance`, in float64."""
    for name in FIELDS:
        assert_same(getattr(ours, name).double(), getattr(oracle, name).double(), name, tolerance)


def random_objective(scores) -> torch.Tensor:
    """A weighted sum of everything that carries gradient, with fixed random weights."""
    generator = torch.Generator().manual_seed(3)
    return sum(
        (values.double() * torch.randn(values.shape, generator=generator, dtype=torch.float64).to(values.device)).sum()
        for values in (getattr(scores, name) for name in TRAINED)
        if values.requires_grad
    )


def run(model, text, thoughts, path, temperature=0.8, prediction="mixed", **options):
    """Scores, and the gradients of every parameter, through the model's own forward."""
    model.zero_grad()
    request = ScoreRequest(text, thoughts, 3, path, temperature, prediction, **options)
    scores = model(input_ids=text.input_ids, quietstar_request=request)
    random_objective(scores).backward()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return scores, gradients


def assert_same_gradients(ours: dict, oracle: dict, tolerance: float = TOLERANCE) -> None:
    """The same parameters have a gradient, and the same one."""
    assert {n for n, g in ours.items() if g is None} == {n for n, g in oracle.items() if g is None}
    for name, gradient in oracle.items():
        if gradient is not None:
            assert_same(ours[name], gradient, f"gradient of {name}", tolerance)


def assert_paths_agree(model, path: BranchPath = FAST, **options) -> None:
    """A path and replay give the same scores and gradients on every kind of row."""
    text = mixed_text(model.config.vocab_size).to(model.device)
    thoughts = think(model, text, positions=positions_of(text, 0.7))
    assert not thoughts.mask[thoughts.positions.mask].all(), "no thought ended early: the case is not covered"
    ours, our_gradients = run(model, text, thoughts, path, **options)
    options.pop("branch_batch_size", None)
    oracle, oracle_gradients = run(model, text, thoughts, Replay(), **options)
    assert_same_scores(ours, oracle)
    for name in ("talk_correct", "text_correct"):
        assert torch.equal(getattr(ours, name), getattr(oracle, name)), name
    assert_same_gradients(our_gradients, oracle_gradients)


class Counter:
    """Counts the tokens that a model reads, padding of a batch included."""

    def __init__(self, model, monkeypatch):
        self.tokens = self.forwards = 0
        plain = type(model)._plain_class.forward

        def forward(module, *args, **kwargs):
            self.tokens += kwargs["inputs_embeds"].shape[:2].numel()
            self.forwards += 1
            return plain(module, *args, **kwargs)

        monkeypatch.setattr(type(model), "forward", forward)
