"""Commands that look at what there is: `sae info`, `verify`, `inspect`, `pages`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipelines.errors import UsageError
from pipelines.stores import StorePlace, has, place
from pipelines.terminal import JsonOption, quiet_libraries


def info(
    path: Annotated[str, typer.Argument(help="A store (also a URL), a dictionary or a run directory.")],
    as_json: JsonOption = False,
) -> None:
    """What is this store, dictionary or run? Shapes, provenance, health."""
    from pipelines.info import describe

    facts = describe(place(path))
    if as_json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    for key, value in facts.items():
        print(f"{key:<16} {value if not isinstance(value, dict | list) else json.dumps(value, ensure_ascii=False)}")


def verify(
    store: Annotated[
        str, typer.Argument(help="An activation store (also a URL), or a folder below latents/ of a run.")
    ],
    quick: Annotated[
        bool, typer.Option("--quick", help="Look at names and sizes only; do not re-read the data.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Discard damaged shards, so that the next `sae collect` redoes them.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Re-read and re-hash a store; exit 1 and a list of what is bad, or is to be redone."""
    where = place(store)
    if repair:
        _repair(where, as_json)
        return
    from pipelines.info import store_problems

    problems = store_problems(where, quick=quick)
    if as_json:
        print(json.dumps(problems, indent=2))
    else:
        for problem in problems:
            print(f"{problem['file']}: {problem['detail']}")
        sound = "every file is there, with its size" if quick else "every file is as it was committed"
        print(f"{store}: {len(problems)} problems" if problems else f"{store}: {sound}")
        sealed = has(where, "seal.json")  # if not, an uncommitted shard is only missing
        if any(problem["shard"] is not None and (sealed or problem["kind"] != "not committed") for problem in problems):
            print(f"`sae verify {store} --repair` discards the damaged shards, so that they can be redone")
    if problems:
        raise typer.Exit(1)


def _repair(store: StorePlace, as_json: bool) -> None:
    from dataclasses import asdict

    from pipelines.repair import repair_store

    done = repair_store(store)
    print(json.dumps(asdict(done), indent=2) if as_json else "\n".join(done.lines(store)))
    if done.problems:
        raise typer.Exit(1)


def inspect(
    dictionary: Annotated[
        str, typer.Argument(metavar="DICT", help="A dictionary from anywhere: folder, Hub repository, or a run.")
    ],
    text: Annotated[str | None, typer.Option(help="The text; - reads it from standard input.")] = None,
    messages: Annotated[
        str | None, typer.Option(help='A chat instead: JSON [{"role": …, "content": …}, …], or a file of it.')
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hugging Face id, folder, .gguf; by default what it says.")] = None,
    hook: Annotated[str | None, typer.Option(help="Where it reads, if it does not say.")] = None,
    sae: Annotated[str | None, typer.Option(help="Which SAE; needed if a run has several.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Latents a token.")] = 3,
    labelled: Annotated[bool, typer.Option("--labelled", help="Only latents with a label.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Read no further.")] = 512,
    html: Annotated[Path | None, typer.Option(help="Write a page instead of printing.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Tokens of a text with the latents that fire on them, and their labels."""
    if (text is None) == (messages is None):
        raise UsageError("give one of --text and --messages")
    quiet_libraries()
    from rich.console import Console

    from pipelines.inspection import inspect, print_shown, read_messages

    shown = inspect(
        dictionary,
        model=model,
        hook=hook,
        sae=sae,
        text=_standard_input() if text == "-" else text,
        messages=None if messages is None else read_messages(messages),
        n=top,
        labelled=labelled,
        max_tokens=max_tokens,
    )
    if html is not None:
        from pipelines.rundir import write_text
        from sae.rendering import html_page

        write_text(html, html_page(shown, f"A text through {dictionary}"))
        print(f"wrote {html}")
    elif as_json:
        print(json.dumps(shown.to_dict(), indent=2, ensure_ascii=False))
    else:
        print_shown(shown, Console(width=None if sys.stdout.isatty() else 140))


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not UTF-8 (byte {error.start}): convert it first") from error


def pages(
    path: Annotated[Path, typer.Argument(help="A dictionary folder with labels, or a run directory.")],
    to: Annotated[Path | None, typer.Option(help="Folder for them; by default `pages` in the dictionary.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Whose tokenizer spells the contexts, if the dictionary does not say.")
    ] = None,
    sae: Annotated[str | None, typer.Option(help="Which SAE of a run; by default all.")] = None,
) -> None:
    """Write a dictionary's feature pages again: HTML that opens without a server."""
    quiet_libraries()
    from rich.console import Console

    from pipelines.pages.command import write_pages_of
    from pipelines.progress import ConsoleReporter

    for index in write_pages_of(path, ConsoleReporter(Console(stderr=True)), to=to, model=model, sae=sae):
        print(f"wrote {index}")
