"""What the documentation site has beyond docs/: README.md, cluster/README.md and the source files that pages link to.

A hook of mkdocs. Pages are written with links that work in the repository; here these are changed to the site's own.
"""

import json
import posixpath
import re
import textwrap
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "cluster/README.md": "cluster/README.md"}
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
"""A Markdown link or picture: before its target, the target, and what follows it."""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of `PAGES`, and a page for each source file that any page links to."""
    for path, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    pages = [path for path in files.src_uris if path.endswith(".md")]
    for uri in pages:
        path = in_repository(uri)
        for _, target, _ in LINK.findall((ROOT / path).read_text(encoding="utf-8")):
            linked = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
            if "://" not in target and in_site(linked) not in files.src_uris and (ROOT / linked).is_file():
                text = source_text(ROOT / linked)
                language = {".py": "python", ".ipynb": "python", ".yaml": "yaml", ".sh": "sh", ".json": "json"}.get(
                    Path(linked).suffix, "text"
                )
                head = "---\nsearch: {exclude: true}\n---\n"
                content = f"{head}# {posixpath.basename(linked)}\n\n`{linked}`\n\n````{language}\n{text}````\n"
                files.append(File.generated(config, in_site(linked), content=content))
    return files


def source_text(path: Path) -> str:
    """A source file; of a notebook the cells, those that are not code as comments."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
    parts = [cell if kind == "code" else textwrap.indent(cell, "# ", lambda line: True) for kind, cell in cells]
    return "\n\n".join(parts) + "\n"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links out of docs/ to what `on_files` added."""
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown
    folder = posixpath.dirname(in_repository(uri))

    def led(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        if ":" in target:
            return match[0]
        place = in_site(posixpath.normpath(posixpath.join(folder, target)))
        return f"{before}{posixpath.relpath(place, posixpath.dirname(uri) or '.')}{after}"

    return LINK.sub(led, markdown)


def in_repository(uri: str) -> str:
    """The path in the repository of one of the site's pages."""
    return {uri: path for path, uri in PAGES.items()}.get(uri, f"docs/{uri}")


def in_site(path: str) -> str:
    """Where the site has a file of the repository: docs/ is its root, and all else but `PAGES` is under source/."""
    if path in PAGES:
        return PAGES[path]
    parts = PurePosixPath(path).parts
    return posixpath.join(*parts[1:]) if parts[0] == "docs" and len(parts) > 1 else f"source/{path}.md"
