"""Environments that draw themselves without a display, and videos of what they draw."""

import importlib.util
import os
import uuid
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from numpy.typing import NDArray

from tipl_ray.data.storage import TEMPORARY
from tipl_ray.errors import UserError
from tipl_ray.watch.backends import offscreen_backend

Frame = NDArray[np.uint8]
"""(height, width, 3)"""

GIF_STEP = 0.02
"""Shortest time between two frames that viewers of GIFs respect [s]."""


def make_environment(task: str, options: Mapping[str, Any]) -> gymnasium.Env:
    """A task that draws RGB frames.

    Raises UserError, with what to install, where it cannot draw; ValueError for a task that gymnasium does not have.
    """
    # Tasks that pygame draws need neither a display nor a sound card here, and SDL would complain of both.
    os.environ |= {"SDL_VIDEODRIVER": "dummy", "SDL_AUDIODRIVER": "dummy"}
    try:
        with warnings.catch_warnings(action="ignore"):  # of newer versions
            environment = gymnasium.make(task, render_mode="rgb_array", disable_env_checker=True, **options)
    except gymnasium.error.DependencyNotInstalled as error:
        raise _cannot_draw(task, error) from error
    except (gymnasium.error.Error, ImportError, TypeError, ValueError) as error:
        raise ValueError(f"task={task!r} is no task of gymnasium that can be watched: {error}") from error
    if isinstance(environment.unwrapped, MujocoEnv):
        os.environ["MUJOCO_GL"] = offscreen_backend()
    try:
        environment.reset(seed=0)
        environment.render()
    except gymnasium.error.DependencyNotInstalled as error:
        raise _cannot_draw(task, error) from error
    return environment


def video_path(output: Path | None, name: str) -> Path:
    """Where a video is written: as asked, else `name` in the working directory, mp4 where imageio-ffmpeg is installed.

    Raises ValueError for a path that cannot be, UserError for an mp4 that needs imageio-ffmpeg.
    """
    has_ffmpeg = importlib.util.find_spec("imageio_ffmpeg") is not None
    output = output or Path(f"{name}.{'mp4' if has_ffmpeg else 'gif'}")
    if output.suffix not in (".mp4", ".gif"):
        raise ValueError(f"output={output} must end in .mp4 or .gif")
    if output.suffix == ".mp4" and not has_ffmpeg:
        raise UserError(f"output={output} needs imageio-ffmpeg; pip install 'tipl_ray[watch]', or choose a .gif")
    if not output.parent.is_dir():
        raise ValueError(f"output={output}: no such folder, {output.parent}; create it first, or choose another")
    return output


def write_video(output: Path, frames: Sequence[Frame], frames_per_second: float) -> None:
    """Write frames as mp4 or gif, by the path's ending, whole or not at all; a file that is there is replaced."""
    partial = output.with_name(f"{TEMPORARY}{uuid.uuid4().hex}{output.suffix}")
    try:
        (_write_mp4 if output.suffix == ".mp4" else _write_gif)(partial, frames, frames_per_second)
        partial.rename(output)
    except OSError as error:
        raise UserError(f"output={output}: cannot be written: {error}; free some space or fix permissions") from error
    finally:
        partial.unlink(missing_ok=True)


def _write_mp4(path: Path, frames: Sequence[Frame], frames_per_second: float) -> None:
    import imageio_ffmpeg

    # Sides of odd length are cut by one pixel, as the codec halves its colours' resolution.
    height, width = (side // 2 * 2 for side in frames[0].shape[:2])
    writer = imageio_ffmpeg.write_frames(str(path), (width, height), fps=frames_per_second, macro_block_size=2)
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame[:height, :width]))
    writer.close()


def _write_gif(path: Path, frames: Sequence[Frame], frames_per_second: float) -> None:
    from PIL import Image

    every = max(1, round(2 * GIF_STEP * frames_per_second))
    first, *others = [Image.fromarray(frame) for frame in frames[::every]]
    duration = round(1000 * every / frames_per_second)
    first.save(path, save_all=True, append_images=others, duration=duration, loop=0)


def _cannot_draw(task: str, error: Exception) -> UserError:
    return UserError(f"task={task!r} cannot be drawn: {error}")
