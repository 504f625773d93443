"""A trajectory's weights, wherever they are: an array, or an object that reads parts from a store on demand."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Rows(Protocol):
    """Weights (T, P) of T snapshots."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(T, P)."""

    def __getitem__(self, part: Any, /) -> NDArray[np.floating]:
        """Snapshots [start:stop], or columns [:, start:stop] of all of them."""
        raise NotImplementedError
