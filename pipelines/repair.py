"""`sae verify --repair`: discard what is damaged in a store, and say which stage writes it again."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.info import require_store
from pipelines.rundir import RunDir
from pipelines.stores import StorePlace, has


@dataclass(frozen=True)
class Repaired:
    """What was found and done."""

    problems: list[dict[str, Any]]
    discarded: list[int]
    irreparable: list[dict[str, Any]]
    next: str
    """The command that writes again what was discarded, or that is missing."""

    def lines(self, store: StorePlace) -> Iterator[str]:
        """The same for people."""
        for problem in self.problems:
            yield f"{problem['file']}: {problem['detail']}"
        if not self.problems:
            yield f"{store}: every file is as it was committed"
        elif self.irreparable:
            files = ", ".join(dict.fromkeys(problem["file"] for problem in self.irreparable))
            yield (
                f"{store}: nothing discarded, because {files} cannot be repaired: such files belong to no shard and "
                f"are written when the store is created. Restore them from a copy, or delete {store} and run "
                f"`{self.next}`"
            )
        elif self.discarded:
            yield f"{store}: discarded shards {', '.join(map(str, self.discarded))}; run `{self.next}` to redo them"
        else:
            yield f"{store}: unfinished, with nothing to discard; run `{self.next}` to finish it"


def repair_store(path: StorePlace) -> Repaired:
    """Discard the damaged shards of a store. Its run is locked meanwhile, where the store stands in a run directory.

    A collect whose store has no seal is unfinished, so it runs again. Labels do not count latents among their results:
    the label stage is forgotten before its latents are discarded.

    Raises:
        UsageError: there is no store.
        RunError: the run is under way.
    """
    from storage import repair, verify

    require_store(path)
    latent = not has(path, "spec.json")
    stage = "label" if latent else "collect"
    folder = path.resolve().parents[1 if latent else 0] if isinstance(path, Path) else None
    run = RunDir(folder) if folder is not None and (folder / "config.yaml").exists() else None
    with run.lock() if run is not None else nullcontext():
        if run is not None and latent and verify(path):
            run.forget(stage)
        done = repair(path)
    return Repaired(
        problems=[asdict(problem) for problem in done.problems],
        discarded=done.discarded,
        irreparable=[asdict(problem) for problem in done.irreparable],
        next=f"sae {stage} {folder if run is not None else 'RUN'}",
    )
