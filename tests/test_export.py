"""`trl-quietstar export`: a plain model that thinks by itself writes what the thinking model writes."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, pipeline

from trl_quietstar import QuietStarForCausalLM, QuietStarSettings
from trl_quietstar.cli import main
from trl_quietstar.model.plain import check_settings, opened, spellings
from trl_quietstar.thinking.drawing import thought_end

from .servers import served
from .speaking import PLAIN
from .tiny import byte_tokenizer, randomize, tiny_config
from .training import LORA, tiny_trainer


SETTINGS = QuietStarSettings(**PLAIN)
GREEDY = dict(do_sample=False, max_new_tokens=4, pad_token_id=0, return_dict_in_generate=True, output_logits=True)
TRAINED = dict(
    thought_positions="prompt_end",
    talk_length="completion",
    reward_prediction="thought",
    thought_stop_string="1",
    thought_length=30,
    value_head_hidden_size=256,
    data=Dataset.from_dict({"prompt": ["3 plus 4", "4 plus 4"] * 4, "completion": [" is 7", " is 8"] * 4}),
)
FAMILIES = ("llama", "qwen3", "gemma3", "gpt2")


def thinking_model(name: str = "llama", settings: QuietStarSettings = SETTINGS):
    """A model over the tokenizer's vocabulary, whose thoughts matter."""
    V = len(byte_tokenizer())
    if name == "gemma3":  # a random one with a tied LM head says the last token again
        shape = {k: v for k, v in tiny_config("llama").to_dict().items() if "size" in k or k.startswith("num_")}
        config = Gemma3TextConfig(**{**shape, "vocab_size": V}, head_dim=8, tie_word_embeddings=False, eos_token_id=0)
    else:
        config = tiny_config(name, vocab_size=V)
    model = QuietStarForCausalLM.from_config(config, settings)
    randomize(model)
    if name == "gpt2":
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(0.1)  # tied too
    return model.eval()


def saved(folder, model) -> str:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def exported(folder, model, *flags: str):
    """The plain model and its tokenizer, by the command."""
    source, output = saved(folder / "thinking", model), str(folder / "plain")
    assert main(["export", "--model", source, "--output", output, *flags]) == 0
    return AutoModelForCausalLM.from_pretrained(output).eval(), AutoTokenizer.from_pretrained(output)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_model_answers_as_the_thinking_one(family, tmp_path):
    """Token for token, with equal log-probabilities, wherever the thought ends by itself."""
    model, tokenizer = thinking_model(family), byte_tokenizer()
    plain, own = exported(tmp_path, model)
    assert "QuietStar" not in type(plain).__name__ and not (tmp_path / "plain" / "quietstar.safetensors").exists()
    assert "quietstar" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    start, end = own.convert_tokens_to_ids(["<think>", "</think>"])
    ended = 0
    for a in range(60):
        ids = tokenizer(f"{a} plus 4 is", return_tensors="pt")["input_ids"]
        ours = model.generate(ids, return_thoughts=True, tokenizer=tokenizer, **GREEDY)
        thought, answer = ours.thoughts[0][0].token_ids, ours.sequences[0, ids.shape[1] :].tolist()
        if "1" not in tokenizer.decode(thought) or 0 in thought or "1" in tokenizer.decode(answer):
            continue
        ended += 1
        prompt = torch.cat([ids, torch.tensor([[start]])], dim=1)
        theirs = plain.generate(
            prompt, **{**GREEDY, "max_new_tokens": len(thought) + 1 + len(answer), "output_scores": True}
        )
        assert theirs.sequences[0, prompt.shape[1] :].tolist() == [*thought, end, *answer]
        for expected, scores in zip(ours.logits, theirs.scores[len(thought) + 1 :], strict=True):
            found = scores[:, : expected.shape[1]].log_softmax(-1)
            torch.testing.assert_close(found, expected.log_softmax(-1), rtol=1e-5, atol=1e-5)
        if ended == 4:
            return
    raise AssertionError(f"only {ended} thoughts ended")


def test_an_adapter_is_merged_and_pipelines_think(tmp_path):
    """What the folder says of itself is enough: the template opens the thought, and the generation config closes it."""
    source, output = saved(tmp_path / "thinking", thinking_model()), str(tmp_path / "plain")
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
    for a in range(40):
        message = [{"role": "user", "content": f"{a} plus 4"}]
        options = dict(add_generation_prompt=True, return_tensors="pt", return_dict=True)
        prompt = tokenizer.apply_chat_template(message, **options)
        ours = adapted.generate(**prompt, return_thoughts=True, tokenizer=tokenizer, **GREEDY)
        thought = ours.thoughts[0][0].token_ids
        answer = tokenizer.decode(ours.sequences[0, prompt["input_ids"].shape[1] :])
        if "1" in tokenizer.decode(thought) and "1" not in answer and 0 not in thought:
            break
    said = writer(message, max_new_tokens=len(thought) + 1 + GREEDY["max_new_tokens"], do_sample=False)
    assert said[0]["generated_text"][-1]["content"] == f"{tokenizer.decode(thought)}</think>{answer}"


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
    source = saved(tmp_path / "thinking", thinking_model(settings=replace(SETTINGS, **changes)))
    with pytest.raises(ValueError, match=message):
        main(["export", source, str(tmp_path / "plain")])
    assert not (tmp_path / "plain").exists()


def test_leaving_out_the_mixing_head_is_measured(tmp_path, capsys):
    """Log-probabilities of the answers as trained, by the thought alone, and without thoughts."""
    model, tokenizer = thinking_model(settings=replace(SETTINGS, prediction="mixed")), byte_tokenizer()
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
    source, broken = saved(tmp_path / "thinking", thinking_model()), tmp_path / "broken.py"
    broken.write_text("import absent")
    flags = [str(broken) if flag == "BROKEN" else flag for flag in flags]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(["export", source, str(tmp_path / "plain"), *flags])
    assert not list(tmp_path.glob("plain/*"))


def llama_server(folder: Path):
    """llama.cpp's server of the model that [`of_real_model`] has exported."""
    command = [os.environ["LLAMA_SERVER"], "-m", str(folder / "plain" / "model.gguf"), "-c", "1024", "-np", "1"]
    return served([*command, "--jinja", "--reasoning-format", "none"], folder / "log.txt")


SMOLLM2 = os.environ.get("SMOLLM2", ".demo/SmolLM2-135M-Instruct")
ASKED = [[{"role": "user", "content": f"Say one short thing about the number {i}."}] for i in range(50)]


def of_real_model(folder: Path, settings: QuietStarSettings) -> tuple[list[str], list[list[int]], list[list[int]]]:
    """Exports SmolLM2 for llama.cpp, in float32; returns 50 prompts, and what `generate` thinks and answers to each, greedily."""
    if not {"LLAMA_SERVER", "LLAMA_CONVERTER"} <= os.environ.keys() or not os.path.isdir(SMOLLM2):
        pytest.skip("set LLAMA_SERVER and LLAMA_CONVERTER, and run `make demo-data`")
    pytest.importorskip("openai")
    model = QuietStarForCausalLM.from_pretrained(SMOLLM2, settings, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2, padding_side="left")
    if settings.thought_format == "embeddings":
        model.initialize_thought_embeddings(tokenizer, "\n", "\n")
    prompts = [tokenizer.apply_chat_template(x, add_generation_prompt=True, tokenize=False) for x in ASKED]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    options = {**GREEDY, "output_logits": False, "pad_token_id": tokenizer.eos_token_id}
    ours = model.generate(**batch, return_thoughts=True, tokenizer=tokenizer, **options)
    model.save_pretrained(folder / "thinking")
    tokenizer.save_pretrained(folder / "thinking")
    del model
    flags = ("--format", "gguf", "--converter", os.environ["LLAMA_CONVERTER"])
    assert main(["export", str(folder / "thinking"), str(folder / "plain"), *flags]) == 0
    answers = [row[batch["input_ids"].shape[1] :].tolist() for row in ours.sequences]
    return prompts, [thoughts[0].token_ids for thoughts in ours.thoughts], answers


@pytest.mark.real
def test_llama_cpp_answers_as_ours(tmp_path):
    """Its server, asked as docs/serving.md says, gives the greedy answers of `generate` to 50 prompts, in float32."""
    settings = replace(SETTINGS, thought_length=24, thought_stop_string=",")
    asked = of_real_model(tmp_path, settings)
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    page = (Path(__file__).parent.parent / "docs" / "serving.md").read_text()
    code = page.split("## Asking twice")[1].split("```python\n")[1].split("```")[0]
    asking: dict = {}
    with llama_server(tmp_path) as url:
        exec(code.replace("http://127.0.0.1:8080", url).replace('STOP = " ="', 'STOP = ","'), asking)
        for prompt, thought, answer in zip(*asked, strict=True):
            found = asking["answer"](prompt + "<think>", 24, len(answer))
            assert found == (tokenizer.decode(thought), tokenizer.decode(answer, skip_special_tokens=True))


@pytest.mark.real
def test_llama_cpp_writes_thoughts_of_text(tmp_path):
    """Asked once, in messages: its own reading of the chat template asks for the thought in a turn and opens it. Where a thought ends
    by itself, thought and answer are the greedy ones of `generate`, in float32."""
    text = dict(thought_format="text", thought_start_text="The number", thought_end_text=",", thought_stop_string=",")
    turn = dict(thought_prompt="Think about it first.", thought_prompt_role="user")
    asked = of_real_model(tmp_path, replace(SETTINGS, thought_length=24, **text, **turn))
    from openai import OpenAI

    tokenizer, ended = AutoTokenizer.from_pretrained(SMOLLM2), 0
    with llama_server(tmp_path) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        for messages, (_, thought, answer) in zip(ASKED, zip(*asked, strict=True), strict=True):
            if "," not in tokenizer.decode(thought):
                continue
            options = dict(model="plain", temperature=0, max_tokens=len(thought) + len(answer))
            said = client.chat.completions.create(messages=messages, **options).choices[0].message.content
            assert said == tokenizer.decode(thought + answer, skip_special_tokens=True)
            ended += 1
    print(f"{ended} of {len(ASKED)} thoughts ended by themselves")
    assert ended >= 20
