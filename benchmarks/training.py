"""Training steps per CPU second of the paper's Transformer, beside Hugging Face's GPT-2 of its shape, usual loop.

Run it by `make bench`, which installs transformers into an environment of its own, or alone where that is:

    python benchmarks/training.py [--rounds 5] [--steps 20]

The usual loop: a torch Dataset that cuts one window at a time out of numpy arrays, a DataLoader, GPT2Model on embedded
tokens, torch's own AdamW and a LambdaLR. Same trials, context, batch size, widths, dropout and gradient clipping. One
thread each, and its CPU time, so that what else runs on the machine counts little. Ours also with
`--train.precision bfloat16`, which needs a processor that has it to be worth anything.
"""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from transformers import GPT2Config, GPT2Model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command import make_parser, results_folder, use_one_core  # noqa: E402

from tipl_ray.config import Experiment  # noqa: E402
from tipl_ray.paper.tokens import Tokens  # noqa: E402
from tipl_ray.predict.representation import TrainingData  # noqa: E402
from tipl_ray.terminal import say_rows  # noqa: E402
from tipl_ray.train.training import Training  # noqa: E402

NUM_TRIALS, NUM_SNAPSHOTS, RANK = 40, 1951, 32


def tokens() -> Tokens:
    """As many tokens as the paper's InvertedPendulum has: what they are is no matter of speed."""
    coordinates_NTD = np.random.default_rng(0).standard_normal((NUM_TRIALS, NUM_SNAPSHOTS, RANK)).astype(np.float32)
    return Tokens(
        seeds=tuple(range(NUM_TRIALS)),
        coordinates_NTD=coordinates_NTD,
        singular_values_ND=np.ones((NUM_TRIALS, RANK)),
        outside_NT=np.zeros((NUM_TRIALS, NUM_SNAPSHOTS)),
        moved_NTF=np.ones((NUM_TRIALS, NUM_SNAPSHOTS, 1)),
    )


class Windows(Dataset):
    """Windows one at a time, as a reader of PyTorch's tutorials would write it."""

    def __init__(self, coordinates_NTD: np.ndarray, context: int):
        self.coordinates_NTD, self.context = coordinates_NTD, context
        self.per_trial = coordinates_NTD.shape[1] - context

    def __len__(self) -> int:
        return len(self.coordinates_NTD) * self.per_trial

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        trial, first = divmod(index, self.per_trial)
        part = self.coordinates_NTD[trial, first : first + self.context + 1]
        return {
            "tokens": torch.from_numpy(part[:-1]),
            "targets": torch.from_numpy(part[1:]),
            "snapshots": torch.arange(first, first + self.context),
        }


class Gpt2(nn.Module):
    """The paper's model on Hugging Face's blocks: embeddings of token and snapshot, LayerNorm, GPT-2, a linear head."""

    def __init__(self, experiment: Experiment):
        super().__init__()
        size = experiment.model
        shape = GPT2Config(
            vocab_size=1,
            n_positions=size.context,
            n_embd=size.embedding,
            n_layer=size.layers,
            n_head=size.heads,
            activation_function="relu",
            resid_pdrop=size.dropout,
            embd_pdrop=size.dropout,
            attn_pdrop=size.dropout,
            use_cache=False,
        )
        self.embed_token = nn.Linear(RANK, size.embedding)
        self.embed_snapshot = nn.Embedding(NUM_SNAPSHOTS, size.embedding)
        self.embedding_norm = nn.LayerNorm(size.embedding)
        self.blocks = GPT2Model(shape)
        self.predict = nn.Linear(size.embedding, RANK)

    def forward(self, tokens_BKD: Tensor, snapshots_BK: Tensor) -> Tensor:
        """The token of each position's next snapshot; (B, K, D)."""
        embedded_BKE = self.embedding_norm(self.embed_token(tokens_BKD) + self.embed_snapshot(snapshots_BK))
        return self.predict(self.blocks(inputs_embeds=embedded_BKE).last_hidden_state)


def usual_loop(experiment: Experiment, data: Tokens) -> Callable[[int], None]:
    """Train for some steps."""
    torch.manual_seed(0)
    train, model = experiment.train, Gpt2(experiment)
    windows = Windows(data.coordinates_NTD, experiment.model.context)
    loader = DataLoader(windows, batch_size=train.batch_size, sampler=RandomSampler(windows, replacement=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=train.learning_rate, weight_decay=train.weight_decay)
    warmed = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / train.warmup_steps))
    batches: Iterator[dict[str, Tensor]] = iter(loader)

    def run(num_steps: int) -> None:
        model.train()
        for _ in range(num_steps):
            batch = next(batches)
            loss = nn.functional.mse_loss(model(batch["tokens"], batch["snapshots"]), batch["targets"])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), train.max_gradient_norm)
            optimizer.step()
            warmed.step()

    return run


def our_loop(experiment: Experiment, data: Tokens) -> Callable[[int], None]:
    """Train for some steps."""
    training = Training(experiment, TrainingData(train=data, validation=data))

    def run(num_steps: int) -> None:
        training.train_until(training.step + num_steps)

    return run


def main() -> None:
    """Measure, print the table, write benchmarks/results/training.json."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds")
    parser.add_argument("--steps", type=int, default=20, help="steps per round")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.steps = 1, 2
    use_one_core(arguments.quick)
    experiment, data = Experiment(name="bench"), tokens()
    halved = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, precision="bfloat16"))
    subjects = {
        "tipl_ray, bfloat16": our_loop(halved, data),
        "tipl_ray": our_loop(experiment, data),
        "Hugging Face GPT-2": usual_loop(experiment, data),
    }
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for run in subjects.values():
        run(3)
    for _ in range(arguments.rounds):
        for name, run in subjects.items():
            begin = time.process_time()
            run(arguments.steps)
            seconds[name].append((time.process_time() - begin) / arguments.steps)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [
        {
            "subject": name,
            "metric": "training steps per CPU second, 64 x 20 tokens, 128 wide, 3 layers, one thread",
            "value": round(1 / median, 2),
            "unit": "1/s",
            "milliseconds_per_step": round(1e3 * median, 2),
            "ratio_to_plain": round(medians["Hugging Face GPT-2"] / median, 2),
            "rounds": arguments.rounds,
        }
        for name, median in medians.items()
    ]
    (results_folder(arguments.quick) / "training.json").write_text(json.dumps(rows, indent=1) + "\n")
    shown = ("subject", "value", "milliseconds_per_step", "ratio_to_plain")
    say_rows([{key: str(row[key]) for key in shown} for row in rows], title="training steps")


if __name__ == "__main__":
    main()
