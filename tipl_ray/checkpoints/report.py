"""Findings about series of checkpoints -> plain sentences, tables and one page.

Negative findings are stated as plainly as positive ones. Knows nothing of how the figures were made.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from tipl_ray import pages
from tipl_ray.checkpoints.predictability import (
    ALL,
    BOUND,
    FITTED,
    LEARNED,
    SECOND_HALF,
    Asking,
    Findings,
    Row,
    shared_windows,
)
from tipl_ray.checkpoints.products import RUNNING
from tipl_ray.checkpoints.records import ImportedSeries
from tipl_ray.evaluate.metrics import MIN_TRIALS
from tipl_ray.evaluate.report import CLEAR, Answer, Verdict
from tipl_ray.record.tensors import listed
from tipl_ray.terminal import size_text

COPY = "copying the last one"
WORDS = {
    "linear": "linear extrapolation",
    "damped": "damped linear extrapolation",
    "window-linear": "a line fitted to the context",
    "rank-1": "rank-1 extrapolation as in RELEX",
    "rank-1-from-last": "rank-1 extrapolation from the last checkpoint",
    "dmd": "dynamic mode decomposition",
    "context-ridge": "a ridge regression on the context",
    "ridge": "a ridge regression learned on the other runs",
    "tipl": "TIPL, without further training,",
}
"""Predictors as a sentence names them."""
STRAIGHT = 0.9
"""Net displacement as a share of the path's length from which on a path is called straight."""
HELD = 0.9
"""Share of the next displacement's square in the span of the context's from which on the context contains it."""
LINE = 0.95
"""Energy of a rank-1 SVD from which on a path is called a line."""
FEWEST_WINDOWS = MIN_TRIALS
"""Windows from which on they tell anything, where there is no interval over series."""
TOO_FEW = "Too few windows to tell"
MANY = 3
"""Series from which on their paths share a sentence."""
LAYERS = "Is every layer predictable?"
CAPTIONS = {
    "skill": (
        "Skill per number of checkpoints ahead",
        "Skill is the share of the copy-last baseline's squared error that a predictor removes: 1 is perfect, 0 is no "
        "better than copying the last checkpoint, below 0 is worse. The upper bound knows the future: no combination "
        "of the context's displacements can be better.",
    ),
    "phases": (
        "Skill by phase",
        "Where a forecast starts in its iteration. The checkpoint after the end of an iteration (0) depends on data "
        "that has not been collected yet; the others only on data that the last checkpoint was already trained on.",
    ),
    "path": (
        "The path",
        "Left: how much of the squared distance from the first checkpoint an SVD of each rank keeps, compared with a "
        "random walk of as many steps, which is far from predictable and still looks nearly one-dimensional. Right: "
        "cosines between the displacements from one checkpoint to the next.",
    ),
}


def page(
    series: Sequence[ImportedSeries], findings: Findings, asking: Asking, pictures: Mapping[str, bytes], command: str
) -> str:
    """The report as one self-contained HTML page; `pictures` maps names of CAPTIONS to PNGs."""
    names = list(dict.fromkeys(one.name for one in series))
    title = f"How predictable is {names[0]}?" if len(series) == 1 else f"How predictable are {len(series)} runs?"
    return pages.page(
        "predictability.html",
        title=title,
        facts=_facts(series, findings),
        answers=answers(findings),
        notes=notes(series, findings, asking),
        pictures=[(*CAPTIONS[name], pages.embedded(png)) for name, png in pictures.items()],
        skills=skill_table(findings),
        phases=phase_table(findings),
        spectra=[_rounded(row, without=("digest",)) for row in findings.spectra],
        groups=[_rounded(row, without=("digest",)) for row in findings.groups],
        series=[(one.name, f"{one.folder}, digest {one.digest}") for one in series],
        command=command,
    )


def answers(findings: Findings) -> list[Answer]:
    """The findings as answers, the most asked question first."""
    found = [next_checkpoint(findings), further_ahead(findings)]
    if findings.phases:
        found.append(by_phase(findings))
    found.append(at_best(findings))
    if any(row["predictor"] == "tipl" for row in findings.means):
        found.append(zero_shot(findings))
    found += [straight(findings), one_dimensional(findings)]
    if len({row["group"] for row in findings.groups}) > 1:
        found.append(layers(findings))
    return found


def next_checkpoint(findings: Findings) -> Answer:
    """Whether anything forecasts the next checkpoint better than a copy, linear extrapolation first."""
    step = min(row["step"] for row in findings.means)
    own = _at(findings, step)
    best = max(own, key=lambda row: row["skill"], default=None)
    if best is None:
        return Answer(
            question=_question(step), verdict="unknown", text="Nothing moved, so there is nothing to forecast."
        )
    linear = next(row for row in own if row["predictor"] == "linear")
    if best["predictor"] == "linear":
        sentences = [_sentence(linear), f"None of the other {len(own) - 1} predictors does better."]
    else:
        others = f"the best of {len(own)} predictors on the same windows, {_words(best).rstrip(',')}, is"
        sentences = [f"{_sentence(linear).rstrip('.')}; {others} {_amount(best['skill'], against='')}."]
    sentences.append(f"Percentages refer to the squared error over all weights, {_windows(linear)}.")
    if _few(best):
        sentences.insert(0, f"{TOO_FEW}: {FEWEST_WINDOWS} are needed.")
    return _answer(_question(step), _verdict(best), sentences, best)


def further_ahead(findings: Findings) -> Answer:
    """The same for the other steps."""
    steps = sorted({row["step"] for row in findings.means})[1:]
    sentences, verdicts = [], []
    for step in steps:
        own = _at(findings, step)
        if not own:
            continue
        best = max(own, key=lambda row: row["skill"])
        linear = next(row for row in own if row["predictor"] == "linear")
        words = [_sentence(linear).rstrip(".")]
        if best["predictor"] != "linear":
            words.append(f"the best there, {_words(best).rstrip(',')}, is {_amount(best['skill'], against='')}")
        few = f"{TOO_FEW} at h = {step} ({best['num_windows']}): " if _few(best) else ""
        sentences.append(few + "; ".join(words) + ".")
        verdicts.append(_verdict(best))
    question = "Do forecasts further ahead work?"
    if not verdicts:
        return Answer(question=question, verdict="unknown", text="The series is too short to judge them.")
    verdict: Verdict = verdicts[0] if len(set(verdicts)) == 1 else "partly"
    return Answer(question=question, verdict=verdict, text=" ".join(sentences))


def by_phase(findings: Findings) -> Answer:
    """The best predictor of the nearest step where an iteration has ended, and within iterations."""
    step = min(row["step"] for row in findings.phases)
    question = "Does that hold at the end of an iteration?"
    own = _at(findings, step)
    if not own:
        return Answer(question=question, verdict="unknown", text="Nothing moved, so there is nothing to forecast.")
    best = max(own, key=lambda row: row["skill"])
    skills = {
        row["phase"]: row["skill"]
        for row in findings.phases
        if (row["predictor"], row["step"]) == (best["predictor"], step) and row["skill"] is not None
    }
    within = [skill for phase, skill in skills.items() if phase]
    num_windows = [
        row["num_windows"]
        for row in findings.phases
        if (row["predictor"], row["step"], row["phase"]) == (best["predictor"], step, 0)
    ]
    if 0 not in skills or not within:
        return Answer(question=question, verdict="unknown", text="There are too few windows to say.")
    text = (
        f"Where an iteration has just ended, {_words(best)} is {_amount(skills[0])}, {_ahead(step)}; "
        f"within iterations it is between {_amount(min(within), against='')} and {_amount(max(within), against='')}. "
        "What follows the end of an iteration depends on data that has not been collected yet."
    )
    ended = {**best, "skill": skills[0], "skill_low": None, "num_windows": sum(num_windows)}
    few = f"{TOO_FEW}: {ended['num_windows']} where an iteration has ended. " if _few(ended) else ""
    return Answer(question=question, verdict=_verdict(ended), text=f"{few}{text}")


def at_best(findings: Findings) -> Answer:
    """The upper bound of any combination of the context's displacements."""
    rows = [
        row
        for step in sorted({row["step"] for row in findings.means})
        for row in findings.means
        if (row["predictor"], row["step"], row["windows"]) == (BOUND, step, shared_windows(findings))
        and row["skill"] is not None
    ]
    question = "Do the recent displacements contain the next one?"
    if not rows:
        return Answer(question=question, verdict="unknown", text="Nothing moved, so there is nothing to reach.")
    ends = [rows[0], rows[-1]] if len(rows) > 1 else rows
    parts = [f"{row['skill']:.0%} {_ahead(row['step'])}" for row in ends]
    text = (
        f"Whatever the coefficients, a combination of the last {findings.context} displacements removes at most "
        f"{' and '.join(parts)} of the squared error of {COPY}; the rest of the movement is in directions outside "
        "their span."
    )
    held = rows[0]["skill"]
    verdict: Verdict = "yes" if held >= HELD else "partly" if held >= CLEAR else "no"
    if _few(rows[0]):
        verdict, text = "unknown", f"{TOO_FEW}. {text}"
    return Answer(question=question, verdict=verdict, text=text)


def zero_shot(findings: Findings) -> Answer:
    """TIPL against the best of the others on the same windows."""
    windows = shared_windows(findings)
    own = [row for row in findings.means if (row["predictor"], row["windows"]) == ("tipl", windows)]
    sentences, sides = [], []
    for row in own:
        rivals = [
            other
            for other in findings.means
            if (other["step"], other["windows"]) == (row["step"], windows)
            and other["predictor"] not in ("tipl", BOUND)
            and other["skill"] is not None
        ]
        if row["skill"] is None or not rivals:
            continue
        best = max(rivals, key=lambda other: other["skill"])
        theirs = f"the best of the others, {_words(best)}, is {_amount(best['skill'], against='')}"
        few = f"{TOO_FEW} ({row['num_windows']}): " if _few(row) else ""
        sentences.append(f"{few}{_sentence(row).rstrip('.')}; {theirs}.")
        if not few:
            sides.append(row["skill"] > best["skill"])
    verdict: Verdict = "unknown" if not sides else "yes" if all(sides) else "partly" if any(sides) else "no"
    question = "Does the trained Transformer do better, without further training?"
    return Answer(question=question, verdict=verdict, text=" ".join(sentences) or "It was not evaluated at any step.")


def straight(findings: Findings) -> Answer:
    """Net displacement over path length, against a random walk's."""
    rows = [row for row in findings.paths if row["straightness"] is not None]
    question = "Is the path straight?"
    if not rows:
        return Answer(question=question, verdict="unknown", text="Nothing moved.")
    sentences = []
    if len(rows) >= MANY:
        shares, cosines = ([row[name] for row in rows] for name in ("straightness", "mean_cosine"))
        sentences.append(
            f"The distance from the first checkpoint to the last is {_span(shares)} of the path's length in "
            f"{len(rows)} series; for a random walk of as many steps it would be "
            f"{_span([row['straightness_random_walk'] for row in rows])}; successive displacements have a mean cosine "
            f"of {_span([one for one in cosines if one is not None], '.2f')}."
        )
    for row in rows if len(rows) < MANY else ():
        cosine = (
            ""
            if row["mean_cosine"] is None
            else f"; successive displacements have a mean cosine of {row['mean_cosine']:.2f}"
        )
        sentences.append(
            f"{_of(findings, row)}The distance from the first checkpoint to the last is {row['straightness']:.0%} of "
            "the path's length; for a random walk of as many steps it would be "
            f"{row['straightness_random_walk']:.0%}{cosine}."
        )
    return Answer(
        question=question,
        verdict=_all([_shape(row["straightness"], STRAIGHT, row["straightness_random_walk"]) for row in rows]),
        text=" ".join(sentences),
    )


def one_dimensional(findings: Findings) -> Answer:
    """Energy of a rank-1 SVD of the path, against a random walk's."""
    question = "Is the path of rank 1?"
    rows = [row for row in findings.spectra if row["rank"] == 1 and row["path"] == row["path"]]
    if not rows:
        return Answer(question=question, verdict="unknown", text="Nothing moved.")
    ranks = {row["digest"]: row["rank_99"] for row in findings.paths}
    if len(rows) >= MANY:
        sentences = [
            f"One direction explains {_span([row['path'] for row in rows])} of the squared distances from the first "
            f"checkpoint in {len(rows)} series; for a random walk of as many steps it would be "
            f"{_span([row['random_walk'] for row in rows])}. 99% take {_span(list(ranks.values()), 'd')} directions."
        ]
    else:
        sentences = [
            f"{_of(findings, row)}One direction explains {row['path']:.0%} of the squared distances from the first "
            f"checkpoint; for a random walk of as many steps it would be {row['random_walk']:.0%}. 99% take "
            f"{ranks[row['digest']]} direction{'s' * (ranks[row['digest']] != 1)}."
            for row in rows
        ]
    return Answer(
        question=question,
        verdict=_all([_shape(row["path"], LINE, row["random_walk"]) for row in rows]),
        text=" ".join(sentences),
    )


def layers(findings: Findings) -> Answer:
    """Which layers linear extrapolation forecasts best and worst, of those that move."""
    rows = [row for row in findings.groups if row["skill_linear"] is not None]
    if not rows:
        return Answer(question=LAYERS, verdict="unknown", text="No layer moves in the windows that are compared.")
    ordered = sorted(rows, key=lambda row: row["skill_linear"], reverse=True)
    most = max(rows, key=lambda row: row["share_of_movement"])
    better = sum(row["skill_linear"] > 0 for row in rows)
    text = (
        f"Linear extrapolation is better than {COPY} in {better} of the {len(rows)} layers that move: best in "
        f"{_layer(findings, ordered[0])} ({_amount(ordered[0]['skill_linear'], against='')}), worst in "
        f"{_layer(findings, ordered[-1])} ({_amount(ordered[-1]['skill_linear'], against='')}), on the same windows as "
        f"all layers together. Most of the movement, {most['share_of_movement']:.0%}, is in {_layer(findings, most)}."
    )
    verdict: Verdict = "yes" if better == len(rows) else "partly" if better else "no"
    if all(map(_few, _at(findings, min(row["step"] for row in findings.means)))):
        verdict, text = "unknown", f"{TOO_FEW}. {text}"
    return Answer(question=LAYERS, verdict=verdict, text=text)


def notes(series: Sequence[ImportedSeries], findings: Findings, asking: Asking) -> list[str]:
    """How the findings were computed, and their limits."""
    fitted = {row["fitted_on"] for row in findings.means}
    said = [f"A forecast uses only the last {findings.context} displacements before its start."]
    if "first half" in fitted:
        said.append(
            "With no other run to validate on, damped, dmd and context-ridge choose their one setting on the first "
            "half of the series, and all predictors are compared on windows that start in the second half."
        )
    if "other series" in fitted:
        said.append("damped, dmd and context-ridge choose their one setting on the other series.")
    if LEARNED in {row["predictor"] for row in findings.means}:
        said.append(
            "ridge learns its coefficients, one set per phase, on all other series but the last, which chooses its "
            "penalty."
        )
    if "tipl" in {row["predictor"] for row in findings.means}:
        said.append("TIPL is evaluated as it was saved; whether it was trained on these very runs is not checked.")
    if findings.phases:
        said.append("By phase, skills are those of starts at the same place in their iterations.")
    asked = {row["step"] for row in findings.means}
    if late := sorted(asked - {row["step"] for row in findings.means if row["predictor"] in FITTED}):
        said.append(
            f"At h = {', '.join(map(str, late))} damped, dmd and context-ridge are left out: the data to choose "
            "their setting on is too short."
        )
    said.append("The best predictor is chosen on the windows that it is evaluated on, so its lead is optimistic.")
    if moving := [row for row in findings.groups if row["group"] == RUNNING]:
        said.append(
            f"{_span([row['share_of_movement'] for row in moving])} of the movement is in running statistics of "
            f"normalisation layers, which follow the data and no gradient; --leave-out '{RUNNING}' leaves them out."
        )
    longest = max(row["step"] for row in findings.means)
    if missing := [step for step in asking.steps if step > longest]:
        said.append(f"No series is long enough for h = {', '.join(map(str, missing))}.")
    if uneven := [row["series"] for row in findings.paths if not row["even_steps"]]:
        said.append(
            f"{listed(uneven)}: checkpoints are not evenly spaced; forecasts count checkpoints, not training steps."
        )
    for one in series:
        said += [
            f"{one.name}: left out {why}: {', '.join(names[:3])}{f' and {len(names) - 3} more' * (len(names) > 3)}."
            for why, names in one.left_out.items()
        ]
        if len(one.products.groups) > (moving := sum(row["digest"] == one.digest for row in findings.groups)):
            said.append(
                f"{one.name}: {len(one.products.groups) - moving} of {len(one.products.groups)} layers never moved."
            )
    if len(series) < MIN_TRIALS:
        said.append(
            f"There are no confidence intervals, which take {MIN_TRIALS} series: these numbers describe this run, not "
            "others."
        )
    return said


def skill_table(findings: Findings) -> list[dict[str, str]]:
    """Cells of the skill table, by predictor and set of windows; intervals in brackets."""
    steps = sorted({row["step"] for row in findings.means})
    lines = dict.fromkeys((row["predictor"], row["windows"], row["fitted_on"]) for row in findings.means)
    cells = {(row["predictor"], row["windows"], row["step"]): row for row in findings.means}
    order = sorted(lines, key=lambda line: (line[1] != ALL, list(lines).index(line)))
    return [
        {
            "predictor": f"{predictor} (upper bound)" if predictor == BOUND else predictor,
            "windows": windows,
            "fitted on": fitted_on,
            **{f"h = {step}": _cell(cells.get((predictor, windows, step))) for step in steps},
        }
        for predictor, windows, fitted_on in order
    ]


def phase_table(findings: Findings) -> list[dict[str, str]]:
    """Cells of the skill at the nearest step by phase; no rows where there are no phases."""
    if not findings.phases:
        return []
    step = min(row["step"] for row in findings.phases)
    rows = [row for row in findings.phases if row["step"] == step]
    cells = {(row["predictor"], row["phase"]): row for row in rows}
    phases = sorted({row["phase"] for row in rows})
    return [
        {
            "predictor": predictor,
            "h": str(step),
            **{f"{phase} into the iteration": _cell(cells.get((predictor, phase))) for phase in phases},
        }
        for predictor in dict.fromkeys(row["predictor"] for row in rows)
    ]


def _cell(row: Row | None) -> str:
    if row is None or row["skill"] is None:
        return "-"
    # Adding 0.0 keeps a rounded -0.00 from being read as worse than copying.
    low, high = row["skill_low"], row["skill_high"]
    skill = f"{round(row['skill'], 3) + 0.0:.3f}"
    return skill if low is None else f"{skill} [{low:.3f}, {high:.3f}]"


def _at(findings: Findings, step: int) -> list[Row]:
    """Every predictor at a step, on the windows that all of them share."""
    windows = shared_windows(findings)
    return [
        row
        for row in findings.means
        if (row["step"], row["windows"]) == (step, windows)
        and row["predictor"] not in ("copy-last", BOUND)
        and row["skill"] is not None
    ]


def _question(step: int) -> str:
    return "Can the next checkpoint be forecast?" if step == 1 else f"Can a checkpoint {step} ahead be forecast?"


def _sentence(row: Row) -> str:
    words = _words(row)
    what = "the next checkpoint" if row["step"] == 1 else f"{row['step']} checkpoints ahead"
    return f"{words[0].upper()}{words[1:]} forecasts {what} {_amount(row['skill'])}."


def _words(row: Row) -> str:
    return WORDS.get(str(row["predictor"]), str(row["predictor"]))


def _amount(skill: float, against: str = f" than {COPY}") -> str:
    """How much better or worse than copying."""
    if abs(skill) < 0.0005:
        return f"no better{against}"
    if skill <= -1.0:
        return f"{1 - skill:,.1f} times as badly{against.replace('than', 'as')}"
    share = f"{abs(skill):.0%}" if abs(skill) >= 0.0995 else f"{abs(skill):.1%}"
    return f"{share} {'better' if skill > 0 else 'worse'}{against}"


def _ahead(step: int) -> str:
    return "one checkpoint ahead" if step == 1 else f"{step} ahead"


def _few(row: Row) -> bool:
    """Whether a row rests on too few windows for a verdict; with an interval over series it does not."""
    return row["skill_low"] is None and row["num_windows"] < FEWEST_WINDOWS


def _windows(row: Row) -> str:
    where = "in the second half of the series" if row["windows"] == SECOND_HALF else "of every window"
    return f"over {row['num_windows']} start{'s' * (row['num_windows'] != 1)} {where}"


def _verdict(row: Row) -> Verdict:
    """By the interval where there is one, else by the size; unknown where there are too few windows."""
    if _few(row):
        return "unknown"
    if row["skill_low"] is not None:
        return "yes" if row["skill_low"] > 0 else "no" if row["skill_high"] < 0 else "partly"
    return "yes" if row["skill"] >= CLEAR else "partly" if row["skill"] >= 0.0005 else "no"


def _answer(question: str, verdict: Verdict, sentences: Sequence[str], row: Row) -> Answer:
    if row["num_series"] > 1:
        sentences = [*sentences, f"These are means over {row['num_series']} series."]
    return Answer(question=question, verdict=verdict, text=" ".join(sentences))


def _shape(value: float, enough: float, random_walk: float) -> Verdict:
    return "yes" if value >= enough and value > random_walk else "partly" if value > 1.1 * random_walk else "no"


def _all(verdicts: Sequence[Verdict]) -> Verdict:
    return verdicts[0] if len(set(verdicts)) == 1 else "partly"


def _of(findings: Findings, row: Row) -> str:
    return f"{row['series']}: " if len(findings.paths) > 1 else ""


def _layer(findings: Findings, row: Row) -> str:
    group = str(row["group"])
    name = f"layer {group}" if group[:1].isdigit() else group  # torch's Sequential numbers its layers
    return f"{name} of {row['series']}" if len(findings.paths) > 1 else name


def _facts(series: Sequence[ImportedSeries], findings: Findings) -> dict[str, str]:
    return {
        "series": str(len(series)),
        "checkpoints": _range([len(one.steps) for one in series]),
        "weights": _range([one.num_weights for one in series]),
        "steps": f"{min(one.steps[0] for one in series):,} to {max(one.steps[-1] for one in series):,}",
        "context": f"{findings.context} displacements",
        "read": size_text(sum(one.num_bytes for one in series)),
    }


def _range(values: Sequence[int]) -> str:
    return f"{min(values):,}" if len(set(values)) == 1 else f"{min(values):,} to {max(values):,}"


def _span(values: Sequence[float], as_: str = ".0%") -> str:
    """The least and the most of some values."""
    least, most = (f"{end(values):{as_}}" for end in (min, max)) if values else ("-", "-")
    return least if least == most else f"{least} to {most}"


def _rounded(row: Row, without: Sequence[str]) -> dict[str, str]:
    def text(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:,.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

    return {name.replace("_", " "): text(value) for name, value in row.items() if name not in without}


def as_tables(findings: Findings) -> dict[str, bytes]:
    """The findings' tables as CSV."""
    return {
        f"{field.name}.csv": pages.as_csv(rows)
        for field in dataclasses.fields(findings)
        if isinstance(rows := getattr(findings, field.name), list) and rows
    }
