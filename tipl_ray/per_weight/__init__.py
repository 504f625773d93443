"""Our second representation: every weight by its own past, next to the displacements of all."""
