"""A run's configuration as text: read with overrides, unknown keys refused with the nearest valid one, and written.

config = load_config(Path("configs/quickstart.yaml"), overrides=["train.lr=5e-4"])
"""

import difflib
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipelines.config import RunConfig
from pipelines.errors import UsageError
from pipelines.yamlfiles import load_yaml


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML config and apply `key.path=value` overrides.

    Raises:
        UsageError: missing file, bad YAML, unknown key (the message names the nearest valid one) or bad value; all
            problems at once.
    """
    if not path.is_file():
        raise UsageError(f"config {path} does not exist: give a YAML file (see `sae init --help`) or a run directory")
    try:
        raw = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"config {path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise UsageError(f"config {path} must be a mapping of keys to values, not {type(raw).__name__}")
    for override in overrides:
        _apply_override(raw, override)
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise UsageError(_explain(error, path)) from error


def dump_config(config: RunConfig) -> str:
    """YAML of the whole config, defaults written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def differing_keys(a: Any, b: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of the keys in which two nested structures differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            yield from differing_keys(a.get(key), b.get(key), f"{prefix}.{key}" if prefix else str(key))
    elif a != b:
        yield prefix


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UsageError(f"--set takes key=value, not {override!r}; for example --set train.lr=5e-4")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--set {override}: the value is not valid YAML ({reason}); put it in quotes") from error
    parts = key.split(".")
    node: Any = raw
    for i, part in enumerate(parts):
        here: Any = part
        if isinstance(node, list):
            here = _index(part, node, override)
        elif not isinstance(node, dict):
            above = ".".join(parts[:i])
            raise UsageError(f"--set {override}: `{above}` is {node!r}, which has no keys; set it as a whole")
        if i == len(parts) - 1:
            node[here] = value
            return
        if isinstance(node, dict) and not isinstance(node.get(here), dict | list):
            node[here] = {}
        node = node[here]


def _index(part: str, node: list[Any], override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise UsageError(f"--set {override}: {part!r} must be a position in a list of {len(node)}")
    return int(part)


def _explain(error: ValidationError, path: Path) -> str:
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            valid = sorted(_fields_at(RunConfig, problem["loc"][:-1]))
            near = difflib.get_close_matches(str(problem["loc"][-1]), valid, n=1, cutoff=0.0)
            lines.append(
                f"unknown key `{where}`; the nearest valid key is `{near[0]}`" if near else f"unknown key `{where}`"
            )
        elif problem["type"] == "missing":
            lines.append(f"`{where}` is missing")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            # An address or the name of a key is not repeated: somebody may have put a secret in it.
            secret = where in ("", "collect.store") or where.startswith("label.llm")
            got = "" if secret else f" (got {problem['input']!r})"
            lines.append(f"`{where}`: {message}{got}" if where else message)
    return f"config {path}: " + "; ".join(lines)


def _fields_at(model: type[BaseModel], loc: Sequence[str | int]) -> set[str]:
    """Valid keys at a location inside the config, following sections, optional sections, lists and mappings."""
    current: type[BaseModel] = model
    for part in loc:
        if isinstance(part, str) and part in current.model_fields:
            found = _section_in(current.model_fields[part].annotation)
            if found is None:
                return set()
            current = found
    return set(current.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if typing.get_origin(annotation) is None and isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in typing.get_args(annotation):
        found = _section_in(argument)
        if found is not None:
            return found
    return None
