"""Two models, a person's votes ──► preference pairs that ``fit`` reads, and a running win rate."""

import json
import queue
import random
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from lit_dpo.base.tokenizer import require_chat_template
from lit_dpo.evaluation.chat import Streamer
from lit_dpo.evaluation.statistics import wilson
from lit_dpo.evaluation.trained import Trained
from lit_dpo.policy.generation import answers
from lit_dpo.report.evidence import read_lines

Choice: TypeAlias = Literal["left", "right", "tie"]
PAIRS, VOTES = "pairs.jsonl", "votes.jsonl"


@dataclass(frozen=True)
class Side:
    """A model that answers."""

    name: str
    trained: Trained
    initial: bool = False  # whether it answers as it was before training

    @property
    def key(self) -> str:
        """What tells it from all other models: votes on others do not count."""
        return f"{self.trained.digest[:8]}{' before training' if self.initial else ''}"


@dataclass
class Round:
    """A prompt and its two answers."""

    turns: list[dict[str, str]]
    order: tuple[int, int]  # which side stands on the left, and which on the right
    sampling: dict[str, float] = field(default_factory=dict)  # how they were asked
    texts: list[str] = field(default_factory=lambda: ["", ""])  # left and right
    finished: bool = False
    voted: bool = False


class Stopped(Exception):  # noqa: N818  it is no error
    """The reader of a stream went away."""


class Arena:
    """Lets two models answer, takes votes, and keeps them.

    Args:
        first: The model whose win rate is kept.
        second: The other one.
        folder: Where ``pairs.jsonl`` and ``votes.jsonl`` go. Votes that are there count.
        blind: Whether the sides change places at random.
        seed: Seed of the places and of sampling.

    Raises:
        ValueError: If a tokenizer has no chat template.
    """

    def __init__(self, first: Side, second: Side, folder: Path, *, blind: bool = True, seed: int = 0) -> None:
        self.sides, self.folder, self.blind = (first, second), folder, blind
        for side in self.sides:
            require_chat_template(side.trained.tokenizer)
        self._places = random.Random(seed)  # noqa: S311  not for secrets
        self._lock = threading.Lock()  # one answer at a time: the models share adapters and random numbers
        self.keys = [first.key, second.key]
        self.scores = [float(vote["score"]) for vote in read_lines(folder / VOTES) if vote["models"] == self.keys]
        torch.manual_seed(seed)

    def ask(
        self, prompt: str, system: str | None = None, max_new_tokens: int = 512, temperature: float = 0.7
    ) -> Iterator[Round]:
        """Lets both answer, one after the other. Yields the round as it grows.

        Args:
            prompt: What the user says.
            system: System message.
            max_new_tokens: Maximum number of tokens of an answer.
            temperature: Temperature of sampling; 0 for greedy decoding.

        Raises:
            ValueError: If the prompt is blank.
        """
        if not prompt.strip():
            raise ValueError("Write a prompt first.")
        turns = [{"role": "system", "content": system}] if system else []
        order = (0, 1) if not self.blind or self._places.random() < 0.5 else (1, 0)
        sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        current = Round([*turns, {"role": "user", "content": prompt}], order, sampling)
        for place in (0, 1):
            for piece in self._answer(self.sides[order[place]], current.turns, max_new_tokens, temperature):
                current.texts[place] += piece
                yield current
        current.finished = True
        yield current

    def vote(self, current: Round, choice: Choice) -> str:
        """Keeps a vote, and a preference pair unless it is a tie. Returns what was done, in words.

        Raises:
            ValueError: If the round is not finished, or has a vote.
        """
        if not current.finished or current.voted:
            raise ValueError("Vote once, after both have answered.")
        winner = {"left": 0, "right": 1, "tie": None}[choice]
        score = 0.5 if winner is None else float(current.order[winner] == 0)
        names = [self.sides[place].name for place in current.order]
        texts = [text.strip() for text in current.texts]
        vote = {"sides": [side.name for side in self.sides], "models": self.keys, "score": score}
        vote |= {"prompt": current.turns, "sampling": current.sampling}
        answered = {"left": names[0], "right": names[1], "answers": texts, "choice": choice}
        self._append(VOTES, vote | answered)
        self.scores.append(score)
        current.voted = True
        told = f"Left was {names[0]}, right was {names[1]}."
        if winner is None:
            return f"{told} A tie gives no pair."
        if texts[0] == texts[1] or not all(texts):
            return f"{told} The answers are the same, or one is empty, so there is no pair."
        row = {"prompt": current.turns}
        row |= {key: [_spoken(texts[place])] for key, place in (("chosen", winner), ("rejected", 1 - winner))}
        self._append(PAIRS, row)
        return f"{told} The pair is in {self.folder / PAIRS}."

    def standing(self) -> str:
        """The win rate of the first side so far, in words, with Wilson's interval; a tie counts half."""
        name, other = (side.name for side in self.sides)
        if not self.scores:
            return f"No votes yet. The win rate will be that of {name} against {other}."
        number, rate = len(self.scores), sum(self.scores) / len(self.scores)
        low, high = wilson(rate, number, 0.95)
        wins, ties = self.scores.count(1.0), self.scores.count(0.5)
        verdict = "better" if low > 0.5 else "worse" if high < 0.5 else "not told apart yet"
        return (
            f"{name} against {other}: {wins} won, {ties} tied, {number - wins - ties} lost. Win rate {rate:.0%} "
            f"[{low:.0%}, {high:.0%}]: {verdict}."
        )

    def _answer(
        self, side: Side, turns: list[dict[str, str]], max_new_tokens: int, temperature: float
    ) -> Iterator[str]:
        """The pieces of an answer. The model works in a thread of its own, which ends if nobody reads on."""
        pieces: queue.Queue[str | BaseException | None] = queue.Queue()
        gone = threading.Event()

        def write(text: str) -> None:
            if gone.is_set():
                raise Stopped
            pieces.put(text)

        def work() -> None:
            try:
                with self._lock:
                    module, tokenizer = side.trained.load_once(), side.trained.tokenizer
                    options = side.trained.data.get("chat_template_kwargs") or {}
                    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **options)
                    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                    with module.policy.initial() if side.initial else nullcontext():
                        answers(
                            module.policy, tokenizer, [ids], max_new_tokens, temperature, Streamer(tokenizer, write)
                        )
            except Stopped:
                pass
            except BaseException as error:
                pieces.put(error)
            pieces.put(None)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            gone.set()

    def _append(self, name: str, line: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _spoken(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
