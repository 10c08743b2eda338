"""Entry point of the `sae` command.

The import names `sae`, `storage` and `pipelines` are generic, so another folder or package may stand in front of ours
on `sys.path`. This module has a unique name; it checks before it imports anything from them.
"""

import importlib.util
import sys
from pathlib import Path


def shadowed(root: Path) -> list[str]:
    """A line for each of our packages that Python would find elsewhere than in `root`."""
    problems = []
    for name in ("sae", "storage", "pipelines"):
        spec = importlib.util.find_spec(name)
        found = None if spec is None else spec.origin or next(iter(spec.submodule_search_locations or ()), None)
        if found is None or not Path(found).resolve().is_relative_to(root):
            problems.append(f"`{name}` is found at {found or 'no place'}, not in {root}")
    return problems


def main() -> None:
    """Check the packages' origin, then run the command line."""
    problems = shadowed(Path(__file__).resolve().parent)
    if problems:
        print(
            f"sae: another package or folder hides ours: {'; '.join(problems)}. "
            "Rename or remove it, or take it off PYTHONPATH; in a virtual environment of its own sae-pipelines "
            "has no rivals.",
            file=sys.stderr,
        )
        raise SystemExit(2)
    from pipelines.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
