"""Look at a text through a dictionary: its tokens, and the latents that fire on each.

    shown = dictionary.show("The river rose.", model=model, tokenizer=tokenizer)

In a terminal `print(shown)` is a table; in a notebook it is the text, its tokens coloured and named on hover. Both are
made in `sae.rendering`.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.base import SparseLatents
from sae.naming import torch_module
from sae.spelling import Speller

if TYPE_CHECKING:
    from sae.dictionary import Dictionary

_FEATURE_PAGE = Path("pages") / "feature.html"


class Firing(NamedTuple):
    """A latent that fires on a token, and how strongly."""

    latent: int
    activation: float


@dataclass(frozen=True)
class ShownToken:
    """One token of the text."""

    position: int
    token_id: int
    piece: str
    """Its text; "" where it is a part of the character that the token before it begins."""
    counted: bool
    """False where training left such tokens out: the first position and attention sinks. Their latents mean nothing
    and are not shown."""
    n_active: int
    """Latents that fire on it, shown or not."""
    firings: tuple[Firing, ...]
    """The strongest of them, strongest first."""
    role: str | None = None
    """Who wrote it, in a chat."""


@dataclass(frozen=True)
class Shown:
    """What a dictionary sees in a text. `str()` is a table; a notebook shows it in colours."""

    tokens: tuple[ShownToken, ...]
    labels: Mapping[int, str] = field(repr=False)
    """Of the shown latents that have one."""
    top_tokens: Mapping[int, Sequence[str]] = field(repr=False, default_factory=dict)
    """What shown latents fire on most, where the feature table says."""
    n_left_out: int = 0
    """Tokens at the end of the text that were not read, being more than `max_tokens`."""
    pages: str | None = None
    """URL of the dictionary's feature page, to which "#" and a latent are added; None if it has no pages."""

    def strongest(self, n: int = 10) -> list[tuple[Firing, ShownToken]]:
        """The `n` latents that fire most strongly in the text, each with the (first) token of where it does."""
        best: dict[int, tuple[Firing, ShownToken]] = {}
        for group in grouped(self.tokens):
            for firing in group.firings:
                if firing.latent not in best or firing.activation > best[firing.latent][0].activation:
                    best[firing.latent] = (firing, group.tokens[0])
        return sorted(best.values(), key=lambda found: (-found[0].activation, found[0].latent))[:n]

    def page_of(self, latent: int) -> str | None:
        """URL of a latent's page, if there is one."""
        return None if self.pages is None else f"{self.pages}#{latent}"

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON values."""

        def plain(firing: Firing) -> dict[str, Any]:
            return {
                "latent": firing.latent,
                "activation": firing.activation,
                "label": self.labels.get(firing.latent),
                "page": self.page_of(firing.latent),
            }

        tokens = [
            {
                "position": token.position,
                "token_id": token.token_id,
                "text": token.piece,
                **({} if token.role is None else {"role": token.role}),
                "counted": token.counted,
                "n_active": token.n_active,
                "latents": [plain(firing) for firing in token.firings],
            }
            for token in self.tokens
        ]
        strongest = [plain(firing) | {"position": token.position} for firing, token in self.strongest()]
        return {"tokens": tokens, "strongest": strongest, "n_left_out": self.n_left_out}

    def __str__(self) -> str:
        from sae.rendering import plain_text

        return plain_text(self)

    def _repr_html_(self) -> str:
        from sae.rendering import html_fragment

        return html_fragment(self)


Text = str | Sequence[Mapping[str, str]] | Sequence[int] | Tensor
"""A text, chat messages, or token ids, as integers [seq] or [1, seq]."""


@torch.no_grad()
def show(
    dictionary: "Dictionary",
    text: Text,
    model: Any,
    tokenizer: Any = None,
    *,
    n: int = 3,
    labelled: bool = False,
    max_tokens: int = 512,
    hook_name: str | None = None,
) -> Shown:
    """See `Dictionary.show`."""
    if n < 1 or max_tokens < 1:
        raise ValueError(f"`n` and `max_tokens` must be at least 1, got {n} and {max_tokens}. Ask for more.")
    root = torch_module(model)
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ValueError(
            f"A tokenizer is needed to read the text, but none was given and {type(model).__name__} has none of its "
            "own. Pass `tokenizer`."
        )
    speller = Speller(tokenizer)
    ids = _token_ids(text, tokenizer, bool(dictionary.metadata.get("prepend_bos")))
    if not ids:
        raise ValueError(f"A text must hold at least one token, got {text!r}. Pass a longer one.")
    kept = ids[: min(max_tokens, _longest(root))]
    device = next(root.parameters()).device
    with dictionary.attach(model, exclude=dictionary.sinks, hook_name=hook_name) as tap:
        root(torch.tensor([kept], device=device), **_last_logits_only(root))
    x, counted = tap.x.reshape(len(kept), -1), tap.counted.reshape(-1).cpu()
    labels = _column(dictionary, "label")
    firings, n_active = _strongest(dictionary, x, counted, n, set(labels) if labelled else None)
    shown = {firing.latent for some in firings for firing in some}
    tokens = (
        ShownToken(i, token, piece, bool(counted[i]), n_active[i], firings[i])
        for i, (token, piece) in enumerate(zip(kept, speller.spell(kept), strict=True))
    )
    return Shown(
        tuple(tokens),
        {latent: label for latent, label in labels.items() if latent in shown},
        {latent: words for latent, words in _column(dictionary, "top_tokens").items() if latent in shown},
        len(ids) - len(kept),
        _pages(dictionary),
    )


def _column(dictionary: "Dictionary", name: str) -> dict[int, Any]:
    """A column of the feature table by latent, without what is missing or empty; {} where there is none."""
    table = dictionary.features
    if table is None or not {"latent", name} <= set(table.column_names):
        return {}
    pairs = zip(table["latent"].to_pylist(), table[name].to_pylist(), strict=True)
    return {latent: value for latent, value in pairs if value}


def _strongest(
    dictionary: "Dictionary",
    x: Float[Tensor, "seq d_in"],
    counted: Bool[Tensor, " seq"],
    n: int,
    wanted: set[int] | None,
) -> tuple[list[tuple[Firing, ...]], list[int]]:
    """The n strongest firings of each token among the wanted latents, and how many latents fire on it."""
    places = counted.nonzero().reshape(-1)
    found: SparseLatents = dictionary.encode_sparse(x[places.to(x.device)])
    rows = places[found.row.cpu()].tolist()
    by_token: list[list[Firing]] = [[] for _ in range(len(counted))]
    for row, latent, value in zip(rows, found.latent.tolist(), found.value.tolist(), strict=True):
        by_token[row].append(Firing(latent, value))
    firings = [
        sorted((f for f in all_ if wanted is None or f.latent in wanted), key=lambda f: (-f.activation, f.latent))[:n]
        for all_ in by_token
    ]
    return [tuple(some) for some in firings], [len(all_) for all_ in by_token]


def _token_ids(text: Text, tokenizer: Any, prepend_bos: bool) -> list[int]:
    if isinstance(text, Tensor):
        if text.ndim > 2 or (text.ndim == 2 and len(text) != 1) or text.is_floating_point():
            raise ValueError(f"Token ids must be integers of one text, got shape {tuple(text.shape)} {text.dtype}.")
        return [int(token) for token in text.reshape(-1).tolist()]
    if not isinstance(text, str):
        items: list[Any] = list(text)
        if all(isinstance(item, int) for item in items):
            return items
        return _chat_ids(items, tokenizer)
    lead = [tokenizer.bos_token_id] if prepend_bos and tokenizer.bos_token_id is not None else []
    return lead + _tokenised(text, tokenizer)


def _chat_ids(messages: list[Any], tokenizer: Any) -> list[int]:
    wrong = [m for m in messages if not isinstance(m, Mapping) or not {"role", "content"} <= m.keys()]
    if wrong:
        raise ValueError(f"A chat must be a list of {{'role', 'content'}}, but one of its messages is {wrong[0]!r}.")
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("A chat needs a chat template, but this tokenizer has none. Pass the text itself.")
    return _tokenised(tokenizer.apply_chat_template(messages, tokenize=False), tokenizer)


def _tokenised(text: str, tokenizer: Any) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"A text must be valid Unicode, but character {error.start} is half of a pair.") from error
    # As in collection: special tokens are ours to place.
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def _longest(root: Any) -> int:
    """Positions that the model has, where it says."""
    config = getattr(root, "config", None)
    sizes = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "n_ctx"))
    return next((size for size in sizes if isinstance(size, int) and size > 0), 2**31)


def _last_logits_only(root: Any) -> dict[str, int]:
    """Models that can are spared the logits of every token, the largest tensor of the pass."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(root.forward).parameters else {}


def _pages(dictionary: "Dictionary") -> str | None:
    page = None if dictionary.path is None else dictionary.path / _FEATURE_PAGE
    return page.resolve().as_uri() if page is not None and page.exists() else None


class Group(NamedTuple):
    """Tokens that make one piece of text: one, and those after it whose piece is empty."""

    tokens: list[ShownToken]
    firings: list[Firing]
    """The strongest of each latent on any of them; as many as a token may have."""


def grouped(tokens: Sequence[ShownToken]) -> Iterator[Group]:
    """The pieces of text in order."""
    starts = [i for i, token in enumerate(tokens) if token.piece != "" or i == 0]
    for start, stop in pairwise([*starts, len(tokens)]):
        group = list(tokens[start:stop])
        best: dict[int, Firing] = {}
        for firing in sorted((f for token in group for f in token.firings), key=lambda f: (-f.activation, f.latent)):
            best.setdefault(firing.latent, firing)
        yield Group(group, list(best.values())[: max(len(token.firings) for token in group)])
