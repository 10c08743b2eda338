"""Which tokens a stage works on: names in the config → codes in the store's per-token tables → masks.

train: {select: {role: [assistant]}}      # only what assistants said
audit: {select: {source: [reports]}}      # documents of one text source
"""

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipelines.chat import ROLES

if TYPE_CHECKING:
    from pipelines.config import SelectConfig, TextSource
    from storage import ActivationStore

Selection = Mapping[str, Collection[int]]
"""Allowed values by table; every table must agree. Empty: all tokens."""


def selection_of(select: "SelectConfig | None", sources: "Sequence[TextSource]") -> Selection:
    """The codes behind a `select:` section.

    Raises:
        ValueError: an unknown role or source (the nearest is named), a turn below 0, or a list without entries.
    """
    if select is None:
        return {}
    codes: dict[str, list[int]] = {}
    for table in ("source", "role", "turn"):
        wanted = getattr(select, table)
        if wanted is None:
            continue
        if not wanted:
            raise ValueError(f"{table} is empty, which selects nothing: name at least one, or drop it")
        if table == "role":
            codes[table] = [ROLES[_known(name, ROLES, "role")] for name in wanted]
        elif table == "source":
            codes[table] = [code for name in wanted for code in _sources(name, sources)]
        else:
            if min(wanted) < 0:
                raise ValueError(f"turn counts messages from 0, got {min(wanted)}")
            codes[table] = list(wanted)
        codes[table] = sorted(set(codes[table]))
    return codes


def kept(
    store: "ActivationStore", hook: str, start: int, stop: int, sink_multiple: float, selection: Selection | None = None
) -> NDArray[np.bool_]:
    """Tokens of contexts [start, stop) that are selected and no sinks, bool [stop - start, context_length]."""
    return selected(store, start, stop, selection) & ~store.sink_mask(hook, start, stop, sink_multiple)


def selected(store: "ActivationStore", start: int, stop: int, selection: Selection | None = None) -> NDArray[np.bool_]:
    """Tokens of contexts [start, stop) that are selected, sinks too."""
    return store.select(selection or {}, start, stop)


def _sources(name: str | int, sources: "Sequence[TextSource]") -> list[int]:
    """Numbers of the sources with that id or origin; or the number itself."""
    if isinstance(name, int):
        if not 0 <= name < len(sources):
            raise ValueError(f"source {name} must be a position in the list of {len(sources)} text sources")
        return [name]
    names = [{source.origin, source.path or source.dataset or "", source.id or source.origin} for source in sources]
    found = [number for number, known in enumerate(names) if name in known]
    return found or _sources(_known(name, sorted(set().union(*names)), "source"), sources)


def _known(name: str, names: Collection[str], what: str) -> str:
    if name in names:
        return name
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)
    raise ValueError(f"there is no {what} {name!r}" + (f"; the nearest is {near[0]!r}" if near else ""))
