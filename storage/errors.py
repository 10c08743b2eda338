"""What can go wrong with data on disk, grouped by what a handler would do about it.

    StorageError                      anything this package reports about a store
    ├── NotFoundError                 there is nothing here: check the path      (also a FileNotFoundError)
    ├── AlreadyExistsError            something else is here: choose another path (also a FileExistsError)
    ├── FormatError                   not a store that this version can read: upgrade, or convert
    ├── SpecMismatchError             a store, but made from other settings: choose another path, or those settings
    ├── CorruptionError               bytes are missing or differ from what was committed: discard the shard, rewrite it
    └── IncompleteError               shards are still to be written: write them, then seal

A caller's own mistake (a range outside of the store, an unknown hook) is a `ValueError`.
"""

from __future__ import annotations


class StorageError(Exception):
    """Base of every error about data in a store."""


class NotFoundError(StorageError, FileNotFoundError):
    """No store, or no such file in it."""


class AlreadyExistsError(StorageError, FileExistsError):
    """Something that is not a store stands where one was to be created."""


class FormatError(StorageError):
    """The files are not a store of a format version that this package reads."""


class SpecMismatchError(StorageError):
    """The store was made from other settings than the caller's; the message lists the keys that differ."""


class CorruptionError(StorageError):
    """Stored bytes are missing, cut short or changed; the message names the file and the shard."""


class IncompleteError(StorageError):
    """The store is not sealed; the message lists the shards that are missing."""
