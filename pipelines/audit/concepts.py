"""Concept specifications: what is looked for, given as labelled texts, never as a query over labels.

A concept file is YAML:

    schema_version: 1
    name: deception                  # file-name safe; also the name of the audit
    title: Deception
    description: Someone means another person to believe what they know to be false.
    positives: [text, {text: …, group: source-a}, {messages: [{role: user, content: …}, …]}, …]
    hard_negatives: […]              # the same words and scenes without the concept
    negatives: […]                   # optional: ordinary texts
    ood:                             # optional: another kind of text, looked at last
      positives: […]
      negatives: […]                 # or a list of {text: …, label: positive | negative}
    groups: {letters: ["positives[0]", "hard_negatives[3]"]}      # optional: what shares a source or template
    pairs: [["positives[0]", "hard_negatives[0]"], …]             # optional: versions of one text
    position: all                    # of chats: all | user | assistant | last_prompt_token
    wordlist: [lie, lied, …]         # optional: words of the concept, for a baseline that only looks for them
    outcome_tokens: [" Sorry", …]    # optional: how an answer that shows the behaviour begins
    query: strategic dishonesty      # optional: proposes latents by their labels, and confirms none
    redact: true                     # keep texts out of everything written

In place of the lists, `topic: {positive: Geography, exclude: [Uncategorized]}` takes documents of the corpus by their
label. A `.jsonl` file is a concept as well: `{text or messages, label, group, ood}` a line, labels as above or true and
false, its name that of the file; a first line `{"concept": {title: …, …}}` may hold the other keys.

Texts that share a `group` (a source, a template, a pair) stay on one side of every split; a text without one is its own
group.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pipelines.audit.conceptchecks import MIN_GROUPS, REFERENCE, problems_of
from pipelines.audit.examples import Example, Position, Role
from pipelines.audit.jsonlines import from_json_lines
from pipelines.chat import checked_messages
from pipelines.errors import UsageError
from pipelines.yamlfiles import load_yaml


class ConceptError(UsageError):
    """A concept file that cannot be used; the message lists every problem and its fix."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _as_messages(value: Any) -> Any:
    return None if value is None else tuple((role, content) for role, content in checked_messages(value))


class Item(_Section):
    """One entry of a list of examples; a bare string is an entry without a group."""

    text: str | None = None
    messages: Annotated[tuple[tuple[str, str], ...] | None, BeforeValidator(_as_messages)] = None
    """A chat in place of a text: {role, content} each."""
    group: str | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> "Item":
        if (self.text is None) == (self.messages is None):
            raise ValueError("give exactly one of text and messages")
        return self

    @property
    def content(self) -> str:
        """The text, or the contents of the messages."""
        return self.text if self.text is not None else "\n\n".join(c for _, c in self.messages or ())


class OodItem(Item):
    """An out-of-distribution example that carries its label."""

    label: Literal["positive", "negative"]


class Topic(_Section):
    """A concept that the corpus labels: its documents of one topic against those of all others."""

    positive: str
    """Documents of this topic are positives."""
    exclude: tuple[str, ...] = ()
    """Documents of these topics are left out: neither positive nor surely negative."""
    n_per_class: int = Field(default=120, ge=MIN_GROUPS, le=2000)
    """Documents drawn for each class; negatives keep the corpus's mixture of topics."""


def _as_items(value: Any) -> Any:
    return [{"text": v} if isinstance(v, str) else v for v in value] if isinstance(value, list) else value


Items = Annotated[tuple[Item, ...], BeforeValidator(_as_items)]


class OodSet(_Section):
    """Texts of another kind: another register, source or language."""

    positives: Items = ()
    negatives: Items = ()


def _as_ood(value: Any) -> Any:
    """A list of labelled items, sorted into the two lists."""
    if not isinstance(value, list):
        return value
    try:
        items = [OodItem.model_validate(v) for v in value]
    except ValidationError as error:
        raise ValueError("a list entry must be {text or messages, label: positive or negative, group}") from error

    def of(label: str) -> list[dict[str, Any]]:
        return [
            {
                "text": i.text,
                "group": i.group,
                "messages": i.messages and [{"role": r, "content": c} for r, c in i.messages],
            }
            for i in items
            if i.label == label
        ]

    return {"positives": of("positive"), "negatives": of("negative")}


class Concept(_Section):
    """A validated concept specification; see the module."""

    schema_version: Literal[1] = 1
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    title: str = ""
    description: str = ""
    kind: Literal["text", "behaviour"] = "text"
    """`text`: a verdict speaks of texts about the concept, never of what the model does."""
    positives: Items = ()
    hard_negatives: Items = ()
    negatives: Items = ()
    ood: Annotated[OodSet, BeforeValidator(_as_ood)] = OodSet()
    groups: dict[str, tuple[Annotated[str, Field(pattern=REFERENCE)], ...]] = {}
    pairs: tuple[Annotated[tuple[Annotated[str, Field(pattern=REFERENCE)], ...], Field(min_length=2)], ...] = ()
    topic: Topic | None = None
    position: Position = "all"
    """Which tokens of a chat are pooled."""
    wordlist: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    outcome_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    query: str | None = None
    redact: bool = False
    """Keep example texts out of everything written; digests, lengths and scores stay."""

    @model_validator(mode="after")
    def _usable(self) -> "Concept":
        problems = problems_of(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def display(self) -> str:
        """Title for people."""
        return self.title or self.name.replace("_", " ")

    def lists(self) -> dict[str, tuple[Item, ...]]:
        """The written examples by the key that they stand under."""
        return {"positives": self.positives, "hard_negatives": self.hard_negatives, "negatives": self.negatives}


def load_concept(path: str | Path) -> Concept:
    """Read and validate one concept file.

    Raises:
        ConceptError: missing file, not YAML, unknown key (with the nearest valid one), one class only, too few groups,
            empty, duplicated or contradictory texts. All problems of the file are listed at once.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        raw = from_json_lines(text, path.stem) if path.suffix == ".jsonl" else load_yaml(text)
    except FileNotFoundError:
        near = ", ".join(sorted(p.name for p in path.parent.glob("*.yaml"))) or "none"
        raise ConceptError(f"a concept file must exist; {path} does not. Concept files beside it: {near}.") from None
    except (yaml.YAMLError, ValueError) as error:
        kind = "JSON lines" if path.suffix == ".jsonl" else "YAML"
        raise ConceptError(
            f"a concept file must be UTF-8 {kind}; {path} is not: {error}. Fix the syntax there."
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
                owner = _owner(e["loc"])
                near = difflib.get_close_matches(str(e["loc"][-1]), owner.model_fields, n=1, cutoff=0.0)[0]
                lines.append(f"unknown key '{key}'; the nearest valid key is '{near}'")
            else:
                lines.append(f"{key}: {e['msg']}" if key else e["msg"].removeprefix("Value error, "))
        raise ConceptError(
            f"{where} is not a usable concept:\n  " + "\n  ".join("\n".join(lines).split("\n"))
        ) from None


def _owner(where: tuple[int | str, ...]) -> type[_Section]:
    """The section whose keys an unknown key could have meant."""
    if len(where) == 1:
        return Concept
    sections: dict[str, type[_Section]] = {"topic": Topic, "ood": OodSet}
    return sections.get(str(where[0]), Item) if len(where) == 2 else Item


ROLE_OF: dict[str, Role] = {"positives": "positive", "hard_negatives": "hard_negative", "negatives": "negative"}


def examples_of(concept: Concept) -> list[Example]:
    """The examples written in the concept file, positives first, out-of-distribution ones last.

    Raises:
        ConceptError: the concept takes its examples from elsewhere.
    """
    if concept.topic is not None:
        raise ConceptError(
            f"concept '{concept.name}' takes its examples from the corpus; call topic_examples with its documents."
        )
    shared = _shared_groups(concept)
    out = [
        example_from(item, ROLE_OF[key], shared.get(f"{key}[{i}]", item.group), position=concept.position)
        for key, items in concept.lists().items()
        for i, item in enumerate(items)
    ]
    ood: list[tuple[Role, tuple[Item, ...]]] = [
        ("positive", concept.ood.positives),
        ("negative", concept.ood.negatives),
    ]
    return out + [
        example_from(item, role, item.group, position=concept.position, ood=True)
        for role, items in ood
        for item in items
    ]


def example_from(
    item: Item, role: Role, group: str | None, *, position: Position = "all", ood: bool = False
) -> Example:
    """An example; without a group it is its own, named by its digest."""
    alone = Example(text=item.content, role=role, group="", ood=ood, messages=item.messages, position=position)
    return Example(
        text=item.content,
        role=role,
        group=group or f"text-{alone.digest}",
        ood=ood,
        messages=item.messages,
        position=position,
    )


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


def _shared_groups(concept: Concept) -> dict[str, str]:
    """Group of every written example that `groups` or `pairs` names; what they connect is one group."""
    owner: dict[str, str] = {}

    def root(name: str) -> str:
        while owner.setdefault(name, name) != name:
            name = owner[name]
        return name

    lists = concept.lists()
    named = [(f"group {name}", members) for name, members in concept.groups.items()]
    named += [(f"pair {number}", members) for number, members in enumerate(concept.pairs)]
    for name, members in named:
        for member in members:
            key, _, index = member.removesuffix("]").partition("[")
            own = lists[key][int(index)].group
            for other in (member, *(() if own is None else (f"named {own}",))):
                low, high = sorted((root(name), root(other)))
                owner[high] = low
    return {
        f"{key}[{i}]": root(f"{key}[{i}]" if item.group is None else f"named {item.group}")
        for key, items in lists.items()
        for i, item in enumerate(items)
        if (f"{key}[{i}]" if item.group is None else f"named {item.group}") in owner
    }
