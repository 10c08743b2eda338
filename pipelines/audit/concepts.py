"""Concept specifications: what is looked for, given as labelled texts, never as a query over labels.

A concept file is YAML:

    schema_version: 1
    name: deception                  # file-name safe; also the name of the audit
    title: Deception
    description: Someone means another person to believe what they know to be false.
    positives: [text, {text: ..., group: source-a}, ...]
    hard_negatives: [...]            # the same words and scenes without the concept
    negatives: [...]                 # optional: ordinary texts

or, for a topic that the corpus itself labels, `topic: {positive: Geography, exclude: [Uncategorized]}`.
Texts that share a `group` (a source, a template) stay on one side of every split; a text without one is its own group.
"""

import difflib
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pipelines.errors import UsageError
from pipelines.yamlfiles import load_yaml

MIN_GROUPS = 30
"""Independent texts that each class needs: with 15 per half, 80 % power starts near an AUROC of 0.93."""
MAX_CHARACTERS = 4000

Role = Literal["positive", "hard_negative", "negative"]


class ConceptError(UsageError):
    """A concept file that cannot be used; the message lists every problem and its fix."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One labelled text."""

    text: str
    role: Role
    group: str

    @property
    def positive(self) -> bool:
        """Whether the concept is present."""
        return self.role == "positive"

    @property
    def digest(self) -> str:
        """Identity of the text: the first 16 hex digits of its SHA-256."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


class Item(BaseModel):
    """One entry of a list of examples; a bare string is an entry without a group."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    text: str
    group: str | None = None


class Topic(BaseModel):
    """A concept that the corpus labels: its documents of one topic against those of all others."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    positive: str
    """Documents of this topic are positives."""
    exclude: tuple[str, ...] = ()
    """Documents of these topics are left out: neither positive nor surely negative."""
    n_per_class: int = Field(default=120, ge=MIN_GROUPS, le=2000)
    """Documents drawn for each class; negatives keep the corpus's mixture of topics."""


def _as_items(value: Any) -> Any:
    return [{"text": v} if isinstance(v, str) else v for v in value] if isinstance(value, list) else value


Items = Annotated[tuple[Item, ...], BeforeValidator(_as_items)]


class Concept(BaseModel):
    """A validated concept specification."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: Literal[1] = 1
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    title: str = ""
    description: str = ""
    kind: Literal["text", "behaviour"] = "text"
    """`text`: a verdict speaks of texts about the concept, never of what the model does."""
    positives: Items = ()
    hard_negatives: Items = ()
    negatives: Items = ()
    topic: Topic | None = None
    redact: bool = False
    """Keep example texts out of everything written; digests, lengths and scores stay."""

    @model_validator(mode="after")
    def _usable(self) -> "Concept":
        problems = _problems(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def display(self) -> str:
        """Title for people."""
        return self.title or self.name.replace("_", " ")


def load_concept(path: str | Path) -> Concept:
    """Read and validate one concept file.

    Raises:
        ConceptError: missing file, not YAML, unknown key (with the nearest valid one), one class only, too few groups,
            empty, duplicated or contradictory texts. All problems of the file are listed at once.
    """
    path = Path(path)
    try:
        raw = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = ", ".join(sorted(p.name for p in path.parent.glob("*.yaml"))) or "none"
        raise ConceptError(f"a concept file must exist; {path} does not. Concept files beside it: {near}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConceptError(
            f"a concept file must be UTF-8 YAML; {path} is not: {error}. Fix the syntax there."
        ) from None
    if not isinstance(raw, dict):
        raise ConceptError(f"a concept file must be a mapping of keys; {path} holds a {type(raw).__name__}.")
    return concept_from_dict(raw, where=str(path))


def concept_from_dict(raw: dict[str, Any], *, where: str = "concept") -> Concept:
    """Validate a mapping; `where` names its origin in errors."""
    try:
        return Concept.model_validate(raw)
    except ValidationError as error:
        lines = []
        for e in error.errors():
            key = ".".join(str(part) for part in e["loc"])
            if e["type"] == "extra_forbidden":
                owner = Topic if e["loc"][0] == "topic" else Concept if len(e["loc"]) == 1 else Item
                near = difflib.get_close_matches(str(e["loc"][-1]), owner.model_fields, n=1, cutoff=0.0)[0]
                lines.append(f"unknown key '{key}'; the nearest valid key is '{near}'")
            else:
                lines.append(f"{key}: {e['msg']}" if key else e["msg"].removeprefix("Value error, "))
        raise ConceptError(
            f"{where} is not a usable concept:\n  " + "\n  ".join("\n".join(lines).split("\n"))
        ) from None


def examples_of(concept: Concept) -> list[Example]:
    """The examples written in the concept file, positives first.

    Raises:
        ConceptError: the concept is a topic, whose examples come from the corpus (`topic_examples`).
    """
    if concept.topic is not None:
        raise ConceptError(
            f"concept '{concept.name}' takes its examples from the corpus; call topic_examples with its documents."
        )
    lists: list[tuple[Role, tuple[Item, ...]]] = [
        ("positive", concept.positives),
        ("hard_negative", concept.hard_negatives),
        ("negative", concept.negatives),
    ]
    return [
        Example(text=item.text, role=role, group=item.group or f"{role}-{i:04d}")
        for role, items in lists
        for i, item in enumerate(items)
    ]


def topic_examples(
    concept: Concept, *, doc_ids: Sequence[str], topics: Sequence[str], texts: Sequence[str], seed: int = 0
) -> list[Example]:
    """Draw a topic concept's examples from documents (give the held-out ones only); each document is its own group.

    Raises:
        ConceptError: not a topic concept, an unknown topic (the topics there are listed), or too few documents.
    """
    if concept.topic is None:
        raise ConceptError(f"concept '{concept.name}' has its own examples; call examples_of.")
    names = np.asarray(topics, dtype=object)
    present = sorted({str(t) for t in topics})
    unknown = [t for t in (concept.topic.positive, *concept.topic.exclude) if t not in present]
    if unknown:
        raise ConceptError(
            f"concept '{concept.name}' names topics that the documents do not have: {', '.join(unknown)}. "
            f"They have: {', '.join(present)}."
        )
    usable = np.array([bool(t.strip()) for t in texts]) & ~np.isin(names, list(concept.topic.exclude))
    rng = np.random.default_rng(seed)
    examples = []
    roles: list[tuple[Role, np.ndarray]] = [
        ("positive", names == concept.topic.positive),
        ("negative", names != concept.topic.positive),
    ]
    for role, mask in roles:
        rows = np.flatnonzero(mask & usable)
        if rows.size < MIN_GROUPS:
            raise ConceptError(
                f"concept '{concept.name}' needs {MIN_GROUPS} documents or more of each class; got {rows.size} "
                f"{role} ones. Use more held-out text or another topic."
            )
        drawn = np.sort(rng.permutation(rows)[: concept.topic.n_per_class])
        examples += [Example(text=texts[i], role=role, group=doc_ids[i]) for i in drawn]
    return examples


def shared_ngrams(texts: Sequence[str], groups: Sequence[str], n: int = 8) -> list[tuple[int, int]]:
    """Pairs of texts from different groups that share n consecutive words (first pair per text): near duplicates."""
    seen: dict[tuple[str, ...], int] = {}
    pairs = []
    for i, text in enumerate(texts):
        w = words(text)
        for gram in {tuple(w[k : k + n]) for k in range(len(w) - n + 1)}:
            j = seen.setdefault(gram, i)
            if groups[j] != groups[i]:
                pairs.append((j, i))
                break
    return pairs


def words(text: str) -> list[str]:
    """Case-folded words, apostrophes kept inside."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.casefold())


def _problems(concept: Concept) -> list[str]:
    if concept.kind == "behaviour":
        return [
            "kind: behaviour needs the model's own responses with an outcome label each, which audits do not take yet; "
            "use kind: text, and read its verdict as 'responds to text about it'"
        ]
    lists = {"positives": concept.positives, "hard_negatives": concept.hard_negatives, "negatives": concept.negatives}
    if concept.topic is not None:
        both = [key for key, items in lists.items() if items]
        return [f"topic and {', '.join(both)} exclude each other; keep one"] if both else []
    problems = []
    owners: dict[str, list[str]] = defaultdict(list)
    for key, items in lists.items():
        for i, item in enumerate(items):
            where = f"{key}[{i}]"
            if not item.text.strip():
                problems.append(f"{where} is empty; write a text or remove it")
            if len(item.text) > MAX_CHARACTERS:
                problems.append(
                    f"{where} has {len(item.text)} characters; at most {MAX_CHARACTERS} are pooled into one score, "
                    "so split it"
                )
            if re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", item.text):
                problems.append(f"{where} holds control characters; remove them")
            owners[" ".join(words(item.text)) or item.text.strip()].append(where)
    for where_all in owners.values():
        if len(where_all) > 1 and len({w.startswith("positives") for w in where_all}) > 1:
            problems.append(f"{', '.join(where_all)} are one text with contradictory labels; keep one")
        elif len(where_all) > 1:
            problems.append(f"{', '.join(where_all)} are the same text; keep one")
    problems += _too_few("positives", concept.positives)
    problems += _too_few("hard_negatives and negatives", (*concept.hard_negatives, *concept.negatives))
    return problems


def _too_few(key: str, items: Iterable[Item]) -> list[str]:
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
