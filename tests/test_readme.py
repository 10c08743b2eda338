"""What the README says runs: its Python block on a finished run, its commands as far as a test may run them."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.tiny import tiny_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tiny_texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run at runs/quickstart, as `make demo` leaves one, on the tiny model."""
    folder = tmp_path_factory.mktemp("readme")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(tiny_config(tiny_model, tiny_texts)))
    sae(folder, "run", str(config), "--out", "runs/quickstart")
    return folder


def python(cwd: Path, *arguments: str) -> str:
    """What Python prints, run in `cwd` on this checkout."""
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def sae(cwd: Path, *arguments: str) -> str:
    return python(cwd, "-m", "sae_pipelines_entry", *arguments)


def test_python_blocks_run(finished: Path) -> None:
    code = blocks("python")
    assert code
    for block in code:
        assert python(finished, "-c", block).strip()


def test_commands_exist_and_init_writes_a_config_that_loads(finished: Path) -> None:
    from pipelines.configio import load_config

    lines = [line.partition("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    makefile = (ROOT / "Makefile").read_text()
    targets = [shlex.split(line)[1] for line in lines if line.startswith("make ")]
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)
    (init,) = [shlex.split(line)[1:] for line in lines if line.startswith("sae init")]
    sae(finished, *init)
    (run,) = [shlex.split(line)[1:] for line in lines if line.startswith("sae run")]
    overrides = [run[i + 1] for i, word in enumerate(run) if word == "--set"]
    config = load_config(finished / run[1], overrides)
    assert config.collect.n_tokens == 1_000_000
    assert config.hooks == ("model.layers.8",)


def test_every_linked_file_exists() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_readme_stays_short() -> None:
    assert len(README.splitlines()) < 150
