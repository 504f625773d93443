"""Memory and time of reducing a series of checkpoints to a report, against reading their files and nothing else.

Writes checkpoints of a synthetic language model in bfloat16, in shards as Hugging Face writes them, measures both in
processes of their own, and deletes the checkpoints. With `--distinct` fewer checkpoints than there are lie on the disk;
the others are hard links to them, so that a series is read and reduced which the disk has no room for.

    python benchmarks/checkpoints.py --weights 250e6 --checkpoints 8
    python benchmarks/checkpoints.py --weights 1.1e9 --checkpoints 24 --distinct 2
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from command import keep, make_parser, results_folder  # noqa: E402
from machine import peak_bytes  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from tipl_ray.terminal import say_rows, size_text  # noqa: E402

VOCABULARY = 32_000
SHARD_VALUES = 250_000_000
READ_BYTES = 2**20
POOL_VALUES = 2**22
"""Random numbers that are made; tensors repeat them, as normal numbers are slower to make than to write."""


def shapes(num_weights: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a Llama-like model with about so many weights."""
    width = 2048 if num_weights >= 5e8 else 1024 if num_weights >= 1e8 else 256
    layer = {"self_attn.qkv_proj": (3 * width, width), "self_attn.o_proj": (width, width)}
    layer |= {"mlp.up_proj": (4 * width, width), "mlp.down_proj": (width, 4 * width)}
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, width)}
    for index in range(max(1, round((num_weights - 2 * VOCABULARY * width) / (12 * width * width)))):
        tensors |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
        tensors[f"model.layers.{index}.input_layernorm.weight"] = (width,)
    return tensors | {"lm_head.weight": (VOCABULARY, width)}


def write_checkpoint(folder: Path, tensors: dict[str, tuple[int, ...]], number: int) -> None:
    """One checkpoint: every tensor drifts with the number, and trembles."""
    pool = torch.randn(POOL_VALUES, generator=torch.Generator().manual_seed(0))
    values = (0.02 * (pool + 0.05 * number * pool.roll(1) + 0.02 * pool.roll(2 + number))).bfloat16()
    folder.mkdir(parents=True)
    shards: list[dict[str, torch.Tensor]] = [{}]
    written = 0
    for name, shape in tensors.items():
        if written > SHARD_VALUES * len(shards):
            shards.append({})
        size = torch.Size(shape).numel()
        written += size
        shards[-1][name] = values.repeat(-(-size // POOL_VALUES))[:size].view(shape)
    names = [f"model-{index:05d}-of-{len(shards):05d}.safetensors" for index in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name)
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_series(folder: Path, num_weights: int, num_checkpoints: int, distinct: int) -> int:
    """The whole series, and the weights of one of its checkpoints."""
    tensors = shapes(num_weights)
    for number in range(num_checkpoints):
        place = folder / f"step_{100 * number}"
        if number < distinct:
            write_checkpoint(place, tensors, number)
        else:
            shutil.copytree(folder / f"step_{100 * (number % distinct)}", place, copy_function=os.link)
    return sum(torch.Size(shape).numel() for shape in tensors.values())


def read_only(folder: Path) -> None:
    """The floor: all bytes of all files, one after the other."""
    buffer = bytearray(READ_BYTES)
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def reduce_and_report(folder: Path) -> None:
    """What is measured: the import, the questions, the page."""
    from tipl_ray.checkpoints.asking import answer
    from tipl_ray.checkpoints.predictability import Asking
    from tipl_ray.checkpoints.records import import_series
    from tipl_ray.checkpoints.series import Selection

    storage = str(folder.parent / "storage")
    import_series(folder, storage, Selection())
    answer(storage, (), Asking(), None)


PARTS: dict[str, Callable[[Path], None]] = {"read": read_only, "reduce": reduce_and_report}


def measured(part: str, folder: Path) -> dict[str, float]:
    """Seconds and peak bytes of a process that does a part, what it loads included, with the files out of memory."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, "--part", part, "--folder", str(folder)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(said.splitlines()[-1])


def measure_part(part: str, folder: Path) -> None:
    """What `measured` runs."""
    begin, processor = time.perf_counter(), time.process_time()
    PARTS[part](folder)
    told = {
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - processor,
        "peak_bytes": peak_bytes(),
    }
    print(json.dumps(told))


def measure(folder: Path, num_weights: int, num_checkpoints: int, distinct: int) -> dict:
    """One row of the table."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="checkpoints-") as name:
        run = Path(name, "run")
        weights = write_series(run, num_weights, num_checkpoints, distinct)
        num_bytes = sum(path.stat().st_size for path in run.rglob("*.safetensors"))
        read, reduced = measured("read", run), measured("reduce", run)
    return {
        "weights": weights,
        "checkpoints": num_checkpoints,
        "of them on the disk": distinct,
        "bytes": num_bytes,
        "read [s]": round(read["seconds"], 1),
        "reduce and report [s]": round(reduced["seconds"], 1),
        "times reading": round(reduced["seconds"] / read["seconds"], 2),
        "CPU time [s]": round(reduced["cpu_seconds"], 1),
        "peak memory [MB]": round(reduced["peak_bytes"] / 1e6),
        "peak of reading alone [MB]": round(read["peak_bytes"] / 1e6),
    }


def main() -> None:
    """Measure, print the table, add it to benchmarks/results/checkpoints.json."""
    parser = make_parser(__doc__)
    parser.add_argument("--weights", type=float, nargs="+", default=[250e6], help="weights of the model, one run each")
    parser.add_argument("--checkpoints", type=int, default=8)
    parser.add_argument("--distinct", type=int, help="checkpoints that lie on the disk; by default all")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        measure_part(arguments.part, arguments.folder)
        return
    if arguments.quick:
        arguments.weights, arguments.checkpoints = [18e6], 6
    distinct = min(arguments.distinct or arguments.checkpoints, arguments.checkpoints)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for weights in arguments.weights:
        rows.append(measure(arguments.folder, int(weights), arguments.checkpoints, distinct))
        say_rows([{key: f"{value:,}" for key, value in row.items()} for row in rows])
    target = results_folder(arguments.quick) / "checkpoints.json"
    before = json.loads(target.read_text()) if target.exists() else []
    names = ("weights", "checkpoints", "of them on the disk")
    kept = [row for row in before if all(any(row[name] != new[name] for name in names) for new in rows)]
    keep(target, [*kept, *rows])
    say_rows([{"the files": size_text(row["bytes"]), "times reading": str(row["times reading"])} for row in rows])


if __name__ == "__main__":
    main()
