"""Checkpoint folders: written whole, chosen, deleted whole, and checked before anything in them is used.

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

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    ADAPTER_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    logging,
)

from ..model.saved import HEADS_NAME


logger = logging.get_logger(__name__)

STATE_NAME = "quietstar_state.json"
UNFINISHED_NAME = "_unfinished"  # the underscore keeps it out of uploads to the Hub
PICKLED_WEIGHTS = (WEIGHTS_NAME, WEIGHTS_INDEX_NAME, ADAPTER_WEIGHTS_NAME)
# of FSDP and DeepSpeed, in place of the Trainer's own
SHARDS = ("pytorch_model_fsdp*", "global_step*")
TORCH_FILES = (OPTIMIZER_NAME, "optimizer.bin", SCHEDULER_NAME, SCALER_NAME, "rng_state*.pth")


@contextmanager
def whole_folder(target: str, accelerator: Accelerator, is_writer: bool) -> Iterator[str]:
    """
    Gives all processes a folder to write into, which becomes `target` in one rename when the block ends. If the block raises
    or the process is killed, `target` stays what it was.

    Args:
        target (`str`):
            Path of the folder to be; one that exists is replaced.
        accelerator ([`~accelerate.Accelerator`]):
            Of the run.
        is_writer (`bool`):
            Whether this process renames. There is one that does for each file system.

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
    """Renames a folder away, so that it is gone from its place at once; it is deleted later."""
    unfinished = folder.parent / UNFINISHED_NAME
    unfinished.mkdir(exist_ok=True)
    # no `checkpoint-*`, which the Trainer would count in there
    os.replace(folder, unfinished / f"deleted-{folder.name}")


def _flush(path: Path) -> None:
    """Sees to it that a file or folder is on the disk itself, so that a rename never gets there before what it names."""
    if os.name == "nt":  # which syncs neither folders nor files opened for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoints_in(directory: str | Path) -> list[Path]:
    """Lists the folders that are named as checkpoints, the one of fewest steps first."""
    found = [path for path in Path(directory).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    steps = {path: path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for path in found}
    return sorted((path for path in found if steps[path].isdecimal()), key=lambda path: int(steps[path]))


def rotate(directory: str, limit: int | None, keep: tuple[str | None, ...]) -> None:
    """
    Deletes the oldest checkpoints. Transformers' `rotate_checkpoints` does that too, but leaves half a folder where it is killed.

    Args:
        directory (`str`):
            Where they are.
        limit (`int`, *optional*):
            Number of checkpoints that may stay; all of them if it is None or 0.
        keep (`tuple` of `str` or `None`):
            Checkpoints to keep in any case.
    """
    if not limit or limit < 0:
        return
    kept = {Path(path) for path in keep if path is not None}
    numbered = checkpoints_in(directory)  # a `checkpoint-best` beside them is someone's own
    checkpoints = [path for path in map(Path, sort_checkpoints(directory, use_mtime=True)) if path in numbered]
    surplus = max(len(checkpoints) - max(limit, len(kept)), 0)
    for checkpoint in [path for path in checkpoints if path not in kept][:surplus]:
        remove_folder(str(checkpoint))


def last_checkpoint(directory: str) -> str:
    """
    Finds the whole checkpoint of most steps in an output directory, and warns of later ones that are not whole.

    Raises:
        `ValueError`: if there is none.
    """
    checkpoints = checkpoints_in(directory)
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
    others = [path.name for path in checkpoints_in(folder.parent) if path != folder]
    if others:
        return f"Copy it again, or resume from another one there: {', '.join(others)}."
    return "Copy it again, or train without `resume_from_checkpoint`; there is no other checkpoint beside it."
