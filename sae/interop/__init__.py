"""Dictionaries of other tools: which format a folder is of, and the dictionary in it. One file per format."""

from pathlib import Path

from sae.interop import (
    crosscoders,
    dictionary_learning,
    gemma_scope,
    llama_scope,
    openai,
    saelens,
    saev,
    sparsify,
)
from sae.interop.parts import Foreign, Format

FORMATS: tuple[Format, ...] = (
    saelens,
    dictionary_learning,
    sparsify,
    gemma_scope,
    llama_scope,
    crosscoders,
    saev,
    openai,
)


def recognise(folder: Path) -> tuple[Format, tuple[str, ...]] | None:
    """The format of a folder and the files that say so; None if it is of no known one.

    Raises: ValueError if it is of several, or a file that would tell cannot be read.
    """
    found = [(known, files) for known in FORMATS if (files := known.claims(folder))]
    if len(found) > 1:
        kinds = "; ".join(f"{known.NAME} ({', '.join(files)})" for known, files in found)
        raise ValueError(
            f"A dictionary folder must be of one format, but {folder} is of {len(found)}: {kinds}. "
            "Move the files of one of them to a folder of their own."
        )
    return found[0] if found else None


def read_foreign(folder: Path, known: Format, files: tuple[str, ...]) -> Foreign:
    """The dictionary in a folder of a known format.

    Raises: ValueError naming the format, the files, and the key or tensor that is wrong.
    """
    try:
        return known.read(folder)
    except ValueError as error:
        raise ValueError(
            f"The {known.NAME} dictionary in {folder} cannot be loaded ({', '.join(files)}): {error}"
        ) from error


def read_file(file: Path) -> Foreign:
    """The dictionary in a single file, for formats that need no second one (openai/sparse_autoencoder).

    Raises: ValueError if the file is of no such format, or wrong.
    """
    from sae.interop.files import read_pt

    state = read_pt(file)
    if not openai.is_one(state):
        raise ValueError(
            f"A dictionary in a single file must be of openai/sparse_autoencoder, but {file} has other names: "
            f"{', '.join(list(state)[:6])}. Pass the folder that it came in."
        )
    try:
        return openai.of_state(state)
    except ValueError as error:
        raise ValueError(f"The {openai.NAME} dictionary in {file} cannot be loaded: {error}") from error
