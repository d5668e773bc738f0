"""A conversation with the base, the aligned model, or both; and preference pairs from what one likes better."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias

from transformers import TextStreamer

from lit_dpo.base.tokenizer import require_chat_template
from lit_dpo.policy.generation import Answer, answers
from lit_dpo.policy.policy import Policy

Side: TypeAlias = Literal["base", "aligned"]
HELP = """/base, /aligned, /both   who answers
/system TEXT             the system message, and a new conversation; without TEXT none
/save base, /save aligned   keep the last two answers as a preference pair, your choice as chosen (after /both)
/retry                   another answer to the last message
/new                     a new conversation
/help, /quit"""


class Conversation:
    """Turns of a user and of models, with commands that begin with a slash.

    Args:
        policy: The policy.
        tokenizer: Its tokenizer.
        write: Takes pieces of text as they are written.
        pairs: File for preference pairs, of JSON lines.
        system: System message.
        template_kwargs: Arguments to the chat template.
        max_new_tokens: Maximum number of tokens of an answer.
        temperature: Temperature of sampling; 0 for greedy decoding.

    Raises:
        ValueError: If the tokenizer has no chat template.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: Any,
        write: Callable[[str], None],
        pairs: Path,
        *,
        system: str | None = None,
        template_kwargs: dict[str, Any] | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.7,
    ) -> None:
        require_chat_template(tokenizer)
        self.policy, self.tokenizer, self.write, self.pairs = policy, tokenizer, write, pairs
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.template_kwargs = template_kwargs or {}
        self.sides: tuple[Side, ...] = ("aligned",)
        self.system = system
        self.turns: list[dict[str, str]] = []
        self.last: dict[Side, str] = {}  # answers to the last message
        self._new(system)

    def say(self, line: str) -> bool:
        """Takes a line of the user: a command or a message. Returns whether the conversation goes on."""
        command, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if not command:
            return True
        if command in ("/quit", "/exit"):
            return False
        if command in ("/base", "/aligned", "/both"):
            self.sides = ("base", "aligned") if command == "/both" else (command[1:],)  # type: ignore[assignment]
            self.write(f"[{' and '.join(self.sides)}]\n")
        elif command == "/system":
            self._new(rest or None)
            self.write("[a new conversation]\n")
        elif command == "/new":
            self._new(self.system)
            self.write("[a new conversation]\n")
        elif command == "/retry":
            self._retry()
        elif command == "/save":
            self._save(rest)
        elif command.startswith("/"):
            self.write(f"{HELP}\n" if command == "/help" else f"[there is no {command}]\n{HELP}\n")
        else:
            self._answer(line.strip())
        return True

    def _new(self, system: str | None) -> None:
        self.system, self.last = system, {}
        self.turns = [{"role": "system", "content": system}] if system else []

    def _answer(self, message: str) -> None:
        """Lets each side answer. The conversation goes on with the aligned model's answer, if it gave one."""
        turns = [*self.turns, {"role": "user", "content": message}]
        text = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, **self.template_kwargs
        )
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        longest = getattr(self.policy.model.config, "max_position_embeddings", None)
        if longest is not None and len(ids) + self.max_new_tokens > longest:
            self.write(f"[{len(ids):,} tokens leave no room for an answer in {longest:,}: begin anew with /new]\n")
            return
        found: dict[Side, str] = {}
        for side in self.sides:
            self.write(f"{side}> ")
            written = self._written(ids, side)
            found[side] = written.text
            self.write("\n" if written.finished else " …\n")
        self.last = found
        self.turns = [*turns, _spoken(found.get("aligned", found.get("base", "")))]

    def _written(self, ids: list[int], side: Side) -> Answer:
        streamer = Streamer(self.tokenizer, self.write)
        given = (self.policy, self.tokenizer, [ids], self.max_new_tokens, self.temperature, streamer)
        if side == "aligned":
            return answers(*given)[0]
        with self.policy.initial():
            return answers(*given)[0]

    def _retry(self) -> None:
        if not self.last:
            self.write("[there is no answer yet]\n")
            return
        before, message = self.turns, self.turns[-2]["content"]
        self.turns = before[:-2]
        try:
            self._answer(message)
        finally:
            if len(self.turns) < len(before):  # stopped: the answers of before stand
                self.turns = before

    def _save(self, choice: str) -> None:
        """Appends the last two answers as a preference pair. The conversation goes on with the chosen one."""
        if len(self.last) < 2:
            self.write("[a pair needs the answers of both: choose /both, and ask]\n")
            return
        if choice not in self.last:
            self.write("[which one is better? /save base or /save aligned]\n")
            return
        rejected = next(text for side, text in self.last.items() if side != choice)
        chosen = self.last[choice]
        if chosen == rejected or not chosen or not rejected:
            reason = "both answers are the same" if chosen == rejected else "one of the answers is empty"
            self.write(f"[{reason}, so there is no pair to train on: /retry, or ask something else]\n")
            return
        row = {"prompt": self.turns[:-1], "chosen": [_spoken(chosen)], "rejected": [_spoken(rejected)]}
        self.pairs.parent.mkdir(parents=True, exist_ok=True)
        with self.pairs.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.turns[-1], self.last = _spoken(chosen), {}
        self.write(f"[saved to {self.pairs}]\n")


def _spoken(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


class Streamer(TextStreamer):
    """Hands text on as soon as its words are complete."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hands a piece of text on."""
        self._write(text)
