"""The report: self-contained, escaped, and saying what the audit found."""

import html
import json
import re

import numpy as np
import pytest

from pipelines.audit.concepts import concept_from_dict, examples_of
from pipelines.audit.figures import figures, roc_curve, short
from pipelines.audit.report import p_value, render_report, script_json, share
from pipelines.audit.settings import AuditSettings
from pipelines.audit.stage import audit_concept
from pipelines.audit.statistics import auroc
from pipelines.audit.views import View

HOSTILE = "</script><script>alert('x')</script><img src=x onerror=alert(1)>"


def hostile(i: int) -> str:
    """As `HOSTILE`, but no eight words of two texts are the same."""
    return HOSTILE.replace("x", str(i))


SETTINGS = AuditSettings(n_permutations=100, n_confirm_permutations=999, n_simulated=50)


@pytest.fixture(scope="module")
def hostile_result(tmp_path_factory):
    concept = concept_from_dict(
        {
            "name": "hostile",
            "title": f"Title {HOSTILE}",
            "description": HOSTILE,
            "positives": [f"{hostile(i)} {i} yes" for i in range(40)],
            "hard_negatives": [f"{{{{ 7 * 7 }}}} \u202e {hostile(-i)} {i} no" for i in range(40, 80)],
        }
    )
    scores = np.random.default_rng(0).random((80, 12)).astype(np.float32)
    scores[:40, 3] += 2
    return audit_concept(
        concept,
        examples_of(concept),
        [View(identity={"name": HOSTILE, HOSTILE: "value"}, scores=scores, labels=dict.fromkeys(range(12), HOSTILE))],
        tmp_path_factory.mktemp("audit"),
        settings=SETTINGS,
        command=f"sae audit {HOSTILE}",
    )


def without_plotly(page: str) -> str:
    """The page without the plotting library, which is the longest script."""
    longest = max(re.findall(r"<script>.*?</script>", page, re.S), key=len)
    return page.replace(longest, "")


def test_everything_from_outside_is_escaped(hostile_result):
    page = without_plotly(render_report(hostile_result))
    assert "alert(" in page  # the texts are there
    assert "<script>alert" not in page
    assert "<img" not in page
    assert html.escape(HOSTILE, quote=True)[:20] in page
    assert "{{ 7 * 7 }}" in page
    assert page.count("<script") == page.count("</script>") == 2


def test_labels_are_escaped_inside_figures_too(hostile_result):
    drawn = json.dumps(figures(hostile_result), ensure_ascii=False)
    assert "<script" not in drawn
    assert "<img" not in drawn
    assert "&lt;/script" in drawn


def test_script_json_cannot_close_its_element_and_reads_back():
    value = {"a": "</script>&<!--", "b": [1.5, "\u2028"]}
    text = str(script_json(value))
    assert not set("<>&") & set(text)
    assert json.loads(text) == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        script_json({"x": float("nan")})


def test_the_page_is_self_contained_and_holds_the_library_once(hostile_result):
    page = render_report(hostile_result)
    own = without_plotly(page)
    assert "default-src 'none'" in own
    assert not re.search(r"""(?:src|href)\s*=\s*["']""", own.replace(html.escape("src=x"), ""))
    assert page.count("plotly.js v") == 1


def test_the_page_says_what_the_audit_says(hostile_result):
    page = html.unescape(without_plotly(render_report(hostile_result)))
    assert hostile_result.verdict.sentence in page
    assert hostile_result.manifest_sha256 in page
    for limit in hostile_result.limits:
        assert limit in page
    for baseline in hostile_result.baselines:
        assert baseline.title in page


def test_a_report_of_nothing_renders(tmp_path):
    concept = concept_from_dict(
        {"name": "n", "positives": [f"a {i}" for i in range(30)], "hard_negatives": [f"b {i}" for i in range(30)]}
    )
    result = audit_concept(
        concept,
        examples_of(concept),
        [View(identity={}, scores=np.zeros((60, 5), np.float32))],
        tmp_path,
        settings=SETTINGS,
    )
    page = render_report(result)
    assert "Nothing found" in page
    assert set(figures(result)) == {"all-latents", "null"}
    for element in figures(result):
        assert f'id="{element}"' in page


def test_every_figure_has_its_element(hostile_result):
    page = render_report(hostile_result)
    assert set(figures(hostile_result)) == {"all-latents", "null", "forest", "roc", "strip"}
    for element in figures(hostile_result):
        assert page.count(f'id="{element}"') == 1


def test_roc_curve_has_the_auroc_as_its_area():
    scores = np.array([3.0, 0.0, 0.0, 1.0, 0.0])
    labels = np.array([True, True, False, False, False])
    x, y = roc_curve(scores, labels)
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(y, x) == pytest.approx(auroc(scores[:, None], labels)[0], abs=1e-3)


def test_numbers_read_well():
    assert [share(v) for v in (0.875, 0.0, 1.0, 0.034, 0.00038, None)] == [
        "88 %",
        "0 %",
        "100 %",
        "3.4 %",
        "0.038 %",
        "–",
    ]
    assert [p_value(v) for v in (0.0004, 0.02, 1.0)] == ["< 0.001", "0.020", "1.000"]
    assert short("word " * 30, 12) == "word word w…"
    assert short(None) == ""
