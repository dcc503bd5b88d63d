"""Fifty faults, one at a time in a copy of the package: does a test notice?

    python -m tests.seeded_faults --results out/faults.json      # about a quarter of an hour on one core
    python -m tests.seeded_faults --check                        # which fragments need to be adapted

A fault is a fragment of code that stands once in the package, and what takes its place. The test files that are likely to
notice run first, up to the first failure; the rest of the fast tests run with `--rest` where those files pass, which takes
minutes for each such fault. Results are kept in a file as they come, and a fault that is in it is not tried again.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).parent.parent
FAST = ("-m", "not slow and not real")
TIMEOUT = 3600  # seconds, of one run of tests


class Fault(NamedTuple):
    """
    A change that a test should notice.

    Parameters:
        name (`str`):
            What is wrong.
        old, new (`str`):
            A fragment that stands once in the package, and what it becomes.
        tests (`str`):
            Test files that are likely to notice, the likeliest first, without `test_` and `.py`.
    """

    name: str
    old: str
    new: str
    tests: str


FAULTS = (
    # rewards
    Fault(
        "the mean over a talk counts masked tokens",
        "(values * mask).sum(dim) / mask.sum(dim).clamp(min=1)",
        "(values * mask).mean(dim)",
        "rewards_objective",
    ),
    Fault(
        "the penalty on unfinished thoughts is a bonus",
        "rewards - penalties",
        "rewards + penalties",
        "settings early_ends trainer",
    ),
    # advantages
    Fault(
        "the trace does not decay",
        "deltas[..., k] + gamma * gae_lambda * running",
        "deltas[..., k] + gamma * running",
        "advantages",
    ),
    Fault(
        "the baseline of least variance weighs all tokens alike",
        "thought * inputs.value_weights",
        "thought * torch.ones_like(inputs.value_weights)",
        "rewards_objective",
    ),
    Fault(
        "the spread of advantages counts masked tokens",
        "((x - mean) ** 2 * mask).sum()",
        "((x - mean) ** 2).sum()",
        "advantages accumulation",
    ),
    # the objective
    Fault(
        "the clipped surrogate's bound",
        "-torch.minimum(ratio * advantages",
        "-torch.maximum(ratio * advantages",
        "rewards_objective",
    ),
    Fault(
        "the KL's direction",
        "reference_logps.detach() - logps",
        "logps - reference_logps.detach()",
        "rewards_objective",
    ),
    Fault(
        "a talk token counts once for all thoughts",
        "talk_mask.sum() * thought_mask.shape[2]",
        "talk_mask.sum()",
        "rewards_objective accumulation",
    ),
    Fault(
        "distillation learns from losses too",
        "logps_without.detach().exp()).clamp(min=0)",
        "logps_without.detach().exp())",
        "rewards_objective settings",
    ),
    Fault(
        "the entropy bonus grows",
        "max(floor, initial * decay**step)",
        "max(floor, initial / decay**step)",
        "rewards_objective trainer",
    ),
    # sampling
    Fault(
        "thoughts end one token late",
        "settings.min_thought_length <= step + 1:",
        "settings.min_thought_length <= step:",
        "early_ends geometry_sampling settings",
    ),
    Fault(
        "the entropy of a drawn token",
        "total.log() - shifted.mul_(mass).sum(-1) / total",
        "total.log() - shifted.mul_(mass).sum(-1)",
        "model exactness early_ends trainer",
    ),
    Fault(
        "sampling in the graph at the inverse temperature",
        "logits.div_(settings.temperature)",
        "logits.mul_(settings.temperature)",
        "early_ends exactness trainer memory settings",
    ),
    Fault(
        "thoughts on one branch take each other's tokens",
        "own[order] * thoughts.shape[1] + rank",
        "own[order] * thoughts.shape[1]",
        "joined_branches",
    ),
    Fault(
        "thoughts share a branch whatever they said before",
        "running.alike[places] * 2**32 + running.token_ids[-1]",
        "running.token_ids[-1]",
        "joined_branches",
    ),
    Fault(
        "the talk after one thought stands for that after all of its position",
        "stands = first.flatten() + torch.arange(B * N) // G * G",
        "stands = torch.arange(B * N) // G * G",
        "joined_branches",
    ),
    Fault(
        "a replayed token sees a slot that is to come",
        "slots=(self.places <= self.slot)",
        "slots=(self.places <= self.slot + 1)",
        "token_graph",
    ),
    Fault(
        "a replayed token does not say where the next one goes",
        "        self.slot.add_(1)\n        return self.hidden.clone()",
        "        return self.hidden.clone()",
        "token_graph",
    ),
    Fault("saved models forget `top_p`", "top_p=settings.top_p,", "top_p=1.0,", "as_trained settings generation"),
    # scoring
    Fault(
        "the thought is mixed with the next token's prediction",
        "thoughts.positions.host.index[..., None] + torch.arange(M)",
        "thoughts.positions.host.index[..., None] + torch.arange(1, M + 1)",
        "model likelihood",
    ),
    Fault(
        "the value loss trains the model",
        "self.value_head(hidden.detach().to(",
        "self.value_head(hidden.to(",
        "model policy_gradient trainer",
    ),
    # texts and positions
    Fault(
        "a talk goes on into the next document",
        "inside & (documents == own) & positions.mask",
        "inside & positions.mask",
        "geometry_sampling exactness causality",
    ),
    Fault(
        "spacing of difficult positions",
        "& (t >= free)",
        "& (t > free)",
        "geometry_sampling as_trained",
    ),
    Fault(
        "the last token of a document predicts the next document",
        "& same_document & (self.labels",
        "& (self.labels",
        "geometry_sampling exactness causality",
    ),
    # branches
    Fault(
        "only the last chunk gives the text a gradient",
        "d_text_key[:, :, text] +=",
        "d_text_key[:, :, text] =",
        "branch_attention exactness",
    ),
    Fault(
        "a window is one token too long",
        "seen & (ahead < window)",
        "seen & (ahead <= window)",
        "branch_attention exactness self_check",
    ),
    Fault(
        "empty slots take a position",
        "start + slot_mask.long().cumsum(-1).clamp(min=1)",
        "start + torch.ones_like(slot_mask).long().cumsum(-1)",
        "geometry_sampling exactness",
    ),
    Fault(
        "cached replay forks a token early",
        "anchors.cpu()).flatten() + 1",
        "anchors.cpu()).flatten()",
        "cached_replay self_check",
    ),
    # the LM head
    Fault(
        "the gradient of the entropy",
        "log_p.mul_(minus_e).sub_(constant)",
        "log_p.mul_(minus_e).add_(constant)",
        "lm_head policy_gradient",
    ),
    Fault(
        "the mixed prediction's gradient ignores the weight",
        "g_y.addcmul_(g_z, share)",
        "g_y.add_(g_z)",
        "lm_head",
    ),
    # generation and likelihoods
    Fault(
        "generation draws for the next place",
        "fixed_draws(self.lengths[:, None] - 1,",
        "fixed_draws(self.lengths[:, None],",
        "likelihood generation as_trained",
    ),
    Fault(
        "a thought is due when the last one is read",
        "spaced(due, thinking.distance)",
        "spaced(due, thinking.span)",
        "likelihood as_trained",
    ),
    # the run
    Fault("memory is taken as one row's", "/ max(per_token, 1.0) / size.rows", "/ max(per_token, 1.0)", "memory"),
    Fault(
        "an old experience is kept for the next sampling",
        "step % args.num_iterations == 0 or",
        "step % args.num_iterations == 1 or",
        "accumulation trainer",
    ),
    Fault(
        "accuracy without thoughts is that with them",
        "(experience.correct_without.expand_as(scores.talk_correct), scored)",
        "(scores.talk_correct, said)",
        "trainer_models trainer runs",
    ),
    Fault("patience with faults is one step longer", "self.in_a_row >= limit", "self.in_a_row > limit", "faults"),
    Fault(
        "a resumed run forgets where its loss was logged",
        'restore_loss_since_log(state["loss"], state["loss_logged_at"])',
        'restore_loss_since_log(state["loss"], 0)',
        "checkpoints runs",
    ),
    Fault(
        "the filter's weight and decay are swapped",
        "self.grokfast_alpha, self.grokfast_lambda)\n",
        "self.grokfast_lambda, self.grokfast_alpha)\n",
        "optimizers",
    ),
    Fault(
        "a stage begins one step late",
        "if start <= step:",
        "if start < step:",
        "settings training_arguments",
    ),
    # looking at the outcome
    Fault(
        "the content gain passes by its mean",
        'estimate.low if name == "content_gain" else estimate.value',
        "estimate.value",
        "anti_theater",
    ),
    Fault(
        "shuffled thoughts stay where they are",
        "places.roll(-(len(places) // 2))",
        "places.roll(0)",
        "controls anti_theater",
    ),
    Fault(
        "the report compares with the token before",
        '["tokens"][i + 1 + m]["nll_without"]',
        '["tokens"][i + m]["nll_without"]',
        "inspection",
    ),
    Fault(
        "the first token of a continuation is not scored",
        "wanted[b, len(row) - len(continuation) :",
        "wanted[b, len(row) - len(continuation) + 1 :",
        "harness",
    ),
    # data and commands
    Fault(
        "the end of a text keeps the mask of its beginning",
        "row[column][-length:] if keep_end else",
        "row[column][:length] if keep_end else",
        "bad_data trainer_data columns score",
    ),
    Fault(
        "notes beside data are the data",
        'if pair[0] != "text"] or counts',
        'if pair[0] == "text"] or counts',
        "data_files",
    ),
    Fault("a flag that says true is a folder", '{"true": True, "false": False}.get', "{}.get", "cli"),
    # scores
    Fault("rewards look at the whole talk", '"mask": talk.score_mask[', '"mask": talk.target_mask[', "score"),
    Fault("a score ends a token early", "stop = len(ids)\n", "stop = len(ids) - 1\n", "score"),
    # written thoughts and what is learned from them
    Fault(
        "a written thought is placed a token late",
        "common_prefix_length(own, ids) - 1",
        "common_prefix_length(own, ids)",
        "written_data",
    ),
    Fault(
        "a written thought lacks its ending",
        "thought if thought.endswith(stop) else thought + stop",
        "thought",
        "written_data",
    ),
    Fault(
        "a row that only fills up is predicted",
        "labels=torch.full_like(row.labels, -100)",
        "labels=row.labels",
        "written",
    ),
    Fault(
        "written thoughts are averaged over sampled tokens",
        "-_part(own.thought_logps, own.thought_mask, counts.written)",
        "-_part(own.thought_logps, own.thought_mask, counts.thought)",
        "rewards_objective written",
    ),
    Fault(
        "the text after a written thought is left out",
        '"reader_nll": -_part(own.reader_logps, talk, counts.talk),',
        "",
        "rewards_objective written",
    ),
    Fault(
        "shares of a group do not add up to its size",
        "logps.softmax(-1) * logps.shape[-1]",
        "logps.softmax(-1)",
        "rewards_objective",
    ),
    Fault(
        "a group's marginal likelihood counts the thought among the others",
        "_log_mean(others, G - 1)",
        "_log_mean(others, G)",
        "rewards_objective policy_gradient",
    ),
    Fault(
        "the spread of a group is taken over G",
        "return rewards.std(-1, keepdim=True)",
        "return rewards.std(-1, keepdim=True, correction=0)",
        "advantages",
    ),
    Fault(
        "groups with spread are dropped",
        "(own < bound) & mask",
        "(own > bound) & mask",
        "advantage_threshold",
    ),
    Fault(
        "the average of spreads is not in checkpoints",
        '{"reward_deviation": [self._deviation.total, self._deviation.weight]}',
        '{"reward_deviation": [0.0, 0.0]}',
        "advantage_threshold",
    ),
    Fault(
        "groups without a useful thought count as mixed",
        "groups.any(-1) & ~groups.all(-1)",
        "~groups.all(-1)",
        "trainer preflight collapse",
    ),
    Fault(
        "thoughts that fill up keep their talk",
        "chosen.kept.to(experience.rewards.dtype) * repeats",
        "torch.ones_like(chosen.kept, dtype=experience.rewards.dtype) * repeats",
        "advantage_threshold",
    ),
    Fault(
        "thoughts that were folded count once",
        "thought * inputs.repeats[..., None]",
        "thought * (inputs.repeats[..., None] > 0)",
        "advantage_threshold",
    ),
    Fault(
        "what is left out is left out of the log",
        "replace(batch, finite=finite, **part.judged)",
        "replace(batch, finite=finite)",
        "advantage_threshold",
    ),
    Fault(
        "further updates log the thoughts that are left as if they were all",
        '{"is_reused": True}',
        "{}",
        "advantage_threshold",
    ),
    Fault(
        "own thoughts of settled groups come again",
        "is_mixed(helps) if",
        "helps.any(-1) if",
        "self_imitation",
    ),
    Fault(
        "own thoughts that come again are not in checkpoints",
        "self.imitation.save(folder)",
        "pass",
        "self_imitation",
    ),
    Fault(
        "preflight tries rows that will be imitated",
        "usable = 0 if is_written else int(",
        "usable = int(",
        "preflight",
    ),
)


def sources(root: Path) -> dict[Path, str]:
    """The package's modules."""
    return {path: path.read_text("utf-8") for path in sorted((root / "trl_quietstar").rglob("*.py"))}


def with_fault(fault: Fault, texts: dict[Path, str]) -> tuple[Path, str]:
    """
    The module that a fault is in, and its text with the fault.

    Raises:
        `LookupError`: if the fragment does not stand in the package exactly once.
    """
    found = [(path, text.count(fault.old)) for path, text in texts.items() if fault.old in text]
    if [count for _, count in found] != [1]:
        places = ", ".join(f"{path.name} ({count})" for path, count in found) or "nowhere"
        raise LookupError(f"{fault.name}: {fault.old!r} stands in {places}")
    path = found[0][0]
    return path, texts[path].replace(fault.old, fault.new)


def complaints(root: Path) -> list[str]:
    """Faults that no longer fit the package, or are tried on no test file."""
    texts, wrong = sources(root), []
    for fault in FAULTS:
        try:
            path, text = with_fault(fault, texts)
            compile(text, str(path), "exec")
        except (LookupError, SyntaxError) as error:
            wrong.append(str(error))
        wrong += [f"{fault.name}: there is no test file {file}" for file in likely(fault, root, missing=True)]
    return wrong


def likely(fault: Fault, root: Path, missing: bool = False) -> list[str]:
    """Test files that run first, as far as they are there; or those that are missing."""
    files = [f"tests/test_{name}.py" for name in fault.tests.split()]
    return [file for file in files if (root / file).is_file() != missing]


def failure(copy: Path, tests: list[str]) -> str | None:
    """The first test that fails; None if all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *FAST, *tests]
    threads = {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment = {**os.environ, **threads, "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    if run.returncode == 0:
        return None
    failed = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0] if failed else f"pytest ended with {run.returncode}: {run.stderr[-300:]}"


def try_fault(fault: Fault, root: Path, rest: bool) -> dict:
    """Whether the tests of a package notice a fault, and which first."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "out", "build", "*.egg-info")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(root, Path(folder, "copy"), ignore=ignored))
        path, text = with_fault(fault, sources(copy))
        path.write_text(text, "utf-8")
        first = likely(fault, root)
        noticed = failure(copy, first)
        if noticed is None and rest:
            noticed = failure(copy, [argument for file in first for argument in ("--ignore", file)])
    return {"file": path.name, "by": noticed, "tried": "all" if rest else first}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="folder with the package and its tests")
    parser.add_argument("--results", type=Path, default=Path("out/faults.json"), help="JSON file")
    parser.add_argument("--rest", action="store_true", help="run all fast tests where the likely ones pass")
    parser.add_argument("--only", nargs="*", help="words of the names of faults to try")
    parser.add_argument("--check", action="store_true", help="only say which faults do not fit the package")
    args = parser.parse_args()
    wrong = complaints(args.root)
    print(*wrong, sep="\n", end="\n" if wrong else "")
    if args.check:
        return bool(wrong)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(args.results.read_text()) if args.results.is_file() else {}
    texts = sources(args.root)
    for fault in FAULTS:
        wanted = args.only is None or any(word in fault.name for word in args.only)
        known = results.get(fault.name)
        if not wanted or (known is not None and (known["by"] or known["tried"] == "all" or not args.rest)):
            continue
        try:
            with_fault(fault, texts)
        except LookupError:
            continue
        results[fault.name] = try_fault(fault, args.root, args.rest)
        args.results.write_text(json.dumps(results, indent=2))
        print(f"{fault.name}: {results[fault.name]['by'] or 'NOT noticed'}", flush=True)
    noticed = sum(bool(result["by"]) for result in results.values())
    print(f"{noticed} of {len(results)} noticed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
