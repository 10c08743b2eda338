import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from page_tables import D_SAE, HOSTILE, TOKENS, Words, dictionary, directions, speller, write_tables

from pipelines.errors import UsageError
from pipelines.pages import write_pages
from pipelines.pages.columns import measures_of, status_of
from pipelines.pages.contexts import Contexts
from pipelines.pages.neighbours import nearest_neighbours
from pipelines.pages.script import json_text
from sae.search import nearest


def parsed(script: Path) -> list:
    """The arguments of a data file's one call."""
    match = re.fullmatch(r"Pages\.\w+\((.*)\);\n", script.read_text(encoding="utf-8"), re.DOTALL)
    assert match is not None
    return json.loads(f"[{match[1]}]")


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    tables = write_tables(tmp_path / "tables")
    return write_pages(dictionary(), tables, tmp_path / "pages", title=HOSTILE, speller=speller()).parent


def test_nothing_from_outside_is_in_the_html_and_data_cannot_end_a_script(written: Path):
    for file in written.rglob("*"):
        if file.suffix == ".html":
            assert "owned" not in file.read_text()
        if file.parent.name == "data":
            text = file.read_text(encoding="utf-8")
            assert "owned" in text  # the texts are there
            assert not set("<>&\u2028\u2029\0") & set(text)


def test_equal_tables_give_equal_bytes(written: Path, tmp_path: Path):
    again = write_pages(dictionary(), tmp_path / "tables", tmp_path / "again", title=HOSTILE, speller=speller()).parent
    assert bytes_below(again) == bytes_below(written)
    assert {file.name for file in written.iterdir()} > {"index.html", "feature.html", "data", "style.css"}


def test_a_block_holds_what_the_tables_say(written: Path, tmp_path: Path):
    features = pq.read_table(tmp_path / "tables" / "features.parquet").to_pylist()
    number, names, rows = parsed(written / "data" / "block-1.js")
    assert (number, len(rows)) == (1, 64)
    assert len(parsed(written / "data" / f"block-{D_SAE // 64}.js")[2]) == D_SAE % 64
    for offset, row in enumerate(rows):
        latent = 64 + offset
        shown = dict(zip(names["columns"], row["columns"], strict=True))
        assert shown["label"] == features[latent]["label"]
        assert shown["max_activation"] == pytest.approx(features[latent]["max_activation"], rel=1e-3)
        contexts = [dict(zip([*names["contexts"], "pieces", "at", "values"], c, strict=True)) for c in row["contexts"]]
        assert [c["kind"] for c in contexts] == ["top", "false_positive", "invented <kind>"]
        expected = [TOKENS[(latent + j) % len(TOKENS)] for j in range(6)] + ["é", ""]
        assert contexts[0]["pieces"] == expected
        assert contexts[0]["at"] == [2, 6, 7]
        assert contexts[0]["values"] == pytest.approx([1 + latent, 0.25, 0.5], rel=1e-3)
        assert contexts[1]["at"] == []
        assert len(row["neighbours"]) == 10
        assert row["neighbours"][0][2] == parsed(written / "data" / "index.js")[0]["label"][row["neighbours"][0][0]]


def test_the_index_names_latents_and_whose_label_it_is(written: Path):
    (index,) = parsed(written / "data" / "index.js")
    assert index["label"][3] == "their word for three"
    assert index["by"][3] == "neuronpedia"
    assert index["label"][9] is None
    assert index["candidate"][9] == "candidate 9"
    assert index["label"][1] == "river number 1"  # its own stands before those of others
    assert index["by"][1] is None
    assert (index["status"][1], index["status"][2], index["status"][9]) == ("survives", "labelled", "unlabelled")
    assert index["test"]["title"] == "Held-out detection"
    (meta,) = parsed(written / "data" / "meta.js")
    assert meta["n"] == D_SAE
    assert [test["value"] for test in meta["tests"]] == ["detection_balanced_accuracy", "brand_new"]


def test_contexts_in_any_order_are_those_of_their_latent(tmp_path: Path):
    folder = write_tables(tmp_path)
    ordered = Contexts(folder / "examples.parquet", speller()).block(0, D_SAE)
    table = pq.read_table(folder / "examples.parquet")
    mixed = np.random.default_rng(0).permutation(table.num_rows)
    pq.write_table(table.take(mixed), folder / "mixed.parquet", row_group_size=37)
    found = Contexts(folder / "mixed.parquet", speller()).block(0, D_SAE)
    assert [sorted(contexts) for contexts in found] == [sorted(contexts) for contexts in ordered]
    blocks = Contexts(folder / "mixed.parquet", speller())
    by_block = [context for at in range(0, D_SAE, 64) for context in blocks.block(at, min(at + 64, D_SAE))]
    assert by_block == found


def test_few_row_groups_are_in_memory_at_once(tmp_path: Path):
    folder = write_tables(tmp_path, 600)
    contexts = Contexts(folder / "examples.parquet", speller())
    for start in range(0, 600, 64):
        contexts.block(start, min(start + 64, 600))
        assert len(contexts._groups) <= 8
    assert contexts._file.num_row_groups > 30


@pytest.mark.parametrize("d_sae", [1, 2, 11, 300])
def test_neighbours_are_those_of_the_plain_search(d_sae: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipelines.pages.neighbours._AT_ONCE", 7 * d_sae)
    W = directions(d_sae, 24)
    if d_sae > 2:
        W[1] = 0  # no direction at all
    found = list(nearest_neighbours(W, 10))
    assert len(found) == d_sae
    for latent in range(d_sae):
        if not W[latent].any():
            continue
        plain = [near for near in nearest(W, W[latent], 11) if near.latent != latent][:10]
        torch.testing.assert_close([n.cosine for n in found[latent]], [n.cosine for n in plain], atol=1e-5, rtol=0)
        assert latent not in {n.latent for n in found[latent]}


def test_a_table_that_says_little_makes_pages_all_the_same(tmp_path: Path):
    pq.write_table(pa.table({"latent": list(range(D_SAE))}), tmp_path / "features.parquet")
    index = write_pages(dictionary(), tmp_path, tmp_path / "pages", title="bare")
    assert index == tmp_path / "pages" / "index.html"
    assert parsed(index.parent / "data" / "block-0.js")[2][0]["contexts"] == []
    # Published without texts, contexts keep their documents alone.
    pq.write_table(pa.table({"latent": [0], "kind": ["top"], "document": [3]}), tmp_path / "examples.parquet")
    write_pages(dictionary(), tmp_path, tmp_path / "pages", title="bare", speller=speller())
    assert parsed(index.parent / "data" / "block-0.js")[2][0]["contexts"] == [["top", 3, [], [], []]]


def test_contexts_without_a_tokenizer_are_one_piece_of_text(tmp_path: Path):
    folder = write_tables(tmp_path)
    (context, *_) = Contexts(folder / "examples.parquet", None).block(1, 2)[0]
    assert json.loads(context)[-3:] == [[HOSTILE], [], []]


def test_a_table_of_another_dictionary_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="one row for each of the dictionary's 200 latents, but has 50"):
        write_pages(dictionary(), write_tables(tmp_path / "a", 50), tmp_path / "pages", title="x")
    with pytest.raises(UsageError, match=r"has no features\.parquet: run `sae label`"):
        write_pages(dictionary(), tmp_path, tmp_path / "pages", title="x")
    assert not (tmp_path / "pages").exists()


def test_json_is_exact_but_for_digits_and_what_is_not_finite():
    value = {"a": [1, 2.123456, None, True, float("nan"), float("inf")], HOSTILE: HOSTILE, "b": "\ud800"}
    back = json.loads(json_text(value))
    assert back["a"] == [1, 2.123, None, True, None, None]
    assert back[HOSTILE] == HOSTILE
    assert back["b"] == "?"


def test_tests_are_found_by_their_bounds_alone():
    assert measures_of(["x_low", "x_high"]) == []  # no value
    (found,) = measures_of(["fuzzing_low", "fuzzing_high", "fuzzing_auroc", "fuzzing_null", "y_low"])
    assert (found["value"], found["null"]) == ("fuzzing_auroc", "fuzzing_null")
    assert status_of({"density": 0.0}) == "silent"
    assert status_of({"label": "x", "labelled": False}) == "unlabelled"


def test_halves_of_a_character_are_spelled_together():
    first, second = Words.halves
    assert speller().spell([1, first, second, 2]) == [" river", "é", "", " bank"]
    assert speller().spell([first, 2]) == ["\ufffd", " bank"]  # no character at all
    assert speller().spell([first]) == ["\ufffd"]
    assert speller().spell([10_000]) == ["<unused 10000>"]
