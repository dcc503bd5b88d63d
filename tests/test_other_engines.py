"""llama.cpp and vLLM, as they are, write what `generate` does. Each is tested where an environment variable says where it is."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_quietstar import QuietStarForCausalLM, QuietStarSettings
from trl_quietstar.cli import main

from .servers import served
from .speaking import EXPORTABLE, GREEDY, PLAIN, ended_thoughts, exportable_model
from .tiny import byte_tokenizer


SETTINGS = QuietStarSettings(**PLAIN)
ENGINES = {"llama.cpp": ("LLAMA_SERVER", "LLAMA_CONVERTER"), "vllm": ("VLLM_SERVER",)}
SMOLLM2 = os.environ.get("SMOLLM2", ".demo/SmolLM2-135M-Instruct")
ASKED = [[{"role": "user", "content": f"Say one short thing about the number {i}."}] for i in range(50)]


@pytest.fixture(params=ENGINES)
def engine(request) -> str:
    """One that is there."""
    if not set(ENGINES[request.param]) <= os.environ.keys() or not os.path.isdir(SMOLLM2):
        pytest.skip(f"set {' and '.join(ENGINES[request.param])}, and run `make demo-data`")
    pytest.importorskip("openai")
    return request.param


def export(engine: str, folder: Path) -> None:
    """Writes the model `thinking` as `plain`, in the format that an engine reads."""
    flags = ["--format", "gguf", "--converter", os.environ["LLAMA_CONVERTER"]] if engine == "llama.cpp" else []
    assert main(["export", str(folder / "thinking"), str(folder / "plain"), *flags]) == 0


def server(engine: str, folder: Path, *flags: str):
    """An engine's server of the model that [`export`] has written, in float32; its address."""
    if engine == "llama.cpp":
        command = [os.environ["LLAMA_SERVER"], "-m", str(folder / "plain" / "model.gguf"), "-c", "1024", "-np", "1"]
        command += ["--jinja", "--reasoning-format", "none"]
    else:
        command = [os.environ["VLLM_SERVER"], "serve", str(folder / "plain"), "--served-model-name", "plain"]
        command += ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", "1G", *flags]
    return served(command, folder / "log.txt")


def of_real_model(engine: str, folder: Path, settings: QuietStarSettings) -> tuple[list, list, list]:
    """Exports SmolLM2, in float32; returns 50 prompts, and what `generate` thinks and answers to each, greedily."""
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
    export(engine, folder)
    answers = [row[batch["input_ids"].shape[1] :].tolist() for row in ours.sequences]
    return prompts, [thoughts[0].token_ids for thoughts in ours.thoughts], answers


def asking_twice() -> str:
    """The code of docs/serving.md."""
    page = (Path(__file__).parent.parent / "docs" / "serving.md").read_text()
    return page.split("## Asking twice")[1].split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize(
    "text, reason", [("6-1=5", "stop"), ("6-1=5 =", "stop"), ("6-1=5 =\n", "stop"), ("6-1=5 =", "length")]
)
def test_a_thought_ends_with_its_stop_string_once(text, reason):
    """Asked as docs/serving.md says, whether an engine leaves the string out, as OpenAI's protocol has it, or keeps it, as Transformers
    does, with what else its last token holds."""
    texts, prompts = [text, " 13"], []

    def create(prompt, **options):
        prompts.append(prompt)
        return SimpleNamespace(choices=[SimpleNamespace(text=texts[len(prompts) - 1], finish_reason=reason)])

    asking: dict = {"client": SimpleNamespace(completions=SimpleNamespace(create=create))}
    exec("STOP" + asking_twice().split("STOP", 1)[1], asking)
    assert asking["answer"](" 6-1+8=<think>") == ("6-1=5 =", " 13")
    assert prompts[1] == " 6-1+8=<think>6-1=5 =</think>"


@pytest.mark.real
def test_a_server_asked_twice_answers_as_ours(engine, tmp_path):
    """Asked as docs/serving.md says, it gives the greedy answers of `generate` to 50 prompts, in float32."""
    settings = replace(SETTINGS, thought_length=24, thought_stop_string=",")
    asked = of_real_model(engine, tmp_path, settings)
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    asking: dict = {}
    with server(engine, tmp_path) as url:
        exec(asking_twice().replace("http://127.0.0.1:8080", url).replace('STOP = " ="', 'STOP = ","'), asking)
        for prompt, thought, answer in zip(*asked, strict=True):
            found = asking["answer"](prompt + "<think>", 24, len(answer))
            assert found == (tokenizer.decode(thought), tokenizer.decode(answer, skip_special_tokens=True))


@pytest.mark.real
def test_a_server_writes_thoughts_of_text(engine, tmp_path):
    """Asked once, in messages: its own reading of the chat template asks for the thought in a turn and opens it. Where a thought ends
    by itself, thought and answer are the greedy ones of `generate`, in float32."""
    text = dict(thought_format="text", thought_start_text="The number", thought_end_text=",", thought_stop_string=",")
    turn = dict(thought_prompt="Think about it first.", thought_prompt_role="user")
    asked = of_real_model(engine, tmp_path, replace(SETTINGS, thought_length=24, **text, **turn))
    from openai import OpenAI

    tokenizer, ended = AutoTokenizer.from_pretrained(SMOLLM2), 0
    with server(engine, tmp_path) as url:
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


# vLLM's engine, on tiny models


def asked_of(folder: Path, family: str, thought_format: str) -> dict[str, list[tuple[list[int], dict, list[int]]]]:
    """Saves and exports a model. Prompts, options and what it writes, by folder: without thoughts of the saved one, and with them."""
    text = dict(thought_format="text", thought_start_text=" plus", thought_end_text="1")
    settings = replace(SETTINGS, **(text if thought_format == "text" else {}))
    model, saved, output = exportable_model(family, settings), folder / "saved", folder / "exported"
    model.save_pretrained(saved)
    byte_tokenizer().save_pretrained(saved)
    assert main(["export", str(saved), str(output)]) == 0
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(saved), AutoTokenizer.from_pretrained(output)
    without, thinking = [], []
    for said in ended_thoughts(model, [f"{a} plus 4 is" for a in range(60)], 4):
        prompt, thought, answer = said.input_ids[0].tolist(), said.thought, said.answer
        own = plain.generate(said.input_ids, do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0)
        without.append((prompt, {"max_tokens": 8, "ignore_eos": True}, own[0, len(prompt) :].tolist()))
        if thought_format == "text":
            opened = prompt + tokenizer(" plus")["input_ids"]
            thinking.append((opened, {"max_tokens": len(thought + answer)}, thought + answer))
        else:  # asked twice
            start, end = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
            never = {"logit_bias": {start: -100, end: -100}}
            thinking.append(([*prompt, start], {"max_tokens": 30, "stop": ["1"], **never}, thought))
            closed = [*prompt, start, *thought, end]
            thinking.append((closed, {"max_tokens": len(answer), **never}, answer))
    return {str(saved): without + (thinking if thought_format == "text" else []), str(output): thinking}


@pytest.mark.slow
@pytest.mark.skipif("VLLM_SERVER" not in os.environ, reason="set VLLM_SERVER")
@pytest.mark.parametrize("family", EXPORTABLE)
def test_vllm_writes_as_ours(family, tmp_path):
    """Its engine loads what was saved and what was exported. Without thoughts it writes what the plain model does; with them, of text and
    learned, what `generate` does."""
    asked = {}
    for thought_format in ("embeddings", "text"):
        asked |= asked_of(tmp_path / thought_format, family, thought_format)
    files = [tmp_path / "asked.json", tmp_path / "said.json"]
    files[0].write_text(json.dumps({folder: [row[:2] for row in rows] for folder, rows in asked.items()}))
    python = Path(os.environ["VLLM_SERVER"]).parent / "python"
    subprocess.run([python, "-I", Path(__file__).parent / "vllm_engine.py", *files], check=True)
    assert json.loads(files[1].read_text()) == {folder: [row[2] for row in rows] for folder, rows in asked.items()}


@pytest.mark.slow
@pytest.mark.skipif("VLLM_SERVER" not in os.environ, reason="set VLLM_SERVER")
def test_vllm_hides_thoughts_of_text(tmp_path):
    """Its parser of `<think>` and `</think>` gives the thought apart from the answer, where both are tokens of the tokenizer."""
    openai = pytest.importorskip("openai")
    tokenizer, end = byte_tokenizer(), "</think>"
    tokenizer.add_tokens(["<think>", end])
    marks = dict(thought_format="text", thought_start_text="<think>", thought_end_text=end, thought_stop_string=end)
    model = exportable_model(settings=replace(SETTINGS, **marks), vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "thinking")
    tokenizer.save_pretrained(tmp_path / "thinking")
    export("vllm", tmp_path)
    prompts = [[{"role": "user", "content": f"{a} plus 4"}] for a in range(200)]
    with server("vllm", tmp_path, "--reasoning-parser", "deepseek_r1") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        for said in ended_thoughts(model, prompts, 2, tokenizer, end):
            options = dict(model="plain", temperature=0, max_tokens=len(said.thought + said.answer))
            message = client.chat.completions.create(messages=said.prompt, **options).choices[0].message
            assert message.reasoning + end == tokenizer.decode(said.thought)
            # vLLM leaves out the bytes of a character that has not ended
            assert message.content == tokenizer.decode(said.answer).rstrip("\N{REPLACEMENT CHARACTER}")
