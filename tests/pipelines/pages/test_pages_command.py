import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from command_line import FinishedRun
from test_pages_write import bytes_below, parsed
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.errors import RunError, UsageError
from pipelines.pages.command import write_pages_of
from pipelines.progress import SilentReporter


@pytest.fixture
def folder(finished: FinishedRun, tmp_path: Path) -> Path:
    """The exported dictionary of a run, taken elsewhere."""
    return shutil.copytree(finished.out / "dictionaries" / "main", tmp_path / "elsewhere")


def test_a_run_leaves_pages_with_its_contexts(folder: Path):
    examples = pq.read_table(folder / "examples.parquet").to_pylist()
    number, names, rows = parsed(folder / "pages" / "data" / "block-1.js")
    assert number == 1
    n = 0
    for latent, row in enumerate(rows, start=64):
        expected = [example for example in examples if example["latent"] == latent]
        assert len(row["contexts"]) == len(expected)
        for context, example in zip(row["contexts"], expected, strict=True):
            *facts, pieces, at, values = context
            assert dict(zip(names["contexts"], facts, strict=True))["kind"] == example["kind"]
            assert "".join(pieces) == example["text"]
            assert at == [i for i, value in enumerate(example["values"]) if value]
            assert values[at.index(example["peak"])] == pytest.approx(example["max_value"], rel=1e-3)
            n += 1
    assert n > 50


def test_a_folder_that_stands_alone_gets_the_same_pages_again(folder: Path):
    before = bytes_below(folder / "pages" / "data")
    done = CliRunner().invoke(app, ["pages", str(folder)])
    assert done.exit_code == 0, done.output
    assert done.stdout == f"wrote {folder / 'pages' / 'index.html'}\n"
    after = bytes_below(folder / "pages" / "data")
    assert {name for name in after if after[name] != before[name]} == {"meta.js"}  # the title: no run, a folder
    (meta,) = parsed(folder / "pages" / "data" / "meta.js")
    assert meta["title"] == "elsewhere"


def test_pages_of_a_run_are_those_that_export_wrote(finished: FinishedRun, tmp_path: Path):
    (index,) = write_pages_of(finished.out, SilentReporter(), to=tmp_path / "pages")
    assert bytes_below(index.parent) == bytes_below(finished.out / "dictionaries" / "main" / "pages")


def test_a_model_that_is_not_here_leaves_contexts_without_marks(folder: Path, capsys: pytest.CaptureFixture[str]):
    record = json.loads((folder / "dictionary.json").read_text())
    record["provenance"]["model"]["source"] = "no/such-model"
    (folder / "dictionary.json").write_text(json.dumps(record))
    done = CliRunner().invoke(app, ["pages", str(folder)])
    assert done.exit_code == 0, done.output
    assert "contexts are shown without the tokens that fire, because model 'no/such-model'" in " ".join(
        done.stderr.split()
    )
    contexts = [context for row in parsed(folder / "pages" / "data" / "block-0.js")[2] for context in row["contexts"]]
    assert contexts
    assert all(len(context[-3]) == 1 and context[-2:] == [[], []] for context in contexts)
    with pytest.raises(UsageError, match="no/other"):
        write_pages_of(folder, SilentReporter(), model="no/other")


def test_what_is_not_there_is_a_clear_error(finished: FinishedRun, tmp_path: Path):
    ui = SilentReporter()
    with pytest.raises(UsageError, match="no SAE 'other', only main"):
        write_pages_of(finished.out, ui, sae="other")
    with pytest.raises(UsageError, match="is not a run directory"):
        write_pages_of(tmp_path, ui, sae="main")
    with pytest.raises(UsageError):
        write_pages_of(tmp_path, ui)
    (tmp_path / "config.yaml").write_bytes((finished.out / "config.yaml").read_bytes())
    with pytest.raises(RunError, match="run `sae export"):
        write_pages_of(tmp_path, ui)
