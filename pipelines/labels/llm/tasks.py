"""From rows of a token table to the texts that the explainer and the judge see."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.labels.families import TokenTable
from pipelines.labels.llm.questions import Passage
from pipelines.labels.llm.settings import LLMConfig
from pipelines.labels.llm.worker import Task
from pipelines.labels.testset import window_bounds
from pipelines.labels.trials import Trials, of_latent


class Reader:
    """Texts of windows."""

    def __init__(self, table: TokenTable, token_strings: Sequence[str], window: int) -> None:
        self._table, self._strings, self._window = table, token_strings, window

    def passages(self, centre: NDArray[np.int64], marked: NDArray[np.int64] | None = None) -> tuple[Passage, ...]:
        """The window around each centre; with `marked`, one token row of each window marked."""
        first, last = window_bounds(centre, self._table, self._window)
        found = []
        for i, (a, b) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
            tokens = tuple(self._strings[token] for token in self._table.token[a : b + 1].tolist())
            found.append(Passage(tokens, () if marked is None else (int(marked[i]) - a,)))
        return tuple(found)


def make_tasks(
    labels: Mapping[int, str | None],
    trials: Trials,
    reader: Reader,
    passages: Mapping[int, tuple[Passage, ...]],
    promotes: Mapping[int, tuple[str, ...]],
) -> list[Task]:
    """A task for each latent; of one that never fires on held-out documents nothing is asked of the judge.

    Args:
        labels: to be judged; None where the explainer is to give one.
        passages, promotes: for those.
    """
    tasks = []
    for latent, label in labels.items():
        asked, fuzzed = of_latent(trials.detect, latent), of_latent(trials.fuzz, latent)
        detectable = (trials.detect.kind[asked] == 0).any()
        tasks.append(
            Task(
                latent,
                label,
                passages.get(latent, ()) if label is None else (),
                promotes.get(latent, ()) if label is None else (),
                reader.passages(trials.detect.centre[asked]) if detectable else (),
                reader.passages(trials.fuzz.centre[fuzzed], trials.fuzz.row[fuzzed]) if detectable else (),
                reader.passages(trials.others[latent].centre) if detectable else (),
            )
        )
    return tasks


def train_passages(
    file: Path, latents: Sequence[int], token_strings: Sequence[str], n_contexts: int
) -> dict[int, tuple[Passage, ...]]:
    """Train contexts of examples.parquet with the firing tokens marked: half the strongest, half from all strengths."""
    columns = ["latent", "kind", "rank", "token_ids", "values"]
    found = pq.read_table(file, columns=columns, filters=[("latent", "in", list(latents))]).to_pylist()
    by_latent: dict[int, dict[str, list[Passage]]] = {}
    # Quantiles are numbered from the weakest; the explainer sees strong ones first.
    found.sort(key=lambda row: row["rank"] if row["kind"] == "top" else -row["rank"])
    for row in found:
        tokens = tuple(token_strings[token] for token in row["token_ids"])
        marked = tuple(i for i, value in enumerate(row["values"]) if value > 0)
        by_latent.setdefault(row["latent"], {}).setdefault(row["kind"], []).append(Passage(tokens, marked))
    return {latent: _mixed(kinds, n_contexts) for latent, kinds in by_latent.items()}


def _mixed(kinds: Mapping[str, list[Passage]], n: int) -> tuple[Passage, ...]:
    top, spread = kinds.get("top", []), [p for kind, found in kinds.items() if kind != "top" for p in found]
    n_spread = min(len(spread), max(n // 2, n - len(top)))
    chosen = [spread[len(spread) * i // n_spread] for i in range(n_spread)]
    return (*top[: n - len(chosen)], *chosen)


def choose_latents(config: LLMConfig, live: NDArray[np.int64], d_sae: int, seed: int) -> list[int]:
    """The latents to explain, ascending: those listed, all live ones, or so many live ones drawn by seed.

    Raises:
        ValueError: a listed latent that the dictionary does not have.
    """
    if isinstance(config.latents, tuple):
        beyond = [latent for latent in config.latents if latent >= d_sae]
        if beyond:
            raise ValueError(f"label.llm.latents lists {beyond[0]}, but the dictionary has latents 0 to {d_sae - 1}.")
        return sorted(config.latents)
    if config.latents == "all":
        return [int(latent) for latent in live]
    drawn = np.random.default_rng([seed, 1]).permutation(live)[: config.latents]
    return [int(latent) for latent in np.sort(drawn)]
