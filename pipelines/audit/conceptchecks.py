"""What makes a concept unusable, in words: every problem of a file at once, each with its fix, none with its text."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from pipelines.audit.examples import normalised

if TYPE_CHECKING:
    from pipelines.audit.concepts import Concept, Item

MIN_GROUPS = 30
"""Independent texts that each class needs: with fewer, even a perfect latent is missed too often."""
MAX_CHARACTERS = 4000
REFERENCE = r"^(positives|hard_negatives|negatives)\[(\d+)\]$"
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def problems_of(concept: "Concept") -> list[str]:
    """Everything that is wrong with a concept."""
    lists = {key: items for key, items in concept.lists().items() if items}
    if concept.kind == "behaviour":
        return [
            "kind: behaviour needs the model's own responses with an outcome label each, which audits do not take yet; "
            "use kind: text, and read its verdict as 'responds to text about it'"
        ]
    if concept.topic is not None:
        return [f"topic and {', '.join(lists)} exclude each other; keep one"] if lists else []
    problems = []
    if concept.query is not None and not lists:
        problems.append("a query proposes latents by their labels and confirms none; give examples as well")
    ood = {"ood.positives": concept.ood.positives, "ood.negatives": concept.ood.negatives}
    if bool(concept.ood.positives) != bool(concept.ood.negatives):
        problems.append("ood has one class only; an AUROC there needs both positives and negatives")
    problems += _texts({**concept.lists(), **ood}, needs_chats=concept.position != "all")
    problems += [
        f"{where} names {member}, which is not there; the list has {len(concept.lists()[key])} entries"
        for where, member, key, index in _references(concept)
        if index >= len(concept.lists()[key])
    ]
    problems += _too_few("positives", concept.positives)
    problems += _too_few("hard_negatives and negatives", (*concept.hard_negatives, *concept.negatives))
    return problems


def _texts(lists: Mapping[str, Iterable["Item"]], *, needs_chats: bool) -> list[str]:
    problems = []
    owners: dict[str, list[str]] = defaultdict(list)
    for key, items in lists.items():
        for i, item in enumerate(items):
            where, text = f"{key}[{i}]", item.content
            if not text.strip():
                problems.append(f"{where} is empty; write a text or remove it")
            if len(text) > MAX_CHARACTERS:
                problems.append(
                    f"{where} has {len(text)} characters; at most {MAX_CHARACTERS} are pooled into one score, "
                    "so split it"
                )
            if CONTROL.search(text):
                problems.append(f"{where} holds control characters; remove them")
            if needs_chats and item.messages is None:
                problems.append(f"{where} is plain text, which has no roles; give messages, or use position: all")
            owners[_identity(item)].append(where)
    for where_all in owners.values():
        if len(where_all) > 1 and len({"positives" in w for w in where_all}) > 1:
            problems.append(f"{', '.join(where_all)} are one text with contradictory labels; keep one")
        elif len(where_all) > 1:
            problems.append(f"{', '.join(where_all)} are the same text; keep one")
    return problems


def _identity(item: "Item") -> str:
    return "\0".join([*(role for role, _ in item.messages or ()), normalised(item.content)])


def _references(concept: "Concept") -> Iterable[tuple[str, str, str, int]]:
    named = [(f"groups.{name}", members) for name, members in concept.groups.items()]
    named += [(f"pairs[{number}]", members) for number, members in enumerate(concept.pairs)]
    for where, members in named:
        for member in members:
            key, _, index = member.removesuffix("]").partition("[")
            yield where, member, key, int(index)


def _too_few(key: str, items: Iterable["Item"]) -> list[str]:
    items = list(items)
    count = len({item.group for item in items if item.group}) + sum(item.group is None for item in items)
    if not items:
        return [
            f"{key}: a concept needs both classes, and this one is empty; write {MIN_GROUPS} independent texts or more"
        ]
    if count < MIN_GROUPS:
        return [
            f"{key}: {len(items)} texts in {count} groups are too few to detect anything; at least {MIN_GROUPS} groups "
            f"are needed, {MIN_GROUPS - count} more"
        ]
    return []
