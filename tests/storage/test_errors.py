import inspect

import pytest

import storage
from storage import errors


def test_every_error_is_a_storage_error_and_stands_in_the_drawn_tree() -> None:
    classes = [value for _, value in inspect.getmembers(errors, inspect.isclass)]
    assert all(issubclass(value, errors.StorageError) for value in classes)
    drawn = [line.strip("│├└─ ").split()[0] for line in (errors.__doc__ or "").splitlines() if "Error  " in line]
    assert drawn[0] == "StorageError"
    assert sorted(drawn) == sorted(value.__name__ for value in classes)


@pytest.mark.parametrize(
    ("error", "builtin"), [(errors.NotFoundError, FileNotFoundError), (errors.AlreadyExistsError, FileExistsError)]
)
def test_file_errors_are_the_builtin_ones_too(error: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(error, builtin)


def test_public_surface_is_what_the_docs_name() -> None:
    assert sorted(set(storage.__all__)) == sorted(storage.__all__)
    assert set(storage.__all__) == {
        *("ActivationStore", "ActivationWriter", "Contexts", "Receipt", "ShuffledReader", "Statistics"),
        *("LatentBlock", "LatentStore", "LatentWriter", "Problem", "verify", "HookSpec", "StoreSpec", "zarr_name"),
        *("Repair", "repair", "TableSpec", "Span", "BOS", "PADDING", "SPECIAL", "SINK", "DELETED"),
        *("Ring", "Consumer", "ring_sidecar"),
        *("StorageError", "NotFoundError", "AlreadyExistsError", "FormatError", "SpecMismatchError"),
        *("CorruptionError", "IncompleteError"),
    }
