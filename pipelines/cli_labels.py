"""`sae label`: a stage like others, and the way in for labels of other people."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli import (
    DictionaryOption,
    HookOption,
    ModelOption,
    OutOption,
    SetOption,
    TextOption,
    TokensOption,
    app,
    dictionary_stage,
)
from pipelines.errors import UsageError
from pipelines.terminal import JsonOption, quiet_libraries, told_plainly


@app.command()
@told_plainly
def label(
    config: Annotated[
        str | None,
        typer.Argument(metavar="[CONFIG]", help="As for `sae run`; or --dictionary, --model and --text instead."),
    ] = None,
    out: OutOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
    dictionary: DictionaryOption = None,
    model: ModelOption = None,
    texts: TextOption = None,
    hook: HookOption = None,
    tokens: TokensOption = None,
    imported: Annotated[
        Path | None,
        typer.Option("--import", help="Labels of other people, to add to a run or a dictionary folder and test."),
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="With --import: neuronpedia, delphi, csv:NAME or human:NAME.")
    ] = None,
    author: Annotated[str | None, typer.Option(help="With --import: whose labels, if the file does not say.")] = None,
    date: Annotated[str | None, typer.Option(help="With --import: of when, if the file does not say.")] = None,
    layer: Annotated[str | None, typer.Option(help="With --import: which source, if the file has several.")] = None,
    sae: Annotated[str | None, typer.Option(help="With --import: which SAE, if the run has several.")] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="With --import: take the file's text where a label differs.")
    ] = False,
) -> None:
    """Contexts, a label and a held-out test for every latent; with --import, labels of other people beside it."""
    if imported is None:
        given = {"--source": source, "--author": author, "--date": date, "--layer": layer, "--sae": sae}
        extra = [name for name, value in given.items() if value is not None]
        if extra or replace:
            raise UsageError(f"{', '.join(extra or ['--replace'])} goes with --import: add it, or drop them")
        dictionary_stage("label", config, out, set_, as_json, dictionary, model, texts, hook, tokens)
        return
    if config is None or source is None:
        raise UsageError("--import needs a run or dictionary folder to add labels to, and --source to say whose")
    quiet_libraries()
    from rich.console import Console

    from pipelines.cluster.local import ray_scope
    from pipelines.labels.importing import import_labels
    from pipelines.progress import ConsoleReporter

    ui = ConsoleReporter(Console(stderr=as_json, width=None if sys.stdout.isatty() else 140))
    with ray_scope():
        done = import_labels(
            Path(config), imported, source, ui, sae=sae, author=author, date=date, layer=layer, replace=replace
        )
    if as_json:
        print(json.dumps(done, indent=2, ensure_ascii=False))
