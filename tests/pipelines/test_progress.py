import io

import pytest
from rich.console import Console

from pipelines.progress import Bar, ConsoleReporter, Reporter, SilentReporter


def lines_reporter(every_s=10.0, width=80):
    console = Console(file=io.StringIO(), width=width)
    assert not console.is_terminal
    return ConsoleReporter(console, every_s=every_s), console.file


def test_stage_prints_lines_where_there_is_no_terminal():
    ui, out = lines_reporter()
    with ui.stage("train", total=1000, unit="tokens", done=200) as bar:
        bar.note("loss 0.5")
        for _ in range(8):
            bar.advance(100)
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("train: 200 of 1,000 tokens")
    assert lines[-1].startswith("train: 1,000 of 1,000 tokens, ")
    assert lines[-1].endswith("loss 0.5")
    assert len(lines) == 2  # the work was quicker than `every_s`


def test_stage_prints_more_lines_when_work_takes_longer():
    ui, out = lines_reporter(every_s=0.0)
    with ui.stage("train", total=3, unit="steps") as bar:
        for _ in range(3):
            bar.advance(1)
    assert [line.partition(",")[0] for line in out.getvalue().splitlines()] == [
        "train: 0 of 3 steps",
        "train: 1 of 3 steps",
        "train: 2 of 3 steps",
        "train: 3 of 3 steps",
        "train: 3 of 3 steps",
    ]


def test_rate_counts_this_attempt_only(monkeypatch):
    now = 50.0
    monkeypatch.setattr("pipelines.progress.time.monotonic", lambda: now)
    ui, out = lines_reporter()
    with ui.stage("collect", total=1000, unit="tokens", done=900) as bar:
        now += 10.0
        bar.advance(100)
    assert "collect: 1,000 of 1,000 tokens, 10 tokens/s, 10 s" in out.getvalue()


def test_lines_are_neither_wrapped_nor_read_as_markup():
    ui, out = lines_reporter(width=40)
    text = "nothing to do in /a/long/path/[bold]/of/a/[/run] :smile: " + "x" * 60
    ui.say(text)
    with ui.stage("a [stage]", total=1, unit="units") as bar:
        bar.note("[/] " + "y" * 60)
    lines = out.getvalue().splitlines()
    assert lines[0] == text
    assert lines[1].startswith("a [stage]: 0 of 1 units")
    assert lines[2].endswith("[/] " + "y" * 60)


def test_failed_stage_does_not_print_its_end():
    ui, out = lines_reporter()
    with pytest.raises(RuntimeError), ui.stage("train", total=2, unit="steps") as bar:  # noqa: PT012
        bar.advance(1)
        raise RuntimeError
    assert len(out.getvalue().splitlines()) == 1


def test_terminal_gets_a_bar():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    ui = ConsoleReporter(console)
    with ui.stage("label", total=4, unit="latents", done=1) as bar:
        bar.note("half [way]")
        bar.advance(3)
    out = console.file.getvalue()
    assert "label" in out
    assert "100%" in out


def test_silent_reporter_says_nothing(capsys):
    ui = SilentReporter()
    with ui.stage("x", total=1, unit="y") as bar:
        bar.advance(1)
        bar.note("z")
    ui.say("w")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("ui", [ConsoleReporter(), SilentReporter()])
def test_reporters_keep_the_protocol(ui):
    assert isinstance(ui, Reporter)
    with SilentReporter().stage("x", total=1, unit="y") as bar:
        assert isinstance(bar, Bar)
