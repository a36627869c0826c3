"""What the build of the site adds to mkdocs: files beside `docs/`, notebooks, and a look at every page.

Pages link to the repository as on a code host, `../experiments/gauges/README.md` say. The files that are linked so are
part of the site, at the same places below its root. Three examples are executed and become pages, as notebooks.
"""

import re
import tempfile
from pathlib import Path

import jupytext
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent
BESIDE = ("experiments/**/README.md", "experiments/**/*.p[ny]*", "configs/**/*.py", "examples/*.py", "LICENSE")
NOTEBOOKS = ("curvature", "geometry", "image_classifier")
OUTSIDE = re.compile(
    r'<(?:script|img|iframe|source)[^>]* src="https?:[^>]*>|<link rel="(?!canonical)[^>]*href="https?:'
)


def on_files(files, config):
    """Adds what is beside the folder of the pages, and the notebooks."""
    for pattern in BESIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    for name in NOTEBOOKS:
        for path, content in notebook(ROOT / "examples" / f"{name}.py").items():
            files.append(File.generated(config, f"examples/{path}", content=content))
    return files


def notebook(script: Path) -> dict[str, str | bytes]:
    """Executes an example; returns its page, the notebook itself and the figures, by their names."""
    cells = jupytext.read(script)
    clean = jupytext.writes(cells, fmt="ipynb")
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(cells, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    page, resources = MarkdownExporter().from_notebook_node(cells, {"output_files_dir": f"{script.stem}_files"})
    top, _, rest = page.partition("\n")  # the title
    links = f"\n[{script.name}]({script.name}), also [as a notebook]({script.stem}.ipynb)\n"
    return {f"{script.stem}.md": f"{top}\n{links}{rest}", f"{script.stem}.ipynb": clean, **resources["outputs"]}


def on_page_markdown(markdown, page, **_):
    """Turns links out of `docs/` into links within the site, and those to a folder into links to its README."""
    name = page.file.src_uri
    inside = (ROOT / "docs" / name).exists()
    folder = (ROOT / "docs" / name if inside else ROOT / name).parent

    def linked(match):
        text, path = match.groups()
        target = folder / path.partition("#")[0]
        if target.is_dir():
            path, target = f"{path.rstrip('/')}/README.md", target / "README.md"
            if not target.exists():
                return text
        if inside and not target.resolve().is_relative_to(ROOT / "docs"):
            path = path.replace("../", "", 1)  # the root of the repository is that of the site
        return f"[{text}]({path})"

    return re.sub(r"\[([^\[\]]*)\]\((?!https?:|#)([^)\s]+)\)", linked, markdown)


def on_post_page(output, page, **_):
    """Fails where a page would ask another host for something."""
    if found := OUTSIDE.search(output):
        raise PluginError(f"{page.file.src_uri}: a request would leave the page: {found[0]}")
    return output
