"""`sae audit`: make audits, and verify those that were made."""

import json
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
from pipelines.errors import RunError, UsageError
from pipelines.terminal import JsonOption, told_plainly


@app.command()
@told_plainly
def audit(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="[CONFIG | verify BUNDLE]",
            help="As for `sae run`; or --dictionary, --model and --text instead; or `verify` and an audit's folder.",
        ),
    ] = None,
    bundle: Annotated[Path | None, typer.Argument(metavar=" ", hidden=True)] = None,
    out: OutOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
    dictionary: DictionaryOption = None,
    model: ModelOption = None,
    texts: TextOption = None,
    hook: HookOption = None,
    tokens: TokensOption = None,
) -> None:
    """Which latents carry the configured concepts, and how sure we are.

    `sae audit verify BUNDLE` computes every figure of an audit's folder again, without the model.
    """
    if config == "verify":
        if any(value is not None for value in (out, set_, dictionary, model, texts, hook, tokens)):
            raise UsageError("sae audit verify takes a folder and nothing else but --json: drop the other options")
        _verify(bundle, as_json)
        return
    if bundle is not None:
        raise UsageError(f"sae audit takes one CONFIG; got {config} and {bundle}. To verify: sae audit verify BUNDLE")
    dictionary_stage("audit", config, out, set_, as_json, dictionary, model, texts, hook, tokens)


def _verify(bundle: Path | None, as_json: bool) -> None:
    if bundle is None:
        raise UsageError("give the folder of an audit, or a run: sae audit verify RUN/audit/CONCEPT")
    from pipelines.audit.verify import bundles_in, verify_audit

    found = {folder: verify_audit(folder) for folder in bundles_in(bundle)}
    if as_json:
        typer.echo(json.dumps({str(folder): one._asdict() for folder, one in found.items()}, ensure_ascii=False))
    else:
        for folder, one in found.items():
            if not one.problems:
                typer.echo(f"{folder}: {one.n_figures:,} figures computed again, all as recorded")
                for note in one.notes:
                    typer.echo(f"  {note}")
    problems = [f"{folder}: {problem}" for folder, one in found.items() for problem in one.problems]
    if problems:
        raise RunError("\n".join(problems))
