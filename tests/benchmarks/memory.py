"""Peak anonymous memory of a harvester or a reader, in a process of its own; run by `store`.

    python -m tests.benchmarks.memory harvester|reader FACTOR SCRATCH

Anonymous memory only: what is mapped from files belongs to the page cache and goes when others want it.
"""

import json
import sys
import threading
from pathlib import Path

ROWS, LENGTH, PER_SHARD, D_IN = 20_480, 32, 64, 256
"""Rows for factor 1: ten shards."""


class PeakAnonymous:
    """Samples this process's anonymous memory every two milliseconds."""

    def __enter__(self) -> "PeakAnonymous":
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, anonymous_bytes())


def anonymous_bytes() -> int:
    """`RssAnon` of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status must have a line RssAnon; it has none: Linux is needed")


def harvest(factor: int, scratch: Path) -> int:
    """All shards of a store through a tiny model."""
    from pipelines.config import ModelConfig
    from pipelines.harvester import Harvester
    from pipelines.models import resolve_model
    from tests.benchmarks.store import create, spec_of
    from tests.tiny import write_tiny_model

    folder = scratch / "tiny"
    if not folder.exists():
        write_tiny_model(folder, d_model=D_IN)
    config = ModelConfig(source=str(folder), dtype="float32")
    path = scratch / f"memory-{factor}"
    spec = spec_of(factor * ROWS // LENGTH, LENGTH, PER_SHARD, D_IN, "float32")
    create(path, rename_hook(spec, "model.layers.1"), 400)
    harvester = Harvester(path, resolve_model(config), config, 16, 1)
    with PeakAnonymous() as measured:
        for _ in harvester.harvest_all(range(spec.n_shards)):
            pass
    return measured.peak


def read(factor: int, scratch: Path) -> int:
    """One shuffled epoch, then one sequential pass."""
    import numpy as np

    from storage import ActivationStore, ShuffledReader
    from tests.benchmarks.store import HOOK, fill, spec_of

    path = scratch / f"memory-reader-{factor}"
    spec = spec_of(factor * ROWS // LENGTH, LENGTH, PER_SHARD, D_IN, "bfloat16")
    fill(path, spec)
    out = np.empty((16, LENGTH, D_IN), np.uint16)
    with PeakAnonymous() as measured:
        store = ActivationStore.open(path)
        for _ in ShuffledReader(store, HOOK, batch_size=1024, seed=0, window_contexts=256, epochs=1):
            pass
        for low in range(0, spec.n_contexts, 16):
            store.activations_numpy(HOOK, low, low + 16, out=out)
    return measured.peak


def rename_hook(spec, name):  # type: ignore[no-untyped-def]
    """The spec with its hook at another module."""
    import dataclasses

    return dataclasses.replace(spec, hooks=tuple(dataclasses.replace(hook, name=name) for hook in spec.hooks))


def main() -> None:
    """Print one JSON object."""
    what, factor, scratch = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    measure = {"harvester": harvest, "reader": read}[what]
    print(json.dumps({"peak_bytes": measure(factor, scratch)}))


if __name__ == "__main__":
    main()
