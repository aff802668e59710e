"""Hook of mkdocs: pages from elsewhere in the repository, and links that lead the same way there and in the site."""

import json
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
# What the site shows of the repository outside docs/.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "examples/notebooks/quickstart.ipynb": "quickstart.md",
}
for _card in sorted(ROOT.glob("model_cards/*/README.md")):
    PAGES[f"model_cards/{_card.parent.name}/README.md"] = f"model_cards/{_card.parent.name}.md"
    PAGES[f"model_cards/{_card.parent.name}/distillation/report.md"] = f"model_cards/{_card.parent.name}-report.md"
SOURCES = {uri: source for source, uri in PAGES.items()}
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages from outside docs/, and the files of the repository that any page links to."""
    for source, uri in PAGES.items():
        if (ROOT / source).is_file():
            files.append(File.generated(config, uri, content=text_of(ROOT / source)))
    for path in linked(files):
        if (ROOT / path).is_dir():
            files.append(File.generated(config, uri_of(path), content=listing(path)))
    for path in linked(files):
        if (ROOT / path).is_file():
            files.append(File.generated(config, uri_of(path), abs_src_path=str(ROOT / path)))
    return files


def linked(files: Files) -> list[str]:
    """What the pages link to of the repository that is no page itself."""
    pairs = ((source_of(page.src_uri), page.content_string) for page in files.documentation_pages())
    paths = {repository_path(source, target) for source, text in pairs for target, _ in LINK.findall(text)}
    return sorted(path for path in paths if uri_of(path).startswith("files/"))


def listing(folder: str) -> str:
    """A page with what is in a folder of the repository."""
    found = sorted(path for path in (ROOT / folder).rglob("*.*") if path.suffix in (".ipynb", ".json", ".md", ".yaml"))
    names = [path.relative_to(ROOT / folder).as_posix() for path in found]
    up = posixpath.relpath(folder, posixpath.dirname(source_of(uri_of(folder))))
    links = [f"- [{name}]({up}/{name})" for name in names]
    return "\n".join([f"# {folder}", "", *links, ""])


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links through the repository into links through the site."""
    source = source_of(page.file.src_uri)
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]

    def site_link(link: re.Match) -> str:
        path = repository_path(source, link[1])
        if not (ROOT / path).exists():  # none of ours, such as code in brackets; mkdocs complains of what is missing
            return link[0]
        return posixpath.relpath(uri_of(path), posixpath.dirname(page.file.src_uri) or ".") + (link[2] or "")

    return LINK.sub(site_link, markdown)


def source_of(uri: str) -> str:
    """The path in the repository of a page of the site."""
    return SOURCES.get(uri, f"docs/{uri}")


def uri_of(path: str) -> str:
    """Where a file or folder of the repository is in the site."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return PAGES.get(path) or f"files/{path}{'.md' if (ROOT / path).is_dir() else ''}"


def repository_path(source: str, target: str) -> str:
    """The path in the repository that a link in one of its files leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def text_of(path: Path) -> str:
    """A file as Markdown; of a notebook the cells, without what they printed."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
    return "\n\n".join(f"```python\n{source}\n```" if kind == "code" else source for kind, source in cells) + "\n"
