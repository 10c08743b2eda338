"""The direction of imports, held by running Python with the forbidden packages made impossible to import."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
{code}
"""


def run(code: str, blocked: set[str]) -> subprocess.CompletedProcess[str]:
    script = BLOCK.format(blocked=blocked, code=code)
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)


def test_sae_needs_only_torch_numpy_safetensors_and_jaxtyping() -> None:
    blocked = {
        "pipelines",
        "storage",
        "pyarrow",
        "zarr",
        "ray",
        "transformers",
        "datasets",
        "typer",
        "pydantic",
        "yaml",
    }
    result = run("import sae, sae.checkpoint, sae.kernels.cpu, sae.interop.saelens", blocked | {"triton", "scipy"})
    assert result.returncode == 0, result.stderr


def test_storage_needs_neither_torch_nor_the_other_packages() -> None:
    result = run("import storage", {"pipelines", "sae", "torch", "ray", "transformers", "pyarrow", "pydantic"})
    assert result.returncode == 0, result.stderr


def test_everything_imports_without_triton() -> None:
    code = "import pipelines.run, pipelines.train, pipelines.evaluate, pipelines.labels.run, pipelines.audit.run"
    result = run(code, {"triton"})
    assert result.returncode == 0, result.stderr


def test_a_block_makes_an_import_fail() -> None:
    assert run("import pipelines.run", {"pydantic"}).returncode != 0


def test_the_help_loads_no_heavy_library() -> None:
    code = (
        "import sys, sae_pipelines_entry as entry\n"
        "sys.argv = ['sae', '--help']\n"
        "try:\n    entry.main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'ray', 'transformers', 'zarr', 'pyarrow', 'scipy', 'plotly'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = run(code, set())
    assert result.returncode == 0, result.stderr


def test_the_wheel_lists_every_package_and_its_data() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = set(settings["packages"])
    found = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for top in ("sae", "storage", "pipelines")
        for file in (ROOT / top).rglob("*.py")
    }
    assert found | {"pipelines.configs", "pipelines.configs.concepts"} == listed
    for package, patterns in settings["package-data"].items():
        folder = ROOT / settings["package-dir"].get(package, package.replace(".", "/"))
        for pattern in patterns:
            assert list(folder.glob(pattern)), f"{package}: nothing matches {pattern}"


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_config_loads_and_its_concepts_are_usable(config: Path) -> None:
    from pipelines.audit.run import load_concepts
    from pipelines.configio import load_config

    loaded = load_config(config)
    assert len(load_concepts(loaded)) == len(loaded.audit.concepts)
