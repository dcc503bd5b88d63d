"""Shared prefix against replay in float64, and both against arithmetic done by hand."""

import copy

import pytest
import torch

from trl_quietstar import QuietStarSettings
from trl_quietstar.branches.masked_prefix import MaskedPrefix
from trl_quietstar.branches.replay import Replay
from trl_quietstar.branches.shared_prefix import SharedPrefix
from trl_quietstar.text.batch import Text, Thoughts, talk_after
from trl_quietstar.thinking.sampling import ThoughtSampler
from trl_quietstar.thinking.scoring import ScoreRequest, score, score_thoughts

from .agreement import FIELDS, assert_paths_agree, assert_same, assert_same_gradients, assert_same_scores, run
from .tiny import FAMILIES, exact_model, generators, mixed_text, sampling, think


@pytest.mark.parametrize("path", [SharedPrefix(), MaskedPrefix()], ids=["attention", "mask"])
@pytest.mark.parametrize("name", FAMILIES)
def test_paths_agree(name, path):
    """Every score and every gradient of the fast paths is that of ordinary forwards, whatever the padding."""
    assert_paths_agree(exact_model(name), path)


@pytest.mark.parametrize("size", [1, 5, 100])
@pytest.mark.parametrize("path", [SharedPrefix(), MaskedPrefix(), Replay()], ids=["attention", "mask", "replay"])
def test_groups_of_branches_change_nothing(path, size):
    """Scored in groups whose activations are computed twice, branches give the same scores and gradients."""
    assert_paths_agree(exact_model("mistral-window"), path, branch_batch_size=size)


@pytest.mark.parametrize("name", ["llama", "qwen2-window"])
def test_checkpointed_layers_change_nothing(name):
    """Nor does gradient checkpointing of the layers, although branches read keys that a layer left in passing."""
    model = exact_model(name)
    model.gradient_checkpointing_enable()
    assert_paths_agree(model.train(), branch_batch_size=3)
    assert_paths_agree(model.train())


def test_plain_rows_need_no_mask():
    """Rows padded on the right are read with a causal mask; scores and gradients stay those of ordinary forwards."""
    model, mixed = exact_model("llama"), mixed_text()
    text = Text.from_batch(mixed.input_ids[:2], mixed.attention_mask[:2])
    assert text.is_plain and not mixed.is_plain
    thoughts = think(model, text)
    ours, oracle = (run(model, text, thoughts, path) for path in (SharedPrefix(), Replay()))
    assert_same(ours[0].talk_logps, oracle[0].talk_logps, "talk_logps")
    assert_same_gradients(ours[1], oracle[1])


@pytest.mark.parametrize("name", ["llama", "qwen2-window", "gpt2"])
def test_paths_agree_on_the_thought_prediction(name):
    """The same holds when the thought's prediction is not mixed."""
    assert_paths_agree(exact_model(name), prediction="thought")


def test_paths_agree_with_the_published_mixing_head_and_suppressed_tokens():
    """The same holds where the weight is not bounded, and where some tokens are never in a thought."""
    settings = QuietStarSettings(mixing_head_type="published", thought_suppress_tokens=[3, 4])
    assert_paths_agree(exact_model("llama", settings))


@pytest.mark.parametrize("kind", ["linear", "mlp", "transformer"])
def test_paths_agree_for_every_value_head(kind):
    """The same holds for each value head, causal block included."""
    assert_paths_agree(exact_model("llama", QuietStarSettings(value_head_type=kind, value_head_hidden_size=16)))


def test_paths_agree_under_eager_attention():
    """The mask is read alike by eager attention (which runs its softmax in float32)."""
    model = exact_model("qwen2")
    model.set_attn_implementation("eager")
    text = mixed_text()
    thoughts = think(model, text)
    ours, oracle = (run(model, text, thoughts, path)[0] for path in (SharedPrefix(), Replay()))
    assert_same_scores(ours, oracle, 1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_zero_where_masked(name):
    """Statistics of tokens that do not exist are exactly 0, so that no sum can pick them up."""
    model, text = exact_model(name), mixed_text()
    thoughts = think(model, text)
    with torch.no_grad():
        scores = score(model, ScoreRequest(text, thoughts, 3, SharedPrefix()))
    talk = talk_after(text, thoughts.positions, 3).target_mask[:, :, None].expand_as(scores.talk_logps)
    masks = {
        "thought_logps": thoughts.mask,
        "thought_entropies": thoughts.mask,
        "thought_values": thoughts.mask,
        "talk_logps": talk,
        "mixing_weights": talk,
        "text_logps": text.predicted(),
    }
    for name, mask in masks.items():
        assert not mask.all() and (getattr(scores, name)[~mask] == 0).all(), name
        assert (getattr(scores, name)[mask] != 0).all(), name


DRAWS = {
    "plain": {},
    "temperature": dict(temperature=0.7),
    "top_k": dict(top_k=5),
    "top_p": dict(top_p=0.8),
    "min_p": dict(min_p=0.1),
    "all": dict(temperature=1.5, top_k=20, top_p=0.95, min_p=0.02),
    "greedy": dict(do_sample=False),
    "whole length": dict(min_thought_length=None, stop=None),
}


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_paths_sample_the_same_thoughts(name, draw):
    """With one seed, both paths write the same thoughts: a thought does not depend on how it was computed."""
    model, text = exact_model(name), mixed_text()
    ours, oracle = (think(model, text, path, settings=sampling(**DRAWS[draw])) for path in (SharedPrefix(), Replay()))
    assert torch.equal(ours.mask, oracle.mask)
    assert torch.equal(ours.token_ids * ours.mask, oracle.token_ids * oracle.mask)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_sample_the_same_thoughts(name):
    """The cache that thoughts grow in is exact for every family, windows included."""
    model, text = exact_model(name), mixed_text()
    ours, oracle = (think(model, text, path) for path in (SharedPrefix(), Replay()))
    assert torch.equal(ours.token_ids * ours.mask, oracle.token_ids * oracle.mask)


@pytest.mark.parametrize("path", [SharedPrefix(), MaskedPrefix(), Replay()], ids=["attention", "mask", "replay"])
def test_thoughts_sampled_in_groups_are_the_same(path):
    """A thought does not depend on which others are written beside it."""
    model, text = exact_model("mistral-window"), mixed_text()
    together, apart = (
        ThoughtSampler(sampling(), generators(text), "all").sample(model, text, path, size) for size in (None, 5)
    )
    assert torch.equal(together.mask, apart.mask)
    assert torch.equal(together.token_ids * together.mask, apart.token_ids * apart.mask)


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_paths_agree_on_thoughts_alone(name, start):
    """What a reference (start) or the no-thought model (no start) says of a thought is the same on both paths."""
    model, text = exact_model(name), mixed_text()
    thoughts = think(model, text)
    with torch.no_grad():
        ours, oracle = (score_thoughts(model, text, thoughts, path, 0.8, start) for path in (SharedPrefix(), Replay()))
    assert_same(ours.thought_logps, oracle.thought_logps, "thought_logps")
    assert_same(ours.text_logps, oracle.text_logps, "text_logps")


@pytest.mark.parametrize("path", [SharedPrefix(), Replay()])
def test_reference_scores_are_the_policys_own(path):
    """The reference's shorter pass gives the log-probabilities of the full one, so KL to oneself is 0."""
    model, text = exact_model(), mixed_text()
    thoughts = think(model, text)
    with torch.no_grad():
        full = score(model, ScoreRequest(text, thoughts, 3, path, 0.8))
        short = score_thoughts(model, text, thoughts, path, 0.8)
    assert_same(short.thought_logps, full.thought_logps, "thought_logps")


class ByHand:
    """One branch, written out: embeddings in a row, the backbone, the LM head, a softmax."""

    def __init__(self, model, text: Text, thoughts: Thoughts, b: int, j: int, g: int, talk_length: int):
        self.model = model
        at = int(thoughts.positions.index[b, j])
        document = [t for t in range(text.input_ids.shape[1]) if text.document_ids[b, t] == text.document_ids[b, at]]
        self.before = [int(text.input_ids[b, t]) for t in document if t <= at]
        self.after = [int(text.input_ids[b, t]) for t in document if t > at][:talk_length]
        self.counts = [bool(text.labels[b, t] != -100) for t in document if t > at][:talk_length]
        self.thought = thoughts.token_ids[b, j, g][thoughts.mask[b, j, g]].tolist()
        embed = model.get_input_embeddings()
        table = embed(torch.tensor(self.before + self.thought + self.after))
        n, m = len(self.before), len(self.before) + len(self.thought)
        row = torch.cat(
            [
                table[:n],
                model.quietstar.start_embedding[None],
                table[n:m],
                model.quietstar.end_embedding[None],
                table[m : m + len(self.after) - 1],
            ]
        )
        self.hidden = model.base_model(inputs_embeds=row[None]).last_hidden_state[0]
        self.plain = model.base_model(input_ids=torch.tensor([self.before + self.after])).last_hidden_state[0]

    def thought_log_probs(self, temperature: float) -> torch.Tensor:
        """Shape `(thought, V)`."""
        n = len(self.before)
        logits = self.model.lm_head(self.hidden[n : n + len(self.thought)])
        return torch.log_softmax(logits / temperature, -1)

    def values(self) -> torch.Tensor:
        n = len(self.before)
        return self.model.quietstar.value_head(self.hidden[n : n + len(self.thought)])

    def talk(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities with the thought (logits mixed, not hidden states) and without, and mixing weights."""
        n, k = len(self.before), len(self.after)
        first = n + 1 + len(self.thought)  # the end slot predicts the first talk token
        thinking, silent = self.hidden[first : first + k], self.plain[n - 1 : n - 1 + k]
        weights = self.model.quietstar.mixing_head(silent, thinking)
        mixed = weights[:, None] * self.model.lm_head(thinking) + (1 - weights[:, None]) * self.model.lm_head(silent)
        targets = torch.tensor(self.after)[:, None]
        with_thought = torch.log_softmax(mixed, -1).gather(1, targets)[:, 0]
        without = torch.log_softmax(self.model.lm_head(silent), -1).gather(1, targets)[:, 0]
        return with_thought, without, weights


@pytest.mark.parametrize("path", [SharedPrefix(), Replay()])
def test_scores_are_those_done_by_hand(path):
    """Both paths agree with plain arithmetic on each branch, so they cannot share a mistake."""
    model, text, M, temperature = exact_model(), mixed_text(), 3, 0.8
    thoughts = think(model, text)
    checked = 0
    with torch.no_grad():
        scores = score(model, ScoreRequest(text, thoughts, M, path, temperature))
        for b, j in thoughts.positions.mask.nonzero().tolist():
            g = (b + j) % 2
            hand = ByHand(model, text, thoughts, b, j, g, M)
            ours, L = {name: getattr(scores, name)[b, j, g] for name in FIELDS[:4]}, len(hand.thought)
            log_probs = hand.thought_log_probs(temperature)
            chosen = log_probs.gather(1, torch.tensor(hand.thought)[:, None])[:, 0]
            assert_same(ours["thought_logps"][:L], chosen, "thought_logps")
            assert_same(ours["thought_entropies"][:L], -(log_probs.exp() * log_probs).sum(-1), "thought_entropies")
            assert_same(ours["thought_values"][:L], hand.values(), "values")
            with_thought, without, weights = hand.talk()
            counts = torch.tensor(hand.counts)
            k, at = len(counts), int(thoughts.positions.index[b, j])
            assert_same(ours["talk_logps"][:k], with_thought * counts, "talk_logps")
            assert_same(scores.mixing_weights[b, j, g, :k], weights * counts, "mixing_weights")
            assert_same(scores.text_logps[b, at : at + k], without * counts, "text_logps")
            checked += 1
    assert checked == int(text.predicted().sum())


@pytest.mark.parametrize("path", [SharedPrefix(), Replay()])
@pytest.mark.parametrize("name", ["llama", "qwen2-window"])
def test_gradient_checkpointing_changes_nothing(name, path):
    """Recomputing layers in training mode gives the gradients of not doing so."""
    model, text = exact_model(name), mixed_text()
    thoughts = think(model, text)
    plain, plain_gradients = run(model, text, thoughts, path)
    model.gradient_checkpointing_enable()
    model.train()
    checkpointed, gradients = run(model, text, thoughts, path)
    assert_same(checkpointed.talk_logps, plain.talk_logps, "talk_logps")
    assert_same_gradients(gradients, plain_gradients)


@pytest.mark.parametrize("name", FAMILIES)
def test_float32_agrees_with_float64(name):
    """The fused kernel that runs in training gives the dense float64 statistics to 1e-4, and their gradients."""
    model, text = exact_model(name), mixed_text()
    thoughts = think(model, text)
    oracle, oracle_gradients = run(model, text, thoughts, Replay())
    ours, gradients = run(copy.deepcopy(model).float(), text, thoughts, SharedPrefix())
    assert_same_scores(ours, oracle, 1e-4)
    for parameter, gradient in oracle_gradients.items():
        assert_same(gradients[parameter].double(), gradient, f"gradient of {parameter}", 1e-3)


def test_value_loss_trains_the_value_head_only():
    """The value head reads detached hidden states: no value error reaches the policy."""
    model, text = exact_model(), mixed_text()
    scores = model(
        input_ids=text.input_ids, quietstar_request=ScoreRequest(text, think(model, text), 3, SharedPrefix())
    )
    model.zero_grad()
    scores.thought_values.sum().backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched and all(name.startswith("quietstar.value_head.") for name in touched)


@pytest.mark.parametrize("path", [SharedPrefix(), Replay()])
def test_a_thoughts_value_reads_no_later_token(path):
    """The value of a state does not see the token drawn in it, or later ones, for any value head."""
    for kind in ("mlp", "transformer"):
        model, text = (
            exact_model("llama", QuietStarSettings(value_head_type=kind, value_head_hidden_size=16)),
            mixed_text(),
        )
        thoughts = think(model, text, settings=sampling(min_thought_length=None, stop=None))
        changed = thoughts.token_ids.clone()
        changed[..., 2:] = (changed[..., 2:] + 1) % 97
        other = Thoughts(thoughts.positions, changed, thoughts.mask)
        with torch.no_grad():
            before, after = (score(model, ScoreRequest(text, t, 3, path)).thought_values for t in (thoughts, other))
        assert_same(after[..., :3], before[..., :3], "values up to the changed token")
        exists = thoughts.mask[..., 3]
        assert (after[..., 3] - before[..., 3])[exists].abs().min() > 1e-6
