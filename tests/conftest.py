"""Settings that must stand before any library is imported, and the fixtures that most tests share."""

import gc
import os


os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    WANDB_MODE="offline",
    CI="true",
    TOKENIZERS_PARALLELISM="false",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    OMP_NUM_THREADS="1",  # there is a process for each core
)
if os.environ.get("QUIETSTAR_TEST_DEVICE") != "cuda":  # the suite is about the CPU, on a machine with a GPU too
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings as hypothesis_settings  # noqa: E402

from .tiny import byte_tokenizer, sums  # noqa: E402


torch.set_num_threads(1)
hypothesis_settings.register_profile("default", deadline=None, derandomize=True, max_examples=60)
hypothesis_settings.load_profile("default")


def pytest_configure(config):
    """TRL's base configuration still goes by the old name of activation checkpointing."""
    config.addinivalue_line("filterwarnings", "ignore:.*gradient_checkpointing.*:FutureWarning")


def pytest_collection_finish():
    """Each `train` collects garbage several times, most of which was spent on what the imports had left."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _what_stays_is_looked_at_once():
    """The same for what a file's tests leave behind, such as lm-eval's index of ten thousand tasks."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fixed_seed():
    """A test draws the same whether it runs alone or after others."""
    torch.manual_seed(0)


@pytest.fixture
def tokenizer():
    """A byte-level BPE tokenizer with an EOS token and without a pad token."""
    return byte_tokenizer()


@pytest.fixture
def texts():
    """Strings like "3 plus 4 is 7 ."."""
    return sums()
