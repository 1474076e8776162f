import itertools
import json
import math
import os
import random
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest
from matplotlib import _pylab_helpers
from playwright.sync_api import Page, sync_playwright

from rlsparse import tables
from rlsparse.definitions import DEFINITIONS
from rlsparse.report.formats import NOTHING, number, p_value, percent
from rlsparse.report.rows import cell_rows, effect_rows, overlap_pairs, overlap_rows, trial_rows
from rlsparse.report.study_page import build_report, claim_rows, summary_rows
from rlsparse.study import Study

ALGORITHMS = {"sft": 0.55, "dpo": 0.2, "grpo": 0.13}
SEEDS = (0, 1, 2, 3)
MODULES = ("q", "k", "v", "o", "gate", "up", "down", "norm")
TENSORS = [
    *((f"model.layers.{i}.{m}", i, m) for i in range(4) for m in MODULES),
    ("model.embed_tokens.weight", None, "embed"),
    ("model.norm.weight", None, "norm"),
]
SIZE = 4096
SNAPSHOTS = (50, 150)
HOSTILE = '<script>alert("x")</script>'


def make_study(**changes):
    return Study.model_validate(
        {
            "name": "algorithms",
            "question": "Does reinforcement learning change fewer weights than supervised tuning?",
            "baseline": {"algorithm": {"name": "grpo"}, "train": {"precision": "bf16-mixed"}},
            "factors": {"algorithm.name": list(ALGORITHMS)},
            "seeds": list(SEEDS),
            "controls": ["lr_zero", "same_seed", "lr_times_3"],
        }
        | changes
    )


def trial(algorithm, seed, control=None, **changes):
    rate = {"lr_zero": 0.0, "lr_times_3": 3e-5}.get(control, 1e-5)
    label = f"{algorithm} s{seed}" + (f" {control}" if control else "")
    return {
        "trial_id": f"{algorithm}{seed}{control or ''}",
        "status": "finished",
        "cell": json.dumps({"algorithm.name": algorithm}),
        "algorithm": algorithm,
        "seed": seed,
        "replicate": int(control == "same_seed"),
        "role": "control" if control else "baseline" if algorithm == "grpo" else "factor",
        "control": control,
        "precision": "bf16-mixed",
        "learning_rate": rate,
        "num_steps": 150,
        "score_base": 0.41,
        "score_before": 0.412,
        "score_after": 0.55 + 0.01 * seed,
        "gate_ratio": rate * 17000,
        "label": label,
        "config": json.dumps({"model": {"source": "tiny"}}),
    } | changes


def all_trials():
    rows = [trial(a, s) for a in ALGORITHMS for s in SEEDS]
    rows += [trial(a, 0, c) for c in ("lr_zero", "same_seed") for a in ALGORITHMS]
    rows += [trial("grpo", s, "lr_times_3") for s in SEEDS]
    error = "TrialError: the loss is NaN at step 12; lower train.learning_rate"
    rows[3] |= {"status": "failed", "error": error, "score_after": None}
    return rows


def density(row):
    scale = {"lr_zero": 0, "lr_times_3": 1.7}.get(row["control"], 1)
    return scale * ALGORITHMS[row["algorithm"]]


def delta_rows(trials):
    rows = []
    for row in trials:
        draw = random.Random(row["trial_id"].removesuffix("same_seed"))
        for step in SNAPSHOTS:
            for tensor, layer, module in TENSORS:
                share = density(row) * (step / 150) ** 0.5 * draw.uniform(0.8, 1.2)
                changed = int(SIZE * share * {"norm": 0, "embed": 0.2}.get(module, 1))
                counts = {
                    f"num_changed_{d}": int(changed * 0.7**i) for i, d in enumerate(DEFINITIONS)
                }
                place = {"tensor": tensor, "layer": layer, "module": module, "dtype": "bf16"}
                place |= {"chunk": 0, "start": 0, "num_elements": SIZE, "view": "stored"}
                steps = {"trial_id": row["trial_id"], "step_before": 0, "step_after": step}
                rows.append(steps | place | counts)
    return rows


def step_rows(trials):
    rows = [{"trial_id": r["trial_id"], "step": 25, "loss": 1.0} for r in trials]
    for row in trials:
        for step in (0, *SNAPSHOTS):
            score = 0.41 + (0.14 + 0.01 * row["seed"]) * (step / 150) ** 0.5
            rows.append({"trial_id": row["trial_id"], "step": step, "score": score})
    return rows


def overlap_table(trials):
    rows = []
    done = sorted((t for t in trials if t["status"] == "finished"), key=lambda t: t["trial_id"])
    for i, a in enumerate(done):
        for b in done[i + 1 :]:
            pair = {"trial_a": a["trial_id"], "trial_b": b["trial_id"], "step_a": 150}
            pair |= {"step_b": 150, "definition": "bitwise", "view": "stored"}
            for module in (None, *MODULES):
                size = 100_000 if module is None else 10_000
                share_a, share_b = density(a), density(b)
                lift = 1.9 - 0.05 * a["seed"] if a["algorithm"] == b["algorithm"] else 1.3
                expected = size * share_a * share_b
                rows.append(
                    pair
                    | {
                        "module": module,
                        "num_elements": size,
                        "num_a": int(size * share_a),
                        "num_b": int(size * share_b),
                        "num_both": int(expected * min(lift, 1 / max(share_a, share_b, 0.01))),
                        "expected_uniform": expected,
                        "expected_tensor": expected * 1.1,
                        "expected_magnitude": expected * 1.5,
                    }
                )
    return rows


def claim(**changes):
    return {
        "id": "rl-is-sparser-than-sft",
        "source": "2505.11711 section 4",
        "kind": "greater",
        "statistic": "odds ratio of sparsity.bitwise@stored, a over b; t interval over seeds",
        "scope": "base tiny; task chain_sum; learning rate 1e-05; steps 150; view stored",
        "registered": "registered",
        "verdict": "supported",
        "estimate": 8.0,
        "ci_low": 6.05,
        "ci_high": 11.0,
        "margin": 1.0,
        "p_value": 0.00002,
        "p_floor": 0.125,
        "num_runs": 4,
        "depends_on_definition": False,
        "note": "",
    } | changes


NO_NUMBERS = dict.fromkeys(("estimate", "ci_low", "ci_high", "p_value", "p_floor"), math.nan)
CLAIMS = [
    claim(),
    claim(
        **NO_NUMBERS,
        id="kl-has-limited-effect",
        kind="equivalent",
        registered="post hoc",
        verdict="undecided",
        margin=1.25,
        depends_on_definition=None,
        note="the factor did not act: realised KL does not differ between its levels",
    ),
    claim(
        **NO_NUMBERS | {"estimate": 1.0},
        id="lr-zero-changes-nothing",
        kind="exact",
        statistic="sparsity.bitwise@stored is exactly 1 in every run",
        margin=None,
    ),
    claim(
        id="subnetwork-recurs",
        kind="above_null",
        statistic="overlap.bitwise@stored / magnitude null",
        verdict="refuted",
        estimate=1.02,
        ci_low=0.97,
        ci_high=1.06,
        p_value=0.3,
        margin=1.1,
        depends_on_definition=True,
    ),
]


def effect(level, estimate, **changes):
    return {
        "response": "sparsity.bitwise@stored",
        "factor": "algorithm.name",
        "level": level,
        "reference": "grpo",
        "within": "{}",
        "method": "paired t",
        "scale": "log_odds",
        "estimate": estimate,
        "ci_low": estimate - 0.2,
        "ci_high": estimate + 0.2,
        "ci_level": 0.95,
        "p_value": 0.125,
        "p_adjusted": 0.25,
        "num_runs": 4,
    } | changes


EFFECTS = [
    effect("sft", -2.0),
    effect("dpo", -0.5),
    effect("dpo", 0.02, response="score_gain", scale="identity"),
]
VERSIONS = {"rlsparse": "0.1.0", "torch": "2.6.0", "git commit": "685df50"}


def make_tables(trials=None, **changes):
    trials = all_trials() if trials is None else trials
    rows = {
        "trials": trials,
        "steps": step_rows(trials),
        "base_tensors": [],
        "tensor_deltas": delta_rows(trials),
        "overlaps": overlap_table(trials),
        "effects": EFFECTS,
        "claims": CLAIMS,
    } | changes
    return {name: tables.from_rows(list(part), name) for name, part in rows.items()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    page = build_report(
        make_study(), make_tables(), tmp_path_factory.mktemp("report"), versions=VERSIONS
    )
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


# --- rows ------------------------------------------------------------------------------------


def test_summary_holds_every_trial_that_is_not_a_control_with_counted_sparsity():
    trials = all_trials()
    deltas = delta_rows(trials)
    rows = summary_rows(make_study(), make_tables(trials))
    assert [(r["algorithm"], r["seed"]) for r in rows] == [
        (a, s) for a in ALGORITHMS for s in SEEDS
    ]
    for row in rows:
        last = [
            d
            for d in deltas
            if d["trial_id"] == f"{row['algorithm']}{row['seed']}" and d["step_after"] == 150
        ]
        total = len(last) * SIZE
        if row["status"] == "failed":
            assert row["sparsity_bitwise"] is None
            continue
        for key, count in (("bitwise", "bitwise"), ("1e-05", "abs_1e-05")):
            changed = sum(d[f"num_changed_{count}"] for d in last)
            assert row[f"sparsity_{key}"] == 1 - changed / total


def test_overlap_lift_averages_the_other_seeds_of_the_cell_only():
    rows = summary_rows(make_study(), make_tables())
    by_name = {r["label"]: r["overlap_lift"] for r in rows}
    # grpo: pairs (0,1) (0,2) (0,3) have lift 1.9, (1,2) (1,3) 1.85, (2,3) 1.8 over the uniform null
    assert by_name["grpo s0"] == pytest.approx(1.9 / 1.1, rel=1e-3)
    assert by_name["grpo s3"] == pytest.approx((1.9 + 1.85 + 1.8) / 3 / 1.1, rel=1e-3)
    assert by_name["sft s3"] is None


def test_other_views_definitions_and_tensors_are_not_mixed_in():
    study, given = make_study(), make_tables()
    noise = [
        row | {"view": "fp32", "num_changed_bitwise": SIZE} for row in delta_rows(all_trials())
    ]
    pairs = overlap_table(all_trials())
    more = [row | {"num_both": 1} | other for row in pairs for other in (
        {"view": "fp32"}, {"definition": "abs_1e-05"}, {"tensor": "model.norm.weight"},
    )]  # fmt: skip
    mixed = make_tables(tensor_deltas=delta_rows(all_trials()) + noise, overlaps=pairs + more)
    assert trial_rows(study, mixed) == trial_rows(study, given)
    assert overlap_rows(overlap_pairs(study, mixed)) == overlap_rows(overlap_pairs(study, given))


def test_overlaps_are_grouped_by_how_the_runs_are_related():
    rows = overlap_rows(overlap_pairs(make_study(), make_tables()))
    pairs = {(r["pair"], r["relation"]): r for r in rows}
    counts = {key: row["num_pairs"] for key, row in pairs.items()}
    times = "\N{MULTIPLICATION SIGN}"
    assert counts["grpo", "same cell, other seed"] == 6
    assert counts["sft", "same cell, other seed"] == 3
    assert counts[f"dpo {times} grpo", "other cell, same seed"] == 4
    assert counts[f"dpo {times} grpo", "other cell, other seed"] == 12
    mixed = pairs[f"dpo {times} grpo", "other cell, same seed"]
    both, a, b = int(100_000 * 0.2 * 0.13 * 1.3), 20_000, 13_000
    assert mixed["jaccard"] == pytest.approx(both / (a + b - both))
    assert mixed["one_sided"] == pytest.approx((both / a + both / b) / 2)
    assert mixed["lift"]["magnitude"] == pytest.approx(both / (100_000 * 0.2 * 0.13 * 1.5))
    assert mixed["max_lift"] == pytest.approx(5)


def test_cells_count_planned_finished_and_failed_and_average_the_finished():
    trials = trial_rows(make_study(), make_tables())
    cells = {row["group"]: row for row in cell_rows(trials)}
    sft = cells["sft"]
    assert (sft["num_planned"], sft["num_finished"], sft["num_failed"]) == (4, 3, 1)
    done = [t["sparsity"]["bitwise"] for t in trials if t["group"] == "sft" and t["sparsity"]]
    assert len(done) == 3
    assert sft["sparsity"]["bitwise"] == pytest.approx(sum(done) / 3)
    zero = next(row for group, row in cells.items() if group.endswith("lr_zero"))
    assert set(zero["sparsity"].values()) == {1.0}


def test_a_control_is_its_own_group_of_its_cell():
    groups = Counter(t["group"] for t in trial_rows(make_study(), make_tables()))
    assert groups["grpo · lr_times_3"] == 4
    assert groups["grpo"] == 4


def test_snapshots_start_unchanged_and_skip_steps_without_a_measurement():
    rows = {t["label"]: t for t in trial_rows(make_study(), make_tables())}
    points = rows["grpo s1"]["snapshots"]
    assert [p["step"] for p in points] == [0, 50, 150]
    assert points[0] == {"step": 0, "score": 0.41, "sparsity": 1.0}
    assert points[-1]["sparsity"] == rows["grpo s1"]["sparsity"]["bitwise"]
    assert rows["sft s3"]["snapshots"] == []


def test_claims_keep_their_numbers_and_name_the_scale():
    rows = {r["id"]: r for r in claim_rows(make_tables())}
    assert rows["rl-is-sparser-than-sft"]["estimate"] == 8.0
    assert rows["kl-has-limited-effect"]["estimate"] is None
    assert [r["scale"] for r in rows.values()] == [
        "odds ratio", "density ratio", "fraction", "observed / expected",
    ]  # fmt: skip
    gain = make_tables(claims=[claim(kind="within", statistic="mean of score_gain, inside [0, 1]")])
    assert claim_rows(gain)[0]["scale"] == "difference"


def test_effects_are_shown_back_on_a_readable_scale():
    sft, _, gain = effect_rows(make_tables())
    assert (sft["shown_scale"], gain["shown_scale"]) == ("odds ratio", "difference")
    assert sft["shown"] == pytest.approx(0.1353352832)
    assert sft["shown_high"] == pytest.approx(0.1652988882)
    assert (sft["estimate"], gain["shown"]) == (-2.0, 0.02)


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


def test_numbers_and_p_values():
    assert [number(v) for v in (None, 1.0, 0.12345, 3, "x", math.inf)] == [
        NOTHING, "1", "0.123", "3", "x", "∞",
    ]  # fmt: skip
    assert [p_value(v) for v in (None, 0.0, 0.00011, 0.125, 1.0)] == [
        NOTHING, "< 0.0001", "0.00011", "0.125", "1",
    ]  # fmt: skip


# --- page and JSON ---------------------------------------------------------------------------


def test_json_holds_the_same_rows_and_no_nan(built):
    _, data = built
    study, given = make_study(), make_tables()

    def refuse(constant):
        raise AssertionError(constant)

    json.loads(built[0].with_name("report.json").read_text(), parse_constant=refuse)
    assert data["summary"] == summary_rows(study, given)
    assert data["claims"] == claim_rows(given)
    assert data["trials"] == trial_rows(study, given)
    assert data["claims"][1]["p_value"] is None
    assert data["study"]["name"] == "algorithms"
    assert data["versions"] == VERSIONS


def test_page_states_question_setting_verdicts_and_failures(built):
    text = text_of(built[0])
    for part in (
        "Does reinforcement learning change fewer weights than supervised tuning?",
        "21 of 22 finished, 1 failed",
        "checks the pipeline, is no evidence about LLMs",
        "Gate ratio 0.17",
        "supported 8 [6.05, 11] odds ratio",
        f"undecided {NOTHING} 1.25",
        "100 % (exact) fraction",
        "refuted 1.02 [0.97, 1.06] observed / expected",
        "post hoc one definition only",
        "depends on the definition",
        "< 0.0001 floor 0.125",
        "TrialError: the loss is NaN at step 12; lower train.learning_rate",
        "git commit 685df50",
    ):
        assert part in text


def test_gate_ratio_learning_rate_and_base_of_the_real_runs_are_listed(tmp_path):
    trials = [
        trial("grpo", s, learning_rate=rate, gate_ratio=rate * 17000, config=config)
        for s, rate in ((0, 1e-5), (1, 2e-5))
        for config in ('{"model": {"source": "smollm2-135m"}}',)
    ] + [trial("grpo", 2, "lr_zero", config='{"model": {"source": "smollm2-135m"}}')]
    text = text_of(build_report(make_study(), make_tables(trials), tmp_path))
    assert "Learning rate 1e-05, 2e-05" in text
    assert f"Gate ratio 0.17 {NOTHING} 0.34" in text
    assert "Base smollm2-135m" in text
    assert "no evidence about LLMs" not in text


def test_page_loads_and_runs_nothing(built):
    source = built[0].read_text()
    addresses = re.findall(r"""(?:src|href|action|data|poster)=["']([^"']*)""", source)
    assert {a for a in addresses if not a.startswith("#")} == {"data:,"}
    assert not re.search(r"<script|<iframe|<object|@import|url\((?!#)| on\w+=", source)


def test_ids_are_unique_and_every_reference_in_a_figure_is_met(built):
    source = built[0].read_text()
    ids = Counter(re.findall(r"""\bid=["']([^"']*)""", source))
    assert [name for name, times in ids.items() if times > 1] == []
    references = set(re.findall(r"""(?:href=["']|url\()#([^"')]+)""", source))
    assert references
    assert references <= set(ids)


def test_every_figure_has_a_text_for_those_who_cannot_see_it(built):
    figures = re.findall(r"<svg[^>]*>", built[0].read_text())
    assert len(figures) == 2 + 3 + 3 + 1 + 3 + 2
    assert all('role="img"' in f and re.search('aria-label="[^"]{10,}"', f) for f in figures)


def test_hostile_names_come_out_escaped(tmp_path):
    trials = [trial("grpo", s) for s in SEEDS]
    for row in trials:
        row["label"] += HOSTILE
        row["cell"] = json.dumps({"algorithm.name": row["algorithm"], "x": HOSTILE})
        row["host"] = HOSTILE
    trials[0] |= {"status": "failed", "error": HOSTILE}
    deltas = [row | {"tensor": HOSTILE} for row in delta_rows(trials)]
    given = make_tables(
        trials,
        tensor_deltas=deltas,
        claims=[claim(note=HOSTILE, source=HOSTILE, scope=HOSTILE, verdict=f'"{HOSTILE}')],
        effects=[effect(HOSTILE, -1.0, response=HOSTILE), effect("dpo", -1.5)],
    )
    study = make_study(question=HOSTILE)
    page = build_report(study, given, tmp_path, versions={HOSTILE: HOSTILE})
    source = page.read_text()
    assert "<script" not in source
    assert "alert(" in source
    assert HOSTILE in text_of(page)


def test_unknown_module_names_and_dollar_signs_do_not_break_the_figures(tmp_path):
    trials = [trial("grpo", s, label=f"$x^{s}$ <&> _{{") for s in SEEDS]
    deltas = [row | {"module": "moe<gate>"} for row in delta_rows(trials)]
    pairs = [
        row | {"module": row["module"] and f"moe<{row['module']}>"} for row in overlap_table(trials)
    ]
    given = make_tables(trials, tensor_deltas=deltas, overlaps=pairs)
    text = text_of(build_report(make_study(), given, tmp_path))
    assert "moe<gate>" in text
    assert "$x^3$ <&> _{" in text


def test_equal_tables_give_equal_bytes_and_leave_no_trace(built, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "index.html").write_text("an older report")
    before = dict(matplotlib.rcParams)
    matplotlib.rcParams["legend.markerscale"] = 31
    try:
        page = build_report(make_study(), make_tables(), tmp_path / "new", versions=VERSIONS)
        assert matplotlib.rcParams["legend.markerscale"] == 31
    finally:
        matplotlib.rcParams["legend.markerscale"] = before["legend.markerscale"]
    assert dict(matplotlib.rcParams) == before
    assert _pylab_helpers.Gcf.get_all_fig_managers() == []
    assert sorted(p.name for p in page.parent.iterdir()) == ["index.html", "report.json"]
    for name in ("index.html", "report.json"):
        assert page.with_name(name).read_bytes() == built[0].with_name(name).read_bytes()


@pytest.mark.parametrize(
    ("trials", "changes", "says"),
    [
        ([], {"claims": [], "effects": []}, "No trial is planned"),
        (None, {"claims": []}, "registers no claims"),
        (None, {"overlaps": []}, "No overlaps were measured"),
        (None, {"effects": []}, "No effects could be estimated"),
        (None, {"tensor_deltas": []}, "No finished trial has been measured"),
        (None, {"steps": []}, "Along training"),
        ([trial("grpo", 0)], {}, "1 of 1 finished"),
        ([trial("grpo", 0, status="failed", error="boom")], {}, "0 of 1 finished, 1 failed"),
        ([trial("grpo", s, status="planned", score_after=None) for s in SEEDS], {}, "planned"),
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
    assert says in text_of(build_report(make_study(), given, tmp_path))


def test_tables_that_a_study_does_not_have_are_not_needed(tmp_path):
    given = {"trials": make_tables()["trials"].drop_columns(["config", "label"])}
    text = text_of(build_report(make_study(), given, tmp_path))
    assert "21 of 22 finished" in text
    assert "Base tiny" in text


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


def many_cells():
    """Runs of one algorithm, two factors with long names and six seeds: 24."""
    rows = []
    for kl, clip in itertools.product(("0.0", "0.04"), ("null", "1.0")):
        cell = json.dumps({"algorithm.kl_coef": kl, "train.max_grad_norm": clip})
        for s in range(6):
            label = f"grpo s{s} kl_coef={kl} max_grad_norm={clip}"
            rows.append(trial("grpo", s, trial_id=label, cell=cell, label=label))
    return rows


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    return build_report(make_study(), make_tables(many_cells()), tmp_path_factory.mktemp("many"))


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
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
    assert complaints == []
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CLIPPED) == []
    assert page.evaluate(COLLIDING) == []
    assert min(page.evaluate(CONTRAST)) >= 4.5
    for verdict in ("supported", "refuted", "undecided"):
        assert page.locator("#verdicts .badge", has_text=verdict).first.is_visible()
    assert page.get_by_role("img").count() == file.read_text().count("<svg ")
    context.close()
