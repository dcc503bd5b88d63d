"""Checkpoints that are whole or not there, and from which nothing but weights and numbers is read.

A checkpoint is written into `_unfinished/` beside its place, and takes its name in one rename once all of it is on disk; a
folder to be deleted is renamed away first. Whenever a run is killed, every `checkpoint-N` is thus a whole one. Where renames
are not atomic (mounted object stores), and for copies cut short, `quietstar_state.json`, written last, lists all files and
their sizes; a checkpoint is compared with that list before it is used.

What is read on resuming, and how:

- weights, adapter and heads: from safetensors only. `pytorch_model.bin` and `adapter_model.bin` are refused here, though a
  *base* model on the Hub may still be one: [`QuietStarForCausalLM.from_pretrained`] then loads it as Transformers does, with
  `torch.load(weights_only=True)`;
- optimizer, scheduler, gradient scaler and random numbers: by `torch.load(weights_only=True)`, as the Trainer does, after a
  trial by the same means that names the file if it holds anything else;
- the rest: JSON. `training_args.bin`, which the Trainer writes for its user, is never read.

Under DeepSpeed its own shards hold optimizer and weights, and DeepSpeed unpickles them: resume from your own only.
"""

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import EarlyStoppingCallback, PreTrainedModel
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, sort_checkpoints
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    logging,
)

from .._compat import BaseTrainer
from ..config import VALUE_BASELINES, QuietStarConfig
from ..model.adapters import base_of
from ..model.sharding import full_state_dict, gathered, load_sharded, loaded_whole
from ..modeling import HEADS_NAME, saved_settings
from ..rules import ADAMW
from .distributed import check_optimizer_file, is_sharded, load_optimizer, save_optimizer


logger = logging.get_logger(__name__)

STATE_NAME = "quietstar_state.json"
REFERENCE_NAME = "reference"
UNFINISHED_NAME = "_unfinished"  # the underscore keeps it out of uploads to the Hub
PICKLED_WEIGHTS = (WEIGHTS_NAME, WEIGHTS_INDEX_NAME, ADAPTER_WEIGHTS_NAME)
# an optimizer's state goes on under options of the same kind only
KINDS: dict[str, Callable] = {
    "optim": lambda name: "adamw" if name in ADAMW else str(name),
    "optim_args": str,
    "muon_learning_rate": lambda rate: rate is not None,
    "grokfast_lambda": bool,
    "advantage_baseline": lambda name: name in VALUE_BASELINES,  # which train the value head
    "reward_prediction": str,  # and this the mixing head
    "lr_scheduler_type": lambda name: str(name) if name in ("reduce_lr_on_plateau", "greedy") else "by step",
}
# and these are part of that state
RESTORED = ("learning_rate", "heads_learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
SIGNS = {"betas", "momentum", "scale_parameter"}  # options that tell optimizers apart
# of FSDP and DeepSpeed, in place of the Trainer's own
SHARDS = ("pytorch_model_fsdp*", "global_step*")
TORCH_FILES = (OPTIMIZER_NAME, "optimizer.bin", SCHEDULER_NAME, SCALER_NAME, "rng_state*.pth")


# Folders that are whole or not there


@contextmanager
def whole_folder(target: str, accelerator: Accelerator, is_writer: bool) -> Iterator[str]:
    """
    A folder to write into, on all processes, which becomes `target` in one rename when the block ends. If the block raises
    or the process is killed, `target` is what it was.

    Args:
        target (`str`):
            Path of the folder to be; one that exists is replaced.
        accelerator ([`~accelerate.Accelerator`]):
            Of the run.
        is_writer (`bool`):
            Whether this process renames: one for each file system.

    Yields:
        `str`: path of the folder to write into, which may not exist yet.
    """
    folder = Path(target)
    staged = folder.parent / UNFINISHED_NAME / folder.name
    if is_writer:
        remove_unfinished(folder.parent)
    accelerator.wait_for_everyone()
    yield str(staged)
    accelerator.wait_for_everyone()
    if is_writer:
        for path in (*staged.rglob("*"), staged):
            _flush(path)
        if folder.exists():
            _set_aside(folder)
        os.replace(staged, folder)
        _flush(folder.parent)
        remove_unfinished(folder.parent)
    accelerator.wait_for_everyone()


def remove_folder(folder: str) -> None:
    """Deletes a folder so that a deletion cut short leaves nothing under its name."""
    if Path(folder).is_dir():
        _set_aside(Path(folder))
    remove_unfinished(Path(folder).parent)


def remove_unfinished(directory: str | Path) -> None:
    """Deletes what killed runs left half written, or half deleted, in a directory."""
    shutil.rmtree(Path(directory, UNFINISHED_NAME), ignore_errors=True)


def _set_aside(folder: Path) -> None:
    unfinished = folder.parent / UNFINISHED_NAME
    unfinished.mkdir(exist_ok=True)
    # no `checkpoint-*`, which the Trainer would count in there
    os.replace(folder, unfinished / f"deleted-{folder.name}")


def _flush(path: Path) -> None:
    """To the disk itself, so that a rename never gets there before what it names."""
    if os.name == "nt":  # which syncs neither folders nor files opened for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rotate(directory: str, limit: int | None, keep: tuple[str | None, ...]) -> None:
    """
    Deletes the oldest checkpoints, as Transformers' `rotate_checkpoints` does, but none by halves.

    Args:
        directory (`str`):
            Where they are.
        limit (`int`, *optional*):
            How many may stay; None or 0: all.
        keep (`tuple` of `str` or `None`):
            Those to keep in any case.
    """
    if not limit or limit < 0:
        return
    kept = {Path(path) for path in keep if path is not None}
    numbered = _checkpoints(directory)  # a `checkpoint-best` beside them is someone's own
    checkpoints = [path for path in map(Path, sort_checkpoints(directory, use_mtime=True)) if path in numbered]
    surplus = max(len(checkpoints) - max(limit, len(kept)), 0)
    for checkpoint in [path for path in checkpoints if path not in kept][:surplus]:
        remove_folder(str(checkpoint))


@contextmanager
def kept_weights(model: nn.Module) -> Iterator[None]:
    """Whatever the block casts a model to, its parameters and buffers are then what they were before. In the meantime they
    lie in the CPU's memory."""
    parameters = [(parameter, parameter.data.cpu()) for parameter in model.parameters()]
    buffers = [(m, name, x.cpu()) for m in model.modules() for name, x in m.named_buffers(recurse=False)]
    try:
        yield
    finally:
        for parameter, data in parameters:
            parameter.data = data.to(parameter.device)
        for module, name, data in buffers:
            setattr(module, name, data.to(getattr(module, name).device))


# Checks


def check_output_dir(directory: str) -> None:
    """
    Refuses a directory that nothing can be written to.

    Raises:
        `OSError`: if a file cannot be made there.
    """
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise OSError(
            f"`output_dir` {directory!r} cannot be written to ({error.strerror}); give another, or make room there."
        ) from error


def check_space(directory: str, needed: int) -> None:
    """
    Refuses a directory too full for a single checkpoint.

    Args:
        directory (`str`):
            Where checkpoints are to be.
        needed (`int`):
            Bytes of one.

    Raises:
        `OSError`: if there is less room.
    """
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(
            f"`output_dir` {directory!r} has room for {free / 1e9:,.3f} GB, and a checkpoint takes {needed / 1e9:,.3f} GB; "
            "make room, give another, or leave out the optimizer with `save_only_model=True`."
        )


def checkpoint_bytes(model: PreTrainedModel, args: QuietStarConfig) -> int:
    """Least size of a checkpoint: of the weights or the adapter, and of AdamW's two moments for each that is trained."""
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    trained = sum(size for size, trains in sizes if trains)
    has_moments = args.optim in ADAMW and not args.save_only_model
    return (trained if is_peft_model(model) else sum(size for size, _ in sizes)) + has_moments * 2 * trained


def last_checkpoint(directory: str) -> str:
    """
    The whole checkpoint of most steps in an output directory; warns of later ones that are not whole.

    Raises:
        `ValueError`: if there is none.
    """
    checkpoints = _checkpoints(directory)
    for checkpoint in reversed(checkpoints):
        try:
            check_checkpoint(checkpoint)
            return str(checkpoint)
        except (FileNotFoundError, ValueError) as error:
            logger.warning(f"Passing over {str(checkpoint)!r}: {error}")
    names = ", ".join(path.name for path in checkpoints)
    raise ValueError(
        f"There is no whole checkpoint to resume from in {directory!r}"
        + (f", only damaged ones ({names})" if checkpoints else "")
        + "; train without `resume_from_checkpoint`."
    )


def _checkpoints(directory: str | Path) -> list[Path]:
    """The folders named as checkpoints, by their steps."""
    found = [path for path in Path(directory).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    steps = {path: path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for path in found}
    return sorted((path for path in found if steps[path].isdecimal()), key=lambda path: int(steps[path]))


def check_checkpoint(folder: str | Path) -> None:
    """
    Refuses what is no whole checkpoint. Nothing in it is executed.

    Args:
        folder (`str`):
            Of the checkpoint.

    Raises:
        `FileNotFoundError`: if the folder, or a file that it must hold, is missing.
        `ValueError`: if a file is damaged, or is none that may be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no checkpoint folder {str(folder)!r}. {_way_out(folder)}")
    if not any(folder.iterdir()):
        raise FileNotFoundError(f"The checkpoint folder {str(folder)!r} is empty. {_way_out(folder)}")
    for path in folder.rglob("*.json"):
        _check_json(path, folder)
    if (folder / STATE_NAME).is_file():
        _check_files(folder, json.loads((folder / STATE_NAME).read_text()).get("files", {}))
    if not (folder / TRAINER_STATE_NAME).is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} has no {TRAINER_STATE_NAME}, so it is no checkpoint of a Trainer; to start from the model in "
            "it, pass it as `model`."
        )
    _check_weights(folder)
    if not (folder / HEADS_NAME).is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} has no {HEADS_NAME}: it was not saved by trl-quietstar. To start from the model in it, pass "
            "it as `model`."
        )
    for path in folder.rglob("*.safetensors"):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise _damaged(path, folder, f"it cannot be read as safetensors ({error})") from error
    for path in (path for pattern in TORCH_FILES for path in folder.glob(pattern) if path.is_file()):
        try:
            with safe_globals():
                torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # whatever a damaged file comes to
            reason = str(error).splitlines()[0]
            raise _damaged(path, folder, f"`torch.load(weights_only=True)` refuses it ({reason})") from error


def _check_json(path: Path, folder: Path) -> None:
    try:
        if isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
            return
    except ValueError as error:  # of decoding as well
        raise _damaged(path, folder, f"it is no valid JSON ({error})") from error
    raise _damaged(path, folder, "it is no JSON object")


def _check_files(folder: Path, files: dict[str, int]) -> None:
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{name!r} is missing from the checkpoint {str(folder)!r}. {_way_out(folder)}")
        found = path.stat().st_size
        if found != size and path.suffix != ".json":  # which may have been edited, and were parsed
            raise _damaged(path, folder, f"it has {found:,} bytes where {size:,} were written")


def _check_weights(folder: Path) -> None:
    index = folder / SAFE_WEIGHTS_INDEX_NAME  # which one file has too
    shards = json.loads(index.read_text())["weight_map"].values() if index.is_file() else [SAFE_WEIGHTS_NAME]
    if all((folder / name).is_file() for name in shards) or (folder / ADAPTER_SAFE_WEIGHTS_NAME).is_file():
        return
    if any(any(folder.glob(pattern)) for pattern in SHARDS):
        return
    for name in PICKLED_WEIGHTS:
        if (folder / name).is_file():
            raise ValueError(
                f"The weights of the checkpoint {str(folder)!r} are in {name!r}, a pickle; only safetensors are read from "
                "checkpoints. If you trust it, load the model yourself and write it with `save_pretrained`."
            )
    raise FileNotFoundError(
        f"There are no weights ({SAFE_WEIGHTS_NAME} or {ADAPTER_SAFE_WEIGHTS_NAME}) in the checkpoint {str(folder)!r}. "
        f"{_way_out(folder)}"
    )


def _damaged(path: Path, folder: Path, reason: str) -> ValueError:
    name = str(path.relative_to(folder))
    return ValueError(f"{name!r} in the checkpoint {str(folder)!r} is damaged: {reason}. {_way_out(folder)}")


def _way_out(folder: Path) -> str:
    others = [path.name for path in _checkpoints(folder.parent) if path != folder]
    if others:
        return f"Copy it again, or resume from another one there: {', '.join(others)}."
    return "Copy it again, or train without `resume_from_checkpoint`; there is no other checkpoint beside it."


def check_fits(folder: str | Path, model: PreTrainedModel) -> None:
    """
    Refuses a checkpoint of another model, by what can be told without loading it.

    Args:
        folder (`str`):
            A whole checkpoint.
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model to be trained.

    Raises:
        `ValueError`: if family, size, heads or adapter differ.
    """
    folder, base = Path(folder), base_of(model)
    has_adapter = (folder / ADAPTER_SAFE_WEIGHTS_NAME).is_file()
    if has_adapter != is_peft_model(model) and not any(any(folder.glob(shards)) for shards in SHARDS):
        ours, saved = ("an adapter", "none") if is_peft_model(model) else ("no adapter", "one")
        raise ValueError(
            f"The model to be trained has {ours}, the checkpoint {str(folder)!r} has {saved}; resume with the "
            "`peft_config` of the run that wrote it."
        )
    if (folder / CONFIG_NAME).is_file():
        saved = json.loads((folder / CONFIG_NAME).read_text())
        if saved.get("model_type") != base.config.model_type:
            raise _other_model(folder, "model_type", saved.get("model_type"), base.config.model_type)
        config = type(base.config).from_dict(saved).get_text_config()
        for name in ("hidden_size", "num_hidden_layers", "vocab_size"):
            was, now = getattr(config, name, None), getattr(base.config.get_text_config(), name, None)
            if was != now:
                raise _other_model(folder, name, was, now)
    settings = saved_settings(str(folder))
    for name in () if settings is None else ("value_head_type", "value_head_hidden_size"):
        was, now = getattr(settings, name), getattr(base.quietstar_settings, name)
        if was != now:
            raise ValueError(
                f"The heads in the checkpoint {str(folder)!r} have `{name}` {was!r}, not {now!r}; set `{name}={was!r}`."
            )
    base.read_heads(folder)
    if has_adapter:
        _check_adapter(folder, model)


def _other_model(folder: Path, name: str, was, now) -> ValueError:
    return ValueError(
        f"The checkpoint {str(folder)!r} is of another model: its `{name}` is {was!r}, that of the model to be trained "
        f"{now!r}. Pass as `model` the one that the checkpoint's run started from."
    )


def _check_adapter(folder: Path, model) -> None:
    """An adapter of other modules would be loaded in part, and silently."""
    from peft import get_peft_model_state_dict

    ours = {name: list(value.shape) for name, value in get_peft_model_state_dict(model).items()}
    with safe_open(folder / ADAPTER_SAFE_WEIGHTS_NAME, framework="pt") as file:
        saved = {name: file.get_slice(name).get_shape() for name in file.keys()}
    wrong = sorted(name for name in ours | saved if ours.get(name) != saved.get(name))
    if wrong:
        raise ValueError(
            f"The adapter in the checkpoint {str(folder)!r} is not that of the model to be trained: {_few(wrong)} differ in "
            "name or shape. Resume with the `peft_config` of the run that wrote it."
        )


def optimizer_fields(args: QuietStarConfig) -> dict:
    """The options that an optimizer's state goes with, for a checkpoint."""
    return {name: getattr(args, name) for name in (*KINDS, *RESTORED)}


def check_optimizer_fields(folder: str | Path, args: QuietStarConfig) -> None:
    """
    Refuses options under which the optimizer's state in a checkpoint means nothing, and warns of those that it comes with.

    Args:
        folder (`str`):
            A whole checkpoint. One of an earlier version may not say what it was written with.
        args ([`QuietStarConfig`]):
            Of the run that goes on from it.

    Raises:
        `ValueError`: naming the option, and what it was.
    """
    path = Path(folder, STATE_NAME)
    saved = json.loads(path.read_text()).get("optimizer") if path.is_file() else None
    if saved is None or not Path(folder, OPTIMIZER_NAME).is_file():
        return
    own = json.loads(json.dumps(optimizer_fields(args)))  # names in place of their enumerations
    for name, kind in KINDS.items():
        if kind(saved[name]) != kind(own[name]):
            raise ValueError(
                f"`{name}` is {own[name]!r}, and was {saved[name]!r} when the checkpoint {str(folder)!r} was written, whose "
                f"optimizer goes with that. Set it back, or start anew from its weights with `model={str(folder)!r}`."
            )
    changed = [f"`{name}` {saved[name]} ({own[name]} here)" for name in RESTORED if saved[name] != own[name]]
    if changed:
        logger.warning(
            f"The optimizer of the checkpoint {str(folder)!r} goes on with what it was written with: {', '.join(changed)}. "
            f"For other values start anew from its weights with `model={str(folder)!r}`."
        )


def check_groups(folder: str | Path, optimizer: torch.optim.Optimizer) -> None:
    """
    Refuses an optimizer's state of other parameters, or of another optimizer, by what can be told without its tensors.

    Args:
        folder (`str`):
            A whole checkpoint.
        optimizer ([`~torch.optim.Optimizer`]):
            The one that is to go on.

    Raises:
        `ValueError`: if parameter groups differ.
    """
    path = Path(folder, OPTIMIZER_NAME)
    if not path.is_file():
        return
    with safe_globals():
        groups = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["param_groups"]
    was, now = ([len(group["params"]) for group in x] for x in (groups, optimizer.param_groups))
    options, own = ([sorted(SIGNS & group.keys()) for group in x] for x in (groups, optimizer.param_groups))
    if was != now or options != own:
        raise ValueError(
            f"The optimizer of the checkpoint {str(folder)!r} has groups of {was} parameters with {options[0]}, that of this "
            f"run {now} with {own[0]}. Resume with the same optimizer (`optim`, `optimizers`, `muon_learning_rate`) and the "
            "same trainable parameters (`advantage_baseline`, `reward_prediction`, what you froze), or start anew from its "
            f"weights with `model={str(folder)!r}`."
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def load_weights(model: PreTrainedModel, folder: str) -> None:
    """
    Reads the weights of a checkpoint into a thinking model, in place. They pass through the conversions that
    Transformers saved them by (the experts of a mixture are stored one by one, for instance), which the Trainer's own
    `load_state_dict` leaves out, so that it leaves such weights as they were.

    Raises:
        `ValueError`: if weights are missing, too many, or of other shapes.
    """
    # none narrower than it is in the model
    dtype = max((p.dtype for p in model.parameters() if p.is_floating_point()), key=lambda dtype: dtype.itemsize)
    saved, found = model._plain_class.from_pretrained(
        folder,
        config=copy.deepcopy(model.config),
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    mismatched = {key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]}
    wrong = sorted({*found["missing_keys"], *found["unexpected_keys"], *mismatched})
    if wrong:
        raise ValueError(
            f"The weights in {folder!r} are of another model: {_few(wrong)} differ in name or shape. Pass as `model` the one "
            "that the checkpoint's run started from."
        )
    model.load_state_dict(saved.state_dict(), strict=False)  # the heads are a file of their own


# The Trainer's part


class CheckpointTrainer(BaseTrainer):
    """
    The Trainer with checkpoints that are whole or not there, and that hold all that a run goes on from: a resumed run is
    the run it resumes, and a run that had ended, by `max_steps` or early stopping, ends again at once.

    A subclass adds state of its own by [`_checkpoint_state`] and [`_restore_checkpoint_state`].
    """

    _staging: str | None = None  # where a checkpoint is being written
    _resumed: dict | None = None  # state of the checkpoint that training goes on from, until it does
    # weights and optimizer as a run began, where `auto_find_batch_size` may begin it again
    _beginning: tuple[list[torch.Tensor], dict | None] | None = None

    def _checkpoint_state(self) -> dict:
        """What a checkpoint holds beside what the Trainer keeps; a JSON object."""
        raise NotImplementedError

    def _restore_checkpoint_state(self, state: dict) -> None:
        """Takes back what [`_checkpoint_state`] gave."""
        raise NotImplementedError

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: None = None,
        ignore_keys_for_eval: list[str] | None = None,
    ):
        if trial is not None:
            raise ValueError(f"`trial` is {trial!r}, of a search that is not supported; set its values in the `args`.")
        if self.args.should_save:
            remove_unfinished(self.args.output_dir)
        self._check_output()
        self._resumed = self._beginning = None
        checkpoint = self.find_checkpoint(resume_from_checkpoint)
        return super().train(checkpoint, ignore_keys_for_eval=ignore_keys_for_eval)

    def _check_output(self) -> None:
        """Finds before training that nothing could be saved."""
        if self.args.should_save:
            check_output_dir(self.args.output_dir)
            if self.args.save_strategy != SaveStrategy.NO:
                check_space(self.args.output_dir, checkpoint_bytes(self.model, self.args))

    def _inner_training_loop(self, *args, **kwargs):
        """A run: in `train`, and once more for each smaller batch that `auto_find_batch_size` tries."""
        self._begin_run()
        return super()._inner_training_loop(*args, **kwargs)

    def _begin_run(self) -> None:
        """Sets back what belongs to a run."""
        for callback in self._early_stopping():
            callback.early_stopping_patience_counter = 0
        if not self.args.auto_find_batch_size or is_sharded(self.accelerator) or self.is_deepspeed_enabled:
            return
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if self._beginning is None:
            optimizer = None if self.optimizer is None else copy.deepcopy(self.optimizer.state_dict())
            self._beginning = [p.detach().to("cpu", copy=True) for p in parameters], optimizer
            return
        weights, optimizer = self._beginning  # the run before took steps until memory was short
        with torch.no_grad():
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.copy_(weight)
        if optimizer is None:
            self.optimizer = None
        else:
            self.optimizer.load_state_dict(copy.deepcopy(optimizer))

    def _finalize_training(self, *args, **kwargs):
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # or it deletes by halves, and by prefix
        try:
            output = super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        best = self.state.best_model_checkpoint
        if self.args.should_save and limit == 1 and best is not None:
            rotate(self.args.output_dir, limit, (best,))
        return output

    def find_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """
        The checkpoint that `train` would resume from, once it is known to be whole and of this model.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                As for `train`: a folder, or True for the last whole one of the output directory.

        Returns:
            `str`, or None to start anew.

        Raises:
            `FileNotFoundError`: if the folder or a file in it is missing.
            `ValueError`: if there is none, a file is damaged, or it is another model's.
        """
        if not resume_from_checkpoint:
            return None
        if resume_from_checkpoint is True:
            checkpoint = last_checkpoint(self.args.output_dir)
        else:
            checkpoint = os.fspath(resume_from_checkpoint)
            check_checkpoint(checkpoint)
        if not self.is_deepspeed_enabled:  # whose parameters may have no shape here
            check_fits(checkpoint, self.accelerator.unwrap_model(self.model))
            check_optimizer_fields(checkpoint, self.args)
        return checkpoint

    # Saving

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._staging is None else self._staging

    def _save_checkpoint(self, model, trial) -> None:
        directory = self._get_output_dir(trial)
        target = os.path.join(directory, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        with whole_folder(target, self.accelerator, self.args.should_save) as staged:
            self._staging = os.path.dirname(staged)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self._note_best(directory, target)
            state = {**self._window(), **self._checkpoint_state()}
            self.accelerator.wait_for_everyone()  # for the files of all
            if self.args.should_save:
                self.state.save_to_json(os.path.join(staged, TRAINER_STATE_NAME))
                sizes = {
                    p.relative_to(staged).as_posix(): p.stat().st_size for p in Path(staged).rglob("*") if p.is_file()
                }
                Path(staged, STATE_NAME).write_text(json.dumps({**state, "files": sizes}))
        if self.args.push_to_hub:
            super()._push_from_checkpoint(target)
        if self.args.should_save:
            rotate(directory, self.args.save_total_limit, (target, self.state.best_model_checkpoint))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not yet: an upload goes on in the background, and the folder is about to be renamed."""

    def _note_best(self, directory: str, target: str) -> None:
        """By the name the best checkpoint has, or is about to get, rather than that of the folder being written."""
        if self.args.save_strategy == SaveStrategy.NO or not self.state.best_global_step:
            return
        best = os.path.join(directory, f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        if best == target or os.path.isdir(best):
            self.state.best_model_checkpoint = best

    def _window(self) -> dict:
        """Of the loss that is not logged yet, and of early stopping."""
        loss, logged_at = self.loss_since_log()
        return {
            "loss": self.accelerator.gather(loss.reshape(1)).mean().item(),
            "loss_logged_at": logged_at,
            "patience_used": [callback.early_stopping_patience_counter for callback in self._early_stopping()],
        }

    def _early_stopping(self) -> list[EarlyStoppingCallback]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.accelerator.is_fsdp2:  # as one process does, and not in files that only FSDP reads
            save_optimizer(self.optimizer, os.path.join(output_dir, OPTIMIZER_NAME), self.args.should_save)
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))
        else:
            super()._save_optimizer_and_scheduler(output_dir)
        if self.args.sync_ref_model:
            with gathered(self.ref_model):
                whole = full_state_dict(self.ref_model)  # which takes all processes
                if self.args.should_save:
                    self.ref_model.save_pretrained(os.path.join(output_dir, REFERENCE_NAME), state_dict=whole)

    # Resuming

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not self.is_deepspeed_enabled:
            check_optimizer_file(checkpoint)
            check_groups(checkpoint, self.optimizer)
        if checkpoint is not None and self.accelerator.is_fsdp2:
            if Path(checkpoint, OPTIMIZER_NAME).is_file():
                load_optimizer(self.optimizer, os.path.join(checkpoint, OPTIMIZER_NAME))
                self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if Path(checkpoint, STATE_NAME).is_file():
            state = json.loads(Path(checkpoint, STATE_NAME).read_text())
            try:
                self._restore_checkpoint_state(state)
                self._resumed = {name: state[name] for name in ("loss", "loss_logged_at", "patience_used")}
            except KeyError as error:
                raise ValueError(
                    f"{STATE_NAME!r} in the checkpoint {checkpoint!r} has no {error}: another version of trl-quietstar wrote "
                    f"it. Resume with that version, or start anew from its weights with `model={checkpoint!r}`."
                ) from error
        reference = Path(checkpoint, REFERENCE_NAME)
        if self.args.sync_ref_model and reference.is_dir():  # `save_only_model` keeps none
            self._read_model(self.ref_model, str(reference))

    def _run_epoch(self, *args, **kwargs) -> None:
        """Where the Trainer has reset what belongs to a run, and is about to take a step."""
        if self._resumed is not None:
            state, self._resumed = self._resumed, None
            self.restore_loss_since_log(state["loss"], state["loss_logged_at"])
            for callback, used in zip(self._early_stopping(), state["patience_used"], strict=False):
                callback.early_stopping_patience_counter = used
            if self._has_ended():  # the Trainer would take one step more
                self.control.should_training_stop = True
                return
        super()._run_epoch(*args, **kwargs)

    def _has_ended(self) -> bool:
        """Whether the run that wrote the checkpoint stopped there, and by the present settings still would."""
        return self.state.global_step >= self.state.max_steps or any(
            c.early_stopping_patience_counter >= c.early_stopping_patience for c in self._early_stopping()
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if not self.accelerator.is_fsdp2 and (is_peft_model(self.model) or self.is_deepspeed_enabled):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            base_of(self.model).load_heads(resume_from_checkpoint)
        else:
            self._read_model(self.model, resume_from_checkpoint)

    def _read_model(self, model, directory: str) -> None:
        """Reads weights and heads of a policy or its reference."""
        if self.accelerator.is_fsdp2:
            load_sharded(model, directory)
            base_of(model).load_heads(directory)
        else:
            with gathered(model), loaded_whole(self.args):
                load_weights(model, directory)
                base_of(model).load_heads(directory)

    def restore_model(self, directory: str) -> None:
        """Takes back the weights of the model, or of its adapter, and of the heads from a checkpoint or `save_model`."""
        self._load_from_checkpoint(directory)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:  # whose own files hold the heads too
            super()._load_best_model()
        else:
            self.restore_model(self.state.best_model_checkpoint)
