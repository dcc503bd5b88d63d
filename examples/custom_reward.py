"""A reward of your own, in place of `reward_type`: a function from log-probabilities to one number for each thought.

    python examples/custom_reward.py --reward gain --length-cost 0.01 --output out/short
    python examples/custom_reward.py --reward last --output out/last

A reward function gets the arguments that its signature names:

- `logps_with`, `correct_with` of shape `(B, J, G, M)`: log-probability in nats and correctness of the talk tokens after a thought,
- `logps_without`, `correct_without` of shape `(B, J, 1, M)`: both without a thought,
- `mask` of shape `(B, J, 1, M)`: the talk tokens that count,
- `text` and `thoughts`: the batch and its sampled thoughts,
- `thought_texts`, `answers`: the thoughts, and what the model says after each, as strings in lists of B, J and G,
- `log_metric`: called with a name and a number, logs it as `rl/name`,
- any other parameter: a column of the data, as a list with one value for each row, such as `answer`.

It returns the rewards of the thoughts, of shape `(B, J, G)`. Letters: B sequences, J positions, G thoughts at each position, M talk
tokens.
"""

import argparse

import torch

from trl_quietstar import QuietStarConfig, QuietStarREINFORCETrainer
from trl_quietstar.cli import load_splits
from trl_quietstar.learning.reward_functions import RewardFunction
from trl_quietstar.learning.rewards import masked_mean


def gain_minus_length(cost: float) -> RewardFunction:
    """Log-likelihood gain in nats a talk token, minus `cost` nats for each token of the thought."""

    def reward(logps_with, logps_without, mask, thoughts) -> torch.Tensor:
        return masked_mean(logps_with - logps_without, mask, dim=-1) - cost * thoughts.mask.sum(-1)

    return reward


def last_token_gain(logps_with, logps_without, mask) -> torch.Tensor:
    """Gain in probability of the last talk token alone, such as the digit that ends an answer."""
    is_last = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
    return masked_mean(logps_with.exp() - logps_without.exp(), is_last, dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="Hub id or local folder")
    parser.add_argument("--data", default="roneneldan/TinyStories", help="Hub id, local folder or JSON-lines file")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", default="out/custom_reward")
    parser.add_argument("--reward", choices=("gain", "last"), default="gain")
    parser.add_argument("--length-cost", type=float, default=0.01, help="nats a thought token, of --reward gain")
    arguments = parser.parse_args()

    texts = load_splits(arguments.data, None)["train"]
    args = QuietStarConfig(
        arguments.output,
        max_length=128,
        thought_positions=16,
        min_thought_length=1,  # a cost of length needs thoughts that may end by themselves
        thought_stop_string="]",
        thought_start_text=" [",
        thought_end_text=" ]",
        learning_rate=1e-5,
        per_device_train_batch_size=2,
        max_steps=arguments.steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = QuietStarREINFORCETrainer(
        arguments.model,
        args,
        train_dataset=texts.select(range(min(len(texts), 2_000))),
        reward_functions=last_token_gain if arguments.reward == "last" else gain_minus_length(arguments.length_cost),
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()  # with the log: rl/reward, rl/thought_length


if __name__ == "__main__":
    main()
