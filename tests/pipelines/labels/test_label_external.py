"""Files of other people: read, refused with file and line, kept."""

import gzip
import json
import re
from datetime import date
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.errors import RunError, UsageError
from pipelines.labels.external.delphi import read_delphi
from pipelines.labels.external.neuronpedia import read_neuronpedia
from pipelines.labels.external.shelf import Shelf, read_labels_of, slug
from pipelines.labels.importing import import_labels
from pipelines.progress import SilentReporter
from sae import Dictionary, TopKConfig, build


def explanation(index: int, description: str, **more) -> dict:
    return {
        "id": f"c{index:024}",
        "modelId": "tiny",
        "layer": "1-res-24",
        "index": str(index),
        "description": description,
        "authorId": "someone",
        "typeName": None,
        "explanationModelName": None,
        "notes": None,
        "createdAt": "2026-01-02T03:04:05.000Z",
    } | more


def write_lines(path: Path, lines: list, *, compressed: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(text) if compressed else text)
    return path


# ---- Neuronpedia -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
def test_neuronpedia_export_is_read(tmp_path, compressed):
    name = "explanations/batch-0.jsonl" + (".gz" if compressed else "")
    lines = [explanation(3, " rivers\nand streams "), explanation(1, "metals", notes="a note")]
    file = write_lines(tmp_path / name, lines, compressed=compressed)
    found = read_neuronpedia(tmp_path)
    assert [(label.latent, label.label, label.source) for label in found] == [
        (1, "metals", "neuronpedia"),
        (3, "rivers and streams", "neuronpedia"),
    ]
    assert (found[0].author, found[0].note, found[0].line, found[0].file) == ("someone", "a note", 2, file.name)
    assert found[0].date.startswith("2026-01-02")
    assert read_neuronpedia(file) == found == read_neuronpedia(tmp_path / "explanations")


def test_neuronpedia_methods_are_sources_of_their_own_and_the_newest_counts(tmp_path):
    method = {"typeName": "oai_token-act-pair", "explanationModelName": "gpt-4o-mini"}
    lines = [
        explanation(1, "old", createdAt="2025-01-01T00:00:00Z", **method),
        explanation(1, "new", createdAt="2026-01-01T00:00:00Z", **method),
        explanation(1, "by hand"),
    ]
    write_lines(tmp_path / "explanations/batch-0.jsonl", lines)
    found = read_neuronpedia(tmp_path)
    assert [(label.source, label.label) for label in found] == [
        ("neuronpedia", "by hand"),
        ("neuronpedia:oai_token-act-pair/gpt-4o-mini", "new"),
    ]


def test_neuronpedia_export_of_several_dictionaries_wants_a_choice(tmp_path):
    lines = [explanation(1, "a"), explanation(1, "b", layer="2-res-24")]
    write_lines(tmp_path / "explanations/batch-0.jsonl", lines)
    with pytest.raises(UsageError, match=r"tiny/1-res-24, tiny/2-res-24.*--layer"):
        read_neuronpedia(tmp_path)
    assert [label.label for label in read_neuronpedia(tmp_path, "2-res-24")] == ["b"]
    with pytest.raises(UsageError, match="no explanations of 9-x"):
        read_neuronpedia(tmp_path, "9-x")


def test_what_we_export_for_neuronpedia_comes_back(tmp_path):
    from pipelines.dashboards import Publication, _explanation

    class Labelled:
        def label(self, latent):
            return {0: "rivers", 5: 'a "quoted" ⟦label⟧'}.get(latent)

        def origin(self, latent):
            return "a rule"

    publication = Publication(model_id="tiny", source_set="res-24", creator_id="us", created="2026-01-02T00:00:00")
    lines = [line for i in range(8) for line in _explanation({"feature_index": i}, Labelled(), publication, "1-res-24")]
    write_lines(tmp_path / "explanations/batch-0.jsonl.gz", lines, compressed=True)
    assert [(x.latent, x.label) for x in read_neuronpedia(tmp_path)] == [(0, "rivers"), (5, 'a "quoted" ⟦label⟧')]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", r"batch-0.jsonl, line 2: "),
        ("[1]", "line 2: an explanation is a JSON object"),
        ('{"index": "1"}', "line 2: an explanation is a JSON object with index and description"),
        (explanation(1, ""), "line 2: the label is empty"),
        (explanation(1, "x" * 2000), "line 2: a label has at most 300 characters, got 2000"),
        (explanation(1, "\ud800"), "line 2: the label is empty, or not valid text"),
        (explanation(1, 7), "line 2: a label is text, not int"),
        ({**explanation(1, "a"), "index": "-1"}, "line 2: a latent is a whole number from 0, got '-1'"),
        ({**explanation(1, "a"), "index": "1e3"}, "whole number"),
        (explanation(1, "a", createdAt="yesterday"), "a date looks like"),
        ("[" * 100_000, "line 2"),
        ("x" * (2**20 + 5), "line 2: the line, or the file, is far longer"),
    ],
)
def test_rubbish_in_an_export_is_refused_by_line(tmp_path, line, complaint):
    write_lines(tmp_path / "explanations/batch-0.jsonl", [explanation(0, "fine"), line])
    with pytest.raises(UsageError, match=complaint):
        read_neuronpedia(tmp_path)


def test_broken_compression_and_missing_files_are_told(tmp_path):
    file = write_lines(tmp_path / "explanations/batch-0.jsonl.gz", [explanation(0, "fine")] * 500, compressed=True)
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(UsageError, match=r"batch-0.jsonl.gz, line \d+: it cannot be read"):
        read_neuronpedia(tmp_path)
    with pytest.raises(UsageError, match="has no explanations"):
        read_neuronpedia(tmp_path / "explanations" / "nothing")


# ---- delphi ----------------------------------------------------------------------------------------------------------


def write_delphi(folder: Path, hook: str = "layers.1") -> Path:
    (folder / "explanations").mkdir(parents=True)
    (folder / "scores/detection").mkdir(parents=True)
    (folder / "run_config.json").write_text(json.dumps({"explainer_model": "a/model"}))
    for latent, text in {4: "rivers", 12: "Explanation could not be parsed.", 7: "metals"}.items():
        (folder / f"explanations/{hook}_latent{latent}.txt").write_text(json.dumps(text))
    examples = [{"activating": True, "prediction": 1}] * 3 + [{"activating": True, "prediction": None}]
    examples += [{"activating": False, "prediction": 0}] * 3 + [{"activating": False, "prediction": True}]
    (folder / f"scores/detection/{hook}_latent4.txt").write_text(json.dumps(examples))
    return folder


def test_delphi_results_are_read_with_scores_that_count_failures(tmp_path):
    labels, n_failed = read_delphi(write_delphi(tmp_path))
    assert [(label.latent, label.label, label.source) for label in labels] == [
        (4, "rivers", "delphi"),
        (7, "metals", "delphi"),
    ]
    assert n_failed == 1
    assert labels[0].claimed == {"detection": 0.75}
    assert labels[1].claimed == {}
    assert labels[0].method == "a/model"


def test_delphi_rubbish_is_refused(tmp_path):
    folder = write_delphi(tmp_path)
    (folder / "explanations/layers.1_latent8.txt").write_text("no json")
    (folder / "scores/detection/layers.1_latent7.txt").write_text('{"a": 1}')
    with pytest.raises(UsageError, match=r"latent7.txt, line 1: it holds no list.*latent8.txt, line 1"):
        read_delphi(folder)
    (folder / "explanations/layers.2_latent8.txt").write_text('"x"')
    with pytest.raises(UsageError, match=r"several hookpoints \(layers.1, layers.2\)"):
        read_delphi(folder)


# ---- CSV, YAML -------------------------------------------------------------------------------------------------------


def read(path: Path, source: str, **options):
    return read_labels_of(path, source, **options)[0]


def test_csv_is_read_by_its_header(tmp_path):
    file = tmp_path / "labels.csv"
    file.write_text('\ufeffFeature,Description,note\n3,"rivers, streams",\n\n1,"two\nlines",a note\n')
    found = read(file, "csv:mine", author="Ada")
    assert [(x.latent, x.label, x.line, x.author, x.note) for x in found] == [
        (3, "rivers, streams", 2, "Ada", None),
        (1, "two lines", 4, "Ada", "a note"),
    ]
    assert {x.source for x in found} == {"csv:mine"}
    tabs = tmp_path / "labels.tsv"
    tabs.write_text("latent\tlabel\tdate\n3\trivers, streams\t2026-05-31\n")
    assert read(tabs, "csv:tabs")[0].date == "2026-05-31"


def test_hand_written_yaml_is_read_with_its_name_and_date(tmp_path):
    file = tmp_path / "labels.yaml"
    file.write_text(
        "author: Ada Lovelace\ndate: 2026-05-31\nlabels:\n  17: months\n"
        '  21: {label: "quotes", note: closing, date: 2026-06-01, author: B}\n'
    )
    first, second = read(file, "human")
    assert (first.source, first.author, first.date, first.line) == (
        "human:Ada Lovelace",
        "Ada Lovelace",
        "2026-05-31",
        4,
    )
    assert (second.source, second.note, second.date) == ("human:B", "closing", "2026-06-01")
    assert {x.source for x in read(file, "human:Team")} == {"human:Team"}


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        (
            "a.csv",
            "id,text\n1,x\n",
            r"a.csv, line 1: the header has no column latent and no label",
        ),
        ("a.csv", "latent,label\n1,x,y\n", "line 2: the header has 2 columns, this row 3"),
        ("a.csv", "latent,label\n1,x\n1,y\n", "line 3: latent 1 stands in line 2 already"),
        ("a.csv", "latent,label\nx,y\n", "line 2: a latent is a whole number"),
        ("a.csv", "latent,label,date\n1,y,soon\n", "line 2: a date looks like 2026-05-31, got 'soon'"),
        ("a.csv", 'latent,label\n1,"x"y\n', "line 2: it is not CSV"),
        ("a.csv", "latent,label\n", "holds no labels"),
        ("a.csv", b"latent,label\n1,\xff\n", "line 2: the file is not UTF-8"),
        ("a.yaml", "labels: [1]", "line 1: give `author`, `date` and `labels`"),
        ("a.yaml", "labels:\n  1: {text: x}\n", "line 2: unknown keys text"),
        ("a.yaml", "labels:\n  1: [x]\n", "line 2: a label is text, not list"),
        ("a.yaml", "labels:\n  1: x\n  1: y\n", "line 3: it is not YAML .the key 1 stands twice"),
        ("a.yaml", "labels:\n  1: !!python/object:os.system x\n", "it is not YAML"),
        ("a.yaml", "labels: {1: x}\nmore: 1\n", "unknown keys more"),
        ("a.txt", "x", "labels are read from .csv"),
    ],
)
def test_rubbish_in_a_table_is_refused_by_line(tmp_path, name, content, complaint):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=complaint):
        read(file, "csv:mine")


def test_a_human_has_a_name_and_a_date(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("latent,label\n1,x\n")
    with pytest.raises(UsageError, match=r"line 2: a human's label has a name and a date"):
        read(file, "human:Ada")
    (label,) = read(file, "human:Ada", date="2026-05-31")
    assert (label.source, label.author, label.date) == ("human:Ada", "Ada", "2026-05-31")
    with pytest.raises(UsageError, match="--date: a date looks like"):
        read(file, "human:Ada", date="31.5.26")


@pytest.mark.parametrize("source", ["mine", "csv", "human:", "csv:a:b", "llm:x", "predicate", "human:\x00"])
def test_sources_have_known_names(tmp_path, source):
    (tmp_path / "a.csv").write_text("latent,label\n1,x\n")
    with pytest.raises(UsageError, match="--source"):
        read(tmp_path / "a.csv", source)


# ---- the shelf -------------------------------------------------------------------------------------------------------


def table(path: Path, rows: dict[int, str]) -> Path:
    path.write_text("latent,label\n" + "".join(f"{latent},{label}\n" for latent, label in rows.items()))
    return path


def test_shelf_keeps_what_is_there(tmp_path):
    shelf = Shelf(tmp_path / "imports")
    first = shelf.put(read(table(tmp_path / "a.csv", {1: "x", 2: "y"}), "csv:mine"), 10)
    assert (first.n_new, first.n_known, first.sources) == (2, 0, ("csv:mine",))
    before = shelf.all()
    again = shelf.put(read(table(tmp_path / "b.csv", {2: "y", 3: "z"}), "csv:mine"), 10)
    assert (again.n_new, again.n_known) == (1, 1)
    assert shelf.all()[:2] == before
    with pytest.raises(UsageError, match=r"c.csv, line 2: latent 1 is 'x', not 'other'.*--replace"):
        shelf.put(read(table(tmp_path / "c.csv", {1: "other", 4: "new"}), "csv:mine"), 10)
    assert [label.latent for label in shelf.all()] == [1, 2, 3]
    replaced = shelf.put(read(tmp_path / "c.csv", "csv:mine"), 10, replace=True)
    assert (replaced.n_new, replaced.n_replaced) == (1, 1)
    shelf.put(read(tmp_path / "c.csv", "csv:theirs"), 10)
    assert [(x.source, x.latent, x.label) for x in shelf.all()] == [
        *[("csv:mine", i, t) for i, t in ((1, "other"), (2, "y"), (3, "z"), (4, "new"))],
        *[("csv:theirs", i, t) for i, t in ((1, "other"), (4, "new"))],
    ]


def test_shelf_refuses_latents_that_do_not_exist(tmp_path):
    shelf = Shelf(tmp_path / "imports")
    with pytest.raises(UsageError, match=r"a.csv, line 3: latent 10 does not exist, the dictionary has 10 \(0 to 9\)"):
        shelf.put(read(table(tmp_path / "a.csv", {1: "x", 10: "y"}), "csv:mine"), 10)
    assert shelf.all() == []


def test_damaged_shelf_is_told_by_line(tmp_path):
    shelf = Shelf(tmp_path / "imports")
    shelf.put(read(table(tmp_path / "a.csv", {1: "x"}), "csv:mine"), 10)
    (file,) = (tmp_path / "imports").iterdir()
    file.write_text(file.read_text() + "{}\n")
    with pytest.raises(RunError, match=r"line 2 is damaged"):
        shelf.all()


def test_names_of_sources_make_safe_and_distinct_file_names():
    names = [slug(source) for source in ("human:../../etc", "human:.. .. etc", "human:שלום", "human:🎈", "human:Ada")]
    assert len(set(names)) == 5
    assert all(re.fullmatch(r"[A-Za-z0-9-]+", name) for name in names)


# ---- a dictionary without a run --------------------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path) -> Path:
    """A folder as SAELens writes it, without anything of ours."""
    folder = tmp_path / "foreign"
    Dictionary(build(TopKConfig(d_in=8, d_sae=24, k=3), seed=0), hook_name="model.layers.1").save(folder)
    (folder / "dictionary.json").unlink()
    return folder


def test_labels_go_beside_a_dictionary_that_was_not_trained_here(foreign, tmp_path):
    file = table(tmp_path / "a.csv", {1: "x", 2: "y"})
    done = import_labels(foreign, file, "human:Ada", SilentReporter(), date=date(2026, 5, 31).isoformat())
    assert done["n_new"] == 2
    rows = pq.read_table(foreign / "labels.parquet").to_pylist()
    assert [(r["latent"], r["label"], r["status"], r["source"], r["passed"]) for r in rows] == [
        (1, "x", "untested", "human:Ada", None),
        (2, "y", "untested", "human:Ada", None),
    ]
    import_labels(foreign, table(tmp_path / "b.csv", {1: "other"}), "csv:mine", SilentReporter())
    with pytest.raises(UsageError, match="with another text"):
        import_labels(foreign, table(tmp_path / "c.csv", {1: "z"}), "csv:mine", SilentReporter())
    rows = pq.read_table(foreign / "labels.parquet").to_pylist()
    assert [(r["latent"], r["source"]) for r in rows] == [(1, "csv:mine"), (1, "human:Ada"), (2, "human:Ada")]
    assert Dictionary.load(foreign).d_sae == 24


def test_labels_need_a_run_or_a_dictionary(tmp_path):
    with pytest.raises(UsageError, match="neither a run directory nor a dictionary folder"):
        import_labels(tmp_path, table(tmp_path / "a.csv", {1: "x"}), "csv:mine", SilentReporter())
