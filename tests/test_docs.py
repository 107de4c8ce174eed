"""Every Python block of the documents runs, a section at a time: its blocks share their names, as they are read."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch

DOCUMENTS = Path(__file__).resolve().parent.parent / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # of torch, in Lightning
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # Lightning's advice
]


def sections():
    """Document, heading and blocks of each section of the second level that has code."""
    for document in sorted(DOCUMENTS.glob("*.md")):
        for section in document.read_text().split("\n## "):
            if blocks := BLOCK.findall(section):
                yield pytest.param(document.name, blocks, id=f"{document.stem}: {section.splitlines()[0]}")


SECTIONS = list(sections())


def test_there_are_sections():
    assert len(SECTIONS) >= 3


@pytest.mark.parametrize(("document", "blocks"), SECTIONS)
def test_section(document, blocks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for what a block writes
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # C++ would take half a minute
    names = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, document, "exec"), names)
