import os
import subprocess
import sys
from pathlib import Path

import pytest

import sae_pipelines_entry

ROOT = Path(__file__).parents[2]


def run_entry(*before_ours: Path) -> subprocess.CompletedProcess[str]:
    """`sae --help` with folders in front of ours on PYTHONPATH."""
    path = os.pathsep.join(map(str, [*before_ours, ROOT]))
    code = "import sae_pipelines_entry, sys; sys.argv = ['sae', '--help']; sae_pipelines_entry.main()"
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        cwd="/",
    )


@pytest.mark.parametrize("name", ["sae", "storage", "pipelines"])
@pytest.mark.parametrize("file", ["{}/__init__.py", "{}.py"])
def test_a_package_that_hides_ours_stops_the_command_and_is_named(tmp_path, name, file):
    rival = tmp_path / file.format(name)
    rival.parent.mkdir(exist_ok=True)
    rival.write_text("raise RuntimeError('the rival was imported')\n")
    result = run_entry(tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert (
        f"`{name}` is found at {rival}, not in {ROOT}. Rename or remove it, or take it off PYTHONPATH" in result.stderr
    )
    assert len(result.stderr.splitlines()) == 1


def test_every_hidden_package_is_listed(tmp_path):
    for name in ("sae", "storage"):
        (tmp_path / f"{name}.py").touch()
    result = run_entry(tmp_path)
    assert result.returncode == 2
    assert "`sae` is found at" in result.stderr
    assert "`storage` is found at" in result.stderr
    assert "`pipelines` is found at" not in result.stderr


def test_a_data_folder_without_code_hides_nothing(tmp_path):
    (tmp_path / "storage").mkdir()
    (tmp_path / "storage" / "notes.txt").touch()
    result = run_entry(tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "Usage" in result.stdout


def test_nothing_is_reported_where_our_packages_are_found():
    assert sae_pipelines_entry.shadowed(ROOT) == []


def test_missing_packages_are_found_in_no_place(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sae_pipelines_entry.importlib.util, "find_spec", lambda name: None)
    assert sae_pipelines_entry.shadowed(tmp_path)[0] == f"`sae` is found at no place, not in {tmp_path}"
