"""Where stores are: a local folder (`Path`) or the URL of an object store (`str`), as `storage.backends` opens both."""

from pathlib import Path

from pipelines.errors import UsageError

StorePlace = Path | str


def place(text: str) -> StorePlace:
    """What a config or a command line names: a path unless it has a scheme, since `Path` would swallow a slash.

    Raises:
        UsageError: a URL of another scheme, or with credentials in it.
    """
    if "://" not in text:
        return Path(text)
    from storage.backends import check_url

    try:
        check_url(text)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return text


def absolute(where: StorePlace) -> StorePlace:
    """The same place for processes that run in other folders."""
    return where.resolve() if isinstance(where, Path) else where


def has(where: StorePlace, name: str) -> bool:
    """Whether a file of that name stands in the store, or folder, at that place."""
    if isinstance(where, Path):
        return (where / name).exists()
    from storage.backends import backend_for

    return backend_for(where).size(name) is not None
