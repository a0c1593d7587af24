"""Hook of mkdocs: README becomes the first page, and files of the repository that pages link to become pages.

A page of docs/ links to `../fedpeft_ext/presets/ml-1m.yaml` as it does in the repository; in the site, which
has no such file, the link leads to a page with the file's text. Links of README and CONTRIBUTING are turned
likewise.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PLACES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
PICTURES = (".png", ".svg")
LANGUAGES = {".yaml": "yaml", ".py": "python", ".cpp": "cpp", ".toml": "toml"}
_LINK = re.compile(r"(\]\()([^)#:]+)((?:#[^)]*)?\))")


def place(path: str, root: Path) -> str | None:
    """Where a file of the repository, or of docs/, is in the site; None for folders and what is not there."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if not (root / path).is_file():
        return None
    return PLACES.get(path) or "sources/" + path + ("" if path.endswith((".md", *PICTURES)) else ".md")


def turned(text: str, path: str, root: Path) -> tuple[str, set[str]]:
    """The text of the file `path` with links for the site, and the files outside docs/ that it links to."""
    here = posixpath.dirname(place(path, root) or "")
    outside: set[str] = set()

    def turn(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), match[2]))
        there = place(target, root)
        if there is None:
            return match[0]
        if not target.startswith("docs/"):
            outside.add(target)
        return match[1] + posixpath.relpath(there, here or ".") + match[3]

    return _LINK.sub(turn, text), outside


def text_of(path: str, root: Path) -> str:
    """A file as Markdown: as it is, or as one block of code under its name."""
    text = (root / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    return f"# {path}\n\n````{LANGUAGES.get(Path(path).suffix, 'text')}\n{text}````\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README, CONTRIBUTING, CHANGELOG, and what pages link to, and so on."""
    root = Path(config.config_file_path).parent
    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    waiting = set(PLACES).union(*(turned((root / page).read_text(), page, root)[1] for page in pages))
    added: set[str] = set()
    while waiting:
        path = waiting.pop()
        added.add(path)
        there = str(place(path, root))
        if path.endswith(PICTURES):
            files.append(File.generated(config, there, abs_src_path=str(root / path)))
            continue
        content = text_of(path, root)
        if path.endswith(".md"):
            content, outside = turned(content, path, root)
            waiting |= outside - added
        files.append(File.generated(config, there, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of a page of docs/ (those of others were turned when they were added)."""
    if page.file.generated_by:
        return markdown
    return turned(markdown, f"docs/{page.file.src_uri}", Path(config.config_file_path).parent)[0]
