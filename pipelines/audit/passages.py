"""Examples as the model reads them: texts as they are, chats through its template with the tokens that count."""

import json
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from pipelines.audit.examples import Example, Position
from pipelines.chat import ROLES
from pipelines.encode import Passage, passages_of
from pipelines.errors import UsageError
from pipelines.models import LanguageModel
from pipelines.tokenising import Encoder, TextTokenizer


def passages_of_examples(
    lm: LanguageModel, examples: Sequence[Example], *, max_tokens: int, prepend_bos: bool
) -> list[Passage]:
    """One passage an example, in their order.

    A text is cut at its end; a chat whose answer or last prompt token counts, at its beginning, so that they stay.

    Raises:
        UsageError: a chat without a chat template, or one that the template refuses or rewrites.
    """
    plain = [i for i, e in enumerate(examples) if e.messages is None]
    found = dict(
        zip(
            plain,
            passages_of(lm, [examples[i].text for i in plain], max_tokens=max_tokens, prepend_bos=prepend_bos),
            strict=True,
        )
    )
    chats = [i for i, e in enumerate(examples) if e.messages is not None]
    if chats:
        tokenizer = TextTokenizer.of(lm.tokenizer)
        if tokenizer.template is None:
            raise UsageError(
                f"example {examples[chats[0]].digest} is a chat, but {lm.model_id} has no chat template: give "
                "texts, or a model that was trained on chats"
            )
        encoded = Encoder(tokenizer, "chat").encode(
            [examples[i].digest for i in chats], [json.dumps(examples[i].messages).encode() for i in chats]
        )
        assert encoded.role is not None
        assert encoded.turn is not None
        ends = np.cumsum(encoded.lengths)
        for i, stop, length in zip(chats, ends.tolist(), encoded.lengths.tolist(), strict=True):
            piece = slice(stop - length, stop)
            counted = counted_tokens(encoded.role[piece], encoded.turn[piece], examples[i].position)
            found[i] = _cut(encoded.tokens[piece].tolist(), counted, examples[i].position, max_tokens)
    return [found[i] for i in range(len(examples))]


def counted_tokens(
    role: Int[np.ndarray, " n_tokens"], turn: Int[np.ndarray, " n_tokens"], position: Position
) -> Bool[np.ndarray, " n_tokens"]:
    """Which tokens of a chat the position rule pools."""
    match position:
        case "all":
            return np.ones(role.size, dtype=bool)
        case "user" | "assistant":
            return np.asarray(role == ROLES[position])
        case "last_prompt_token":
            # The token before the last answer; of a chat that ends with its prompt, the last one.
            answer = np.flatnonzero(role == ROLES["assistant"])
            last = role.size - 1
            if answer.size and turn[answer[-1]] == turn.max():
                last = int(answer[turn[answer] == turn[answer[-1]]][0]) - 1
            counted = np.zeros(role.size, dtype=bool)
            counted[max(last, 0)] = True
            return counted


def _cut(ids: list[int], counted: Bool[np.ndarray, " n_tokens"], position: Position, max_tokens: int) -> Passage:
    keep = slice(-max_tokens, None) if position in ("assistant", "last_prompt_token") else slice(max_tokens)
    if position == "last_prompt_token":
        stop = int(np.flatnonzero(counted)[0]) + 1
        keep = slice(max(0, stop - max_tokens), stop)
    return Passage(ids[keep], counted[keep].tolist(), cut=len(ids) > max_tokens)
