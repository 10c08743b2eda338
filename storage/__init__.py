"""Activation stores that lose nothing: sharded Zarr v3 written exactly once by workers that may die, and read at the
speed of a memory map.

    ActivationWriter    create a store, write shards from any number of processes, seal it
    ActivationStore     read contexts, activations, norms, statistics
    ShuffledReader      batches of shuffled rows for training, resumable at any batch
    Ring, Consumer      a store of bounded size that is emptied behind its readers
    LatentWriter        sparse latent activations, shard by shard
    LatentStore         … read by block of latents
    verify              every problem of a store on disk
    repair              discard damaged shards, so that they are written again

`FORMAT.md` says what is on disk. This package knows bytes, not models: it imports neither `sae` nor `pipelines`.
"""

from storage.activations import ActivationStore, Contexts
from storage.documents import Span
from storage.errors import (
    AlreadyExistsError,
    CorruptionError,
    FormatError,
    IncompleteError,
    NotFoundError,
    SpecMismatchError,
    StorageError,
)
from storage.integrity import Problem, Repair, repair, verify
from storage.latents import LatentBlock, LatentStore, LatentWriter
from storage.ring import Consumer, Ring, ring_sidecar
from storage.shuffle import ShuffledReader
from storage.spec import BOS, DELETED, PADDING, SINK, SPECIAL, HookSpec, StoreSpec, TableSpec, zarr_name
from storage.statistics import Statistics
from storage.writer import ActivationWriter, Receipt

__all__ = [
    "BOS",
    "DELETED",
    "PADDING",
    "SINK",
    "SPECIAL",
    "ActivationStore",
    "ActivationWriter",
    "AlreadyExistsError",
    "Consumer",
    "Contexts",
    "CorruptionError",
    "FormatError",
    "HookSpec",
    "IncompleteError",
    "LatentBlock",
    "LatentStore",
    "LatentWriter",
    "NotFoundError",
    "Problem",
    "Receipt",
    "Repair",
    "Ring",
    "ShuffledReader",
    "Span",
    "SpecMismatchError",
    "Statistics",
    "StorageError",
    "StoreSpec",
    "TableSpec",
    "repair",
    "ring_sidecar",
    "verify",
    "zarr_name",
]
