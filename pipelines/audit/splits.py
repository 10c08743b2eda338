"""Split by group into discover and confirm, and write down what will be tested before anything is tested."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from pipelines.audit.concepts import Example


class Split(NamedTuple):
    """Row numbers of the two parts, ascending; no group is in both."""

    discover: Int[np.ndarray, " n_discover"]
    confirm: Int[np.ndarray, " n_confirm"]


def split_by_group(examples: Sequence[Example], *, seed: int, discover_fraction: float = 0.5) -> Split:
    """Deal whole groups to the two parts, evenly within each kind of group (its set of roles), in seeded random order.

    Raises:
        ValueError: `discover_fraction` is not in (0, 1), or a part would lack a class.
    """
    if not 0 < discover_fraction < 1:
        raise ValueError(f"discover_fraction must lie between 0 and 1; got {discover_fraction}. Use 0.5.")
    rows: dict[str, list[int]] = defaultdict(list)
    for i, example in enumerate(examples):
        rows[example.group].append(i)
    kinds: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for group in sorted(rows):
        kinds[tuple(sorted({examples[i].role for i in rows[group]}))].append(group)
    rng = np.random.default_rng(seed)
    parts: tuple[list[int], list[int]] = ([], [])
    for kind in sorted(kinds):
        order = rng.permutation(len(kinds[kind]))
        cut = round(len(order) * discover_fraction)
        for place, index in enumerate(order):
            parts[place >= cut].extend(rows[kinds[kind][index]])
    for name, part in zip(("discover", "confirm"), parts, strict=True):
        if len({examples[i].positive for i in part}) < 2:
            raise ValueError(
                f"each part needs both classes; {name} has {len(part)} texts of one class or none. "
                "Add independent groups of the class that is missing."
            )
    return Split(np.array(sorted(parts[0])), np.array(sorted(parts[1])))


def manifest(
    examples: Sequence[Example], split: Split, *, concept: str, dictionary: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """The plan of an audit: every text's digest, label, group and part, the settings, and the tests that will be made.

    It is written before any statistic is computed. `sha256` covers everything else in it, so a changed text, label,
    split or setting shows.
    """
    part = np.full(len(examples), "discover", dtype=object)
    part[split.confirm] = "confirm"
    plan: dict[str, Any] = {
        "schema_version": 1,
        "concept": concept,
        "dictionary": dictionary,
        "settings": settings,
        "planned_tests": [
            "discover: AUROC of every latent that fires on enough texts, one-sided, max-T over shuffled labels",
            f"confirm: the {settings['max_candidates']} latents with the largest z, one-sided permutation p, Holm",
        ],
        "examples": [[e.digest, e.role, e.group, str(p)] for e, p in zip(examples, part, strict=True)],
    }
    plan["sha256"] = digest(plan)
    return plan


def digest(plan: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON of a manifest, its own `sha256` left out."""
    body = {key: value for key, value in plan.items() if key != "sha256"}
    return hashlib.sha256(
        json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    ).hexdigest()
