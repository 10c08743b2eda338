"""`sae inspect`: tokens of the user's own text, or chat, with the latents that fire on them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.chat import ROLES, checked_messages
from pipelines.config import ModelConfig, RunConfig
from pipelines.errors import RunError, UsageError
from pipelines.models import LanguageModel, resolve_model
from pipelines.origin import model_of
from pipelines.rundir import RunDir
from pipelines.sources import locate
from pipelines.tokenising import Encoder, TextTokenizer
from sae import Dictionary
from sae.rendering import label_text, left_out, token_text, why_none
from sae.showing import Shown, grouped

_LONGEST_FILE = 2**24
_ROLE_NAMES = {code: name for name, code in ROLES.items()}


class Opened(NamedTuple):
    """A dictionary and what belongs to it."""

    dictionary: Dictionary
    model: ModelConfig
    chat_template: str | None = None
    """In place of the tokenizer's own."""


def open_dictionary(path: str, *, model: str | None = None, hook: str | None = None, sae: str | None = None) -> Opened:
    """A dictionary from anywhere, with its model.

    Args:
        path: a dictionary folder, a run directory, or a name that `pipelines.hub` knows.
        model: in place of the one that the run or the dictionary records.
        hook: in place of the recorded hook.
        sae: which SAE, if the run has several.
    Raises:
        UsageError: there is no such dictionary, or nobody says where it reads or which model it is of.
        RunError: the run has not exported it yet.
    """
    if (Path(path) / "config.yaml").exists():
        folder, config = _of_run(Path(path), sae)
        dictionary = _loaded(str(folder), hook)
        template = config.collect.chat_template_path
        return Opened(
            dictionary,
            config.model if model is None else model_of(dictionary, model),
            None if template is None else locate(template).read_text(encoding="utf-8"),
        )
    if sae is not None:
        raise UsageError(f"--sae chooses a dictionary of a run, but {path} is not a run directory")
    dictionary = _loaded(path, hook)
    return Opened(dictionary, model_of(dictionary, model))


def _loaded(path: str, hook: str | None) -> Dictionary:
    import pipelines.hub  # noqa: F401  for names that are no folder

    try:
        dictionary = Dictionary.load(path, hook_name=hook)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(str(error)) from error
    if not dictionary.hook_names:
        raise UsageError(f"the dictionary {path} does not say where it reads: give --hook, such as model.layers.8")
    return dictionary


def _of_run(path: Path, sae: str | None) -> tuple[Path, RunConfig]:
    from pipelines.configio import load_config

    config = load_config(path / "config.yaml")
    if sae is None and len(config.saes) > 1:
        raise UsageError(f"the run has several SAEs: choose one with --sae, from {', '.join(config.saes)}")
    name = sae or next(iter(config.saes))
    if name not in config.saes:
        raise UsageError(f"{path} has no SAE {name!r}, only {', '.join(config.saes)}")
    folder = RunDir(path).dictionary(name)
    if not folder.exists():
        raise RunError(f"{folder} is not there yet: run `sae export {path}` first")
    return folder, config


def read_messages(given: str) -> list[list[str]]:
    """`[[role, content], …]` of `--messages`: JSON, or the path of a file that holds it.

    Raises:
        UsageError: it is neither, or no chat.
    """
    text, where = given, "--messages"
    if not given.lstrip().startswith(("[", "{")):
        file = Path(given)
        if not file.is_file():
            raise UsageError(f"--messages must be JSON or a file, but {given!r} is neither")
        if file.stat().st_size > _LONGEST_FILE:
            raise UsageError(f"{given} has more than {_LONGEST_FILE:,} bytes: give the messages to look at alone")
        where = given
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{given} is not UTF-8 (byte {error.start}): convert it first") from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not valid JSON ({error}): give a list of {{role, content}}") from error
    try:
        return checked_messages(value)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from error


def inspect_text(
    opened: Opened,
    lm: LanguageModel,
    *,
    text: str | None = None,
    messages: list[list[str]] | None = None,
    n: int = 5,
    labelled: bool = False,
    max_tokens: int = 512,
) -> Shown:
    """What the dictionary sees in a text, or in a chat as the model's template gives it.

    Raises:
        UsageError: the text is empty or not Unicode, the model has no chat template, or does not fit the dictionary.
    """
    tokenizer = TextTokenizer.of(lm.tokenizer, chat_template=opened.chat_template)
    if messages is not None:
        if tokenizer.template is None:
            raise UsageError(f"model {lm.model_id} has no chat template: give --text")
        encoded = Encoder(tokenizer, "chat").encode(["--messages"], [json.dumps(messages).encode()])
    else:
        try:
            content = (text or "").encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"--text is not UTF-8 (character {error.start}): convert it first") from error
        encoded = Encoder(tokenizer, "text").encode(["--text"], [content])
    ids = encoded.tokens.tolist()
    if not ids:
        raise UsageError("there is nothing to look at: the text is empty")
    prepended = messages is None and bool(opened.dictionary.metadata.get("prepend_bos")) and tokenizer.bos is not None
    if prepended:
        ids = [tokenizer.bos, *ids]
    try:
        shown = opened.dictionary.to(lm.device).show(
            ids, lm.model, lm.tokenizer, n=n, labelled=labelled, max_tokens=max_tokens
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    if encoded.role is None:
        return shown
    roles = [_ROLE_NAMES[code] for code in encoded.role.tolist()]
    return replace(shown, tokens=tuple(replace(token, role=roles[token.position]) for token in shown.tokens))


def inspect(path: str, *, model: str | None, hook: str | None, sae: str | None, **asked: Any) -> Shown:
    """`open_dictionary`, its language model, and `inspect_text`."""
    opened = open_dictionary(path, model=model, hook=hook, sae=sae)
    return inspect_text(opened, LanguageModel(resolve_model(opened.model), opened.model), **asked)


def print_shown(shown: Shown, console: Console) -> None:
    """Tokens with their latents, and the strongest latents of the whole text."""
    table = Table(box=None, pad_edge=False, show_edge=False, header_style="bold")
    with_roles = any(token.role is not None for token in shown.tokens)
    table.add_column("", justify="right", style="dim", no_wrap=True)
    if with_roles:
        table.add_column("who", style="dim", no_wrap=True)
    table.add_column("token", no_wrap=True, max_width=24)
    table.add_column("fires", justify="right", no_wrap=True)
    table.add_column("latent", justify="right", no_wrap=True)
    table.add_column("label", ratio=1, overflow="ellipsis", no_wrap=True)
    for group in grouped(shown.tokens):
        token = group.tokens[0]
        head = [Text(str(token.position)), Text(token_text(token), style="bold")]
        if with_roles:
            head.insert(1, Text(token.role or ""))
        if not group.firings:
            table.add_row(*head, "", "", Text(why_none(group), style="dim"))
        for i, firing in enumerate(group.firings):
            cells = head if i == 0 else [Text("")] * len(head)
            table.add_row(
                *cells, f"{firing.activation:.2f}", _numbered(shown, firing.latent), _label(shown, firing.latent)
            )
    console.print(table)
    strongest = Table(box=None, pad_edge=False, title="strongest in the text", title_justify="left", title_style="bold")
    for name, options in (("fires", "right"), ("latent", "right"), ("on", "left"), ("label", "left")):
        strongest.add_column(name, justify=options, no_wrap=True, overflow="ellipsis")  # type: ignore[arg-type]
    for firing, token in shown.strongest():
        strongest.add_row(
            f"{firing.activation:.2f}",
            _numbered(shown, firing.latent),
            Text(token_text(token)),
            _label(shown, firing.latent),
        )
    if strongest.row_count:
        console.print()
        console.print(strongest)
    if note := left_out(shown):
        console.print(note.replace("max_tokens", "--max-tokens"), style="yellow", highlight=False)


def _numbered(shown: Shown, latent: int) -> Text:
    page = shown.page_of(latent)
    # `Path.as_uri` leaves neither spaces nor control characters in it.
    return Text(f"#{latent}", style="" if page is None else f"link {page}")


def _label(shown: Shown, latent: int) -> Text:
    return Text(label_text(shown, latent), style="" if latent in shown.labels else "dim")
