"""Text files and folders of them: which files a source means, their digest, and the records that they hold."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pipelines.errors import UsageError
from pipelines.sources import locate, sha256_of

Record = tuple[str, Mapping[str, Any]]
"""Document id and fields."""


def text_files(source: str, sha256: str | None = None) -> list[Path]:
    """The files behind a path: one, or all those of a folder and the folders in it, in the order of their names.

    Raises:
        UsageError: no such file, another digest than `sha256`, an unknown or mixed format, an empty folder.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        file = locate(source, sha256=sha256)
        _reader(file)
        return [file]
    files = sorted(file for file in folder.rglob("*") if file.suffix in _READERS and file.is_file())
    kinds = sorted({file.suffix for file in files})
    if len(kinds) != 1:
        what = f"holds {', '.join(kinds)} files" if kinds else f"holds no {', '.join(_READERS)} file"
        raise UsageError(f"text source {source}: a folder must hold text files of one kind, but it {what}")
    found = digest_of(files, folder)
    if sha256 not in (None, found):
        raise UsageError(f"{source}: its SHA-256 is {found}, the config expects {sha256}; correct one of the two")
    return files


def digest_of(files: list[Path], folder: Path | None = None) -> str:
    """SHA-256 of a file, or of the names and digests of a folder's files."""
    if folder is None:
        (file,) = files
        return _digest(file)
    lines = "".join(f"{_digest(file)}  {file.relative_to(folder).as_posix()}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def _digest(file: Path) -> str:
    stat = file.stat()
    return _digest_once(file, stat.st_size, stat.st_mtime_ns, stat.st_ino)


@cache
def _digest_once(file: Path, *_: int) -> str:
    return sha256_of(file)


def read_records(file: Path, name: str, document: Literal["line", "file"]) -> Iterator[Record]:
    """Every record of a file, in its order.

    Args:
        name: what documents without an id are called after.
        document: what a document of a `.txt` is.

    Raises:
        UsageError: the file cannot be read as its suffix says.
    """
    read = _read_whole if file.suffix == ".txt" and document == "file" else _reader(file)
    try:
        yield from read(file, name)
    except ValueError as error:  # of the decoder, of json and of pyarrow
        raise UsageError(f"text source {file} cannot be read as {file.suffix}: {error}") from error


def _read_whole(file: Path, name: str) -> Iterator[Record]:
    yield name, {"text": file.read_text(encoding="utf-8")}


def _read_txt(file: Path, name: str) -> Iterator[Record]:
    # Not str.splitlines, here and below: it also breaks lines at U+2028, form feeds and the like inside a text.
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            yield f"{name}:{number}", {"text": line.removesuffix("\n")}


def _read_jsonl(file: Path, name: str) -> Iterator[Record]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"line {number} must be a JSON object, not {type(record).__name__}")
            yield str(record.get("id", f"{name}:{number}")), record


def _read_json(file: Path, name: str) -> Iterator[Record]:
    data = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(data, dict | list):
        raise ValueError(f"it must hold an object or a list of documents, not {type(data).__name__}")
    for id_, record in data.items() if isinstance(data, dict) else enumerate(data):
        yield str(id_), record if isinstance(record, dict) else {"text": record}


def _read_parquet(file: Path, name: str) -> Iterator[Record]:
    import pyarrow.parquet as pq

    row = 0
    with pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                yield str(record.get("id", f"{name}:{row}")), record
                row += 1


_READERS: Mapping[str, Callable[[Path, str], Iterator[Record]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _reader(file: Path) -> Callable[[Path, str], Iterator[Record]]:
    if file.suffix not in _READERS:
        raise UsageError(f"text source {file}: unknown format {file.suffix!r}; use .txt, .jsonl, .json or .parquet")
    return _READERS[file.suffix]
