"""Hugging Face datasets as texts: streamed from a commit, or downloaded where a slice of a split is asked for."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.config import TextSource
from pipelines.errors import UsageError


def hub_provenance(source: TextSource) -> dict[str, Any]:
    """Dataset, split and commit. A folder in the place of an id is taken as a dataset of that folder's files.

    Raises:
        UsageError: there is no such dataset or revision, or no way to ask.
    """
    assert source.dataset is not None
    found: dict[str, Any] = {"origin": source.origin, "name": source.name, "split": source.split}
    folder = Path(source.dataset).expanduser()
    if folder.is_dir():
        from pipelines.textfiles import digest_of

        if source.revision is not None:
            raise UsageError(f"text source {source.dataset} is a folder, which has no revision: drop `revision`")
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        return found | {"sha256": digest_of(files, folder)}
    return found | {"revision": _commit(source.dataset, source.revision)}


def _commit(dataset: str, revision: str | None) -> str:
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi

    try:
        sha = HfApi().dataset_info(dataset, revision=revision, timeout=30).sha
    except Exception as error:
        raise _unreachable(dataset, error) from error
    assert sha is not None
    return sha


def hub_records(
    source: TextSource, revision: str | None, seed: int, *, stream: bool
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of the dataset at a commit; a stream is shuffled among `shuffle_buffer` rows."""
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"text source {source.dataset} is a Hugging Face dataset: pip install 'sae-pipelines[hub]'"
        ) from error
    assert source.dataset is not None
    try:
        rows = datasets.load_dataset(
            source.dataset, source.name, split=source.split, revision=revision, streaming=stream
        )
        if stream:
            # One file at a time, in shuffled order: several would be read by threads, whose order is nobody's.
            rows = rows.shuffle(seed=seed, buffer_size=source.shuffle_buffer, max_buffer_input_shards=1)
        for i, row in enumerate(rows):
            yield str(row.get("id", i)), row
    except (OSError, ValueError) as error:
        raise _unreachable(source.dataset, error) from error


def _unreachable(dataset: str, error: Exception) -> UsageError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UsageError(f"text source {dataset}: {reason}; check the name, the revision and the network")
