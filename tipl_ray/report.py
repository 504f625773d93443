"""One page that answers: does the Transformer add anything over copying, over a ridge, over rank-1; where; and what
does that do to returns?

Turns a summary (rows as `metrics.summarise` makes them) into plain sentences, a table and one self-contained HTML
file. Negative findings are said as plainly as positive ones. Knows nothing of how the numbers were made.
"""

import base64
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jinja2

from tipl_ray import config

Row = Mapping[str, Any]
Verdict = Literal["yes", "partly", "no", "unknown"]

SHORT_STEPS = (1, 2, 5, 10)
COLUMNS = ("predictor", "basis", "causal", "h", "skill", "WPE", "REPW", "noise floor", "beats last", "windows")
RIVALS = {
    "ridge": "a ridge regression that knows the phase",
    "ridge-elsewhere": "the ridge regression of the tasks that it was trained on",
    "context-ridge": "a ridge regression on the context alone",
    "linear": "linear extrapolation",
    "rank-1": "rank-1 extrapolation",
    "rank-1-from-last": "rank-1 extrapolation from the last snapshot",
    "dmd": "dynamic mode decomposition",
}
"""Predictors that TIPL is asked to beat, in the order of the questions."""
FLOORS = ("svd-floor", "window-floor")
MOST_ALIKE = 0.9
"""Share of the true policies' distance to each other below which predicted ones are said to be too much alike."""
GROUPS = {"phase": "phase", "third": "third of training"}
THIRDS = ("first", "second", "last")
NO_FORECASTS = "The table holds no forecast of the Transformer to compare."
NO_POLICIES = "No policies were run, so nothing is known about returns."

CAPTIONS = {
    "figure_2": (
        "The paper's Figure 2",
        "Left: how far predicted weights are from the true ones (WPE) and how far their returns are (REPW), per "
        "forward step. Right: each point is one predicted policy; on the diagonal it returns what the true one does. "
        "TIPL says something only as far as its points lie closer to the diagonal than those of copying.",
    ),
    "skill_by_step": (
        "Skill per forward step",
        "Skill is the share of copying's squared error that a predictor takes away: 1 is perfect, 0 is no better than "
        "copying the last snapshot, below 0 is worse. Bands are confidence intervals over held-out trials.",
    ),
    "skill_over_ridge": (
        "What the Transformer adds to a ridge",
        "TIPL's skill less the ridge's on the same windows, overall and by phase: above 0 the Transformer has learned "
        "something that one linear regression per phase has not. Bands are intervals of the difference itself.",
    ),
    "skill_by_phase": (
        "Skill within a PPO iteration",
        "At phase 0 an iteration has just closed and what follows rests on a rollout that is not in the weights yet; "
        "at the other phases the next epochs reuse a rollout whose effect is already visible.",
    ),
    "skill_by_third": (
        "Skill by stage of training",
        "The same skill, with each held-out trial cut into thirds: early, middle and late learning.",
    ),
    "spread": (
        "Are predicted policies as different as true ones?",
        "A model whose modes have collapsed answers the same everywhere: its policies return alike, and lie closer to "
        "each other than the true ones do. Left: standard deviation of returns over the windows run. Right: mean "
        "distance between the policies of one trial's windows, as a share of the true ones'.",
    ),
    "learning_curves": (
        "The trials that were learned from",
        "Every thin line is one seeded PPO trial; its policy weights along the way are the data set.",
    ),
    "reconstruction": (
        "What the Temporal SVD keeps",
        "How much of a held-out trial's weights is lost when only the first D singular vectors of its own trajectory "
        "are kept.",
    ),
    "training_curves": (
        "Training the Transformer",
        "Loss on the training trials and on held-out validation trials; where the two part, the model memorises. With "
        "the paper's bases it is the squared error of tokens, with `window` the share of copying's squared error that "
        "is left: 1 is copying.",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A question that the experiment was made for, and what its numbers say."""

    question: str
    verdict: Verdict
    text: str


def write_report(
    path: str | Path,
    *,
    title: str,
    summary: Sequence[Row],
    figures: Mapping[str, str | Path],
    facts: Mapping[str, Any],
    configuration: Mapping[str, Any],
    commands: Mapping[str, str],
    files: Mapping[str, str],
    confidence: float = 0.95,
    comparisons: Sequence[Row] = (),
    groups: Sequence[Row] = (),
) -> Path:
    """Write the report as one HTML file that needs nothing beside it, and return its path.

    `figures` maps names of CAPTIONS to PNG files and keeps its order; `facts` are the few figures of the page's head;
    `configuration` may be nested; `commands` and `files` map what it is to the command or the path. `comparisons` and
    `groups` are the rows of `metrics.compare` and `metrics.group_skills`.
    Raises ValueError for a picture that has no caption.
    """
    unknown = [name for name in figures if name not in CAPTIONS]
    if unknown:
        raise ValueError(f"figures={unknown} have no caption; known are {sorted(CAPTIONS)}")
    path = Path(path)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    page = template.render(
        title=title,
        facts=facts,
        answers=answers(summary, confidence, comparisons, groups),
        pictures=[(*CAPTIONS[name], _embedded(file)) for name, file in figures.items()],
        columns=COLUMNS,
        tables={"short": _sorted(summary, SHORT_STEPS), "whole": _sorted(summary)},
        cells=_cells,
        confidence=f"{confidence:.0%}",
        configuration=list(config.flat(configuration)),
        commands=commands,
        files=files,
    )
    path.write_text(page, encoding="utf-8")
    return path


def format_table(summary: Sequence[Row]) -> str:
    """The result table for a terminal: steps 1, 2, 5 and 10, intervals in brackets."""
    rows = [_cells(row) for row in _sorted(summary, SHORT_STEPS)]
    widths = [max(len(line[column]) for line in [COLUMNS, *rows]) for column in range(len(COLUMNS))]
    lines = []
    for line in (COLUMNS, tuple("-" * width for width in widths), *rows):
        words = [cell.ljust(width) for cell, width in zip(line[:3], widths[:3], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(line[3:], widths[3:], strict=True)]
        lines.append("  ".join(words + numbers).rstrip())
    return "\n".join(lines)


def answers(
    summary: Sequence[Row],
    confidence: float = 0.95,
    comparisons: Sequence[Row] = (),
    groups: Sequence[Row] = (),
) -> list[Answer]:
    """What the tables say about TIPL, in sentences; only about the predictors that they hold."""
    return [
        beats_copying(summary, confidence),
        *(beats(summary, rival, comparisons) for rival in RIVALS if _of(summary, rival)),
        *([where_it_lies(groups)] if groups else []),
        returns_like_the_true_policy(summary),
        returns_closer_than_a_copy(summary),
        *([modes_are_kept(summary)] if _run(_of(summary, "tipl")) else []),
        *(basis_suffices(summary, floor) for floor in FLOORS if _of(summary, floor)),
    ]


def beats_copying(summary: Sequence[Row], confidence: float = 0.95) -> Answer:
    """Whether TIPL's skill lies above 0 with its whole interval, and at which steps."""
    rows = _of(summary, "tipl")
    better = [step for step, row in rows.items() if _number(row, "skill_low") > 0]
    worse = [step for step, row in rows.items() if _number(row, "skill_high") < 0]
    verdict, sentences = _judge(
        rows,
        better,
        worse,
        "skill_low",
        yes="It beats copying at {steps}.",
        undecided=f"At {{steps}} it does not: the {confidence:.0%} interval of its skill includes 0.",
        no="It is worse than copying at {steps}.",
    )
    sentences += _at_both_ends(rows, "Its skill is", lambda row: _with_interval(row, "skill"))
    if any(not row["causal"] for row in rows.values()):
        sentences.append(
            "Its basis was fitted on the whole trajectory, the future included, so this is not yet a forecast that "
            "could be made while a policy is being trained."
        )
    return Answer(
        question="Does the Transformer predict weights better than copying the last snapshot?",
        verdict=verdict,
        text=" ".join(sentences) or NO_FORECASTS,
    )


def beats(summary: Sequence[Row], rival: str, comparisons: Sequence[Row] = ()) -> Answer:
    """Whether TIPL's skill lies above a rival's, and at which steps.

    With `comparisons` the interval of the difference on the same windows decides; without, intervals must lie apart.
    """
    theirs, words = _of(summary, rival), RIVALS[rival]
    rows = {step: row for step, row in _of(summary, "tipl").items() if step in theirs}
    paired = {int(row["step"]): row for row in comparisons if row["against"] == rival and row["group"] == "all"}
    low, high = {}, {}
    for step, row in rows.items():
        if step in paired:
            low[step], high[step] = _number(paired[step], "difference_low"), _number(paired[step], "difference_high")
        else:
            low[step] = _number(row, "skill_low") - _number(theirs[step], "skill_high")
            high[step] = _number(row, "skill_high") - _number(theirs[step], "skill_low")
    verdict, sentences = _judge(
        rows,
        [step for step in rows if low[step] > 0],
        [step for step in rows if high[step] < 0],
        "skill_low",
        yes=f"It beats {words} at {{steps}}.",
        undecided=(
            "At {steps} it does not, as far as can be told: the interval of the difference includes 0."
            if paired
            else "At {steps} it does not, as far as can be told: the intervals of their skills overlap."
        ),
        no=f"It is worse than {words} at {{steps}}.",
    )
    sentences += _at_both_ends(
        rows,
        "Skill is",
        lambda row: f"{_with_interval(row, 'skill')} against {_with_interval(theirs[row['step']], 'skill')}",
    )
    if paired and rows:
        sentences += _at_both_ends(
            {step: paired[step] for step in rows if step in paired},
            "On the same windows the difference is",
            _difference,
        )
    return Answer(
        question=f"Does it predict weights better than {words}?",
        verdict=verdict,
        text=" ".join(sentences) or NO_FORECASTS,
    )


def where_it_lies(groups: Sequence[Row]) -> Answer:
    """In which phases and thirds TIPL's skill one step ahead lies above 0, and where it does not."""
    own = [row for row in groups if row["predictor"] == "tipl"]
    first = min((row["step"] for row in own), default=1)
    sentences, decided = [], []
    for group, words in GROUPS.items():
        rows = [row for row in own if row["group"] == group and row["step"] == first]
        if not rows:
            continue
        told = [f"{_with_interval(row, 'skill')} in {_group_name(group, int(row['value']))}" for row in rows]
        sentences.append(f"By {words}, skill at h = {first} is {_listed(told)}.")
        worse = [row for row in rows if _number(row, "skill_high") < 0]
        level = [row for row in rows if not _number(row, "skill_low") > 0 and row not in worse]
        for some, compared in ((worse, "is worse than"), (level, "cannot be told from")):
            if some:
                names = _listed([_group_name(group, int(row["value"])) for row in some])
                sentences.append(f"In {names} it {compared} copying.")
        decided += [_number(row, "skill_low") > 0 for row in rows]
    phases = {
        int(row["value"]): _number(row, "skill") for row in own if row["group"] == "phase" and row["step"] == first
    }
    inside = [value for phase, value in phases.items() if phase]
    if 0 in phases and inside and phases[0] < min(inside):
        sentences.append(
            "It is lowest where an iteration has just closed and the next one's rollout is not in the weights yet: "
            "most of what is foretold is the rest of an update on data that the weights have already met."
        )
    verdict: Verdict = "unknown" if not decided else "yes" if all(decided) else "partly" if any(decided) else "no"
    return Answer(
        question="Does it hold in every phase of a PPO iteration and at every stage of training?",
        verdict=verdict,
        text=" ".join(sentences) or NO_FORECASTS,
    )


def returns_like_the_true_policy(summary: Sequence[Row]) -> Answer:
    """How far TIPL's REPW lies above the noise floor: the true policy against itself on other episodes."""
    rows = _run(_of(summary, "tipl"))
    same = [step for step, row in rows.items() if _number(row, "repw_low") <= _number(row, "repw_noise_floor")]
    off = [step for step, row in rows.items() if _number(row, "repw_low") > _number(row, "repw_noise_floor")]
    verdict, sentences = _judge(
        rows,
        same,
        off,
        "repw_low",
        yes="At {steps} no difference can be told from the noise of the evaluation.",
        undecided="",
        no="They do not at {steps}: the difference lies above the noise floor with its whole interval.",
    )
    sentences += _at_both_ends(
        rows,
        "Returns differ by",
        lambda row: (
            f"{_with_interval(row, 'repw')} ({_above(row)} the noise floor of "
            f"{_format('repw', _number(row, 'repw_noise_floor'))})"
        ),
    )
    return Answer(
        question="Do the predicted policies return what the true ones return?",
        verdict=verdict,
        text=" ".join(sentences) or NO_POLICIES,
    )


def returns_closer_than_a_copy(summary: Sequence[Row]) -> Answer:
    """Whether TIPL's REPW lies below copy-last's, their intervals apart, and at which steps."""
    copied = _run(_of(summary, "copy-last"))
    rows = {step: row for step, row in _run(_of(summary, "tipl")).items() if step in copied}
    better = [step for step, row in rows.items() if _number(row, "repw_high") < _number(copied[step], "repw_low")]
    worse = [step for step, row in rows.items() if _number(row, "repw_low") > _number(copied[step], "repw_high")]
    verdict, sentences = _judge(
        rows,
        better,
        worse,
        "repw_low",
        yes="They do at {steps}.",
        undecided="At {steps} they do not, as far as can be told: the intervals of both REPWs overlap.",
        no="They return further from it than the copy at {steps}.",
    )
    sentences += _at_both_ends(
        rows,
        "REPW is",
        lambda row: f"{_with_interval(row, 'repw')} against copying's {_with_interval(copied[row['step']], 'repw')}",
    )
    if rows and math.isfinite(_number(rows[max(rows)], "beats_last")):
        sentences.append(
            f"At h = {max(rows)} the predicted policy returns more than the last snapshot in "
            f"{_number(rows[max(rows)], 'beats_last'):.0%} of windows, ties counted half."
        )
    return Answer(
        question="Do they return closer to the true policy than a copy of the last snapshot does?",
        verdict=verdict,
        text=" ".join(sentences) or NO_POLICIES,
    )


def modes_are_kept(summary: Sequence[Row]) -> Answer:
    """Whether predicted policies differ among each other as much as the true ones, in returns and in weights."""
    rows = _run(_of(summary, "tipl"))
    shares = {
        step: [
            _number(row, name) / (_number(row, f"{name}_true") or math.nan) for name in ("returns_spread", "distance")
        ]
        for step, row in rows.items()
    }
    verdict, sentences = _judge(
        rows,
        [step for step, (_, apart) in shares.items() if apart >= MOST_ALIKE],
        [step for step, (_, apart) in shares.items() if apart < MOST_ALIKE],
        "distance",
        yes="At {steps} the policies predicted from one trial's windows lie about as far apart as the true ones.",
        undecided="",
        no="At {steps} they lie closer together than the true ones, as where modes collapse.",
    )
    sentences += _at_both_ends(
        rows,
        "Their distance is",
        lambda row: (
            f"{shares[row['step']][1]:.0%} of the true policies', and the spread of their returns "
            f"{_format('repw', _number(row, 'returns_spread'))} against "
            f"{_format('repw', _number(row, 'returns_spread_true'))}"
        ),
    )
    return Answer(
        question="Do predicted policies differ as much as true ones, or do its modes collapse?",
        verdict=verdict,
        text=" ".join(sentences) or NO_POLICIES,
    )


def basis_suffices(summary: Sequence[Row], floor: str = "svd-floor") -> Answer:
    """What the basis alone costs: the skill of the true future projected on it, which bounds every predictor."""
    rows = _of(summary, floor)
    fit = [step for step, row in rows.items() if _number(row, "skill") >= 0.9]
    unfit = [step for step, row in rows.items() if _number(row, "skill") <= 0]
    verdict, sentences = _judge(
        rows,
        fit,
        unfit,
        "skill",
        yes="At {steps} it leaves less than a tenth of copying's error unreachable.",
        undecided="At {steps} it takes a tenth of copying's error or more out of any predictor's reach.",
        no="It does not at {steps}: copying the last snapshot is closer than the true future seen through this basis.",
    )
    if verdict == "no" and len(unfit) < len(rows):
        verdict = "partly"
    sentences += _at_both_ends(
        rows, "The true future, projected on it, has skill", lambda row: _with_interval(row, "skill")
    )
    return Answer(
        question="Does the basis keep enough of the weights to predict them?",
        verdict=verdict,
        text=" ".join(sentences),
    )


def _judge(
    rows: Mapping[int, Row],
    good: Sequence[int],
    bad: Sequence[int],
    decided_by: str,
    *,
    yes: str,
    undecided: str,
    no: str,
) -> tuple[Verdict, list[str]]:
    """The verdict over all steps, and a sentence for each group of steps: good, undecided, bad, without an interval."""
    known = [step for step, row in rows.items() if math.isfinite(_number(row, decided_by))]
    between = [step for step in known if step not in good and step not in bad]
    blind = [step for step in rows if step not in known]
    cases = ((good, yes), (between, undecided), (bad, no), (blind, "At {steps} there are too few trials to tell."))
    sentences = [sentence.format(steps=_steps_text(steps)) for steps, sentence in cases if steps]
    if not known:
        return "unknown", sentences
    if not good:
        return "no", sentences
    return "yes" if len(good) == len(rows) else "partly", sentences


def _at_both_ends(rows: Mapping[int, Row], start: str, words: Callable[[Row], str]) -> list[str]:
    ends = [f"{words(rows[step])} at h = {step}" for step in sorted({min(rows), max(rows)})] if rows else []
    return [f"{start} {' and '.join(ends)}."] if ends else []


def _of(summary: Sequence[Row], predictor: str) -> dict[int, Row]:
    """The predictor's rows by step; of several bases, the one that the summary names first."""
    own = [row for row in summary if row["predictor"] == predictor]
    return {int(row["step"]): row for row in _sorted(own) if row["basis"] == own[0]["basis"]}


def _difference(row: Row) -> str:
    names = ("skill_difference", "difference_low", "difference_high")
    value, low, high = (f"{round(_number(row, name), 3) + 0.0:+.3f}" for name in names)
    return f"{value} [{low}, {high}]"


def _group_name(group: str, value: int) -> str:
    return f"the {THIRDS[value]} third" if group == "third" else f"phase {value}"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _run(rows: Mapping[int, Row]) -> dict[int, Row]:
    """The steps whose policies were run."""
    return {step: row for step, row in rows.items() if math.isfinite(_number(row, "repw"))}


def _sorted(summary: Sequence[Row], steps: Sequence[int] | None = None) -> list[Row]:
    """Rows by predictor, TIPL first and the others as the summary names them, then by step."""
    named = dict.fromkeys((row["task"], row["predictor"], row["basis"]) for row in summary)
    order = sorted(named, key=lambda line: line[1] != "tipl")
    chosen = [row for row in summary if steps is None or row["step"] in steps]
    return sorted(chosen, key=lambda row: (order.index((row["task"], row["predictor"], row["basis"])), row["step"]))


def _cells(row: Row) -> tuple[str, ...]:
    beats = _number(row, "beats_last")
    return (
        str(row["predictor"]),
        str(row["basis"]),
        "yes" if row["causal"] else "no",
        str(row["step"]),
        _with_interval(row, "skill"),
        _format("wpe", _number(row, "wpe")),
        _with_interval(row, "repw"),
        _format("repw", _number(row, "repw_noise_floor")),
        f"{beats:.0%}" if math.isfinite(beats) else "-",
        f"{row['windows']:,}",
    )


def _with_interval(row: Row, key: str) -> str:
    value, low, high = (_number(row, name) for name in (key, f"{key}_low", f"{key}_high"))
    if not (math.isfinite(value) and math.isfinite(low) and math.isfinite(high)):
        return _format(key, value)
    return f"{_format(key, value)} [{_format(key, low)}, {_format(key, high)}]"


def _format(key: str, value: float) -> str:
    if not math.isfinite(value):
        return "-"
    if key == "repw":
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"
    # Adding 0.0 keeps a rounded -0.00 from being read as worse than copying.
    return f"{value:.2e}" if key == "wpe" else f"{round(value, 2) + 0.0:.2f}"


def _above(row: Row) -> str:
    difference = _number(row, "repw") - _number(row, "repw_noise_floor")
    return f"{_format('repw', abs(difference))} {'above' if difference >= 0 else 'below'}"


def _steps_text(steps: Sequence[int]) -> str:
    """Steps as words: `h = 1 to 4 and 7`."""
    runs: list[list[int]] = []
    for step in sorted(steps):
        if runs and step == runs[-1][-1] + 1:
            runs[-1].append(step)
        else:
            runs.append([step])
    words = [str(run[0]) if len(run) == 1 else f"{run[0]} {'to' if len(run) > 2 else 'and'} {run[-1]}" for run in runs]
    return "h = " + (words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}")


def _number(row: Row, key: str) -> float:
    value = row.get(key)
    return math.nan if value is None or value == "" else float(value)


def _embedded(png_file: str | Path) -> str:
    return "data:image/png;base64," + base64.b64encode(Path(png_file).read_bytes()).decode("ascii")
