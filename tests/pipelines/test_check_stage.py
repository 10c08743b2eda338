"""A dictionary from elsewhere is checked once in a run, and every stage says so if it does not fit."""

import json

import pytest
import torch
from dictionaries import perfect_dictionary, random_dictionary

from pipelines.check import check_fit, warn_of_misfit
from pipelines.config import DictionarySource
from pipelines.dictionaries import import_dictionary, load_trained
from pipelines.evaluate import evaluate
from pipelines.progress import SilentReporter
from pipelines.rundir import RunDir
from pipelines.sample import CONTEXT, sample_tokens


class Lines(SilentReporter):
    """Keeps what was said."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def imported(collected, store, folder, dictionary):
    """A run that starts from `dictionary`."""
    dictionary.save(folder / "given")
    collect = collected.config.collect.model_copy(update={"store": str(collected.dir.store_path)})
    source = DictionarySource(path=str(folder / "given"))
    config = collected.config.model_copy(update={"collect": collect, "train": None, "dictionary": source})
    run = RunDir(folder / "run")
    import_dictionary(config, run, "main", store)
    return config, run


def events(run):
    return [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]


def test_a_misfit_is_an_event_once_and_a_line_in_every_stage(collected, store, lm, tmp_path):
    config, run = imported(collected, store, tmp_path, random_dictionary("model.layers.1"))
    ui = Lines()
    evaluate(config, run, ui)
    first = warn_of_misfit(config, run, "main", load_trained(run, "main"), lm, ui)
    again = warn_of_misfit(config, run, "main", load_trained(run, "main"), lm, ui)
    assert first == again
    assert not first["ok"]
    said = [event for event in events(run) if event["event"] == "dictionary does not fit"]
    assert [event["sae"] for event in said] == ["main"]
    assert said[0]["sentence"] == first["sentence"]
    assert ui.lines == [f"warning: main: {first['sentence']}"] * 3
    assert first["sentence"].startswith("The dictionary does not fit model.layers.1: FVU ")


def test_a_dictionary_that_fits_is_an_event_and_no_line(collected, store, lm, tmp_path):
    dictionary = perfect_dictionary("model.layers.1")
    dictionary.metrics = {"fvu": 0.01, "l0": 32.0}
    config, run = imported(collected, store, tmp_path, dictionary)
    ui = Lines()
    record = warn_of_misfit(config, run, "main", load_trained(run, "main"), lm, ui)
    assert record["ok"]
    assert record["recorded"] == {"fvu": 0.01, "l0": 32.0}
    assert [event["event"] for event in events(run)] == ["dictionary fits"]
    assert ui.lines == []


def test_a_dictionary_that_the_run_trained_is_not_checked(run, lm):
    ui = Lines()
    assert warn_of_misfit(run.config, run.dir, "main", load_trained(run.dir, "main"), lm, ui) is None
    assert ui.lines == []
    assert not (run.dir.checkpoints("main") / "check.json").exists()


def test_the_bundled_text_makes_whole_rows_without_bos(lm):
    tokens = sample_tokens(lm.tokenizer)
    assert tokens.shape[1] == CONTEXT
    assert tokens.numel() > 900
    assert not (tokens == lm.tokenizer.bos_token_id).any()
    text = lm.tokenizer.decode(tokens.flatten())
    assert text.startswith("The ferry to the island leaves")


def test_a_report_is_made_on_the_bundled_text(lm):
    report = check_fit(perfect_dictionary("model.layers.1"), lm)
    assert report.own.fvu == pytest.approx(0, abs=1e-6)
    assert torch.tensor([fit.fvu for fit in report.others]).isfinite().all()


def test_another_width_is_refused(lm):
    with pytest.raises(ValueError, match=r"must have width d_in=48 and d_out=48, got 32 and 32"):
        check_fit(random_dictionary("model.layers.1", d_in=48), lm)
