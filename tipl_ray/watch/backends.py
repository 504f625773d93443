"""What MuJoCo draws with where there is no display: EGL or OSMesa, whichever works on this machine.

Each is tried in a process of its own, as one that does not work may end the process, and with MUJOCO_GL set to it not
even `import mujoco` works. So nothing here imports it.
"""

import os
import subprocess
import sys

from tipl_ray.errors import UserError

BACKENDS = ("egl", "osmesa", "glfw")
"""What MuJoCo may draw with; the last needs a display."""
TRY = """
import importlib, mujoco
model = mujoco.MjModel.from_xml_string("<mujoco/>")
context = importlib.import_module("mujoco.{backend}").GLContext(64, 64)
context.make_current()
mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
"""
INSTALL = (
    "install EGL (on Debian and Ubuntu: apt install libegl1 libgl1-mesa-dri) or OSMesa (apt install libosmesa6); "
    "MUJOCO_GL=egl or MUJOCO_GL=osmesa chooses one"
)


def offscreen_backend() -> str:
    """The backend that MuJoCo can draw with here: that of MUJOCO_GL, else the first that works. Raises UserError."""
    wanted, complaints = os.environ.get("MUJOCO_GL"), []
    for backend in (wanted,) if wanted else BACKENDS:
        code = TRY.format(backend=backend)
        environment = {**os.environ, "MUJOCO_GL": backend}
        tried = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        if tried.returncode == 0:
            return backend
        said = [line for line in tried.stderr.splitlines() if line.strip()]
        complaints.append(f"MUJOCO_GL={backend}: {said[-1] if said else f'exit status {tried.returncode}'}")
    raise UserError(f"MuJoCo cannot draw here ({'; '.join(complaints)}); {INSTALL}")
