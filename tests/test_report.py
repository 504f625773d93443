import base64
import html
import re
import tomllib

import jinja2
import pytest

from tipl_ray import pages
from tipl_ray.evaluate import report
from tipl_ray.places import CHECKOUT, PUBLISHED_FOLDER

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def row(predictor, step, skill, repw=10.0, *, spread=0.05, basis="trial", causal=False):
    """One summary row: intervals are +- spread for skill and +- 2 for REPW; the noise floor is 5."""
    return {
        "task": "InvertedPendulum-v4",
        "trained_on": "InvertedPendulum-v4",
        "predictor": predictor,
        "basis": basis,
        "causal": causal,
        "step": step,
        "skill": skill,
        "skill_low": skill - spread,
        "skill_high": skill + spread,
        "wpe": 1.25e-4,
        "repw": repw,
        "repw_low": repw - 2,
        "repw_high": repw + 2,
        "repw_noise_floor": 5.0,
        "beats_last": 0.53,
        "returns_spread": 90.0,
        "returns_spread_true": 100.0,
        "distance": 1.96,
        "distance_true": 2.0,
        "windows": 1200,
        "trials": 5,
    }


def rows(predictor, *skills, **rest):
    return [row(predictor, step, skill, **rest) for step, skill in enumerate(skills, start=1)]


def test_skill_above_zero_at_every_step_is_a_yes():
    answer = report.beats_copying(rows("tipl", 0.4, 0.3, 0.2, causal=True))
    assert answer.verdict == "yes"
    assert answer.text == (
        "It beats the copy-last baseline at h = 1 to 3. It removes 40% of the copy-last baseline's squared error at "
        "h = 1 (skill 0.40 [0.35, 0.45]) and 20% at h = 3 (skill 0.20 [0.15, 0.25]). This rests on 5 test trials."
    )


def test_an_interval_that_includes_zero_does_not_beat_copying():
    answer = report.beats_copying(rows("tipl", 0.03))
    assert answer.verdict == "no"
    assert "No significant difference at h = 1: the 95% interval of its skill includes 0" in answer.text
    assert "beats" not in answer.text


def test_skill_below_zero_is_said_to_be_worse():
    answer = report.beats_copying(rows("tipl", 0.4, 0.01, -0.2, -0.4), confidence=0.9)
    assert answer.verdict == "partly"
    assert "It beats the copy-last baseline at h = 1." in answer.text
    assert "No significant difference at h = 2: the 90% interval" in answer.text
    assert "It is worse than the copy-last baseline at h = 3 and 4." in answer.text
    assert "and it adds 40% to the copy-last baseline's squared error at h = 4 (skill -0.40" in answer.text


def test_a_basis_that_saw_the_future_is_named_wherever_skill_is_claimed():
    assert "the future included" in report.beats_copying(rows("tipl", 0.4)).text
    assert "the future included" not in report.beats_copying(rows("tipl", 0.4, basis="shared", causal=True)).text


def few(predictor, *skills, trials=2, **rest):
    """Rows without an interval, as of one or two trials."""
    low = dict.fromkeys(("skill_low", "repw_low"), float("nan"))
    high = dict.fromkeys(("skill_high", "repw_high"))
    return [{**item, **low, **high, "trials": trials} for item in rows(predictor, *skills, **rest)]


@pytest.mark.parametrize(
    ("skill", "trials", "verdict", "words"),
    [
        (0.4, 2, "yes", "It beats the copy-last baseline at h = 1."),
        (0.004, 2, "unknown", "too close to call without an interval"),
        (-0.05, 1, "unknown", "too close to call without an interval"),
        (-0.3, 1, "no", "It is worse than the copy-last baseline at h = 1."),
        (-465.0, 1, "no", "It is far worse than the copy-last baseline at h = 1."),
        (-465.0, 2, "no", "It has 466 times the copy-last baseline's squared error at h = 1 (skill -465)."),
        (-1.5, 1, "no", "It has 2.5 times the copy-last baseline's squared error at h = 1 (skill -1.50)."),
        (float("-inf"), 2, "no", "It is far worse than the copy-last baseline at h = 1."),
        (float("nan"), 2, "unknown", "At h = 1 there is nothing to compare"),
    ],
)
def test_few_trials_are_judged_by_the_size_of_the_difference_and_counted(skill, trials, verdict, words):
    answer = report.beats_copying(few("tipl", skill, trials=trials))
    assert (answer.verdict, answer.trials) == (verdict, trials)
    assert words in answer.text
    said = "1 test trial" if trials == 1 else "2 test trials"
    assert answer.text.endswith(f"This rests on {said}, too few for a confidence interval, which takes 3.")
    assert not re.search(r"\b(nan|inf)\b|too few trials to tell", answer.text)


def test_a_small_lead_over_the_ridge_on_two_trials_is_no_yes():
    pairs = [{**compared("ridge", 1, 0.004), "difference_low": float("nan"), "difference_high": float("nan")}]
    answer = report.beats(few("tipl", 0.44) + few("ridge", 0.436), "ridge", pairs)
    assert answer.verdict == "unknown"
    assert "within 0.1 of each other, too close to call" in answer.text
    assert "the difference is +0.004 at h = 1." in answer.text
    assert report.beats(few("tipl", 0.44) + few("linear", -20.0), "linear").verdict == "yes"
    far = report.beats(few("tipl", -465.0) + few("ridge", 0.4), "ridge")
    assert far.verdict == "no"
    assert "It is far worse than the ridge regression by phase at h = 1." in far.text


def test_returns_of_few_trials_are_judged_by_ratio():
    copied = few("copy-last", 0.0, repw=20.0)
    for repw, verdict in ((9.0, "yes"), (15.0, "unknown"), (25.0, "unknown"), (41.0, "no")):
        assert report.returns_closer_than_a_copy(few("tipl", 0.4, repw=repw) + copied).verdict == verdict
    for repw, verdict in ((5.0, "yes"), (9.0, "unknown"), (11.0, "no")):
        answer = report.returns_like_the_true_policy(few("tipl", 0.4, repw=repw))
        assert (answer.verdict, "interval." in answer.text) == (verdict, False)


def test_no_answer_writes_a_number_that_is_none():
    spoilt = [float("nan"), float("inf"), float("-inf"), None, 0.0]
    names = ("skill", "repw", "repw_noise_floor", "distance", "distance_true", "returns_spread", "beats_last")
    for value in spoilt:
        for name in names:
            made = [
                line for predictor in ("tipl", "copy-last", "ridge", "svd-floor") for line in few(predictor, 0.3, 0.2)
            ]
            summary = [{**line, name: value} for line in made]
            groups = [{**line, "group": "phase", "value": 0} for line in summary]
            pairs = [{**compared("ridge", 1, 0.1), "skill_difference": value, "difference_low": float("nan")}]
            for answer in report.answers(summary, 0.95, pairs, groups):
                assert answer.text
                assert not re.search(r"\b(nan|inf|None)\b", answer.text), (name, value, answer.text)


def test_without_the_transformer_nothing_is_claimed():
    answers = report.answers(rows("copy-last", 0.0))
    assert {answer.verdict for answer in answers} == {"unknown"}
    assert all(answer.text for answer in answers)


def test_linear_is_beaten_only_where_intervals_are_apart():
    summary = rows("tipl", 0.40, 0.20, 0.10) + rows("linear", 0.10, 0.15, 0.50)
    answer = report.beats(summary, "linear")
    assert answer.verdict == "partly"
    assert "It beats linear extrapolation at h = 1." in answer.text
    assert "No significant difference at h = 2: the intervals of their skills overlap." in answer.text
    assert "It is worse than linear extrapolation at h = 3." in answer.text


def compared(against, step, difference, spread=0.01):
    return {
        "group": "all",
        "value": -1,
        "predictor": "tipl",
        "against": against,
        "step": step,
        "skill_difference": difference,
        "difference_low": difference - spread,
        "difference_high": difference + spread,
    }


def test_on_the_same_windows_a_small_difference_is_seen_though_intervals_overlap():
    summary = rows("tipl", 0.40, 0.30, 0.20) + rows("ridge", 0.37, 0.295, 0.25)
    pairs = [compared("ridge", step, difference) for step, difference in ((1, 0.03), (2, 0.005), (3, -0.05))]
    answer = report.beats(summary, "ridge", pairs)
    assert answer.verdict == "partly"
    assert "It beats the ridge regression by phase at h = 1." in answer.text
    assert "No significant difference at h = 2: the interval of the difference includes 0." in answer.text
    assert "It is worse than the ridge regression by phase at h = 3." in answer.text
    assert "the difference is +0.030 [+0.020, +0.040] at h = 1 and -0.050 [-0.060, -0.040] at h = 3" in answer.text


def grouped(group, value, skill, spread=0.05):
    return {**row("tipl", 1, skill, spread=spread), "group": group, "value": value}


def test_skill_is_told_by_phase_and_third_and_a_phase_without_any_is_named():
    groups = [grouped("phase", phase, 0.02 if phase == 0 else 0.4) for phase in range(5)]
    groups += [grouped("third", third, 0.3) for third in range(3)]
    answer = report.where_it_lies(groups)
    assert answer.verdict == "partly"
    assert "0.02 [-0.03, 0.07] in phase 0" in answer.text
    assert "In phase 0 there is no significant difference from the copy-last baseline." in answer.text
    assert "0.30 [0.25, 0.35] in the last third" in answer.text
    assert "Skill is lowest where an iteration has just ended" in answer.text
    assert report.where_it_lies(groups[1:]).verdict == "yes"
    assert (
        "In phase 0 it is worse than the copy-last baseline." in report.where_it_lies([grouped("phase", 0, -0.3)]).text
    )


def test_every_rival_in_the_table_has_its_question():
    summary = [line for name in ("tipl", "copy-last", *report.RIVALS) for line in rows(name, 0.2)]
    questions = " ".join(answer.question for answer in report.answers(summary))
    assert all(words in questions for words in report.RIVALS.values())


def lines_of(*arguments):
    return [answer.line for answer in report.headline(*arguments)]


def test_a_run_ends_in_five_lines_that_name_the_steps_and_the_number_of_test_trials():
    summary = (
        rows("tipl", 0.4, 0.3, repw=10.0, causal=True) + rows("ridge", 0.37, 0.4) + rows("copy-last", 0, 0, repw=20.0)
    )
    pairs = [compared("ridge", 1, 0.03), compared("ridge", 2, -0.1)]
    groups = [grouped("phase", phase, 0.4 if phase else -0.3) for phase in range(5)]
    groups += [grouped("third", third, 0.3) for third in range(3)]
    assert lines_of(summary, 0.9, pairs, groups) == [
        "Does TIPL beat copying the last snapshot? Yes. Better at h = 1 and 2, on 5 test trials. Skill 0.40 [0.35, "
        "0.45] at h = 1 and 0.30 [0.25, 0.35] at h = 2.",
        "Does it beat the ridge regression? Partly. Better at h = 1 and worse at h = 2, on 5 test trials. Skill 0.40 "
        "[0.35, 0.45] against 0.37 [0.32, 0.42] at h = 1 and 0.30 [0.25, 0.35] against 0.40 [0.35, 0.45] at h = 2.",
        "Does it beat copying in returns? Yes. Better at h = 1 and 2, on 5 test trials. REPW 10.0 [8.0, 12.0] against "
        "20.0 [18.0, 22.0] at h = 1 and 10.0 [8.0, 12.0] against 20.0 [18.0, 22.0] at h = 2.",
        "Where? At h = 1 it beats copying in phases 1 to 4 of the 5 of a PPO iteration and in every third of training.",
        "How sure is that? 5 test trials with 1,200 windows; brackets are 90% intervals over trials.",
    ]


def test_a_run_on_few_trials_is_an_example_and_a_basis_that_saw_the_future_no_forecast():
    *_, sure = lines_of(few("tipl", 0.4, trials=1))
    assert "1 test trial with 1,200 windows: too few for a confidence interval, which takes 3" in sure
    assert sure.endswith("the future included, so this is not yet a forecast.")


def test_returns_within_the_noise_floor_are_the_same():
    answer = report.returns_like_the_true_policy(rows("tipl", 0.4, repw=6.0))
    assert answer.verdict == "yes"
    assert "No difference beyond the noise of the evaluation at h = 1." in answer.text
    assert "1.0 above the noise floor of 5.0" in answer.text


def test_returns_above_the_noise_floor_are_not_the_same():
    answer = report.returns_like_the_true_policy(rows("tipl", 0.4, 0.3, repw=25.0))
    assert answer.verdict == "no"
    assert "They do not at h = 1 and 2" in answer.text
    assert "20.0 above the noise floor" in answer.text


@pytest.mark.parametrize(
    ("tipl", "verdict", "words"),
    [
        (10.0, "yes", "They are at h = 1."),
        (19.0, "no", "No significant difference at h = 1: the intervals of both REPWs overlap."),
        (40.0, "no", "They are further from them than the copy's at h = 1."),
    ],
)
def test_returns_are_compared_with_a_copys(tipl, verdict, words):
    answer = report.returns_closer_than_a_copy(rows("tipl", 0.4, repw=tipl) + rows("copy-last", 0.0, repw=20.0))
    assert (answer.verdict, answer.text.startswith(words)) == (verdict, True)
    assert "returns more than the last snapshot in 53% of windows" in answer.text


def test_policies_that_were_not_run_are_no_finding():
    unrun = [{**item, "repw": None, "repw_low": None, "repw_high": None} for item in rows("tipl", 0.4)]
    answer = report.returns_like_the_true_policy(unrun)
    assert (answer.verdict, answer.text) == ("unknown", report.NO_POLICIES)


def test_a_basis_worse_than_copying_is_called_so():
    answer = report.basis_suffices(rows("svd-floor", -0.5, 0.5, 0.95))
    assert answer.verdict == "partly"
    assert "It does not at h = 1" in answer.text
    assert report.basis_suffices(rows("svd-floor", -0.5)).verdict == "no"
    assert report.basis_suffices(rows("svd-floor", 0.8)).verdict == "partly"


def test_table_shows_four_steps_of_each_predictor():
    summary = rows("copy-last", *[0.0] * 10, basis="none", causal=True) + rows("tipl", *[0.4] * 10)
    short = report.table(summary, report.SHORT_STEPS)
    assert [cells["h"] for cells in short[:4]] == ["1", "2", "5", "10"]
    assert [cells["predictor"] for cells in short] == ["tipl"] * 4 + ["copy-last"] * 4
    assert (short[0]["skill"], short[0]["windows"]) == ("0.40 [0.35, 0.45]", "1,200")
    assert len(report.table(summary)) == 20


def test_a_value_that_is_not_known_is_a_dash_in_the_table():
    unknown = {**row("tipl", 1, float("nan"), spread=float("nan")), "repw": None, "beats_last": None}
    assert [*report.table([unknown])[0].values()][4:] == ["-", "1.25e-04", "-", "5.0", "-", "1,200"]


@pytest.fixture
def page():
    return report.page(
        title="demo <script>alert(1)</script>",
        summary=rows("tipl", 0.4, 0.01) + rows("copy-last", 0.0, 0.0),
        pictures={"figure_2": PNG},
        facts={"trials & tests": "<b>16</b>"},
        configuration={"model": {"context": 20}, "name": "a\"b'c"},
        commands={"Again": "make demo && echo '<done>'"},
        files={"results": "/storage/<demo>/results.parquet"},
    )


def test_report_needs_nothing_beside_it(page):
    sources = re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'>\s]+)", page)
    assert sources == ["data:image/png;base64," + base64.b64encode(PNG).decode()]
    assert not re.search(r"<script|<link|<iframe|@import|url\(", page)


def test_report_escapes_every_value(page):
    for raw in ("<script>", "<b>16</b>", "<done>", "<demo>", "trials & tests"):
        assert raw not in page
    assert "demo &lt;script&gt;" in page
    assert "make demo &amp;&amp; echo" in page


def test_report_holds_answers_tables_configuration_and_captions(page):
    assert "It beats the copy-last baseline at h = 1." in page
    assert "No significant difference at h = 2" in page
    assert "<small>5 test trials</small>" in page
    assert "model.context" in page
    assert report.CAPTIONS["figure_2"][1][:40] in page
    assert page.count('<tr class="marked">') == 2 * 2
    assert "/storage/&lt;demo&gt;/results.parquet" in page


def test_a_picture_without_a_caption_is_refused():
    with pytest.raises(ValueError, match=r"pictures=\['mystery'\] have no caption"):
        written(pictures={"mystery": PNG})


def test_policies_as_far_apart_as_the_true_ones_have_kept_their_modes():
    kept = report.modes_are_kept(rows("tipl", 0.4, 0.3))
    assert kept.verdict == "yes"
    assert "Their distance is 98% of the true ones' at h = 1" in kept.text
    assert "The spread of their returns is 90.0 against 100 at h = 1" in kept.text
    collapsed = report.modes_are_kept([{**item, "distance": 0.1} for item in rows("tipl", 0.4, 0.3)])
    assert collapsed.verdict == "no"
    assert "At h = 1 and 2 they are closer together than the true ones" in collapsed.text
    assert report.modes_are_kept([]).verdict == "unknown"


@pytest.mark.parametrize(
    ("ratio", "verdict"), [(0.5, "no"), (0.95, "yes"), (1.08, "yes"), (1.5, "partly"), (2.57, "partly")]
)
def test_distances_are_alike_only_within_a_ratio_either_way(ratio, verdict):
    answer = report.modes_are_kept([{**item, "distance": ratio * 2.0} for item in rows("tipl", 0.4)])
    assert answer.verdict == verdict
    assert ("about as far apart" in answer.text) == (verdict == "yes")
    assert ("further apart than the true ones" in answer.text) == (ratio > 1.2)
    assert ("2.6 times the true ones'" in answer.text) == (ratio == 2.57)


def test_one_window_a_trial_has_no_distance_and_says_so():
    for nothing in (0.0, None, float("nan")):
        answer = report.modes_are_kept(
            [{**item, "distance": nothing, "distance_true": nothing} for item in rows("tipl", 0.4)]
        )
        assert answer.verdict == "unknown"
        assert "No two windows of one trial" in answer.text
        assert "nan" not in answer.text


def written(**rest):
    given = {"title": "t", "summary": rows("tipl", 0.4, 0.3) + rows("copy-last", 0.0, 0.0)}
    nothing: dict[str, dict] = {name: {} for name in ("pictures", "facts", "configuration", "commands", "files")}
    return report.page(**(given | nothing | rest))


@pytest.mark.parametrize("name", ["<b>&\"'", "[text] {{ 7 * 7 }} {% raw %}", "]]>--><!--", "a/" * 200, "ж 🦾 \u202e"])
def test_a_storage_of_any_name_is_written_as_it_is(name):
    page = written(
        title=name,
        files={"data set": name},
        commands={name: name},
        configuration={"storage": name},
        facts={name: name},
    )
    assert html.unescape(page).count(name) >= 7
    assert "{{ 7 * 7 }}" in page or "7 * 7" not in name
    assert "<b>&" not in page


def test_a_report_without_policies_run_still_opens_with_an_answer():
    summary = [
        {**row, **dict.fromkeys(("repw", "repw_low", "repw_high", "repw_noise_floor", "beats_last", "distance"))}
        for row in rows("tipl", 0.4) + rows("copy-last", 0.0)
    ]
    page = written(summary=summary)
    first = page.index('<li><span class="verdict')
    assert page.index("Better at h = 1, on 5 test trials. Skill 0.40 [0.35, 0.45] at h = 1.") - first < 1000
    assert page.count(report.NO_POLICIES) == 3
    assert "nan" not in page
    assert written(summary=[]).count(report.NO_POLICIES) == 3


def test_nothing_but_tables_and_commands_is_wider_than_a_telephone():
    page = written(files={"data set": "x" * 500}, commands={"all": "y" * 500})
    assert page.count("<table") == page.count('<div class="scroll"><table')
    assert "overflow-x: auto" in page
    assert "overflow-wrap: anywhere" in page
    assert "minmax(0, 1fr)" in page


def test_steps_other_than_the_usual_ones_are_in_the_short_table_too():
    summary = [row("tipl", 3, 0.4), row("tipl", 20, 0.2)]
    assert len(report.table(summary, report.SHORT_STEPS)) == 2


NAME = "<b>&\"' {{ 7 * 7 }}"
PICTURES = [(NAME, NAME, pages.embedded(PNG))]
COMPARED = {
    "title": NAME,
    "rows": [{NAME: NAME, "status": "best"}],
    "pictures": PICTURES,
    "metric": NAME,
    "answers": [],
}
ACCELERATED = {"title": NAME, "facts": {NAME: NAME}, "sentences": [NAME], "pictures": PICTURES, "rows": [{NAME: NAME}]}


@pytest.mark.parametrize(
    ("template", "values"),
    [
        ("comparison.html", COMPARED | {"source": NAME}),
        ("comparison.html", COMPARED | {"source": NAME, "rows": []}),
        ("acceleration.html", ACCELERATED | {"confidence": "95%", "files": {NAME: NAME}}),
    ],
)
def test_every_other_page_too_needs_nothing_beside_it_and_escapes_what_it_is_given(template, values):
    page = pages.page(template, **values)
    assert set(re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'>\s]+)", page)) == {pages.embedded(PNG)}
    assert not re.search(r"<script|<link|<iframe|@import|url\(", page)
    assert "<b>" not in page
    assert html.unescape(page).count(NAME) >= 6
    assert page.count("<table") == page.count('<div class="scroll"><table')


def test_a_page_that_lacks_a_value_is_refused():
    with pytest.raises(jinja2.UndefinedError, match="'source' is undefined"):
        pages.page("comparison.html", **COMPARED)


def test_every_template_and_published_predictor_is_packaged():
    declared = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packaged = {path for pattern in declared["tipl_ray"] for path in (CHECKOUT / "tipl_ray").glob(pattern)}
    wanted = [*pages.TEMPLATES.rglob("*"), *PUBLISHED_FOLDER.rglob("*")]
    assert {path for path in wanted if path.is_file()} == packaged


def test_a_table_is_written_in_full_and_what_is_none_is_empty():
    rows = [{"name": 'a "b", c', "figure": 1 / 3, "none": None}, {"name": "d", "figure": float("nan"), "none": 2}]
    header, first, second = pages.as_csv(rows).decode().splitlines()
    assert header == '"name","figure","none"'
    assert first == f'"a ""b"", c",{1 / 3!r},'
    assert second == '"d",nan,2'
    assert pages.as_csv([]) == b""
