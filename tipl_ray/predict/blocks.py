"""The blocks that both causal Transformers are made of (Section 3.3): GPT-2's, of Decision Transformer's shape.

Shapes: B windows, K tokens of context, E embedding, A attention heads.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from tipl_ray import config

DTYPE = torch.float32
"""Of every model's weights, whatever the default is where it is made or loaded."""


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread, as an actor or task has one CPU; afterwards on as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Block(nn.Module):
    """One GPT-2 block: attention over the snapshots before, then a ReLU MLP of four times the width; norms first."""

    def __init__(self, size: config.Model):
        super().__init__()
        self.heads, self.dropout = size.heads, size.dropout
        self.attention_norm = nn.LayerNorm(size.embedding, dtype=DTYPE)
        self.query_key_value = nn.Linear(size.embedding, 3 * size.embedding, dtype=DTYPE)
        self.attention_out = nn.Linear(size.embedding, size.embedding, dtype=DTYPE)
        self.mlp_norm = nn.LayerNorm(size.embedding, dtype=DTYPE)
        self.mlp_in = nn.Linear(size.embedding, 4 * size.embedding, dtype=DTYPE)
        self.mlp_out = nn.Linear(4 * size.embedding, size.embedding, dtype=DTYPE)

    def forward(self, hidden_BKE: Tensor) -> Tensor:
        """(B, K, E) to (B, K, E)."""
        hidden_BKE = hidden_BKE + self._drop(self.attention_out(self._attend(self.attention_norm(hidden_BKE))))
        return hidden_BKE + self._drop(self.mlp_out(functional.relu(self.mlp_in(self.mlp_norm(hidden_BKE)))))

    def _attend(self, hidden_BKE: Tensor) -> Tensor:
        split_3BAKe = self.query_key_value(hidden_BKE).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query_BAKe, key_BAKe, value_BAKe = split_3BAKe
        dropout = self.dropout if self.training else 0.0
        seen_BAKe = functional.scaled_dot_product_attention(
            query_BAKe, key_BAKe, value_BAKe, dropout_p=dropout, is_causal=True
        )
        return seen_BAKe.transpose(1, 2).flatten(2)

    def _drop(self, hidden_BKE: Tensor) -> Tensor:
        return functional.dropout(hidden_BKE, self.dropout, self.training)


class Blocks(nn.ModuleList):
    """GPT-2 blocks one after the other; while training with `in_bfloat16` their matrix products are of bfloat16."""

    in_bfloat16 = False

    def __init__(self, size: config.Model):
        super().__init__(Block(size) for _ in range(size.layers))

    def forward(self, hidden_BKE: Tensor) -> Tensor:
        """(B, K, E) to (B, K, E); what is carried from block to block stays float32."""
        with torch.autocast(hidden_BKE.device.type, torch.bfloat16, enabled=self.in_bfloat16 and self.training):
            for block in self:
                hidden_BKE = block(hidden_BKE)
        return hidden_BKE


def initialise(module: nn.Module) -> None:
    """GPT-2's: normal weights of deviation 0.02, no bias."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
