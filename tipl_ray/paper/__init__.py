"""The paper's representation (Sections 3.2 and 3.3): a Temporal SVD's tokens, and the Transformer over them."""
