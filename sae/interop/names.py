"""Which files make a dictionary, by their names alone: for listings of places whose files are not here."""

from collections.abc import Iterable
from pathlib import PurePosixPath

WEIGHTS = (
    "dictionary.json",
    "sae_weights.safetensors",
    "ae.pt",
    "sae.safetensors",
    "params.npz",
    "params.safetensors",
    "cc_weights.pt",
    "sae.pt",
    "model.safetensors",
)
"""Files of which each stands for a dictionary in its folder, but see `dictionary_folders`."""

_BESIDE = {"ae.pt": "config.json", "sae.safetensors": "cfg.json", "model.safetensors": "config.json"}
"""What such a file must have beside it: the names are too common alone."""
NESTED_WEIGHTS, _NESTED_BESIDE = "checkpoints/final.safetensors", "hyperparams.json"
WEIGHT_SUFFIXES = (".safetensors", ".npz", ".pt")
_USEFUL = (".json", ".safetensors", ".npz", ".pt", ".parquet", ".md")


def dictionary_folders(files: Iterable[str]) -> list[str]:
    """The folders, "." for the root, that hold a dictionary as far as names tell, sorted."""
    known = set(files)
    found = set()
    for file in known:
        path = PurePosixPath(file)
        folder = path.parent
        if path.name in WEIGHTS:
            beside = _BESIDE.get(path.name)
            if beside is None or (folder / beside).as_posix() in known:
                found.add(folder.as_posix())
        elif path.as_posix().endswith(NESTED_WEIGHTS) and (folder.parent / _NESTED_BESIDE).as_posix() in known:
            found.add(folder.parent.as_posix())
    return sorted(folder for folder in found if not _inside_a_run(folder))


def _inside_a_run(folder: str) -> bool:
    return "checkpoints" in PurePosixPath(folder).parts


def files_of(folder: str, files: Iterable[str]) -> list[str]:
    """Of the files of a place, those that belong to the dictionary in `folder`, or that one if it names a file."""
    known = set(files)
    if folder in known:
        return [folder]
    wanted = []
    for file in known:
        path = PurePosixPath(file)
        direct = path.parent.as_posix() == folder and path.suffix in _USEFUL
        nested = path == PurePosixPath(folder, NESTED_WEIGHTS)
        if direct or nested:
            wanted.append(file)
    if any(PurePosixPath(file).name == "sae.safetensors" for file in wanted):
        run = PurePosixPath(folder).parent / "config.json"  # where sparsify records model and texts
        wanted += [run.as_posix()] if run.as_posix() in known else []
    return sorted(wanted)
