"""The plan of an audit, written before anything is computed: texts, split, seeds, settings, tests.

Its hash covers all of it. Deposited elsewhere before the confirm part is opened, it proves that nothing was chosen
afterwards.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.audit.examples import Example
from pipelines.audit.splits import Part, Split
from pipelines.errors import RunError
from pipelines.rundir import write_text

SCHEMA_VERSION = 2


class ManifestError(RunError):
    """A manifest that is not what was planned."""


@dataclass(frozen=True)
class Manifest:
    """A plan; `body` is JSON and holds no text of any example."""

    body: Mapping[str, Any]

    @property
    def sha256(self) -> str:
        """Hash of the plan."""
        return sha256_of_json(self.body)

    @property
    def dictionaries(self) -> list[str]:
        """Identity of each audited dictionary: the digest of its weights, or of what is told about it."""
        return [str(d.get("weights_sha256") or sha256_of_json(d)) for d in self.body["dictionaries"]]

    @property
    def confirm_sha256(self) -> str:
        """Hash of the confirm texts, whatever their order."""
        return sha256_of_json(sorted(e[0] for e in self.body["examples"] if e[3] == "confirm"))

    @property
    def confirm_positives(self) -> list[str]:
        """Digests of the positives of the confirm part, ascending."""
        return sorted(e[0] for e in self.body["examples"] if e[3] == "confirm" and e[1] == "positive")

    def write(self, path: Path) -> None:
        """Write the plan with its hash; the same plan gives the same bytes."""
        write_text(path, json.dumps({**self.body, "sha256": self.sha256}, indent=1, ensure_ascii=False) + "\n")


def plan_audit(
    examples: Sequence[Example],
    split: Split,
    *,
    concept: Mapping[str, Any],
    dictionaries: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    planned_tests: Sequence[str],
) -> Manifest:
    """The plan of one audit.

    Args:
        concept: what identifies it: name, kind, position; JSON values, no example's text.
        dictionaries: what identifies each audited dictionary; `weights_sha256` if there is one.
        settings: all choices, seeds included.
        planned_tests: one sentence per test that will be made.
    """
    part: list[Part] = split.part_of()
    body = {
        "schema_version": SCHEMA_VERSION,
        "concept": dict(concept),
        "dictionaries": [dict(d) for d in dictionaries],
        "settings": dict(settings),
        "planned_tests": list(planned_tests),
        "examples": [[e.digest, e.role, e.group, p] for e, p in zip(examples, part, strict=True)],
    }
    return Manifest(json.loads(json.dumps(body)))


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.

    Raises:
        ManifestError: it is missing, damaged, of another version, or was edited.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ManifestError(f"there is no manifest {path}; run the audit, or restore the file") from None
    except ValueError as error:
        raise ManifestError(f"the manifest {path} is damaged ({error}); restore it from where it was kept") from error
    recorded = body.pop("sha256", None) if isinstance(body, dict) else None
    if not isinstance(body, dict) or recorded is None or sha256_of_json(body) != recorded:
        raise ManifestError(
            f"the manifest {path} was edited: it does not have the hash that it gives. Restore the original; a changed "
            "plan is another audit, with texts of its own to confirm on"
        )
    if body.get("schema_version") != SCHEMA_VERSION:
        raise ManifestError(
            f"the manifest {path} has schema version {body.get('schema_version')}, this version reads "
            f"{SCHEMA_VERSION}: run the audit again"
        )
    return Manifest(body)


def sha256_of_json(value: Any) -> str:
    """SHA-256 of the canonical JSON of a value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
