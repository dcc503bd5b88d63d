"""The problems of [`benchmarks.real`]: prompt, final answer, and the steps to it as a written thought.

A row is `{"prompt": str, "completion": str, "thought": str}`. The completion is the final answer alone: a worked solution would
hold the reasoning itself. A thought may be empty, where a solution names no steps. Held-out problems are disjoint from those that
are trained on by construction: generated ones go by a hash of the prompt, those of a file by their place in it.
"""

import random
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from datasets import load_dataset


HELD_OUT_SHARE = 8  # one generated problem of so many is held out
PATIENCE = 100  # draws for each problem that is wanted, before there are too few to be found
EQUATION = re.compile(r"-?[\d.]+(?:\s*[-+*/×÷]\s*[\d.]+)+\s*=\s*-?\d+(?:\.\d+)?")

Row = dict[str, str]
# from a generator of random numbers, the number of terms and of digits, an endless stream of problems
Generator = Callable[[random.Random, int, int], Iterator[Row]]


def chain_sum(generator: random.Random, terms: int, digits: int) -> Iterator[Row]:
    """
    Sums and differences, such as ` 62-35+35-96=`, with the running sums `62-35=27+35=62-96=-34` as thought and ` -34` as answer.

    A prompt begins with a space, a token of its own that says nothing: models without a BOS token make a sink of attention of the
    first token, and cannot read it.

    Each term has any number of digits up to `digits` with equal chance. (reasoning-gym's `chain_sum` draws one number of digits
    for all terms of a problem.)
    """
    for problem, steps, total in _sums(generator, terms, digits):
        thought = str(steps[0][0]) + "".join(f"{term}={after}" for _, term, after in steps)
        yield {"prompt": f" {problem}=", "completion": f" {total}", "thought": thought}


def step_sum(generator: random.Random, terms: int, digits: int) -> Iterator[Row]:
    """The same problems as an untaught model understands them best from examples: `9+5-1`, with the thought ` 9+5=14, then
    14-1=13` and the answer ` 13`."""
    for problem, steps, total in _sums(generator, terms, digits):
        thought = ", then ".join(f"{before}{term}={after}" for before, term, after in steps)
        yield {"prompt": problem, "completion": f" {total}", "thought": f" {thought}"}


def _sums(generator: random.Random, terms: int, digits: int) -> Iterator[tuple[str, list[tuple[int, str, int]], int]]:
    """Problems; their steps, each with the sum before it, the signed term and the sum after it; and what comes out."""
    while True:
        lengths = [generator.randint(1, digits) for _ in range(terms)]
        numbers = [generator.randint(10 ** (length - 1), 10**length - 1) for length in lengths]
        total, problem, steps = numbers[0], str(numbers[0]), []
        for number in numbers[1:]:
            term = f"{generator.choice('+-')}{number}"
            steps.append((total, term, total + int(term)))
            problem, total = problem + term, total + int(term)
        yield problem, steps, total


def gsm_symbolic(generator: random.Random, terms: int, digits: int) -> Iterator[Row]:
    """reasoning-gym's `gsm_symbolic`: word problems from templates; the equations of the worked solution as thought. Terms and
    digits are the templates' own."""
    import reasoning_gym

    problems = reasoning_gym.create_dataset("gsm_symbolic", size=10**6, seed=generator.randrange(2**31))
    for problem in problems:
        question = problem["question"].removesuffix(" Give the result as your final answer. Do not include units.")
        solution = problem["metadata"]["answer_cot"].rpartition("####")[0]
        equations = EQUATION.findall(re.sub(r"[,$€£]", "", solution))
        yield _word_problem(question, [x.replace("×", "*").replace("÷", "/") for x in equations], problem["answer"])


def read_gsm8k(data: str) -> list[Row]:
    """GSM8K's training problems, from a JSON-lines file or the Hub; the equations in `<<...>>` as thought and the number after
    `####` as answer."""
    files = {"path": "json", "data_files": data} if Path(data).is_file() else {"path": data, "name": "main"}
    rows = []
    for problem in load_dataset(**files, split="train"):
        solution, _, answer = problem["answer"].rpartition("####")
        rows.append(_word_problem(problem["question"], re.findall(r"<<(.*?)>>", solution), answer))
    return rows


def _word_problem(question: str, equations: list[str], answer: str) -> Row:
    thought = ", ".join("".join(equation.split()) for equation in equations)
    number = answer.strip().replace(",", "")
    return {"prompt": f"Question: {question.strip()}\nAnswer:", "completion": f" {number}", "thought": thought}


SUMS: dict[str, Generator] = {"chain_sum": chain_sum, "step_sum": step_sum}
GENERATORS: dict[str, Generator] = {**SUMS, "gsm_symbolic": gsm_symbolic}
TASKS = (*GENERATORS, "gsm8k")


def is_held_out(row: Row) -> bool:
    """Whether a generated problem belongs to those that are never trained on, whatever the seed."""
    return zlib.crc32(row["prompt"].encode()) % HELD_OUT_SHARE == 0


def drawn(stream: Iterator[Row], count: int, held_out: bool) -> list[Row]:
    """
    The first problems of a stream that are held out, or that are not; each once.

    Raises:
        `ValueError`: if so many different ones are not to be found.
    """
    found: dict[str, Row] = {}
    for tries, row in enumerate(stream):
        if len(found) == count or tries > PATIENCE * count:
            break
        if is_held_out(row) == held_out:
            found.setdefault(row["prompt"], row)
    if len(found) < count:
        raise ValueError(
            f"There are hardly {len(found)} different problems that are {'' if held_out else 'not '}held out, and {count} are "
            "wanted; set fewer, or more terms or digits."
        )
    return list(found.values())


def draw(
    task: str,
    seed: int,
    *,
    problems: int,
    written: int,
    held_out: int,
    terms: int,
    fewest_terms: int,
    digits: int,
    data: str,
) -> tuple[list[Row], list[Row], list[Row]]:
    """
    The problems of a run.

    Args:
        task (`str`), seed (`int`):
            What is drawn. Seeds have held-out problems of their own, so that results over seeds can be pooled.
        problems, written, held_out (`int`):
            How many: to train on, of those with a written thought, and held out.
        terms, digits (`int`):
            Size of sums.
        fewest_terms (`int`):
            With fewer than `terms`, the problems to train on by their answers have from so many terms to `terms`, each number
            equally often. Written thoughts and held-out problems are of full size.
        data (`str`):
            GSM8K's file, or its name on the Hub. `problems` is then at most what is there.

    Returns:
        `tuple`: rows to train on by their answer, rows with a written thought, and held-out rows.

    Raises:
        `ValueError`: if there are not so many.
    """
    if task == "gsm8k":
        rows = read_gsm8k(data)
        stop = len(rows) - held_out * (seed + 1)
        if stop < 1:
            raise ValueError(f"{data!r} has {len(rows)} problems, too few to hold out {held_out} for seed {seed}.")
        train, held = rows[:stop][:problems], rows[stop : stop + held_out]
        return train, [row for row in train if row["thought"]][:written], held
    generate = GENERATORS[task]
    own = [random.Random(f"{task} {part} {seed}") for part in ("problems", "held out")]
    train = drawn(generate(own[0], terms, digits), problems, held_out=False)
    taught = [row for row in train if row["thought"]][:written]
    if task in SUMS:
        train = mixed(task, train, seed, range(fewest_terms, terms), digits)
    return train, taught, drawn(generate(own[1], terms, digits), held_out, held_out=True)


def mixed(task: str, problems: list[Row], seed: int, shorter: range, digits: int) -> list[Row]:
    """As many sums, of which equally many have each number of terms in `shorter` as have the full one."""
    kinds = [problems]
    for terms in shorter:
        stream = SUMS[task](random.Random(f"{task} of {terms} terms {seed}"), terms, digits)
        kinds.append(drawn(stream, len(problems) // (len(shorter) + 1), held_out=False))
    return [row for together in zip(*kinds, strict=False) for row in together]
