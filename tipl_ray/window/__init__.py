"""Our representation: the displacements of a window, known by their inner products alone."""
