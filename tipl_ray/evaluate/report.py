"""One page that answers: does the Transformer add anything over copying, a ridge regression and rank-1 extrapolation;
where; and what does that do to returns?

Turns a summary (rows as `metrics.summarise` makes them) into plain sentences, a table and one HTML page. Negative
findings are stated as plainly as positive ones. Knows nothing of how the numbers were made.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from tipl_ray import pages
from tipl_ray.digest import flat
from tipl_ray.evaluate.metrics import MIN_TRIALS, Row, number

Verdict = Literal["yes", "partly", "no", "unknown"]
Side = Literal["better", "level", "unclear", "worse", "far", "unknown"]
"""How a figure compares with another: `level` by its interval, `unclear` without one; sentences are in this order."""

SHORT_STEPS = (1, 2, 5, 10)
RIVALS = {
    "ridge": "the ridge regression by phase",
    "ridge-elsewhere": "the ridge regression fitted on the tasks that TIPL was trained on",
    "context-ridge": "a ridge regression on the context alone",
    "linear": "linear extrapolation",
    "rank-1": "rank-1 extrapolation",
    "rank-1-from-last": "rank-1 extrapolation from the last snapshot",
    "dmd": "dynamic mode decomposition",
}
"""Predictors that TIPL is compared with, in the order of the questions."""
FLOORS = ("svd-floor", "window-floor")
CLEAR = 0.1
"""Smallest difference in skill that counts where there is no interval."""
TWICE = 2.0
"""Ratio of two REPWs from which on they count as different where there is no interval."""
FAR = -1.0
"""Skill, or difference of skill, from which on a predictor is not just worse but far worse: twice the error."""
ALIKE = 0.9
"""Ratio of distances, either way round, above which two of them count as about the same."""
GROUPS = {"phase": "phase", "third": "third of training"}
THIRDS = ("first", "second", "last")
DIFFERENCE = ("skill_difference", "difference")
"""Column of a comparison, and how those of its interval begin."""
BASELINE = "the copy-last baseline"
NO_FORECASTS = "The results hold no forecast of the Transformer to compare."
NO_RIDGE = "The results hold no ridge regression to compare with."
NO_POLICIES = "No policies were rolled out, so nothing is known about returns."
SIDES: dict[Side, str] = {
    "better": "better",
    "level": "no significant difference",
    "unclear": "too close to call",
    "worse": "worse",
    "far": "far worse",
    "unknown": "nothing to compare",
}
"""Words of the five lines for each side, in order."""

CAPTIONS = {
    "figure_2": (
        "The paper's Figure 2",
        "Left: error of the predicted weights (WPE) and of their returns (REPW) by forward step. Right: each point is "
        "one predicted policy; on the diagonal its return equals that of the true policy. TIPL is informative only "
        "where its points are closer to the diagonal than those of copying the last snapshot.",
    ),
    "skill_by_step": (
        "Skill by forward step",
        "Skill is the share of the copy-last baseline's squared error that a predictor removes: 1 is perfect, 0 is no "
        "better than copying the last snapshot, below 0 is worse. Bands are confidence intervals over test trials.",
    ),
    "skill_over_ridge": (
        "What the Transformer adds to the ridge regression",
        "TIPL's skill minus the ridge's on the same windows, overall and by phase: above 0 the Transformer has learned "
        "something that a linear regression per phase has not. Bands are confidence intervals of the difference.",
    ),
    "paths": (
        "The paths and TIPL's forecasts",
        "Each test trial's snapshots in the plane of the first two singular directions of its centred trajectory: "
        "above the whole path with some of TIPL's forecasts, below one of them close up. Where a blue line follows the "
        "snapshots, TIPL predicts where training goes; a short line is a forecast that hardly moves.",
    ),
    "skill_by_phase": (
        "Skill within a PPO iteration",
        "At phase 0 an iteration has just ended, and what follows depends on a rollout that has not been collected "
        "yet; at the other phases the next epochs reuse a rollout whose effect is already visible in the weights.",
    ),
    "skill_by_third": (
        "Skill by stage of training",
        "The same skill, with each test trial cut into thirds: early, middle and late training.",
    ),
    "spread": (
        "Are predicted policies as different as true ones?",
        "A model with mode collapse predicts the same everywhere: its policies have similar returns and are closer to "
        "each other than the true ones. Left: standard deviation of returns over the windows rolled out. Right: mean "
        "distance between the policies of one trial's windows, relative to the true ones.",
    ),
    "learning_curves": (
        "Learning curves of the trials",
        "Each thin line is one seeded PPO trial; its policy weights along the way are the data set.",
    ),
    "reconstruction": (
        "Reconstruction by the Temporal SVD",
        "How much of a test trial's weights is lost when only the first D singular vectors of its own trajectory are "
        "kept.",
    ),
    "training_curves": (
        "Training the Transformer",
        "Loss on the training trials and on held-out validation trials; where they diverge, the model overfits. With "
        "the paper's bases it is the squared error of tokens; with the window basis, the share of the copy-last "
        "baseline's squared error that remains: 1 is copying.",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A question that the experiment was made for, the answer in its numbers, and how many trials that rests on."""

    question: str
    verdict: Verdict | None
    """None where the question is not one of yes or no."""
    text: str
    trials: int | None = None

    @property
    def said(self) -> str:
        """The verdict as a reader sees it."""
        return "Unclear" if self.verdict == "unknown" else (self.verdict or "").capitalize()

    @property
    def few(self) -> bool:
        """Whether it rests on too few trials for a confidence interval."""
        return self.trials is not None and self.trials < MIN_TRIALS

    @property
    def line(self) -> str:
        """The whole of it in one line."""
        return " ".join([self.question, *([f"{self.said}."] if self.verdict else []), self.text])


def page(
    *,
    title: str,
    summary: Sequence[Row],
    pictures: Mapping[str, bytes],
    facts: Mapping[str, Any],
    configuration: Mapping[str, Any],
    commands: Mapping[str, str],
    files: Mapping[str, str],
    confidence: float = 0.95,
    comparisons: Sequence[Row] = (),
    groups: Sequence[Row] = (),
) -> str:
    """The report as one self-contained HTML page.

    `pictures` maps names of CAPTIONS to PNGs and keeps its order; `facts` are the few figures of the page's head;
    `configuration` may be nested and is printed as it is, so secrets must be out of it; `commands` and `files` map what
    it is to the command or the path. `comparisons` and `groups` are the rows of `metrics.compare` and
    `metrics.group_skills`.
    Raises ValueError for a picture that has no caption.
    """
    unknown = [name for name in pictures if name not in CAPTIONS]
    if unknown:
        raise ValueError(f"pictures={unknown} have no caption; there are {sorted(CAPTIONS)}")
    return pages.page(
        "evaluation.html",
        title=title,
        facts=facts,
        headline=headline(summary, confidence, comparisons, groups),
        answers=answers(summary, confidence, comparisons, groups),
        pictures=[(*CAPTIONS[name], pages.embedded(png)) for name, png in pictures.items()],
        short_table=table(summary, SHORT_STEPS),
        whole_table=table(summary),
        confidence=f"{confidence:.0%}",
        configuration=list(flat(configuration)),
        commands=commands,
        files=files,
    )


def table(summary: Sequence[Row], steps: Sequence[int] | None = None) -> list[dict[str, str]]:
    """Cells of the result table, intervals in brackets: at some steps, or at all where none of those is there."""
    return [_cells(row) for row in _sorted(summary, steps)]


def answers(
    summary: Sequence[Row],
    confidence: float = 0.95,
    comparisons: Sequence[Row] = (),
    groups: Sequence[Row] = (),
) -> list[Answer]:
    """Findings about TIPL in sentences, compared with the predictors that are in the tables."""
    return [
        beats_copying(summary, confidence),
        *(beats(summary, rival, comparisons) for rival in RIVALS if _of(summary, rival)),
        *([where_it_lies(groups)] if groups else []),
        returns_like_the_true_policy(summary),
        returns_closer_than_a_copy(summary),
        *([modes_are_kept(summary)] if _run(_of(summary, "tipl")) else []),
        *(basis_suffices(summary, floor) for floor in FLOORS if _of(summary, floor)),
    ]


def headline(
    summary: Sequence[Row],
    confidence: float = 0.95,
    comparisons: Sequence[Row] = (),
    groups: Sequence[Row] = (),
) -> list[Answer]:
    """The five lines that a run ends with and its report opens with: whether TIPL beats copying the last snapshot,
    the ridge regression, and copying in returns; where; and how sure that is."""
    rows = _of(summary, "tipl")
    ridge, ridge_sides = _against_rival(summary, "ridge", comparisons)
    run, return_sides = _against_copied_returns(summary)
    copying = _line(
        "Does TIPL beat copying the last snapshot?",
        {step: _skill_side(row) for step, row in rows.items()},
        rows,
        _at_both_ends(rows, "Skill", lambda row: _with_interval(row, "skill")),
        NO_FORECASTS,
    )
    rival = _of(summary, "ridge")
    against = _at_both_ends(
        ridge,
        "Skill",
        lambda row: f"{_with_interval(row, 'skill')} against {_with_interval(rival[row['step']], 'skill')}",
    )
    copied = _run(_of(summary, "copy-last"))
    returned = _at_both_ends(
        run, "REPW", lambda row: f"{_with_interval(row, 'repw')} against {_with_interval(copied[row['step']], 'repw')}"
    )
    return [
        copying,
        _line("Does it beat the ridge regression?", ridge_sides, ridge, against, NO_RIDGE),
        _line("Does it beat copying in returns?", return_sides, run, returned, _why_no_returns(summary)),
        Answer(question="Where?", verdict=None, text=_where(copying.verdict, groups)),
        Answer(question="How sure is that?", verdict=None, text=_how_sure(rows, confidence)),
    ]


def _line(
    question: str, sides: Mapping[int, Side], rows: Mapping[int, Row], sizes: Sequence[str], nothing: str
) -> Answer:
    """One of the five: at which steps TIPL is on which side, on how many test trials, and the figures at both ends."""
    found = [
        f"{words} at {steps_text(steps)}"
        for side, words in SIDES.items()
        if (steps := [step for step, of in sides.items() if of == side])
    ]
    if not found:
        return Answer(question=question, verdict="unknown", text=nothing)
    trials = max((int(row["trials"]) for row in rows.values() if row.get("trials")), default=0)
    on = f", on {counted(trials, 'test trial')}" if trials else ""
    text = " ".join([f"{_listed(found)}{on}.", *sizes])
    verdict = _verdict(list(sides.values()))
    return Answer(question=question, verdict=verdict, text=text[0].upper() + text[1:], trials=trials or None)


def _where(verdict: Verdict | None, groups: Sequence[Row]) -> str:
    """In which phases and thirds TIPL beats copying one step ahead."""
    own = [row for row in groups if row["predictor"] == "tipl" and math.isfinite(number(row, "skill"))]
    first = min((row["step"] for row in own), default=1)
    parts = []
    for group in GROUPS:
        rows = [row for row in own if row["group"] == group and row["step"] == first]
        better = [int(row["value"]) for row in rows if _skill_side(row) == "better"]
        if rows:
            parts.append(_groups_text(group, better, len(rows)))
    if not parts:
        return "The results are not split by phase and third of training."
    return f"At h = {first} it beats copying in {' and in '.join(parts)}."


def _groups_text(group: str, values: Sequence[int], count: int) -> str:
    """Some of so many phases or thirds as words: `phases 1 to 4 of 5`."""
    kind, of = ("phase", "of a PPO iteration") if group == "phase" else ("third", "of training")
    if not values or len(values) == count:
        return f"{'every' if values else 'no'} {kind} {of}"
    if group == "phase":
        return f"phase{'s' * (len(values) > 1)} {_ranges(values)} of the {count} {of}"
    return f"the {_listed([THIRDS[value] for value in values])} third {of}"


def _how_sure(rows: Mapping[int, Row], confidence: float) -> str:
    """What the four lines before it rest on, and what is not in their numbers."""
    trials = max((int(row["trials"]) for row in rows.values() if row.get("trials")), default=0)
    if not trials:
        return NO_FORECASTS
    windows = max(int(row["windows"]) for row in rows.values())
    text = f"{counted(trials, 'test trial')} with {windows:,} windows"
    text += (
        f"; brackets are {confidence:.0%} intervals over trials."
        if trials >= MIN_TRIALS
        else f": too few for a confidence interval, which takes {MIN_TRIALS}, so this is an example, not evidence."
    )
    if any(not row["causal"] for row in rows.values()):
        text += " The basis was fitted on whole trajectories, the future included, so this is not yet a forecast."
    return text


def beats_copying(summary: Sequence[Row], confidence: float = 0.95) -> Answer:
    """Whether TIPL's skill is above 0 with its whole interval, and at which steps."""
    rows = _of(summary, "tipl")
    verdict, sentences = _judge(
        {step: _skill_side(row) for step, row in rows.items()},
        **_against(BASELINE),
        level=f"No significant difference at {{steps}}: the {confidence:.0%} interval of its skill includes 0.",
        unclear=f"At {{steps}} it is within {CLEAR} of {BASELINE}'s skill of 0, too close to call without an interval.",
    )
    sentences += _sizes(rows)
    if any(not row["causal"] for row in rows.values()):
        sentences.append(
            "Its basis was fitted on the whole trajectory, the future included, so this forecast could not be made "
            "while a policy is being trained."
        )
    question = "Does the Transformer predict weights better than copying the last snapshot?"
    return _answer(question, verdict, sentences, rows, NO_FORECASTS)


def beats(summary: Sequence[Row], rival: str, comparisons: Sequence[Row] = ()) -> Answer:
    """Whether TIPL's skill is above a rival's, and at which steps.

    With `comparisons` the interval of the difference on the same windows decides; without, intervals must not overlap.
    """
    theirs, words = _of(summary, rival), RIVALS[rival]
    paired = _paired(rival, comparisons)
    rows, sides = _against_rival(summary, rival, comparisons)
    reason = "the interval of the difference includes 0" if paired else "the intervals of their skills overlap"
    verdict, sentences = _judge(
        sides,
        **_against(words),
        level=f"No significant difference at {{steps}}: {reason}.",
        unclear=f"At {{steps}} their skills are within {CLEAR} of each other, too close to call without an interval.",
    )
    sentences += _at_both_ends(
        rows,
        "Skill is",
        lambda row: f"{_with_interval(row, 'skill')} against {_with_interval(theirs[row['step']], 'skill')}",
    )
    on_both = {step: paired[step] for step in rows if step in paired}
    sentences += _at_both_ends(on_both, "On the same windows the difference is", _difference)
    return _answer(f"Does it predict weights better than {words}?", verdict, sentences, rows, NO_FORECASTS)


def _paired(rival: str, comparisons: Sequence[Row]) -> dict[int, Row]:
    """Comparisons with a rival on the same windows, by step."""
    return {int(row["step"]): row for row in comparisons if row["against"] == rival and row["group"] == "all"}


def _against_rival(
    summary: Sequence[Row], rival: str, comparisons: Sequence[Row]
) -> tuple[dict[int, Row], dict[int, Side]]:
    """TIPL's rows at the steps that a rival has too, and the side of its skill on which TIPL's is."""
    theirs, paired = _of(summary, rival), _paired(rival, comparisons)
    rows = {step: row for step, row in _of(summary, "tipl").items() if step in theirs}
    sides: dict[int, Side] = {}
    for step, row in rows.items():
        if step in paired:
            sides[step] = _side(*_interval(paired[step], *DIFFERENCE))
        else:
            ours, other = _interval(row, "skill"), _interval(theirs[step], "skill")
            sides[step] = _side(ours[0] - other[0], ours[1] - other[2], ours[2] - other[1])
    return rows, sides


def where_it_lies(groups: Sequence[Row]) -> Answer:
    """In which phases and thirds TIPL's skill one step ahead is above 0, and in which it is not."""
    own = [row for row in groups if row["predictor"] == "tipl" and math.isfinite(number(row, "skill"))]
    first = min((row["step"] for row in own), default=1)
    sentences, decided = [], []
    for group, words in GROUPS.items():
        rows = [row for row in own if row["group"] == group and row["step"] == first]
        if not rows:
            continue
        named = [f"{_with_interval(row, 'skill')} in {_group_name(group, int(row['value']))}" for row in rows]
        sentences.append(f"By {words}, skill at h = {first} is {_listed(named)}.")
        sides = [_skill_side(row) for row in rows]
        compared = {
            "far": f"it is far worse than {BASELINE}",
            "worse": f"it is worse than {BASELINE}",
            "level": f"there is no significant difference from {BASELINE}",
            "unclear": f"it is too close to {BASELINE} to call without an interval",
        }
        for side, finding in compared.items():
            names = [_group_name(group, int(row["value"])) for row, of in zip(rows, sides, strict=True) if of == side]
            if names:
                where = _listed(names) if len(names) < len(rows) or len(rows) == 1 else "all of them"
                sentences.append(f"In {where} {finding}.")
        decided += sides
    phases = {
        int(row["value"]): number(row, "skill") for row in own if row["group"] == "phase" and row["step"] == first
    }
    inside = [value for phase, value in phases.items() if phase]
    if 0 in phases and inside and phases[0] < min(inside):
        sentences.append(
            "Skill is lowest where an iteration has just ended and the next one's rollout has not been collected yet."
        )
        if max(inside) > 0:
            sentences.append(
                "Most of what is predicted is the rest of an update on data that has already changed the weights."
            )
    question = "Is it better in every phase of a PPO iteration and at every stage of training?"
    return _answer(question, _verdict(decided), sentences, {0: own[0]} if own else {}, NO_FORECASTS)


def returns_like_the_true_policy(summary: Sequence[Row]) -> Answer:
    """How far TIPL's REPW is above the noise floor: the true policy against itself on other episodes."""
    rows = _run(_of(summary, "tipl"))
    sides: dict[int, Side] = {}
    for step, row in rows.items():
        (apart, low, _), floor = _interval(row, "repw"), number(row, "repw_noise_floor")
        if math.isfinite(low):
            sides[step] = "worse" if low > floor else "better"
        else:
            sides[step] = "better" if apart <= floor else "worse" if apart > TWICE * floor else "unclear"
    has_interval = any(math.isfinite(number(row, "repw_low")) for row in rows.values())
    verdict, sentences = _judge(
        sides,
        better="No difference beyond the noise of the evaluation at {steps}.",
        unclear="At {steps} the difference is less than twice the noise of the evaluation, too close to call.",
        worse=(
            "They do not at {steps}: the whole interval of the difference is above the noise floor."
            if has_interval
            else "They do not at {steps}: the difference is more than twice the noise of the evaluation."
        ),
    )
    sentences += _at_both_ends(
        rows,
        "Returns differ by",
        lambda row: (
            f"{_with_interval(row, 'repw')} ({_above(row)} the noise floor of "
            f"{_format('repw', number(row, 'repw_noise_floor'))})"
        ),
    )
    return _answer(
        "Do the predicted policies have the same returns as the true ones?", verdict, sentences, rows, NO_POLICIES
    )


def returns_closer_than_a_copy(summary: Sequence[Row]) -> Answer:
    """Whether TIPL's REPW is below copy-last's with no overlap of their intervals, and at which steps."""
    copied = _run(_of(summary, "copy-last"))
    rows, sides = _against_copied_returns(summary)
    verdict, sentences = _judge(
        sides,
        better="They are at {steps}.",
        level="No significant difference at {steps}: the intervals of both REPWs overlap.",
        unclear="At {steps} neither is twice the other, too close to call without an interval.",
        worse="They are further from them than the copy's at {steps}.",
    )
    sentences += _at_both_ends(
        rows,
        "REPW is",
        lambda row: f"{_with_interval(row, 'repw')} against {_with_interval(copied[row['step']], 'repw')} of the copy",
    )
    if rows and math.isfinite(number(rows[max(rows)], "beats_last")):
        sentences.append(
            f"At h = {max(rows)} the predicted policy returns more than the last snapshot in "
            f"{number(rows[max(rows)], 'beats_last'):.0%} of windows, ties counted half."
        )
    question = "Are their returns closer to the true policies' than those of a copy of the last snapshot?"
    return _answer(question, verdict, sentences, rows, _why_no_returns(summary))


def _against_copied_returns(summary: Sequence[Row]) -> tuple[dict[int, Row], dict[int, Side]]:
    """TIPL's rows at the steps whose policies were run, and the side of copying's REPW on which TIPL's is."""
    copied = _run(_of(summary, "copy-last"))
    rows = {step: row for step, row in _run(_of(summary, "tipl")).items() if step in copied}
    sides: dict[int, Side] = {}
    for step, row in rows.items():
        ours, theirs = _interval(row, "repw"), _interval(copied[step], "repw")
        if math.isfinite(ours[1]) and math.isfinite(theirs[1]):
            sides[step] = _side(theirs[0] - ours[0], theirs[1] - ours[2], theirs[2] - ours[1], far=-math.inf)
        else:
            better, worse = TWICE * ours[0] <= theirs[0], ours[0] >= TWICE * theirs[0]
            sides[step] = "unclear" if better == worse else "better" if better else "worse"
    return rows, sides


def _why_no_returns(summary: Sequence[Row]) -> str:
    return "No policies of the copy-last baseline were rolled out." if _run(_of(summary, "tipl")) else NO_POLICIES


def modes_are_kept(summary: Sequence[Row]) -> Answer:
    """Whether predicted policies differ from each other as much as the true ones, in returns and in weights."""
    run = _run(_of(summary, "tipl"))
    shares = {step: number(row, "distance") / (number(row, "distance_true") or math.nan) for step, row in run.items()}
    rows = {step: row for step, row in run.items() if math.isfinite(shares[step])}
    sides: dict[int, Side] = {
        step: "worse" if shares[step] < ALIKE else "level" if shares[step] > 1 / ALIKE else "better" for step in rows
    }
    verdict, sentences = _judge(
        sides,
        better="At {steps} the policies predicted from one trial's windows are about as far apart as the true ones.",
        level="At {steps} they are further apart than the true ones: no collapse, but not the same either.",
        worse="At {steps} they are closer together than the true ones, a sign of mode collapse.",
    )
    if rows and set(sides.values()) == {"level"}:
        verdict = "partly"
    sentences += _at_both_ends(rows, "Their distance is", lambda row: f"{_times(shares[row['step']])} the true ones'")
    spreads = ("returns_spread", "returns_spread_true")
    sentences += _at_both_ends(
        _known(rows, *spreads),
        "The spread of their returns is",
        lambda row: " against ".join(_format("repw", number(row, name)) for name in spreads),
    )
    nothing = "No two windows of one trial have different policies, so there are no distances." if run else ""
    question = "Do predicted policies differ as much as true ones, or is there mode collapse?"
    return _answer(question, verdict, sentences, rows, nothing or NO_POLICIES)


def basis_suffices(summary: Sequence[Row], floor: str = "svd-floor") -> Answer:
    """What the basis alone costs: the skill of the true future projected onto it, the upper bound of any predictor."""
    rows = _known(_of(summary, floor), "skill")
    sides: dict[int, Side] = {}
    for step, row in rows.items():
        skill = number(row, "skill")
        sides[step] = "better" if skill >= 0.9 else "level" if skill > 0 else "far" if skill <= FAR else "worse"
    verdict, sentences = _judge(
        sides,
        better=f"At {{steps}} it leaves less than a tenth of {BASELINE}'s error out of reach.",
        level=f"At {{steps}} it puts a tenth of {BASELINE}'s error or more out of any predictor's reach.",
        worse="It does not at {steps}: copying the last snapshot is closer than the true future on this basis.",
        far="It does not at {steps}: copying the last snapshot is far closer than the true future on this basis.",
    )
    if verdict == "no" and "level" in sides.values():
        verdict = "partly"
    sentences += _at_both_ends(
        rows,
        "The true future projected onto the basis, its upper bound, has skill",
        lambda row: _with_interval(row, "skill"),
    )
    nothing = "The weights did not move in the test trials, so there is nothing to keep."
    return _answer("Does the basis keep enough of the weights to predict them?", verdict, sentences, rows, nothing)


def _side(difference: float, low: float, high: float, far: float = FAR) -> Side:
    """Which side of 0 a difference is on: by its interval, or, where it has none, by its size."""
    if not math.isfinite(difference):
        return "far" if difference == -math.inf else "unknown"
    if math.isfinite(low) and math.isfinite(high):
        side: Side = "better" if low > 0 else "worse" if high < 0 else "level"
    else:
        side = "better" if difference >= CLEAR else "worse" if difference <= -CLEAR else "unclear"
    return "far" if side == "worse" and difference <= far else side


def _skill_side(row: Row) -> Side:
    return _side(*_interval(row, "skill"))


def _against(words: str) -> dict[str, str]:
    """Sentences for a clear difference from a rival, by side."""
    return {
        "better": f"It beats {words} at {{steps}}.",
        "worse": f"It is worse than {words} at {{steps}}.",
        "far": f"It is far worse than {words} at {{steps}}.",
    }


def _judge(sides: Mapping[int, Side], **sentences: str) -> tuple[Verdict, list[str]]:
    """The verdict over all steps, and a sentence for each side that some steps are on."""
    sentences |= {"unknown": "At {steps} there is nothing to compare: no weights moved, or the forecasts diverged."}
    steps = {side: [step for step, of in sides.items() if of == side] for side in get_args(Side) if side in sentences}
    return _verdict(list(sides.values())), [
        sentences[side].format(steps=steps_text(some)) for side, some in steps.items() if some
    ]


def _verdict(sides: Sequence[Side]) -> Verdict:
    if not set(sides) - {"unknown", "unclear"}:
        return "unknown"
    if "better" not in sides:
        return "no"
    return "yes" if set(sides) == {"better"} else "partly"


def _answer(question: str, verdict: Verdict, sentences: Sequence[str], rows: Mapping[int, Row], nothing: str) -> Answer:
    """The answer, with the number of trials that it rests on, or `nothing` without any sentences."""
    known = [int(row["trials"]) for row in rows.values() if row.get("trials")]
    if not sentences or not known:
        return Answer(question=question, verdict=verdict, text=" ".join(sentences) or nothing)
    trials = max(known)
    basis = f"This rests on {counted(trials, 'test trial')}"
    few = f", too few for a confidence interval, which takes {MIN_TRIALS}." if trials < MIN_TRIALS else "."
    return Answer(question=question, verdict=verdict, text=" ".join([*sentences, basis + few]), trials=trials)


def counted(count: int, thing: str) -> str:
    """A number of things in words: `1 test trial`, `2 test trials`."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def _sizes(rows: Mapping[int, Row]) -> list[str]:
    """The first and the last skill in words: the share of the baseline's squared error that is removed or added."""
    known = _known(rows, "skill")
    sentence, latest = "", ""
    for step in sorted({min(known), max(known)}) if known else ():
        skill = number(known[step], "skill")
        verb, amount, link = (
            ("has", f"{_number_text(1 - skill)} times", "")
            if skill <= FAR
            else ("adds", _percent(-skill), "to ")
            if skill < 0
            else ("removes", _percent(skill), "of ")
        )
        words = amount if verb == latest else f"it {verb} {amount} {link}{BASELINE}'s squared error"
        sentence += f"{' and ' * bool(sentence)}{words} at h = {step} (skill {_with_interval(known[step], 'skill')})"
        latest = verb
    return [f"{sentence[0].upper()}{sentence[1:]}."] if sentence else []


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.0995 or share == 0 else f"{share:.1%}" if share >= 0.0005 else "less than 0.1%"


def _number_text(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _times(ratio: float) -> str:
    return f"{_number_text(ratio)} times" if ratio >= 2 else f"{ratio:.0%} of"


def _at_both_ends(rows: Mapping[int, Row], start: str, words: Callable[[Row], str]) -> list[str]:
    ends = [f"{words(rows[step])} at h = {step}" for step in sorted({min(rows), max(rows)})] if rows else []
    return [f"{start} {' and '.join(ends)}."] if ends else []


def _of(summary: Sequence[Row], predictor: str) -> dict[int, Row]:
    """The predictor's rows by step; of several bases, the one that the summary names first."""
    own = [row for row in summary if row["predictor"] == predictor]
    return {int(row["step"]): row for row in _sorted(own) if row["basis"] == own[0]["basis"]}


def _difference(row: Row) -> str:
    value, low, high = _interval(row, *DIFFERENCE)
    if not math.isfinite(value):
        return "not known"
    # Adding 0.0 keeps a rounded -0.000 from being read as worse.
    words = [f"{round(one, 3) + 0.0:+,.{3 if abs(one) < 10 else 0}f}" for one in (value, low, high)]
    return f"{words[0]} [{words[1]}, {words[2]}]" if math.isfinite(low) and math.isfinite(high) else words[0]


def _group_name(group: str, value: int) -> str:
    return f"the {THIRDS[value]} third" if group == "third" else f"phase {value}"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _run(rows: Mapping[int, Row]) -> dict[int, Row]:
    """The steps whose policies were run."""
    return _known(rows, "repw")


def _known(rows: Mapping[int, Row], *keys: str) -> dict[int, Row]:
    """The steps at which figures are numbers."""
    return {step: row for step, row in rows.items() if all(math.isfinite(number(row, key)) for key in keys)}


def _sorted(summary: Sequence[Row], steps: Sequence[int] | None = None) -> list[Row]:
    """Rows by predictor, TIPL first and the others as the summary names them, then by step."""
    named = dict.fromkeys((row["task"], row["predictor"], row["basis"]) for row in summary)
    order = sorted(named, key=lambda line: line[1] != "tipl")
    some = any(row["step"] in steps for row in summary) if steps is not None else False
    chosen = [row for row in summary if not some or steps is None or row["step"] in steps]
    return sorted(chosen, key=lambda row: (order.index((row["task"], row["predictor"], row["basis"])), row["step"]))


def _cells(row: Row) -> dict[str, str]:
    beats = number(row, "beats_last")
    return {
        "predictor": str(row["predictor"]),
        "basis": str(row["basis"]),
        "causal": "yes" if row["causal"] else "no",
        "h": str(row["step"]),
        "skill": _with_interval(row, "skill"),
        "WPE": _format("wpe", number(row, "wpe")),
        "REPW": _with_interval(row, "repw"),
        "noise floor": _format("repw", number(row, "repw_noise_floor")),
        "beats last": f"{beats:.0%}" if math.isfinite(beats) else "-",
        "windows": f"{row['windows']:,}",
    }


def _interval(row: Row, key: str, ends: str | None = None) -> tuple[float, float, float]:
    """A figure and its interval's ends."""
    return number(row, key), number(row, f"{ends or key}_low"), number(row, f"{ends or key}_high")


def _with_interval(row: Row, key: str) -> str:
    value, low, high = _interval(row, key)
    if not (math.isfinite(value) and math.isfinite(low) and math.isfinite(high)):
        return _format(key, value)
    return f"{_format(key, value)} [{_format(key, low)}, {_format(key, high)}]"


def _format(key: str, value: float) -> str:
    if not math.isfinite(value):
        return "-"
    if key == "repw":
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"
    # Adding 0.0 keeps a rounded -0.00 from being read as worse than copying.
    if key == "wpe":
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{round(value, 2) + 0.0:.2f}"


def _above(row: Row) -> str:
    difference = number(row, "repw") - number(row, "repw_noise_floor")
    return f"{_format('repw', abs(difference))} {'above' if difference >= 0 else 'below'}"


def steps_text(steps: Sequence[int]) -> str:
    """Steps as words: `h = 1 to 4 and 7`."""
    return f"h = {_ranges(steps)}"


def _ranges(values: Sequence[int]) -> str:
    """Whole numbers as words: `1 to 4 and 7`."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return _listed(
        [str(run[0]) if len(run) == 1 else f"{run[0]} {'to' if len(run) > 2 else 'and'} {run[-1]}" for run in runs]
    )
