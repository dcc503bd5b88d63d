"""`Rollouts`: thoughts of training that vLLM draws, by TRL's own client, in place of our sampler.

vLLM runs the plain model, with the policy's weights of the current optimizer step. It goes on from the text up to a position, the
prompt of a thought and its start; what it wrote is cut where our sampler would have ended the thought. Nothing else comes from it:
log-probabilities, rewards and gradients of the thoughts are taken here. Only the random numbers are vLLM's, so that thoughts depend
on more than their key.
"""

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from .._compat import vllm_generation
from ..config import QuietStarConfig
from ..model.marks import Marks
from ..text.batch import Positions, Text, Thoughts
from ..thinking.drawing import SamplingSettings
from ..thinking.writing import Writer
from .distributed import greatest


FORBIDDEN = -100.0  # the least bias that vLLM adds to a token's logit, in nats


class Rollouts:
    """
    Draws the thoughts of batches with vLLM.

    Args:
        args ([`QuietStarConfig`]):
            Options of the run.
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The thinking model, whose weights are sent.
        accelerator ([`~accelerate.Accelerator`]):
            Of the run. With several processes the main one asks a server for all of them.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.

    Raises:
        `OSError`: if a server does not answer.
        `ValueError`: if weights cannot be sent from this device.
    """

    def __init__(
        self, args: QuietStarConfig, model: nn.Module, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase
    ):
        self.args, self.accelerator, self.tokenizer = args, accelerator, tokenizer
        self.vocab_size = model.config.get_text_config().vocab_size  # type: ignore[union-attr,operator]  # an attribute of a module
        try:
            self.engine = vllm_generation(
                model=model,
                accelerator=accelerator,
                processing_class=tokenizer,
                mode=args.vllm_mode,
                server_base_url=args.vllm_server_base_url,
                server_timeout=args.vllm_server_timeout,
                group_port=args.vllm_group_port,
                gpu_memory_utilization=args.vllm_gpu_memory_utilization,
                max_model_length=args.vllm_max_model_length,
                max_num_seqs=args.per_device_train_batch_size * args.num_thoughts,
                model_impl="vllm",  # as in GRPO
                trust_remote_code=args.trust_remote_code,
                logprobs=None,
            )
        except NotImplementedError as error:
            raise ValueError(
                f"`vllm_mode='server'` sends weights from a CUDA device, and this run is on {str(accelerator.device)!r} ({error}); "
                "train on a CUDA device, or leave `use_vllm` out."
            ) from error
        self.begin_run()

    def begin_run(self) -> None:
        """Forgets which weights were sent: a new run begins at step 0 with others."""
        self._sent_at: int | None = None

    def sample(
        self, text: Text, positions: Positions, marks: Marks, settings: SamplingSettings, step: int
    ) -> Thoughts:
        """
        Writes `num_thoughts` thoughts at every position. All processes must call it, and equally often.

        Args:
            text ([`Text`]), positions ([`Positions`]):
                The batch, and where to think.
            marks ([`Marks`]):
                What opens a thought.
            settings ([`SamplingSettings`]):
                How thoughts are drawn, and when they end.
            step (`int`):
                The optimizer step. Weights are sent when it is another than in the call before.

        Returns:
            [`Thoughts`] with as many slots as the longest one has tokens.

        Raises:
            `RuntimeError`: if vLLM ended a thought early, or drew a token that no thought may hold.
        """
        marks.check(text, positions)
        prompts, opening = [marks.opened(prefix) for prefix in prefixes(text, positions)], marks.opened([])
        count = greatest(len(prompts), self.accelerator)  # TRL takes as many from each process
        drawn: list[list[int]] = []
        if count > 0:
            if step != self._sent_at:
                self.engine.sync_weights()
                self._sent_at = step
            drawn = self._drawn(prompts + [opening] * (count - len(prompts)), settings)
        written = drawn[: len(prompts) * settings.num_thoughts]
        self._check_tokens(written, settings)
        return cut(written, positions, settings)

    def _drawn(self, prompts: list[list[int]], settings: SamplingSettings) -> list[list[int]]:
        """What vLLM writes after each prompt: `num_thoughts` lists of token ids each, in the prompts' order."""
        engine, G, eos = self.engine, settings.num_thoughts, self.tokenizer.eos_token_id
        engine.temperature, engine.top_k, engine.top_p = settings.temperature, settings.top_k, settings.top_p
        engine.min_p, engine.max_completion_length = settings.min_p or 0.0, settings.thought_length
        engine.generation_kwargs = {
            # thoughts end by their string and the tokenizer's EOS; a generation config may name more ends
            "stop": [self.args.thought_end_text],
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,  # the string may be one
            "ignore_eos": True,
            "stop_token_ids": [] if eos is None else [eos],
            "logit_bias": {str(token): FORBIDDEN for token in settings.suppressed},
        }
        _, completions, _, _ = engine.generate([prompt for prompt in prompts for _ in range(G)], None, G)
        return completions

    def _check_tokens(self, written: list[list[int]], settings: SamplingSettings) -> None:
        """Refuses tokens that no thought may hold: the server then serves another model, or does not follow what it is asked."""
        wrong = set().union(*written) & set(settings.suppressed)
        wrong |= {token for thought in written for token in thought if not 0 <= token < self.vocab_size}
        if wrong:
            raise RuntimeError(
                f"vLLM drew the token {min(wrong)}, which is in `thought_suppress_tokens` or beyond the {self.vocab_size} tokens of "
                "the model; start the server with the model that is trained."
            )


def prefixes(text: Text, positions: Positions) -> list[list[int]]:
    """The tokens of each position's document up to the position, for all positions that exist, by rows."""
    host, found = text.host, []
    for row, column in positions.host.mask.nonzero().tolist():
        at = int(positions.host.index[row, column])
        first = at - int(host.position_ids[row, at])
        found.append(host.input_ids[row, first : at + 1].tolist())
    return found


def cut(written: list[list[int]], positions: Positions, settings: SamplingSettings) -> Thoughts:
    """
    Makes thoughts of what was written at the positions that exist, cut where our own sampler ends them: by its own loop, which gets the
    tokens where it would draw them.

    Args:
        written (`list[list[int]]`):
            Token ids of `num_thoughts` thoughts for each position that exists, by rows.
        positions ([`Positions`]):
            The positions.
        settings ([`SamplingSettings`]):
            When thoughts end.

    Raises:
        `RuntimeError`: if a thought was written to less than its end.
    """
    host, G, L = positions.host, settings.num_thoughts, settings.thought_length
    tokens = torch.zeros(*host.index.shape, G, L, dtype=torch.long)
    lengths = torch.zeros(*host.index.shape, G, dtype=torch.long)
    padded = [(thought + [0] * L)[:L] for thought in written]
    tokens[host.mask] = torch.tensor(padded, dtype=torch.long).view(len(written) // G, G, L)
    lengths[host.mask] = torch.tensor([len(thought) for thought in written], dtype=torch.long).view(-1, G)
    given = tokens.flatten(1, 2)
    writer = Writer(settings, lambda hidden, draws, running: draws, lambda token_ids: token_ids)
    ended = writer.write(_Given(), given[..., 0], host.mask.repeat_interleave(G, dim=1), given)
    mask = ended.mask.view(*lengths.shape, -1)
    short = lengths[lengths < mask.sum(-1)]
    if len(short) > 0:
        raise RuntimeError(
            f"vLLM ended a thought after {int(short.min())} tokens, before it was closed and below `thought_length` ({L}); let it read "
            "more tokens (`vllm_max_model_length`, or `--max-model-len` of the server), or lower `thought_length`."
        )
    return Thoughts.of_host(positions, ended.token_ids.view(mask.shape) * mask, mask, positions.index.device)


class _Given:
    """Branches whose tokens are known, so that none need run."""

    def extend(self, embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return embeds
