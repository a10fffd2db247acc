"""Runs the notebooks and writes them, with their outputs, to docs/notebooks as Markdown: `make notebooks`."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

FOLDER = Path(__file__).parent
DOCS = FOLDER.parent / "docs" / "notebooks"


def notebooks() -> list[Path]:
    """The notebooks, in the order of their story."""
    return sorted(FOLDER.glob("*.ipynb"))


def run(notebook: Path, campaign: str, folder: Path) -> Any:
    """Execute a notebook on a campaign from the kernel's folder, and return it with its outputs."""
    content = nbformat.read(notebook, as_version=4)
    (parameters,) = [cell for cell in content.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source = f"CAMPAIGN = {json.dumps(campaign)}"
    NotebookClient(content, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return content


def render(notebook: Path, campaign: str) -> Path:
    """Write `docs/notebooks/<name>.md` and its pictures."""
    content = run(notebook, campaign, Path.cwd())
    name = f"{notebook.stem}_files"
    body, resources = MarkdownExporter().from_notebook_node(content, {"output_files_dir": name})
    (DOCS / name).mkdir(parents=True, exist_ok=True)
    for old in (DOCS / name).iterdir():
        old.unlink()
    for file, data in resources["outputs"].items():
        (DOCS / file).write_bytes(data)
    target = DOCS / f"{notebook.stem}.md"
    body = re.sub(r"<style.*?</style>\n?", "", body, flags=re.DOTALL)  # pages that forbid styles print them
    body = body.replace(".ipynb)", ".md)").replace("![png]", f"![{notebook.stem.replace('_', ' ')}]")
    target.write_text(body, encoding="utf-8")
    return target


if __name__ == "__main__":
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    for path in notebooks():
        print(render(path, sys.argv[1] if len(sys.argv) > 1 else "ecommerce_purchase"))
