"""What mkdocs does before it reads a page: files of the repository that are no pages are linked
where they lie.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Turn links out of ``docs`` into links to the repository; a missing file is an error."""

    def link(found: re.Match[str]) -> str:
        path = found[1]
        if not (ROOT / path).exists():
            raise SystemExit(f"{page.file.src_uri} links to {path}, which does not exist")
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"]({config.repo_url.rstrip('/')}/{kind}/main/{path}"

    return re.sub(r"\]\(\.\./([^)#]+)", link, markdown)


def on_page_read_source(page: Any, config: Any) -> str | None:
    """The changelog and the guide for contributors are pages, too."""
    pages = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
    name = pages.get(page.file.src_uri)
    if name is None:
        return None
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.sub(
        r"\]\((?!https?:|#|\.\./)(docs/)?", lambda found: "](" if found[1] else "](../", text
    )
