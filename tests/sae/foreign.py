"""Foreign dictionaries for the interop tests: the golden folders, changed copies of them, and what must be equal."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sae import Dictionary

GOLDEN = Path(__file__).parent / "golden" / "peers"
PEERS = Path(__file__).parents[2] / ".venv-peers" / "bin" / "python"
NAMES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
D_IN, D_SAE, K = 6, 24, 3


def random_tensors(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) * 0.5 for name, shape in shapes.items()}


def x_of(width: int = D_IN) -> torch.Tensor:
    return torch.randn(40, width, generator=torch.Generator().manual_seed(5)) + 0.3


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def assert_as_golden(folder: Path, expected_file: Path) -> None:
    (subfolder,) = Dictionary.list(folder)
    dictionary, expected = Dictionary.load(folder, subfolder=subfolder), load_file(expected_file)
    assert int(expected["latent_acts"].count_nonzero()) > 40
    assert int((expected["latent_acts"] == 0).sum()) > 40
    assert_same(dictionary.encode(expected["x"]), expected["latent_acts"])
    output = dictionary.sae(expected["x"]).x_hat
    torch.testing.assert_close(output, expected["output"], atol=1e-5, rtol=1e-5)


def copied(name: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file in (GOLDEN / name).rglob("*"):
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def changed(folder: Path, file: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The folder after a change to a JSON file, a safetensors file or a `.pt` file of it."""
    path = folder / file
    if file.endswith(".json"):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    elif file.endswith(".pt"):
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)
    else:
        content = load_file(path)
        change(content)
        save_file(content, path)
    return folder
