"""The configs and concepts that ship with the package: in the wheel under `pipelines/configs`, in a checkout under
`configs/`."""

import difflib
from pathlib import Path

from pipelines.errors import UsageError


def shipped_configs() -> Path:
    """Folder of the shipped configs."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).resolve().parents[1] / "configs"


def config_path(name: str | Path) -> Path:
    """A config by path, or a shipped one by name or by its path in the repository.

    Raises:
        UsageError: there is neither.
    """
    path = Path(name)
    if path.exists():
        return path
    shipped = shipped_configs() / f"{path.stem}.yaml"
    if shipped.is_file() and path.suffix in ("", ".yaml") and path.parent.name in ("", "configs"):
        return shipped
    names = sorted(file.stem for file in shipped_configs().glob("*.yaml"))
    raise UsageError(f"there is no config or run directory {path}; shipped configs: {', '.join(names)}")


def concept_path(name: str) -> Path:
    """A concept file by path, or a shipped one by name.

    Raises:
        UsageError: there is neither; the message names the nearest shipped one.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise UsageError(f"there is no concept file {path}")
    shipped = shipped_configs() / "concepts" / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    names = sorted(file.stem for file in (shipped_configs() / "concepts").glob("*.yaml"))
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    raise UsageError(
        f"there is no shipped concept {name!r}; the nearest is {near[0] if near else 'none'!r}. Shipped: "
        f"{', '.join(names)}; or give the path of a .yaml file"
    )
