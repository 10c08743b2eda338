"""Verify the folder of an audit without the model: every figure again, from the scores of the examples.

The plan, the ledger's record, the scores and the page are checked against audit.json, and audit.json against the user's
ledger where that holds the opening. What needs more than scores is taken as recorded, and said to be: the scores of
fitted probes, cosines of decoder directions, absorption, and word counts of texts that are redacted.
"""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.audit.bundle import read_scores
from pipelines.audit.ledger import Ledger, LedgerError, opening_of, repeats
from pipelines.audit.manifest import Manifest, ManifestError, read_manifest, sha256_of_json
from pipelines.audit.recompute import examples_in, recompute
from pipelines.audit.report import render_report
from pipelines.audit.result import AuditResult, load_result
from pipelines.audit.settings import AuditSettings
from pipelines.audit.splits import split_by_group
from pipelines.errors import UsageError

TOLERANCE = 1e-4
"""By which a figure may differ: linear algebra rounds differently on other machines."""
SHOWN = 20


class Verified(NamedTuple):
    """What was found."""

    problems: list[str]
    """Each names the file, and the place in it."""
    notes: list[str]
    """What could not be checked here."""
    n_figures: int
    """Numbers computed again."""


def bundles_in(path: Path) -> list[Path]:
    """The audit folders that a path means: itself, or those of a run.

    Raises:
        UsageError: there is none.
    """
    if (path / "audit.json").exists() or (path / "manifest.json").exists():
        return [path]
    found = sorted(p.parent for p in path.glob("audit/*/manifest.json"))
    if not found:
        raise UsageError(f"{path} holds no audit: give the folder of one (with audit.json), or a run that has some")
    return found


def verify_audit(folder: Path, *, ledger: Ledger | None = None) -> Verified:
    """Check one audit's folder; reads only."""
    try:
        manifest = read_manifest(folder / "manifest.json")
        if not (folder / "audit.json").exists():
            return Verified([f"{folder} has no audit.json: the audit was abandoned. Run it again"], [], 0)
        result = load_result(folder / "audit.json")
        stored = read_scores(folder / "scores.safetensors")
    except (ManifestError, ValueError) as error:
        return Verified([str(error)], [], 0)
    problems = list(_plan_problems(manifest, result))
    if hashlib.sha256((folder / "scores.safetensors").read_bytes()).hexdigest() != result.scores_sha256:
        problems.append("scores.safetensors is not the file that audit.json was computed from: it was edited")
    if (folder / "report.html").exists() and (folder / "report.html").read_text(encoding="utf-8") != render_report(
        result
    ):
        problems.append("report.html does not show what audit.json says: it was edited, or another version made it")
    told, notes = _ledger_problems(folder, manifest, result, ledger or Ledger.default())
    problems += told
    recomputed: dict[str, Any] = {}
    try:
        recomputed = recompute(result, stored)
    except (ValueError, KeyError, IndexError, UsageError) as error:
        problems.append(f"audit.json: its figures cannot be computed from scores.safetensors ({error})")
    recorded = result.model_dump(mode="json")
    wrong = [d for key, value in recomputed.items() for d in _differences(recorded[key], value, key)]
    problems += [f"audit.json: {line}" for line in wrong[:SHOWN]]
    if len(wrong) > SHOWN:
        problems.append(f"audit.json: and {len(wrong) - SHOWN} further figures")
    notes.append(
        "taken as recorded: scores of fitted probes and random features, cosines, absorption"
        + (", word statistics (redacted)" if result.concept.redacted else "")
        + (", causal tests (they need the model)" if result.causal is not None else "")
    )
    return Verified(problems, notes, sum(_numbers(value) for value in recomputed.values()))


def _plan_problems(manifest: Manifest, result: AuditResult) -> Iterator[str]:
    """Where audit.json departs from the plan."""
    if manifest.sha256 != result.manifest_sha256:
        yield "manifest.json is not the plan that audit.json names: one of them was edited or belongs elsewhere"
    planned = [tuple(row) for row in manifest.body["examples"]]
    if planned != [(e.digest, e.role, e.group, e.part) for e in result.examples]:
        yield "audit.json: examples are not those of the manifest"
    for key in ("settings", "dictionaries"):
        if manifest.body[key] != result.model_dump(mode="json")[key]:
            yield f"audit.json: {key} are not those of the manifest"
    examples = examples_in(result)
    edited = [
        i
        for i, (e, x) in enumerate(zip(result.examples, examples, strict=True))
        if e.text is not None and (len(e.text) != e.n_characters or (not e.chat and x.digest != e.digest))
    ]
    if edited:
        yield f"audit.json: the text of examples {edited[:SHOWN]} does not have its digest: it was edited"
    settings = AuditSettings(**result.settings)
    try:
        split = split_by_group(
            examples,
            seed=settings.seed,
            discover_fraction=settings.discover_fraction,
            tune_fraction=settings.tune_fraction,
        )
        if split.part_of() != [e.part for e in result.examples]:
            yield "audit.json: the parts of the examples are not those that the seed and the groups give"
    except ValueError as error:
        yield f"audit.json: its examples cannot be split ({error})"


def _ledger_problems(
    folder: Path, manifest: Manifest, result: AuditResult, ledger: Ledger
) -> tuple[list[str], list[str]]:
    """What is wrong with the record of the opening, and what cannot be told here."""
    opening, problems = result.opening, []
    records = opening.records
    bad = [
        r.get("seq") for r in records if sha256_of_json({k: v for k, v in r.items() if k != "sha256"}) != r["sha256"]
    ]
    if bad or not records:
        return [f"audit.json: opening.records {bad} do not have the hash that they give: they were edited"], []
    own, before = records[-1], records[:-1]
    expected = {
        "manifest_sha256": manifest.sha256,
        "confirm_sha256": manifest.confirm_sha256,
        "dictionaries": manifest.dictionaries,
        "positives": manifest.confirm_positives,
    }
    problems += [
        f"audit.json: the opening's {key} is not the manifest's" for key in expected if own[key] != expected[key]
    ]
    told = opening.model_dump(mode="json")
    keys = ("seq", "time", "sha256", "manifest_sha256", "confirm_sha256", "dictionaries")
    problems += [f"audit.json: opening.{key} is not that of its record" for key in keys if told[key] != own[key]]
    first = min([r["seq"] for r in before if r["manifest_sha256"] == own["manifest_sha256"]], default=own["seq"])
    if opening.reused != sum(r["seq"] < first for r in before) or not all(repeats(r, own) for r in before):
        problems.append("audit.json: opening.reused is not what its records say")
    if [(e.seq, e.time, e.name) for e in opening.earlier] != [(r["seq"], r["time"], r["name"]) for r in before]:
        problems.append("audit.json: opening.earlier is not what its records say")
    try:
        kept = ledger.records()
    except LedgerError as error:
        return [*problems, str(error)], []
    at = opening.seq
    if at >= len(kept) or kept[at]["sha256"] != opening.sha256:
        return problems, [f"the ledger {ledger.path} does not hold this opening: it was recorded in another one"]
    if opening_of(kept[: at + 1], kept[at]) != opening:
        problems.append("audit.json: opening does not list what the ledger holds: it was edited")
    ended = [r for r in kept if r["event"] == "finished" and r["opened"] == at]
    written = hashlib.sha256((folder / "audit.json").read_bytes()).hexdigest()
    if ended and ended[-1]["result_sha256"] != written:
        problems.append("audit.json is not the file whose hash the ledger recorded: it was edited after the audit")
    return problems, [] if ended else ["the ledger holds the opening, and no end of it"]


def _differences(recorded: Any, again: Any, at: str) -> Iterator[str]:
    """Where a recorded value is not the one computed again."""
    if isinstance(recorded, dict) and isinstance(again, dict):
        for key in recorded.keys() | again.keys():
            yield from _differences(recorded.get(key), again.get(key), f"{at}.{key}")
    elif isinstance(recorded, list) and isinstance(again, (list, tuple)) and len(recorded) == len(again):
        for i, (a, b) in enumerate(zip(recorded, again, strict=True)):
            yield from _differences(a, b, f"{at}[{i}]")
    elif isinstance(recorded, float) and isinstance(again, int | float):
        if not math.isclose(recorded, again, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            yield f"{at} says {recorded:g}, the scores give {again:g}"
    elif recorded != again:
        yield f"{at} says {str(recorded)[:80]!r}, the scores give {str(again)[:80]!r}"


def _numbers(value: Any) -> int:
    if isinstance(value, dict):
        return sum(_numbers(v) for v in value.values())
    if isinstance(value, list | tuple):
        return sum(_numbers(v) for v in value)
    return int(isinstance(value, int | float) and not isinstance(value, bool))
