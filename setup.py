"""What pyproject.toml cannot say: a wheel takes the folder jobs/ along, with the experiments."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithJobs(build_py):
    """Copies jobs/ to where `tipl_ray.places.JOBS_FOLDER` looks for it outside a checkout."""

    def run(self) -> None:
        """The package, then the jobs; an editable install finds them in the checkout."""
        super().run()
        if not self.editable_mode:
            for file in (*Path("jobs").glob("*.py"), *Path("jobs", "experiments").glob("*.toml")):
                target = Path(self.build_lib, "tipl_ray", "shipped", file)
                self.mkpath(str(target.parent))
                self.copy_file(str(file), str(target))


setup(cmdclass={"build_py": WithJobs})
