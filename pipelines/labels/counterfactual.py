"""Does a latent do what its label says when the text is changed? The model and the SAE run again on edited contexts.

For some held-out documents of a latent, one firing in each, the text up to the firing token (which a causal model sees)
is edited and the activation a' at the last token compared with the unedited a:

    same        the trigger is swapped for another token with which the label still holds: should stay on
    other       it is swapped for a token of like frequency with which the label does not hold: should go off
    context     only the last 0, 1, 2, 4, … tokens before the firing token are kept, behind one neutral token:
                the shortest that suffices says whether the latent reads a token or a token in context

*On* means a' >= kept * a. What the trigger is and which tokens stand in for it says `swaps`; a label about a topic or a
position has no trigger and no swaps. `same` is left out where no other token fits, as with a label of one token. Shares
come with 95 % intervals over documents, each of which counts once (Wilson, `scores.clustered_rate`). A latent is a
`token` latent if the lower bound of the share of documents that need no context is above one half, a `token in context`
latent if the upper bound is below it.

Reference for the shortest sufficient context: Foote et al. 2023, arXiv:2305.19911, section 3 (pruning). Differs: by
halving from the far end, not token by token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.labels.families import TokenTable
from pipelines.labels.in_model_settings import EditsConfig
from pipelines.labels.rerun import Activations, Text, piece_up_to
from pipelines.labels.scores import clustered_rate
from pipelines.labels.swaps import Corpus, Holds, Swaps

_SHOWN = 6

COLUMNS = pa.schema(
    [
        ("edit_documents", pa.int32()),  # documents whose activation the shortened text of `max_context` keeps
        ("edit_too_long", pa.int32()),  # documents that need more context than that
        ("edit_kind", pa.string()),  # token, token in context, mixed
        ("edit_token_share", pa.float32()),  # of documents in which the token alone suffices
        ("edit_token_low", pa.float32()),
        ("edit_token_high", pa.float32()),
        ("edit_context", pa.float32()),  # median number of tokens before the firing token that suffices
        ("edit_trigger", pa.int32()),  # how many tokens before the firing token the label reads; null: no one token
        ("edit_same_on", pa.float32()),  # share that stays on under `same`
        ("edit_same_low", pa.float32()),
        ("edit_same_high", pa.float32()),
        ("edit_same_n", pa.int32()),
        ("edit_other_off", pa.float32()),  # share that goes off under `other`
        ("edit_other_low", pa.float32()),
        ("edit_other_high", pa.float32()),
        ("edit_other_n", pa.int32()),
        ("edit_swaps", pa.list_(pa.field("element", pa.string()))),  # some of the swaps: token, its stand-in, a' / a
    ]
)


class Firing(NamedTuple):
    """One firing of one latent in a held-out document."""

    latent: int
    row: int
    value: float


def choose_firings(
    latent: int, row: NDArray[np.int64], value: NDArray[np.float32], table: TokenTable, n: int, seed: int
) -> list[Firing]:
    """Up to `n` held-out firings in different documents, drawn from the stronger half of the documents' strongest.

    Args:
        row, value: the latent's firings on usable held-out tokens.
    """
    by = np.lexsort((row, -value))
    first = np.sort(np.unique(table.document[row[by]], return_index=True)[1])  # strongest document first
    strong = by[first][: max(n, -(-len(first) // 2))]
    drawn = np.random.default_rng([seed, latent]).permutation(strong)[:n]
    return [Firing(latent, int(row[i]), float(value[i])) for i in np.sort(drawn)]


def shortened(corpus: Corpus, row: int, n_before: int) -> Text:
    """The text up to a token row with `n_before` tokens before it; the whole document piece where it has no more."""
    piece = piece_up_to(corpus.table, row)
    if len(piece) - 1 <= n_before:
        return piece
    return np.append(corpus.anchor, piece[len(piece) - 1 - n_before :]).astype(np.int32)


def run_edits(
    firings: Sequence[Firing],
    corpus: Corpus,
    rerun: Activations,
    holds: Holds,
    settings: EditsConfig,
    *,
    seed: int,
) -> dict[int, "EditScores"]:
    """Edit the contexts of some latents and run them again, by latent."""
    steps = _steps(settings.max_context)
    texts = [shortened(corpus, firing.row, n) for firing in firings for n in steps]
    latents = np.array([firing.latent for firing in firings], np.int64)
    activation = rerun.last(texts, np.repeat(latents, len(steps))).reshape(-1, len(steps))
    whole = activation[:, -1]
    stored = np.array([firing.value for firing in firings], np.float32)
    known = (whole >= settings.kept * stored) & (whole > 0)
    enough = (activation >= settings.kept * whole[:, None]).argmax(1)
    needed = np.array(steps)[enough]

    kept = np.flatnonzero(known)
    base = [texts[(i + 1) * len(steps) - 1] for i in kept.tolist()]
    swaps = Swaps(corpus, base, latents[kept], [firings[i].row for i in kept.tolist()], holds, seed)
    trigger = swaps.trigger()
    tried = {name: swaps.make(name, trigger) for name in ("same", "other")}
    edited = [text for name in tried for text in tried[name].texts]
    again = rerun.last(edited, np.concatenate([latents[kept][swap.which] for swap in tried.values()]))
    share = dict(zip(tried, np.split(again, [len(tried["same"].texts)]), strict=True))
    share = {name: a / whole[kept][tried[name].which] for name, a in share.items()}

    scores = {}
    for latent in dict.fromkeys(latents.tolist()):
        mine = latents == latent
        on = {name: share[name][latents[kept][swap.which] == latent] >= settings.kept for name, swap in tried.items()}
        said = [
            swap.said[i] + f": {share[name][i]:.0%}"
            for name, swap in tried.items()
            for i in np.flatnonzero(latents[kept][swap.which] == latent)[: _SHOWN // 2].tolist()
        ]
        scores[latent] = EditScores(
            n_too_long=int((mine & ~known).sum()),
            needed=needed[mine & known],
            trigger=trigger.get(latent),
            same_on=on["same"],
            other_off=~on["other"],
            swaps=said,
        )
    return scores


def _steps(max_context: int) -> list[int]:
    """0, 1, 2, 4, … and max_context."""
    powers = [2**i for i in range(max_context.bit_length()) if 2**i < max_context]
    return [0, *powers, max_context]


class EditScores(NamedTuple):
    """What one latent did under edits; an entry per document where not said otherwise."""

    n_too_long: int
    needed: NDArray[np.int64]
    """Tokens before the firing token that suffice."""
    trigger: int | None
    same_on: NDArray[np.bool_]
    other_off: NDArray[np.bool_]
    swaps: list[str]

    def row(self) -> dict[str, object]:
        """The values of `COLUMNS`; a share without documents is None."""
        token, same, other = (_share(outcomes) for outcomes in (self.needed == 0, self.same_on, self.other_off))
        n = len(self.needed)
        kind = "token" if token.low > 0.5 else "token in context" if token.high < 0.5 else "mixed"
        return {
            "edit_documents": n,
            "edit_too_long": self.n_too_long,
            "edit_kind": kind if n else None,
            **_named("edit_token", "share", token),
            "edit_context": float(np.median(self.needed)) if n else None,
            "edit_trigger": self.trigger,
            **_named("edit_same", "on", same),
            "edit_same_n": len(self.same_on),
            **_named("edit_other", "off", other),
            "edit_other_n": len(self.other_off),
            "edit_swaps": self.swaps,
        }


class _Share(NamedTuple):
    rate: float
    low: float
    high: float


def _share(outcomes: NDArray[np.bool_]) -> _Share:
    """Share of documents with its interval; NaN without documents."""
    successes = outcomes.astype(np.int64)[None]
    rate, low, high = clustered_rate(successes, np.ones_like(successes), 0.95)
    return _Share(float(rate[0]), float(low[0]), float(high[0]))


def _named(prefix: str, name: str, share: _Share) -> dict[str, float | None]:
    values = {f"{prefix}_{name}": share.rate, f"{prefix}_low": share.low, f"{prefix}_high": share.high}
    return {key: None if np.isnan(value) else value for key, value in values.items()}
