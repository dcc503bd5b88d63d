"""The router loss of mixtures of experts: of the tokens that are there, the same on either path, and trained."""

import pytest
import torch

from trl_quietstar.branches.masked_prefix import MaskedPrefix
from trl_quietstar.branches.replay import Replay
from trl_quietstar.branches.shared_prefix import SharedPrefix
from trl_quietstar.model.routing import recorded_routing, router_loss, use_router_loss
from trl_quietstar.text.batch import Branches, Text
from trl_quietstar.thinking.scoring import ScoreRequest, score

from .conformance import tiny_model
from .tiny import mixed_text, think
from .training import logged, text_data, tiny_trainer


FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "olmoe", "granitemoe")


def routed_model(name: str = "mixtral", weight: float | None = 0.1):
    """A tiny mixture of experts that returns its router logits."""
    model = tiny_model(name)
    use_router_loss(model.config, weight)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_both_paths_route_the_same_tokens(name):
    """Padding, empty slots and the prefixes that replay repeats do not count."""
    model, text = routed_model(name), mixed_text()
    thoughts = think(model, text)
    ours, oracle = (score(model, ScoreRequest(text, thoughts, 3, path)) for path in (SharedPrefix(), Replay()))
    torch.testing.assert_close(ours.router_loss, oracle.router_loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_the_family_s_own_loss(name):
    """Over text alone it is what the family's forward returns."""
    model = routed_model(name)
    ids = torch.randint(1, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    own = model(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss
    no_branches = Branches(torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0, 1, 32), torch.zeros(2, 0, 1).bool())
    encoded = MaskedPrefix().encode(model, Text.from_batch(ids, mask), no_branches)
    torch.testing.assert_close(router_loss(model.config, encoded.routings), own)


def test_it_trains_the_router(tmp_path):
    """With every other weight at 0 the routers move, and their loss falls to even use of the experts."""
    options = dict(policy_coefficient=0, value_loss_coefficient=0, entropy_coefficient=0, min_entropy_coefficient=0)
    options |= dict(nll_coefficient=0, reader_nll_coefficient=0, base_nll_coefficient=0, learning_rate=1e-2)
    trainer = tiny_trainer(
        tmp_path,
        model=tiny_model("mixtral"),
        value_head_hidden_size=256,
        max_steps=15,
        router_aux_loss_coef=1.0,
        data=text_data(),
        **options,
    )
    trainer.train()
    losses = [entry["rl/router_loss"] for entry in logged(trainer)]
    assert losses[-1] < losses[0] - 0.01
    assert logged(trainer)[0]["rl/total_loss"] == pytest.approx(losses[0], rel=1e-5)


def test_the_model_s_own_weight_is_the_default(tmp_path):
    """As in TRL; 0 switches the loss off, and a model without experts has none."""
    model = tiny_model("mixtral")
    own = model.config.router_aux_loss_coef
    assert tiny_trainer(tmp_path, model=model, value_head_hidden_size=256).router_coefficient == own > 0
    off = tiny_trainer(tmp_path, model=tiny_model("mixtral"), value_head_hidden_size=256, router_aux_loss_coef=0.0)
    off.train()
    assert "rl/router_loss" not in logged(off)[0]
    assert tiny_trainer(tmp_path).router_coefficient == 0
    with pytest.raises(ValueError, match="`router_aux_loss_coef` is 0.1, but 'llama' is no mixture of experts"):
        tiny_trainer(tmp_path, router_aux_loss_coef=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointed_layers_route_with_gradient(checkpointing):
    """The recorded logits carry gradient to every layer's router, whether or not layers are recomputed."""
    model, text = routed_model().train(), mixed_text()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.eval()
    thoughts = think(model, text)
    model.train()
    score(model, ScoreRequest(text, thoughts, 3, SharedPrefix())).router_loss.backward()
    gates = [p for name, p in model.named_parameters() if name.endswith("mlp.gate.weight")]
    assert len(gates) == 2 and all(gate.grad is not None and gate.grad.abs().sum() > 0 for gate in gates)


def test_hooks_are_gone_after_the_forward():
    """Also when it fails."""
    model = routed_model()
    with pytest.raises(RuntimeError, match="stop"), recorded_routing(model):
        raise RuntimeError("stop")
    assert not model.base_model._forward_hooks and not model.base_model._forward_pre_hooks
