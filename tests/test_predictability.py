"""What is said of a series' predictability, against paths of which it is known and forecasts in weight space."""

from pathlib import Path

import numpy as np
import pytest
import torch
from runs import path_states, write_safetensors

from tipl_ray import config
from tipl_ray.checkpoints import figures, report
from tipl_ray.checkpoints.asking import answer, choose_series
from tipl_ray.checkpoints.files import CheckpointError
from tipl_ray.checkpoints.predictability import ALL, BOUND, FITTED, SECOND_HALF, UNFITTED, Asking, Findings, ask
from tipl_ray.checkpoints.records import ImportedSeries, import_series
from tipl_ray.checkpoints.series import Selection
from tipl_ray.drawing import png
from tipl_ray.predict.baselines import Damped, DynamicModes
from tipl_ray.predict.gram import Question, make_band
from tipl_ray.predict.predictor import Trial, Trials
from tipl_ray.registry import PREDICTORS
from tipl_ray.window.predictor import WindowTipl
from tipl_ray.window.transformer import WindowTransformer

NUM_WEIGHTS = 4000


def line(num: int) -> np.ndarray:
    direction_P = np.random.default_rng(0).normal(size=NUM_WEIGHTS)
    return np.arange(num)[:, None] * direction_P


def random_walk(num: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num, NUM_WEIGHTS)).cumsum(axis=0)


def bend(num: int, seed: int = 2) -> np.ndarray:
    """A path that slows down and turns, with noise."""
    draw = np.random.default_rng(seed)
    time_T1 = np.arange(num)[:, None]
    directions_2P = draw.normal(size=(2, NUM_WEIGHTS))
    noise_TP = 0.3 * draw.normal(size=(num, NUM_WEIGHTS))
    return 30 * np.exp(-time_T1 / 10) * directions_2P[0] + 0.05 * time_T1**1.5 * directions_2P[1] + noise_TP


def imported(root: Path, weights_TP: np.ndarray, name: str = "run") -> ImportedSeries:
    folder = write_safetensors(root / name, path_states(weights_TP))
    return import_series(folder, str(root / "storage"), Selection())[0]


def skills(findings: Findings, windows: str = ALL) -> dict[tuple[str, int], float]:
    return {(row["predictor"], row["step"]): row["skill"] for row in findings.skills if row["windows"] == windows}


def test_a_straight_path_is_forecast_perfectly_by_the_last_displacement_and_is_of_rank_1(tmp_path: Path) -> None:
    findings = ask([imported(tmp_path, line(25))], Asking())
    for step in (1, 2, 5, 10):
        assert skills(findings)["linear", step] == pytest.approx(1.0, abs=1e-5)
        assert skills(findings)["rank-1", step] == pytest.approx(1.0, abs=1e-5)
        assert skills(findings)["copy-last", step] == 0.0
    (path,) = findings.paths
    assert path["straightness"] == pytest.approx(1.0, abs=1e-6)
    assert path["mean_cosine"] == pytest.approx(1.0, abs=1e-6)
    assert (path["rank_90"], path["rank_99"]) == (1, 1)
    first = report.answers(findings)[0]
    assert first.text.startswith("Linear extrapolation forecasts the next checkpoint 100% better than copying the last")
    assert {one.verdict for one in report.answers(findings)} == {"yes"}


def test_a_random_walk_is_not_predictable_and_nothing_says_that_it_is(tmp_path: Path) -> None:
    findings = ask([imported(tmp_path, random_walk(41))], Asking())
    # The last displacement is as long as the next and at right angles to it: twice the error of copying.
    assert skills(findings)["linear", 1] == pytest.approx(-1.0, abs=0.1)
    assert max(value for (name, _), value in skills(findings).items() if name != BOUND) < 0.02
    (path,) = findings.paths
    assert path["straightness"] == pytest.approx(40**-0.5, rel=0.1)
    for row in findings.spectra:
        assert row["path"] == pytest.approx(row["random_walk"], abs=0.02)
    assert findings.spectra[0]["path"] > 0.75
    assert {one.verdict for one in report.answers(findings)} <= {"no", "partly"}
    assert report.answers(findings)[0].text.startswith("Linear extrapolation forecasts the next checkpoint")
    assert {one.question: one.verdict for one in report.answers(findings)}["Is the path of rank 1?"] == "no"


def test_skills_are_those_of_the_same_forecasts_made_in_weight_space(tmp_path: Path) -> None:
    weights_TP = bend(26).astype(np.float32)
    findings = ask([imported(tmp_path, weights_TP)], Asking())
    context = findings.context
    for step in (1, 2, 5, 10):
        starts_B = np.arange(context, len(weights_TP) - step)
        question = Question(context=context, steps=(step,), snapshots_per_iteration=1)
        trial = Trial(weights_TP=weights_TP, band=make_band(weights_TP, question.width))
        true_BP = weights_TP[starts_B + step].astype(np.float64)
        copied = np.square(weights_TP[starts_B] - true_BP).sum()
        for name in UNFITTED:
            error = np.square(PREDICTORS.load(name)(question).forecast(trial, starts_B)[:, 0] - true_BP).sum()
            assert skills(findings)[name, step] == pytest.approx(1 - error / copied, abs=1e-4)


def test_of_one_series_what_is_fitted_is_fitted_on_its_first_half_and_judged_on_its_second(tmp_path: Path) -> None:
    weights_TP = bend(29).astype(np.float32)
    findings = ask([imported(tmp_path, weights_TP)], Asking(context=4))
    half = 14
    for kind in (Damped, DynamicModes):
        for step in (1, 2, 5, 10):
            question = Question(context=4, steps=(step,), snapshots_per_iteration=1)
            first = Trials(bands=[make_band(weights_TP[: half + 1], question.width)], weights=tuple)
            predictor = kind(question)
            predictor.fit(first, first)
            starts_B = np.arange(half, len(weights_TP) - step)
            band = make_band(weights_TP, question.width)
            copied = np.square(weights_TP[starts_B].astype(np.float64) - weights_TP[starts_B + step]).sum()
            expected = 1 - predictor.band_errors(band, starts_B).sum() / copied
            assert skills(findings, SECOND_HALF)[kind.name, step] == pytest.approx(expected, abs=1e-4)
    assert not {name for name, _ in skills(findings)} & set(FITTED)
    assert {(row["fitted_on"], row["windows"]) for row in findings.skills if row["predictor"] in FITTED} == {
        ("first half", SECOND_HALF)
    }


def test_of_several_series_what_is_fitted_is_fitted_on_the_others_and_the_same_folder_is_no_other(
    tmp_path: Path,
) -> None:
    series = [imported(tmp_path, bend(26, seed), f"run-{seed}") for seed in range(3)]
    findings = ask(series, Asking())
    assert {row["fitted_on"] for row in findings.skills if row["predictor"] in FITTED} == {"other series"}
    assert {row["windows"] for row in findings.skills} == {ALL}
    own = [row["skill"] for row in findings.skills if (row["predictor"], row["step"]) == ("damped", 1)]
    (mean,) = (row for row in findings.means if (row["predictor"], row["step"]) == ("damped", 1))
    assert mean["skill"] == pytest.approx(np.mean(own))
    assert min(own) <= mean["skill_low"] <= mean["skill"] <= mean["skill_high"] <= max(own)
    same_folder = ask([series[0], series[0]], Asking())
    assert {row["fitted_on"] for row in same_folder.skills if row["predictor"] in FITTED} == {"first half"}


def test_no_predictor_exceeds_the_upper_bound_on_the_same_windows(tmp_path: Path) -> None:
    findings = ask([imported(tmp_path, bend(30))], Asking())
    for windows in (ALL, SECOND_HALF):
        found = skills(findings, windows)
        for (_, step), value in found.items():
            assert value <= found[BOUND, step] + 1e-5


def test_a_published_model_is_asked_as_it_is_with_its_own_context(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = WindowTransformer(config.Model(embedding=16, layers=1, heads=2, dropout=0.0), tuple(range(1, 11)), 5)
    model.ridge_QHK[:, :, -1] = torch.arange(1, 11) * 0.5
    model.save(str(tmp_path / "model"), {"basis": {"kind": "window"}})
    weights_TP = bend(35).astype(np.float32)
    series = imported(tmp_path, weights_TP)
    folder, findings = answer(str(tmp_path / "storage"), (), Asking(), str(tmp_path / "model"))
    assert findings.context == 20
    starts_B = np.arange(20, 34)
    band = make_band(weights_TP, 30)
    coefficients_BHK = WindowTipl(model.question, model).coefficients(band.contexts(starts_B, 20))
    moved_BKP = np.diff(weights_TP.astype(np.float64)[starts_B[:, None] + np.arange(-20, 1)], axis=1)
    forecast_BP = weights_TP[starts_B] + np.einsum("bk,bkp->bp", coefficients_BHK[:, 0], moved_BKP)
    error = np.square(forecast_BP - weights_TP[starts_B + 1]).sum()
    copied = np.square(weights_TP[starts_B].astype(np.float64) - weights_TP[starts_B + 1]).sum()
    assert skills(findings)["tipl", 1] == pytest.approx(1 - error / copied, abs=1e-4)
    assert "TIPL, without further training" in (Path(folder) / "report.html").read_text()
    with pytest.raises(ValueError, match="context=5, but the predictor was trained on 20"):
        answer(str(tmp_path / "storage"), (), Asking(context=5), str(tmp_path / "model"))
    short = imported(tmp_path, bend(20), "short")
    with pytest.raises(CheckpointError, match=r"short: 20 checkpoints are too few .* which takes 22"):
        answer(str(tmp_path / "storage"), (short.digest,), Asking(), str(tmp_path / "model"))
    assert series.name == "run"


def test_layers_are_told_apart_and_those_that_never_move_are_named(tmp_path: Path) -> None:
    straight_TP, walk_TP = line(24), random_walk(24)
    states = [
        {
            "layers.0.w": torch.from_numpy(straight_P),
            "layers.1.w": torch.from_numpy(walk_P),
            "head.w": torch.ones(5),
        }
        for straight_P, walk_P in zip(straight_TP, walk_TP, strict=True)
    ]
    folder = write_safetensors(tmp_path / "run", states)
    series, _ = import_series(folder, str(tmp_path / "storage"), Selection())
    findings = ask([series], Asking())
    by_name = {row["group"]: row for row in findings.groups}
    assert set(by_name) == {"layers.0", "layers.1"}
    assert by_name["layers.0"]["skill_linear"] == pytest.approx(1.0, abs=1e-5)
    assert by_name["layers.1"]["skill_linear"] == pytest.approx(-1.0, abs=0.15)
    last = report.answers(findings)[-1]
    assert last.verdict == "partly"
    assert (
        "better than copying the last one in 1 of the 2 layers that move: best in layers.0 (100% better)" in last.text
    )
    assert "run: 1 of 3 layers never moved." in report.notes([series], findings, Asking())


def test_layers_that_stop_before_any_window_are_no_error(tmp_path: Path) -> None:
    still_TP = np.ones((24, 8), np.float32)
    still_TP[0] = 0.0
    states = [{"a.w": torch.from_numpy(row_P[:4]), "b.w": torch.from_numpy(row_P[4:])} for row_P in still_TP]
    folder = write_safetensors(tmp_path / "run", states)
    series, _ = import_series(folder, str(tmp_path / "storage"), Selection())
    answers = report.answers(ask([series], Asking()))
    assert answers[-1].text == "No layer moves in the windows that are compared."


def test_the_report_is_the_same_bytes_again_and_opens_with_the_answer(tmp_path: Path) -> None:
    imported(tmp_path, bend(24))
    folder, _ = answer(str(tmp_path / "storage"), (), Asking(), None)
    first = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    again, _ = answer(str(tmp_path / "storage"), (), Asking(), None)
    assert again == folder
    assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == first
    page = first["report.html"].decode()
    headings = [
        page.index(text) for text in ("How predictable is run?", "Linear extrapolation forecasts", "In numbers")
    ]
    assert headings == sorted(headings)
    assert set(first) == {
        *(f"{name}.csv" for name in ("skills", "means", "paths", "spectra", "groups")),
        *("skill.png", "path.png", "report.html", "predictability.sha256"),
    }


@pytest.mark.parametrize("weights_TP", [np.ones((12, 5)), line(5), bend(12)], ids=["still", "short", "few"])
def test_what_little_there_is_to_say_is_said(tmp_path: Path, weights_TP: np.ndarray) -> None:
    series = imported(tmp_path, weights_TP)
    findings = ask([series], Asking())
    assert all(one.text for one in report.answers(findings))
    assert len(png(figures.skill(findings))) > 1000
    assert len(png(figures.path([series]))) > 1000
    assert report.page([series], findings, Asking(), {}, "command")


def test_what_cannot_be_asked_is_refused_in_one_line(tmp_path: Path) -> None:
    storage = str(tmp_path / "storage")
    with pytest.raises(CheckpointError, match="there are no trials and no series; record a run or import a folder"):
        choose_series(storage, ())
    series = imported(tmp_path, bend(24))
    with pytest.raises(CheckpointError, match="no series is called other; choose one by its digest: "):
        choose_series(storage, ("other",))
    (tmp_path / "run" / "step_230.safetensors").unlink()
    import_series(tmp_path / "run", storage, Selection())
    with pytest.raises(CheckpointError, match="several series are called run; choose one by its digest: "):
        choose_series(storage, ("run",))
    assert [one.digest for one in choose_series(storage, (series.digest,))] == [series.digest]
    with pytest.raises(CheckpointError, match=r"run: 24 checkpoints are too few .* context of 23 .* which takes 25"):
        ask([series], Asking(context=23))
    for asking in ({"context": 1}, {"steps": (2, 1)}, {"steps": ()}, {"per_iteration": 0}):
        with pytest.raises(ValueError, match=next(iter(asking))):
            Asking(**asking)


def test_a_series_that_is_too_short_is_refused_with_what_can_be_asked_of_it(tmp_path: Path) -> None:
    series = imported(tmp_path, bend(12))
    for asking, way_out in (
        (Asking(context=8, steps=(5,)), "use --steps up to 3 or --context up to 6"),
        (Asking(steps=(10,)), "use --steps up to 9$"),
        (Asking(context=11, steps=(1,)), "use --context up to 10$"),
        (Asking(context=11, steps=(11,)), "save checkpoints more often"),
    ):
        with pytest.raises(CheckpointError, match=f"run: 12 checkpoints are too few .*; {way_out}"):
            ask([series], asking)


def test_two_windows_are_too_few_for_a_verdict(tmp_path: Path) -> None:
    findings = ask([imported(tmp_path, line(7))], Asking(context=4))
    assert findings.means[0]["num_windows"] == 2
    by_question = {one.question: one for one in report.answers(findings)}
    first = by_question["Can the next checkpoint be forecast?"]
    assert first.line.startswith("Can the next checkpoint be forecast? Unclear. Too few windows to tell: 3 are needed.")
    assert by_question["Do forecasts further ahead work?"].verdict == "unknown"
    assert by_question["Do the recent displacements contain the next one?"].verdict == "unknown"
    assert by_question["Is the path straight?"].verdict == "yes"


def test_layers_are_judged_on_the_windows_that_all_of_them_together_are(tmp_path: Path) -> None:
    turned_TP = np.concatenate([random_walk(20), random_walk(20)[-1] + line(20)])
    findings = ask([imported(tmp_path, turned_TP)], Asking(context=4))
    (layer,) = findings.groups
    assert layer["skill_linear"] == pytest.approx(skills(findings, SECOND_HALF)["linear", 1])
    assert layer["skill_linear"] != pytest.approx(skills(findings, ALL)["linear", 1], abs=0.01)


def test_lines_that_stop_early_are_named_under_the_picture(tmp_path: Path) -> None:
    figure = figures.skill(ask([imported(tmp_path, bend(17))], Asking()))
    note = figure.legends[0].get_title().get_text().replace("\n", " ")
    assert note.count("no further than h = ") == 1
    assert note.startswith("damped velocity, dynamic modes, ridge on the context only: no further than h = 2, ")
