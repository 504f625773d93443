"""The files that every model leaves in its folder, for those who need not load it, which takes a second."""

from tipl_ray.data.storage import file_exists

WEIGHTS_FILE, ABOUT_FILE = "model.safetensors", "model.json"


def is_complete(folder: str) -> bool:
    """Whether a model has been saved whole in this folder: `SavedModel.save` writes model.json last."""
    return file_exists(folder, ABOUT_FILE)
