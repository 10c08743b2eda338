"""Explanations of a Neuronpedia export: explanations/batch-N.jsonl(.gz), one JSON object a line.

Keys are those of Neuronpedia's `Explanation` table. A latent often has several explanations, by method and model; each
method is a source of its own, and of several by one method the newest counts.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.errors import UsageError
from pipelines.labels.external.records import ImportedLabel, Problems, date_of, label_of, latent_of, text_of

MAX_FILE_BYTES = 2 * 2**30
MAX_LINE_BYTES = 2**20


def read_neuronpedia(path: Path, layer: str | None = None) -> list[ImportedLabel]:
    """Labels of an export.

    Args:
        path: the folder of one source (which has `explanations/`), that folder, or one of its files.
        layer: Neuronpedia's name of the source, such as 8-res-4k, where the files hold several.

    Raises:
        UsageError: no such files, a line that is no explanation, or several sources and no `layer`.
    """
    problems, found, sources = Problems("the Neuronpedia export"), list[tuple[str, ImportedLabel]](), set[str]()
    for file in _files(path):
        digest = sha256_of(file)
        for number, line in _lines(file, problems):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if not isinstance(record, dict) or "index" not in record or "description" not in record:
                    raise ValueError("an explanation is a JSON object with index and description")
                name = str(record.get("layer", ""))
                if layer is not None and name != layer:
                    continue
                sources.add(f"{record.get('modelId', '')}/{name}")
                found.append((str(record.get("createdAt") or ""), _label(record, file, number, digest)))
            except (ValueError, RecursionError) as error:
                problems.add(file, number, str(error))
    problems.stop()
    if len(sources) > 1:
        raise UsageError(
            f"{path} holds explanations of several dictionaries ({', '.join(sorted(sources))}): choose one "
            "with --layer, such as --layer 8-res-4k"
        )
    if not found:
        raise UsageError(f"{path} holds no explanations" + (f" of {layer}" if layer else ""))
    newest: dict[tuple[int, str], ImportedLabel] = {}
    for _, label in sorted(found, key=lambda item: item[0]):
        newest[label.latent, label.source] = label
    return [newest[key] for key in sorted(newest)]


def _label(record: dict[str, Any], file: Path, number: int, digest: str) -> ImportedLabel:
    method = "/".join(filter(None, (text_of(record.get(key)) for key in ("typeName", "explanationModelName"))))
    method = method.replace(":", "-")[:120]
    return ImportedLabel(
        latent=latent_of(record["index"]),
        source=f"neuronpedia:{method}" if method else "neuronpedia",
        label=label_of(record["description"]),
        author=text_of(record.get("authorId")),
        date=date_of(str(record["createdAt"]).replace(" UTC", "+00:00")) if record.get("createdAt") else None,
        note=text_of(record.get("notes")),
        method=method,
        claimed={},
        file=file.name,
        line=number,
        sha256=digest,
    )


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    folder = path / "explanations" if (path / "explanations").is_dir() else path
    files = sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")])
    if not files:
        raise UsageError(f"{path} has no explanations/batch-N.jsonl or .jsonl.gz: give the folder of one source")
    return files


def _lines(file: Path, problems: Problems) -> Iterator[tuple[int, str]]:
    number, size = 0, 0
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
            while line := stream.readline(MAX_LINE_BYTES + 1):
                number, size = number + 1, size + len(line)
                if len(line) > MAX_LINE_BYTES or size > MAX_FILE_BYTES:
                    problems.add(file, number, "the line, or the file, is far longer than explanations are")
                    return
                yield number, line.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        problems.add(file, number + 1, f"it cannot be read ({error})")


def sha256_of(file: Path) -> str:
    """Digest of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
