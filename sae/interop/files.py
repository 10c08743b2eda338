"""Files of other tools, read as data: nothing in them is ever executed, and one that lies about itself is refused.

Weights are read from safetensors, from npz without pickles, and from `.pt` with `weights_only=True`, which builds
tensors and plain containers and refuses everything else.
"""

import json
import math
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

MAX_HEADER_BYTES = 100_000_000
"""The most that a safetensors header may have, as in its specification."""

_MAX_PICKLE_BYTES = 1_000_000
"""Of the part of a `.pt` file that names its tensors."""

_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_OTHERS = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}
_RESTORE = "Restore it from its source."


class Entry(NamedTuple):
    """What a safetensors header says about one tensor."""

    dtype: str
    shape: tuple[int, ...]


def contained(folder: Path, name: str) -> Path:
    """The file `name` of a dictionary folder.

    Raises: ValueError if it lies outside, by its name or through a link. Links into the store of a Hugging Face cache
        that the folder is a snapshot of are how that cache works, and allowed.
    """
    path = folder / name
    root, target = folder.resolve(), path.resolve()
    if target.is_relative_to(root):
        return path
    cache = next((parent for parent in folder.absolute().parents if parent.name == "snapshots"), None)
    if cache is not None and not _leaves(name) and target.is_relative_to((cache.parent / "blobs").resolve()):
        return path
    raise ValueError(
        f"Every file of a dictionary must lie in its folder, but {path} leads to {target}. "
        "Copy the file into the folder if you trust it."
    )


def _leaves(name: str) -> bool:
    return os.path.isabs(name) or ".." in Path(name).parts


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises: ValueError naming the file."""
    return parse_json(file, file.read_bytes())


def parse_json(file: Path, content: bytes) -> dict[str, Any]:
    """The JSON object in `content`, which was read from `file`. Raises: ValueError naming the file."""
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} must hold JSON: {error}. {_RESTORE}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(parsed).__name__}. {_RESTORE}")
    return parsed


def safetensors_header(file: Path) -> dict[str, Entry]:
    """Names, dtypes and shapes of the tensors, checked against the size of the file, none of which is read.

    Raises: ValueError naming the file, and the tensor whose bytes are not as many as its dtype and shape need.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(
                f"{file} must be a safetensors file, whose header has at most {MAX_HEADER_BYTES:,} bytes and lies in "
                f"the file, got a header of {length:,} bytes in a file of {size:,}. {_RESTORE}"
            )
        header = parse_json(file, stream.read(length))
    entries: dict[str, Entry] = {}
    for name, record in header.items():
        if name == "__metadata__":
            continue
        entries[name] = _entry(file, name, record, size - 8 - length)
    return entries


def _entry(file: Path, name: str, record: Any, n_bytes: int) -> Entry:
    try:
        dtype, shape = str(record["dtype"]), tuple(int(length) for length in record["shape"])
        start, stop = (int(offset) for offset in record["data_offsets"])
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{file}: the header's record of tensor `{name}` cannot be read ({error!r}). {_RESTORE}"
        ) from error
    item = (_FLOATS | _OTHERS).get(dtype)
    if item is None:
        raise ValueError(
            f"{file}: tensor `{name}` must have one of the dtypes {', '.join(_FLOATS)}, got {dtype}. {_RESTORE}"
        )
    if stop - start != item * math.prod(shape) or not 0 <= start <= stop <= n_bytes or min(shape, default=0) < 0:
        raise ValueError(
            f"{file}: tensor `{name}` of dtype {dtype} and shape {shape} needs {item * math.prod(shape):,} bytes, but "
            f"its place in the file is {start:,} to {stop:,} of {n_bytes:,}. {_RESTORE}"
        )
    return Entry(dtype, shape)


def read_safetensors(file: Path, *, whole: Sequence[str] = ()) -> dict[str, Tensor]:
    """The tensors of a file, mapped into memory and read as they are touched; changing them leaves the file alone.

    Args:
        whole: names of tensors that may hold whole numbers.
    Raises: ValueError naming the file and, where it is one tensor's fault, the tensor.
    """
    entries = safetensors_header(file)
    integers = [name for name, entry in entries.items() if entry.dtype not in _FLOATS and name not in whole]
    if integers:
        name, dtype = integers[0], entries[integers[0]].dtype
        raise ValueError(f"{file}: tensor `{name}` must hold floating-point numbers, got {dtype}. {_RESTORE}")
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} must be a safetensors file: {error}. {_RESTORE}") from error
    return tensors


def read_pt(source: Path | BytesIO, file: Path | None = None) -> dict[str, Any]:
    """The dictionary that `torch.save` wrote, of tensors and plain values.

    Args:
        file: for messages, where `source` is an open file.
    Raises: ValueError naming the file if opening it would run code, or it is damaged, or holds no dictionary.
    """
    file = file or Path(str(source))
    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{file} must hold tensors and plain values only, but opening it would run other code, or it is damaged "
            f"({reason}). Nothing was run. Ask its author for safetensors."
        ) from error
    except (RuntimeError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, OSError) as error:
        raise ValueError(f"{file} must be a file that `torch.save` wrote: {error}. {_RESTORE}") from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{file} must hold a dictionary of tensors, got {type(loaded).__name__}. {_RESTORE}")
    return {str(name): value for name, value in loaded.items()}


def mentions(file: Path, names: Sequence[str]) -> bool:
    """Whether a file that `torch.save` wrote names all of these, as far as its bytes tell: nothing is unpickled."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            record = next((entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")), None)
            if record is None or record.file_size > _MAX_PICKLE_BYTES:
                return False
            content = archive.read(record)
    else:  # the older form, which begins with its pickle
        with file.open("rb") as stream:
            content = stream.read(_MAX_PICKLE_BYTES)
    return all(name.encode() in content for name in names)


def read_npz(file: Path) -> dict[str, Tensor]:
    """The arrays of a file that `numpy.savez` wrote, never unpickling.

    Raises: ValueError naming the file and the array that is not of floating-point numbers.
    """
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{file} must be a file that `numpy.savez` wrote; it is no zip archive. {_RESTORE}")
    with np.load(file, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(_array(file, name, arrays)) for name in arrays.files}


def _array(file: Path, name: str, arrays: Any) -> Any:
    try:
        array = arrays[name]
    except (ValueError, zipfile.BadZipFile, EOFError, OSError, KeyError, zlib.error) as error:
        raise ValueError(
            f"{file}: array `{name}` must hold plain numbers and is not opened otherwise: {error}. {_RESTORE}"
        ) from error
    if array.dtype.kind != "f":
        raise ValueError(f"{file}: array `{name}` must hold floating-point numbers, got {array.dtype}. {_RESTORE}")
    return array
