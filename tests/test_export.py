"""`trl-quietstar export`: a plain model that thinks by itself writes what the thinking model writes."""

import json
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.utils.chat_parsing import ResponseParser

from trl_quietstar import QuietStarForCausalLM, QuietStarSettings
from trl_quietstar.cli import main
from trl_quietstar.model.plain import check_settings, opened, spellings
from trl_quietstar.thinking.drawing import thought_end

from .speaking import EXPORTABLE, GREEDY, PLAIN, ended_thoughts, exportable_model
from .tiny import byte_tokenizer, tiny_config
from .training import LORA, tiny_trainer


SETTINGS = QuietStarSettings(**PLAIN)
TRAINED = dict(
    thought_positions="prompt_end",
    talk_length="completion",
    reward_prediction="thought",
    thought_stop_string="1",
    thought_length=30,
    value_head_hidden_size=256,
    data=Dataset.from_dict({"prompt": ["3 plus 4", "4 plus 4"] * 4, "completion": [" is 7", " is 8"] * 4}),
)


def saved(folder, model) -> str:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def exported(folder, model, *flags: str):
    """The plain model and its tokenizer, by the command."""
    source, output = saved(folder / "thinking", model), str(folder / "plain")
    assert main(["export", "--model", source, "--output", output, *flags]) == 0
    return AutoModelForCausalLM.from_pretrained(output).eval(), AutoTokenizer.from_pretrained(output)


@pytest.mark.parametrize("family", EXPORTABLE)
def test_a_plain_model_answers_as_the_thinking_one(family, tmp_path):
    """Token for token, with equal log-probabilities, wherever the thought ends by itself."""
    model = exportable_model(family)
    plain, own = exported(tmp_path, model)
    assert "QuietStar" not in type(plain).__name__ and not (tmp_path / "plain" / "quietstar.safetensors").exists()
    assert "quietstar" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    start, end = own.convert_tokens_to_ids(["<think>", "</think>"])
    for said in ended_thoughts(model, [f"{a} plus 4 is" for a in range(60)], 4):
        prompt = torch.cat([said.input_ids, torch.tensor([[start]])], dim=1)
        length = len(said.thought) + 1 + len(said.answer)
        theirs = plain.generate(prompt, **{**GREEDY, "max_new_tokens": length, "output_scores": True})
        assert theirs.sequences[0, prompt.shape[1] :].tolist() == [*said.thought, end, *said.answer]
        for expected, scores in zip(said.output.logits, theirs.scores[len(said.thought) + 1 :], strict=True):
            found = scores[:, : expected.shape[1]].log_softmax(-1)
            torch.testing.assert_close(found, expected.log_softmax(-1), rtol=1e-5, atol=1e-5)


def test_an_adapter_is_merged_and_pipelines_think(tmp_path):
    """What the folder says of itself is enough: one template opens the thought, the generation config closes it, and another template
    tells it from the answer."""
    source, output = saved(tmp_path / "thinking", exportable_model()), str(tmp_path / "plain")
    trainer = tiny_trainer(
        tmp_path / "adapter", model=source, peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM"), top_k=1, **TRAINED
    )
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
    trainer.save_model()
    assert main(["export", str(tmp_path / "adapter"), output]) == 0
    adapted = QuietStarForCausalLM.from_pretrained(str(tmp_path / "adapter")).eval()
    tokenizer, writer = byte_tokenizer(), pipeline("text-generation", model=output)
    said = next(ended_thoughts(adapted, [[{"role": "user", "content": f"{a} plus 4"}] for a in range(40)], 1))
    theirs = writer(said.prompt, max_new_tokens=len(said.thought) + 1 + GREEDY["max_new_tokens"], do_sample=False)
    expected = dict(reasoning_content=tokenizer.decode(said.thought), content=tokenizer.decode(said.answer))
    assert theirs[0]["generated_text"][-1] == {"role": "assistant", **expected}


def test_templates_open_a_thought_where_the_model_goes_on():
    """And nowhere else; the line end that Jinja drops from a template stays dropped."""
    tokenizer, message = byte_tokenizer(), [{"role": "user", "content": "3 plus 4"}]
    before = tokenizer.chat_template

    def rendered(template, **options):
        tokenizer.chat_template = template
        return tokenizer.apply_chat_template(message, tokenize=False, **options)

    for template in (before, before + "\n"):
        assert rendered(opened(template, "<think>")) == rendered(before)
        new = rendered(opened(template, "<think>\n"), add_generation_prompt=True)
        assert new == rendered(before, add_generation_prompt=True) + "<think>\n"
    assert opened(None, "<think>") is None
    assert opened({"default": before}, "x") == {"default": opened(before, "x")}


@pytest.mark.parametrize("string", ["1", " plus", "s 1", "us is"])
def test_every_way_to_write_a_stop_string_is_found(string):
    """As the criterion that ends thoughts sees it, in texts of random tokens among those that matter."""
    tokenizer = byte_tokenizer()
    found, ends = set(spellings(tokenizer, string)), thought_end(tokenizer, string)
    parts = [i for i in range(1, len(tokenizer)) if set(tokenizer.decode([i])) & set(string)]
    generator, longest, seen = torch.Generator().manual_seed(0), max(map(len, found)), 0
    for row in torch.tensor(parts)[torch.randint(len(parts), (3000, 5), generator=generator)]:
        expected = bool(ends(row[None])[0])
        assert expected == any(tuple(row[-n:].tolist()) in found for n in range(1, longest + 1))
        seen += expected
    assert seen > 0 and all(bool(ends(torch.tensor([run]))[0]) for run in list(found)[:200])


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(thought_positions="all"), "the model thinks inside its text"),
        (dict(thought_positions="none"), "the model never thinks"),
        (dict(talk_length=4), "the thought is dropped after so many tokens"),
        (dict(thought_stop_string=None, min_thought_length=None), "thoughts end after a number of tokens"),
        (dict(thought_stop_string=None), "thoughts end after the EOS token"),
        (dict(min_thought_length=2), "`min_thought_length` is 2"),
    ],
)
def test_what_no_plain_model_can_do_is_refused(changes, message):
    """With what to train instead."""
    with pytest.raises(ValueError, match=message):
        check_settings(replace(SETTINGS, **changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(thought_suppress_tokens=[5]), "`thought_suppress_tokens` has 5, which text may hold"),
        (dict(thought_stop_string="日"), "this tokenizer can write in no ways"),
        (dict(prediction="mixed"), "--prediction thought --dataset_name FILE"),
    ],
)
def test_what_would_differ_is_refused(changes, message, tmp_path):
    """By the command, before anything is written."""
    source = saved(tmp_path / "thinking", exportable_model(settings=replace(SETTINGS, **changes)))
    with pytest.raises(ValueError, match=message):
        main(["export", source, str(tmp_path / "plain")])
    assert not (tmp_path / "plain").exists()


def test_leaving_out_the_mixing_head_is_measured(tmp_path, capsys):
    """Log-probabilities of the answers as trained, by the thought alone, and without thoughts."""
    model, tokenizer = exportable_model(settings=replace(SETTINGS, prediction="mixed")), byte_tokenizer()
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"{a} plus 4", "completion": f" is {a + 4}"}) + "\n" for a in range(3))
    )
    exported(tmp_path, model, "--prediction", "thought", "--dataset_name", str(data))
    said, expected = capsys.readouterr().out, []
    for prediction, think in (("mixed", None), ("thought", None), ("thought", "never")):
        model.adopt_settings(replace(SETTINGS, prediction=prediction))
        total = count = 0
        for a in range(3):
            prompt, answer = (tokenizer(x)["input_ids"] for x in (f"{a} plus 4", f" is {a + 4}"))
            ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])
            mask = torch.arange(ids.shape[1])[None] >= len(prompt)
            logps, _ = model.log_likelihoods(ids, score_mask=mask, think=think, tokenizer=tokenizer)
            total, count = total + float(logps.sum()), count + int(mask.sum())
        expected.append(f"{total / count:.4f}")
    assert len(set(expected)) == 3
    assert [line.split(": ")[1] for line in said.splitlines() if line.startswith("  ")] == expected


def test_names_that_a_tokenizer_has_are_not_taken(tmp_path):
    """Their embeddings mean something already."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["</think>"])
    config = tiny_config("llama", vocab_size=len(tokenizer), tie_word_embeddings=True)
    model = QuietStarForCausalLM.from_config(config, SETTINGS)
    model.save_pretrained(tmp_path / "thinking")
    tokenizer.save_pretrained(tmp_path / "thinking")
    assert main(["export", str(tmp_path / "thinking"), str(tmp_path / "plain"), "--dtype", "bfloat16"]) == 0
    own = AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert own.convert_tokens_to_ids(["<thought>", "</thought>"]) == [len(tokenizer), len(tokenizer) + 1]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert plain.dtype == torch.bfloat16 and plain.lm_head.weight is plain.model.embed_tokens.weight
    assert "</thought>" in (tmp_path / "plain" / "README.md").read_text()


@pytest.mark.parametrize("changes", [dict(thought_stop_string="</think>"), dict(thought_prompt="First <think>!\n")])
def test_names_that_stand_in_text_around_a_thought_are_not_taken(changes, tmp_path):
    """As tokens they would take the place of that text, which the model was trained on in its own tokens."""
    settings = replace(SETTINGS, **changes)
    _, own = exported(tmp_path, exportable_model(settings=settings))
    assert "<thought>" in own.get_vocab() and "</think>" not in own.get_vocab()
    for text in changes.values():
        assert own(text)["input_ids"] == byte_tokenizer()(text)["input_ids"]
    message = own.parse_response("so it is 7</think></thought>7", prefix="a<thought>")
    assert message["content"] == "7"


def test_a_thought_is_told_from_its_answer_in_any_answer(tmp_path):
    """At once and in a stream: cut in the thought, ended within it, without a thought, with the end in the answer too. What the
    tokenizer said of calls of tools stays."""
    tools = {"open": "<call>", "close": "</call>", "repeats": True}
    tokenizer = byte_tokenizer()
    old = {"thinking": {"open": "<t>", "close": "</t>"}, "content": {}, "tool_calls": tools}
    tokenizer.response_template = {"start_anchor": "assistant", "fields": old}
    model = exportable_model()
    model.save_pretrained(tmp_path / "thinking")
    tokenizer.save_pretrained(tmp_path / "thinking")
    assert main(["export", str(tmp_path / "thinking"), str(tmp_path / "plain")]) == 0
    own = AutoTokenizer.from_pretrained(tmp_path / "plain")
    eos = own.eos_token
    for said, thought, answer in (
        (f"3+4 1</think> 7 {eos}", "3+4 1", " 7 "),
        ("3+4", "3+4", None),
        (f"3+4{eos}", "3+4", None),
        (f"</think>7{eos}", None, "7"),
        ("3+4 1</think>7 1</think>!", "3+4 1", "7 1</think>!"),
    ):
        parts = {"reasoning_content": thought, "content": answer}
        expected = {"role": "assistant", **{name: part for name, part in parts.items() if part is not None}}
        assert own.parse_response(said, prefix="user: <think></think>assistant: <think>") == expected
        parser, found = ResponseParser(own.response_template, prefix="assistant: <think>"), defaultdict(str)
        events = [event for letter in said for event in parser.feed(letter)] + parser.finalize()[1]
        for event in events:
            found[event["field"]] += event.get("text", "")
        assert {name: text for name, text in found.items() if text} == {
            name: part for name, part in parts.items() if part is not None
        }
    assert own.parse_response("3</think>7<call>x</call>", prefix="")["tool_calls"] == ["x"]


def test_what_a_client_asks_for_decides_whether_tokens_are_drawn(tmp_path):
    """Transformers' server reads a request's temperature, `top_p` and seed only where the folder says that tokens are drawn."""
    plain, own = exported(tmp_path, exportable_model())
    prompt = torch.tensor([own("3 plus 4 is<think>")["input_ids"]])
    config = plain.generation_config
    config.temperature, config.pad_token_id, config.max_new_tokens = 3.0, 0, 20
    drawn = {tuple(plain.generate(prompt)[0].tolist()) for _ in range(4)}
    assert len(drawn) > 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--format", "onnx"), "`format` is 'onnx'; choose one of hf, gguf"),
        (("--dtype", "int8"), "`dtype` is 'int8'"),
        (("--converter", "x.py"), "`converter` is for `--format gguf`"),
        (("--format", "gguf", "--converter", "nowhere.py"), "is no file: 'nowhere.py'. Get the source of llama.cpp"),
        (("--prediction", "mixed"), "`prediction` is 'mixed'"),
        (
            ("--format", "gguf", "--converter", "BROKEN"),
            "converter failed: ModuleNotFoundError: No module named 'absent'",
        ),
    ],
)
def test_flags_that_cannot_be_followed(flags, message, tmp_path):
    """In a line, and nothing is left behind."""
    source, broken = saved(tmp_path / "thinking", exportable_model()), tmp_path / "broken.py"
    broken.write_text("import absent")
    flags = [str(broken) if flag == "BROKEN" else flag for flag in flags]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(["export", source, str(tmp_path / "plain"), *flags])
    assert not list(tmp_path.glob("plain/*"))
