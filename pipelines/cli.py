"""The `sae` command: thin, one function per subcommand; heavy imports stay inside them so that --help is quick."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines import looking
from pipelines.errors import RunError, UsageError
from pipelines.terminal import JsonOption, quiet_libraries, told_plainly

if TYPE_CHECKING:
    from pipelines.run import Run

app = typer.Typer(
    name="sae",
    help="From text to audited features: activation stores, sparse autoencoders, tested labels, safety audits.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigArgument = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML config, the name of a shipped one, or a run directory.")
]
OutOption = Annotated[Path | None, typer.Option("--out", help="Run directory; by default runs/NAME.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. --set train.lr=5e-4. Repeatable."),
]


def main() -> None:
    """Run the command line."""
    app()


# -- runs --------------------------------------------------------------------------------------------------------------


@app.command()
@told_plainly
def run(config: ConfigArgument, out: OutOption = None, set_: SetOption = None, as_json: JsonOption = False) -> None:
    """Run every stage, continuing where an earlier attempt stopped; a finished run does nothing."""
    from pipelines.run import STAGES

    _execute(config, out, set_, as_json, STAGES)


def _stage_command(stage: str, text: str) -> None:
    @told_plainly
    def command(
        config: ConfigArgument, out: OutOption = None, set_: SetOption = None, as_json: JsonOption = False
    ) -> None:
        _execute(config, out, set_, as_json, (stage,))

    command.__doc__ = text
    app.command(stage)(command)


_stage_command("collect", "Text to activations: fill the activation store.")
_stage_command("train", "Activations to a dictionary: train the sparse autoencoders.")


DictionaryOption = Annotated[
    str | None, typer.Option(help="A dictionary from anywhere: folder, Hugging Face repository, URL.")
]
ModelOption = Annotated[str | None, typer.Option(help="With --dictionary: Hugging Face id, folder, .gguf.")]
TextOption = Annotated[
    str | None, typer.Option("--text", help="With --dictionary: file, folder or Hugging Face dataset.")
]
HookOption = Annotated[str | None, typer.Option(help="Where it reads, if it does not say.")]
TokensOption = Annotated[int | None, typer.Option(min=1024, help="Tokens to collect; 65,536 by default.")]


def _dictionary_command(stage: str, text: str) -> None:
    @told_plainly
    def command(
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
    ) -> None:
        dictionary_stage(stage, config, out, set_, as_json, dictionary, model, texts, hook, tokens)

    command.__doc__ = text
    app.command(stage)(command)


def dictionary_stage(
    stage: str,
    config: str | None,
    out: Path | None,
    set_: list[str] | None,
    as_json: bool,
    dictionary: str | None,
    model: str | None,
    texts: str | None,
    hook: str | None,
    tokens: int | None,
) -> None:
    """A stage of a run, or of one that is made for a dictionary from elsewhere."""
    given = {"--dictionary": dictionary, "--model": model, "--text": texts}
    if config is not None:
        everything = given | {"--hook": hook, "--tokens": tokens}
        extra = [name for name, value in everything.items() if value is not None]
        if extra:
            raise UsageError(f"a config says all of it: drop {', '.join(extra)}, or the config")
        _execute(config, out, set_, as_json, (stage,))
        return
    if dictionary is None or model is None or texts is None:
        missing = ", ".join(name for name, value in given.items() if value is None)
        raise UsageError(f"give a CONFIG, or --dictionary, --model and --text; missing: {missing}")
    _bring(stage, dictionary, model, texts, hook, tokens, out, set_, as_json)


_dictionary_command("evaluate", "How faithful the dictionary is on held-out documents.")


def _bring(
    stage: str,
    dictionary: str,
    model: str,
    texts: str,
    hook: str | None,
    tokens: int | None,
    out: Path | None,
    overrides: list[str] | None,
    as_json: bool,
) -> None:
    """Every stage up to this one, from a config that is made here and kept in the run directory."""
    quiet_libraries()
    import tempfile

    import yaml

    from pipelines.bring import TOKENS, config_for
    from pipelines.run import STAGES

    made = config_for(dictionary, model, texts, hook=hook, tokens=tokens or TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{made['name']}.yaml"
        file.write_text(yaml.safe_dump(made, sort_keys=False), encoding="utf-8")
        _execute(str(file), out, overrides, as_json, STAGES[: STAGES.index(stage) + 1])


@app.command()
@told_plainly
def export(
    config: ConfigArgument,
    out: OutOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
    checkpoint: Annotated[
        int | None, typer.Option(help="Step of a checkpoint to write as a dictionary, instead of the finished one.")
    ] = None,
    sae: Annotated[str | None, typer.Option(help="Whose checkpoint; needed if the run has several SAEs.")] = None,
    to: Annotated[Path | None, typer.Option(help="Folder for it; by default dictionaries/SAE@STEP.")] = None,
) -> None:
    """Write the dictionary folder that users load."""
    if checkpoint is None:
        if sae is not None or to is not None:
            raise UsageError("--sae and --to go with --checkpoint: add it, or drop them")
        _execute(config, out, set_, as_json, ("export",))
        return
    quiet_libraries()
    from pipelines.checkpoints import export_checkpoint

    opened = _open(config, out, set_ or [])
    if sae is None and len(opened.config.saes) > 1:
        raise UsageError(f"the run has several SAEs: choose one with --sae, from {', '.join(opened.config.saes)}")
    folder = export_checkpoint(opened.config, opened.dir, sae or next(iter(opened.config.saes)), checkpoint, to)
    print(json.dumps({"dictionary": str(folder)}) if as_json else f"wrote {folder}")


def _execute(
    config: str, out: Path | None, overrides: list[str] | None, as_json: bool, stages: tuple[str, ...]
) -> None:
    quiet_libraries()
    from rich.console import Console

    from pipelines.progress import ConsoleReporter
    from pipelines.run import execute
    from pipelines.summary import print_summary, summary

    opened = _open(config, out, overrides or [])
    # Files and pipes have no width of their own; 80 columns would fold every line.
    terminal = (sys.stderr if as_json else sys.stdout).isatty()
    console = Console(stderr=as_json, width=None if terminal else 140)
    worked = execute(opened, ConsoleReporter(console), stages)
    if not worked:
        what = "run" if len(stages) > 1 else stages[0]
        console.print(f"nothing to do: {what} is finished in {opened.dir.path}", highlight=False)
    if as_json:
        print(json.dumps(summary(opened), indent=2, ensure_ascii=False))
    elif len(stages) > 1:
        print_summary(opened, console)


def _open(config: str, out: Path | None, overrides: list[str]) -> "Run":
    """The run behind CONFIG: a config file, a shipped config's name, or a run directory."""
    from pipelines.configfiles import config_path
    from pipelines.configio import load_config
    from pipelines.run import open_run

    path = config_path(config)
    if path.is_dir():
        if not (path / "config.yaml").exists():
            raise UsageError(f"{path} is not a run directory: it has no config.yaml")
        return open_run(load_config(path / "config.yaml", overrides), out or path)
    loaded = load_config(path, overrides)
    return open_run(loaded, out or Path("runs") / loaded.name)


@app.command()
@told_plainly
def publish(
    folder: Annotated[
        Path, typer.Argument(help="A dictionary folder, or one of several, such as runs/NAME/dictionaries.")
    ],
    repository: Annotated[str, typer.Argument(help="Hugging Face repository, such as me/my-dictionaries.")],
    path_in_repo: Annotated[str | None, typer.Option("--path", help="Subfolder of the repository.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    without_text: Annotated[
        bool, typer.Option("--without-text", help="Leave the texts out of the examples; keep documents and offsets.")
    ] = False,
) -> None:
    """Upload dictionaries to the Hugging Face Hub, with their model cards, in one commit."""
    quiet_libraries()
    from pipelines.hub import publish as upload

    url = upload(
        folder,
        repository,
        path_in_repo=path_in_repo,
        revision=revision,
        private=private,
        without_text=without_text,
    )
    print(f"published {url}")


@app.command()
@told_plainly
def dashboards(
    run_directory: Annotated[Path, typer.Argument(help="A run that is labelled and exported.")],
    to: Annotated[Path, typer.Option(help="Folder to write.")],
    model_id: Annotated[str, typer.Option(help="The viewer's name of the model, such as gpt2-small.")],
    source_set: Annotated[str, typer.Option(help="Short name of dictionaries of this kind, such as res-4k.")],
    viewer: Annotated[str, typer.Option("--for", help="neuronpedia or saedashboard.")] = "neuronpedia",
    sae: Annotated[str | None, typer.Option(help="Which SAE; needed if the run has several.")] = None,
    creator_id: Annotated[str, typer.Option(help="Of the Neuronpedia account that imports.")] = "",
) -> None:
    """Write a dictionary's features and contexts for Neuronpedia or SAEDashboard."""
    if viewer not in ("neuronpedia", "saedashboard"):
        raise UsageError(f"--for must be neuronpedia or saedashboard, got {viewer!r}")
    quiet_libraries()
    from datetime import UTC, datetime

    from pipelines.dashboards import Publication, write_neuronpedia, write_saedashboard
    from pipelines.models import language_model_of

    opened = _open(str(run_directory), None, [])
    if sae is None and len(opened.config.saes) > 1:
        raise UsageError(f"the run has several SAEs: choose one with --sae, from {', '.join(opened.config.saes)}")
    folder = opened.dir.dictionary(sae or next(iter(opened.config.saes)))
    if not folder.exists():
        raise RunError(f"{folder} is not there yet: run `sae export {run_directory}` first")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    publication = Publication(model_id=model_id, source_set=source_set, creator_id=creator_id, created=now)
    write = write_neuronpedia if viewer == "neuronpedia" else write_saedashboard
    write(folder, to, language_model_of(run_directory), publication)
    print(f"wrote {to}")


# -- looking -----------------------------------------------------------------------------------------------------------


@app.command()
@told_plainly
def plan(
    config: ConfigArgument,
    out: OutOption = None,
    set_: SetOption = None,
    calibrate: Annotated[
        bool, typer.Option(help="Measure speeds here for some seconds; off reads the model's settings alone.")
    ] = True,
    like: Annotated[
        Path | None, typer.Option("--like", help="A finished run whose speeds to take instead of measuring.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Tokens, bytes, hours and workers before anything starts; exit 1 if the disk is too small."""
    quiet_libraries()
    from pipelines.plan import make_plan, plan_text, require_room

    opened = _open(config, out, set_ or [])
    made = make_plan(opened.config, opened.dir, calibrate=calibrate, like=like)
    print(plan_text(made, as_json))
    require_room(made)


for _looks in (looking.info, looking.verify, looking.inspect, looking.pages):
    app.command()(told_plainly(_looks))


@app.command()
@told_plainly
def init(
    model: Annotated[str, typer.Option(help="Hugging Face id, folder or .gguf file.")],
    hook: Annotated[
        str,
        typer.Option(help="Module path, such as model.layers.8; model.layers.8.mlp:input is what that module reads."),
    ],
    text: Annotated[
        str, typer.Option(help="Text file (.txt, .jsonl, .parquet), a folder of them, or Hugging Face dataset id.")
    ] = "texts.txt",
    path: Annotated[Path, typer.Option("--to", help="Where to write the config.")] = Path("sae.yaml"),
) -> None:
    """Write a commented config for a model and hook."""
    from pipelines.template import commented_config

    if path.exists():
        raise RunError(f"{path} exists: choose another --to, or remove it")
    path.write_text(commented_config(model, hook, text, str(path)), encoding="utf-8")
    print(f"wrote {path}; read it, then: sae run {path}")


import pipelines.cli_audit  # noqa: E402  their commands need what stands above
import pipelines.cli_compare  # noqa: E402
import pipelines.cli_labels  # noqa: E402, F401
