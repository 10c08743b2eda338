"""The arithmetic of the benchmarks: order of the runs, ratios, targets and the report."""

import json
import sys

import pytest

from tests.benchmarks import harness
from tests.benchmarks.harness import Figure, Peer, PeerAbsent, Ratio, Report, interleaved


def test_pairs_alternate_and_the_ratio_is_relative_speed():
    order = []

    def run(name, seconds):
        def work():
            order.append(name)
            return seconds

        return work

    ratio = interleaved(run("a", 2.0), run("b", 1.0), pairs=6, warm_up=0)
    assert "".join(order) == "abbaabbaabba"
    assert ratio.pairs == (0.5,) * 6
    with pytest.raises(ValueError, match="at least 5 pairs, got 4"):
        interleaved(run("a", 2.0), run("b", 1.0), pairs=4)


def test_report_ends_with_one_json_object_and_shows_missed_targets(tmp_path, capsys):
    report = Report("x", "Speed of x", threads=1)
    report.add(Figure.of("fast", Ratio((0.9, 1.0, 1.4), (), ()), at_least=0.95))
    report.add(Figure("slow", 0.5, at_least=0.7))
    report.add(Figure("small", 1.05, at_most=1.1))
    report.add(Figure.absent("peer", "not installed"))
    report.finish(tmp_path)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == {"fast": 1.0, "fast_range": [0.9, 1.4], "slow": 0.5, "small": 1.05, "peer": None}
    (note,) = tmp_path.glob("*-x.md")
    text = note.read_text()
    assert "| fast | 1 | 0.9–1.4 | ≥ 0.95 met |" in text
    assert "≥ 0.7 MISSED" in text
    assert "absent: not installed" in text


def test_peer_answers_stays_alive_and_says_why_it_is_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "PEERS", tmp_path)
    with pytest.raises(PeerAbsent, match="make peers"):
        Peer(tmp_path / "peer.py")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    script = tmp_path / "peer.py"
    script.write_text(
        "from tests.benchmarks.harness import serve\n"
        "def prepare():\n"
        "    print('noise')\n"
        "    return {'add': lambda a, b: a + b}\n"
        "serve(prepare)\n"
    )
    with Peer(script) as peer:
        assert [peer.call("add", a=1, b=b) for b in (1, 2)] == [2, 3]
        with pytest.raises(PeerAbsent, match="KeyError: 'nothing'"):
            peer.call("nothing")
    script.write_text("raise SystemExit(3)")
    with pytest.raises(PeerAbsent, match=r"the peer ended \(exit code 3\)"):
        Peer(script)
