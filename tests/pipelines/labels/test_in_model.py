"""The tests in the model as the label stage runs them: on a real store, a real tiny model, a trained dictionary."""

import pyarrow.parquet as pq
import pytest

from pipelines.errors import RunError
from pipelines.labels import in_model
from pipelines.labels.counterfactual import COLUMNS as EDITS
from pipelines.labels.in_model_settings import EditsConfig, OutputTestConfig
from pipelines.labels.output_test import COLUMNS as OUTPUT
from pipelines.labels.run import label
from pipelines.progress import SilentReporter
from pipelines.run import stage_sections


def config_of(run, **sections):
    return run.config.model_copy(update={"label": run.config.label.model_copy(update=sections)})


@pytest.fixture
def tested(run):
    config = config_of(
        run,
        edits=EditsConfig(n_latents=10, n_documents=4, max_context=8),
        output_test=OutputTestConfig(n_latents=3, n_controls=10, n_texts=2, n_tokens=8),
    )
    label(config, run.dir, SilentReporter())
    return config, run.dir


def table_of(directory):
    return pq.read_table(directory.labels("main") / "features.parquet")


def test_the_label_stage_writes_columns_for_the_tested_latents_alone(tested):
    _, directory = tested
    table = table_of(directory)
    for schema, name, n in ((EDITS, "edit_documents", 10), (OUTPUT, "output_p", 3)):
        for field in schema:
            assert table.schema.field(field.name).type == field.type
        assert sum(value is not None for value in table[name].to_pylist()) == n
    figures = directory.metrics()
    assert (figures["main.label_edits_n"], figures["main.label_output_n"]) == (10, 3)
    rows = [row for row in table.to_pylist() if row["output_p"] is not None]
    assert all(1 / 11 - 1e-6 <= row["output_p"] <= 1 and row["output_n_controls"] == 10 for row in rows)
    assert all(row["output_rise_low"] <= row["output_rise"] <= row["output_rise_high"] for row in rows)


def test_a_rerun_takes_finished_blocks_and_gives_the_same_bytes(tested, monkeypatch):
    config, directory = tested
    before = (directory.labels("main") / "features.parquet").read_bytes()

    def never(*_, **__):
        raise AssertionError("a finished block was done again")

    monkeypatch.setattr(in_model, "run_edits", never)
    monkeypatch.setattr(in_model.Amplifier, "rise", never)
    label(config, directory, SilentReporter())
    assert (directory.labels("main") / "features.parquet").read_bytes() == before
    changed = config_of(type("Run", (), {"config": config}), edits=EditsConfig(n_latents=10, n_documents=3))
    with pytest.raises(AssertionError, match="done again"):
        label(changed, directory, SilentReporter())


def test_an_interrupted_stage_goes_on_where_it_stopped(run, tested, monkeypatch):
    config, finished = tested
    expected = table_of(finished)
    other = type(finished)(finished.path.parent / "interrupted")
    other.trained("main").parent.mkdir(parents=True)
    other.trained("main").symlink_to(finished.trained("main"))
    n_blocks, plain = 0, in_model.run_edits

    def counted(firings, *args, **options):
        nonlocal n_blocks
        n_blocks += 1
        if n_blocks == 2:
            raise KeyboardInterrupt
        return plain(firings, *args, **options)

    monkeypatch.setattr(in_model, "run_edits", counted)
    with pytest.raises(KeyboardInterrupt):
        label(config, other, SilentReporter())
    label(config, other, SilentReporter())
    assert n_blocks == 3  # two blocks, one of them twice
    assert table_of(other).equals(expected)


def test_texts_that_do_not_exist_are_refused_with_the_fix(run):
    config = config_of(run, output_test=OutputTestConfig(n_latents=1, n_tokens=1000))
    with pytest.raises(RunError, match="no held-out document has as many"):
        label(config, run.dir, SilentReporter())


def test_the_tests_are_off_by_default_and_part_of_the_stage_key(run):
    label(run.config, run.dir, SilentReporter())
    assert not {*EDITS.names, *OUTPUT.names} & set(table_of(run.dir).column_names)
    with_edits = config_of(run, edits=EditsConfig(n_latents=1))
    assert stage_sections(with_edits)["label"] != stage_sections(run.config)["label"]
