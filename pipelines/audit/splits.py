"""Split by group: discover, tune and confirm, with the out-of-distribution set beside them.

    discover   every latent is looked at; some become candidates
    tune       thresholds, pooling and sets of latents are chosen
    confirm    opened once: what was chosen is judged
    ood        another kind of text, judged after confirm and never chosen on

A group's part depends on the seed, on its name and on the names of the groups of its kind, and on nothing else: not on
the order of the texts, nor on a random generator's version.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from pipelines.audit.examples import Example

Part = Literal["discover", "tune", "confirm", "ood"]
PARTS: tuple[Part, ...] = ("discover", "tune", "confirm", "ood")


class Split(NamedTuple):
    """Row numbers of the four parts, ascending; no group of the first three is in two of them."""

    discover: Int[np.ndarray, " n_discover"]
    tune: Int[np.ndarray, " n_tune"]
    confirm: Int[np.ndarray, " n_confirm"]
    ood: Int[np.ndarray, " n_ood"]

    def part_of(self) -> list[Part]:
        """The part of every row."""
        out = np.empty(sum(rows.size for rows in self), dtype=object)
        for name, rows in zip(PARTS, self, strict=True):
            out[rows] = name
        return out.tolist()


def split_by_group(
    examples: Sequence[Example], *, seed: int, discover_fraction: float = 0.5, tune_fraction: float = 0.2
) -> Split:
    """Deal whole groups to discover, tune and confirm, evenly within each kind of group (its set of roles).

    Raises:
        ValueError: the fractions leave a part empty, or a part would lack a class.
    """
    if min(discover_fraction, tune_fraction) <= 0 or discover_fraction + tune_fraction >= 1:
        raise ValueError(
            "discover_fraction and tune_fraction must be above 0 and leave something to confirm; got "
            f"{discover_fraction} and {tune_fraction}. Use 0.5 and 0.2."
        )
    rows: dict[str, list[int]] = defaultdict(list)
    for i, example in enumerate(examples):
        if not example.ood:
            rows[example.group].append(i)
    kinds: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for group in rows:
        kinds[tuple(sorted({examples[i].role for i in rows[group]}))].append(group)
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for kind in sorted(kinds):
        order = sorted(kinds[kind], key=lambda group: _place(seed, group))
        cuts = round(len(order) * discover_fraction), round(len(order) * (discover_fraction + tune_fraction))
        for place, group in enumerate(order):
            parts[sum(place >= cut for cut in cuts)].extend(rows[group])
    for name, part in zip(PARTS, parts, strict=False):
        if len({examples[i].positive for i in part}) < 2:
            raise ValueError(
                f"each part needs both classes; {name} has {len(part)} texts of one class or none. "
                "Add independent groups of the class that is missing."
            )
    ood = [i for i, example in enumerate(examples) if example.ood]
    return Split(*(np.array(sorted(part), dtype=np.int64) for part in (*parts, ood)))


def _place(seed: int, group: str) -> str:
    return hashlib.sha256(f"{seed}\0{group}".encode()).hexdigest()
