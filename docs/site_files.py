"""A hook of MkDocs: gives the site the repository's tree, so that links between pages, results and sources hold."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\(([^)#\s]+)[^)\s]*\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """README.md, the pages of docs/, and every file that one of them links to, directly or through other pages."""
    wanted = [ROOT / "README.md", ROOT / "docs" / "site.css", *sorted((ROOT / "docs").glob("*.md"))]
    for path in wanted:
        if path.suffix != ".md":
            continue
        for link in LINK.findall(path.read_text(encoding="utf-8")):
            target = (path.parent / link).resolve()
            if target.is_file() and target.is_relative_to(ROOT) and target not in wanted:
                wanted.append(target)
    ours = [File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)) for path in wanted]
    return Files([*ours, *(file for file in files if file.src_dir != config.docs_dir)])
