"""labels.parquet: a row per latent and source, so that everybody's label of a latent stands beside everybody else's.

    source      predicate, llm:MODEL, neuronpedia[:METHOD], delphi, csv:NAME, human:NAME
    status      tested      the columns of the tests are filled
                abstained   the author found nothing in common; there is no label and no test
                failed      the author gave no usable answer; every question counts as answered wrongly
                waiting     the budget did not suffice, or the endpoint went down; a rerun continues
                untested    there are no held-out windows to test it on
    judge       what answered in the label's name: predicate (the rule itself), llm:MODEL, lexical (see `lexical`)

Whoever writes rows replaces those of its own sources and keeps the rest. What a test is stands in `testset` and
`verdicts`; a question without an answer counts as answered wrongly in every column.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import RunError
from pipelines.labels.tables import ParquetFile

LABELS_FILE = "labels.parquet"
SCHEMA_VERSION = "1"
KINDS = ("random", "same_token", "same_document", "neighbour")

_SHARES = [
    (f"{name}{end}", pa.float32())
    for name in ("tpr", "precision", *(f"detection_{kind}" for kind in KINDS), "fuzz")
    for end in ("", "_low", "_high")
]
LABELS = pa.schema(
    [
        ("latent", pa.int32()),
        ("source", pa.string()),
        ("label", pa.string()),  # null where the author abstained or failed
        ("status", pa.string()),
        ("passed", pa.bool_()),  # survives every test (`verdicts.surviving`); null unless tested or failed
        ("author", pa.string()),
        ("date", pa.string()),  # ISO 8601, as the author gave it; null for what this run made
        ("note", pa.string()),
        ("method", pa.string()),  # how the label was made: JSON
        ("judge", pa.string()),
        *_SHARES,  # with 95 % intervals, documents as clusters; detection_*, fuzz: balanced accuracy, 0.5 is chance
        ("tpr_by_decile", pa.list_(pa.field("element", pa.float32()))),  # weakest tenth of the firings first
        ("p_value", pa.float64()),  # the larger of those against same_token and same_document negatives
        ("mismatch_rank", pa.int32()),  # of the true latent among random others under this label; 1 is best
        ("n_mismatch", pa.int32()),  # these others
        ("neighbour_rank", pa.int32()),  # the same among nearest decoder neighbours
        ("n_neighbour", pa.int32()),
        ("n_positive", pa.int32()),  # questions in detection
        ("n_negative", pa.int32()),
        ("n_failed", pa.int32()),  # of these, questions without an answer
        ("n_fuzz", pa.int32()),
        ("n_fuzz_failed", pa.int32()),
        ("n_mismatch_failed", pa.int32()),  # windows of others without an answer
        ("failures", pa.string()),  # calls that gave no answer, by role and reason: JSON
        ("text_sha256", pa.string()),
        ("provenance", pa.string()),  # file, line, digest; prompts, cost: JSON
    ],
    metadata={"schema_version": SCHEMA_VERSION},
)

Row = dict[str, Any]


def row(latent: int, source: str, label: str | None, status: str, **columns: Any) -> Row:
    """A row; columns that are not given are null.

    Raises:
        KeyError: a column that the table does not have.
    """
    unknown = set(columns) - set(LABELS.names)
    if unknown:
        raise KeyError(f"labels.parquet has no column {', '.join(sorted(unknown))}")
    digest = None if label is None else hashlib.sha256(label.encode()).hexdigest()
    given = {"latent": latent, "source": source, "label": label, "status": status, "text_sha256": digest}
    return dict.fromkeys(LABELS.names) | given | columns


def read_rows(folder: Path) -> list[Row]:
    """The rows of a folder's labels.parquet; none where there is no such file.

    Raises:
        RunError: another schema.
    """
    path = folder / LABELS_FILE
    if not path.is_file():
        return []
    table = pq.read_table(path)
    version = (table.schema.metadata or {}).get(b"schema_version", b"?").decode()
    if version != SCHEMA_VERSION:
        raise RunError(f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}: label again")
    rows: list[Row] = table.to_pylist()
    return rows


def replace_rows(folder: Path, rows: Iterable[Row], mine: Callable[[str], bool]) -> list[Row]:
    """Put `rows` in place of those whose source is `mine`; all others stay. Returns the whole table."""
    merged = [old for old in read_rows(folder) if not mine(old["source"])] + list(rows)
    merged.sort(key=lambda r: (r["latent"], r["source"] != "predicate", r["source"]))
    with ParquetFile(folder / LABELS_FILE, LABELS) as file:
        file.write({name: [r[name] for r in merged] for name in LABELS.names})
    return merged


def preferred(rows: Sequence[Row], prefer: Sequence[str]) -> dict[int, Row]:
    """For each latent the row to show: of the first source in `prefer` whose label passed.

    Args:
        prefer: sources, or their kinds: `human` stands for every human:NAME, in alphabetical order.
    """
    order: Mapping[str, int] = {name: i for i, name in reversed(list(enumerate(prefer)))}
    best: dict[int, tuple[tuple[int, str], Row]] = {}
    for candidate in rows:
        source = candidate["source"]
        ranks = [order[name] for name in (source, source.partition(":")[0]) if name in order]
        if not ranks or not candidate["passed"] or candidate["label"] is None:
            continue
        rank = (min(ranks), source)
        if candidate["latent"] not in best or rank < best[candidate["latent"]][0]:
            best[candidate["latent"]] = rank, candidate
    return {latent: chosen for latent, (_, chosen) in best.items()}
