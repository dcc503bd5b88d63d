"""What a model says after each thought: held against replay, in any batch, and as a reward."""

import pytest
import torch
from datasets import Dataset

from trl_quietstar.branches.decoders import ReplayDecoder
from trl_quietstar.branches.replay import Replay
from trl_quietstar.learning.reward_functions import exact_match
from trl_quietstar.model.family import eos_ids
from trl_quietstar.settings import QuietStarSettings
from trl_quietstar.text.batch import Positions, Text, Thoughts, talk_after
from trl_quietstar.thinking.answers import greedy_answers
from trl_quietstar.thinking.scoring import ScoreRequest, score

from .speaking import thinking_model
from .tiny import FAMILIES, byte_tokenizer, exact_model, mixed_text, sums, think
from .training import assert_same_state, log_of, logged, tiny_trainer


ENDING = set(range(0, 97, 5))  # so that many answers end


def answered(model, text, thoughts, ends=ENDING, length=4, **options):
    """Answers of as many tokens as the text has after each position, up to some."""
    limits = talk_after(text, thoughts.positions, length).host.target_mask.sum(-1)
    return greedy_answers(model, text, thoughts, limits, ends, **options), limits


def most_likely(model, text, thoughts, place, answer, prediction) -> list[bool]:
    """Whether each token of an answer is the most likely one: it is scored by replay as the text after its thought."""
    b, j, g = place
    at = int(thoughts.positions.index[b, j])
    start = at - int(text.position_ids[b, at])
    ids = torch.cat([text.input_ids[b, start : at + 1], torch.tensor(answer)])[None]
    alone = Text.from_batch(ids)
    positions = Positions(torch.tensor([[at - start]]), torch.ones(1, 1, dtype=torch.bool))
    thought = Thoughts(
        positions, thoughts.token_ids[b, j, g][None, None, None], thoughts.mask[b, j, g][None, None, None]
    )
    request = ScoreRequest(alone, thought, len(answer), Replay(), prediction=prediction)
    return score(model, request).talk_correct.flatten().tolist()


@pytest.mark.parametrize("prediction", ["mixed", "thought"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba", "bloom"])
@torch.no_grad()
def test_each_token_is_the_most_likely_one_by_replay(name, prediction):
    """After padding on both sides, in packed rows, with thoughts that end early; for each kind of decoder."""
    settings = QuietStarSettings(prediction=prediction)
    model = exact_model(name, settings) if name in FAMILIES else thinking_model(name, settings)
    text = mixed_text(model.config.vocab_size)
    thoughts = think(model, text, Replay())
    free, limits = answered(model, text, thoughts, set())
    assert [len(x) for x in free] == (limits[..., None] * thoughts.positions.mask[..., None]).expand(
        thoughts.mask.shape[:3]
    ).flatten().tolist()
    ends = {answer[1] for answer in free if len(answer) > 2}
    answers, _ = answered(model, text, thoughts, ends)
    ended = 0
    places = torch.cartesian_prod(*map(torch.arange, thoughts.mask.shape[:3])).tolist()
    for place, whole, answer in zip(places, free, answers, strict=True):
        if whole:
            assert all(most_likely(model, text, thoughts, place, whole, prediction))
        assert answer == whole[: len(answer)] and not ends & set(answer)
        if len(answer) < len(whole):
            ended += 1
            assert whole[len(answer)] in ends
    assert ended > 3


@torch.no_grad()
def test_answers_do_not_depend_on_the_batch():
    """All at once, a few at once, by replay, and each row alone."""
    model, text = exact_model(), mixed_text()
    thoughts = think(model, text)
    together, _ = answered(model, text, thoughts)
    assert answered(model, text, thoughts, batch_size=3)[0] == together
    assert answered(model, text, thoughts, new_decoder=ReplayDecoder)[0] == together
    size = len(together) // len(text.input_ids)
    for row in range(len(text.input_ids)):
        index = torch.tensor([row])
        own = Thoughts(
            Positions(thoughts.positions.index[index], thoughts.positions.mask[index]),
            thoughts.token_ids[index],
            thoughts.mask[index],
        )
        assert answered(model, text.rows(index), own)[0] == together[row * size : (row + 1) * size]


@torch.no_grad()
def test_answers_stay_within_a_table_of_positions():
    """A row that has ended does not grow on, past the model's last position."""
    model = exact_model("gpt2", n_positions=24)
    text = Text.from_batch(torch.randint(97, (1, 18), generator=torch.Generator().manual_seed(0)))
    positions = Positions(torch.tensor([[1, 16]]), torch.ones(1, 2, dtype=torch.bool))
    ids = torch.randint(97, (1, 2, 1, 4), generator=torch.Generator().manual_seed(1))
    answers, limits = answered(model, text, Thoughts(positions, ids, torch.ones_like(ids).bool()), set(), 16)
    assert [len(answer) for answer in answers] == limits.flatten().tolist() == [16, 1]


def test_an_exact_match_is_of_stripped_strings():
    """Numbers are taken as they are written."""
    found = exact_match([[["7 ", "8"], ["\n7", "7.0"]], [["a b", "A b"], ["", " "]]], [7, " a b\n"])
    assert found == [[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]]
    assert exact_match([[[""]]], [None]) == [[[0.0]]]


# In training


def graded(count: int = 16) -> Dataset:
    """Prompts with completions, and the answers as a column."""
    texts = [text.split(" is ") for text in sums()[:count]]
    rows = [{"prompt": a + " is", "completion": f" {b}", "answer": b.strip()} for a, b in texts]
    return Dataset.from_list(rows)


OPTIONS = dict(talk_length="completion", thought_positions="prompt_end", num_thoughts=2)


def test_answers_are_those_of_the_policy(tmp_path):
    """Given the thoughts that are judged, by the weights of that step; in evaluation too."""
    tokenizer, seen = byte_tokenizer(), []

    def reward(text, thoughts, answers, answer, log_metric):
        model = trainer.model
        limits = talk_after(text, thoughts.positions, 60).host.target_mask.sum(-1)
        assert not torch.is_inference_mode_enabled()
        was = model.training
        model.eval()
        own = greedy_answers(model, text, thoughts, limits, eos_ids(model, tokenizer), new_decoder=ReplayDecoder)
        model.train(was)
        assert sum(sum(answers, []), []) == [tokenizer.decode(ids) for ids in own]
        seen.append((was, [len(row) for row in answers], answers))
        return exact_match(answers, answer)

    trainer = tiny_trainer(
        tmp_path,
        data=graded(),
        evaluation=graded(3),
        tokenizer=tokenizer,
        reward_functions=reward,
        max_steps=2,
        **OPTIONS,
    )
    trainer.train()
    trainer.evaluate()
    assert [was for was, _, _ in seen] == [True, True, False]
    assert any(any(any(group) for group in row) for _, _, rows in seen for row in rows)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(gradient_accumulation_steps=2, normalize_advantages="step", per_device_train_batch_size=2),
        dict(num_iterations=2, gradient_checkpointing=True),
        dict(thought_path="replay", reward_prediction="thought"),
    ],
    ids=str,
)
def test_exact_match_beside_the_likelihood(options, tmp_path):
    """By name, weighted; and answers change nothing else of a run."""
    runs = [
        tiny_trainer(
            tmp_path,
            data=graded(),
            reward_functions=functions,
            reward_weights=weights,
            max_steps=2,
            **OPTIONS,
            **options,
        )
        for functions, weights in (
            (["probability"], None),
            (["exact_match", "probability"], [0.0, 1.0]),
            (["exact_match", "probability"], [2.0, 0.5]),
        )
    ]
    for trainer in runs:
        trainer.train()
    assert_same_state(runs[1].model, runs[0].model)
    for entry in logged(runs[2]):
        parts = [entry[f"rl/rewards/{name}/mean"] for name in ("exact_match", "probability")]
        assert entry["rl/reward"] == pytest.approx(2 * parts[0] + 0.5 * parts[1])


def test_the_right_answer_is_found(tmp_path):
    """Where greedy decoding writes the completion, the answer matches it: the two measures agree."""
    data = graded(2)
    trainer = tiny_trainer(
        tmp_path,
        data=data,
        evaluation=data,
        reward_functions="exact_match",
        max_steps=60,
        learning_rate=1e-2,
        policy_coefficient=0.0,
        logging_steps=60,
        **OPTIONS,
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_exact_match_with"] == metrics["eval_rewards/exact_match/mean"] == metrics["eval_reward"] > 0.5
    assert log_of(trainer)


def test_a_column_answer_is_needed(tmp_path):
    """Said at the start, by the name of the function; and a column `answers` would not be told from the model's."""
    with pytest.raises(ValueError, match="The reward function `exact_match` takes 'answer', which is no column"):
        tiny_trainer(tmp_path, reward_functions="exact_match")
    data = Dataset.from_dict({"text": ["a b"], "answer": ["b"], "answers": [["b"]]})
    with pytest.raises(ValueError, match="column 'answers' of the train dataset has the name of an argument"):
        tiny_trainer(tmp_path, data=data, reward_functions="exact_match")
