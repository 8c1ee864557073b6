"""What the site has beyond docs/: tutorials, pages from the root, pictures of benchmarks, formulas, generated tables.

The files of the repository stay as they read best on their own; this turns them into pages. Only the standard library
and what the extra ``docs`` installs is imported, so that the site builds without torch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import choose
import formulas
import gallery
import links
import notebooks
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import tutorials

ROOT = Path(__file__).parents[1]
FROM_ROOT = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "CODE_OF_CONDUCT.md": "code_of_conduct.md",
    "SECURITY.md": "security.md",
}


def on_config(config: MkDocsConfig) -> None:
    """Tutorials, and pages that nobody has put into the navigation, get their places."""
    sections = {title: entries for entry in config.nav or [] for title, entries in entry.items()}
    sections["Tutorials"].extend(f"tutorials/{path.stem}.md" for path in tutorials.scripts())
    shown = set(_leaves(config.nav)) | {"errors.md"}
    for path in sorted(Path(config.docs_dir).glob("*.md")):
        if path.name not in shown:
            sections["Coming from" if path.name.startswith("from_") else "How-to"].append(path.name)


def _leaves(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    children = entry.values() if isinstance(entry, dict) else entry
    return [leaf for child in children for leaf in _leaves(child)]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Pages and pictures that stand elsewhere in the repository."""
    for source, target in FROM_ROOT.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    for path in tutorials.scripts():
        page = tutorials.page(path, config.repo_url or "", notebooks.colab(path, config.repo_url or ""))
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=page))
        files.append(File.generated(config, f"tutorials/{path.stem}.ipynb", content=notebooks.notebook(path)))
        for picture in tutorials.pictures(path):
            target = f"tutorials/{path.stem}/{picture.name}"
            files.append(File.generated(config, target, abs_src_path=str(picture)))
    for picture in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        target = f"benchmarks/results/{picture.name}"
        files.append(File.generated(config, target, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links that leave docs/ are led to where the site has the file, or to the repository; tables are filled in."""
    sources = {target: source for source, target in FROM_ROOT.items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    places = {f"docs/{file.src_uri}": file.src_uri for file in files}
    places |= {file.src_uri: file.src_uri for file in files if file.src_uri.startswith("benchmarks/results/")}
    places |= {f"tutorials/{path.name}": f"tutorials/{path.stem}.md" for path in tutorials.scripts()}
    places |= FROM_ROOT
    markdown = links.led(links.shown(markdown), source, page.file.src_uri, places, config.repo_url or "")
    here = {file.src_uri for file in files}
    return gallery.filled(choose.filled(markdown), here, config.repo_url or "")


def on_page_content(html: str, **_: Any) -> str:
    return formulas.drawn(html)


def on_post_page(output: str, **_: Any) -> str:
    return _without_counts(output)


def on_post_template(output_content: str, **_: Any) -> str:
    return _without_counts(output_content)


def _without_counts(page: str) -> str:
    """The theme would ask GitHub for stars and forks on each visit, and nothing is loaded from elsewhere."""
    return page.replace(' data-md-component="source"', "")
