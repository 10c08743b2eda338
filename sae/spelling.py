"""Token ids as pieces of readable text, one a token, that join to the text itself.

A tokenizer of bytes may cut one character into several tokens, none of which is text on its own. The first of them
gets the whole character and the others get "", so that a piece always belongs to its token or to the one before it.
"""

from collections.abc import Sequence
from typing import Any, Protocol

REPLACEMENT = "\ufffd"
_LONGEST = 8
"""Tokens among which the end of a character is looked for; UTF-8 has at most four bytes, accents follow."""


class Tokenizer(Protocol):
    """What is needed of a tokenizer: two methods that every Hugging Face tokenizer has."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]:
        """The vocabulary's own spelling."""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of consecutive tokens."""


class Speller:
    """Spells token ids; each id is looked up once.

    Raises: TypeError if the tokenizer lacks the two methods.
    """

    def __init__(self, tokenizer: Any) -> None:
        missing = [
            name for name in ("convert_ids_to_tokens", "convert_tokens_to_string") if not hasattr(tokenizer, name)
        ]
        if missing:
            raise TypeError(
                f"A tokenizer must have {' and '.join(missing)}, as those of transformers do, but "
                f"{type(tokenizer).__name__} has not. Pass the model's Hugging Face tokenizer."
            )
        self._tokenizer: Tokenizer = tokenizer
        self._raw: dict[int, str | None] = {}
        self._pieces: dict[int, str] = {}

    def piece(self, token: int) -> str:
        """One token on its own; what is no text by itself reads as U+FFFD. An id without a token is named."""
        known = self._pieces.get(token)
        if known is None:
            known = self._pieces[token] = self._look_up(token)
        return known

    def spell(self, tokens: Sequence[int]) -> list[str]:
        """The piece of each token; joined, they are the text."""
        pieces = [self.piece(token) for token in tokens]
        at = 0
        while at < len(pieces):
            if REPLACEMENT in pieces[at]:
                at = self._mend(tokens, pieces, at)
            else:
                at += 1
        return pieces

    def _mend(self, tokens: Sequence[int], pieces: list[str], start: int) -> int:
        """Put the tokens of a cut character together in place; returns where to go on."""
        for stop in range(start + 2, min(start + _LONGEST, len(pieces)) + 1):
            if REPLACEMENT not in pieces[stop - 1]:
                break
            text = self._join([self._raw[token] or "" for token in tokens[start:stop]])
            if REPLACEMENT not in text:
                pieces[start:stop] = [text, *[""] * (stop - start - 1)]
                return stop
        return start + 1

    def _look_up(self, token: int) -> str:
        try:
            (raw,) = self._tokenizer.convert_ids_to_tokens([token])
        except (IndexError, OverflowError, KeyError):
            raw = None
        self._raw[token] = raw
        if raw is None:
            return f"<unused {token}>"
        # SentencePiece marks a leading space with "▁", which converting a lone token would drop.
        text = self._join([raw])
        return " " + text.removeprefix(" ") if raw.startswith("▁") else text

    def _join(self, raw: list[str]) -> str:
        return self._tokenizer.convert_tokens_to_string(raw)
