"""Temporal SVD (Section 3.2): the basis in which one trajectory's weights become tokens, and tokens become weights.

Knows trajectories, as arrays or as anything else that gives ranges of their rows and columns as arrays, and nothing of
where they came from or of the model.

Shapes: T snapshots, P policy weights, D SVD rank, B any number of snapshots, N the smaller of T and P.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal, Self

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from scipy import linalg

from tipl_ray import config
from tipl_ray.rows import Rows

BLOCK_BYTES = 32 * 2**20
"""Most that is held in float64 of a trajectory at a time."""
HELD_BYTES = 192 * 2**20
"""Most that is asked for at a time of a trajectory that is read as it is asked for."""

SHARED_SNAPSHOTS = 2048
"""Most snapshots that a basis of many trajectories is fitted on, evenly spaced over each."""

SMALLEST_SINGULAR_VALUE = 1e-7
"""Singular values below this share of the largest are zero: a float64 Gram matrix knows no more of them."""

Array = NDArray[np.floating]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FittedBasis:
    """The basis of one trajectory: W = origin + U S V^T, with the first D columns of U as tokens."""

    kind: Literal["trial", "raw", "shared"]
    """`trial`: Temporal SVD of the whole trajectory; `raw`: the weights themselves are the tokens; `shared`: Temporal
    SVD of other trajectories together."""
    rank: int
    """SVD rank D; P where the kind is `raw`."""
    coordinates_TD: NDArray[np.float32]
    """Tokens of the trajectory itself: U[:, :D]."""
    singular_values_D: NDArray[np.float64]
    """Leading singular values, falling; ones where the kind is `raw`."""
    basis_PD: NDArray[np.float32] | None
    """Right singular vectors, of which the entry with the largest absolute value is positive; none stands for the
    identity of the kind `raw`."""
    origin_P: NDArray[np.float32]
    """What was subtracted from every snapshot: zeros, the mean or the first snapshot."""

    def encode(self, weights_BP: Array) -> NDArray[np.float32]:
        """Tokens of any snapshots; (B, D). A direction that the trajectory never took has coordinate 0."""
        centred_BP = np.asarray(weights_BP, np.float64) - self.origin_P
        if self.basis_PD is None:
            return centred_BP.astype(np.float32)
        taken_D = self.singular_values_D > 0
        inverse_D = np.divide(1.0, self.singular_values_D, out=np.zeros(self.rank), where=taken_D)
        return (centred_BP @ self.basis_PD * inverse_D).astype(np.float32)

    def decode(self, coordinates_BD: Array) -> NDArray[np.float32]:
        """Weights of tokens: U_D S_D V_D^T + origin; (B, P)."""
        if self.basis_PD is None:
            return (coordinates_BD + self.origin_P).astype(np.float32, copy=False)
        scaled_BD = (coordinates_BD * self.singular_values_D).astype(np.float32)
        return scaled_BD @ self.basis_PD.T + self.origin_P

    def on(self, weights_TP: Rows) -> Self:
        """The same basis with the tokens of another trajectory."""
        no_origin_P = np.zeros_like(self.origin_P)
        parts = [self.encode(block_BP) for _, block_BP in _row_blocks(weights_TP, no_origin_P)]
        return dataclasses.replace(self, coordinates_TD=np.concatenate(parts))

    def truncated(self, rank: int) -> Self:
        """The leading part of the basis, as if it had been fitted with that SVD rank."""
        assert self.basis_PD is not None, "the kind `raw` has no rank"
        return dataclasses.replace(
            self,
            rank=rank,
            coordinates_TD=self.coordinates_TD[:, :rank],
            singular_values_D=self.singular_values_D[:rank],
            basis_PD=self.basis_PD[:, :rank],
        )

    def to_bytes(self) -> bytes:
        """The basis without the trajectory's own tokens, as safetensors; for the kind `shared`."""
        assert self.basis_PD is not None, "the kind `raw` is the identity"
        arrays = {"singular_values": self.singular_values_D, "basis": self.basis_PD, "origin": self.origin_P}
        return safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()})

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """The shared basis that `to_bytes` wrote; it has no tokens yet."""
        arrays = safetensors.numpy.load(content)
        return cls(
            kind="shared",
            rank=len(arrays["singular_values"]),
            coordinates_TD=np.empty((0, len(arrays["singular_values"])), np.float32),
            singular_values_D=arrays["singular_values"],
            basis_PD=arrays["basis"],
            origin_P=arrays["origin"],
        )


def fit_basis(
    weights_TP: Rows, kind: Literal["trial", "raw"], rank: int, centred: bool = False, deltas: bool = False
) -> FittedBasis:
    """Temporal SVD (Section 3.2) of one trajectory, or the identity for `raw`, which ignores the rank.

    With `centred` the trajectory's mean is subtracted first, with `deltas` its first snapshot. Works from the float64
    Gram matrix of the shorter side and asks for the trajectory in parts, so that one which is read from a store takes a
    bounded memory.
    Raises ValueError if the rank exceeds T or P, or a weight is not finite.
    """
    origin_P = _origin(weights_TP, centred, deltas)
    if kind == "raw":
        weights_TP = weights_TP[:]
        if not np.isfinite(weights_TP).all():
            raise ValueError("weights_TP has entries that are NaN or infinite: there is no basis for them")
        return FittedBasis(
            kind=kind,
            rank=weights_TP.shape[1],
            coordinates_TD=np.asarray(weights_TP - origin_P if centred or deltas else weights_TP, np.float32),
            singular_values_D=np.ones(weights_TP.shape[1]),
            basis_PD=None,
            origin_P=origin_P,
        )
    singular_values_D, short_ND, _ = _spectrum(weights_TP, origin_P, rank)
    inverse_D = np.divide(1.0, singular_values_D, out=np.zeros(rank), where=singular_values_D > 0)
    num_snapshots, num_weights = weights_TP.shape
    left_TD, right_PD = short_ND, short_ND
    if num_snapshots <= num_weights:
        right_PD = np.zeros((num_weights, rank))
        for part, block_BP in _row_blocks(weights_TP, origin_P):
            right_PD += block_BP.T @ (short_ND[part] * inverse_D)
    else:
        left_TD = np.empty((num_snapshots, rank))
        for part, block_BP in _row_blocks(weights_TP, origin_P):
            left_TD[part] = block_BP @ short_ND * inverse_D
    largest_D = right_PD[np.abs(right_PD).argmax(axis=0), np.arange(rank)]
    signs_D = np.where(largest_D < 0, -1.0, 1.0)
    return FittedBasis(
        kind=kind,
        rank=rank,
        coordinates_TD=(left_TD * signs_D).astype(np.float32),
        singular_values_D=singular_values_D,
        basis_PD=(right_PD * signs_D).astype(np.float32),
        origin_P=origin_P,
    )


def fit_shared_basis(trajectories: Sequence[Rows], rank: int, centred: bool = False) -> FittedBasis:
    """One Temporal SVD of several trajectories together, of snapshots evenly spaced over each; it has no tokens yet.

    Raises ValueError as `fit_basis` does.
    """
    each = max(1, SHARED_SNAPSHOTS // len(trajectories))
    chosen = [
        np.linspace(0, len_T - 1, min(each, len_T)).astype(int) for len_T, _ in (one.shape for one in trajectories)
    ]
    parts = [one[row : row + 1] for one, rows in zip(trajectories, chosen, strict=True) for row in rows]
    fitted = fit_basis(np.concatenate(parts), "trial", rank, centred)
    return dataclasses.replace(fitted, kind="shared", coordinates_TD=np.empty((0, rank), np.float32))


def basis_of(weights_TP: Rows, basis: config.Basis, shared: FittedBasis | None = None) -> FittedBasis:
    """The basis that a configuration means for a trajectory, with its tokens. Raises ValueError as `fit_basis` does."""
    assert basis.kind != "window", "displacements have a band, not tokens"
    if basis.kind == "shared":
        assert shared is not None, "a shared basis is fitted before the trials are reduced"
        return shared.on(weights_TP)
    return fit_basis(weights_TP, basis.kind, basis.rank, centred=basis.centred, deltas=basis.deltas)


def reconstruction_error(
    weights_TP: Rows, ranks: Sequence[int], centred: bool = False, deltas: bool = False
) -> dict[str, NDArray]:
    """What each SVD rank leaves out of one trajectory, from singular values and total energy alone.

    Columns, one entry per rank: `rank`; `energy_outside`, 1 - sum of sigma^2 / total, in [0, 1] (0 for a trajectory
    that never leaves its origin); `mean_squared_error` per weight. Raises ValueError as `fit_basis` does.
    """
    origin_P = _origin(weights_TP, centred, deltas)
    singular_values_D, _, energy = _spectrum(weights_TP, origin_P, max(ranks))
    outside = np.maximum(energy - np.cumsum(singular_values_D**2)[np.asarray(ranks) - 1], 0.0)
    return {
        "rank": np.asarray(ranks, np.int64),
        "energy_outside": outside / energy if energy else outside,
        "mean_squared_error": outside / np.prod(weights_TP.shape),
    }


def _spectrum(weights_TP: Rows, origin_P: NDArray, rank: int) -> tuple[NDArray, NDArray, float]:
    """Leading singular values (D,), singular vectors of the shorter side (N, D), and the squared sum of all weights."""
    num_short = min(weights_TP.shape)
    if not 1 <= rank <= num_short:
        raise ValueError(
            f"basis.rank={rank} is not between 1 and {num_short}, the singular values of a trajectory of "
            f"{weights_TP.shape[0]} snapshots of {weights_TP.shape[1]} weights"
        )
    gram_NN = np.zeros((num_short, num_short), order="F")
    for block_NB in _short_blocks(weights_TP, origin_P):
        # Fortran order, a transposed operand and overwrite_c: the sum grows in place, no second Gram matrix is made.
        gram_NN = linalg.blas.dsyrk(1.0, block_NB.T, beta=1.0, c=gram_NN, trans=1, lower=1, overwrite_c=1)
    energy = float(np.trace(gram_NN))
    if not np.isfinite(energy):
        raise ValueError("weights_TP has entries that are NaN or infinite: there is no basis for them")
    leading = (num_short - rank, num_short - 1)
    eigenvalues_D, vectors_ND = linalg.eigh(gram_NN, subset_by_index=leading, overwrite_a=True, check_finite=False)
    singular_values_D = np.sqrt(np.maximum(eigenvalues_D[::-1], 0.0))
    zero_D = singular_values_D <= SMALLEST_SINGULAR_VALUE * singular_values_D[0]
    singular_values_D[zero_D] = 0.0
    vectors_ND = vectors_ND[:, ::-1] * ~zero_D
    return singular_values_D, vectors_ND, energy


def _origin(weights_TP: Rows, centred: bool, deltas: bool) -> NDArray[np.float32]:
    num_snapshots, num_weights = weights_TP.shape
    zeros_P = np.zeros(num_weights, np.float32)
    if centred:
        sums = (block_BP.sum(axis=0) for _, block_BP in _row_blocks(weights_TP, zeros_P))
        return (sum(sums, np.zeros(num_weights)) / num_snapshots).astype(np.float32)
    return weights_TP[:1][0].astype(np.float32) if deltas else zeros_P


def _row_blocks(weights_TP: Rows, origin_P: NDArray) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Snapshots in order, in float64: which, and their weights."""
    num_snapshots, num_weights = weights_TP.shape
    step = max(1, BLOCK_BYTES // (8 * num_weights))
    for start in range(0, num_snapshots, step):
        part = slice(start, min(start + step, num_snapshots))
        yield part, weights_TP[part].astype(np.float64) - origin_P


def _short_blocks(weights_TP: Rows, origin_P: NDArray) -> Iterator[NDArray[np.float64]]:
    """Blocks of the longer side, in float64, with the whole shorter side first; (N, some of the longer side)."""
    num_snapshots, num_weights = weights_TP.shape
    if num_snapshots > num_weights:
        yield from (block_BP.T for _, block_BP in _row_blocks(weights_TP, origin_P))
        return
    step = max(1, BLOCK_BYTES // (8 * num_snapshots))
    # Of an array, columns are seen in place; from a store, whole snapshots are read for them: better for many at once.
    held = step * max(1, HELD_BYTES // (4 * num_snapshots * step))
    for first in range(0, num_weights, held):
        held_Tp = weights_TP[:, first : first + held]
        for start in range(0, held_Tp.shape[1], step):
            block_Tp = held_Tp[:, start : start + step].astype(np.float64)
            block_Tp -= origin_P[first + start : first + start + step]
            yield block_Tp
        del held_Tp, block_Tp  # before the next are read
