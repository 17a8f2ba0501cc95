"""The notebook in `examples/`: it comes without outputs, and runs from top to bottom."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "lenet.ipynb"


def test_it_comes_without_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5
    for cell in code:
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@pytest.mark.wide
def test_it_runs(tmp_path):
    """In a folder of its own, with few epochs and small batches; what it prints is what its text says."""
    for name in ("rich", "mlxtend", "matplotlib", "ipykernel"):
        pytest.importorskip(name)
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    assert re.findall(r"^(\w+) =", parameters.source, re.MULTILINE) == ["EPOCHS", "BATCHES"]
    parameters.source = "EPOCHS = 2\nBATCHES = 1, 64\n"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "61706 numbers to learn" in text
    assert all(float(found) < 1e-5 for found in re.findall(r"largest difference: (\S+)", text))
    before, after = map(float, re.findall(r"loss before (\S+), after (\S+)", text)[0])
    assert after < before
    assert float(re.findall(r"epoch  2: .* held out (\S+)% right", text)[0]) > 80
    assert len(re.findall(r"^(?:inference|training_step) +\d+ .* (?:yes|no)$", text, re.MULTILINE)) == 4
    stock, fused = (
        float(re.findall(rf"{name}: ([\d,]+) bytes", text)[0].replace(",", "")) for name in ("stock", "fused")
    )
    assert fused < stock
    assert [output for output in outputs if "image/png" in output.get("data", {})]
    assert list(tmp_path.iterdir()) == []
