"""Temporal SVD (Section 3.2): the basis in which one trajectory's weights become tokens, and tokens become weights.

Knows trajectories, as arrays or as anything else that gives ranges of their rows and columns as arrays, and nothing of
where they came from or of the model.

Shapes: T snapshots, P policy weights, D SVD rank, B any number of snapshots, N the smaller of T and P; S a little more
than D, and K columns of the Krylov space from which they are chosen.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np
import safetensors.numpy
from numpy.typing import DTypeLike, NDArray
from scipy import linalg

from tipl_ray.data.rows import Rows

BLOCK_BYTES = 32 * 2**20
"""Most of a trajectory that is worked on at a time."""
HELD_BYTES = 192 * 2**20
"""Most that is asked for at a time of a trajectory that is read as it is asked for."""

SHARED_SNAPSHOTS = 2048
"""Most snapshots that a basis of many trajectories is fitted on, evenly spaced over each."""

SMALLEST_SINGULAR_VALUE = 1e-7
"""Singular values below this share of the largest are zero: a float64 Gram matrix knows no more of them."""
WEIGHTS_SUMMED = 4096
"""Weights over which sums may be of float32; longer sums round too much."""
KRYLOV_BLOCKS = 5
"""Times that a block of vectors goes through the trajectory and back, to find its leading subspace."""
ACCURACY = 1e-7
"""Relative error of singular values that a subspace found in this way must promise, or a Gram matrix is made."""

BASIS_FILE = "basis.safetensors"
"""Next to a model: the basis that all its trials share, if they do; see `FittedBasis.to_bytes`."""

Array = NDArray[np.floating]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FittedBasis:
    """The basis of one trajectory: W = origin + U S V^T, with the first D columns of U as tokens."""

    rank: int
    """SVD rank D."""
    coordinates_TD: NDArray[np.float32]
    """Tokens of the trajectory itself: U[:, :D]."""
    singular_values_D: NDArray[np.float64]
    """Leading singular values, falling."""
    basis_PD: NDArray[np.float32]
    """Right singular vectors, of which the entry with the largest absolute value is positive."""
    origin_P: NDArray[np.float32]
    """What was subtracted from every snapshot: zeros or the mean."""

    def encode(self, weights_BP: Array) -> NDArray[np.float32]:
        """Tokens of any snapshots; (B, D). A direction that the trajectory never took has coordinate 0."""
        centred_BP = np.asarray(weights_BP, np.float64) - self.origin_P
        taken_D = self.singular_values_D > 0
        inverse_D = np.divide(1.0, self.singular_values_D, out=np.zeros(self.rank), where=taken_D)
        return (centred_BP @ self.basis_PD * inverse_D).astype(np.float32)

    def decode(self, coordinates_BD: Array) -> NDArray[np.float32]:
        """Weights of tokens: U_D S_D V_D^T + origin; (B, P)."""
        return self.decode_change(coordinates_BD) + self.origin_P

    def decode_change(self, changes_BD: Array) -> NDArray[np.float32]:
        """How weights change with their tokens: U_D S_D V_D^T; (B, P)."""
        scaled_BD = (changes_BD * self.singular_values_D).astype(np.float32)
        return scaled_BD @ self.basis_PD.T

    def on(self, weights_TP: Rows) -> Self:
        """The same basis with the tokens of another trajectory."""
        no_origin_P = np.zeros_like(self.origin_P)
        parts = [self.encode(block_BP) for _, block_BP in _row_blocks(weights_TP, no_origin_P)]
        return dataclasses.replace(self, coordinates_TD=np.concatenate(parts))

    def truncated(self, rank: int) -> Self:
        """The leading part of the basis, as if it had been fitted with that SVD rank."""
        return dataclasses.replace(
            self,
            rank=rank,
            coordinates_TD=self.coordinates_TD[:, :rank],
            singular_values_D=self.singular_values_D[:rank],
            basis_PD=self.basis_PD[:, :rank],
        )

    def to_bytes(self) -> bytes:
        """The basis without the trajectory's own tokens, as safetensors."""
        arrays = {"singular_values": self.singular_values_D, "basis": self.basis_PD, "origin": self.origin_P}
        return safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()})

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """The shared basis that `to_bytes` wrote; it has no tokens yet."""
        arrays = safetensors.numpy.load(content)
        return cls(
            rank=len(arrays["singular_values"]),
            coordinates_TD=np.empty((0, len(arrays["singular_values"])), np.float32),
            singular_values_D=arrays["singular_values"],
            basis_PD=arrays["basis"],
            origin_P=arrays["origin"],
        )


def fit_basis(weights_TP: Rows, rank: int, centred: bool = False) -> FittedBasis:
    """Temporal SVD (Section 3.2) of one trajectory; with `centred` its mean is subtracted first.

    Reads the trajectory in parts, so that one that is read from a store takes bounded memory. Raises ValueError if the
    rank exceeds T or P, or a weight is not finite.
    """
    origin_P = _mean(weights_TP) if centred else np.zeros(weights_TP.shape[1], np.float32)
    singular_values_D, left_TD, right_PD = _decompose(weights_TP, origin_P, rank)
    largest_D = right_PD[np.abs(right_PD).argmax(axis=0), np.arange(rank)]
    signs_D = np.where(largest_D < 0, -1.0, 1.0)
    return FittedBasis(
        rank=rank,
        coordinates_TD=(left_TD * signs_D).astype(np.float32),
        singular_values_D=singular_values_D,
        basis_PD=(right_PD * signs_D).astype(np.float32),
        origin_P=origin_P,
    )


def fit_shared_basis(trajectories: Sequence[Rows], rank: int) -> FittedBasis:
    """One Temporal SVD of several trajectories together, of snapshots evenly spaced over each; it has no tokens yet.

    Raises ValueError as `fit_basis` does.
    """
    each = max(1, SHARED_SNAPSHOTS // len(trajectories))
    chosen = [
        np.linspace(0, len_T - 1, min(each, len_T)).astype(int) for len_T, _ in (one.shape for one in trajectories)
    ]
    parts = [one[row : row + 1] for one, rows in zip(trajectories, chosen, strict=True) for row in rows]
    fitted = fit_basis(np.concatenate(parts), rank)
    return dataclasses.replace(fitted, coordinates_TD=np.empty((0, rank), np.float32))


def reconstruction_error(weights_TP: Rows, ranks: Sequence[int]) -> dict[str, NDArray]:
    """What each SVD rank leaves out of one trajectory, from singular values and total energy alone.

    Columns, one entry per rank: `rank`; `energy_outside`, 1 - sum of sigma^2 / total, in [0, 1] (0 for a trajectory
    of zeros); `mean_squared_error` per weight. Raises ValueError as `fit_basis` does.
    """
    origin_P = np.zeros(weights_TP.shape[1], np.float32)
    singular_values_D, _, _ = _decompose(weights_TP, origin_P, max(ranks))
    energy = sum(float(np.vdot(block_BP, block_BP)) for _, block_BP in _row_blocks(weights_TP, origin_P))
    outside = np.maximum(energy - np.cumsum(singular_values_D**2)[np.asarray(ranks) - 1], 0.0)
    return {
        "rank": np.asarray(ranks, np.int64),
        "energy_outside": outside / energy if energy else outside,
        "mean_squared_error": outside / np.prod(weights_TP.shape),
    }


def _decompose(weights_TP: Rows, origin_P: NDArray, rank: int) -> tuple[NDArray, NDArray, NDArray]:
    """Leading singular values (D,), left singular vectors (T, D) and right ones (P, D)."""
    num_short = min(weights_TP.shape)
    if not 1 <= rank <= num_short:
        raise ValueError(
            f"basis.rank={rank} is not between 1 and {num_short}, the number of singular values of a trajectory of "
            f"{weights_TP.shape[0]} snapshots of {weights_TP.shape[1]} weights"
        )
    size = rank + max(8, rank // 4)
    worthwhile = 4 * KRYLOV_BLOCKS * size <= num_short  # where N is smaller, its Gram matrix costs no more
    found = _decompose_by_subspace(weights_TP, origin_P, rank, size) if worthwhile else None
    return found or _decompose_by_gram(weights_TP, origin_P, rank)


def _decompose_by_subspace(
    weights_TP: Rows, origin_P: NDArray, rank: int, size: int
) -> tuple[NDArray, NDArray, NDArray] | None:
    """The same within a subspace that float32 finds; None where the singular values could be off by ACCURACY.

    Within it float64 decides, so that float32's error counts squared: the square of how far the left vectors still move
    when they go through the trajectory and back once more, over the gap to the subspace's last eigenvalue.
    """
    found_TS = _leading_subspace(weights_TP, origin_P, size)
    if found_TS is None:
        return None
    image_PS = _onto_weights(weights_TP, origin_P, found_TS)
    eigenvalues_S, rotation_SS = np.linalg.eigh(image_PS.T @ image_PS)
    eigenvalues_D, rotation_SD = eigenvalues_S[: -rank - 1 : -1], rotation_SS[:, : -rank - 1 : -1]
    if eigenvalues_D[-1] <= SMALLEST_SINGULAR_VALUE**2 * eigenvalues_D[0]:
        return None
    singular_values_D = np.sqrt(eigenvalues_D)
    right_PD = image_PS @ (rotation_SD / singular_values_D)
    left_TD = _onto_snapshots(weights_TP, origin_P, right_PD) / singular_values_D
    moved_D = np.linalg.norm(left_TD - found_TS @ rotation_SD, axis=0)
    gap = 1 - eigenvalues_S[0] / eigenvalues_D[-1]
    return (singular_values_D, left_TD, right_PD) if moved_D.max() ** 2 <= ACCURACY * gap else None


def _leading_subspace(weights_TP: Rows, origin_P: NDArray, size: int) -> NDArray[np.float64] | None:
    """Orthonormal columns that span, about, the leading left singular vectors: by a block Krylov method; (T, S).

    None where a weight is not finite, or too large for float32.
    """
    krylov_TK = np.empty((weights_TP.shape[0], KRYLOV_BLOCKS * size))
    images_PK = np.empty((weights_TP.shape[1], KRYLOV_BLOCKS * size), np.float32)
    image_PS = np.random.default_rng(0).standard_normal((weights_TP.shape[1], size), np.float32)
    for first in range(0, KRYLOV_BLOCKS * size, size):
        before_TK, here = krylov_TK[:, :first], slice(first, first + size)
        block_TS = _onto_snapshots(weights_TP, origin_P, image_PS)
        for _ in range(2):  # what rounding leaves the first time goes the second time
            block_TS -= before_TK @ (before_TK.T @ block_TS)
        krylov_TK[:, here] = np.linalg.qr(block_TS)[0]
        images_PK[:, here] = image_PS = _onto_weights(weights_TP, origin_P, krylov_TK[:, here].astype(np.float32))
    gram_KK = sum(block_BK.T @ block_BK for _, block_BK in _row_blocks(images_PK, np.zeros(1)))
    if not np.isfinite(gram_KK).all():
        return None
    return np.linalg.qr(krylov_TK @ np.linalg.eigh(gram_KK)[1][:, -size:])[0]


def _decompose_by_gram(weights_TP: Rows, origin_P: NDArray, rank: int) -> tuple[NDArray, NDArray, NDArray]:
    """The same by the eigenvectors of the shorter side's Gram matrix."""
    num_snapshots, num_weights = weights_TP.shape
    num_short = min(weights_TP.shape)
    gram_NN = np.zeros((num_short, num_short), order="F")
    for block_NB in _short_blocks(weights_TP, origin_P):
        # Fortran order, a transposed operand and overwrite_c: the sum grows in place, no second Gram matrix is made.
        gram_NN = linalg.blas.dsyrk(1.0, block_NB.T, beta=1.0, c=gram_NN, trans=1, lower=1, overwrite_c=1)
    if not np.isfinite(np.trace(gram_NN)):
        raise ValueError("weights_TP has entries that are NaN or infinite: there is no basis for them")
    leading = (num_short - rank, num_short - 1)
    eigenvalues_D, vectors_ND = linalg.eigh(gram_NN, subset_by_index=leading, overwrite_a=True, check_finite=False)
    singular_values_D = np.sqrt(np.maximum(eigenvalues_D[::-1], 0.0))
    taken_D = singular_values_D > SMALLEST_SINGULAR_VALUE * singular_values_D[0]
    singular_values_D = singular_values_D * taken_D
    vectors_ND = vectors_ND[:, ::-1] * taken_D
    inverse_D = np.divide(1.0, singular_values_D, out=np.zeros(rank), where=taken_D)
    if num_snapshots <= num_weights:
        right_PD = _onto_weights(weights_TP, origin_P, vectors_ND * inverse_D)
        return singular_values_D, vectors_ND, right_PD
    left_TD = _onto_snapshots(weights_TP, origin_P, vectors_ND * inverse_D)
    return singular_values_D, left_TD, vectors_ND


def _onto_weights(weights_TP: Rows, origin_P: NDArray, columns_TS: NDArray) -> NDArray:
    """W^T times some columns, in their precision; (P, S)."""
    image_PS = np.zeros((weights_TP.shape[1], columns_TS.shape[1]), columns_TS.dtype)
    for part, block_BP in _row_blocks(weights_TP, origin_P, columns_TS.dtype):
        image_PS += block_BP.T @ columns_TS[part]
    return image_PS


def _onto_snapshots(weights_TP: Rows, origin_P: NDArray, columns_PS: NDArray) -> NDArray[np.float64]:
    """W times some columns, in their precision but for sums over more than WEIGHTS_SUMMED weights; (T, S)."""
    parts = [slice(first, first + WEIGHTS_SUMMED) for first in range(0, len(columns_PS), WEIGHTS_SUMMED)]
    blocks = _row_blocks(weights_TP, origin_P, columns_PS.dtype)
    return np.concatenate(
        [sum((block_BP[:, part] @ columns_PS[part]).astype(np.float64) for part in parts) for _, block_BP in blocks]
    )


def _mean(weights_TP: Rows) -> NDArray[np.float32]:
    num_snapshots, num_weights = weights_TP.shape
    sums = (block_BP.sum(axis=0) for _, block_BP in _row_blocks(weights_TP, np.zeros(num_weights, np.float32)))
    return (sum(sums, np.zeros(num_weights)) / num_snapshots).astype(np.float32)


def _row_blocks(weights_TP: Rows, origin_P: NDArray, dtype: DTypeLike = np.float64) -> Iterator[tuple[slice, NDArray]]:
    """Snapshots in order: which, and their weights."""
    num_snapshots, num_weights = weights_TP.shape
    step = max(1, BLOCK_BYTES // (np.dtype(dtype).itemsize * num_weights))
    # Half, as who works on a block may still hold what it is part of while the next is read.
    held = step * max(1, HELD_BYTES // 2 // (4 * num_weights * step))
    shifted, origin_P = origin_P.any(), origin_P.astype(dtype)
    for first in range(0, num_snapshots, held):
        held_BP = weights_TP[first : min(first + held, num_snapshots)]
        for start in range(0, len(held_BP), step):
            block_BP = held_BP[start : start + step].astype(dtype, copy=False)
            part = slice(first + start, first + start + len(block_BP))
            yield part, block_BP - origin_P if shifted else block_BP
        del held_BP, block_BP


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
