"""Two models and a judge ──► answers, verdicts and a win rate. What is there of an earlier run is not made again."""

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lit_dpo.evaluation.judges import Case, ImplicitReward, Judge
from lit_dpo.evaluation.statistics import Resampling
from lit_dpo.evaluation.trained import Trained
from lit_dpo.evaluation.winrate import Verdict, WinRate, win_rate
from lit_dpo.files.atomic import atomic_write, write_json
from lit_dpo.files.store import Store, digest
from lit_dpo.module import DPOModule
from lit_dpo.policy.generation import Answer, Prompt, answers

OpenJudge = Callable[[Callable[[], DPOModule]], Judge]


@dataclass(frozen=True)
class Sampling:
    """How answers are written.

    Args:
        max_new_tokens: Maximum number of tokens of an answer.
        temperature: Temperature of sampling; 0 for greedy decoding.
        batch_size: Number of prompts that are answered together.
        seed: Seed of sampling.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    batch_size: int = 8
    seed: int = 42


@dataclass(frozen=True)
class Judged:
    """A judge's view of two models."""

    names: tuple[str, str]
    judge: str
    result: WinRate
    num_cut: tuple[int, int]  # answers that max_new_tokens cut


class Contestant:
    """A model that answers prompts, loaded when it is first needed.

    Args:
        trained: What was trained.
        initial: Whether it is the initial policy of ``trained``.
        prompts: The prompts in its own tokens.
    """

    def __init__(self, trained: Trained, initial: bool, prompts: Sequence[Prompt]) -> None:
        self.trained, self.initial, self.prompts = trained, initial, prompts
        module = trained.module
        start = (module.base, str(module.quantization), module.repository, module.adapter if trained.weights else None)
        self.digest = digest(*start) if initial else digest(*start, trained.digest)
        before = "before training" if trained.weights else "without any adapter"
        self.name = f"{trained.module.base}, {before}" if initial else str(trained.path)

    def answer(
        self, load: Callable[[], DPOModule], sampling: Sampling, store: Store, progress_bar: bool
    ) -> list[Answer]:
        """Answers all prompts, those that the store lacks with the model."""
        how = (sampling.max_new_tokens, sampling.temperature, sampling.seed)
        keys = [digest(self.digest, prompt.ids, *how) for prompt in self.prompts]
        missing = [number for number, key in enumerate(keys) if key not in store]
        module = load() if missing else None  # it has a progress bar of its own
        shown = {"desc": f"Answers of {self.name}", "unit": "prompt", "disable": not (progress_bar and missing)}
        with tqdm(total=len(missing), **shown) as bar:
            for start in range(0, len(missing), sampling.batch_size):
                assert module is not None
                chunk = missing[start : start + sampling.batch_size]
                torch.manual_seed(sampling.seed + chunk[0])
                ids = [self.prompts[number].ids for number in chunk]
                given = (module.policy, self.trained.tokenizer, ids, sampling.max_new_tokens, sampling.temperature)
                with module.policy.initial() if self.initial else nullcontext():
                    written = answers(*given)
                for number, one in zip(chunk, written, strict=True):
                    store[keys[number]] = one._asdict()
                bar.update(len(chunk))
        return [Answer(**store[key]) for key in keys]


def run_judging(
    first: Contestant,
    second: Contestant,
    open_judge: OpenJudge,
    folder: Path,
    *,
    sampling: Sampling,
    resampling: Resampling,
    progress_bar: bool = True,
) -> Judged:
    """Lets both models answer, and a judge compare the answers.

    Args:
        first: The model whose win rate is computed.
        second: The model that it is compared with.
        open_judge: Opens the judge, given a function that loads the first model.
        folder: Folder for answers, verdicts and the result.
        sampling: How answers are written.
        resampling: How intervals are computed.
        progress_bar: Whether to show progress bars.

    Returns:
        The result, which is also in ``judge.json``; each case is in ``judgements.jsonl``.
    """
    store = Store(folder / "answers.jsonl")
    if second.trained is not first.trained:  # one at a time in memory
        theirs = second.answer(second.trained.load_once, sampling, store, progress_bar)
        second.trained.unload()
    else:
        theirs = second.answer(first.trained.load_once, sampling, store, progress_bar)
    own = first.answer(first.trained.load_once, sampling, store, progress_bar)
    judge = open_judge(first.trained.load_once)
    if not isinstance(judge, ImplicitReward):
        first.trained.unload()
    cases = [
        Case(prompt.conversation or prompt.text, prompt.ids, a.text, b.text, a.ids, _in_tokens_of(first, second, b))
        for prompt, a, b in zip(first.prompts, own, theirs, strict=True)
    ]
    verdicts = _verdicts(judge, cases, Store(folder / "verdicts.jsonl"), sampling.batch_size, progress_bar)
    lengths = np.array([[len(case.first), len(case.second)] for case in cases])
    result = win_rate(verdicts, lengths, resampling)
    cut = sum(not one.finished for one in own), sum(not one.finished for one in theirs)
    judged = Judged((first.name, second.name), judge.name, result, cut)
    _write(folder, judged, cases, verdicts, sampling)
    return judged


def _verdicts(judge: Judge, cases: Sequence[Case], store: Store, batch_size: int, progress_bar: bool) -> list[Verdict]:
    """A verdict on each case. Equal answers are a tie, without asking."""
    keys = [digest(judge.name, case.prompt, case.prompt_ids, case.first, case.second) for case in cases]
    missing = [
        number
        for number, (key, case) in enumerate(zip(keys, cases, strict=True))
        if key not in store and case.first != case.second
    ]
    found = {key: Verdict(tuple(store[key])) for key in keys if key in store}
    size = batch_size if isinstance(judge, ImplicitReward) else 1  # others go case by case, so each is kept at once
    shown = {"desc": f"Verdicts by {judge.name}", "unit": "verdict", "disable": not (progress_bar and missing)}
    with tqdm(total=len(missing), **shown) as bar:
        for start in range(0, len(missing), size):
            chunk = missing[start : start + size]
            for number, verdict in zip(chunk, judge([cases[number] for number in chunk]), strict=True):
                found[keys[number]] = verdict
                if verdict.readable:  # another is asked for again by a later run
                    store[keys[number]] = verdict.preferences
            bar.update(len(chunk))
    return [found.get(key, Verdict((0.5,))) for key in keys]


def _in_tokens_of(first: Contestant, second: Contestant, answer: Answer) -> list[int]:
    """The second model's answer in the tokens of the first."""
    if second.trained is first.trained or second.trained.tokenizer.get_vocab() == first.trained.tokenizer.get_vocab():
        return answer.ids
    tokenizer = first.trained.tokenizer
    return [*tokenizer(answer.text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def _write(
    folder: Path, judged: Judged, cases: Sequence[Case], verdicts: Sequence[Verdict], sampling: Sampling
) -> None:
    result: dict[str, Any] = {
        "first": judged.names[0],
        "second": judged.names[1],
        "judge": judged.judge,
        "num_prompts": len(cases),
        "num_cut": list(judged.num_cut),
        "sampling": vars(sampling),
        **judged.result.to_dict(),
    }
    write_json(folder / "judge.json", result)
    with atomic_write(folder / "judgements.jsonl") as path:
        rows = []
        for case, verdict in zip(cases, verdicts, strict=True):
            told = {"prompt": case.prompt, "first": case.first, "second": case.second}
            rows.append(json.dumps({**told, "preferences": verdict.preferences, "score": verdict.score}) + "\n")
        path.write_text("".join(rows), encoding="utf-8")


def judged_text(judged: Judged, level: float) -> str:
    """The result, for the terminal."""
    result = judged.result
    number = result.wins + result.ties + result.losses
    lines = ["", f"A      {judged.names[0]}", f"B      {judged.names[1]}", f"judge  {judged.judge}", ""]
    lines.append(f"{f'{number:,} prompts':<36}{'A':>9}   {100 * level:g} % interval")
    for name, one in {"win rate": result.rate, "win rate at equal length": result.controlled}.items():
        if one.value == one.value:
            interval = f"   [{one.low:.3f}, {one.high:.3f}]" if one.low == one.low else ""
            lines.append(f"{name:<36}{one.value:>9.3f}{interval}")
    counts = {
        "wins, ties, losses": f"{result.wins}, {result.ties}, {result.losses}",
        "mean length in characters, A and B": f"{result.lengths[0]:.0f}, {result.lengths[1]:.0f}",
        "answers cut by max_new_tokens": "{}, {}".format(*judged.num_cut) if any(judged.num_cut) else "",
        "cases without a verdict: ties": str(result.unreadable or ""),
    }
    lines += [*(f"{name:<36}{shown:>9}" for name, shown in counts.items() if shown), ""]
    if result.consistency == result.consistency:
        share = 100 * (1 - result.consistency)
        lines.append(f"The judge changes {share:.0f} % of its verdicts with the order of the answers. They are ties.")
    if result.rate.low > 0.5 or result.rate.high < 0.5:
        lines.append(f"A is {'better' if result.rate.value > 0.5 else 'worse'} than B, by this judge.")
    else:
        lines.append("A cannot be told from B, by this judge and with so many prompts.")
    if "implicit reward" in judged.judge:
        lines.append("This judge is A itself: it tells how far A does what it was trained to prefer, and no more.")
    return "\n".join(lines)
