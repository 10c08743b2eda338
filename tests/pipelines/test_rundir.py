import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import rundir
from pipelines.errors import RunError
from pipelines.rundir import RunDir, key_of, replacing_directory, sweep_partials, write_bytes, write_json, write_text

ROOT = Path(__file__).parents[2]


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A second process with our packages on its path."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def kill_after_first_line(process: subprocess.Popen[str]) -> None:
    """Wait for the process to say that it is in the middle of its work, then kill -9."""
    with process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL


# -- files -------------------------------------------------------------------------------------------------------------


def test_write_bytes_replaces_a_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "new" / "folder" / "a.bin"
    write_bytes(path, b"one")
    write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["a.bin"]


def test_write_text_and_write_json_are_utf8(tmp_path):
    write_text(tmp_path / "a.txt", "Ü\n")
    write_json(tmp_path / "a.json", {"ü": [1, None]})
    assert (tmp_path / "a.txt").read_bytes() == "Ü\n".encode()
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"ü": [1, None]}
    assert "ü" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")

    def full(_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("stop_at", ["fsync", "replace"])
def test_killed_write_keeps_the_old_file_whole(tmp_path, stop_at):
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")
    code = """
import os, sys, time
from pathlib import Path
from pipelines import rundir
def stop(*_):
    print("ready", flush=True)
    time.sleep(60)
setattr(os, sys.argv[2], stop)
rundir.write_bytes(Path(sys.argv[1]), b"new" * 1000)
"""
    kill_after_first_line(python(code, path, stop_at))
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2
    sweep_partials(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


# -- folders -----------------------------------------------------------------------------------------------------------


def test_replacing_directory_swaps_the_folder_as_a_whole(tmp_path):
    target = tmp_path / "deep" / "folder"
    for content in ("one", "two"):
        with replacing_directory(target) as partial:
            (partial / content).write_text(content)
            assert not (target / content).exists()
    assert [p.name for p in target.iterdir()] == ["two"]
    assert [p.name for p in target.parent.iterdir()] == ["folder"]


def test_replacing_directory_keeps_the_old_folder_when_the_block_fails(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(FileNotFoundError), replacing_directory(target) as partial:
        shutil.copyfile(tmp_path / "missing", partial / "new")
    assert [p.name for p in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]


def test_killed_replacing_directory_leaves_the_old_folder_and_can_be_swept(tmp_path):
    target = tmp_path / "folder"
    with replacing_directory(target) as partial:
        (partial / "old").touch()
    code = """
import sys, time
from pathlib import Path
from pipelines.rundir import replacing_directory
with replacing_directory(Path(sys.argv[1])) as partial:
    (partial / "half").write_text("done")
    print("ready", flush=True)
    time.sleep(60)
"""
    kill_after_first_line(python(code, target))
    assert [p.name for p in target.iterdir()] == ["old"]
    sweep_partials(tmp_path)
    assert list(tmp_path.iterdir()) == [target]


def test_sweep_removes_only_what_writers_leave(tmp_path):
    for name in (".a.json.0123.partial", ".b.0123.old", "a.partial", "b.old", ".hidden", ".lock"):
        (tmp_path / name).touch()
    (tmp_path / ".c.0123.partial").mkdir()
    (tmp_path / "..d.0123.partial.4567.tmp").mkdir()
    (tmp_path / ".c.0123.partial" / "inside").touch()
    sweep_partials(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".hidden", ".lock", "a.partial", "b.old"]


# -- stages and records ------------------------------------------------------------------------------------------------


def test_rundir_object_touches_nothing(tmp_path):
    run = RunDir(tmp_path / "run")
    assert run.stage_key("collect") is None
    assert run.metrics() == {}
    run.forget("collect")
    assert not run.path.exists()


def test_stage_markers_remember_the_key_until_forgotten(tmp_path):
    run = RunDir(tmp_path)
    run.mark_finished("collect", "k1", 1.23456)
    assert run.stage_key("collect") == "k1"
    assert run.stage_key("train") is None
    run.mark_finished("collect", "k2", 1)
    assert RunDir(tmp_path).stage_key("collect") == "k2"
    run.forget("collect")
    assert run.stage_key("collect") is None


def test_metrics_of_other_stages_stay(tmp_path):
    run = RunDir(tmp_path)
    run.update_metrics("main", {"fvu": 0.5, "l0": 8})
    run.update_metrics("wide", {"fvu": 0.3})
    run.update_metrics("main", {"fvu": 0.4})
    assert run.metrics() == {"main.fvu": 0.4, "main.l0": 8, "wide.fvu": 0.3}
    assert list(json.loads(run.metrics_path.read_text())) == ["main.fvu", "main.l0", "wide.fvu"]


def test_events_are_appended_one_json_line_each(tmp_path):
    run = RunDir(tmp_path / "run")
    run.event("started", stage="collect")
    run.event("text", note="ü\nnew line")
    lines = [json.loads(line) for line in (run.path / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(e["event"], e.get("stage"), e.get("note")) for e in lines] == [
        ("started", "collect", None),
        ("text", None, "ü\nnew line"),
    ]
    assert all(e["time"].endswith("+00:00") for e in lines)


def test_key_of_depends_on_values_not_on_the_order_of_keys():
    assert key_of({"a": 1, "b": [2]}) == key_of({"b": [2], "a": 1})
    assert key_of({"a": 1}) != key_of({"a": 2})
    assert key_of("a", "b") != key_of("ab")
    assert len(key_of()) == 64


def test_paths_lie_inside_the_run(tmp_path):
    run = RunDir(tmp_path)
    paths = [
        run.config_path,
        run.metrics_path,
        run.store_path,
        run.checkpoints("m"),
        run.trained("m"),
        run.latents("m"),
        run.labels("m"),
        run.dictionary("m"),
        run.audit("c"),
    ]
    assert len(set(paths)) == len(paths)
    assert all(path.is_relative_to(tmp_path) for path in paths)


# -- lock --------------------------------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from pipelines.rundir import RunDir
with RunDir(Path(sys.argv[1])).lock():
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_second_process_on_a_run_gets_a_clear_error_until_the_first_is_gone(tmp_path):
    run = RunDir(tmp_path / "run")
    with python(HOLD, run.path) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == "ready"
        with (
            pytest.raises(RunError, match=r"another process is working in .*run: wait for it, or choose another --out"),
            run.lock(),
        ):
            pass
        holder.kill()
    with run.lock():
        pass
    with run.lock():
        pass


def test_lock_is_released_when_the_work_fails(tmp_path):
    run = RunDir(tmp_path)
    with pytest.raises(ValueError, match="work"), run.lock():
        raise ValueError("work")
    with run.lock():
        assert rundir.now()
