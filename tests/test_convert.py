"""`trl-quietstar convert`: checkpoints of the published Quiet-STaR code become thinking models."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, MistralForCausalLM, PreTrainedModel

from trl_quietstar import QuietStarForCausalLM, QuietStarSettings
from trl_quietstar.branches.base import BranchPath
from trl_quietstar.branches.replay import Replay
from trl_quietstar.branches.shared_prefix import SharedPrefix
from trl_quietstar.cli import main
from trl_quietstar.learning.experience import experience_of, finish_advantages
from trl_quietstar.learning.objective import Coefficients, LossInputs, quietstar_loss
from trl_quietstar.model.heads import PublishedMixingHead
from trl_quietstar.text.batch import Positions, Text, Thoughts
from trl_quietstar.text.positions import choose_positions
from trl_quietstar.thinking.drawing import thought_sampling
from trl_quietstar.thinking.scoring import ScoreRequest, score

from .commands import write_lines
from .published import OPTIONS, base_of_checkpoint, by_hand, published_checkpoint, published_heads
from .published_code import FOLDER, Run, run_code
from .tiny import byte_tokenizer, exact, generators, sums, think, tiny_config, tiny_model
from .training import saved_model, tiny_args, tiny_trainer


L, M = 5, 4
BASE_VOCAB = len(byte_tokenizer())
START, END = BASE_VOCAB, BASE_VOCAB + 1


def convert(folder, *flags: str, **checkpoint) -> str:
    """Writes a checkpoint, converts it by the command, and returns where to."""
    source = published_checkpoint(folder / "published", **checkpoint)
    assert main(["convert", str(source), str(folder / "out"), "--n_ahead", "8", *flags]) == 0
    return str(folder / "out")


# What a converted model computes


@pytest.mark.parametrize(
    ("form", "path"),
    [("safetensors", SharedPrefix()), ("bin", Replay()), ("shards", SharedPrefix())],
    ids=["safetensors", "bin", "shards"],
)
def test_a_converted_checkpoint_predicts_as_computed_by_hand(form: str, path: BranchPath, tmp_path):
    """Its thoughts, and the text after them, mixed and by the thought alone; to 1e-9 in float64."""
    out = convert(tmp_path, form=form, dtype=torch.float64)
    model = exact(QuietStarForCausalLM.from_pretrained(out, dtype=torch.float64, attn_implementation="sdpa").eval())
    text = Text.from_batch(torch.randint(BASE_VOCAB, (2, 9), generator=torch.Generator().manual_seed(0)))
    positions = choose_positions(text, "all", generators(text))
    thoughts = think(model, text, path, positions, thought_sampling(model.quietstar_settings, None, 2))
    with torch.no_grad():
        scores = score(model, ScoreRequest(text, thoughts, M, path))
    base, heads, weights = base_of_checkpoint(tmp_path / "published"), published_heads(torch.float64), []
    for b, j, g in thoughts.mask.any(-1).nonzero().tolist():
        t = int(positions.index[b, j])
        count = min(M, text.input_ids.shape[1] - 1 - t)
        found = by_hand(base, heads, text.input_ids[b], t, thoughts.token_ids[b, j, g], count, [START, END])
        ours = {
            "thought": scores.thought_logps[b, j, g],
            "mixed": scores.talk_logps[b, j, g, :count],
            "alone": scores.reader_logps[b, j, g, :count],
            "weights": scores.mixing_weights[b, j, g, :count],
        }
        for name, values in ours.items():
            difference = (values - found[name]).abs().max()
            assert difference < 1e-9, f"{name} differs by {difference:.1e}"
        weights += found["weights"].tolist()
    assert min(weights) < 0 and max(weights) > 1


# Beside the published code itself


CODE = pytest.mark.skipif(FOLDER is None, reason="needs a clone of the published code: see tests/published_code.py")


def beside(folder) -> tuple[PreTrainedModel, Text]:
    """A converted checkpoint in float64, and a text without the token that the code takes for padding."""
    model = QuietStarForCausalLM.from_pretrained(
        convert(folder, dtype=torch.float64), dtype=torch.float64, attn_implementation="sdpa"
    )
    ids = torch.randint(1, BASE_VOCAB, (2, 11), generator=torch.Generator().manual_seed(1))
    return exact(model.eval()), Text.from_batch(ids)


def of_code(run: Run, text: Text, count: int) -> Thoughts:
    """The code's thoughts after the first tokens of each text."""
    index = torch.arange(count).expand(len(text.input_ids), -1)
    ids = run.thoughts[:, :count]
    return Thoughts(
        Positions(index, torch.ones_like(index, dtype=torch.bool)), ids, torch.ones_like(ids, dtype=torch.bool)
    )


def assert_same_gradients(model: PreTrainedModel, loss: torch.Tensor, run: Run) -> None:
    """Those of each parameter, to 1e-6 of the code's greatest; start and end are a hundredth in the code."""
    model.zero_grad()
    loss.backward()
    for name, expected in run.gradients.items():
        ours = name
        if name.endswith("_embedding"):
            assert not expected[1].any(), "the deviation has an effect"
            ours, expected = f"quietstar.{name}", expected[0] / 100
        elif name.startswith("talk_head.0"):
            ours = name.replace("talk_head.0", "quietstar.mixing_head")
        found = model.get_parameter(ours).grad
        found = torch.zeros_like(expected) if found is None else found
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max().clamp(min=1e-9), name


@CODE
def test_published_code_predicts_the_same(tmp_path):
    """After the same thoughts, the same distribution at every position."""
    model, text = beside(tmp_path)
    run = run_code(tmp_path / "published", text.input_ids, 8)
    count = text.input_ids.shape[1] - 1
    with torch.no_grad():
        scores = score(model, ScoreRequest(text, of_code(run, text, count), 1, SharedPrefix()))
    expected = run.logits[:, :-1].log_softmax(-1).gather(-1, text.input_ids[:, 1:, None])[..., 0]
    assert run.thoughts.shape[3] == L and (scores.talk_logps[:, :, 0, 0] - expected).abs().max() < 1e-6
    assert (scores.talk_logps[:, :, 0, 0] - scores.text_logps).abs().max() > 0.1


@CODE
@pytest.mark.parametrize("weight", [0.0, 1.0], ids=["after thoughts", "without thoughts"])
def test_published_code_has_the_same_likelihood(weight, tmp_path):
    """The two NLLs and their gradients; the one after thoughts as the code takes it, a mean of means over the tokens ahead."""
    model, text = beside(tmp_path)
    options = dict(n_passes=2, n_ahead_talk=M, original_loss_weight=weight, include_policy_loss=False)
    run = run_code(tmp_path / "published", text.input_ids, 8, options)
    T = text.input_ids.shape[1]
    scores = score(model, ScoreRequest(text, of_code(run, text, T - 1), M, SharedPrefix()))
    means = [scores.talk_logps[:, : T - 1 - m, :, m].mean() for m in range(M)]
    loss = -scores.text_logps.mean() if weight == 1 else -torch.stack(means).mean()
    assert float(loss) == pytest.approx(run.loss, abs=1e-6)
    assert_same_gradients(model, loss, run)


@CODE
def test_published_code_has_the_same_policy_gradient(tmp_path):
    """Rewards, advantages and the policy's gradient by our own functions, at the positions that the code does not drop."""
    model, text = beside(tmp_path)
    options = dict(n_passes=2, n_ahead_talk=M, base_loss_beta=0, policy_loss_beta=1)
    run = run_code(tmp_path / "published", text.input_ids, 8, options)
    thoughts = of_code(run, text, text.input_ids.shape[1] - 1 - M)
    args = tiny_args(
        tmp_path,
        mixing_head_type="published",
        reward_type="log_likelihood",
        advantage_baseline="mean",
        positive_advantages_only=True,
        policy_coefficient=M,  # the code's reward is a sum
        policy_temperature=3.0,
        **dict.fromkeys(("entropy_coefficient", "min_entropy_coefficient", "nll_coefficient"), 0.0),
        **dict.fromkeys(("reader_nll_coefficient", "base_nll_coefficient"), 0.0),
    )
    scores = score(model, ScoreRequest(text, thoughts, M, SharedPrefix(), args.logps_temperature))
    sampling = thought_sampling(model.quietstar_settings, None, 2)
    (experience,) = finish_advantages([experience_of(text, scores, None, args, sampling)], args, lambda x: x)
    loss, _ = quietstar_loss(LossInputs.of(text, scores, experience, args), Coefficients.of(args, 0))
    assert M * float(experience.rewards.mean()) == pytest.approx(run.reward, abs=1e-6)
    assert float(loss) == pytest.approx(run.loss, abs=1e-6) and run.loss != 0
    assert_same_gradients(model, loss, run)


# What a converted model writes


def test_no_thought_and_no_text_holds_start_and_end(tmp_path):
    """Of a checkpoint that would write hardly anything else."""
    out = convert(tmp_path)
    model = QuietStarForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():  # such that at each place one of the two has by far the greatest logit
        model.lm_head.weight[START] = 9 * model.lm_head.weight[START]
        model.lm_head.weight[END] = -model.lm_head.weight[START]
    ids = AutoTokenizer.from_pretrained(out)("3 plus 4 is", return_tensors="pt")["input_ids"]

    def writes(**options) -> tuple[bool, bool]:
        """Whether the text, and whether its thoughts, hold one of the two."""
        found = model.generate(ids, max_new_tokens=8, do_sample=False, return_thoughts=True, **options)
        thoughts = [token for thought in found.thoughts[0] for token in thought.token_ids]
        assert len(found.thoughts[0]) == 8 and len(thoughts) == 8 * L
        return max(found.sequences[0].tolist()) >= START, max(thoughts) >= START

    assert writes() == (False, False)
    assert writes(suppress_tokens=None) == (True, False)
    model.config.quietstar["thought_suppress_tokens"] = None
    assert writes() == (False, True)


def test_start_and_end_as_the_evaluation_script_has_them(tmp_path):
    """On demand both are the embedding of the first token of three dashes, and the rest stays."""
    trained = QuietStarForCausalLM.from_pretrained(convert(tmp_path / "a")).quietstar
    model = QuietStarForCausalLM.from_pretrained(convert(tmp_path / "b", "--untrained_embeddings"))
    dash = model.get_input_embeddings().weight[byte_tokenizer()("---")["input_ids"][0]]
    assert torch.equal(model.quietstar.start_embedding, dash) and torch.equal(model.quietstar.end_embedding, dash)
    torch.testing.assert_close(trained.start_embedding, 100 * published_heads()["start_embedding"][0])
    mine, other = (x.mixing_head.state_dict() for x in (model.quietstar, trained))
    assert all(torch.equal(mine[name], other[name]) for name in other)


# What is written


def test_what_is_written_is_a_plain_model_and_heads(tmp_path):
    """The base's weights bit for bit in their dtype, a configuration without the published code's words, and all settings."""
    out = convert(tmp_path, dtype=torch.bfloat16)
    before = MistralForCausalLM.from_pretrained(tmp_path / "published", dtype="auto")
    plain, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert type(plain) is MistralForCausalLM and plain.dtype == torch.bfloat16
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in before.state_dict().items())
    assert not [name for name in OPTIONS if hasattr(AutoConfig.from_pretrained(out), name)]
    assert plain.generation_config.suppress_tokens == [START, END]
    model = QuietStarForCausalLM.from_pretrained(out)
    assert model.quietstar_settings == QuietStarSettings(
        L, M, mixing_head_type="published", thought_suppress_tokens=[START, END]
    )
    assert len(AutoTokenizer.from_pretrained(out)) == BASE_VOCAB + 2
    weight = published_heads(torch.bfloat16)["talk_head.0.2.weight"]
    assert torch.equal(model.quietstar.mixing_head.state_dict()["2.weight"], weight.float())


def test_the_talk_length_is_what_max_thoughts_leaves(tmp_path):
    """Unless it is given."""
    models = (convert(tmp_path / "a"), convert(tmp_path / "b", "--n_ahead_talk", "2"))
    assert [QuietStarForCausalLM.from_pretrained(x).quietstar_settings.talk_length for x in models] == [4, 2]


# What a converted model is good for


def test_a_converted_model_trains_on(tmp_path):
    """Its own heads, which it keeps, with the suppressed tokens that nobody names; and it saves all that."""
    out = convert(tmp_path)
    before = QuietStarForCausalLM.from_pretrained(out).quietstar.state_dict()
    options = dict(mixing_head_type="published", thought_length=L, talk_length=M, value_head_hidden_size=256)
    trainer = tiny_trainer(tmp_path / "run", model=out, advantage_baseline="leave_one_out", **options)
    trainer.train()
    trainer.save_model()
    model = QuietStarForCausalLM.from_pretrained(str(tmp_path / "run"))
    assert model.quietstar_settings.thought_suppress_tokens == [START, END]
    assert model.generation_config.suppress_tokens == [START, END]
    after = model.quietstar.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if not name.startswith("value_head")}


def test_a_converted_model_is_evaluated(tmp_path, capsys):
    """By `trl-quietstar eval`, as it was trained."""
    out = convert(tmp_path)
    data, found = write_lines(tmp_path / "test.jsonl", sums()[300:306]), tmp_path / "found.json"
    flags = ["--thought_positions", "3", "--use_cpu", "--output_file", str(found)]
    assert main(["eval", "--model", out, "--dataset_name", data, *flags]) == 0
    assert "Thoughts of up to 5 tokens" in capsys.readouterr().out
    metrics = json.loads(found.read_text())
    assert abs(metrics["eval_nll_with"] - metrics["eval_nll_without"]) > 0.01


def test_a_converted_model_generates_by_command(tmp_path, capsys):
    """With its own tokenizer."""
    flags = ["--prompt", "3 plus 4 is", "--max_new_tokens", "4", "--show-thoughts"]
    assert main(["generate", "--model", convert(tmp_path), *flags]) == 0
    assert "startthought" not in capsys.readouterr().out


def test_a_fresh_head_of_this_kind_begins_closed():
    """Its weight is 0 whatever the input, and it learns from there."""
    head = PublishedMixingHead(8)
    weight = head(torch.randn(5, 8), torch.randn(5, 8))
    assert weight.shape == (5,) and not weight.any()
    weight.sum().backward()
    assert head[-1].weight.grad.any()


def test_the_head_is_an_option_of_training(tmp_path):
    """Of a plain model too."""
    trainer = tiny_trainer(tmp_path, mixing_head_type="published", thought_suppress_tokens=[3], max_steps=2)
    trainer.train()
    trainer.save_model()
    settings = QuietStarForCausalLM.from_pretrained(str(tmp_path)).quietstar_settings
    assert settings.mixing_head_type == "published" and settings.thought_suppress_tokens == [3]


# Models of before


def test_settings_of_before_load(tmp_path):
    """A model saved before there was a choice has the head it had, bit for bit, and suppresses nothing."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("mixing_head_type", "thought_suppress_tokens"):
        del config["quietstar"][name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = QuietStarForCausalLM.from_pretrained(tmp_path)
    assert again.quietstar_settings == model.quietstar_settings
    ids = torch.arange(12)[None]
    assert torch.equal(again.log_likelihoods(ids)[0], model.log_likelihoods(ids)[0])


# What is refused


def test_what_cannot_be_converted_is_refused(tmp_path):
    """With the way out, and before anything is written."""
    source, out = str(published_checkpoint(tmp_path / "published")), str(tmp_path / "out")
    plain = saved_model(tmp_path / "plain", "mistral-window")
    unweighted = {**published_heads(), "talk_head.0.4.weight": torch.zeros(BASE_VOCAB + 2, 32)}
    other = str(published_checkpoint(tmp_path / "other", heads=unweighted))
    nameless = str(published_checkpoint(tmp_path / "nameless", max_thoughts=None))
    bare = published_checkpoint(tmp_path / "bare")
    for file in bare.glob("token*"):
        file.unlink()
    n_ahead = ["--n_ahead", "8"]
    for argv, says in [
        ([source, out], "`n_ahead` is None; give that of the training, `--n_ahead 8`"),
        ([source, out, "--n_ahead", "3"], "`n_ahead` is 3"),
        ([source, out, "--n_ahead", "12"], "`n_ahead_talk` is 0, with `n_ahead` 12 and `max_thoughts` 13"),
        ([nameless, out, *n_ahead], "`n_ahead_talk` is None.*such as `--n_ahead_talk 4`"),
        ([source], "`output` is missing; give `--output`"),
        ([source, plain, *n_ahead], "there and not an empty folder"),
        ([source, source, *n_ahead], "there and not an empty folder"),
        ([str(tmp_path / "none"), out, *n_ahead], "There is no model folder"),
        ([saved_model(tmp_path / "llama"), out, *n_ahead], "is a 'llama' model.*patch of Mistral"),
        ([plain, out, *n_ahead, "--n_ahead_talk", "4"], "tokens with <.startthought.> and .*give the one"),
        ([other, out, *n_ahead], "is no checkpoint that.*talk_head.0.4.weight"),
        ([str(bare), out, *n_ahead], "no tokenizer beside.*--tokenizer mistralai/Mistral-7B-v0.1"),
    ]:
        with pytest.raises((ValueError, OSError), match=f"(?s){says}"):
            main(["convert", *argv])
    assert not (tmp_path / "out").exists()
    assert main(["convert", str(bare), out, *n_ahead, "--tokenizer", source]) == 0


def test_a_plain_mistral_is_refused(tmp_path):
    """One of the right size, without the heads."""
    plain = published_checkpoint(tmp_path / "plain", heads={})
    with pytest.raises(
        ValueError, match="is no checkpoint that the published Quiet-STaR code.*end_embedding, start_emb"
    ):
        main(["convert", str(plain), str(tmp_path / "out"), "--n_ahead", "8"])


def test_an_unconverted_checkpoint_says_what_to_run(tmp_path):
    """The command as it works, from wherever it is loaded."""
    source = str(published_checkpoint(tmp_path / "published"))
    for load in (QuietStarForCausalLM.from_pretrained, lambda path: tiny_trainer(tmp_path / "run", model=path)):
        with pytest.raises(ValueError, match=f"`trl-quietstar convert {source} OUTPUT --n_ahead 8`"):
            load(source)


def test_a_model_keeps_its_kind_of_head(tmp_path):
    """Training it as another is an error that names the option."""
    out = convert(tmp_path)
    with pytest.raises(ValueError, match="with the same `mixing_head_type` and `value_head_type`"):
        tiny_trainer(tmp_path / "run", model=out, value_head_hidden_size=256)
    model = QuietStarForCausalLM.from_pretrained(out)
    with pytest.raises(ValueError, match="set `mixing_head_type='published'`"):
        tiny_trainer(tmp_path / "run", model=model, tokenizer=AutoTokenizer.from_pretrained(out))
    with pytest.raises(ValueError, match="`mixing_head_type` is 'cnn'; choose one of mlp, published"):
        QuietStarForCausalLM.from_config(tiny_config("llama"), QuietStarSettings(mixing_head_type="cnn"))


def test_tokens_that_a_model_does_not_have_are_not_suppressed():
    """Nor all that it has."""
    for ids, says in (([97], "has 97, but the model's tokens are 0 to 96"), (list(range(97)), "has all 97 tokens")):
        with pytest.raises(ValueError, match=says):
            tiny_model(settings=QuietStarSettings(thought_suppress_tokens=ids))
        with pytest.raises(ValueError, match=says):
            tiny_model().adopt_settings(QuietStarSettings(thought_suppress_tokens=ids))
