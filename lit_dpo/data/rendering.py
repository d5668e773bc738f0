"""PreferencePair ──► text: the chat template renders the prompt and each response, and the text is cut between them."""

import datetime as dt
import json
import os.path
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from lit_dpo.base.tokenizer import require_chat_template
from lit_dpo.data.formats import Message, PreferencePair, RowError

THINKING_CUT = "the chat template removed the thinking from a response; data.keep_thinking=true keeps it"
REASONING_CUT = "the chat template does not write the reasoning that a response has beside its content"
NO_EOS = "a rendered response does not end with EOS, so the policy is not trained to stop there"
CONTROL_TOKENS = "a text contains control tokens, which are read as such"
THINKING_KEYS = ("reasoning_content", "reasoning", "thinking")  # of a message, beside its content
# Extra characters, such as a space, that a template may write between the last turn and an answer
MOST_BETWEEN = 16


class RejectedByTemplateError(ValueError):
    """The chat template does not accept the messages of a row."""


class Part(NamedTuple):
    """A part of a response's text."""

    text: str
    trained: bool  # whether the assistant wrote it


class Rendered(NamedTuple):
    """The texts of a pair, and what is to be told about it."""

    prompt: str
    responses: tuple[tuple[Part, ...], ...]  # from best to worst
    ends: bool  # whether the template wrote something after the answers
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, with the user's options.

    Args:
        tokenizer: The tokenizer.
        kwargs: Arguments to the template. A row's own arguments win over them.
        pretemplated: Whether prompts and responses are rendered texts already, to be taken as they are.
        keep_thinking: Whether to put back the thinking that the template removes from an answer.
        date: The date that a template writes, as ``2026-01-31``; None for today.

    Raises:
        ValueError: If the tokenizer has no chat template and the texts are not rendered already, or for a wrong date.
    """

    tokenizer: PreTrainedTokenizerBase
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    pretemplated: bool = False
    keep_thinking: bool = False
    date: str | None = None
    _found_ends: dict[Any, bool] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.pretemplated:
            require_chat_template(self.tokenizer)
        if self.date is not None:
            try:
                dt.date.fromisoformat(self.date)
            except ValueError as error:
                raise ValueError(f"data.date must be a date such as 2026-01-31, not {self.date!r}.") from error
            if "strftime_now(" in str(self._text):
                raise ValueError("data.date cannot be set: the chat template computes the format of the date.")

    @property
    def identity(self) -> str:
        """All that the rendered texts depend on besides the row, as text."""
        template = "" if self.pretemplated else self._text
        return json.dumps([template, dict(self.kwargs), self.pretemplated, self.keep_thinking], default=str)

    def __call__(self, pair: PreferencePair) -> Rendered:
        """The texts of a pair.

        Raises:
            RowError: If the texts are rendered already but ``pretemplated`` is not set, or the other way round.
            RejectedByTemplateError: If the template rejects the messages, or if no boundary can be found.
        """
        if self.pretemplated:
            return self._as_it_is(pair)
        notes = set()
        texts = [str(turn["content"]) for turn in (*pair.prompt, *(turn for r in pair.responses for turn in r))]
        if any(map(self._control.search, texts)):
            if self._control.match(texts[0].lstrip()) and len(pair.prompt) == 1:
                raise RowError(
                    f"the prompt begins with {texts[0].lstrip()[:30]!r}: it is rendered by a chat template already. To "
                    "take the texts as they are, set data.pretemplated=true"
                )
            notes.add(CONTROL_TOKENS)
        [generation] = self._render(pair, [], generate=True)
        conversations = self._render(pair, *pair.responses)
        self._check_tools(pair, generation, conversations)
        prompt, starts = self._boundary(pair, generation, conversations)
        responses = []
        for response, conversation, start in zip(pair.responses, conversations, starts, strict=True):
            parts = self._parts(pair, response, conversation, start)
            if self.keep_thinking:
                parts[-1] = _with_thinking(parts[-1], str(response[-1]["content"]))
            written = "".join(part.text for part in parts)
            if any(not _wrote_thinking(str(turn["content"]), written) for turn in response):
                notes.add(THINKING_CUT)
            beside = [str(turn[key]).strip() for turn in response for key in THINKING_KEYS if turn.get(key)]
            if any(thoughts not in written for thoughts in beside):
                notes.add(REASONING_CUT)
            responses.append(tuple(parts))
        return Rendered(prompt, tuple(responses), self._ends(pair), tuple(sorted(notes)))

    def _ends(self, pair: PreferencePair) -> bool:
        """Whether the template writes something after an answer. It is asked once for each sequence of roles."""
        options = json.dumps({**self.kwargs, **pair.template_kwargs}, sort_keys=True, default=str)
        case = (tuple(turn["role"] for turn in pair.prompt), bool(pair.tools), options)
        if case not in self._found_ends:
            [probe] = self._render(pair, [{"role": "assistant", "content": "1"}])
            self._found_ends[case] = not probe.rstrip().endswith("1")
        return self._found_ends[case]

    def _boundary(self, pair: PreferencePair, generation: str, conversations: list[str]) -> tuple[str, list[int]]:
        """The prompt's text, and where the answer starts in each conversation.

        With a generation prompt, a template may open the answer differently (e.g. with a thinking tag). The prompt then
        ends where these texts begin to differ. It must contain the whole last user turn.
        """
        if all(text.startswith(generation) for text in conversations):
            return generation, [len(generation)] * len(conversations)
        *probes, opening = self._render(pair, *([{"role": "assistant", "content": text}] for text in "12"), [])
        prompt = os.path.commonprefix([generation, *probes])  # noqa: RUF071  texts, not paths
        if prompt.startswith(opening) and all(text.startswith(prompt) for text in conversations):
            return prompt, [len(prompt)] * len(conversations)
        return generation, [self._start(pair, generation, text, probes) for text in conversations]

    @staticmethod
    def _check_tools(pair: PreferencePair, generation: str, conversations: list[str]) -> None:
        """Checks that the template writes the tools and calls of the row: many templates know none.

        Raises:
            RejectedByTemplateError: If it does not.
        """
        schemas = [tool.get("function", tool) if isinstance(tool, dict) else {} for tool in pair.tools]
        named = [(str(schema.get("name", "")), generation) for schema in schemas]
        named += [(call["function"]["name"], generation) for turn in pair.prompt for call in turn.get("tool_calls", [])]
        for response, conversation in zip(pair.responses, conversations, strict=True):
            named += [(c["function"]["name"], conversation) for turn in response for c in turn.get("tool_calls", [])]
        missing = sorted({str(name) for name, text in named if str(name) not in text})
        if missing:
            raise RejectedByTemplateError(
                f"the chat template does not write the tool {', '.join(missing)}: use a template that knows tools"
            )

    def _as_it_is(self, pair: PreferencePair) -> Rendered:
        """The texts of a pair that is rendered already."""
        if len(pair.prompt) > 1 or any(len(response) > 1 for response in pair.responses):
            raise RowError("data.pretemplated=true takes texts, but the row has lists of messages")
        parts = tuple((Part(str(response[0]["content"]), trained=True),) for response in pair.responses)
        eos = self.tokenizer.eos_token
        stops = all(eos and part.text.rstrip().endswith(eos) for (part,) in parts)
        return Rendered(str(pair.prompt[0]["content"]), parts, True, () if stops else (NO_EOS,))

    def _render(self, pair: PreferencePair, *answers: Sequence[Message], generate: bool = False) -> list[str]:
        """The conversations of the pair's prompt and each of some answers."""
        conversations = [[*pair.prompt, *answer] for answer in answers]
        if self._arguments_are_text:
            conversations = [[_with_text_arguments(turn) for turn in turns] for turns in conversations]
        return self._apply(conversations, pair.tools, {**self.kwargs, **pair.template_kwargs}, generate)

    def _apply(
        self, conversations: list[list[Message]], tools: Sequence[Any], kwargs: Mapping[str, Any], generate: bool
    ) -> list[str]:
        options = {**kwargs, "tools": list(tools) or None, "tokenize": False, "add_generation_prompt": generate}
        if isinstance(self._text, str):
            options["chat_template"] = self._text
        try:
            return list(self.tokenizer.apply_chat_template(conversations, **options))
        except Exception as error:  # a template is a program: it can raise anything
            raise RejectedByTemplateError(
                f"the chat template rejects the messages: {error or type(error).__name__}"
            ) from error

    @staticmethod
    def _start(pair: PreferencePair, generation: str, conversation: str, probes: list[str]) -> int:
        """Where the answer starts in a conversation that does not begin with the rendered prompt.

        Some templates write the system message only into a last user turn. Two made-up answers are rendered; an answer
        starts where the texts begin to differ. Before it, both texts must have the last turn.
        """
        head = os.path.commonprefix(probes)  # noqa: RUF071
        last = str(pair.prompt[-1]["content"]).strip()
        for extra in range(min(MOST_BETWEEN, len(head))):
            cut = len(head) - extra
            shared = os.path.commonprefix([head[:cut][::-1], generation[::-1]])[::-1]  # noqa: RUF071
            if last in shared and conversation.startswith(head[:cut]):
                return cut
        raise RejectedByTemplateError(
            "a conversation rendered by the chat template does not begin with the rendered prompt: the prompt ends "
            f"with {generation[-60:]!r}, the conversation continues differently"
        )

    def _parts(self, pair: PreferencePair, response: list[Message], conversation: str, start: int) -> list[Part]:
        """The response's text, cut where another than the assistant begins or ends to speak.

        Raises:
            RejectedByTemplateError: If the template writes an earlier turn differently once later turns follow.
        """
        if len(response) == 1:
            return [Part(conversation[start:], trained=True)]
        parts: list[Part] = []
        place = start
        for turn, message in enumerate(response):
            is_last = turn == len(response) - 1
            end = conversation if is_last else self._render(pair, response[: turn + 1])[0]
            if not is_last and response[turn + 1]["role"] == "assistant" and message["role"] != "assistant":
                [opened] = self._render(pair, response[: turn + 1], generate=True)
                end = os.path.commonprefix([opened, conversation])  # noqa: RUF071
            if not conversation.startswith(end):
                raise RejectedByTemplateError(
                    "the chat template writes a turn of a response differently once later turns follow, so the turns "
                    "cannot be told apart"
                )
            parts.append(Part(conversation[place : len(end)], trained=message["role"] == "assistant"))
            place = len(end)
        return parts

    @cached_property
    def _text(self) -> Any:
        """The template, or several by name, with the date in the place of each call that asks for it."""
        return with_date(self.tokenizer.chat_template, self.date)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Matches the tokenizer's special tokens."""
        tokens = sorted({str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special})
        return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")

    @cached_property
    def _arguments_are_text(self) -> bool:
        """Whether the template takes the arguments of a tool call as text. Most take a dict."""
        call = {"type": "function", "id": "abc123def", "function": {"name": "f", "arguments": {"key": "value"}}}
        user = {"role": "user", "content": "?"}
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        for message, is_text in ((turn, False), (_with_text_arguments(turn), True)):
            try:
                [rendered] = self._apply([[user, message]], [], self.kwargs, generate=False)
            except RejectedByTemplateError:
                continue
            if re.search(r'\{\s*"key":\s*"value"\s*\}', rendered):
                return is_text
        return False


def with_date(template: Any, date: str | None) -> Any:
    """A chat template with a date in the place of each call that asks for it.

    Args:
        template: The template. Several by name are left as they are.
        date: The date, as ``2026-01-31``; None for today.
    """
    if not isinstance(template, str):
        return template
    day = dt.date.today() if date is None else dt.date.fromisoformat(date)
    return re.sub(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", lambda call: repr(day.strftime(call[2])), template)


def _with_text_arguments(turn: Message) -> Message:
    """The message with the arguments of its tool calls as JSON text."""
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in turn.get("tool_calls", [])
    ]
    return {**turn, "tool_calls": calls} if calls else turn


def _wrote_thinking(content: str, written: str) -> bool:
    """Whether the thinking in a message's content is in the rendered text."""
    thoughts, closed, _ = content.rpartition("</think>")
    return not closed or thoughts.strip().removeprefix("<think>").strip() in written


def _with_thinking(part: Part, content: str) -> Part:
    """The part of a response's text with the thinking that the template removed from its content."""
    if _wrote_thinking(content, part.text):
        return part
    spoken = content.rpartition("</think>")[2].strip()
    before, _, after = part.text.rpartition(spoken) if spoken else ("", "", part.text)
    return Part(before.lstrip() + content + after, trained=True)
