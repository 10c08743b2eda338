"""Publishing dictionaries to a repository of the Hugging Face Hub: one, or a suite, in one call and one commit."""

import hashlib
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pipelines.card import index_card
from pipelines.errors import RunError, UsageError
from sae import Dictionary
from sae.interop.names import dictionary_folders

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PUBLISHED = (
    "dictionary.json",
    "cfg.json",
    "sae_weights.safetensors",
    "sparsity.safetensors",
    "features.parquet",
    "examples.parquet",
    "labels.parquet",
    "evaluation.json",
    "README.md",
)
"""The files of a dictionary folder that go to the Hub; others may lie there for reasons of their own."""
_LOCAL = re.compile(r"(?:/|~[/\\]|\.{1,2}[/\\]|[A-Za-z]:[/\\]|file://)\S")
"""How the path of a file of this machine begins."""
TEXT_COLUMNS = ("token_ids", "values", "text")
"""Columns of examples.parquet that quote the texts."""


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    path_in_repo: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    private: bool = False,
    without_text: bool = False,
    message: str | None = None,
) -> str:
    """Upload a dictionary folder, or a folder of several, in one commit; the repository is made if it does not exist.

    Every dictionary is loaded and its hashes compared first, so that nothing damaged is published. A suite keeps its
    subfolders, and the repository gets an index of all dictionaries in it as README.md. Of local files that the
    provenance names, the folders are left out; names and hashes stay.

    Args:
        folder: of a dictionary, or one with dictionaries below it, such as a run's `dictionaries`.
        path_in_repo: subfolder of the repository; by default its root.
        revision: branch to commit to.
        token: of the Hub; by default the one that is logged in.
        private: for a repository that is made now.
        without_text: keep of examples.parquet latents, documents and offsets, and leave out tokens and text.
    Returns: the URL of the commit.
    Raises:
        UsageError: there is no dictionary there, it is damaged or of another tool, or `path_in_repo` leads outside.
        RunError: the Hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    source, base = Path(folder), _base(path_in_repo)
    found = {name: _checked(source / name) for name in _own(source)}
    files: dict[str, Path | bytes] = {}
    places: dict[str, str] = {}
    for name in found:
        for file, content in _contents(source / name, without_text, places).items():
            files[(base / name / file).as_posix()] = content
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        index = _index(api, repo_id, revision, {(base / name).as_posix(): d for name, d in found.items()})
        if index is not None:
            files["README.md"] = _replaced(index, places).encode()
        with warnings.catch_warnings():
            # The tables belong to the model: they are not a data set that went astray.
            warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")
            commit = api.create_commit(
                repo_id,
                [CommitOperationAdd(path, content) for path, content in sorted(files.items())],
                revision=revision,
                commit_message=message or f"Add {'a dictionary' if '.' in found else ', '.join(found)}",
            )
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"the Hugging Face Hub refuses to take {folder} into {repo_id}: {reason}. Check the name, the network and "
            "that the token may write"
        ) from error
    return str(commit.commit_url)


def _base(path_in_repo: str | None) -> PurePosixPath:
    base = PurePosixPath(path_in_repo or ".")
    if base.is_absolute() or ".." in base.parts:
        raise UsageError(f"path_in_repo must lie inside the repository, got {path_in_repo!r}")
    return base


def _own(source: Path) -> list[str]:
    if not source.is_dir():
        raise UsageError(f"{source} is not a folder: give a dictionary, or a folder of dictionaries")
    names = ["."] if (source / "dictionary.json").exists() else Dictionary.list(source)
    foreign = [name for name in names if not (source / name / "dictionary.json").exists()]
    if foreign:
        raise UsageError(
            f"{source / foreign[0]} was written by another tool: load it and save it with `Dictionary.save` first"
        )
    if not names:
        raise UsageError(f"{source} holds no dictionary: give a folder that `sae export` or `Dictionary.save` wrote")
    return names


def _checked(folder: Path) -> Dictionary:
    try:
        return Dictionary.load(folder, verify=True)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"a damaged dictionary is not published: {error}") from error


def _with_names(folder: Path, places: dict[str, str]) -> dict[str, bytes]:
    """The JSON files and the card with the names of local files in place of where they lie here.

    Hashes say what the files were; their folders say who works where, and mean nothing elsewhere. Empty if there are
    none. `places` gets every path that was replaced, with its name.
    """
    here: dict[str, str] = {}
    cfg, record = (
        _named(json.loads((folder / name).read_text(encoding="utf-8")), here)
        for name in ("cfg.json", "dictionary.json")
    )
    if not here:
        return {}
    places |= here
    files = {"cfg.json": _json_bytes(cfg)}
    record["sha256"]["cfg.json"] = hashlib.sha256(files["cfg.json"]).hexdigest()
    files["dictionary.json"] = _json_bytes(record)
    for name in ("README.md", "evaluation.json"):
        if (folder / name).is_file():
            files[name] = _replaced((folder / name).read_text(encoding="utf-8"), here).encode()
    return files


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _replaced(text: str, places: Mapping[str, str]) -> str:
    for place in sorted(places, key=len, reverse=True):
        text = text.replace(place, places[place])
    return text


def _named(value: Any, places: dict[str, str]) -> Any:
    """The JSON value with local paths replaced by their last part; `places` gets every one that was replaced."""
    if isinstance(value, dict):
        return {key: _named(part, places) for key, part in value.items()}
    if isinstance(value, list):
        return [_named(part, places) for part in value]
    if isinstance(value, str):
        # cfg.json joins the texts' origins with commas.
        parts = value.split(", ")
        for i, part in enumerate(parts):
            if _LOCAL.match(part):
                places[part] = parts[i] = re.split(r"[/\\]", part.rstrip("/\\"))[-1] or "local"
        return ", ".join(parts)
    return value


def _contents(folder: Path, without_text: bool, places: dict[str, str]) -> dict[str, Path | bytes]:
    """What is published of a folder: files as they are, or what stands in their place; see `_with_names`."""
    found: dict[str, Path | bytes] = {name: folder / name for name in PUBLISHED if (folder / name).is_file()}
    found |= _with_names(folder, places)
    if "README.md" not in found:
        raise UsageError(f"{folder} has no README.md, the model card: `sae export` writes one, or write your own")
    if without_text and "examples.parquet" in found:
        found["examples.parquet"] = _without_text(folder / "examples.parquet")
        note = "\n`examples.parquet` names documents and offsets only; their texts are not part of this repository.\n"
        card = found["README.md"]
        found["README.md"] = (card if isinstance(card, bytes) else card.read_bytes()) + note.encode()
    return found


def _without_text(file: Path) -> bytes:
    import pyarrow.parquet as pq

    table, buffer = pq.read_table(file), BytesIO()
    pq.write_table(table.drop_columns([name for name in TEXT_COLUMNS if name in table.column_names]), buffer)
    return buffer.getvalue()


def _index(api: "HfApi", repo_id: str, revision: str | None, new: dict[str, Dictionary]) -> str | None:
    """README.md of the repository; None where one of the dictionaries is its root, whose own card stays."""
    from huggingface_hub.errors import RevisionNotFoundError

    if "." in new:
        return None
    try:
        there: Sequence[str] = dictionary_folders(api.list_repo_files(repo_id, revision=revision))
    except RevisionNotFoundError:
        there = []
    return None if "." in there else index_card(sorted({*there, *new}), new)
