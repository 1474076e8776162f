"""The report of a study: what it says, that it is one safe file, and what it does in a browser."""

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest
from playwright.sync_api import Page, sync_playwright
from report_study import (
    HOSTILE,
    MEANS,
    PROVENANCE,
    SEEDS,
    TERMS,
    change_rows,
    claim,
    effect,
    make_study,
    make_tables,
    many_cells,
    overlap_table,
    trial,
)

from rlsparse import tables
from rlsparse.report import heat_maps
from rlsparse.report.formats import (
    NOTHING,
    duration,
    interval_texts,
    measured,
    number,
    p_value,
    percent,
)
from rlsparse.report.overlap_rows import with_lifts
from rlsparse.report.pairs import pairs_of
from rlsparse.report.rows import trial_rows
from rlsparse.report.study_page import build_report, claim_rows, summary_rows
from rlsparse.study import PairStudy


def build(folder, tables=None, study=None, provenance=PROVENANCE):
    return build_report(
        study or make_study(), tables or make_tables(), folder, provenance=provenance
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    page = build(tmp_path_factory.mktemp("report"))
    return page, json.loads(page.with_name("report.json").read_text())


def text_of(page):
    """The text that a reader sees, with runs of white space as one space."""
    seen, hidden = [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            hidden.extend([tag] if tag in ("style", "script") else [])

        def handle_endtag(self, tag):
            if hidden and tag == hidden[-1]:
                hidden.pop()

        def handle_data(self, data):
            seen.extend([] if hidden else [data])

    Reader().feed(page.read_text())
    return re.sub(r"\s+", " ", " ".join(seen))


# --- formats ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, NOTHING),
        (1.0, "100 % (exact)"),
        (0.99996, "99.9960 %"),
        (1 - 1e-9, "99.999999900 %"),
        (1 - 1e-12, "99.999999999900 %"),
        (0.8633, "86.33 %"),
        (0.5, "50.00 %"),
        (0.00004, "0.0040 %"),
        (0.0, "0 %"),
    ],
)
def test_percent_never_hides_a_difference_from_one(value, text):
    assert percent(value) == text


def test_durations_are_readable():
    assert [duration(v) for v in (None, 0.5, 42.0, 90.0, 5400.0)] == [
        NOTHING, "0.5 s", "42 s", "1.5 min", "1.5 h",
    ]  # fmt: skip


def test_numbers_and_p_values():
    assert [number(v) for v in (None, 1.0, 0.12345, 3, "x", math.inf)] == [
        NOTHING, "1", "0.123", "3", "x", "∞",
    ]  # fmt: skip
    values = (None, 1.0, 1.2, 0.66, 0.99996, 57.96, 1234.5, 0.00090452, 1.2e-7, math.inf)
    assert [measured(v) for v in values] == [
        NOTHING, "1", "1.20", "0.660", "1.000", "58.0", "1234", "0.000905", "1.2e-07", "∞",
    ]  # fmt: skip
    assert [p_value(v) for v in (None, 0.0, 0.00011, 0.125, 1.0)] == [
        NOTHING, "< 0.0001", "0.00011", "0.125", "1",
    ]  # fmt: skip


# --- page and JSON ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ((1.774, 1.6960, 1.857), ("1.77", "1.70", "1.86")),
        ((8.0, 6.05, 11.0), ("8.00", "6.05", "11.00")),
        ((1.0064, 0.9952, 1.0177), ("1.006", "0.995", "1.018")),
        ((0.0, -0.5, 0.5), ("0.000", "-0.500", "0.500")),
        ((123.4, 99.96, 150.0), ("123", "100", "150")),
        ((1e-7, -2e-7, 4e-7), ("1.00e-07", "-2.00e-07", "4.00e-07")),
        ((0.0, 0.0, 0.0), ("0", "0", "0")),
        ((2.0, math.inf, 4.0), ("2", "∞", "4")),
        ((None, None, None), (NOTHING, NOTHING, NOTHING)),
    ],
)
def test_an_interval_has_the_digits_of_its_estimate(values, texts):
    assert interval_texts(*values) == texts


def test_json_holds_the_same_rows_and_no_nan(built):
    _, data = built
    study, given = make_study(), make_tables()

    def refuse(constant):
        raise AssertionError(constant)

    json.loads(built[0].with_name("report.json").read_text(), parse_constant=refuse)
    trials = trial_rows(study, given)
    assert data["summary"] == summary_rows(study, given)
    assert data["claims"] == claim_rows(given)
    assert data["trials"] == with_lifts(trials, pairs_of(study, given, trials))
    assert data["claims"][1]["p_value"] is None
    assert data["study"]["name"] == "algorithms"
    assert data["provenance"] == PROVENANCE
    assert data["terms"][0]["omega_sq"] == TERMS[0]["omega_sq"]


def test_every_number_of_a_tip_is_in_the_json(built):
    """Tips are made of the rows in report.json; checked for one mark of each kind of chart."""
    page, data = built
    tips = set(re.findall(r'data-tip="([^"]*)"', page.read_text()))
    curve = next(r for r in data["curves"] if (r["measure"], r["step"]) == ("density", 150))
    assert any(f"{curve['group']}, step 150\n{percent(curve['mean'])}" in tip for tip in tips)
    relation = next(r for r in data["relations"] if r["relation"] == "other seed")
    assert any(f"other seed\n{number(relation['lift']['tensor'])} times" in tip for tip in tips)
    dense = data["density"][0]
    assert any(percent(dense["density"]) in tip for tip in tips)
    assert any(f"k = {data['consensus'][1]['k']} of 4" in tip for tip in tips)
    assert len(tips) > 300


def test_page_states_question_setting_verdicts_and_failures(built):
    text = text_of(built[0])
    for part in (
        "Does reinforcement learning change fewer weights than supervised tuning?",
        "21 of 22 finished, 1 failed",
        "Algorithms sft, dpo, grpo",
        "checks the pipeline, is no evidence about LLMs",
        "Some trials are missing",
        "Gate ratio 0.17",
        "2 supported, 1 undecided, 1 refuted",
        "Scope, unless a claim says otherwise: base tiny, task chain_sum, learning rate 1e-05",
        "supported 8.00 [6.05, 11.00]",
        "100 % (exact)",
        "refuted depends on the null 1.02 [0.97, 1.06] observed / expected",
        "undecided post hoc",
        "density ratio by algorithm.kl_coef, sparsity.bitwise@stored · the factor did not act",
        "Would decide runs at three times the learning rate",
        "Otherwise abs_1e-05@stored: supported",
        "< 0.0001, adjusted for all claims (Holm); floor of an exact sign-flip test with so many "
        "seeds 0.125",
        "Definition the only one",
        "Outcome grpo is sparser than sft",
        "TrialError: the loss is NaN at step 12; lower train.learning_rate",
        "algorithm.name 2, 6 31.5 0.0007 0.0014 0.83 11 unbalanced",
        "algorithm.name grpo 88.08 % [81.76 %, 92.41 %]",
        "Command rlsparse run ablations/algorithms.yaml",
        "Git commit 685df50",
        "Verdict Estimate Margin Seeds What was compared",
        "Runs 4",
        f"fraction {NOTHING} 4 runs sparsity.bitwise@stored",
        "Interval 99 %, this claim's level in Holm's step-down procedure",
        "Lift over magnitude",
        "together they are no simultaneous 95 % intervals",
        "an estimate at or below 0 means none, and is shown as 0",
        "energy rank the rank that holds 99 % of the squared norm",
        "over the runs of one cell of an algorithm",
        "hollow: controls",
        "7" * 64,
        "Time, all trials 1.5 h, 1.5 min of CPU",
        "Hosts node-a, node-b",
        "Missing trials allowed",
        "torch 2.6.0",
    ):
        assert part in text, part


def test_the_third_runs_of_the_null_of_update_size_are_said(tmp_path):
    task = "this null also takes away what recurs for the task's sake"
    rows = [trial("grpo", s) for s in (0, 1)]
    rows += [trial("grpo", s, role="surrogate", control="shuffled_reward", trial_id=f"x{s}",
                   label=f"x{s}") for s in (0, 1)]  # fmt: skip
    for used, surrogates, real in (
        (["x0", "x1"], True, False),
        (["grpo0", "grpo1"], False, True),
        (["x0", "grpo1"], True, True),
    ):  # fmt: skip
        overlaps = [r | {"update_size_of": used[i % 2]} for i, r in enumerate(overlap_table(rows))]
        text = text_of(build(tmp_path, make_tables(rows, overlaps=overlaps)))
        assert ("Third runs: surrogates (shuffled_reward s0" in text) == surrogates
        assert (task in text) == real
    assert "Third runs" not in text_of(build(tmp_path))


@pytest.mark.parametrize("max_runs", [100, 1])
def test_trials_under_a_mask_are_left_out_of_overlaps(tmp_path, monkeypatch, max_runs):
    monkeypatch.setattr(heat_maps, "MAX_RUNS", max_runs)
    monkeypatch.setattr(heat_maps, "MAX_CELLS", 1)
    config = json.dumps({"model": {"source": "tiny"}, "train": {"mask": {"from": "baseline"}}})
    full = [trial("grpo", s, cell=json.dumps({"train.mask": "null"})) for s in SEEDS]
    masked = [
        trial("grpo", s, trial_id=f"m{s}", config=config, cell=json.dumps({"train.mask": "final"}))
        for s in SEEDS
    ]
    said = "Trials under a mask are left out: the mask forces which weights they share."
    page = build(tmp_path, make_tables([*masked, *full], overlaps=overlap_table(full)))
    assert said in text_of(page)
    content = json.loads((tmp_path / "report.json").read_text())
    overlapping = {cell["group"]: cell["magnitude_lift"] is not None for cell in content["cells"]}
    assert overlapping == {"grpo mask=null": True, "grpo mask=final": False}
    shown = content["overlap_map"]
    assert (shown["of"], shown["num_left_out"]) == ("runs" if max_runs > 1 else "cells", 0)
    assert len(shown["rows"]) == (6 if max_runs > 1 else 1)
    assert said not in text_of(build(tmp_path, make_tables(full, overlaps=overlap_table(full))))


def test_effects_say_which_test_and_which_are_controls(tmp_path):
    method = "matched by seed, t interval, exact sign flips"
    rows = [effect("sft", -2.0, method=method),
            effect("lr_times_3", -1.0, method=method, factor="control.lr_times_3")]  # fmt: skip
    negative = TERMS[0] | {"term": "other", "omega_sq": -0.0123, "note": "balanced"}
    page = build(tmp_path, make_tables(effects=rows, terms=[*TERMS, negative]))
    text = text_of(page)
    assert "sign flips 0.125 (its floor), adjusted 0.25" in text
    assert "lr_times_3 against grpo · control, in its cell" in text
    assert "other 2, 6 31.5 0.0007 0.0014 0 11 balanced" in text
    terms = json.loads(page.with_name("report.json").read_text())["terms"]
    assert [term["omega_sq"] for term in terms] == [0.83, -0.0123]


def test_the_one_table_has_a_row_per_cell(built):
    text = text_of(built[0])
    cells = {row["group"]: row for row in built[1]["cells"]}
    grpo = cells["grpo"]
    said = [
        "41.2 % → 56.5 %", percent(grpo["sparsity"]["bitwise"]),
        percent(grpo["sparsity"]["abs_1e-05"]), number(grpo["magnitude_lift"]),
    ]  # fmt: skip
    assert re.search(r"grpo 4 " + ".{0,60}".join(map(re.escape, said)), text)
    assert re.search(r"sft 3 of 4, 1 failed 41\.2 %", text)


def test_gate_ratio_learning_rate_and_base_of_the_real_runs_are_listed(tmp_path):
    trials = [
        trial("grpo", s, learning_rate=rate, gate_ratio=rate * 17000, config=config)
        for s, rate in ((0, 1e-5), (1, 2e-5))
        for config in ('{"model": {"source": "smollm2-135m"}, "task": {"name": "my_task"}}',)
    ] + [trial("grpo", 2, "lr_zero", config='{"model": {"source": "smollm2-135m"}}')]
    text = text_of(build(tmp_path, make_tables(trials)))
    assert "Learning rate 1e-05, 2e-05" in text
    assert f"Gate ratio 0.17 {NOTHING} 0.34" in text
    assert "Base smollm2-135m Task my_task" in text
    assert "no evidence about LLMs." not in text


def test_runs_made_elsewhere_have_the_same_report(tmp_path):
    study = PairStudy.model_validate(
        {
            "name": "elsewhere",
            "question": "Are they sparse?",
            "pairs": "pairs.csv",
            "factors": {"algorithm.name": ["grpo", "sft"]},
            "settings": {"model.source": "org/model", "train.learning_rate": 1e-6},
        }
    )
    given = make_tables()
    given["trials"] = given["trials"].drop_columns(["config"])
    text = text_of(build(tmp_path, given, study, {}))
    assert "Base org/model" in text
    assert "21 of 22 finished" in text


def test_page_loads_nothing_and_runs_its_own_script_only(built):
    source = built[0].read_text()
    addresses = re.findall(r"""(?:src|href|action|data|poster)=["']([^"']*)""", source)
    assert {a for a in addresses if not a.startswith("#")} == {"data:,"}
    assert not re.search(r"<iframe|<object|@import|url\((?!#)| on\w+=", source)
    assert len(re.findall("<script", source)) == 2
    assert source.count("</script>") == 2


def test_ids_are_unique_and_every_reference_is_met(built):
    source = built[0].read_text()
    ids = Counter(re.findall(r"""\sid=["']([^"']*)""", source))
    assert [name for name, times in ids.items() if times > 1] == []
    references = set(re.findall(r"""(?:href=["']|url\()#([^"')]+)""", source))
    references |= set(re.findall(r'aria-labelledby="([^"]*)', source))
    assert len(references) > 10
    assert references <= set(ids)


def test_every_figure_has_a_text_for_those_who_cannot_see_it(built):
    figures = re.findall(r"<svg[^>]*plot[^>]*>", built[0].read_text())
    assert len(figures) > 40
    for figure in figures:
        hidden = 'aria-hidden="true"' in figure
        assert hidden or ('role="img"' in figure and re.search('aria-label="[^"]{9,}"', figure))


def test_hostile_names_come_out_escaped(tmp_path):
    trials = [trial("grpo", s) for s in SEEDS]
    for row in trials:
        row["label"] += HOSTILE
        row["cell"] = json.dumps({"algorithm.name": row["algorithm"], HOSTILE: HOSTILE})
        row["host"] = HOSTILE
    trials[0] |= {"status": "failed", "error": HOSTILE}
    changes = [row | {"module": HOSTILE} for row in change_rows(trials)]
    names = ("note", "source", "scope", "outcome", "would_decide", "statistic", "kind")
    given = make_tables(
        trials,
        changes=changes,
        claims=[claim(**dict.fromkeys(names, HOSTILE), verdict=f'"{HOSTILE}', registered=HOSTILE,
                      alternatives=json.dumps({HOSTILE: HOSTILE}))],
        effects=[effect(HOSTILE, -1.0, response=HOSTILE), effect("dpo", -1.5, module=HOSTILE)],
        terms=[TERMS[0] | {"term": HOSTILE, "note": HOSTILE}],
        means=[MEANS[0] | {"level": HOSTILE, "factor": HOSTILE}],
    )  # fmt: skip
    study = make_study(question=HOSTILE)
    page = build(tmp_path, given, study, {HOSTILE: HOSTILE, "versions": {HOSTILE: HOSTILE}})
    source = page.read_text()
    assert len(re.findall("<script", source)) == 2
    assert "alert(" in source
    assert text_of(page).count(HOSTILE) > 30


def test_equal_tables_give_equal_bytes_and_leave_no_trace(built, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "index.html").write_text("an older report")
    before = dict(matplotlib.rcParams)
    page = build(tmp_path / "new")
    assert dict(matplotlib.rcParams) == before
    assert sorted(p.name for p in page.parent.iterdir()) == ["index.html", "report.json"]
    for name in ("index.html", "report.json"):
        assert page.with_name(name).read_bytes() == built[0].with_name(name).read_bytes()


EMPTY = {name: [] for name in (
    "steps", "changes", "magnitudes", "overlaps", "consensus", "spectra", "effects", "terms",
    "means", "claims",
)}  # fmt: skip


@pytest.mark.parametrize(
    ("trials", "changes", "says"),
    [
        ([], EMPTY, "No trial is planned"),
        (None, EMPTY, "2 of 2 finished"),
        (None, {"claims": []}, "registers no claims"),
        (None, {"overlaps": []}, "No overlaps were measured"),
        (None, {"effects": []}, "No effects could be estimated"),
        (
            None,
            {"changes": [], "steps": [], "overlaps": []},
            "No finished trial has been measured",
        ),
        (None, {"steps": []}, "Along training"),
        ([trial("grpo", 0)], {}, "1 of 1 finished"),
        ([trial("grpo", 0, status="failed", error="boom")], {}, "0 of 1 finished, 1 failed"),
        (
            [trial("grpo", s, status="planned", score_after=None) for s in SEEDS],
            {},
            "4 are neither",
        ),
        ([trial("grpo", s, "lr_zero") for s in SEEDS], {}, "100 % (exact)"),
        (
            [trial("grpo", 0, cell=None, score_before=None, gate_ratio=None)],
            {},
            f"Gate ratio {NOTHING}",
        ),
    ],
)
def test_what_is_missing_is_said_and_the_page_is_still_built(tmp_path, trials, changes, says):
    two = [trial("grpo", seed) for seed in (0, 1)]
    given = make_tables(two if trials is None else trials, **changes)
    assert says in text_of(build(tmp_path, given, provenance={}))


def test_tables_that_a_study_does_not_have_are_not_needed(tmp_path):
    given = {"trials": make_tables()["trials"].drop_columns(["config", "label"])}
    text = text_of(build(tmp_path, given, provenance={}))
    assert "21 of 22 finished" in text
    assert "Base tiny" in text


def test_the_report_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        "import rlsparse.report.study_page"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_benchmark_builds_a_report(tmp_path):
    file = Path(__file__).parent / "benchmarks" / "bench_report.py"
    spec = importlib.util.spec_from_file_location("bench_report", file)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    text = text_of(build(tmp_path, bench.make_tables(2, 2), bench.make_study(2)))
    assert "20 cells are drawn" in text
    assert "85 more cells are left out" in text


# --- in a browser ----------------------------------------------------------------------------

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]

CLIPPED = """() => [...document.querySelectorAll('svg.plot text')].filter(text => {
    const box = text.getBoundingClientRect();
    const frame = text.closest('svg').getBoundingClientRect();
    return box.left < frame.left - 2 || box.right > frame.right + 2
        || box.top < frame.top - 2 || box.bottom > frame.bottom + 2;
}).map(text => text.textContent)"""

COLLIDING = """() => [...document.querySelectorAll('svg.plot')].flatMap(svg => {
    const boxes = [...svg.querySelectorAll('text')].filter(
        text => !(text.getAttribute('transform') || '').includes('rotate(-45')
    ).map(text => [text.textContent, text.getBoundingClientRect()]);
    return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([_, q]) =>
        Math.min(p.right, q.right) - Math.max(p.left, q.left) > 1
        && Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 3
    ).map(([b]) => a + ' / ' + b));
})"""

CONTRAST = """() => {
    const light = colour => {
        const [r, g, b] = colour.match(/[\\d.]+/g).map(v => {
            const x = v / 255;
            return x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ratios = selector => {
        const style = getComputedStyle(document.querySelector(selector));
        const [a, b] = [light(style.color), light(style.backgroundColor)];
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    };
    return ['body', '.supported', '.refuted', '.undecided'].map(ratios);
}"""


@pytest.fixture(scope="module")
def chromium():
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        complain = pytest.fail if os.environ.get("CI") else pytest.skip
        complain(f"no browser found: none of {', '.join(names)} is on PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    return build(tmp_path_factory.mktemp("many"), make_tables(many_cells()))


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("cells", ["few", "many"])
def test_page_fits_laptop_and_phone(chromium, built, crowded, width, scheme, cells):
    file: Path = {"few": built[0], "many": crowded}[cells]
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page: Page = context.new_page()
    complaints: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    for opened in page.locator("details").all():
        opened.evaluate("one => { one.open = true }")
    assert complaints == []
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CLIPPED) == []
    assert page.evaluate(COLLIDING) == []
    assert min(page.evaluate(CONTRAST)) >= 4.5
    for verdict in ("supported", "refuted", "undecided"):
        assert page.locator("#verdicts .badge", has_text=verdict).first.is_visible()
    context.close()


@pytest.fixture
def page(chromium, built):
    context = chromium.new_context(viewport={"width": 1400, "height": 900})
    opened = context.new_page()
    opened.goto(built[0].as_uri())
    yield opened
    context.close()


@pytest.mark.browser
def test_marks_are_drawn_where_they_can_be_seen(page):
    sizes = page.locator("svg.xy .mark").evaluate_all(
        "marks => marks.map(m => [m.getBoundingClientRect().width, getComputedStyle(m).fill])"
    )
    assert len(sizes) > 40
    assert all(width > 5 for width, _ in sizes)
    assert len({fill for _, fill in sizes}) > 2
    lines = page.locator("svg.xy polyline").evaluate_all(
        "lines => lines.map(l => l.getBoundingClientRect().width)"
    )
    assert sum(width > 100 for width in lines) > 8
    cells = page.locator("rect.heat").evaluate_all(
        "cells => cells.map(c => c.getBoundingClientRect().width)"
    )
    assert len(cells) > 100
    assert min(cells) > 10


@pytest.mark.browser
def test_hovering_a_mark_shows_its_tip(page):
    tip = page.locator("#tip")
    assert not tip.is_visible()
    mark = page.locator("#training svg.xy .mark").nth(5)
    mark.hover()
    assert tip.is_visible()
    assert tip.inner_text() == mark.get_attribute("data-tip")
    box, place = tip.bounding_box(), mark.bounding_box()
    assert abs(box["x"] + box["width"] / 2 - place["x"] - place["width"] / 2) < 5
    page.locator("h1").hover()
    assert not tip.is_visible()


@pytest.mark.browser
def test_charts_are_one_stop_each_and_arrows_go_from_mark_to_mark(page):
    stops = page.locator("[tabindex='0'], button, input, summary, a").count()
    assert stops < page.locator("[data-tip]").count() / 2
    chart = page.locator("#training svg.xy").first
    chart.focus()
    tip = page.locator("#tip")
    tips = chart.locator("[data-tip]").evaluate_all("marks => marks.map(m => m.dataset.tip)")
    for key, expected in (("ArrowRight", 0), ("ArrowRight", 1), ("End", -1), ("ArrowLeft", -2),
                          ("Home", 0)):  # fmt: skip
        page.keyboard.press(key)
        assert tip.is_visible()
        assert tip.evaluate("one => one.textContent") == tips[expected]
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('.chart') !== null")
    assert not chart.evaluate("one => one === document.activeElement")


@pytest.mark.browser
def test_a_level_that_is_unchecked_is_hidden_everywhere(page):
    row = page.locator("table.cells tr", has=page.locator("th", has_text=re.compile("^ ?dpo$")))
    marks = page.locator("#training svg.xy [data-c='2']")
    panel = page.locator("#where [data-some]", has=page.locator("svg[aria-label^='dpo:']"))
    effects = page.locator("#effects tr[data-some]", has_text="dpo against grpo").first
    legend = page.locator("#training .legend li", has_text="dpo").first
    seen = (row.first, marks.first, panel, effects, legend)
    assert all(one.is_visible() for one in seen)
    page.get_by_label("dpo", exact=True).uncheck()
    assert not any(one.is_visible() for one in seen)
    assert marks.evaluate_all("all => all.every(one => !one.getClientRects().length)")
    assert page.locator("#filter output").inner_text().startswith("7 of 10 cells shown")
    assert page.locator("#training svg.xy [data-c='0']").first.is_visible()
    page.get_by_label("control", exact=True).uncheck()
    assert page.locator("#filter output").inner_text().startswith("2 of 10 cells shown")
    page.get_by_role("button", name="Show all").click()
    page.wait_for_function("!document.querySelector('.off')")
    assert all(one.is_visible() for one in seen)


@pytest.mark.browser
def test_tables_are_sorted_by_their_heads(page):
    table = page.locator("#results table.cells").first
    names = "rows => rows.map(r => r.textContent.trim())"
    start = table.locator("tbody th").evaluate_all(names)
    assert start == ["grpo", "sft", "dpo"]
    head = table.locator("th", has_text="Sparsity")
    assert head.get_attribute("aria-sort") is None
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert table.locator("tbody th").evaluate_all(names) == ["grpo", "dpo", "sft"]
    first = table.locator("th", has_text="Cell")
    first.get_by_role("button").press("Enter")
    assert table.locator("tbody th").evaluate_all(names) == ["dpo", "grpo", "sft"]
    assert head.get_attribute("aria-sort") is None
    # missing values stay last, whichever way
    page.locator("#results summary", has_text="All 22 trials").click()
    trials = page.locator("#results table").last
    lift = trials.locator("th", has_text="Lift over tensors")
    for _ in range(2):
        lift.get_by_role("button").click()
        shown = trials.locator("tbody tr td:nth-child(7)").all_inner_texts()
        known = sum(text != NOTHING for text in shown)
        assert shown[known:] == [NOTHING] * (22 - known)
        assert 0 < known < 22


@pytest.mark.browser
def test_without_scripts_all_can_be_read(chromium, built):
    context = chromium.new_context(java_script_enabled=False)
    opened = context.new_page()
    opened.goto(built[0].as_uri())
    assert not opened.locator("#filter").is_visible()
    assert not opened.locator("#tip").is_visible()
    assert opened.locator("#training svg.xy .mark").first.is_visible()
    assert opened.locator("#results table.cells").first.is_visible()
    assert opened.locator("th button").count() == 0
    opened.locator("#verdicts summary").first.click()
    assert opened.locator("#verdicts details dl").first.is_visible()
    context.close()


@pytest.mark.browser
def test_what_is_printed_has_all_details(page):
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible()


def test_an_effect_without_any_pair_has_a_row(tmp_path):
    """Its p is null, its floor is 1."""
    made = make_tables()
    lost = {"estimate": None, "ci_low": None, "ci_high": None, "p_value": None, "p_floor": 1.0}
    rows = [row | lost | {"num_runs": 0} for row in made["effects"].to_pylist()]
    made["effects"] = tables.from_rows(rows, "effects")
    assert build_report(make_study(), made, tmp_path, provenance={}).exists()
