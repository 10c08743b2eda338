"""Everybody's labels of a dictionary in one table, as part of the label stage or after an import.

Ours are recomputed; those of other people come from the shelf, and are tested again. What features.parquet shows as
`label` is the first of `label.prefer` that passed every test, else our rule if it passed the held-out one.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import RunConfig
from pipelines.errors import RunError
from pipelines.labels.external.shelf import Shelf
from pipelines.labels.features import passes
from pipelines.labels.llm.budget import Budget
from pipelines.labels.llm.ledger import Ledger
from pipelines.labels.llm.worker import Worker
from pipelines.labels.neighbours import nearest_neighbours
from pipelines.labels.others import Ask, Material, Others, OthersSummary
from pipelines.labels.rows import Row, preferred, replace_rows, row
from pipelines.labels.stage import read_token_table
from pipelines.labels.tables import ParquetFile
from pipelines.progress import Reporter
from pipelines.rundir import RunDir
from sae import Dictionary
from storage import ActivationStore, LatentStore

PREDICATE = "predicate"
_SHARED = (
    *(
        f"{test}{end}"
        for test in (
            "detection_random",
            "detection_same_token",
            "detection_same_document",
            "detection_neighbour",
            "fuzz",
        )
        for end in ("", "_low", "_high")
    ),
    *("tpr_by_decile", "p_value", "mismatch_rank", "n_mismatch", "neighbour_rank", "n_neighbour"),
)
"""Columns that features.parquet and labels.parquet both have."""
_N_NEIGHBOURS = 20


class Gathered(NamedTuple):
    """What gathering did."""

    figures: dict[str, Any]
    """For metrics.json."""
    summaries: tuple[OthersSummary, ...]
    trouble: RunError | None
    """Why endpoints could not be asked to the end; rows that they left are `waiting`."""


def gather(
    config: RunConfig,
    run: RunDir,
    name: str,
    store: ActivationStore,
    latents: LatentStore,
    dictionary: Dictionary,
    token_strings: Sequence[str],
    ui: Reporter,
    *,
    only: frozenset[str] | None = None,
) -> Gathered:
    """Write labels.parquet of an SAE whose rules are fitted and tested, and the labels that features.parquet shows.

    Args:
        only: test these sources of the shelf and leave all other rows as they are.
    """
    folder, llm = run.labels(name), config.label.llm
    shelved = [label for label in Shelf(run.imports(name)).all() if only is None or label.source in only]
    explains = only is None and llm is not None and llm.explainer is not None
    rows: list[Row] = []
    summaries: list[OthersSummary] = []
    trouble = None
    if shelved or explains:
        material = Material(
            read_token_table(store, config.hook_of(name), config.sinks.multiple, selection=config.selection("label")),
            latents,
            nearest_neighbours(dictionary.W_dec, _N_NEIGHBOURS)[0],
            token_strings,
            folder,
            config.seed,
            config.label.min_detection,
        )
        with ExitStack() as stack:
            ask = stack.enter_context(_asking(config, run)) if llm is not None else None
            others = Others(material, llm, ask, ui)
            found = [others.explain()] if explains else []
            found += [others.shelved(list(group)) for _, group in groupby(shelved, key=lambda label: label.source)]
        trouble = others.trouble
        for of_source, summary in found:
            rows += of_source
            summaries.append(summary)
            _tell(ui, summary, trouble)
    if only is None:
        rows = [*_predicate_rows(folder), *rows]
    sources = {label.source for label in shelved}

    def ours(source: str) -> bool:
        return source in sources or (only is None and (source == PREDICATE or source.startswith("llm:")))

    table = replace_rows(folder, rows, ours)
    _show_preferred(folder, preferred(table, config.label.prefer), config.label.min_detection)
    figures = {key: value for summary in summaries for key, value in _figures(summary).items()}
    if llm is not None:
        figures |= _account(run)
    run.event("labels gathered", sae=name, sources=[summary.for_json() for summary in summaries])
    return Gathered(figures, tuple(summaries), trouble)


@contextmanager
def _asking(config: RunConfig, run: RunDir) -> Iterator[Ask]:
    """A way to the endpoints, from here or through Ray; the budget is the run's, over all attempts."""
    llm = config.label.llm
    assert llm is not None
    budget = Budget(llm.budget, Ledger(run.llm).account().spent)
    if llm.n_workers:
        from pipelines.cluster.labelling import LabellerPool

        with LabellerPool(llm, config.ray, run.llm) as pool:
            yield lambda tasks: pool.run(tasks, budget)
    else:
        with Worker(llm, run.llm) as worker:
            yield lambda tasks: worker.run(tasks, budget)


def _predicate_rows(folder: Path) -> list[Row]:
    """Rows of the fitted rules, from features.parquet."""
    columns = {
        "latent": "latent",
        "candidate": "label",
        "survives": "passed",
        "rule": "rule",
        "detection_tpr": "tpr",
        "detection_precision": "precision",
        "detection_balanced_accuracy": "tested",
        **{name: name for name in _SHARED},
    }
    found = pq.read_table(folder / "features.parquet", columns=list(columns)).rename_columns(list(columns.values()))
    rows = []
    for rule in found.to_pylist():
        status = "abstained" if rule["label"] is None else "untested" if rule["tested"] is None else "tested"
        rows.append(
            row(
                rule["latent"],
                PREDICATE,
                rule["label"],
                status,
                passed=rule["passed"] if status == "tested" else None,
                method=rule["rule"],
                judge=PREDICATE if status == "tested" else None,
                tpr=rule["tpr"],
                precision=rule["precision"],
                **{name: rule[name] for name in _SHARED},
            )
        )
    return rows


def _show_preferred(folder: Path, chosen: dict[int, Row], min_detection: float) -> None:
    """Set label, label_kind, labelled and label_source of features.parquet; nothing else changes.

    Where no preferred label passed every test, the fitted rule stays if it passed its own (see `features`).
    """
    file = folder / "features.parquet"
    table = pq.read_table(file)
    shown = {name: table[name].to_pylist() for name in ("label", "label_kind", "labelled", "label_source")}
    families, latents = table["rule_family"].to_pylist(), table["latent"].to_pylist()
    candidates = table["candidate"].to_pylist()
    low = table["detection_low"].to_numpy(zero_copy_only=False)
    own = passes(low, table["detection_mismatch_p"].to_numpy(zero_copy_only=False), min_detection)
    for i, latent in enumerate(latents):
        best = chosen.get(latent)
        if best is None and not own[i]:
            silent = shown["label_kind"][i] == "silent"
            label, kind, source = None, "silent" if silent else "unlabelled", None
        elif best is None or best["source"] == PREDICATE:
            label, kind, source = candidates[i], families[i], PREDICATE
        else:
            source = best["source"]
            label, kind = best["label"], source.partition(":")[0]
        for column, value in zip(shown.values(), (label, kind, source is not None, source), strict=True):
            column[i] = value
    for column_name, values in shown.items():
        at = table.schema.get_field_index(column_name)
        table = table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))
    with ParquetFile(file, table.schema) as written:
        written.write({column_name: table[column_name] for column_name in table.column_names})


def _figures(summary: OthersSummary) -> dict[str, Any]:
    """Flat figures: label_llm_n_passed …, label_human_Ada_share_passed …"""
    whose = "llm" if summary.source.startswith("llm:") else re.sub(r"[^A-Za-z0-9]+", "_", summary.source).strip("_")
    plain = {key: value for key, value in summary._asdict().items() if key not in ("source", "failures", "cost")}
    plain["n_failed_calls"] = sum(summary.failures.values())
    if summary.cost.calls:
        plain |= summary.cost._asdict()
    return {f"label_{whose}_{key}": value for key, value in plain.items()}


def _account(run: RunDir) -> dict[str, Any]:
    """What the run has spent on language models, over all attempts."""
    account = Ledger(run.llm).account()
    spent = {f"label_llm_spent_{key}": value for key, value in account.spent._asdict().items()}
    return spent | {
        "label_llm_n_lost_calls": account.n_lost,
        "label_llm_n_estimated_calls": account.n_estimated,
    }


def _tell(ui: Reporter, summary: OthersSummary, trouble: RunError | None) -> None:
    share = "" if summary.share_passed is None else f", {summary.share_passed:.0%} of those tested passed"
    failed = sum(summary.failures.values())
    advice = "" if trouble else ": raise label.llm.budget and rerun"
    parts = [
        f"{summary.n_labelled} of {summary.n_asked} latents have a label{share}",
        f"{summary.n_failed} failed" if summary.n_failed else "",
        f"{failed} calls without a usable answer" if failed else "",
        f"{summary.n_waiting} wait{advice}" if summary.n_waiting else "",
    ]
    ui.say(f"labels by {summary.source}: " + "; ".join(filter(None, parts)))
