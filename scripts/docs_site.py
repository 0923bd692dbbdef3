"""Define the hooks of mkdocs.yml, which add the pages of the repository's top level to the site.

The hooks also rewrite links, so that links work in the site as they do on a code host.
"""

import re
from os.path import normpath, relpath
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
TOP_LEVEL = {
    "README.md": "overview.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
"""Pages of the top level, with their names in the site."""
CODE = r"^```.*?^```|`[^`\n]+`"
LINK = r"\[(?P<label>[^\]]*)\]\((?P<target>[^)#\s]+)(?P<fragment>#[^)\s]*)?\)"
CODE_OR_LINK = re.compile(f"{CODE}|{LINK}", re.DOTALL | re.MULTILINE)


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Add the pages of the top level to those in docs/."""
    from mkdocs.structure.files import File

    for name, page in TOP_LEVEL.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: "Page", config: "MkDocsConfig", files: "Files") -> str:
    """Rewrite the links of a page."""
    return site_links(markdown, page.file.src_uri)


def site_links(markdown: str, page: str) -> str:
    """Return the Markdown of ``page``, with links to pages of the site instead of files of the repository.

    ``page`` is a name in the site. A link to a file that is not part of the site becomes its label. A link to a file
    that does not exist stays as it is, and the strict build reports it.
    """
    sources = {in_site: name for name, in_site in TOP_LEVEL.items()}
    folder = Path(sources.get(page, f"docs/{page}")).parent

    def rewritten(match: re.Match[str]) -> str:
        label, target, fragment = match["label"], match["target"], match["fragment"] or ""
        if target is None or re.match(r"[a-z]+:", target):
            return match[0]
        path = Path(normpath(folder / target))
        if (ROOT / path).is_dir():
            path /= "README.md"
        if not (ROOT / path).exists():
            return match[0]
        if str(path) in TOP_LEVEL:
            in_site = TOP_LEVEL[str(path)]
        elif path.parts[0] == "docs":
            in_site = str(path.relative_to("docs"))
        else:
            return label
        return f"[{label}]({relpath(in_site, Path(page).parent)}{fragment})"

    return CODE_OR_LINK.sub(rewritten, markdown)
