"""Reports of a job: self-contained HTML pages, and tables as CSV.

Every page is a template of one folder, filled in; they share `base.html`, which has the style, and `parts.html`.
Knows nothing of what is reported.
"""

import base64
import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.csv

TEMPLATES = Path(__file__).with_name("templates")


def page(template: str, **values: Any) -> str:
    """A template of the folder with values in their places, escaped. Raises jinja2.UndefinedError for one missing."""
    return _environment().get_template(template).render(values)


def embedded(png: bytes) -> str:
    """A picture as a data URI, which contains the whole picture."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def as_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows of equal keys as CSV, headed by the keys; figures in full, None empty. Nothing of no rows."""
    sink = io.BytesIO()
    if rows:
        pyarrow.csv.write_csv(pa.Table.from_pylist(list(rows)), sink)
    return sink.getvalue()


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
