"""`sae pages`: the pages of a run's dictionaries, or of a dictionary folder that stands alone."""

from pathlib import Path

from pipelines.config import ModelConfig
from pipelines.errors import RunError, UsageError
from pipelines.origin import model_of, speller_of
from pipelines.pages.write import write_pages
from pipelines.progress import Reporter
from pipelines.rundir import PAGES, RunDir
from sae import Dictionary
from sae.spelling import Speller


def write_pages_of(
    path: Path, ui: Reporter, *, to: Path | None = None, model: str | None = None, sae: str | None = None
) -> list[Path]:
    """Write pages beside the tables that they show; returns each index.html.

    Args:
        path: a dictionary folder with features.parquet, or a run directory.
        to: folder for the pages, for one dictionary; by default `pages` in the dictionary's folder.
        model: whose tokenizer spells the contexts; by default what the dictionary records.
        sae: one dictionary of a run.
    Raises:
        UsageError: there is no dictionary, or no feature table in it.
    """
    folders, run_model = _folders(path, sae)
    if to is not None and len(folders) > 1:
        raise UsageError(f"--to is for one dictionary, but {path} has {', '.join(folders)}: choose one with --sae")
    written = []
    for title, folder in folders.items():
        try:
            dictionary = Dictionary.load(folder)
        except (ValueError, FileNotFoundError) as error:
            raise UsageError(str(error)) from error
        asked = model is not None
        speller = speller_of(model_of(dictionary, model)) if asked else speller_or_none(dictionary, ui, run_model)
        written.append(write_pages(dictionary, folder, to or folder / PAGES, title=title, speller=speller))
    return written


def _folders(path: Path, sae: str | None) -> tuple[dict[str, Path], ModelConfig | None]:
    """Dictionary folders by title, and their model where a config says."""
    if not (path / "config.yaml").exists():
        if sae is not None:
            raise UsageError(f"--sae chooses a dictionary of a run, but {path} is not a run directory")
        return {path.resolve().name: path}, None
    from pipelines.configio import load_config

    config, run = load_config(path / "config.yaml"), RunDir(path)
    if sae is not None and sae not in config.saes:
        raise UsageError(f"{path} has no SAE {sae!r}, only {', '.join(config.saes)}")
    folders = {f"{config.name} / {name}": run.dictionary(name) for name in config.saes if sae in (None, name)}
    missing = [str(folder) for folder in folders.values() if not folder.exists()]
    if missing:
        raise RunError(f"{missing[0]} is not there yet: run `sae export {path}` first")
    return folders, config.model


def speller_or_none(dictionary: Dictionary, ui: Reporter, model: ModelConfig | None = None) -> Speller | None:
    """Spells the tokens of the dictionary's model; None, and a line that says so, where its tokenizer cannot be had.

    Args:
        model: by default what the dictionary records.
    """
    try:
        return speller_of(model or model_of(dictionary))
    except UsageError as error:
        ui.say(f"pages: contexts are shown without the tokens that fire, because {error}")
        return None
