"""A small ResNet trained on scikit-learn's digits with three seeds, recorded, and asked how predictable it is.

    python examples/resnet_on_digits.py --folder /tmp/digits

A plain supervised loop with one line for every snapshot; what follows is the report of `tipl data ask`, of all that a
snapshot has and of the weights without BatchNorm's running statistics. Writes digits.csv and digits.png beside the
storage. Takes less than a minute on one core.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from tipl_ray import Recorder
from tipl_ray.checkpoints.asking import answer
from tipl_ray.checkpoints.predictability import Asking
from tipl_ray.checkpoints.products import RUNNING
from tipl_ray.checkpoints.report import answers
from tipl_ray.errors import UserError
from tipl_ray.pages import as_csv
from tipl_ray.predict.saved import load_predictor

WIDTHS, BATCH = (16, 32), 128
LEARNING_RATE = 0.5
"""What a gradient moves in all: times 1 - momentum at each of the steps over which momentum spreads it."""
NUM_TRAINING = 1408
"""Images to train on, in whole batches; the other 389 are for the accuracy."""


class Block(nn.Module):
    """Two convolutions with BatchNorm, added to what came in."""

    def __init__(self, width_in: int, width: int):
        super().__init__()
        stride = 1 if width == width_in else 2
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, width_in, 8, 8) to (B, width, 8, 8), or to half the size where the width changes."""
        hidden = self.bn1(self.conv1(images)).relu()
        return (self.bn2(self.conv2(hidden)) + self.shortcut(images)).relu()


class ResNet(nn.Module):
    """Three blocks over images of 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        narrow, wide = WIDTHS
        self.stem = nn.Conv2d(1, narrow, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(narrow)
        self.blocks = nn.Sequential(Block(narrow, narrow), Block(narrow, wide), Block(wide, wide))
        self.head = nn.Linear(wide, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the ten digits."""
        hidden = self.blocks(self.bn(self.stem(images)).relu())
        return self.head(hidden.mean(dim=(2, 3)))


def digits(seed: int) -> tuple[Tensor, Tensor]:
    """All 1,797 images (N, 1, 8, 8) and their digits (N,), in an order of the seed."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return torch.from_numpy(images).float().reshape(-1, 1, 8, 8)[order] / 16, torch.from_numpy(labels)[order]


def train(storage: str, seed: int, num_epochs: int, every: int, momentum: float) -> float:
    """Train one network, recorded every few steps from the first on; its accuracy on images not trained on."""
    images, labels = digits(seed=0)
    torch.manual_seed(seed)
    model = ResNet()
    rate = LEARNING_RATE * (1 - momentum)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum, weight_decay=1e-4)
    steps_per_epoch, step = NUM_TRAINING // BATCH, 0
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_epochs * steps_per_epoch)
    with Recorder(model, storage, trial=seed, task="digits", config={"momentum": momentum}) as recorder:
        recorder.record(0, loss=None, learning_rate=rate)
        for _ in range(num_epochs):
            for batch in torch.randperm(NUM_TRAINING).split(BATCH):
                loss = functional.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                step += 1
                if step % every == 0:
                    recorder.record(step, loss=loss.item(), learning_rate=float(schedule.get_last_lr()[0]))
    model.eval()
    with torch.no_grad():
        right = model(images[NUM_TRAINING:]).argmax(dim=1) == labels[NUM_TRAINING:]
    return right.double().mean().item()


def main() -> None:
    """Train and record three seeds, then ask twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for storage and results")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--every", type=int, default=2, help="steps between two snapshots")
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--predictor", help="trained model to evaluate as well, such as tipl-inverted-pendulum-v1")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments = parser.parse_args()
    if arguments.every < 1:
        parser.error(f"--every {arguments.every} is below 1")
    if (num_snapshots := arguments.epochs * (NUM_TRAINING // BATCH) // arguments.every) < 5:
        parser.error(f"--epochs {arguments.epochs} gives {num_snapshots + 1} snapshots, of at least 6 needed")
    try:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        if arguments.predictor is not None:
            load_predictor(arguments.predictor)
    except OSError as error:
        parser.error(f"--folder {arguments.folder}: {error.strerror}")
    except (UserError, ValueError) as error:
        parser.error(f"--predictor {error}")
    storage, rows = str(arguments.folder / "storage"), []
    for seed in arguments.seeds:
        accuracy = train(storage, seed, arguments.epochs, arguments.every, arguments.momentum)
        print(f"seed {seed}: {accuracy:.1%} of the images not trained on are right")
    for name, leave_out in (("everything", ()), ("without running statistics", (RUNNING,))):
        place, findings = answer(storage, (), Asking(leave_out=leave_out), arguments.predictor)
        print(f"\n{name}:")
        for one in answers(findings):
            print(f"{one.question} {one.text}")
        print(f"{place}/report.html")
        rows += [{"weights": name, **row} for row in findings.means]
    (arguments.folder / "digits.csv").write_bytes(as_csv(rows))
    shutil.copy(Path(place) / "skill.png", arguments.folder / "digits.png")


if __name__ == "__main__":
    try:
        main()
    except (UserError, ValueError) as error:
        sys.exit(f"error: {error}")
