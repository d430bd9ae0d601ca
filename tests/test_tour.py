"""The notebook `studies/tour.ipynb`: every cell runs, here with tiny settings, and what is committed has outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TOUR = Path(__file__).parents[1] / "studies" / "tour.ipynb"
TINY = 'N_TRIALS, EPOCHS, TRAIN_IMAGES, MAX_PARAMS = 3, 1, 300, 400\nFOLDER = Path("tour")'


@pytest.fixture(scope="module")
def tour():
    return nbformat.read(TOUR, as_version=4)


def test_committed_outputs_are_of_one_run_from_top_to_bottom_without_an_error(tour):
    code = [cell for cell in tour.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    text = "".join(output.get("text", "") for output in outputs)
    assert "Prediction(" in text and str(Path.home()) not in text


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # of Jupyter's own parts
def test_every_cell_runs(tour, tmp_path, data_dir, monkeypatch):
    monkeypatch.setenv("NAS_MNIST_DATA", str(data_dir))
    (parameters,) = [cell for cell in tour.cells if "parameters" in cell.metadata.get("tags", ())]
    head = parameters.source.splitlines()[0]
    assert head == "from pathlib import Path" and parameters.source.count("FOLDER = ") == 1
    parameters.source = f"{head}\n\n{TINY}"
    client = NotebookClient(tour, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    assert (tmp_path / "tour" / "solution" / "solution.json").exists()
    text = "".join(output.get("text", "") for cell in tour.cells for output in cell.get("outputs", ()))
    assert "3/3" in text and "label=" in text
