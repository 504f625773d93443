"""The package as a wheel in an environment outside any checkout, the command `tipl`, and what `tipl_ray` exports."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from head import short_folder

import tipl_ray
from tipl_ray import tipl
from tipl_ray.data.trajectory_store import TrajectoryStore
from tipl_ray.experiments import named_experiments
from tipl_ray.places import CHECKOUT, published_predictors

SOURCES = ("tipl_ray", "jobs", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
SHRUNK = "collect.num-trials=3 collect.total-env-steps=16384 split.validation-trials=1 split.test-trials=1"
SHRUNK += " train.num-steps=10 train.steps-per-iteration=10 evaluate.windows-per-trial=1 evaluate.episodes=1"


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """What a command says, which must succeed, in surroundings that name no checkout."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    environment |= {"OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=cwd, env=environment, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: what a build leaves behind must not be in the next one."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (CHECKOUT / name).is_dir() else shutil.copy
        copy(CHECKOUT / name, folder / "source" / name)
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder)
    run(*pip, folder / "source", cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def programs(wheel: Path) -> Path:
    """The folder of programs of a fresh environment with the wheel, on top of the dependencies of this one."""
    environment = wheel.parent / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=wheel.parent)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    pip = (environment / "bin" / "python", "-m", "pip", "install", "--no-deps", "--no-index")
    run(*pip, wheel, cwd=wheel.parent)
    return environment / "bin"


def test_a_wheel_collects_trains_and_evaluates_by_name_from_an_empty_folder(programs: Path) -> None:
    with short_folder() as empty:
        (empty / "cache").mkdir()
        options = [f"--{option}" for option in SHRUNK.split()]
        surroundings = {"XDG_CACHE_HOME": str(empty / "cache"), "RAY_TMPDIR": str(empty)}
        run(programs / "tipl", "pipeline", "--experiment", "demo", *options, cwd=empty, **surroundings)
        assert len(list(empty.glob("storage/demo/evaluations/*/report.html"))) == 1
        assert list(empty.glob("cache/tipl_ray/learner-*.so")) or not shutil.which("g++")
        run(programs / "tipl", "collect", "--experiment", "smoke", cwd=empty, **surroundings)
        assert TrajectoryStore(str(empty / "storage" / "smoke")).digest((1, 2, 3, 4)) == "a5ace0c038b8caaa"
        said = run(programs / "tipl", "data", "verify", "storage/smoke", cwd=empty)
        assert "4 trials verified" in said


def test_a_wheel_is_what_an_environment_imports_and_has_every_experiment(programs: Path, tmp_path: Path) -> None:
    ask = "import tipl_ray, tipl_ray.experiments as e; print(tipl_ray.__file__, *sorted(e.named_experiments()))"
    place, *names = run(programs / "python", "-c", ask, cwd=tmp_path).split()
    assert Path(place).is_relative_to(programs.parent)
    assert set(names) >= {path.stem for path in (CHECKOUT / "jobs" / "experiments").glob("*.toml")}


def test_a_wheel_loads_every_published_predictor_by_its_name(programs: Path, tmp_path: Path) -> None:
    ask = "import sys, tipl_ray; print(*(tipl_ray.load_predictor(name).name for name in sys.argv[1:]))"
    loaded = run(programs / "python", "-c", ask, *published_predictors(), cwd=tmp_path).split()
    assert len(loaded) == len(published_predictors()) > 0


def test_a_script_beside_the_clone_imports_the_package_whatever_the_clone_is_called(tmp_path: Path) -> None:
    (tmp_path / "tipl_ray").symlink_to(CHECKOUT)
    (tmp_path / "mine.py").write_text("import tipl_ray; print(tipl_ray.__version__)")
    assert tipl_ray.__version__ in run(sys.executable, tmp_path / "mine.py", cwd=tmp_path)


def test_every_job_is_a_subcommand_with_a_line_of_help_at_once(capsys: pytest.CaptureFixture) -> None:
    assert sorted(tipl.NAMES) == sorted(path.stem for path in (CHECKOUT / "jobs").glob("*.py"))
    before = time.process_time(), os.times().children_user + os.times().children_system
    shown = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv = ['tipl', '--help']; from tipl_ray.tipl import main; main()"],
        capture_output=True,
        text=True,
        check=True,
        cwd=CHECKOUT,
    ).stdout
    assert time.process_time() - before[0] + os.times().children_user + os.times().children_system - before[1] < 0.6
    assert re.findall(r"^  (\w+) {2,}[A-Z].{20,}", shown, re.MULTILINE) == list(tipl.NAMES)


def test_a_subcommands_help_is_the_jobs_said_of_tipl(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in tipl.NAMES:
        path = list(sys.path)
        monkeypatch.setattr(sys, "argv", ["tipl", name, "--help"])
        with pytest.raises(SystemExit) as ended:
            tipl.main()
        assert not ended.value.code
        shown = capsys.readouterr().out
        assert shown.startswith(f"usage: tipl {name} ")
        assert "jobs/" not in re.split("╭|--experiment FILE", shown)[0]
        assert sys.path == path


def test_a_job_that_there_is_not_is_refused_in_one_line(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["tipl", "colect"])
    assert tipl.main() == 2
    assert capsys.readouterr().err.endswith("did you mean collect?\n")


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_jobs_options_and_experiments(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["tipl", tipl.COMPLETION, "bash"])
    with pytest.raises(SystemExit):
        tipl.main()
    (tmp_path / "completion").write_text(capsys.readouterr().out)

    def completed(*words: str) -> list[str]:
        ask = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _tyro_tipl; echo ${{COMPREPLY[@]}}"
        return run("bash", "-c", f"source completion; {ask}", cwd=tmp_path).split()

    assert completed("tipl", "co") == ["collect", "compare"]
    assert completed("tipl", "collect", "--collect.po") == ["--collect.policy-hidden"]
    assert completed("tipl", "train", "--experiment", "smo") == ["smoke"]
    assert completed("tipl", "compare", "--be") == ["--best"]


def test_what_ones_own_code_needs_is_loaded_when_it_is_asked_for() -> None:
    light = "import sys, tipl_ray; print([m for m in sys.modules if m.startswith(('torch', 'numpy', 'tipl_ray.'))])"
    assert run(sys.executable, "-c", light, cwd=CHECKOUT).strip() == "[]"
    for name, module in tipl_ray.EXPORTS.items():
        assert getattr(tipl_ray, name).__module__ == module
    assert set(tipl_ray.EXPORTS) <= set(dir(tipl_ray))
    with pytest.raises(AttributeError, match="'tipl_ray' has no attribute 'Trajectories'"):
        _ = tipl_ray.Trajectories
    assert set(named_experiments()) >= {"demo", "smoke"}
