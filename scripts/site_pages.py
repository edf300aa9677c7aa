# SPDX-License-Identifier: Apache-2.0
"""What the site has besides ``docs`` (a hook of MkDocs; ``make docs``).

README is the start page; CONTRIBUTING and the like are pages. A file of the repository that a page links to
becomes a page with its text, so that every link leads somewhere on the site itself.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Pages by their path in the repository.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
_FENCED = re.compile(r"(^```.*?^```$)", re.M | re.S)
_LANGUAGES = {".py": "python", ".cc": "cpp", ".h": "cpp"}
_IMAGES = {".svg", ".png"}


def on_files(files: Any, config: Any) -> Any:
    """MkDocs: the files of the site. Adds those that are not in ``docs``."""
    from mkdocs.structure.files import File

    wanted = [*PAGES]
    texts = [ROOT / "docs" / file.src_uri for file in files.documentation_pages()]
    for document in (*texts, *(ROOT / name for name in PAGES)):
        wanted += [path for path in links(document) if not path.startswith("docs/")]
    for path in dict.fromkeys(wanted):
        if Path(path).suffix in _IMAGES:
            files.append(File.generated(config, place(path), abs_src_path=str(ROOT / path)))
        else:
            text = (ROOT / path).read_text() if path in PAGES else shown(path)
            files.append(File.generated(config, place(path), content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """MkDocs: the text of a page, with links as they are on the site."""
    origins = {uri: path for path, uri in PAGES.items()}
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown
    return relinked(markdown, origins.get(uri, f"docs/{uri}"))


def links(document: Path) -> list[str]:
    """The paths in the repository that a document links to."""
    prose = _FENCED.sub("", document.read_text())
    found = [target(match[1], document.relative_to(ROOT).as_posix()) for match in _LINK.finditer(prose)]
    return [path for path in found if path is not None]


def target(link: str, document: str) -> str | None:
    """The path in the repository that a link in a document means; None if it leads elsewhere."""
    if "://" in link or link.startswith("mailto:"):
        return None
    path = os.path.normpath(os.path.join(os.path.dirname(document), link))
    if not (ROOT / path).exists():
        raise FileNotFoundError(f"{document} links to {link}, which does not exist")
    return path


def place(path: str) -> str:
    """Where on the site a file of the repository is."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}" if Path(path).suffix in _IMAGES else f"source/{path}.md"


def relinked(markdown: str, document: str) -> str:
    """The text of a document with its links as they are on the site."""
    here = os.path.dirname(place(document))

    def change(match: re.Match[str]) -> str:
        path = target(match[1], document)
        if path is None:
            return match[0]
        return os.path.relpath(place(path), here or ".") + (match[2] or "")

    parts = _FENCED.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(change, part) for part in parts)


def shown(path: str) -> str:
    """A page with the text of a file, or with what is in a folder."""
    head = f"---\nsearch: {{exclude: true}}\nhide: [toc]\n---\n# {path}\n\n"
    if (ROOT / path).is_dir():
        names = sorted(each.name for each in (ROOT / path).iterdir() if each.suffix == ".txt")
        blocks = [f"## {name}\n\n{_fenced((ROOT / path / name).read_text(), '')}" for name in names]
        return head + "\n".join(blocks)
    return head + _fenced((ROOT / path).read_text(), _LANGUAGES.get(Path(path).suffix, ""))


def _fenced(text: str, language: str) -> str:
    return f"````{language}\n{text.rstrip()}\n````\n"
