"""What is uploaded, and the ways in which others load it: plainly, trusting remote code, as a thinking model, with PEFT."""

import copy
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

from trl_quietstar import QuietStarForCausalLM
from trl_quietstar.model.adapters import base_of, heads_aside
from trl_quietstar.model.saved import save_config

from .loaders import loaded_by_pattern
from .tiny import byte_tokenizer
from .training import saved_model, text_data, tiny_trainer


LORA = dict(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
GREEDY = dict(do_sample=False, max_new_tokens=6, eos_token_id=None, pad_token_id=0)


class FakeHub:
    """Keeps the files that are uploaded, in a folder for each repository."""

    def __init__(self, folder: Path):
        self.folder = folder

    def create_repo(self, api, repo_id, **kwargs):
        (self.folder / repo_id).mkdir(parents=True, exist_ok=True)
        return type("RepoUrl", (str,), {"repo_id": repo_id})(repo_id)

    def create_commit(self, api, repo_id, operations, **kwargs):
        for operation in operations:
            target = self.folder / repo_id / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(operation.path_or_fileobj, target)

    def upload_folder(self, api, repo_id, folder_path, ignore_patterns=(), **kwargs):
        shutil.copytree(
            folder_path, self.folder / repo_id, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*ignore_patterns)
        )


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hub's API, faked where files leave the machine."""
    fake = FakeHub(tmp_path / "hub")
    for name in ("create_repo", "create_commit", "upload_folder"):
        method = getattr(fake, name)
        monkeypatch.setattr(HfApi, name, lambda api, *args, method=method, **kwargs: method(api, *args, **kwargs))
    return fake


def trained(folder: Path, **options):
    """A trainer that took a few steps, whose thoughts then decide what is said."""
    trainer = tiny_trainer(
        folder / "out",
        model=saved_model(folder / "base"),
        evaluation=text_data(4, 100),
        hub_model_id="me/thinker",
        **options,
    )
    trainer.train()
    with torch.no_grad():
        base_of(trainer.model).quietstar.mixing_head.bias.fill_(3)
    trainer.evaluate()
    return trainer


def prompt() -> torch.Tensor:
    """Text of the corpus."""
    return byte_tokenizer()("7 plus 8 is", return_tensors="pt")["input_ids"]


def test_the_trainer_uploads_all_that_others_need(hub, tmp_path):
    """One push, four ways to load it back; with thoughts all give the trained model's tokens."""
    trainer = trained(tmp_path)
    model = trainer.model.eval()
    expected, plain_text = (model.generate(prompt(), think=think, **GREEDY) for think in ("always", "never"))
    assert not torch.equal(expected, plain_text)
    trainer.push_to_hub()
    repo = hub.folder / "me/thinker"
    files = {str(file.relative_to(repo)) for file in repo.rglob("*") if file.is_file()}
    assert files >= {
        *("model.safetensors", "quietstar.safetensors", "config.json", "tokenizer.json", "README.md"),
        *("custom_generate/generate.py", "custom_generate/requirements.txt"),
    }

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, info = AutoModelForCausalLM.from_pretrained(repo, output_loading_info=True)
    assert not any(info.values()) and "QuietStar" not in type(plain).__name__
    assert torch.equal(plain.generate(prompt(), **GREEDY), plain_text)

    trusted = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True)
    for arguments in ({"inputs": prompt()}, {"input_ids": prompt(), "attention_mask": torch.ones_like(prompt())}):
        assert torch.equal(trusted.generate(**arguments, **GREEDY), expected)
    assert torch.equal(trusted.generate(prompt(), **GREEDY), expected)
    assert torch.equal(trusted.generate(prompt(), think="never", **GREEDY), plain_text)
    assert trusted.generate(prompt(), return_thoughts=True, **GREEDY).thoughts[0]

    thinking = QuietStarForCausalLM.from_pretrained(repo)
    assert torch.equal(thinking.generate(prompt(), **GREEDY), expected)

    card = (repo / "README.md").read_text()
    assert (
        "QuietStarForCausalLM.from_pretrained('me/thinker')" in card and "reward (gain, probability a token)" in card
    )
    assert trainer.sampled_thoughts()["thought"][0].splitlines()[0] in card


def test_an_adapter_run_uploads_the_adapter_and_the_heads_only(hub, tmp_path):
    """A small repository that PEFT loads as any adapter, and `QuietStarForCausalLM` with its thoughts."""
    trainer = trained(tmp_path, peft_config=LoraConfig(**LORA), learning_rate=1e-2)
    model = trainer.model.eval()
    expected, plain_text = (model.generate(input_ids=prompt(), think=t, **GREEDY) for t in ("always", "never"))
    trainer.push_to_hub()
    repo = hub.folder / "me/thinker"
    weights = {file.name for file in repo.rglob("*.safetensors")}
    assert weights == {"adapter_model.safetensors", "quietstar.safetensors"}
    assert "loads without its thoughts as any other, with `peft`" in (repo / "README.md").read_text()
    thinking = QuietStarForCausalLM.from_pretrained(repo)
    assert torch.equal(thinking.generate(input_ids=prompt(), **GREEDY), expected)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = PeftModel.from_pretrained(base, repo)
    assert torch.equal(adapted.generate(input_ids=prompt(), **GREEDY), plain_text)
    auto = AutoModelForCausalLM.from_pretrained(repo)
    assert torch.equal(auto.generate(input_ids=prompt(), **GREEDY), plain_text)
    spoken = pipeline("text-generation", model=str(repo))("7 plus 8 is", **GREEDY)[0]["generated_text"]
    assert spoken == byte_tokenizer().decode(plain_text[0])


def test_an_older_adapter_loads(tmp_path):
    """With the `config.json` that was once saved beside it in place of `quietstar.json`; training it on leaves the new file."""
    trainer = trained(tmp_path, peft_config=LoraConfig(**LORA))
    trainer.save_model()
    folder, model = tmp_path / "out", trainer.model.eval()
    (folder / "quietstar.json").unlink()
    save_config(base_of(model), folder)
    again = QuietStarForCausalLM.from_pretrained(folder).eval()
    assert base_of(again).quietstar_settings == base_of(model).quietstar_settings
    assert torch.equal(again.generate(input_ids=prompt(), **GREEDY), model.generate(input_ids=prompt(), **GREEDY))
    trainer.save_model()
    assert (folder / "quietstar.json").is_file() and not (folder / "config.json").exists()


@pytest.mark.parametrize("max_shard_size", ["50GB", "60KB"])
def test_loaders_by_pattern_find_the_base_alone(max_shard_size, tmp_path):
    """Every weight of the plain model and nothing else, in one file or several; by names too, as llama.cpp reads."""
    model = QuietStarForCausalLM.from_pretrained(saved_model(tmp_path / "base"))
    model.save_pretrained(tmp_path / "out", max_shard_size=max_shard_size)
    assert len(list((tmp_path / "out").glob("model*.safetensors"))) == (1 if max_shard_size == "50GB" else 3)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    for pattern in ("*.safetensors", "model*.safetensors"):
        found = loaded_by_pattern(tmp_path / "out", pattern)
        assert set(found) <= set(plain) and all(torch.equal(tensor, plain[name]) for name, tensor in found.items())
        left = set(plain) - set(found)
        assert not left - {"lm_head.weight"}
    names = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    assert set(names) == set(found)
    again = QuietStarForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again.quietstar.start_embedding, model.quietstar.start_embedding)


def test_heads_are_saved_whatever_state_is_given(tmp_path):
    """A state of the base alone leaves the model's own; a state with some of them is refused."""
    model = QuietStarForCausalLM.from_pretrained(saved_model(tmp_path / "base"))
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("quietstar.")}
    model.save_pretrained(tmp_path / "out", state_dict=state)
    again = QuietStarForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    state["quietstar.start_embedding"] = model.quietstar.start_embedding
    with pytest.raises(ValueError, match="`state_dict` holds some of the heads, but not end_embedding"):
        model.save_pretrained(tmp_path / "other", state_dict=state)


def test_what_pushing_takes_is_passed_on(tmp_path, monkeypatch):
    """`token`, `private` and the like, which Transformers' own `save_pretrained(push_to_hub=True)` hands on."""
    seen = []
    monkeypatch.setattr(HfApi, "create_repo", lambda api, repo_id, **kwargs: seen.append((repo_id, kwargs)) or _stop())
    model = QuietStarForCausalLM.from_pretrained(saved_model(tmp_path / "base"))
    options = dict(repo_id="me/thinker", token="secret", private=True)
    with pytest.raises(ConnectionError):
        model.save_pretrained(tmp_path / "out", push_to_hub=True, **options)
    ((repo, kwargs),) = seen
    assert repo == "me/thinker" and kwargs["private"] is True and kwargs["token"] == "secret"


def _stop():
    raise ConnectionError


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_a_model_uploads_itself_with_its_heads(way, hub, tmp_path):
    """By either of the model's own methods."""
    model = trained(tmp_path).model.eval()
    if way == "push_to_hub":
        model.push_to_hub("me/other")
    else:
        model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/other")
    again = QuietStarForCausalLM.from_pretrained(hub.folder / "me/other")
    assert torch.equal(again.generate(prompt(), **GREEDY), model.generate(prompt(), **GREEDY))
    plain = AutoModelForCausalLM.from_pretrained(hub.folder / "me/other")
    assert "QuietStar" not in type(plain).__name__


@pytest.mark.parametrize("source", ["trained", "loaded"])
@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_an_adapter_saves_itself_with_its_heads(way, source, hub, tmp_path):
    """By either of PEFT's own methods, from the trainer and loaded again; and whatever its task is called, PEFT finds the plain base."""
    options = LORA | ({} if way == "push_to_hub" else {"task_type": None})
    trainer = trained(tmp_path, peft_config=LoraConfig(**options), learning_rate=1e-2)
    model, folder = trainer.model.eval(), hub.folder / "me/other"
    expected, plain_text = (model.generate(input_ids=prompt(), think=t, **GREEDY) for t in ("always", "never"))
    if source == "loaded":
        trainer.save_model()
        model = copy.deepcopy(QuietStarForCausalLM.from_pretrained(tmp_path / "out"))
    if way == "push_to_hub":
        model.push_to_hub("me/other")
    else:
        model.save_pretrained(folder)
        auto = AutoPeftModelForCausalLM.from_pretrained(folder)
        assert torch.equal(auto.generate(input_ids=prompt(), **GREEDY), plain_text)
    again = QuietStarForCausalLM.from_pretrained(folder)
    assert torch.equal(again.generate(input_ids=prompt(), **GREEDY), expected)


def test_another_adapter_has_its_heads_too(tmp_path):
    """In the folder that PEFT makes for it; a process that is not the main one writes none."""
    trainer = trained(tmp_path, peft_config=LoraConfig(**LORA))
    with heads_aside(base_of(trainer.model)):
        trainer.model.add_adapter("other", LoraConfig(**LORA))
    trainer.model.save_pretrained(tmp_path / "two", selected_adapters=["other"])
    assert QuietStarForCausalLM.from_pretrained(tmp_path / "two/other").get_base_model().quietstar is not None
    trainer.model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not list((tmp_path / "none").glob("*quietstar*"))


def test_an_adapter_is_kept_out_of_its_bases_folder(tmp_path):
    """Before training, in saving, and in loading what PEFT has put there; the base is left as it was."""
    base = saved_model(tmp_path / "base")
    for model in (base, AutoModelForCausalLM.from_pretrained(base)):
        with pytest.raises(ValueError, match="is the folder of the adapter's base model; give the adapter one of its"):
            tiny_trainer(tmp_path / "base", model=model, peft_config=LoraConfig(**LORA))
    model = trained(tmp_path, peft_config=LoraConfig(**LORA)).model
    with pytest.raises(ValueError, match="is the folder of the adapter's base model"):
        model.save_pretrained(base)
    before = AutoConfig.from_pretrained(base)
    type(model).save_pretrained(model, base)
    shutil.copy(tmp_path / "base/adapter_config.json", tmp_path / "base/quietstar.safetensors")
    with pytest.raises(ValueError, match="is the folder of the adapter's base model"):
        QuietStarForCausalLM.from_pretrained(base)
    assert before.to_dict() == AutoConfig.from_pretrained(base).to_dict()


def test_pipelines_generate(tmp_path):
    """`pipeline("text-generation")` speaks plainly by path, and with thoughts from a thinking model or trusting code."""
    trainer = trained(tmp_path)
    trainer.save_model()
    model, tokenizer, text = trainer.model.eval(), byte_tokenizer(), "7 plus 8 is"
    expected, plain = (
        tokenizer.decode(model.generate(prompt(), think=think, **GREEDY)[0]) for think in ("always", "never")
    )
    folder = str(tmp_path / "out")
    thinking = QuietStarForCausalLM.from_pretrained(folder)
    assert pipeline("text-generation", model=folder)(text, **GREEDY)[0]["generated_text"] == plain
    for options in ({"model": folder, "trust_remote_code": True}, {"model": thinking, "tokenizer": tokenizer}):
        pipe = pipeline("text-generation", **options)
        assert pipe(text, **GREEDY)[0]["generated_text"] == expected
        assert pipe(text, think="never", **GREEDY)[0]["generated_text"] == plain


def test_code_is_not_run_unless_it_is_trusted(tmp_path):
    """A repository's `generate.py` stays a file to those who do not ask for it."""
    trainer = trained(tmp_path)
    trainer.save_model()
    marker = tmp_path / "ran"
    (tmp_path / "out/custom_generate/generate.py").write_text(f"open({str(marker)!r}, 'w')\ndef generate(**k): ...\n")
    QuietStarForCausalLM.from_pretrained(tmp_path / "out").generate(prompt(), **GREEDY)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").generate(prompt(), **GREEDY)
    assert not marker.exists()


def test_a_plain_folder_says_that_it_has_no_heads(tmp_path):
    """The saved `generate.py` beside a model that lost its heads."""
    trainer = trained(tmp_path)
    trainer.save_model()
    (tmp_path / "out/quietstar.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with pytest.raises(FileNotFoundError, match="has no quietstar.safetensors"):
        model.generate(prompt(), **GREEDY)


def test_hostile_thoughts_stay_text_in_the_model_card(tmp_path):
    """Whatever a thought holds, every line of the block is indented code."""
    trainer = trained(tmp_path)
    hostile = "```\n# Title\n<script>alert(1)</script>\n\n[x](javascript:1)"
    trainer.runlog.samples["eval"] = {name: [hostile] for name in ("context", "thought", "next")} | {"reward": [0.5]}
    trainer.create_model_card()
    card = Path(trainer.args.output_dir, "README.md").read_text()
    lines = [line for line in card.splitlines() if "script" in line or "Title" in line]
    assert lines and all(line.startswith("    ") for line in lines)


def test_the_tokenizer_comes_along(hub, tmp_path):
    """So that a repository is complete."""
    trained(tmp_path).push_to_hub()
    tokenizer = AutoTokenizer.from_pretrained(hub.folder / "me/thinker")
    assert tokenizer("7 plus 8 is")["input_ids"] == prompt()[0].tolist()


def test_a_variant_and_a_second_process(tmp_path):
    """`variant` names the weights' file, as Transformers does; a process that is not the main one writes none of the heads."""
    model = QuietStarForCausalLM.from_pretrained(saved_model(tmp_path / "base"))
    model.save_pretrained(tmp_path / "out", variant="fp16")
    assert (tmp_path / "out/model.fp16.safetensors").is_file()
    again = QuietStarForCausalLM.from_pretrained(tmp_path / "out", variant="fp16")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    model.save_pretrained(tmp_path / "second", is_main_process=False)
    assert not list((tmp_path / "second").glob("quietstar*"))
