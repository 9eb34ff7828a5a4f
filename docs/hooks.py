"""What mkdocs does besides: pages that lie elsewhere in the repository, links to files that are no
pages, and the registered classes in the API reference.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from flowgym_gym import base_model_registry, reward_registry
from flowgym_gym.registry import Registry

ROOT = Path(__file__).parents[1]
ELSEWHERE = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
}
REGISTERED = {
    "<!-- registered base models -->": base_model_registry,
    "<!-- registered rewards -->": reward_registry,
}


def on_page_read_source(page: Any, config: Any) -> str | None:
    """The changelog, the guide for contributors and the security policy are pages, too."""
    name = ELSEWHERE.get(page.file.src_uri)
    if name is None:
        return None
    return re.sub(
        r"\]\((?!https?:|#)([^)]+)",
        lambda found: f"]({_from_docs(found[1])}",
        (ROOT / name).read_text(encoding="utf-8"),
    )


def _from_docs(link: str) -> str:
    """A link of a file in the root, as a page in ``docs`` has it."""
    pages = {source: page for page, source in ELSEWHERE.items()}
    return link.removeprefix("docs/") if link.startswith("docs/") else pages.get(link, f"../{link}")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Links out of ``docs`` lead to the repository; a missing file is an error."""
    pages = {source: page for page, source in ELSEWHERE.items()}
    docs = Path(config.docs_dir)

    def link(found: re.Match[str]) -> str:
        path = (docs / page.file.src_uri).parent.joinpath(found[1]).resolve()
        if path.is_relative_to(docs):
            return found[0]
        name = path.relative_to(ROOT).as_posix()
        if name in pages:
            return f"]({pages[name]}"
        if not path.exists():
            raise SystemExit(f"{page.file.src_uri} links to {name}, which does not exist")
        kind = "tree" if path.is_dir() else "blob"
        return f"]({config.repo_url.rstrip('/')}/{kind}/main/{name}"

    for mark, registry in REGISTERED.items():
        if mark in markdown:
            markdown = markdown.replace(mark, "\n\n".join(_directives(registry)))
    return re.sub(r"\]\((\.\./[^)#]+)", link, markdown)


def _directives(registry: Registry) -> list[str]:
    """What makes mkdocstrings describe the classes of this package that are registered."""
    places = [registry.get(id).entry_point for id in registry.list()]
    paths = [place.replace(":", ".") for place in places if isinstance(place, str)]
    return [f"::: {path}" for path in dict.fromkeys(paths)]


def on_post_page(output: str, page: Any, config: Any) -> str:
    """No markup of Sphinx is left, which Markdown would show as it is."""
    left = re.search(r":(?:math|class|func|meth|mod|attr):|\.\. math::", output)
    if left:
        raise SystemExit(f"{page.file.src_uri} shows {left[0]} as it is")
    return output
