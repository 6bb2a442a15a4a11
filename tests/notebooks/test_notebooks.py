"""Every notebook as it is committed, and every notebook executed by papermill with the smoke profile.

That the committed outputs still hold is checked by nbval, in a call of its own: see the Makefile.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat
import pytest

from agd_lib.attach import AdapterSet
from agd_lib.base_models import load_base
from agd_lib.report import write_report
from agd_lib.reproduce import LANE_OF_BASE, LANES, NOTEBOOKS, Profile, load_profile, main, merge_results, reproduce
from agd_lib.results import markdown_table
from agd_lib.trajectories import TrajectoryStore

COMMITTED = sorted(NOTEBOOKS.glob("*.ipynb"))
BASES = ("tiny-dit", "tiny-sd21", "tiny-sdxl")
ABSOLUTE_PATH = re.compile(r"(?<![\w.])(/root|/home|/tmp|/work|/Users|/opt|/private|[A-Z]:\\)[/\\]?")


@pytest.fixture(params=COMMITTED, ids=lambda path: path.stem)
def committed(request: pytest.FixtureRequest) -> Any:
    notebook = nbformat.read(request.param, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(notebook: Any) -> str:
    """All that the outputs say in words."""
    parts = []
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if output.output_type == "stream":
                parts.append(output.text)
            parts += ["".join(v) for k, v in output.get("data", {}).items() if k.startswith("text/")]
    return "\n".join(parts)


# As committed -----------------------------------------------------------------------------------------------------------


def test_all_notebooks_of_all_lanes_are_there() -> None:
    assert {notebook.name for lane in LANES.values() for notebook in lane} <= {path.stem for path in COMMITTED}


def test_one_cell_of_parameters(committed: Any) -> None:
    tagged = [cell for cell in committed.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    for line in tagged[0].source.splitlines():
        assert re.fullmatch(r"\w+: (str|int|float|bool|dict|list)(\[[\w, ]+\])? = .+  # .+", line), (
            f"expected `name: type = literal  # what`: {line}"
        )


def test_every_cell_was_executed_in_order_and_without_an_error(committed: Any) -> None:
    counts = [cell.execution_count for cell in code_cells(committed)]
    assert None not in counts
    assert counts[0] == 1 and all(b == a + 1 for a, b in pairwise(counts)), counts
    errors = [output for cell in code_cells(committed) for output in cell.outputs if output.output_type == "error"]
    assert not errors


def test_cells_that_nbval_compares_have_something_to_compare(committed: Any) -> None:
    tagged = [cell for cell in code_cells(committed) if "nbval-check-output" in cell.metadata.get("tags", [])]
    assert tagged
    for cell in tagged:
        assert cell.execution_count is not None and cell.outputs, cell.source


def test_outputs_name_no_machine_and_hold_no_warnings(committed: Any) -> None:
    said = texts(committed)
    assert not ABSOLUTE_PATH.search(said), ABSOLUTE_PATH.search(said)
    assert "Warning" not in said
    for cell in committed.cells:
        assert not ABSOLUTE_PATH.search(cell.source), cell.source


def test_it_was_cleaned_and_keeps_small(committed: Any, request: pytest.FixtureRequest) -> None:
    path: Path = request.node.callspec.params["committed"]
    assert path.stat().st_size < 2**20
    assert set(committed.metadata) <= {"kernelspec", "language_info"}
    assert committed.metadata.kernelspec.name == "python3"
    for cell in committed.cells:
        assert not {"papermill", "execution"} & set(cell.metadata)
        assert "injected-parameters" not in cell.metadata.get("tags", [])
        for output in cell.get("outputs", []):
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})


def test_it_explains(committed: Any) -> None:
    prose = " ".join(cell.source for cell in committed.cells if cell.cell_type == "markdown")
    assert len(prose.split()) >= 250
    assert any("image/png" in output.get("data", {}) for cell in code_cells(committed) for output in cell.outputs)


# Executed ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of one smoke run: 03 finds here what 02 made, and 06 what 03 made."""
    return tmp_path_factory.mktemp("smoke")


NOTEBOOKS_OF_BASES = [(base, notebook.name) for base in BASES for notebook in LANES[LANE_OF_BASE[base]]]


@pytest.fixture(scope="module", params=NOTEBOOKS_OF_BASES, ids="-".join)
def run(request: pytest.FixtureRequest, root: Path) -> tuple[str, str, Path]:
    """A notebook executed with the smoke profile (after those that it needs): base, its name, and the run's folder."""
    base, name = request.param
    outcomes = reproduce(load_profile("smoke", base), LANES[LANE_OF_BASE[base]], root, only=[name])
    assert outcomes[-1].name == name
    return base, name, root / base


def test_it_runs_headless_and_records_its_results(run: tuple[str, str, Path]) -> None:
    base, name, folder = run
    executed = nbformat.read(folder / "notebooks" / f"{name}.ipynb", as_version=4)
    assert all(cell.execution_count for cell in code_cells(executed) if cell.source.strip())
    assert any("image/png" in output.get("data", {}) for cell in code_cells(executed) for output in cell.outputs)
    checks = {
        "02_collect_trajectories": check_collection,
        "03_train_dit_adapters": check_training,
        "04_train_sd21_adapters": check_training,
        "05_train_sdxl_adapters": check_training,
        "06_evaluate_fid": check_evaluation,
    }
    if name in checks:
        checks[name](base, name, folder)


def check_collection(base: str, name: str, folder: Path) -> None:
    store = TrajectoryStore(folder / "trajectories")
    parameters = load_profile("smoke", base).parameters_for(name)
    assert store.complete and parameters["steps_per_trajectory"] == "all"
    assert len(store) == 20 * parameters["trajectories_per_condition"] * parameters["num_inference_steps"]


def check_training(base: str, name: str, folder: Path) -> None:
    for kind in load_profile("smoke", base).parameters_for(name)["adapter_kinds"].split(","):
        adapters = AdapterSet.from_pretrained(folder / "adapters" / kind.strip())
        assert adapters.config.kind == kind.strip()


def check_evaluation(base: str, name: str, folder: Path) -> None:
    """results.json keeps to the schema (reading it checks that), with every guidance, scale and seed that was asked."""
    parameters = load_profile("smoke", base).parameters_for(name)
    scales = [float(scale) for scale in parameters["scales"].split(",")]
    seeds = [int(seed) for seed in parameters["seeds"].split(",")]
    rows = [row for row in merge_results(folder.parent) if row.base == base]
    kinds = {row.adapter for row in rows if row.adapter}
    assert len(rows) == len(seeds) * (1 + len(scales) * (1 + len(kinds)))
    assert {(row.scale, row.seed) for row in rows if row.guidance == "agd"} == {(w, s) for w in scales for s in seeds}
    for row in rows:
        assert row.steps == parameters["num_inference_steps"]
        assert row.nfe == row.steps * (2 if row.guidance == "cfg" else 1)
        assert row.fd is not None and row.fd > 0 and row.seconds_per_image > 0
        assert (row.endpoint_mse_ratio is None) == (row.guidance != "agd")
        assert (row.adapter_parameters is None) == (row.guidance != "agd")
        if row.adapter_parameters:
            assert 0.01 <= row.adapter_parameters / row.base_parameters <= 0.05


def test_the_run_makes_a_report(root: Path) -> None:
    if not (root / BASES[0] / "run.json").is_file():
        pytest.skip("nothing was executed")
    rows = merge_results(root)
    page = write_report(root, rows).read_text(encoding="utf-8")
    assert "data:image/png;base64," in page and "modulated" in page
    assert not re.search(r"<script|src='http|href='http", page)


def test_the_command_line_goes_on_from_there_and_ends_with_the_table(
    root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["--profile", "smoke", "--base", BASES[0], "--run-dir", str(root)]) == 0
    said = capfd.readouterr().out
    assert said.count("finished before, nothing changed since") == len(LANES["dit"])
    assert markdown_table(merge_results(root)) in said
    for name in ("results.json", "report.html"):
        assert (root / name).is_file() and name in said


OWN = {
    "num_inference_steps": 4,
    "trajectories_per_condition": 8,
    "num_paths": 100,
    "scales": [1.0, 2.0, 4.0],
    "images_per_class": 2,
    "real_images": "",
    "num_training_steps": 4,
    "training_batch_size": 8,
    "checkpoint_every": 2,
    "num_endpoint_samples": 8,
    "hidden_sizes": {"offset": 4, "cross-attention": 4, "modulated": 4},
    "adapter_kinds": "offset",
    "adapter_kind": "offset",
}


def test_a_pipeline_of_ones_own_goes_through_the_same_notebooks(dit_folder: Path, tmp_path: Path) -> None:
    """Five classes, no shipped adapters, reference or features: sections that need those say so, and the rest runs."""
    lane = [notebook for notebook in LANES["dit"] if notebook.name[:2] in ("00", "01", "02", "03")]
    profile = Profile("own", str(dit_folder), OWN, minutes=1, disk_mib=1, memory_mib=1)
    outcomes = reproduce(profile, lane, tmp_path)
    assert [outcome.ran for outcome in outcomes] == [True] * 4
    (made,) = tmp_path.glob("*/adapters/offset")
    assert AdapterSet.from_pretrained(made).config.base_fingerprint == load_base(dit_folder).fingerprint()
