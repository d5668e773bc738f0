"""Judges: prompt and two answers ──► a verdict. A reward model, a language model, an endpoint, or implicit rewards."""

import http.client
import json
import math
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_dpo.base.names import BaseModelError, resolve_base
from lit_dpo.base.tokenizer import load_tokenizer
from lit_dpo.data.batch import PairBatch
from lit_dpo.data.tokenization import TokenizedPair
from lit_dpo.evaluation.winrate import Verdict
from lit_dpo.files.console import library_bars, say
from lit_dpo.module import DPOModule
from lit_dpo.training.requirements import checked_placement

RUBRIC = """Which of the two answers to the question is better? Consider whether it is correct, whether it helps, and \
whether it says no more than is needed. Length alone is no merit.

[Question]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

"""
ONE_LETTER = RUBRIC + "Write A or B, and nothing else."
BRACKETS = (
    RUBRIC + "Write [[A]] if answer A is better, [[B]] if answer B is, or [[C]] if neither is. Write nothing else."
)
RETRIES, LONGEST_WAIT = 6, 60.0  # of an endpoint that is busy; seconds
MOST_NONSENSE = 5  # answers in a row that are no verdict


class Case(NamedTuple):
    """What a judge is shown."""

    prompt: str  # text of the last user turn
    prompt_ids: list[int]
    first: str
    second: str
    first_ids: list[int]
    second_ids: list[int]


class Judge(Protocol):
    """Gives verdicts."""

    name: str  # for the report, and for what is kept of earlier runs

    def __call__(self, cases: Sequence[Case]) -> list[Verdict]:
        """A verdict on each case."""


class ImplicitReward:
    """The implicit reward of an aligned model. It judges by what it was trained to prefer, its own answers too.

    Args:
        module: The aligned model, loaded.
        digest: What the model is.
    """

    def __init__(self, module: DPOModule, digest: str) -> None:
        self.module, self.name = module, f"implicit reward of the aligned model ({digest[:8]})"

    @torch.no_grad()
    def __call__(self, cases: Sequence[Case]) -> list[Verdict]:
        """The preference σ(reward of the first - reward of the second)."""
        pairs = [TokenizedPair(case.prompt_ids, case.first_ids, case.second_ids) for case in cases]
        policy = self.module.policy
        batch = PairBatch.from_pairs(pairs).to(policy.model.device)
        with policy.initial():
            reference = policy.logps(batch)
        rewards = self.module.objective.rewards(policy.logps(batch), reference)
        return [Verdict((value,)) for value in torch.sigmoid(rewards.margins.double()).tolist()]


class RewardModel:
    """A reward model: a sequence classifier with one output for a conversation. The higher reward wins.

    Args:
        model: Hub id or local folder.
        trust_remote_code: Whether to run code that comes with the model.

    Raises:
        BaseModelError: If it cannot be loaded.
        ValueError: If it has several outputs, or no chat template.
    """

    def __init__(self, model: str, trust_remote_code: bool = False) -> None:
        self.name = f"reward model {model}"
        self.model = _loaded(AutoModelForSequenceClassification, model, trust_remote_code)
        self.tokenizer = _tokenizer(model, trust_remote_code)
        if self.model.config.num_labels != 1:
            raise ValueError(
                f"--judge_model {model} has {self.model.config.num_labels} outputs; a reward model has one."
            )

    @torch.no_grad()
    def __call__(self, cases: Sequence[Case]) -> list[Verdict]:
        """The preference σ(reward of the first - reward of the second) (Bradley and Terry 1952)."""
        found = []
        for case in cases:
            first, second = (self._reward(case.prompt, answer) for answer in (case.first, case.second))
            found.append(Verdict((_sigmoid(first - second),)))
        return found

    def _reward(self, prompt: str, answer: str) -> float:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False)
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(self.model.device)
        return float(self.model(input_ids=ids).logits[0, 0])


class LanguageModel:
    """A causal language model that is asked which answer is better. The verdict is read from its log-probs of A and B.

    Each case is asked twice, with the answers in both orders.

    Args:
        model: Hub id, local folder or ``package:NAME``.
        trust_remote_code: Whether to run code that comes with the model.

    Raises:
        BaseModelError: If it cannot be loaded.
        ValueError: If its tokenizer has no chat template.
    """

    def __init__(self, model: str, trust_remote_code: bool = False) -> None:
        self.name = f"language model {model}"
        self.model = _loaded(AutoModelForCausalLM, model, trust_remote_code)
        self.tokenizer = _tokenizer(model, trust_remote_code)
        letters = (self.tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in "AB")
        self.letters = [ids[0] for ids in letters]

    def __call__(self, cases: Sequence[Case]) -> list[Verdict]:
        """The probability of A among A and B, in both orders."""
        return [_in_both_orders(self._ask, case) for case in cases]

    @torch.no_grad()
    def _ask(self, prompt: str, first: str, second: str) -> float:
        turns = [{"role": "user", "content": ONE_LETTER.format(prompt=prompt, first=first, second=second)}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(self.model.device)
        logits = self.model(input_ids=ids).logits[0, -1, self.letters]
        return float(logits.double().softmax(-1)[0])


class Endpoint:
    """A model behind an OpenAI-compatible endpoint, asked twice, with the answers in both orders.

    The key is read from the environment variable ``OPENAI_API_KEY``, and is written nowhere.

    Args:
        url: Address of the API, such as ``https://api.openai.com/v1``.
        model: Name of the model there.
        wait: Seconds to wait at first when the endpoint is busy; doubled each time.
    """

    def __init__(self, url: str, model: str, wait: float = 1.0) -> None:
        self.name, self.model, self.wait = f"{model} at {url}", model, wait
        self.url = f"{url.rstrip('/')}/chat/completions"
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"--url {url} is no address of an endpoint, such as https://api.openai.com/v1.")
        self._nonsense = 0

    def __call__(self, cases: Sequence[Case]) -> list[Verdict]:
        """1 for the first answer, 0 for the second, 0.5 for neither, in both orders."""
        return [_in_both_orders(self._ask, case) for case in cases]

    def _ask(self, prompt: str, first: str, second: str) -> float | None:
        content = BRACKETS.format(prompt=prompt, first=first, second=second)
        said = self._send({"model": self.model, "messages": [{"role": "user", "content": content}], "temperature": 0})
        verdict = re.findall(r"\[\[([ABC])\]\]", said) or re.findall(r"^\W*([ABC])\W*$", said.strip())
        if len(set(verdict)) != 1:
            self._nonsense += 1
            if self._nonsense >= MOST_NONSENSE:
                raise ValueError(
                    f"--url: {self.model} gave no verdict {MOST_NONSENSE} times in a row, at last {said!r:.80}. The "
                    "verdicts so far are kept."
                )
            return None
        self._nonsense = 0
        return {"A": 1.0, "B": 0.0, "C": 0.5}[verdict[0]]

    def _send(self, body: dict[str, Any]) -> str:
        """The text of the answer. Waits and asks again if the endpoint is busy or fails.

        Raises:
            OSError: If it refuses, or is busy or silent for too long.
        """
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)  # noqa: S310  checked in __init__
        why = ""
        for attempt in range(RETRIES):
            wait = min(self.wait * 2**attempt, LONGEST_WAIT)
            try:
                with urllib.request.urlopen(request, timeout=120) as response:  # noqa: S310  # nosec B310  its scheme is checked
                    return str(json.loads(response.read())["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                said = " ".join(error.read(2000).decode(errors="replace").split())
                why = f"status {error.code}" + (f" ({said:.200})" if said else "")
                if error.code not in (408, 409, 429) and error.code < 500:
                    remedy = "Are OPENAI_API_KEY and the model's name right?"
                    raise OSError(f"--url {self.url} refuses: {why}. {remedy}") from None
                asked = str(error.headers.get("Retry-After", ""))
                wait = float(asked) if asked.isdigit() else wait  # it may be a date too
            except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
                why = str(getattr(error, "reason", error))
            except (ValueError, KeyError, IndexError, TypeError) as error:
                why = f"no chat completion ({type(error).__name__})"
            if attempt < RETRIES - 1:
                say(f"\n{self.url}: {why}. It is asked again.", sys.stderr)
                time.sleep(min(wait, LONGEST_WAIT))
        raise OSError(
            f"--url {self.url}: {why}, after {RETRIES} attempts. Is the address right, and does a server run there? "
            "The verdicts so far are kept, and the same command goes on from them."
        )


def _in_both_orders(ask: Callable[[str, str, str], float | None], case: Case) -> Verdict:
    """The verdict of a judge that is asked for its preference for the answer that it is shown first."""
    shown_first = ask(case.prompt, case.first, case.second)
    shown_second = ask(case.prompt, case.second, case.first)
    return Verdict((shown_first, None if shown_second is None else 1 - shown_second))


def _loaded(kind: Any, name: str, trust_remote_code: bool) -> Any:
    """A model for evaluation, on a GPU if there is one."""
    dtype, device, _ = checked_placement(None, quantized=False)
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}}
    try:
        with library_bars(False, "transformers"):
            model = kind.from_pretrained(resolve_base(name), trust_remote_code=trust_remote_code, **options)
    except OSError as error:
        raise BaseModelError(name, error, "--judge_model ") from error
    return model.eval()


def _tokenizer(name: str, trust_remote_code: bool) -> Any:
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    if not tokenizer.chat_template:
        raise ValueError(f"--judge_model {name}: its tokenizer has no chat template.")
    return tokenizer


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
