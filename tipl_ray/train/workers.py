"""What the workers of a training take of the cluster; apart from the training, which takes seconds to load."""

import ray

from tipl_ray.config import Experiment
from tipl_ray.resources import require_resources


def require_workers(experiment: Experiment) -> None:
    """Refuse workers that the cluster can never have. Raises ValueError."""
    settings = experiment.where
    counted = f"num_workers={settings.num_workers}"
    needs = {"CPU": (1.0, counted), "GPU": (float(settings.use_gpu), "use_gpu=True")}
    require_resources(needs, "worker", settings.num_workers, counted)


def cpus_of_each(num_workers: int) -> int:
    """Most CPUs that each worker can have on the cluster as it is; 1 where it still has to grow."""
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    fitting = [cpus for cpus in range(1, max(nodes) + 1) if sum(node // cpus for node in nodes) >= num_workers]
    return max(fitting, default=1)
