"""Our first representation: the displacements of a window, through their inner products."""
