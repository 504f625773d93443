"""Evaluate (Section 4): predicted weights compared with true ones, on the test trials, which nothing was fitted on.

First `fit_predictors`, on the training and validation trials. Then two kinds of work, each a plain function of one test
trial and sent out as Ray tasks: `forecast_errors` compares weights at every window; `forecast_returns` rolls out the
policies of a few windows. Together they are the result table, one row per (trial, start, predictor, step), from which
`metrics` computes WPE, skill and REPW. `reconstruction_rows` and `path_table` are for figures.

T snapshots, B windows, H forward steps, P policy weights, E episodes, N policies.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import ray

from tipl_ray.config import Experiment
from tipl_ray.data.snapshots import Trajectory
from tipl_ray.data.storage import StoreError, file_exists, join, last_name, publish, read_published, write_file
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.digest import digest, identity
from tipl_ray.evaluate import metrics
from tipl_ray.evaluate.metrics import Table
from tipl_ray.pages import as_csv
from tipl_ray.paper.temporal_svd import fit_basis, reconstruction_error
from tipl_ray.ppo.engines import choose_engine, make_learner
from tipl_ray.ppo.returns import policy_returns
from tipl_ray.ppo.trials import network_shape
from tipl_ray.predict.bands import load_band
from tipl_ray.predict.blocks import one_thread
from tipl_ray.predict.gram import Question, squared_errors
from tipl_ray.predict.models import load_about
from tipl_ray.predict.predictor import Predictor, Trial, Trials, Weights
from tipl_ray.predict.representation import load_tipl, representation_in, representation_of
from tipl_ray.predict.saved import load_fitted, save_fitted
from tipl_ray.registry import PREDICTORS
from tipl_ray.resources import require_resources
from tipl_ray.terminal import say

RECONSTRUCTION_RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
"""SVD ranks whose reconstruction error is reported."""
NUM_PATHS, FORECASTS_PER_PATH = 3, 8
"""Test trials whose paths are drawn, and forecasts of TIPL on each."""
FITTED_FILE, PATHS_FILE, RESULTS_FILE = "predictors.safetensors", "paths.parquet", "results.parquet"
RECONSTRUCTION_FILE = "reconstruction.json"
RECORD_FILE = "results.sha256"
"""Digests of the four, as they were published."""
DISTANCE_COLUMNS = ("distance_true", "distance_predicted")
RETURN_COLUMNS = ("return_true", "return_true_again", "return_predicted", "return_last")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The findings of an evaluation."""

    folder: str
    results: Table
    """One row per trial, start, predictor and step."""
    summary: list[dict]
    """One row per predictor and step: WPE, skill, REPW, with their intervals."""
    groups: list[dict]
    """One row per predictor, step and phase, and per predictor, step and third of training: skill."""
    comparisons: list[dict]
    """One row per predictor that TIPL is compared with and step: TIPL's skill less the other's, window by window."""
    reconstruction: list[dict]
    """One row per trial and SVD rank: what the rank leaves out."""
    paths: Table | None
    """See `path_table`; None for an evaluation by an earlier version."""


def window_starts(experiment: Experiment) -> np.ndarray:
    """Snapshots that can be a window's last known one: a context before it, the furthest forward step after it."""
    question = Question.of(experiment)
    return np.arange(question.context, experiment.num_snapshots - question.future)


def run_starts(experiment: Experiment) -> np.ndarray:
    """The starts whose policies are run: evenly spaced, so that phases and stages of training all have their share."""
    starts = window_starts(experiment)
    count = min(experiment.evaluate.windows_per_trial, len(starts))
    return starts[np.linspace(0, len(starts) - 1, count).round().astype(int)]


def make_predictors(experiment: Experiment, model_folders: Sequence[str]) -> list[Predictor]:
    """Every predictor that is compared, TIPL as it was trained among them, and its upper bound, if any, last; not
    fitted.

    Several models are those of several seeds. Raises StoreError for a model that is missing or damaged, ValueError for
    two predictors of one name.
    """
    question, elsewhere = Question.of(experiment), bool(experiment.train.data)
    tipls = [load_tipl(folder, question) for folder in model_folders]
    for seed, tipl in enumerate(tipls):
        tipl.seed = seed
    others, upper_bound = representation_in(model_folders[0]).companions(tipls[0], elsewhere=elsewhere)
    bounds = [upper_bound] if upper_bound else []
    own = [kind(question) for kind in map(PREDICTORS.load, PREDICTORS.own) if kind.in_tables]
    outside = [PREDICTORS.load(name)(question) for name in experiment.evaluate.predictors]
    names = [one.name for one in (*own, *outside, *others, tipls[0], *bounds)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"evaluate.predictors: two predictors are called {name!r}; rename yours")
    return [*own, *outside, *others, *tipls, *bounds]


@one_thread()
def fit_predictors(experiment: Experiment, model_folders: Sequence[str]) -> bytes:
    """Fit every predictor on the training trials, its settings on the validation trials; for `load_fitted` to read.

    Test trials are not read.
    """
    question, store = Question.of(experiment), TrajectoryStore(experiment.storage_path)
    predictors = make_predictors(experiment, model_folders)
    training, validation = (
        Trials(
            bands=[load_band(experiment.storage_path, seed, question) for seed in seeds],
            weights=lambda seeds=seeds: _read_weights(experiment, seeds),  # type: ignore[misc]  # mypy: lambda defaults
        )
        for seeds in map(store.sound, (experiment.train_seeds, experiment.validation_seeds))
    )
    for predictor in predictors:
        predictor.fit(training, validation)
    return save_fitted(predictors)


@one_thread()
def forecast_errors(experiment: Experiment, model_folders: Sequence[str], fitted: bytes, seed: int) -> Table:
    """Squared errors of every predictor at every window of a trial, and the distances between the policies of the
    windows that are rolled out; the return columns are NaN."""
    question, starts_B = Question.of(experiment), window_starts(experiment)
    (weights_TP,) = _read_weights(experiment, [seed])
    trial = Trial(weights_TP=weights_TP, band=load_band(experiment.storage_path, seed, question))
    windows_BNN = trial.band.windows(starts_B, question.context, question.future)
    still_BHK = np.zeros((len(starts_B), len(question.steps), question.context))
    displacements_BH = squared_errors(windows_BNN, still_BHK, question.steps)
    run_B = run_starts(experiment)
    apart_BH = _distances(weights_TP[run_B[:, None] + np.asarray(question.steps)])
    tables = []
    for one in _fitted_predictors(experiment, model_folders, fitted):
        measured = {"squared_error": one.squared_errors(trial, starts_B), "displacement_squared": displacements_BH}
        for name in DISTANCE_COLUMNS:
            measured[name] = np.full(displacements_BH.shape, np.nan)
        if one.name in experiment.evaluate.run_policies_of:
            rows = np.searchsorted(starts_B, run_B)
            measured["distance_true"][rows] = apart_BH
            measured["distance_predicted"][rows] = _distances(one.forecast(trial, run_B))
        tables.append(_rows(experiment, one, seed, starts_B, weights_TP.shape[1], measured))
    return _concatenate(tables)


def _distances(policies_BHP: Weights) -> np.ndarray:
    """Mean distance of each of B policies to the others at the same forward step; (B, H)."""
    means = []
    for policies_BP in policies_BHP.transpose(1, 0, 2).astype(np.float64):
        gram_BB = policies_BP @ policies_BP.T
        squares_B = gram_BB.diagonal()
        apart_BB = np.sqrt(np.maximum(squares_B[:, None] + squares_B - 2.0 * gram_BB, 0.0))
        means.append(apart_BB.sum(axis=1) / max(1, len(gram_BB) - 1))
    return np.stack(means, axis=1)


@one_thread()
def forecast_returns(
    experiment: Experiment,
    model_folders: Sequence[str],
    fitted: bytes,
    seed: int,
    every_N: np.ndarray,
    part: slice = slice(None),
) -> Table:
    """Returns of true and predicted policies at a part of a trial's windows, one row per start, predictor and step.

    Forecasts are made for every window, whatever the part: their last bits depend on how many are made at once.
    """
    starts_B = every_N[part]
    trajectory, question = TrajectoryStore(experiment.storage_path).trajectory(seed), Question.of(experiment)
    weights_TP, num_steps = trajectory.weights_TP, len(question.steps)
    trial = Trial(weights_TP=weights_TP, band=load_band(experiment.storage_path, seed, question))
    future_BH = starts_B[:, None] + np.asarray(question.steps)
    last_BH = np.repeat(starts_B[:, None], num_steps, axis=1)
    run = _Runner(experiment, trajectory)
    last_return_BH = np.repeat(run(weights_TP[starts_B], starts_B, 0)[:, None], num_steps, axis=1)
    truth_BH, again_BH = (
        run(weights_TP[future_BH.ravel()], future_BH.ravel(), s).reshape(future_BH.shape) for s in (0, 1)
    )
    tables = []
    for predictor in _fitted_predictors(experiment, model_folders, fitted):
        if predictor.name not in experiment.evaluate.run_policies_of:
            continue
        predicted_BH = last_return_BH
        if predictor.name != "copy-last":
            forecast_NP = predictor.forecast(trial, every_N)[part].reshape(-1, weights_TP.shape[1])
            # Weights without observation statistics are no policy; a forecast takes the last that are known.
            predicted_BH = run(forecast_NP, last_BH.ravel(), 0).reshape(future_BH.shape)
        found = (truth_BH, again_BH, predicted_BH, last_return_BH)
        returns = {name: r.ravel() for name, r in zip(RETURN_COLUMNS, found, strict=True)}
        tables.append({**_keys(predictor, seed, starts_B, question.steps), **returns})
    return _concatenate(tables)


def _fitted_predictors(experiment: Experiment, model_folders: Sequence[str], fitted: bytes) -> list[Predictor]:
    predictors = make_predictors(experiment, model_folders)
    load_fitted(predictors, fitted)
    return predictors


def _read_weights(experiment: Experiment, seeds: Sequence[int]) -> Iterator[Weights]:
    store = TrajectoryStore(experiment.storage_path)
    for seed in seeds:
        yield store.trajectory(seed, columns=["weights"]).weights_TP


class _Runner:
    """Mean returns of policies of one trial, on the evaluation's episodes or, as `again`, on as many others."""

    def __init__(self, experiment: Experiment, trajectory: Trajectory):
        self._experiment, self._trajectory = experiment, trajectory
        shape = network_shape(experiment.collect)
        self._learner = make_learner(choose_engine("auto", experiment.ppo), shape, experiment.ppo)

    def __call__(self, weights_NP: np.ndarray, statistics_N: np.ndarray, again: int) -> np.ndarray:
        """(N,) mean returns with the observation statistics of the snapshots statistics_N; NaN for weights that are not
        finite, which are no policy: MuJoCo would start their episodes again and again, and return something."""
        finite_N = np.isfinite(weights_NP).all(axis=1)
        means_N = np.full(len(weights_NP), np.nan)
        if finite_N.any():
            means_N[finite_N] = self._run(weights_NP[finite_N], statistics_N[finite_N], again)
        return means_N

    def _run(self, weights_NP: np.ndarray, statistics_N: np.ndarray, again: int) -> np.ndarray:
        evaluate = self._experiment.evaluate
        seeds = np.random.SeedSequence([evaluate.seed, again]).generate_state(evaluate.episodes)
        returns_NE = policy_returns(
            self._experiment.collect.task,
            self._learner,
            weights_NP,
            self._trajectory.observation_means_TO[statistics_N],
            self._trajectory.observation_variances_TO[statistics_N],
            [int(seed) for seed in seeds],
            sampled_actions=evaluate.sampled_actions,
            task_options=self._experiment.collect.task_options,
        )
        return returns_NE.mean(axis=1)


def reconstruction_rows(experiment: Experiment, seed: int) -> list[dict]:
    """What each SVD rank leaves out of a trial."""
    weights_TP = TrajectoryStore(experiment.storage_path).trajectory(seed, columns=["weights"]).weights_TP
    ranks = [rank for rank in RECONSTRUCTION_RANKS if rank <= min(weights_TP.shape)]
    errors = reconstruction_error(weights_TP, ranks)
    return [
        {"trial": seed, "rank": int(rank), "energy_outside": float(energy), "mse": float(mse)}
        for rank, energy, mse in zip(*errors.values(), strict=True)
    ]


@one_thread()
def path_table(experiment: Experiment, model_folders: Sequence[str], fitted: bytes, seed: int) -> Table:
    """A trial's snapshots in the plane of the first two singular directions of its centred trajectory, with TIPL's
    forecasts in the same plane.

    One row per point: `start` is -1 for the trial's own snapshots, else the last snapshot that a forecast is made from;
    `share_x` and `share_y` are the shares of the trajectory's variance along both directions.
    """
    trajectory, question = TrajectoryStore(experiment.storage_path).trajectory(seed), Question.of(experiment)
    weights_TP, returns_T = trajectory.weights_TP, trajectory.episodic_returns_T
    basis = fit_basis(weights_TP, 2, centred=True)
    energy = float(sum(np.square(row_P - basis.origin_P, dtype=np.float64).sum() for row_P in weights_TP))
    trial = Trial(weights_TP=weights_TP, band=load_band(experiment.storage_path, seed, question))
    tipl = next(one for one in _fitted_predictors(experiment, model_folders, fitted) if one.name == "tipl")
    starts_B = window_starts(experiment)
    starts_B = starts_B[np.linspace(0, len(starts_B) - 1, min(FORECASTS_PER_PATH, len(starts_B))).round().astype(int)]
    forecasts_BHP = tipl.forecast(trial, starts_B)[:, : experiment.evaluate.horizon]
    steps_H = np.asarray(question.steps[: experiment.evaluate.horizon])
    points_TD = basis.coordinates_TD * basis.singular_values_D
    forecast_ND = basis.encode(forecasts_BHP.reshape(-1, weights_TP.shape[1])) * basis.singular_values_D
    x_N, y_N = np.concatenate([points_TD, forecast_ND]).T
    share_D = np.square(basis.singular_values_D) / (energy or 1.0)
    size = len(x_N)
    return {
        "trial": np.full(size, seed, dtype=np.int64),
        "start": np.concatenate([np.full(len(points_TD), -1), np.repeat(starts_B, len(steps_H))]).astype(np.int32),
        "snapshot": np.concatenate([np.arange(len(points_TD)), (starts_B[:, None] + steps_H).ravel()]).astype(np.int32),
        "x": x_N.astype(np.float32),
        "y": y_N.astype(np.float32),
        "episodic_return": np.concatenate([returns_T, np.full(len(forecast_ND), np.nan)]).astype(np.float64),
        "share_x": np.full(size, share_D[0]),
        "share_y": np.full(size, share_D[1]),
    }


def evaluation_folder(experiment: Experiment, model_folders: Sequence[str]) -> str:
    """Folder of the evaluation of models, named by a digest of all that its figures depend on."""
    models, evaluate = [last_name(folder) for folder in model_folders], identity(experiment.evaluate)
    sources = [PREDICTORS.source_digest(name) for name in experiment.evaluate.predictors]
    told = (models, evaluate, experiment.test_seeds, choose_engine("auto", experiment.ppo))
    # A model that was trained on these very trials has their digest in its name.
    store = TrajectoryStore(experiment.storage_path)
    own = [store.digest(experiment.collect.seeds)] if experiment.train.data else []
    forecasts = representation_of(experiment.basis).forecasts(experiment.model)
    name = digest(*told, *([sources] if sources else []), *own, *([forecasts] if forecasts else []))
    return join(experiment.storage_path, "evaluations", name)


def is_evaluated(folder: str) -> bool:
    """Whether an evaluation's folder has all results that take the cluster to compute."""
    return _found(folder) is not None


def evaluate(
    experiment: Experiment,
    model_folders: Sequence[str],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Evaluate trained models, one per seed, on the test trials, on a connected Ray cluster; at once if that was done
    before.

    `on_progress` is called with the number of finished tasks and their total.
    """
    folder = evaluation_folder(experiment, model_folders)
    make_predictors(experiment, model_folders)  # a damaged model is refused here, not in a task
    found = _found(folder)
    if found is None:
        if file_exists(folder, RECONSTRUCTION_FILE):
            say(f"evaluate: the results in {folder} are damaged and are computed again")
        require_resources({"CPU": (1.0, "evaluate")}, "task")
        try:
            fitted = ray.get(ray.remote(fit_predictors).remote(experiment, model_folders))
            brought = _gather(_send(experiment, model_folders, fitted), on_progress)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        results = _concatenate(brought["errors"])
        if "returns" in brought:
            results = _join(results, _concatenate(brought["returns"]))
        reconstruction = [row for of_trial in brought["reconstruction"] for row in of_trial]
        files = {RESULTS_FILE: _as_parquet(results), RECONSTRUCTION_FILE: json.dumps(reconstruction).encode()}
        paths = _as_parquet(_concatenate(brought["paths"]))
        publish(folder, {FITTED_FILE: fitted, PATHS_FILE: paths, **files}, RECORD_FILE)
        found = _from_parquet(files[RESULTS_FILE]), reconstruction
    results, reconstruction = found
    resampling = metrics.Resampling.of(experiment.evaluate)
    evaluation = Evaluation(
        folder=folder,
        results=results,
        summary=metrics.summarise(
            results, resampling, trained_on=load_about(model_folders[0]).get("trained_on", experiment.collect.task)
        ),
        groups=metrics.group_skills(results, resampling),
        comparisons=metrics.compare(results, "tipl", resampling),
        reconstruction=reconstruction,
        paths=_found_paths(folder),
    )
    for name in ("summary", "groups", "comparisons"):
        write_file(folder, f"{name}.csv", as_csv(getattr(evaluation, name)))
    return evaluation


def _send(experiment: Experiment, model_folders: Sequence[str], fitted: bytes) -> dict[ray.ObjectRef, str]:
    """Every task, and what it brings: `errors`, `returns`, `reconstruction` or `paths`."""
    sent: dict[ray.ObjectRef, str] = {}
    # Fitting a basis takes seconds at full scale, so a trial's windows are cut no finer than keeps the CPUs busy.
    num_cpus = int(ray.cluster_resources().get("CPU", 1))
    test_seeds = TrajectoryStore(experiment.storage_path).sound(experiment.test_seeds)
    starts_B = run_starts(experiment)
    size = -(-len(starts_B) // max(1, min(len(starts_B), -(-2 * num_cpus // len(test_seeds)))))
    parts = [slice(begin, begin + size) for begin in range(0, len(starts_B), size)]
    kept = ray.put(fitted)
    for seed in test_seeds:
        for part in parts if experiment.evaluate.run_policies_of else ():
            sent[ray.remote(forecast_returns).remote(experiment, model_folders, kept, seed, starts_B, part)] = "returns"
        sent[ray.remote(forecast_errors).remote(experiment, model_folders, kept, seed)] = "errors"
        sent[ray.remote(reconstruction_rows).remote(experiment, seed)] = "reconstruction"
    for seed in test_seeds[:NUM_PATHS]:
        sent[ray.remote(path_table).remote(experiment, model_folders, kept, seed)] = "paths"
    return sent


def _gather(sent: dict[ray.ObjectRef, str], on_progress: Callable[[int, int], None]) -> dict[str, list]:
    """The tasks' results by kind, in the order in which they were sent."""
    waiting, brought = list(sent), {}
    while waiting:
        ready, waiting = ray.wait(waiting, num_returns=1, timeout=1.0)
        for reference in ready:
            brought[reference] = ray.get(reference)
        on_progress(len(brought), len(sent))
    return {kind: [brought[one] for one in sent if sent[one] == kind] for kind in dict.fromkeys(sent.values())}


def _rows(
    experiment: Experiment, predictor: Predictor, seed: int, starts_B: np.ndarray, num_weights: int, measured: Table
) -> Table:
    keys = _keys(predictor, seed, starts_B, experiment.evaluate.steps)
    size, starts = len(keys["start"]), keys["start"]
    nothing = np.full(size, np.nan)
    return {
        "task": np.full(size, experiment.collect.task),
        **keys,
        "phase": (starts % experiment.snapshots_per_iteration).astype(np.int16),
        "third": np.minimum(3 * starts // experiment.num_snapshots, 2).astype(np.int8),
        "basis": np.full(size, predictor.basis),
        "causal": np.full(size, predictor.causal),
        "num_weights": np.full(size, num_weights, dtype=np.int32),
        **{name: column_BH.ravel() for name, column_BH in measured.items()},
        **dict.fromkeys(RETURN_COLUMNS, nothing),
    }


def _keys(predictor: Predictor, seed: int, starts_B: np.ndarray, steps_H: Sequence[int]) -> Table:
    size = len(starts_B) * len(steps_H)
    return {
        "trial": np.full(size, seed, dtype=np.int64),
        "start": np.repeat(starts_B, len(steps_H)).astype(np.int32),
        "predictor": np.full(size, predictor.name),
        "predictor_seed": np.full(size, predictor.seed, dtype=np.int16),
        "step": np.tile(np.asarray(steps_H, dtype=np.int16), len(starts_B)),
    }


def _join(errors: Table, returns: Table) -> Table:
    """The errors' rows, with the returns filled in where there are any."""
    keys = ("trial", "start", "predictor", "predictor_seed", "step")
    both = [np.unique(np.concatenate([errors[name], returns[name]]), return_inverse=True) for name in keys]
    codes = np.ravel_multi_index([code for _, code in both], [len(values) for values, _ in both])
    all_rows, wanted = codes[: len(errors["step"])], codes[len(errors["step"]) :]
    order = np.argsort(all_rows)
    rows = order[np.searchsorted(all_rows, wanted, sorter=order)]
    assert (all_rows[rows] == wanted).all(), "policies are run at windows whose weights are compared"
    filled = {name: errors[name].copy() for name in RETURN_COLUMNS}
    for name, column in filled.items():
        column[rows] = returns[name]
    # A predictor that fails at some windows is not represented by the others.
    lines = [np.unique(errors[name], return_inverse=True)[1] for name in ("predictor", "predictor_seed", "step")]
    _, line_of_row = np.unique(np.stack(lines), axis=1, return_inverse=True)
    failed = np.bincount(line_of_row, ~np.isfinite(errors["squared_error"])) > 0
    filled["return_predicted"][failed[line_of_row]] = np.nan
    return {**errors, **filled}


def _concatenate(tables: Sequence[Table]) -> Table:
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def _found(folder: str) -> tuple[Table, list[dict]] | None:
    """Result table and reconstruction errors of an evaluation that was made; None where there is none, or a damaged
    one."""
    try:
        results, reconstruction = (
            read_published(folder, name, RECORD_FILE, "it is computed again")
            for name in (RESULTS_FILE, RECONSTRUCTION_FILE)
        )
        return _from_parquet(results), json.loads(reconstruction)
    except (StoreError, ValueError, OSError):
        return None


def _found_paths(folder: str) -> Table | None:
    """The paths of an evaluation; None where there are none, or they are damaged."""
    try:
        return _from_parquet(read_published(folder, PATHS_FILE, RECORD_FILE, "it is left out"))
    except (StoreError, ValueError, OSError):
        return None


def _as_parquet(table: Table) -> bytes:
    columns = {key: pa.array(column, from_pandas=True) for key, column in table.items()}
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def _from_parquet(content: bytes) -> Table:
    table = pyarrow.parquet.read_table(pa.BufferReader(content))
    return {column: _to_numpy(table[column]) for column in table.column_names}


def _to_numpy(column: pa.ChunkedArray) -> np.ndarray:
    """A column as an array; equal strings are one object, as there are millions of them."""
    if not pa.types.is_string(column.type):
        return column.to_numpy()
    encoded = column.combine_chunks().dictionary_encode()
    return encoded.dictionary.to_numpy(zero_copy_only=False)[encoded.indices.to_numpy()]
