"""Who opened which confirm texts with which dictionary, and when: append-only, hash-chained, outside every run.

A confirm part is worth its name once. So before one is opened, a line is appended to a ledger that belongs to the user
and not to the run: deleting the run, renaming the concept, moving a few texts or changing the seed resets nothing.

    ledger.jsonl   one record a line: seq, prev (hash of the record before), time, event, …, sha256
    ledger.head    number and hash of the last record, so that cutting the tail off shows

`opened` records hold the digests of the confirm positives, never a text; `finished` ones close an opening, so that one
without it is an abandoned audit. An opening repeats an earlier one if they share a dictionary and either the confirm
texts or a tenth of the positives of the smaller set. All of them are listed; those of another plan count as reuse. The
very same plan (its manifest's hash) may be carried out again, after a crash or to reproduce it: it was fixed before it
was first opened, and gives what it gave. It counts what had been opened before that first time.

The file is `SAE_PIPELINES_LEDGER`, else in the user's data folder. On a cluster, point it to a shared volume.
"""

import datetime
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
from pydantic import BaseModel, ConfigDict

from pipelines.audit.manifest import Manifest, sha256_of_json
from pipelines.errors import RunError
from pipelines.rundir import fsync_directory, write_json

SHARED = 0.1
"""Share of the smaller set's positives from which two confirm parts are the same ones."""
_START = "0" * 64
_WAIT_S = 60.0


class LedgerError(RunError):
    """The ledger cannot be written, or is not what was written."""


class Earlier(BaseModel):
    """An earlier opening of these confirm texts with this dictionary."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    seq: int
    time: str
    name: str
    """Of the audit, which may be another than now."""
    manifest_sha256: str
    shared: int
    """Confirm positives that both have."""
    outcome: str | None
    """Level of its verdict; null if it left none: abandoned, killed, or still running."""


class Opening(BaseModel):
    """One opening of a confirm part, as reports give it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    seq: int
    time: str
    sha256: str
    """Of the ledger's record."""
    manifest_sha256: str
    confirm_sha256: str
    dictionaries: list[str]
    reused: int
    """How often these texts had been opened with this dictionary, by other plans, before this plan first was."""
    earlier: list[Earlier]
    since: str
    """Time of the ledger's first record: nothing is known of what happened before."""
    records: list[dict[str, Any]]
    """The records behind `earlier` and this one, as they stand in the ledger."""

    @property
    def stamp(self) -> str | None:
        """REUSED(n), if it is not the first opening."""
        return f"REUSED({self.reused})" if self.reused else None


def default_ledger() -> Path:
    """`SAE_PIPELINES_LEDGER`, else ledger.jsonl in the user's data folder."""
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return Path(os.environ.get("SAE_PIPELINES_LEDGER") or data / "sae-pipelines" / "ledger.jsonl")


@dataclass(frozen=True)
class Ledger:
    """The ledger in a file, which is made by the first opening."""

    path: Path

    @classmethod
    def default(cls) -> "Ledger":
        """The user's own."""
        return cls(default_ledger())

    def open_confirm(self, manifest: Manifest, *, name: str) -> Opening:
        """Record that the confirm part of a plan is opened now; only then may anything of it be computed.

        Raises:
            LedgerError: the ledger was edited, or cannot be written.
        """
        with self._locked():
            records = self.records()
            record = self._append(
                records,
                {
                    "event": "opened",
                    "name": name,
                    "manifest_sha256": manifest.sha256,
                    "confirm_sha256": manifest.confirm_sha256,
                    "dictionaries": manifest.dictionaries,
                    "positives": manifest.confirm_positives,
                },
            )
        return opening_of([*records, record], record)

    def finish(self, opening: Opening, *, level: str, result_sha256: str) -> None:
        """Record the verdict of an opening, and the hash of what it was written to.

        Raises:
            LedgerError: the ledger was edited, or cannot be written.
        """
        with self._locked():
            self._append(
                self.records(),
                {"event": "finished", "opened": opening.seq, "level": level, "result_sha256": result_sha256},
            )

    def records(self) -> list[dict[str, Any]]:
        """All records, oldest first; a line that a killed writer left half is no record.

        Raises:
            LedgerError: a record was changed, removed, inserted or cut off.
        """
        found: list[dict[str, Any]] = []
        prev = _START
        for number, line in enumerate(self._lines()):
            try:
                record = json.loads(line)
                body = {key: value for key, value in record.items() if key != "sha256"}
                sound = (record["seq"], record["prev"]) == (number, prev) and record["sha256"] == sha256_of_json(body)
            except (ValueError, KeyError, AttributeError, TypeError):
                sound = False
            if not sound:
                raise self._edited(f"record {number} does not follow from the one before")
            prev = record["sha256"]
            found.append(record)
        head = self._head()
        if head is None and len(found) > 1:
            raise self._edited(f"{self._head_path.name} is missing")
        if head is not None:
            n = head["n"]
            # A writer that was killed between the two files leaves one record more than the head knows.
            if not n <= len(found) <= n + 1 or found[n - 1]["sha256"] != head["sha256"]:
                raise self._edited(f"it should have {n} records, and ends otherwise")
        return found

    def _append(self, records: list[dict[str, Any]], fields: dict[str, Any]) -> dict[str, Any]:
        """Append one record durably; the caller holds the lock and has read `records`."""
        record = {
            "seq": len(records),
            "prev": records[-1]["sha256"] if records else _START,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **fields,
        }
        record["sha256"] = sha256_of_json(record)
        try:
            with self.path.open("ab") as file:
                file.truncate(sum(len(line) + 1 for line in self._lines()))
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            fsync_directory(self.path.parent)
            write_json(self._head_path, {"n": len(records) + 1, "sha256": record["sha256"]})
        except OSError as error:
            raise self._unwritable(error) from error
        return record

    def _lines(self) -> list[bytes]:
        """Whole lines, without their ends."""
        try:
            return self.path.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return []

    @property
    def _head_path(self) -> Path:
        return self.path.with_suffix(".head")

    def _head(self) -> dict[str, Any] | None:
        try:
            head = json.loads(self._head_path.read_text(encoding="utf-8"))
            return {"n": int(head["n"]), "sha256": str(head["sha256"])}
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            raise self._edited(f"{self._head_path.name} cannot be read") from None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time; the lock goes with its process."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(self.path.with_suffix(".lock"), timeout=_WAIT_S):
                yield
        except filelock.Timeout as error:
            raise LedgerError(
                f"another process has held the ledger {self.path} for {_WAIT_S:.0f} s: wait for it, or end it"
            ) from error
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> LedgerError:
        return LedgerError(
            f"the ledger {self.path} cannot be written ({error.strerror}), so nothing was opened: free the disk or the "
            "permission, or point SAE_PIPELINES_LEDGER to a file that can be"
        )

    def _edited(self, what: str) -> LedgerError:
        return LedgerError(
            f"the ledger {self.path} was edited: {what}. Restore it from a backup. If it is lost, move it away and "
            "start a new one: reports will say since when it knows anything"
        )


def opening_of(records: list[dict[str, Any]], record: dict[str, Any]) -> Opening:
    """What the records up to one opening say about it."""
    levels = {r["opened"]: r["level"] for r in records if r["event"] == "finished"}
    before = [r for r in records[: record["seq"]] if r["event"] == "opened" and repeats(r, record)]
    first = next((r for r in before if r["manifest_sha256"] == record["manifest_sha256"]), record)
    return Opening(
        seq=record["seq"],
        time=record["time"],
        sha256=record["sha256"],
        manifest_sha256=record["manifest_sha256"],
        confirm_sha256=record["confirm_sha256"],
        dictionaries=record["dictionaries"],
        reused=sum(r["seq"] < first["seq"] for r in before),
        earlier=[
            Earlier(
                seq=r["seq"],
                time=r["time"],
                name=r["name"],
                manifest_sha256=r["manifest_sha256"],
                shared=len(set(r["positives"]) & set(record["positives"])),
                outcome=levels.get(r["seq"]),
            )
            for r in before
        ],
        since=records[0]["time"],
        records=[*before, record],
    )


def repeats(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two openings are of the same confirm texts with the same dictionary."""
    if not set(a["dictionaries"]) & set(b["dictionaries"]):
        return False
    smaller = min(len(a["positives"]), len(b["positives"]))
    shared = len(set(a["positives"]) & set(b["positives"]))
    return bool(a["confirm_sha256"] == b["confirm_sha256"] or (shared and shared >= SHARED * smaller))
