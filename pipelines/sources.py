"""Files that texts and models come from: paths, and files inside installed packages."""

import hashlib
import importlib.util
from pathlib import Path

from pipelines.errors import UsageError

PACKAGE_SCHEME = "package://"


def locate(source: str, *, sha256: str | None = None) -> Path:
    """The local file behind a path or `package://PACKAGE/FILE`; the package is found, never imported.

    Raises:
        UsageError: no such package or file, or its digest is not `sha256`.
    """
    if source.startswith(PACKAGE_SCHEME):
        package, _, inside = source.removeprefix(PACKAGE_SCHEME).partition("/")
        # Of a dotted name, find_spec would import the parent.
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise UsageError(
                f"{source}: the package {package!r} is not installed; `make demo` installs the demo's packages, "
                "or point the config to a file of your own"
            )
        path = Path(spec.submodule_search_locations[0]) / inside
    else:
        path = Path(source).expanduser()
    if not path.is_file():
        raise UsageError(f"{source}: there is no file {path}; check the path in the config")
    if sha256 is not None:
        found = sha256_of(path)
        if found != sha256:
            raise UsageError(
                f"{source}: its SHA-256 is {found}, the config expects {sha256}; install the pinned file, or "
                "change the config if the new file is meant"
            )
    return path


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
