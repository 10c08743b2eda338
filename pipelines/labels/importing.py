"""`sae label RUN_OR_DICTIONARY --import FILE --source WHOSE`: other people's labels as further rows, tested at once.

Into a run, labels go onto the shelf, from where every later `sae label` takes them; what the run's held-out documents
say about them stands in labels.parquet, and the dictionary folder is written anew. Into a dictionary folder without a
run they go as they are: there is no text to test them on.
"""

from pathlib import Path
from typing import Any, NamedTuple

from pipelines.collect import open_store
from pipelines.configio import load_config
from pipelines.dictionaries import load_trained
from pipelines.errors import UsageError
from pipelines.export import export_dictionary
from pipelines.labels.external.records import ImportedLabel
from pipelines.labels.external.shelf import Shelf, Shelved, merged, read_labels_of
from pipelines.labels.gather import gather
from pipelines.labels.others import imported_columns
from pipelines.labels.rows import read_rows, replace_rows, row
from pipelines.models import language_model_of
from pipelines.progress import Reporter
from pipelines.run import Run
from pipelines.rundir import RunDir
from sae import Dictionary
from sae.folder import is_dictionary
from storage import LatentStore


class Place(NamedTuple):
    """Where labels go: an SAE of a run, or a dictionary folder."""

    run: Run | None
    name: str
    folder: Path


def import_labels(
    target: Path,
    file: Path,
    source: str,
    ui: Reporter,
    *,
    sae: str | None = None,
    author: str | None = None,
    date: str | None = None,
    layer: str | None = None,
    replace: bool = False,
) -> dict[str, Any]:
    """Read labels and put them into a run or a dictionary folder; returns what was done.

    Args:
        target: a run directory, one of its dictionary folders, or a dictionary folder from anywhere.
        file: what to read; see `external.shelf.read_labels_of` for this and the next arguments.
        sae: which SAE, if the run has several.
        replace: take the new text where a label of this source is there with another.

    Raises:
        UsageError: what is wrong with the target, the file (by file and line) or the source; nothing was imported.
        RunError: the run has no trained dictionary, or an endpoint is down.
    """
    place = find_place(target, sae)
    labels, n_left_out = read_labels_of(file, source, author=author, date=date, layer=layer)
    done = _into_run(place, labels, ui, replace) if place.run else _into_folder(place.folder, labels, replace)
    ui.say(
        f"imported {done.n_new} labels of {', '.join(done.sources)}"
        + (f", {done.n_known} were there" if done.n_known else "")
        + (f", {done.n_replaced} replaced" if done.n_replaced else "")
        + (f"; {n_left_out} entries say that their explainer failed, and are left out" if n_left_out else "")
    )
    return done._asdict() | {"n_left_out": n_left_out}


def find_place(target: Path, sae: str | None) -> Place:
    """What a path stands for.

    Raises:
        UsageError: it is neither a run nor a dictionary, or the run has several SAEs and none was chosen.
    """
    if (target / "config.yaml").is_file():
        config = load_config(target / "config.yaml")
        if sae is None and len(config.saes) > 1:
            raise UsageError(f"the run has several SAEs: choose one with --sae, from {', '.join(config.saes)}")
        name = sae or next(iter(config.saes))
        if name not in config.saes:
            raise UsageError(f"--sae {name}: the run has {', '.join(config.saes)}")
        return Place(Run(config, RunDir(target)), name, target)
    above = target.resolve().parent
    if above.name == "dictionaries" and (above.parent / "config.yaml").is_file():
        return find_place(above.parent, target.resolve().name)
    if target.is_dir() and is_dictionary(target):
        return Place(None, target.name, target)
    raise UsageError(f"{target} is neither a run directory nor a dictionary folder")


def _into_run(place: Place, labels: list[ImportedLabel], ui: Reporter, replace: bool) -> Shelved:
    assert place.run is not None
    run, name = place.run.dir, place.name
    with run.lock():
        dictionary = load_trained(run, name)
        done = Shelf(run.imports(name)).put(labels, dictionary.d_sae, replace=replace)
        if not place.run.finished("label") or not place.run.config.label.enabled:
            ui.say(f"they are tested by `sae label {run.path}`, which has not run")
            return done
        gathered = gather(
            place.run.config,
            run,
            name,
            open_store(place.run.config, run),
            LatentStore.open(run.latents(name)),
            dictionary,
            language_model_of(run.path).token_strings(),
            ui,
            only=frozenset(done.sources),
        )
        run.update_metrics(name, gathered.figures)
        if run.dictionary(name).exists():
            export_dictionary(place.run.config, run, name, ui)
    if gathered.trouble is not None:
        raise gathered.trouble
    return done


def _into_folder(folder: Path, labels: list[ImportedLabel], replace: bool) -> Shelved:
    try:
        d_sae = Dictionary.load(folder).d_sae
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"{folder} is no dictionary that can be read: {error}") from error
    rows = read_rows(folder)
    new, done = merged({(r["source"], r["latent"]): r["label"] for r in rows}, labels, d_sae, replace=replace)
    fresh = {(label.source, label.latent) for label in new}
    kept = [r for r in rows if r["source"] in done.sources and (r["source"], r["latent"]) not in fresh]
    replace_rows(folder, [*kept, *(_untested(label) for label in new)], lambda source: source in done.sources)
    return done


def _untested(label: ImportedLabel) -> dict[str, Any]:
    return row(label.latent, label.source, label.label, "untested", **imported_columns(label))
