import html
import json
import re
from pathlib import Path

import pytest
from command_line import must, sae_here, sentence

from pipelines.comparison import compare, read_entries
from pipelines.comparison.entries import differences
from pipelines.comparison.figures import COLOURS, colours, figures, pareto
from pipelines.comparison.write import best, comparison_page
from pipelines.evaluation.record import Evaluation, Figure, evaluation_record

DATA = {"model": "tiny", "model_sha256": "ab", "store_fingerprint": "cd", "sink_multiple": 3.0, "settings": {}}


def evaluated(folder: Path, points: dict[str, tuple[float, float, float]], data: dict = DATA) -> Path:
    """A run directory with an evaluation: L0, FVU and CE score by SAE, each with an interval of ± 1 %."""
    found = {
        name: Evaluation(
            {"architecture": "topk", "d_in": 4, "d_sae": 1024, "hook_names": ["model.layers.8"]},
            {
                key: Figure(v, v * 0.99, v * 1.01, 100)
                for key, v in zip(("l0", "fvu", "ce_loss_score"), values, strict=True)
            }
            | {
                f"probe_{kind}_auroc_k{k}": Figure(0.8, 0.7, 0.9, 50)
                for kind in ("latents", "pca")
                for k in (1, 2, 5, 16)
            },
        )
        for name, values in points.items()
    }
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("name: x\n")
    (folder / "evaluation.json").write_text(json.dumps(evaluation_record(data, found)))
    return folder


def test_the_front_holds_what_nothing_beats(tmp_path: Path) -> None:
    run = evaluated(
        tmp_path / "run",
        {
            "a": (16, 0.30, 0.90),
            "b": (32, 0.20, 0.95),
            "c": (32, 0.25, 0.96),
            "d": (64, 0.20, 0.97),
            "e": (16, 0.30, 0.80),
        },
    )
    entries = read_entries([run])
    assert pareto(entries, "fvu") == ["run / a", "run / e", "run / b"]
    assert pareto(entries, "ce_loss_score") == ["run / a", "run / c", "run / d"]


def test_best_is_by_direction_and_with_it_what_its_interval_reaches(tmp_path: Path) -> None:
    run = evaluated(tmp_path / "run", {"a": (16, 0.200, 0.90), "b": (32, 0.203, 0.95), "c": (64, 0.21, 0.96)})
    entries = read_entries([run])
    assert best(entries, "fvu") == ["run / a", "run / b"]  # 0.198 … 0.202 and 0.201 … 0.205
    assert best(entries, "ce_loss_score") == ["run / b", "run / c"]
    assert best(entries, "l0") == []  # neither is better


def test_the_page_and_the_json_tell_the_same_and_need_nothing_else(tmp_path: Path) -> None:
    one, two = (
        evaluated(tmp_path / name, {"main": p}) for name, p in (("one", (16, 0.3, 0.9)), ("two", (32, 0.2, 0.95)))
    )
    record = compare([one, two], tmp_path / "out")
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == record
    assert [d["name"] for d in record["dictionaries"]] == ["one / main", "two / main"]
    assert record["pareto"]["fvu"] == ["one / main", "two / main"]
    assert record["metrics_schema"]["fvu"]["better"] == "lower"
    assert record["differences"] == []
    assert "0.198 … 0.202" in page
    assert not re.search(r'(src|href)="http', page.split('id="figures"')[0])
    drawn = json.loads(html.unescape(page.split('id="figures">')[1].split("</script>")[0]))
    assert drawn.keys() == {"fvu", "ce", "probes"}
    assert drawn["fvu"]["data"][0]["x"] == [16, 32]  # the front
    assert drawn["fvu"]["data"][1]["error_y"]["arrayminus"] == [pytest.approx(0.003)]


def test_names_from_outside_are_escaped_everywhere(tmp_path: Path) -> None:
    run = evaluated(tmp_path / "<img src=x onerror=alert(1)>", {"main": (16, 0.3, 0.9)})
    page = comparison_page(read_entries([run]))
    body = page.split('id="figures">')[0]
    assert "<img" not in body
    assert "&lt;img src=x" in body
    drawn = json.loads(page.split('id="figures">')[1].split("</script>")[0])
    assert drawn["fvu"]["data"][1]["text"][0].startswith("&lt;img")


def test_figures_measured_differently_are_told_apart(tmp_path: Path) -> None:
    one = evaluated(tmp_path / "one", {"main": (16, 0.3, 0.9)})
    other = DATA | {"store_fingerprint": "ef", "settings": {"n_ce_tokens": 99}}
    two = evaluated(tmp_path / "two", {"main": (16, 0.3, 0.9)}, other)
    assert differences(read_entries([one, two])) == ["store_fingerprint", "n_ce_tokens"]
    told = must(sae_here("compare", one, two, "--out", tmp_path / "out"))
    assert "warning: not measured alike: store_fingerprint differs" in told
    assert "These figures were not measured alike" in (tmp_path / "out" / "comparison.html").read_text()


def test_a_dictionary_folder_brings_its_figures_with_or_without_intervals(tmp_path: Path) -> None:
    whole = evaluated(tmp_path / "whole", {"main": (16, 0.3, 0.9)})
    (whole / "config.yaml").unlink()
    flat = tmp_path / "flat"
    flat.mkdir()
    record = {"config": {"architecture": "topk", "d_sae": 8}, "metrics": {"fvu": 0.5, "l0": 4.0, "unknown": 1}}
    (flat / "dictionary.json").write_text(json.dumps(record))
    entries = read_entries([whole, flat])
    assert [entry.name for entry in entries] == ["whole", "flat"]
    assert entries[1].value("fvu") == 0.5
    assert entries[1].value("ce_loss_score") is None
    assert pareto(entries, "ce_loss_score") == ["whole"]
    assert figures(entries)["fvu"]["data"][2]["error_y"] == {"visible": False}
    comparison_page(entries)


def test_many_dictionaries_are_coloured_by_architecture_and_equal_names_get_their_paths(tmp_path: Path) -> None:
    run = evaluated(tmp_path / "run", {f"s{i}": (10.0 + i, 0.3, 0.9) for i in range(20)})
    entries = read_entries([run])
    assert set(colours(entries)) == {COLOURS[0]}
    assert figures(entries)["fvu"]["data"][1]["mode"] == "markers"
    twins = [evaluated(tmp_path / folder / "run", {"main": (16, 0.3, 0.9)}) for folder in "ab"]
    names = [entry.name for entry in read_entries(twins)]
    assert names == [f"run / main ({twin})" for twin in twins]


def test_what_cannot_be_compared_is_named_with_its_fix(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("name: x\n")
    (tmp_path / "foreign").mkdir()
    broken = evaluated(tmp_path / "broken", {"main": (16, 0.3, 0.9)})
    (broken / "evaluation.json").write_text("{")
    old = evaluated(tmp_path / "old", {"main": (16, 0.3, 0.9)})
    (old / "evaluation.json").write_text('{"schema_version": 99}')
    paths = [tmp_path / name for name in ("run", "foreign", "broken", "old", "none")]
    told = sentence(sae_here("compare", *paths, "--out", tmp_path / "out"), 2)
    for said in ("run `sae evaluate", "foreign has no evaluation", "cannot be read", "version 99", "none is no folder"):
        assert said in told
    assert not (tmp_path / "out").exists()
    alone = sentence(sae_here("compare", tmp_path, "--model", "m", "--out", tmp_path / "out"), 2)
    assert "--model and --text go together" in alone
