"""Chats through a chat template, with the author of every character of the result.

A template decides by the roles alone what it writes around the messages. So each sequence of roles is rendered once
with a private-use placeholder for every content; what lies between the placeholders is the template's own text, its
frame. The real chat is then rendered, and the frame is matched against it: what is left between its pieces must be the
contents, whole, stripped, or a part of them. Whatever does not match is an error, so no role is ever a guess.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

ROLES = {"text": 0, "system": 1, "user": 2, "assistant": 3, "tool": 4, "template": 5}
"""Codes of the per-token table `role`: plain text, the author of a message, or the chat template."""
_AUTHORS = ("system", "user", "assistant", "tool")
_MAX_MESSAGES = int(np.iinfo(np.int16).max)

_FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro +%}"
"""Templates that write today's date would give other tokens every day; this is the date that Llama's own fall back to.
"""

Messages = Sequence[tuple[str, str]]
"""Role and content of each message."""


def checked_messages(value: Any) -> list[list[str]]:
    """`[[role, content], …]` of a list of {role, content}; other keys are left out.

    Raises:
        ValueError: it is no such list; an unknown role (the nearest is named); an empty content; a tool call.
    """
    if isinstance(value, str) or not isinstance(value, list | tuple):
        hint = ": use `text_field` for plain text" if isinstance(value, str) else ""
        raise ValueError(f"its messages must be a list of {{role, content}}, not {type(value).__name__}{hint}")
    if not 0 < len(value) <= _MAX_MESSAGES:
        raise ValueError(f"it must have 1 to {_MAX_MESSAGES} messages, not {len(value)}")
    return [_checked_message(number, message) for number, message in enumerate(value)]


def _checked_message(number: int, message: Any) -> list[str]:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        found = sorted(message) if isinstance(message, Mapping) else type(message).__name__
        raise ValueError(f"message {number} must have a role and a content, but is {found}")
    role, content = message["role"], message["content"]
    if role not in _AUTHORS:
        near = difflib.get_close_matches(str(role), _AUTHORS, n=1, cutoff=0.0)
        raise ValueError(
            f"message {number} has the role {role!r}; the nearest of {', '.join(_AUTHORS)} is {near[0]!r}"
            if near
            else f"message {number} has the role {role!r}, not one of {', '.join(_AUTHORS)}"
        )
    if message.get("tool_calls"):
        raise ValueError(
            f"message {number} holds tool calls, which cannot be given to the template: write them as text"
        )
    if not isinstance(content, str):
        raise ValueError(f"the content of message {number} must be text, not {type(content).__name__}")
    if not content.strip():
        raise ValueError(f"message {number} ({role}) has an empty content: remove it")
    return [role, content]


class Rendered(NamedTuple):
    """A chat as text, cut in pieces of one author."""

    text: str
    start: NDArray[np.int64]
    """First character of each piece, ascending from 0."""
    role: NDArray[np.int8]
    turn: NDArray[np.int16]

    def at(self, character: NDArray[np.int64]) -> tuple[NDArray[np.int8], NDArray[np.int16]]:
        """Role and turn of the pieces that hold the given characters."""
        piece = np.searchsorted(self.start, character, side="right") - 1
        return self.role[piece], self.turn[piece]


class _Piece(NamedTuple):
    """Template text that is followed by a message's content, or by nothing."""

    text: str
    bounds: tuple[int, ...]
    """Where in `text` the turns of the template's characters change, and to which turn: (0, turn, offset, turn, …)."""
    message: int | None


class TemplateError(ValueError):
    """A chat that the template refuses, or whose text cannot be told from the template's."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template with the values that it may read, such as `bos_token`."""

    source: str
    values: Mapping[str, str]
    _frames: dict[tuple[str, ...], list[_Piece]] = field(default_factory=dict, repr=False, compare=False)

    def render(self, messages: Messages) -> Rendered:
        """The chat as the model was trained to see it.

        Template text carries the role `template`, and the turn of the message that it opens or closes.

        Raises:
            TemplateError: see there.
        """
        text = self._text(messages)
        roles = tuple(role for role, _ in messages)
        if roles not in self._frames:
            if len(self._frames) > 4096:
                self._frames.clear()
            self._frames[roles] = self._frame(roles)
        found: dict[int, tuple[int, int]] = {}  # by first character; a later piece replaces an empty one
        frame = self._frames[roles]
        at = 0
        for number, piece in enumerate(frame):
            if not text.startswith(piece.text, at):
                raise _ambiguous(piece.message)
            for offset, owner in zip(piece.bounds[::2], piece.bounds[1::2], strict=True):
                found[at + offset] = ROLES["template"], owner
            at += len(piece.text)
            if piece.message is not None:
                end = _content_end(
                    text, at, messages[piece.message][1], frame[number + 1].text, number + 2 == len(frame)
                )
                if end is None:
                    raise _ambiguous(piece.message)
                found[at] = ROLES[roles[piece.message]], piece.message
                at = end
        if at != len(text):
            raise _ambiguous(None)
        found.pop(len(text), None)  # a chat that ends with a content
        role, turn = zip(*found.values(), strict=True)
        return Rendered(text, np.array(list(found), np.int64), np.array(role, np.int8), np.array(turn, np.int16))

    def _text(self, messages: Messages) -> str:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        source = self.source
        if "strftime_now" in source:
            source = _FIXED_DATE + source
        chat = [{"role": role, "content": content} for role, content in messages]
        try:
            texts, _ = render_jinja_template([chat], chat_template=source, **self.values)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise TemplateError(f"the chat template refuses it ({error})") from error
        return str(texts[0])

    def _frame(self, roles: tuple[str, ...]) -> list[_Piece]:
        """The template's own text for a sequence of roles, cut at the contents."""
        placeholders = [(role, f"\ue000{number}\ue001") for number, role in enumerate(roles)]
        whole = self._text(placeholders)
        ends = []  # where each message with its closing text ends, as far as that can be told
        for n in range(1, len(roles)):
            try:
                prefix = self._text(placeholders[:n])
            except TemplateError:  # such as a chat that ends with a user
                continue
            last_said = placeholders[n - 1][1]
            if whole.startswith(prefix) and (last_said in prefix or last_said not in whole):
                ends.append((len(prefix), n))
        parts = re.split("\ue000([0-9]+)\ue001", whole)
        pieces = []
        at, last = 0, 0
        for literal, number in zip(parts[::2], [*parts[1::2], None], strict=True):
            stop = at + len(literal)
            inside = [(end - at, turn) for end, turn in ends if at < end < stop]
            last = max([last, *(turn for end, turn in ends if end <= at)])
            bounds = [0, last, *(value for pair in inside for value in pair)]
            message = None if number is None else int(number)
            pieces.append(_Piece(literal, tuple(bounds), message))
            if message is not None:
                last = max(last, message)
                stop += len(f"\ue000{number}\ue001")
            at = stop
        return pieces


def _content_end(text: str, at: int, content: str, following: str, is_last: bool) -> int | None:
    """Where the content that begins at `at` ends, given the template's text after it; None if it is not there."""
    for form in dict.fromkeys((content, content.rstrip(), content.lstrip(), content.strip())):
        end = at + len(form)
        fits = text.startswith(form, at) and text.startswith(following, end)
        if fits and (not is_last or end + len(following) == len(text)):
            return end
    # A template may keep a part of a message, such as what follows a model's thoughts.
    end = len(text) - len(following) if is_last else text.find(following, at) if following else -1
    while at <= end:
        if text[at:end] in content and text.startswith(following, end):
            return end
        end = -1 if is_last else text.find(following, end + 1)
    return None


def _ambiguous(message: int | None) -> TemplateError:
    where = "its text" if message is None else f"message {message}"
    return TemplateError(f"the chat template rewrites {where}, so that no role could be given to its tokens")


def template_of(tokenizer: Any, text: str | None) -> ChatTemplate | None:
    """The template `text`, else the tokenizer's own; None if it has none."""
    source = text if text is not None else getattr(tokenizer, "chat_template", None)
    if isinstance(source, Mapping):
        source = source.get("default")
    if source is None:
        return None
    values = {name: str(value) for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return ChatTemplate(source, json.loads(json.dumps(values, sort_keys=True)))
