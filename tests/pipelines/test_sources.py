import hashlib
from pathlib import Path

import pytest

from pipelines.errors import UsageError
from pipelines.sources import locate, sha256_of


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that must be found but never imported."""
    folder = tmp_path / "site" / "a_found_package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "weights.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return folder


def test_sha256_of_a_file_is_the_usual_one(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_locate_finds_paths_and_expands_the_home_folder(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate(str(tmp_path / "a.txt")) == tmp_path / "a.txt"
    assert locate("~/a.txt") == tmp_path / "a.txt"


def test_locate_finds_package_files_without_importing(package):
    assert locate("package://a_found_package/weights.gguf") == package / "weights.gguf"


def test_locate_checks_the_digest(package):
    digest = hashlib.sha256(b"GGUF").hexdigest()
    assert locate("package://a_found_package/weights.gguf", sha256=digest).is_file()
    with pytest.raises(
        UsageError,
        match=rf"package://a_found_package/weights\.gguf: its SHA-256 is {digest}, the config expects {'f' * 64}",
    ):
        locate("package://a_found_package/weights.gguf", sha256="f" * 64)


@pytest.mark.parametrize("name", ["no_such_package", "json.decoder", "sys"])
def test_locate_names_what_is_not_an_installed_package(name):
    with pytest.raises(
        UsageError, match=f"the package '{name}' is not installed; `make demo` installs the demo's packages"
    ):
        locate(f"package://{name}/file.txt")


@pytest.mark.parametrize("name", ["", "a_found_package_not.sub"])
def test_locate_refuses_names_that_cannot_be_a_package(name):
    with pytest.raises(UsageError, match=f"the package '{name}' is not installed"):
        locate(f"package://{name}/file.txt")


def test_locate_names_a_missing_file_of_a_package(package):
    with pytest.raises(
        UsageError, match=r"package://a_found_package/b\.gguf: there is no file .*b\.gguf; check the path"
    ):
        locate("package://a_found_package/b.gguf")


def test_locate_takes_files_not_folders(tmp_path):
    with pytest.raises(UsageError, match="there is no file"):
        locate(str(Path(tmp_path)))
