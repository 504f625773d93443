"""Evaluate (Section 4): predicted weights against true ones, on the trials that nothing was fitted on.

Two kinds of work, each a plain function of one trial and sent out as Ray tasks: `forecast_errors` compares weights at
every window; `forecast_returns` runs the policies of a few windows. Together they are the result table, one row per
(trial, start, predictor, step), from which `metrics` computes WPE, skill and REPW.

T snapshots, B windows, H forward steps, P policy weights, E episodes, N policies.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import ray
import torch

from tipl_ray import metrics
from tipl_ray.config import Experiment, as_table, digest
from tipl_ray.files import file_exists, read_file, write_file
from tipl_ray.forecasting import CopyLast, Linear, Predictor, SvdFloor, Tipl
from tipl_ray.learner import choose_engine, make_learner
from tipl_ray.metrics import Table
from tipl_ray.ppo import network_shape
from tipl_ray.returns import policy_returns
from tipl_ray.temporal_svd import reconstruction_error
from tipl_ray.trajectory_store import Trajectory, TrajectoryStore

FORECAST_BYTES = 256 * 2**20
"""Limit of the forecasts (B, H, P) held at once."""
RECONSTRUCTION_RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
"""SVD ranks whose reconstruction error is reported."""
RETURN_COLUMNS = ("return_true", "return_true_again", "return_predicted", "return_last")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What an evaluation found."""

    folder: str
    """Where it lies."""
    results: Table
    """One row per trial, start, predictor and step."""
    summary: list[dict]
    """One row per predictor and step: WPE, skill, REPW, with their intervals."""
    reconstruction: list[dict]
    """One row per trial and SVD rank: what the rank leaves out."""


def make_predictors(model_folder: str) -> list[Predictor]:
    """Every predictor that is compared, TIPL as it was trained among them."""
    tipl = Tipl.load(model_folder)
    return [CopyLast(), Linear(), tipl, SvdFloor(tipl.trial_basis)]


def window_starts(experiment: Experiment) -> np.ndarray:
    """Snapshots that can be a window's last known one: a context up to it, a horizon after it."""
    return np.arange(experiment.model.context - 1, experiment.num_snapshots - experiment.evaluate.horizon)


def run_starts(experiment: Experiment) -> np.ndarray:
    """The starts whose policies are run: evenly spaced, so that phases and stages of training all have their share."""
    starts = window_starts(experiment)
    count = min(experiment.evaluate.windows_per_trial, len(starts))
    return starts[np.linspace(0, len(starts) - 1, count).round().astype(int)]


def forecast_errors(experiment: Experiment, model_folder: str, seed: int) -> Table:
    """Squared errors of every predictor at every window of a trial; the return columns are NaN."""
    torch.set_num_threads(1)
    weights_TP = TrajectoryStore(experiment.storage_path).trajectory(seed, columns=["weights"]).weights_TP
    horizon, tables = experiment.evaluate.horizon, []
    num_weights = weights_TP.shape[1]
    batch = max(1, FORECAST_BYTES // (4 * horizon * num_weights))
    for predictor in make_predictors(model_folder):
        for starts_B in _cut(window_starts(experiment), batch):
            truth_BHP = weights_TP[starts_B[:, None] + np.arange(1, horizon + 1)]
            errors_BH = _squared_norm(predictor.forecast(weights_TP, starts_B, horizon) - truth_BHP)
            displacements_BH = _squared_norm(truth_BHP - weights_TP[starts_B][:, None])
            tables.append(_rows(experiment, predictor, seed, starts_B, num_weights, errors_BH, displacements_BH))
    return _concatenate(tables)


def forecast_returns(experiment: Experiment, model_folder: str, seed: int, starts_B: np.ndarray) -> Table:
    """Returns of true and predicted policies at some windows of a trial, one row per start, predictor and step."""
    torch.set_num_threads(1)
    trajectory = TrajectoryStore(experiment.storage_path).trajectory(seed)
    horizon, weights_TP = experiment.evaluate.horizon, trajectory.weights_TP
    future_BH = starts_B[:, None] + np.arange(1, horizon + 1)
    last_B, last_BH = starts_B, np.repeat(starts_B[:, None], horizon, axis=1)
    run = _Runner(experiment, trajectory)
    last_return_BH = np.repeat(run(weights_TP[last_B], last_B, 0)[:, None], horizon, axis=1)
    truth_BH, again_BH = (
        run(weights_TP[future_BH.ravel()], future_BH.ravel(), s).reshape(future_BH.shape) for s in (0, 1)
    )
    tables = []
    for predictor in make_predictors(model_folder):
        predicted_BH = last_return_BH
        if not isinstance(predictor, CopyLast):
            forecast_NP = predictor.forecast(weights_TP, starts_B, horizon).reshape(-1, weights_TP.shape[1])
            # Weights without observation statistics are no policy; a forecast takes the last that are known.
            predicted_BH = run(forecast_NP, last_BH.ravel(), 0).reshape(future_BH.shape)
        keys = _keys(predictor, seed, starts_B, horizon)
        found = (truth_BH, again_BH, predicted_BH, last_return_BH)
        tables.append({**keys, **{name: r.ravel() for name, r in zip(RETURN_COLUMNS, found, strict=True)}})
    return _concatenate(tables)


class _Runner:
    """Mean returns of policies of one trial, on the evaluation's episodes or, as `again`, on as many others."""

    def __init__(self, experiment: Experiment, trajectory: Trajectory):
        self._experiment, self._trajectory = experiment, trajectory
        shape = network_shape(experiment.collect)
        self._learner = make_learner(choose_engine("auto", experiment.ppo), shape, experiment.ppo)

    def __call__(self, weights_NP: np.ndarray, statistics_N: np.ndarray, again: int) -> np.ndarray:
        """(N,) mean returns with the observation statistics of the snapshots statistics_N."""
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
        )
        return returns_NE.mean(axis=1)


def reconstruction_rows(experiment: Experiment, seed: int) -> list[dict]:
    """What each SVD rank leaves out of a trial."""
    weights_TP = TrajectoryStore(experiment.storage_path).trajectory(seed, columns=["weights"]).weights_TP
    ranks = [rank for rank in RECONSTRUCTION_RANKS if rank <= min(weights_TP.shape)]
    errors = reconstruction_error(weights_TP, ranks, experiment.basis.centred, experiment.basis.deltas)
    return [
        {"trial": seed, "rank": int(rank), "energy_outside": float(energy), "mse": float(mse)}
        for rank, energy, mse in zip(*errors.values(), strict=True)
    ]


def evaluation_folder(experiment: Experiment, model_folder: str) -> str:
    """Where the evaluation of a model lies: a name made of all that its figures depend on."""
    evaluate = as_table(experiment.evaluate)
    name = digest(
        model_folder.rsplit("/", 1)[-1], evaluate, experiment.test_seeds, choose_engine("auto", experiment.ppo)
    )
    return f"{experiment.storage_path}/evaluations/{name}"


def evaluate(
    experiment: Experiment, model_folder: str, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Evaluation:
    """Judge a trained model on the test trials, on a connected Ray cluster; at once if that was done before.

    `on_progress` is told the tasks that are done and their total.
    """
    folder = evaluation_folder(experiment, model_folder)
    if not file_exists(folder, "reconstruction.json"):
        errors, returns, reconstruction = _gather(_send(experiment, model_folder), on_progress)
        results = _join(_concatenate(errors), _concatenate(returns))
        _write_parquet(folder, "results.parquet", results)
        write_file(folder, "reconstruction.json", json.dumps([row for rows in reconstruction for row in rows]).encode())
    results = _read_parquet(folder, "results.parquet")
    settings = experiment.evaluate
    summary = metrics.summarise(
        results,
        confidence=settings.confidence,
        bootstrap=settings.bootstrap,
        seed=settings.seed,
        trained_on=experiment.collect.task,
    )
    sink = pa.BufferOutputStream()
    pyarrow.csv.write_csv(pa.Table.from_pylist(summary), sink)
    write_file(folder, "summary.csv", sink.getvalue().to_pybytes())
    reconstruction = json.loads(read_file(folder, "reconstruction.json"))
    return Evaluation(folder=folder, results=results, summary=summary, reconstruction=reconstruction)


def _send(experiment: Experiment, model_folder: str) -> dict[ray.ObjectRef, int]:
    """Every task, and the kind of what it brings: 0 errors, 1 returns, 2 reconstruction."""
    sent: dict[ray.ObjectRef, int] = {}
    # Fitting a basis takes seconds at full scale, so a trial's windows are cut no finer than keeps the CPUs busy.
    num_cpus = int(ray.cluster_resources().get("CPU", 1))
    chunks = min(len(run_starts(experiment)), -(-2 * num_cpus // len(experiment.test_seeds)))
    for seed in experiment.test_seeds:
        for starts_B in np.array_split(run_starts(experiment), chunks):
            sent[ray.remote(forecast_returns).remote(experiment, model_folder, seed, starts_B)] = 1
        sent[ray.remote(forecast_errors).remote(experiment, model_folder, seed)] = 0
        sent[ray.remote(reconstruction_rows).remote(experiment, seed)] = 2
    return sent


def _gather(sent: dict[ray.ObjectRef, int], on_progress: Callable[[int, int], None]) -> tuple[list, list, list]:
    waiting, brought = list(sent), {}
    while waiting:
        ready, waiting = ray.wait(waiting, num_returns=1, timeout=1.0)
        for reference in ready:
            brought[reference] = ray.get(reference)
        on_progress(len(brought), len(sent))
    return tuple([brought[reference] for reference in sent if sent[reference] == kind] for kind in range(3))  # type: ignore[return-value]


def _rows(
    experiment: Experiment,
    predictor: Predictor,
    seed: int,
    starts_B: np.ndarray,
    num_weights: int,
    errors_BH: np.ndarray,
    displacements_BH: np.ndarray,
) -> Table:
    keys = _keys(predictor, seed, starts_B, errors_BH.shape[1])
    size, starts = len(keys["start"]), keys["start"]
    nothing = np.full(size, np.nan)
    return {
        "task": np.full(size, experiment.collect.task),
        **keys,
        "phase": (starts % experiment.snapshots_per_iteration).astype(np.int8),
        "third": np.minimum(3 * starts // experiment.num_snapshots, 2).astype(np.int8),
        "basis": np.full(size, predictor.basis),
        "causal": np.full(size, predictor.causal),
        "num_weights": np.full(size, num_weights, dtype=np.int32),
        "squared_error": errors_BH.ravel(),
        "displacement_squared": displacements_BH.ravel(),
        **dict.fromkeys(RETURN_COLUMNS, nothing),
    }


def _keys(predictor: Predictor, seed: int, starts_B: np.ndarray, horizon: int) -> Table:
    size = len(starts_B) * horizon
    return {
        "trial": np.full(size, seed, dtype=np.int64),
        "start": np.repeat(starts_B, horizon).astype(np.int32),
        "predictor": np.full(size, predictor.name),
        "step": np.tile(np.arange(1, horizon + 1, dtype=np.int16), len(starts_B)),
    }


def _join(errors: Table, returns: Table) -> Table:
    """The errors' rows, with the returns filled in where there are any."""
    keys = ("trial", "start", "predictor", "step")
    row_of = {key: row for row, key in enumerate(zip(*(errors[name].tolist() for name in keys), strict=True))}
    rows = np.array([row_of[key] for key in zip(*(returns[name].tolist() for name in keys), strict=True)])
    filled = {name: errors[name].copy() for name in RETURN_COLUMNS}
    for name, column in filled.items():
        column[rows] = returns[name]
    return {**errors, **filled}


def _squared_norm(difference_BHP: np.ndarray) -> np.ndarray:
    return np.einsum("bhp,bhp->bh", difference_BHP, difference_BHP, dtype=np.float64)


def _cut(starts: np.ndarray, batch: int) -> Iterable[np.ndarray]:
    return (starts[begin : begin + batch] for begin in range(0, len(starts), batch))


def _concatenate(tables: Sequence[Table]) -> Table:
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def _write_parquet(folder: str, name: str, table: Table) -> None:
    columns = {key: pa.array(column, from_pandas=True) for key, column in table.items()}
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.table(columns), sink)
    write_file(folder, name, sink.getvalue().to_pybytes())


def _read_parquet(folder: str, name: str) -> Table:
    table = pyarrow.parquet.read_table(pa.BufferReader(read_file(folder, name)))
    return {column: table[column].to_numpy() for column in table.column_names}
