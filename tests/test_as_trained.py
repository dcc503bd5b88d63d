"""A saved model thinks where it was trained to think: in generation, scoring, evaluation, inspection and lm-eval's tasks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from trl_quietstar import QuietStarForCausalLM, QuietStarSettings
from trl_quietstar.branches.replay import Replay
from trl_quietstar.cli import main
from trl_quietstar.model.adapters import base_of
from trl_quietstar.model.lm_head import normalized_entropy
from trl_quietstar.text.batch import Text
from trl_quietstar.text.positions import choose_positions
from trl_quietstar.thinking.drawing import thought_sampling
from trl_quietstar.thinking.likelihood import log_likelihoods
from trl_quietstar.thinking.when import ENDLESS, Thinking

from .pages import embedded
from .speaking import SETTINGS, naive, of_generated, padded, prompts, thinking_model
from .tiny import byte_tokenizer
from .training import saved_model, tiny_trainer


PROMPT_END = replace(SETTINGS, thought_positions="prompt_end")
DIFFICULT = replace(SETTINGS, thought_positions="difficulty", difficulty_threshold=0.5)
PROBLEMS = [{"prompt": f"{a} plus {a + 1} is", "completion": f" {2 * a + 1} ."} for a in range(8)]


@pytest.mark.parametrize(
    "settings, asked, expected, words",
    [
        (SETTINGS, {}, Thinking(), "before every token, each thought for one token"),
        (replace(SETTINGS, thought_positions=16), {}, Thinking(), "before every token, each thought for one token"),
        (replace(SETTINGS, thought_positions=0.25), {"every": 2}, Thinking(every=2), "every 2 tokens"),
        (replace(SETTINGS, thought_positions="none"), {}, Thinking("never"), "never"),
        (replace(SETTINGS, thought_positions="none"), {"mode": "always"}, Thinking(), "before every token"),
        (PROMPT_END, {}, Thinking("prompt_end", reach=4), "once, at the end of the prompt, for 4 tokens"),
        (
            replace(PROMPT_END, talk_length="completion"),
            {},
            Thinking("prompt_end", reach=ENDLESS),
            "once, at the end of the prompt, for all that follows",
        ),
        (
            PROMPT_END,
            {"mode": "always", "every": 3},
            Thinking("always", 3),
            "every 3 tokens, each thought for 3 tokens",
        ),
        (SETTINGS, {"mode": "prompt_end"}, Thinking("prompt_end", reach=4), "for 4 tokens"),
        (DIFFICULT, {}, Thinking("adaptive", 3, 0.5, 4), "entropy of 0.5 or more), 3 tokens apart or more"),
        (DIFFICULT, {"threshold": 0.7}, Thinking("adaptive", 3, 0.7, 4), "entropy of 0.7 or more"),
        (DIFFICULT, {"mode": "adaptive", "every": 1}, Thinking("adaptive", 1, 0.5), "uncertain"),
        (DIFFICULT, {"mode": "always"}, Thinking(), "before every token"),
        (SETTINGS, {"mode": "adaptive"}, Thinking("adaptive", 1, 0.6), "entropy of 0.6 or more"),
        (SETTINGS, {"mode": Thinking("adaptive", 2, 0.1, 3)}, Thinking("adaptive", 2, 0.1, 3), "2 tokens apart"),
    ],
)
def test_when_a_model_thinks(settings, asked, expected, words):
    """By its settings, unless a user asks for something else; said in words."""
    found = Thinking.of(settings, **asked)
    assert found == expected and words in str(found)


@pytest.mark.parametrize(
    "settings, asked, message",
    [
        (
            PROMPT_END,
            {"every": 2},
            "`think_every` is 2, but the model thinks once, at the end of the prompt.*'always'",
        ),
        (
            PROMPT_END,
            {"mode": "prompt_end", "threshold": 0.5},
            "`thinking_threshold` is 0.5, but the model thinks once",
        ),
        (replace(SETTINGS, thought_positions="none"), {"every": 2}, "`think_every` is 2, but the model thinks never"),
        (SETTINGS, {"every": 5}, "`think_every` is 5, but .* `talk_length` 4"),
        (SETTINGS, {"mode": Thinking(), "every": 2}, "leave out `think_every`"),
    ],
)
def test_contradictions_are_refused(settings, asked, message):
    """What would be ignored is named, with the way out."""
    with pytest.raises(ValueError, match=message):
        Thinking.of(settings, **asked)


@pytest.mark.parametrize("talk_length", [3, "completion"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba", "rwkv"])
def test_one_thought_serves_what_follows_the_prompt(name, talk_length):
    """It is read for all of it, or for `talk_length` tokens, after which the model speaks without thoughts; in batches too."""
    model = thinking_model(name, replace(PROMPT_END, talk_length=talk_length))
    reach = 8 if talk_length == "completion" else talk_length
    rows = prompts(7, 4)
    options = dict(do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0, return_thoughts=True)
    out = model.generate(**padded(rows), **options)
    for row, prompt in enumerate(rows):
        assert out.sequences[row, 7:].tolist() == naive(model, prompt, 8, ENDLESS, reach=reach)
        (thought,) = out.thoughts[row]
        assert thought.position == 6 and len(thought.mixing_weights) == reach


def middle(model) -> float:
    """A normalised entropy that half of the model's predictions exceed."""
    with torch.no_grad():
        hidden = Replay().text_hidden(model, Text.from_batch(torch.randint(1, 300, (4, 12))))
    return float(normalized_entropy(model, hidden).median())


@pytest.mark.parametrize("talk_length", [2, 4])
def test_difficult_places_are_those_of_training(talk_length):
    """Thoughts stand where the trainer would put them in the text that was generated, and are read for `talk_length`."""
    model = thinking_model()
    settings = replace(DIFFICULT, talk_length=talk_length, difficulty_threshold=middle(model))
    model.adopt_settings(settings)
    (prompt,) = prompts(6)
    out = model.generate(
        prompt[None], do_sample=False, max_new_tokens=14, eos_token_id=None, pad_token_id=0, return_thoughts=True
    )
    wanted = naive(model, prompt, 14, 3, settings.difficulty_threshold, talk_length)
    assert out.sequences[0, 6:].tolist() == wanted
    labels = out.sequences.clone()
    labels[:, :6] = -100
    text = Text.from_batch(out.sequences, labels=labels)
    with torch.no_grad():
        entropies = normalized_entropy(model, Replay().text_hidden(model, text)[:, :-1])
    positions = choose_positions(text, "difficulty", [], lambda: entropies, settings.difficulty_threshold, 3)
    assert [thought.position for thought in out.thoughts[0]] == positions.index[positions.mask].tolist()
    assert 1 < len(out.thoughts[0]) < 6


@pytest.mark.parametrize("name", ["llama", "mamba"])
@pytest.mark.parametrize(
    "settings",
    [PROMPT_END, replace(PROMPT_END, talk_length="completion"), DIFFICULT, replace(DIFFICULT, talk_length=2)],
)
def test_generated_text_scores_as_it_was_generated(settings, name):
    """By the model's own way to think, in a batch with padding."""
    model = thinking_model(name, settings)
    if settings.thought_positions == "difficulty":
        model.adopt_settings(replace(settings, difficulty_threshold=middle(model)))
    inputs = padded(prompts(7, 4))
    expected, found, correct, before = of_generated(model, inputs, model.quietstar_thinking, new=10)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert correct.all() and (before == 0).all()
    always = of_generated(model, inputs, Thinking(), new=10)[1]
    assert (always - found).abs().max() > 1e-2


def trained(folder: Path, **options):
    """A trainer that took a step by problems with prompts; its gate is opened, and it is saved."""
    trainer = tiny_trainer(
        folder / "out",
        model=saved_model(folder / "model"),
        data=Dataset.from_list(PROBLEMS),
        evaluation=Dataset.from_list(PROBLEMS[:4]),
        max_steps=1,
        **{"thought_positions": "prompt_end", "talk_length": "completion", **options},
    )
    trainer.train()
    with torch.no_grad():
        base_of(trainer.model).quietstar.mixing_head.bias.fill_(3)
    trainer.save_model()
    return trainer


@pytest.mark.parametrize(
    "options", [{}, {"peft_config": LoraConfig(r=2, target_modules=["q_proj"])}], ids=["full", "lora"]
)
def test_a_saved_model_thinks_as_it_was_trained(options, tmp_path, capsys):
    """One thought after the prompt in every command, each of which says so; its evaluation is the trainer's."""
    trainer = trained(tmp_path, **options)
    folder, metrics = str(tmp_path / "out"), trainer.evaluate()
    assert sorted(trainer.sampled_thoughts()["context"]) == sorted(row["prompt"] for row in PROBLEMS[:4])  # each once
    model = QuietStarForCausalLM.from_pretrained(folder).eval()
    assert base_of(model).quietstar_settings.thought_positions == "prompt_end"
    ids = byte_tokenizer()("5 plus 6 is 11 .", return_tensors="pt")["input_ids"]
    out = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, eos_token_id=None, return_thoughts=True)
    assert [len(thought.mixing_weights) for thought in out.thoughts[0]] == [5]
    wanted = (torch.arange(ids.shape[1]) >= 4).long()[None]
    scored = model.log_likelihoods(ids, None, wanted)[0]
    by_hand = log_likelihoods(base_of(model), ids, None, wanted, Thinking("prompt_end"))[0]
    assert torch.equal(scored, by_hand) and not torch.equal(
        scored, model.log_likelihoods(ids, None, wanted, "always")[0]
    )

    data = tmp_path / "problems.jsonl"
    data.write_text("\n".join(map(json.dumps, PROBLEMS[:4])))
    flags = ["--per_device_eval_batch_size", "4", "--use_cpu", "true"]
    main(["eval", "--model", folder, "--dataset_name", str(data), "--output_file", str(tmp_path / "m.json"), *flags])
    assert json.loads((tmp_path / "m.json").read_text())["eval_reward"] == pytest.approx(
        metrics["eval_reward"], abs=1e-6
    )
    assert "at the positions 'prompt_end', read for all that follow; temperature" in capsys.readouterr().out
    main(["generate", "--model", folder, "--prompt", "5 plus 6 is", "--show-thoughts", "--max_new_tokens", "4"])
    printed = capsys.readouterr()
    assert (
        printed.out.count("⟨") == 1 and "Thinks once, at the end of the prompt, for all that follows." in printed.err
    )


def test_a_pattern_of_thoughts_for_a_saved_model(tmp_path):
    """How thoughts end is known from the model, so that the pattern alone is given."""
    trained(tmp_path, thought_stop_string="]", thought_length=12)
    data = tmp_path / "problems.jsonl"
    data.write_text("\n".join(json.dumps({**row, "completion": f"[1]{row['completion']}"}) for row in PROBLEMS[:4]))
    command = ["eval", "--model", str(tmp_path / "out"), "--dataset_name", str(data), "--use_cpu", "true"]
    main([*command, "--thought_pattern", r"\[(.*?)\]", "--output_file", str(tmp_path / "m.json")])
    assert json.loads((tmp_path / "m.json").read_text())["eval_nll_with"] > 0


def test_an_inspected_text_has_a_prompt(tmp_path, capsys):
    """One thought, after the prompt; without a prompt there is none to show. Explicit flags win."""
    trained(tmp_path)
    for name, words in (("prompt", "5 plus 6 is"), ("text", " 11 .")):
        (tmp_path / name).write_text(words)
    command = ["inspect", "--model", str(tmp_path / "out"), "--text", str(tmp_path / "text")]
    command += ["--output", str(tmp_path / "page.html"), "--use_cpu", "true"]
    with pytest.raises(ValueError, match="'prompt_end', and there is no prompt; give its file with `--prompt`"):
        main(command)
    prompted = [*command, "--prompt", str(tmp_path / "prompt")]
    for more, thoughts in (([], 1), (["--thought_positions", "all", "--talk_length", "2"], 2)):
        main([*prompted, *more])
        assert ("read for all that follow" in capsys.readouterr().out) == (not more)
        (text,) = embedded((tmp_path / "page.html").read_text())["texts"]
        assert sum(bool(token["thoughts"]) for token in text["tokens"]) == thoughts
        assert "".join(token["piece"] for token in text["tokens"]) == "5 plus 6 is 11 ."


def test_a_text_without_prompts_has_no_prompt_end(tmp_path):
    """Where nothing would be thought, no reward of 0 passes for a finding."""
    trained(tmp_path)
    data = tmp_path / "texts.jsonl"
    data.write_text(json.dumps({"text": "3 plus 4 is 7 ."}))
    message = "no text of the eval dataset has a prompt before its labels.*`assistant_only_loss=True`.*'all'"
    with pytest.raises(ValueError, match=message):
        main(["eval", "--model", str(tmp_path / "out"), "--dataset_name", str(data), "--use_cpu", "true"])


def test_an_older_save_thinks_before_every_token(tmp_path):
    """A `quietstar` entry that does not say where."""
    folder = tmp_path / "thinker"
    QuietStarForCausalLM.from_pretrained(saved_model(tmp_path / "model"), QuietStarSettings(3)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for name in ("thought_positions", "difficulty_threshold", "min_thought_interval"):
        del config["quietstar"][name]
    (folder / "config.json").write_text(json.dumps(config))
    model = QuietStarForCausalLM.from_pretrained(folder)
    assert model.quietstar_thinking == Thinking()
    (prompt,) = prompts(5)
    out = model.generate(
        prompt[None] % 200, max_new_tokens=4, do_sample=False, eos_token_id=None, return_thoughts=True
    )
    assert len(out.thoughts[0]) == 4


def test_thoughts_are_drawn_by_every_setting():
    """What a saved model remembers of its sampling is what it samples with."""
    remembered = dict(thought_length=5, temperature=0.7, top_k=11, top_p=0.8, min_p=0.1, min_thought_length=2)
    drawn = thought_sampling(QuietStarSettings(**remembered), byte_tokenizer(), 3)
    assert {name: getattr(drawn, name) for name in remembered} == remembered
    assert drawn.num_thoughts == 3 and drawn.stop is not None
