"""Put a predictor into the package, under a name: a rule that `save_predictor` wrote, or a trained model.

    python docs/publish.py return-rule-v1 storage/improve/rules/0123456789abcdef
    python docs/publish.py tipl-inverted-pendulum-v1 storage/inverted_pendulum/models/0123456789abcdef

Of a model's experiment the file keeps what the model was trained for, and not where. Its card, card.md, is written by
hand, and has the digest that is printed here.
"""

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tipl_ray.places import PUBLISHED_FOLDER
from tipl_ray.predict.model_files import is_complete
from tipl_ray.predict.models import load_about, load_model
from tipl_ray.predict.saved import find_predictor, load_predictor, predictor_digest

MOST_BYTES = 2**20
RULE_FILES = ("predictor.safetensors", "predictor.json", "predictor.sha256")


def main() -> None:
    """Copy it, and load it by its name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="what users will load it by")
    parser.add_argument("folder", help="where it is now")
    arguments = parser.parse_args()
    source, target = find_predictor(arguments.folder), PUBLISHED_FOLDER / arguments.name
    target.mkdir(parents=True, exist_ok=True)
    if is_complete(source):
        load_model(source).save(str(target), load_about(source))
    else:
        for name in RULE_FILES:
            shutil.copy(Path(source) / name, target / name)
    size = sum(file.stat().st_size for file in target.iterdir())
    if size > MOST_BYTES:
        parser.error(f"{arguments.name} takes {size:,} bytes, more than {MOST_BYTES:,}")
    question = load_predictor(arguments.name).question
    print(f"{arguments.name}: {size:,} bytes, digest {predictor_digest(arguments.name)}, {question}")


if __name__ == "__main__":
    main()
