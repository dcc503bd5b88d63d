"""Training runs of one process or of two under an engine, each in processes of their own, on the CPU.

Accelerate knows FSDP2 and DeepSpeed on accelerators only; here it is told that gloo's processes are some.
"""

import importlib.util
import json
import multiprocessing
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from safetensors.torch import load_file

from trl_quietstar import QuietStarREINFORCETrainer

from .servers import free_port
from .tiny import byte_tokenizer, sums
from .training import OWN, plain_model, text_data, tiny_args


TIMEOUT = 120  # seconds
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
# metrics that no two runs share: of time; of padding; and the mean over an evaluation's batches of what each batch's loss
# is, which depends on how rows are batched
UNSHARED = ("second", "runtime", "flos", "eval_loss")


def _zero(stage: int) -> dict:
    """DeepSpeed's configuration of a stage."""
    sharding = {"stage": stage}
    if stage == 3:  # no parameter is small enough to stay whole
        sharding |= {
            "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 0,
            "stage3_max_live_parameters": 0,
        }
    counts = ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "train_batch_size", "gradient_clipping")
    return {
        "zero_optimization": sharding,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **dict.fromkeys(counts, "auto"),
    }


def unequal_texts() -> Dataset:
    """Rows of one to four sentences."""
    return Dataset.from_dict({"text": [" and ".join(sums()[i : i + 1 + i % 4]) for i in range(64)]})


def written_texts() -> Dataset:
    """Sums, two of three with written thoughts: some batches have one kind of row on one process and the other on the next."""
    pairs = [(i % 7, i % 5) for i in range(64)]
    return Dataset.from_dict(
        {
            "prompt": [f"{a} plus {b} is" for a, b in pairs],
            "completion": [f" {a + b} ." for a, b in pairs],
            "thought": [[f" {a} plus", f" {b}"][: i % 3] for i, (a, b) in enumerate(pairs)],
        }
    )


def held_out() -> Dataset:
    """Texts to evaluate on."""
    return text_data(8, first=40)


def _work(rank: int, processes: int, port: int, engine: str, folder: str, options: dict) -> None:
    """One process of a run; rank 0 leaves the log history and the saved model in the folder."""
    torch.set_num_threads(1)
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if engine == "fsdp2":
        os.environ |= FSDP2
    if engine.startswith("zero"):
        import deepspeed.comm.torch  # noqa: F401

        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # compiles for a minute
        config = Path(folder, f"deepspeed-{rank}.json")
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(json.dumps(_zero(int(engine[-1]))))
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(config)}
    ours = {"model": {}, "data": unequal_texts, "evaluation": held_out, "resume": None, "validate": False}
    options = {**ours, **options}
    model, data, evaluation, resume, validate = (options.pop(name) for name in ours)
    if isinstance(
        model, dict
    ):  # before there is a configuration, by which Transformers would partition it under ZeRO-3
        model = plain_model(**model)
    own = {name: options.pop(name) for name in OWN if name in options}
    batch = 4 // processes
    defaults = {"per_device_train_batch_size": batch, "per_device_eval_batch_size": batch, "bf16": False}
    args = tiny_args(folder, **{**defaults, "adam_epsilon": 1e-3, **options})
    assert args.device.type == "cpu"  # now the processes know each other
    if engine == "fsdp2":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = QuietStarREINFORCETrainer(model, args, data(), evaluation(), byte_tokenizer(), **own)
    trainer.train(resume_from_checkpoint=resume)
    found = {"history": trainer.state.log_history, "type": type(trainer.model_wrapped).__name__}
    found["rates"] = sorted({group["lr"] for group in trainer.optimizer.param_groups})
    if validate:
        found["report"] = trainer.validate_thoughts().metrics()
    trainer.save_model(os.path.join(folder, "final"))
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))


class Run:
    """
    A finished training run.

    Args:
        engine (`str`):
            `"one"` process; or two under `"ddp"`, `"fsdp2"`, `"zero2"` or `"zero3"`.
        folder (`Path`):
            Where it writes.
        options:
            Of the configuration; and `model` (changes of its configuration, or a path), `data` and `evaluation` (functions that
            make them), `peft_config`, `resume` (a checkpoint) and `validate` (whether to validate the thoughts at the end).
    """

    def __init__(self, engine: str, folder: Path, **options):
        os.environ["DS_ACCELERATOR"] = "cpu"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # imports once for all runs
        port = free_port()
        count = 1 if engine == "one" else 2
        parameters = [(rank, count, port, engine, str(folder), options) for rank in range(count)]
        processes = [context.Process(target=_work, args=args, daemon=True) for args in parameters]
        for process in processes:
            process.start()
        for process in processes:
            process.join(TIMEOUT)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        assert codes == [0] * count, f"{engine} ended with {codes}; None: it hung"
        found = json.loads(Path(folder, "found.json").read_text())
        self.folder, self.history, self.type = folder, found["history"], found["type"]
        self.rates, self.report = found["rates"], found.get("report")

    def weights(self) -> dict[str, torch.Tensor]:
        """All tensors that were saved."""
        files = sorted(Path(self.folder, "final").glob("*.safetensors"))
        return {f"{file.stem}.{name}": tensor for file in files for name, tensor in load_file(file).items()}


def has_deepspeed() -> bool:
    """Whether DeepSpeed is installed."""
    return importlib.util.find_spec("deepspeed") is not None
