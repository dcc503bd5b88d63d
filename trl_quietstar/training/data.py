"""`DataTrainer`: how data comes to a run, from what a user gives to batches in the host's memory."""

from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from .._compat import left_on_host, one_bar
from ..config import QuietStarConfig
from ..data.batches import OWN_COLUMNS, RepeatedRows, TextCollator
from ..data.prepare import check_amount, check_longest, longest_text, prepare_texts
from ..learning.reward_functions import RewardFunctions
from ..loading import pad_token_id
from ..model.adapters import base_of
from ..model.marks import Marks
from .checkpoints import CheckpointTrainer


def prepared(
    dataset: Dataset | IterableDataset | None,
    name: str,
    args: QuietStarConfig,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    reward_functions: RewardFunctions | None,
    trains: bool = False,
) -> Dataset | IterableDataset | None:
    """
    A dataset as the trainer reads it, its texts known to fit the model; None where there is none.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`], *optional*):
            What the user gave.
        name (`str`):
            Name of the dataset, for messages.
        args ([`QuietStarConfig`]), tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Options of the run, and what turns text into tokens.
        config ([`~transformers.PreTrainedConfig`]):
            The model's.
        reward_functions ([`~learning.reward_functions.RewardFunctions`], *optional*):
            The columns that they take are kept.
        trains (`bool`):
            Whether it is trained on: then it may be packed, and must be enough for a step.

    Raises:
        `ValueError`: for data that cannot be used, or texts that are too long for the model.
    """
    if dataset is None:
        return None
    vocab_size = config.get_text_config().vocab_size
    with one_bar(f"Preparing the {name} data", shown=not args.disable_tqdm):
        dataset = prepare_texts(dataset, tokenizer, args, name, vocab_size, trains and args.packing, reward_functions)
    check_amount(dataset, args, name, trains)
    longest = longest_text(dataset, args.max_length)
    if longest is not None:
        around = Marks.of(args.settings(), tokenizer, vocab_size).around
        check_longest(longest, args, config, around, is_stream=isinstance(dataset, IterableDataset))
    return dataset


def prepared_evaluation(eval_dataset, *how):
    """Evaluation data as [`prepared`] gives it, by the same arguments: a dataset, a `dict` of them, or None."""
    if isinstance(eval_dataset, dict):
        return {name: prepared(dataset, name, *how) for name, dataset in eval_dataset.items()}
    return prepared(eval_dataset, "eval", *how)


def collator(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, reward_functions: RewardFunctions | None
) -> TextCollator:
    """The collator of a run; the columns of the data are kept where reward functions may want them."""
    pad_id = pad_token_id(tokenizer, config.get_text_config().vocab_size)
    return TextCollator(pad_id, reward_functions is not None)


class DataTrainer(CheckpointTrainer):
    """The Trainer with batches that stay in the host's memory, where their masks and lengths are read, and with rows that come
    again for each further update on them."""

    processing_class: PreTrainedTokenizerBase
    reward_functions: RewardFunctions | None

    def _prepared_as(self, dataset, name: str):
        """A dataset that came after the start, as those that were given then."""
        config = base_of(self.model).config
        return prepared(dataset, name, self.args, self.processing_class, config, self.reward_functions)

    def _set_signature_columns_if_needed(self) -> None:
        self.keep_columns([*OWN_COLUMNS, *(() if self.reward_functions is None else self.reward_functions.columns)])

    def _prepare_inputs(self, inputs: dict) -> dict:
        return inputs  # not moved: `Thinker.text` sends what the model needs

    def get_train_dataloader(self) -> DataLoader:
        self.take_engine()
        return left_on_host(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        self.take_engine()
        if eval_dataset is None or isinstance(eval_dataset, str) or eval_dataset is self.eval_dataset:
            return left_on_host(super().get_eval_dataloader(eval_dataset))  # type: ignore[arg-type]  # a `dict` never comes
        return self.get_test_dataloader(eval_dataset)  # never one that persistent workers hold of another dataset

    def get_test_dataloader(self, test_dataset) -> DataLoader:
        self.take_engine()
        return left_on_host(super().get_test_dataloader(test_dataset))

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        args, dataset = self.args, self.train_dataset if train_dataset is None else train_dataset
        if args.num_iterations == 1:
            return super()._get_train_sampler(train_dataset)
        by_length = args.train_sampling_strategy == "group_by_length"
        # read at once, by all processes
        batches = 1 if self.accelerator.split_batches else self.accelerator.num_processes
        return RepeatedRows(
            dataset,
            mini_repeat_count=1,
            batch_size=self.rows_per_batch * args.gradient_accumulation_steps * batches,
            repeat_count=args.num_iterations,
            shuffle=args.train_sampling_strategy == "random",
            seed=args.seed if args.data_seed is None else args.data_seed,
            lengths=[len(ids) for ids in dataset["input_ids"]] if by_length else None,  # type: ignore[index]  # no stream
        )
