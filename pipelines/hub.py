"""Names of dictionaries that are no local folder → local folders, for `Dictionary.load` and `Dictionary.list`.

    org/name, org/name/sub/folder       a repository of the Hugging Face Hub; `revision` and `token` apply
    s3://bucket/prefix, gs://…          an object store, as `storage.backends` opens it
    release/sae_id                      a name in SAELens's list of releases, where sae-lens is installed

Importing this module registers it. Only the files of the one dictionary are fetched: from the Hub into its own cache,
which also answers without a network; from elsewhere into `SAE_PIPELINES_DICTIONARIES`, by default in the cache folder.
`publish` is the way back.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from pipelines.publish import publish
from sae import Dictionary
from sae.interop.names import NESTED_WEIGHTS, WEIGHT_SUFFIXES, WEIGHTS, dictionary_folders, files_of

__all__ = ["HubResolver", "publish"]

_PART_BYTES = 64 * 2**20
_SHOWN = 8


def cache_folder() -> Path:
    """Where fetched dictionaries are kept that the Hub's own cache does not hold."""
    from pipelines.models import cache_root

    return Path(os.environ.get("SAE_PIPELINES_DICTIONARIES", cache_root() / "dictionaries"))


class HubResolver:
    """Resolves names as the module says; knows nothing between calls."""

    def fetch(self, name: str, *, subfolder: str | None, revision: str | None, token: str | None) -> Path:
        """The local folder, or file, of one dictionary.

        Raises: FileNotFoundError if there is no such dictionary, or none can be told apart from others.
        """
        if "://" in name:
            return _from_store(name, subfolder or "")
        release = _release(name)
        if release is not None:
            return _from_release(release, revision, token)
        repository, inside = _repository(name)
        return _from_hub(repository, "/".join(part for part in (inside, subfolder) if part), revision, token)

    def list(self, name: str, *, revision: str | None, token: str | None) -> list[str]:
        """The subfolders of a place that hold dictionaries, by the names of their files.

        Raises: FileNotFoundError if there is no such place.
        """
        if "://" in name:
            return dictionary_folders(_stored_files(name))
        listed = _releases().get(name)
        if listed is not None:
            return [str(entry["id"]) for entry in listed["saes"]]
        repository, inside = _repository(name)
        files = _listing(repository, revision, token)
        prefix = f"{inside}/" if inside else ""
        return dictionary_folders(file.removeprefix(prefix) for file in files if file.startswith(prefix))


# ---- the Hugging Face Hub --------------------------------------------------------------------------------------------


def _repository(name: str) -> tuple[str, str]:
    """Repository id and folder inside of "org/name/sub/folder"."""
    parts = name.strip("/").split("/")
    is_path = name.startswith(("/", ".", "~"))  # which is not there: nobody else is asked for it
    if is_path or len(parts) < 2 or any(part in ("", ".", "..") for part in parts):
        raise FileNotFoundError(
            f"A dictionary is a folder, a repository (org/name), a URL (s3://bucket/prefix) or a SAELens name "
            f"(release/sae_id), but {name!r} is none of them. Check the path."
        )
    return "/".join(parts[:2]), "/".join(parts[2:])


def _from_hub(repository: str, folder: str, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        files = _listing(repository, revision, token)
    except OfflineModeIsEnabled as error:
        return _cached(repository, folder, revision, error)
    wanted = files_of(folder or ".", files)
    if not any(file.endswith(WEIGHT_SUFFIXES) for file in wanted):
        raise _none_there(f"the repository {repository}", folder, files)
    with _hub_errors(repository, revision):
        found = snapshot_download(
            repository, revision=revision, allow_patterns=[_literal(file) for file in wanted], token=token
        )
    return Path(found) / folder


def _cached(repository: str, folder: str, revision: str | None, error: Exception) -> Path:
    """The place of a dictionary that was fetched before."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("", *WEIGHTS, NESTED_WEIGHTS):
        file = "/".join(part for part in (folder, name) if part)
        found = try_to_load_from_cache(repository, file, revision=revision) if file else None
        if isinstance(found, str):
            return Path(found.removesuffix(name).rstrip("/"))
    raise FileNotFoundError(
        f"There is no such folder here, the Hugging Face Hub's cache does not hold {folder or 'a dictionary'} of the "
        f"repository {repository}, and HF_HUB_OFFLINE is set. Check the path; or unset it, or fetch the dictionary "
        "beforehand."
    ) from error


def _listing(repository: str, revision: str | None, token: str | None) -> list[str]:
    """The files of a repository."""
    from huggingface_hub import HfApi

    with _hub_errors(repository, revision):
        return list(HfApi(token=token).list_repo_files(repository, revision=revision))


@contextlib.contextmanager
def _hub_errors(repository: str, revision: str | None) -> Iterator[None]:
    """Hub errors as FileNotFoundError that says what to do; being offline on purpose is passed on."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at revision {revision!r}" if revision else ""
    try:
        yield
    except OfflineModeIsEnabled:
        raise
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"The repository {repository} asks its users to accept terms first. Accept them on the Hugging Face Hub, "
            "and pass `token` or log in."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"There is no such folder here and no repository {repository} on the Hugging Face Hub; or it is private "
            "and `token` is missing; or it is a SAELens release: install sae-lens, whose list of releases is needed."
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"The repository {repository} has nothing{at}. Check `revision`.") from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"A file of the repository {repository}{at} is missing: {error}.") from error
    except (HfHubHTTPError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"The repository {repository}{at} could not be fetched: {reason}. Try again."
        ) from error


def _literal(file: str) -> str:
    """A pattern that this file alone matches."""
    return "".join(f"[{character}]" if character in "[]*?" else character for character in file)


def _none_there(place: str, folder: str, files: list[str]) -> FileNotFoundError:
    known = dictionary_folders(files)
    shown = ", ".join(known[:_SHOWN]) + (f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else "")
    where = f"the folder {folder!r} of {place}" if folder else place
    hint = f"It has: {shown}. Pass one as `subfolder`." if known else "No file in it is one that a known tool writes."
    return FileNotFoundError(f"There is no dictionary in {where}. {hint}")


# ---- object stores ---------------------------------------------------------------------------------------------------


def _stored_files(url: str) -> list[str]:
    """Keys below a URL."""
    from storage.backends import backend_for

    backend, found, folders = backend_for(url), [], [""]
    while folders:
        prefix = folders.pop()
        for name in backend.list(prefix):
            key = f"{prefix}{name}"
            if backend.size(key) is None:
                folders.append(f"{key}/")
            else:
                found.append(key)
    return sorted(found)


def _from_store(url: str, folder: str) -> Path:
    from storage.backends import backend_for
    from storage.errors import StorageError

    try:
        files = _stored_files(url)
        wanted = files_of(folder or ".", files)
        if not any(file.endswith(WEIGHT_SUFFIXES) for file in wanted):
            raise _none_there(url, folder, files)
        backend = backend_for(url)
        record = next((file for file in wanted if PurePosixPath(file).name == "dictionary.json"), None)
        identity = hashlib.sha256(f"{url}\n{folder}\n".encode())
        # Our own record holds the hashes of the rest, so it says whether a fetched copy is still the same.
        identity.update(uuid.uuid4().bytes if record is None else backend.read(record))
        target = cache_folder() / identity.hexdigest()[:32]
        if target.exists():
            return target / folder
        staging = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        try:
            for file in wanted:
                _copy(backend.open(file), staging / file)
            _appear(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except (StorageError, ValueError) as error:
        raise FileNotFoundError(f"The dictionary at {url} could not be fetched: {error}") from error
    return target / folder


def _copy(source: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        for start in range(0, source.size, _PART_BYTES):
            stream.write(source[start : min(start + _PART_BYTES, source.size)])


def _appear(staging: Path, target: Path) -> None:
    """Another process may have fetched the same meanwhile; either copy will do."""
    try:
        staging.rename(target)
    except OSError:
        if not target.is_dir():
            raise


# ---- SAELens's releases ----------------------------------------------------------------------------------------------


class _Release(NamedTuple):
    repository: str
    folder: str
    scaling_factor: float | None


@cache
def _releases() -> dict[str, Any]:
    """SAELens's list of releases, found beside its code, which is not imported; empty if it is not installed."""
    spec = importlib.util.find_spec("sae_lens")
    places = [Path(place) for place in spec.submodule_search_locations or ()] if spec else []
    file = next(
        (place / "pretrained_saes.yaml" for place in places if (place / "pretrained_saes.yaml").is_file()), None
    )
    if file is None:
        return {}
    import yaml

    with file.open(encoding="utf-8") as stream:  # 1.5 MB, which takes the loader in Python seconds
        fast = hasattr(yaml, "CSafeLoader")
        loaded: dict[str, Any] = yaml.load(stream, Loader=yaml.CSafeLoader) if fast else yaml.safe_load(stream)
    return loaded


def _release(name: str) -> _Release | None:
    release, _, sae_id = name.partition("/")
    listed = _releases().get(release)
    if listed is None:
        return None
    for entry in listed["saes"]:
        if entry["id"] == sae_id:
            factor = entry.get("norm_scaling_factor")
            return _Release(str(listed["repo_id"]), str(entry["path"]), None if factor is None else float(factor))
    shown = ", ".join(str(entry["id"]) for entry in listed["saes"][:_SHOWN])
    raise FileNotFoundError(f"The SAELens release {release} has no {sae_id!r}. It has: {shown} …")


def _from_release(release: _Release, revision: str | None, token: str | None) -> Path:
    """The folder of a release; with the factor beside it that its list gives for activations that must be scaled."""
    place = _from_hub(release.repository, release.folder.strip("/"), revision, token)
    if release.scaling_factor is None or not place.is_dir():
        return place
    identity = hashlib.sha256(f"{place}\n{release.scaling_factor}".encode()).hexdigest()[:32]
    target = cache_folder() / identity
    if target.exists():
        return target
    staging = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        for file in place.rglob("*"):
            if file.is_file():
                copy = staging / file.relative_to(place)
                copy.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(file.resolve(), copy)
                except OSError:  # another file system
                    shutil.copyfile(file, copy)
        (staging / "activation_scaler.json").write_text(json.dumps({"scaling_factor": release.scaling_factor}))
        _appear(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


Dictionary.register_resolver(HubResolver())
