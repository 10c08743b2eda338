"""`sae compare`: dictionaries side by side."""

import json
from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli import HookOption, SetOption, TokensOption, app
from pipelines.errors import UsageError
from pipelines.terminal import JsonOption, quiet_libraries, told_plainly


@app.command()
@told_plainly
def compare(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN_OR_DICTIONARY…",
            help="Evaluated runs and dictionary folders; with --model and --text any dictionaries, also of the Hub.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for comparison.html and comparison.json.")],
    model: Annotated[str | None, typer.Option(help="Evaluate the dictionaries now, on this model and --text.")] = None,
    texts: Annotated[str | None, typer.Option("--text", help="File, folder or Hugging Face dataset.")] = None,
    hook: HookOption = None,
    tokens: TokensOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """A table, the trade-off of L0 against FVU and CE score, and probes, over any number of dictionaries."""
    if (model is None) != (texts is None):
        raise UsageError("--model and --text go together: give both to evaluate now, or neither to compare evaluations")
    if model is None and (hook is not None or tokens is not None or set_):
        raise UsageError("--hook, --tokens and --set go with --model and --text: give those, or drop them")
    from pipelines.comparison import compare as compare_paths

    if model is not None and texts is not None:
        quiet_libraries()
        from rich.console import Console

        from pipelines.bring import TOKENS
        from pipelines.comparison.measure import evaluate_all
        from pipelines.progress import ConsoleReporter

        ui = ConsoleReporter(Console(stderr=as_json))
        evaluate_all(paths, model, texts, out, ui, hook=hook, tokens=tokens or TOKENS, overrides=set_ or [])
        paths = [str(out)]
    record = compare_paths(paths, out)
    if as_json:
        print(json.dumps(record, indent=2, ensure_ascii=False))
        return
    for difference in record["differences"]:
        print(f"warning: not measured alike: {difference} differs")
    print(f"compared {len(record['dictionaries'])} dictionaries: {out / 'comparison.html'}")
