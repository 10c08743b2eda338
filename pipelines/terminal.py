"""How the `sae` command speaks: a user's mistake is one message, and libraries are quiet."""

import functools
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from pipelines.errors import PipelineError

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON; progress goes to stderr.")]


def told_plainly(command: Callable[..., None]) -> Callable[..., None]:
    """Turn a user's mistake or a failed stage into one message on stderr and an exit code, without a traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except PipelineError as error:
            _stop(str(error), error.exit_code)
        except (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
            if error.filename is None:  # not a path that a user gave
                raise
            _stop(f"{error.filename}: {error.strerror}; check the path", 2)
        except KeyboardInterrupt:
            _stop("stopped; the same command continues from the last finished piece of work", 130)
        except Exception as error:
            if not _is_storage_error(error):
                raise
            from storage.errors import SpecMismatchError

            _stop(str(error), 2 if isinstance(error, SpecMismatchError) else 1)

    return wrapped


def _is_storage_error(error: Exception) -> bool:
    module = sys.modules.get("storage.errors")
    return module is not None and isinstance(error, module.StorageError)


def _stop(message: str, code: int) -> None:
    print(f"sae: {message}", file=sys.stderr)
    raise typer.Exit(code)


def quiet_libraries() -> None:
    """Libraries talk to developers; this command talks to its user."""
    import os
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
