"""Checkpoints that cannot be resumed from: each is refused before anything is computed, by an error that names the file and
the way out; and nothing in them is executed."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from trl_quietstar import QuietStarForCausalLM
from trl_quietstar.training.folders import check_checkpoint, last_checkpoint

from .training import saved_model, tiny_trainer


SAVING = dict(save_strategy="steps", save_steps=1, max_steps=2)
LORA = dict(r=2, target_modules="all-linear")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The output directory of a run with `checkpoint-1` and `checkpoint-2`, and its model beside it."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    tiny_trainer(folder / "out", model=saved_model(folder / "model"), **SAVING).train()
    return folder


@pytest.fixture
def out(run, tmp_path) -> Path:
    """A copy of it to damage."""
    return shutil.copytree(run / "out", tmp_path / "out")


@pytest.fixture
def trainer(run, tmp_path):
    """One that would go on from it, and must not take a step."""
    trainer = tiny_trainer(tmp_path / "out", model=str(run / "model"), **SAVING)
    trainer.training_step = None
    return trainer


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def cut(path: Path) -> None:
    """Leaves half a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def forget_files(checkpoint: Path) -> None:
    """Takes away the list of files, so that a damaged one must be found by what it is."""
    (checkpoint / "quietstar_state.json").unlink()


def test_the_checkpoints_are_good(run):
    """What the tests damage is whole."""
    assert last_checkpoint(str(run / "out")).endswith("checkpoint-2")
    check_checkpoint(run / "out/checkpoint-1")


def test_a_missing_folder(out, trainer):
    """The checkpoints that are there are named."""
    with pytest.raises(FileNotFoundError, match=r"no checkpoint folder .*checkpoint-7.*checkpoint-1, checkpoint-2"):
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-7"))


def test_an_empty_folder(out, trainer):
    """Is no checkpoint, and is passed over where any will do."""
    (out / "checkpoint-3").mkdir()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-3' is empty.*checkpoint-1, checkpoint-2"):
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-3"))
    assert trainer.find_checkpoint(True) == str(out / "checkpoint-2")


FILES = ("model.safetensors", "quietstar.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file(name, out, trainer):
    """By its size, and without the list of sizes by its content; True resumes from the one before."""
    cut(out / "checkpoint-2" / name)
    with pytest.raises(
        ValueError, match=rf"'{name}' in .*checkpoint-2' is damaged: it has .* bytes where .*checkpoint-1"
    ):
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    assert trainer.find_checkpoint(True) == str(out / "checkpoint-1")
    forget_files(out / "checkpoint-2")
    with pytest.raises(ValueError, match=rf"'{name}' in .* is damaged.*(safetensors|refuses it)"):
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-2"))


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "config.json"])
def test_a_file_that_was_there(name, out, trainer):
    """Is missed, even if the Trainer would go on without."""
    (out / "checkpoint-2" / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"'{name}' is missing from .*checkpoint-2.*checkpoint-1"):
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-2"))


@pytest.mark.parametrize("name", ["quietstar_state.json", "trainer_state.json", "config.json"])
def test_invalid_json(name, out, trainer):
    """Cut short or no object."""
    path = out / "checkpoint-2" / name
    cut(path)
    with pytest.raises(ValueError, match=rf"'{name}' in .* is damaged: it is no valid JSON"):
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    path.write_text("[1]")
    with pytest.raises(ValueError, match=rf"'{name}' in .* is damaged: it is no JSON object"):
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-2"))


def test_a_state_of_another_version(out, trainer):
    """Is refused by what it lacks."""
    path = out / "checkpoint-2/quietstar_state.json"
    state = json.loads(path.read_text())
    del state["memory"]
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"has no 'memory': another version of trl-quietstar.*model="):
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-2"))


def test_edited_json_is_taken(out, trainer):
    """Users change a `trainer_state.json` by hand."""
    path = out / "checkpoint-2/trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert trainer.find_checkpoint(True) == str(out / "checkpoint-2")


def test_no_whole_checkpoint(out, trainer):
    """True does not start anew in silence."""
    for step in (1, 2):
        cut(out / f"checkpoint-{step}/model.safetensors")
    with pytest.raises(ValueError, match=r"no whole checkpoint .*damaged ones \(checkpoint-1, checkpoint-2\)"):
        trainer.train(resume_from_checkpoint=True)
    shutil.rmtree(out)
    with pytest.raises(ValueError, match="no whole checkpoint to resume from.*train without"):
        trainer.train(resume_from_checkpoint=True)


def test_what_another_tool_saved(out, trainer):
    """A checkpoint without heads, and a model without a Trainer's state."""
    checkpoint = out / "checkpoint-2"
    forget_files(checkpoint)
    (checkpoint / "quietstar.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no quietstar\.safetensors.*pass it as `model`"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "trainer_state.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no trainer_state\.json.*pass it as `model`"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


# Other models


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (dict(hidden_size=48, head_dim=8), "`hidden_size` is 32, .* 48"),
        (dict(num_hidden_layers=1), "`num_hidden_layers` is 2, .* 1"),
        (dict(name="qwen2-window"), "`model_type` is 'llama', .* 'qwen2'"),
        (dict(intermediate_size=64), "model.layers.0.mlp.down_proj.weight.* and 3 more differ"),
    ],
    ids=["size", "layers", "family", "width"],
)
def test_another_model(model, message, run, tmp_path):
    """Is told by its configuration, or at the latest by its weights."""
    trainer = tiny_trainer(tmp_path / "other", model=saved_model(tmp_path / "model", **model), **SAVING)
    with pytest.raises(ValueError, match=rf"another model: .*{message}.*Pass as `model`"):
        trainer.train(resume_from_checkpoint=str(run / "out/checkpoint-2"))
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    "options",
    [dict(value_head_type="linear"), dict(value_head_hidden_size=8)],
    ids=lambda options: next(iter(options)),
)
def test_other_heads(options, run, tmp_path):
    """The setting to change is named, with its value."""
    name = next(iter(options))
    trainer = tiny_trainer(tmp_path / "other", model=str(run / "model"), **SAVING, **options)
    with pytest.raises(ValueError, match=rf"have `{name}` ('mlp'|16), not .*; set `{name}=('mlp'|16)`"):
        trainer.train(resume_from_checkpoint=str(run / "out/checkpoint-2"))


def test_adapters(run, tmp_path):
    """One where there was none, none where there was one, or another one."""
    model = str(run / "model")
    adapted = tiny_trainer(tmp_path / "a", model=model, peft_config=LoraConfig(**LORA), **SAVING)
    with pytest.raises(ValueError, match="has an adapter, the checkpoint .* has none.*`peft_config`"):
        adapted.train(resume_from_checkpoint=str(run / "out/checkpoint-2"))
    adapted.train()
    checkpoint = str(tmp_path / "a/checkpoint-2")
    with pytest.raises(ValueError, match="has no adapter, the checkpoint .* has one.*`peft_config`"):
        tiny_trainer(tmp_path / "b", model=model, **SAVING).train(resume_from_checkpoint=checkpoint)
    for change in (dict(r=3), dict(target_modules=["q_proj"])):
        other = tiny_trainer(tmp_path / "c", model=model, peft_config=LoraConfig(**{**LORA, **change}), **SAVING)
        with pytest.raises(ValueError, match="adapter in .* is not that of the model.*differ in name or shape"):
            other.train(resume_from_checkpoint=checkpoint)


# Nothing is executed


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "unlisted"])
@pytest.mark.parametrize("save", [pickle.dump, torch.save], ids=["pickle", "torch"])
@pytest.mark.parametrize("name", FILES)
def test_a_pickle_with_code(name, save, listed, out, trainer, tmp_path):
    """Is refused, by its size or by what it is, and does not run."""
    path, mark = out / "checkpoint-2" / name, tmp_path / "executed"
    with open(path, "wb") as file:
        save(Bomb(mark), file)
    state = out / "checkpoint-2/quietstar_state.json"
    if listed:  # whoever puts it there can write the list too
        files = json.loads(state.read_text())
        files["files"][name] = path.stat().st_size
        state.write_text(json.dumps(files))
    else:
        state.unlink()
    with pytest.raises(ValueError, match=rf"'{name}' in .* is damaged: .*(safetensors|refuses it)"):
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    assert not mark.exists()
    with open(path, "rb") as file:  # it would have: the test can fail
        pickle.load(file) if save is pickle.dump else torch.load(file, weights_only=False)
    assert mark.exists()


def test_training_arguments_are_not_read(out, run, tmp_path):
    """The Trainer writes them as a pickle; no resumed run opens it."""
    mark = tmp_path / "executed"
    path = out / "checkpoint-1/training_args.bin"
    path.write_bytes(pickle.dumps(Bomb(mark)))
    forget_files(out / "checkpoint-1")
    resumed = tiny_trainer(tmp_path / "again", model=str(run / "model"), **SAVING)
    resumed.train(resume_from_checkpoint=str(out / "checkpoint-1"))
    assert resumed.state.global_step == 2 and not mark.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin"])
def test_pickled_weights(name, out, trainer, tmp_path):
    """Are no weights of a checkpoint."""
    checkpoint, mark = out / "checkpoint-2", tmp_path / "executed"
    forget_files(checkpoint)
    torch.save(Bomb(mark), checkpoint / name)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"'{name}', a pickle; only safetensors"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert not mark.exists()


def test_loading_a_thinking_model_takes_safetensors_only(run, tmp_path):
    """A thinking model never comes from a pickle; a plain one may, by its weights alone."""
    plain = shutil.copytree(run / "model", tmp_path / "plain")
    weights = load_file(plain / "model.safetensors")
    torch.save(weights, plain / "pytorch_model.bin")
    (plain / "model.safetensors").unlink()
    model = QuietStarForCausalLM.from_pretrained(plain)
    assert torch.equal(model.model.embed_tokens.weight, weights["model.embed_tokens.weight"])

    thinking, mark = shutil.copytree(run / "out/checkpoint-2", tmp_path / "thinking"), tmp_path / "executed"
    torch.save(load_file(thinking / "model.safetensors"), thinking / "pytorch_model.bin")
    (thinking / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        QuietStarForCausalLM.from_pretrained(thinking)

    (plain / "quietstar.safetensors").write_bytes(pickle.dumps(Bomb(mark)))
    shutil.copy(run / "model/model.safetensors", plain)
    with pytest.raises(ValueError, match=r"quietstar\.safetensors' is damaged"):
        QuietStarForCausalLM.from_pretrained(plain)
    assert not mark.exists()
