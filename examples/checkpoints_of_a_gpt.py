"""A small GPT trained on the docstrings of Python's built-ins; its checkpoints, asked how predictable they are.

    python examples/checkpoints_of_a_gpt.py --folder /tmp/gpt

A plain torch loop that saves a state dict every few steps; what follows is three calls of this package. Takes half a
minute on one core.
"""

import argparse
import builtins
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from tipl_ray.checkpoints.asking import answer
from tipl_ray.checkpoints.predictability import Asking
from tipl_ray.checkpoints.records import import_series
from tipl_ray.checkpoints.report import answers
from tipl_ray.checkpoints.series import Selection
from tipl_ray.errors import UserError

CONTEXT, WIDTH, HEADS, LAYERS, BATCH = 64, 64, 4, 2, 32


class Gpt(nn.Module):
    """A causal Transformer over letters."""

    def __init__(self, num_letters: int):
        super().__init__()
        self.embed = nn.Embedding(num_letters, WIDTH)
        self.position = nn.Parameter(torch.zeros(CONTEXT, WIDTH))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, num_letters)

    def forward(self, letters: Tensor) -> Tensor:
        """Logits of each next letter."""
        mask = nn.Transformer.generate_square_subsequent_mask(letters.shape[1])
        hidden = self.embed(letters) + self.position[: letters.shape[1]]
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        return self.head(self.norm(hidden))


def text() -> str:
    """What Python says of its own built-in functions and types, about 30 KB."""
    return "\n".join(str(getattr(builtins, name).__doc__) for name in sorted(dir(builtins)))


def train(folder: Path, num_steps: int, every: int) -> None:
    """Train, and save the model at the first step and after every few of them."""
    torch.manual_seed(0)
    written = text()
    letters = sorted(set(written))
    data = torch.tensor([letters.index(letter) for letter in written])
    model = Gpt(len(letters))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(num_steps + 1):
        if step % every == 0:
            torch.save({"model": model.state_dict()}, folder / f"step_{step}.pt")
        starts = torch.randint(len(data) - CONTEXT - 1, (BATCH, 1))
        batch = data[starts + torch.arange(CONTEXT + 1)]
        loss = functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % (10 * every) == 0:
            print(f"step {step}: loss {loss.item():.2f}")


def main() -> None:
    """Train, import, ask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for checkpoints and report; a new one")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--every", type=int, default=20, help="steps between two checkpoints")
    arguments = parser.parse_args()
    if arguments.every < 1:
        parser.error(f"--every {arguments.every} is below 1")
    if arguments.steps < 4 * arguments.every:
        parser.error(f"--steps {arguments.steps} gives less than 5 checkpoints, one every {arguments.every}")
    try:
        (arguments.folder / "gpt").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--folder {arguments.folder}: {error.strerror}")
    train(arguments.folder / "gpt", arguments.steps, arguments.every)
    storage = str(arguments.folder / "storage")
    import_series(arguments.folder / "gpt", storage, Selection())
    place, findings = answer(storage, (), Asking(), None)
    for one in answers(findings):
        print(f"{one.question} {one.text}")
    print(f"{place}/report.html")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
