"""Probes and absorption on the topics of a store's documents, for any number of dictionaries."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.documents import documents_of
from pipelines.evaluation import probing
from pipelines.evaluation.absorption import Absorbed, absorption, absorption_figures
from pipelines.evaluation.given import Given
from pipelines.evaluation.pools import DocumentPools, Pool, choose_documents, pool_range
from pipelines.evaluation.reconstruction import Watcher
from pipelines.evaluation.record import Evaluation, Figure
from sae import Dictionary, Transcoder

Shared = tuple[dict[str, Figure], dict[str, list[float | None]]]
"""Figures, and AUROCs by topic."""


class TopicProbes:
    """Documents with a topic, pooled by every dictionary, and what is asked of the pools."""

    def __init__(self, given: Given, topics: list[str], train: NDArray[np.int64], test: NDArray[np.int64]) -> None:
        self._given, self._topics, self._train, self._test = given, topics, train, test
        self._held_out: dict[str, DocumentPools] = {}
        self._train_range = self._test_range = (0, 0)

    @classmethod
    def prepare(cls, given: Given) -> "TopicProbes | None":
        """The documents to probe; None where there are none with a topic."""
        settings, store = given.settings, given.store
        if not settings.probe_documents:
            return None
        documents = documents_of(store)
        if settings.probe_column not in documents.table.column_names:
            return None
        topics = ["" if value is None else str(value) for value in documents.column(settings.probe_column)]
        code = _codes(topics, settings.probe_exclude)
        ranges = {split: store.retained_range(split) for split in ("train", "heldout")}
        train, after_train = choose_documents(store, code, ranges["train"], settings.probe_documents)
        test, after_test = choose_documents(store, code, ranges["heldout"], settings.probe_documents)
        if probing.Task.of([topics[d] for d in train], [topics[d] for d in test], n_resamples=1, seed=0) is None:
            return None
        made = cls(given, topics, train, test)
        made._train_range = (ranges["train"][0], after_train)
        made._test_range = (ranges["heldout"][0], after_test)
        return made

    @property
    def n_contexts(self) -> int:
        """Contexts that are read besides the pass over the held-out split."""
        return self._train_range[1] - self._train_range[0]

    def watch(self, watchers: dict[str, list[Watcher]]) -> None:
        """Pool the test documents in the pass over the held-out split."""
        for name, dictionary in self._given.dictionaries.items():
            self._held_out[name] = DocumentPools(self._test, dictionary.d_in, dictionary.d_sae)
            watchers[name].append(self._held_out[name])

    def run(self, found: dict[str, Evaluation], advance: Callable[[float], None]) -> None:
        """Probe every dictionary; one hook's dictionaries share what does not depend on them."""
        given = self._given
        train = self._pool(given.dictionaries, self._train, self._train_range, advance)
        shared: dict[tuple[str, ...], probing.Baselines] = {}
        random: dict[tuple[Any, ...], Shared] = {}
        for name, evaluation in found.items():
            dictionary, pools = given.dictionaries[name], (train[name], self._held_out[name].finish())
            task = self._task(*pools)
            if task is None:
                evaluation.left_out["probes"] = "too few of the chosen documents have a counted token"
                continue
            hooks = dictionary.input_hooks
            if hooks not in shared:
                shared[hooks] = probing.baselines(*pools, task)
            k = max(1, round(evaluation.figures["l0"].value or 1))
            key = (hooks, dictionary.d_sae, k)
            if key not in random:
                random[key] = self._random(dictionary, k, task)
            figures, details = probing.probe_latents(*pools, task, given.seed)
            evaluation.figures |= shared[hooks].figures | random[key][0] | figures
            evaluation.details["probes"] = {
                "topics": list(task.topics),
                "n_train": len(pools[0]),
                "n_test": len(pools[1]),
                "latents": details["latents"],
                "auroc": shared[hooks].by_topic | random[key][1] | details["auroc"],
            }
            self._absorb(dictionary, pools, task, shared[hooks], evaluation)

    def _task(self, train: Pool, test: Pool) -> probing.Task | None:
        return probing.Task.of(
            [self._topics[d] for d in train.document.tolist()],
            [self._topics[d] for d in test.document.tolist()],
            n_resamples=self._given.settings.n_resamples,
            seed=self._given.seed,
        )

    def _random(self, dictionary: Dictionary, k: int, task: probing.Task) -> Shared:
        centre = np.concatenate([np.asarray(self._given.store.statistics(h).mean) for h in dictionary.input_hooks])
        made = probing.random_directions("", dictionary.d_in, dictionary.d_sae, k, centre)
        made.hook_names, made.hook_name = dictionary.input_hooks, dictionary.input_hooks[0]
        made.to(self._given.lm.device)
        of = {"": made}
        train = self._pool(of, self._train, self._train_range)[""]
        return probing.probe_random(train, self._pool(of, self._test, self._test_range)[""], task)

    def _pool(
        self,
        dictionaries: Mapping[str, Dictionary],
        documents: NDArray[np.int64],
        contexts: tuple[int, int],
        advance: Callable[[float], None] = lambda n: None,
    ) -> dict[str, Pool]:
        return pool_range(
            self._given.store,
            dictionaries,
            documents,
            contexts,
            sink_multiple=self._given.sink_multiple,
            selection=self._given.selection,
            advance=advance,
        )

    def _absorb(
        self,
        dictionary: Dictionary,
        pools: tuple[Pool, Pool],
        task: probing.Task,
        shared: probing.Baselines,
        evaluation: Evaluation,
    ) -> None:
        """Absorption of every topic."""
        if isinstance(dictionary.sae, Transcoder):
            evaluation.left_out["absorption"] = "a transcoder does not write to what the probe reads"
            return
        W_dec = dictionary.W_dec.float().cpu().numpy()
        results: dict[str, Absorbed | str] = {
            topic: absorption(*pools, task.train[t], task.test[t], task.fold, shared.dense, t, W_dec)
            for t, topic in enumerate(task.topics)
        }
        figures, details = absorption_figures(results, self._given.settings.n_resamples, self._given.seed)
        evaluation.figures |= figures
        evaluation.details["absorption"] = details
        if not figures:
            evaluation.left_out["absorption"] = "no topic's dense probe is good enough; details.absorption says why"


def why_no_probes(given: Given) -> str:
    """Why `TopicProbes.prepare` found nothing to probe."""
    if not given.settings.probe_documents:
        return "evaluate.probe_documents is 0"
    columns = documents_of(given.store).table.column_names
    if given.settings.probe_column not in columns:
        return f"the documents have no column {given.settings.probe_column!r}; they have {', '.join(columns)}"
    return (
        f"fewer than two values of the column {given.settings.probe_column!r} have {probing.MIN_TRAIN} training and "
        f"{probing.MIN_TEST} held-out documents"
    )


def _codes(topics: list[str], exclude: tuple[str, ...]) -> NDArray[np.int64]:
    """A number for each of the most frequent topics; -1 for documents of others, of none, or of an excluded one."""
    names, index, counts = np.unique(np.asarray(topics), return_inverse=True, return_counts=True)
    usable = ~np.isin(names, ("", *exclude))
    most = np.argsort(np.where(usable, -counts, 0), kind="stable")[: min(probing.MOST_TOPICS, int(usable.sum()))]
    code = np.full(len(names), -1)
    code[most] = np.arange(len(most))
    return code[index]
