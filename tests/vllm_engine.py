"""What vLLM's own engine writes, on a CPU, run by the Python that has vLLM.

python -I tests/vllm_engine.py asked.json said.json

Asked are prompts of token ids, each with options of `SamplingParams`, by the folder of a model. Said are token ids.
"""

import json
import os
import sys
from pathlib import Path


# in this process, so that one engine's memory is free before the next
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}

from vllm import LLM, SamplingParams  # noqa: E402


def written(folder: str, asked: list[tuple[list[int], dict]]) -> list[list[int]]:
    """Greedy answers of the model in a folder."""
    engine = LLM(folder, dtype="float32", enforce_eager=True, max_num_seqs=8, kv_cache_memory_bytes=2**28)
    settings = [SamplingParams.from_optional(temperature=0, **options) for _, options in asked]
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in asked]
    return [list(said.outputs[0].token_ids) for said in engine.generate(prompts, settings, use_tqdm=False)]


asked, said = (Path(name) for name in sys.argv[1:])
said.write_text(json.dumps({folder: written(folder, rows) for folder, rows in json.loads(asked.read_text()).items()}))
