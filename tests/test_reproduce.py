"""``agd_lib.reproduce`` on two toy notebooks: what is skipped, repeated, reported and resumed, and what is written."""

from __future__ import annotations

import base64
import copy
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from agd_lib import reproduce as module
from agd_lib.project import ROOT
from agd_lib.report import write_report
from agd_lib.reproduce import (
    LANE_OF_BASE,
    LANES,
    Notebook,
    NotebookFailure,
    Profile,
    ReproduceError,
    declared_parameters,
    folder_name,
    load_profile,
    main,
    merge_results,
    outdated,
    reproduce,
    shrink_pictures,
    strip_execution,
)
from agd_lib.results import Row, read_results, write_results
from agd_lib.trajectories import CollectionPlan, predicted_size

LANE = (Notebook("01_first", makes=("made",)), Notebook("02_second", needs=("01_first",)))

COUNT = """from pathlib import Path
run = Path(run_dir)
run.mkdir(parents=True, exist_ok=True)
(run / "made").mkdir(exist_ok=True)
log = run / "{name}.log"
log.write_text(log.read_text() + "x" if log.exists() else "x")
left = (run / "made" / "left").exists()
(run / "made" / "left").write_text("")"""

FIGURE = """import matplotlib.pyplot as plt
figure, axis = plt.subplots(figsize=(2, 1))
axis.plot([0, size])
plt.close(figure)
figure"""


def toy(folder: Path, name: str, body: str = "", parameters: str = "size: int = 1") -> Path:
    """A notebook that counts how often it ran, in ``<run_dir>/<name>.log``, then runs ``body``."""
    tagged = new_code_cell(f'base_name: str = "toy"\nrun_dir: str = "unused"\n{parameters}')
    tagged.metadata["tags"] = ["parameters"]
    cells = [
        new_markdown_cell(f"# Toy {name}\n\nTitle.\n\n## A section"),
        tagged,
        new_code_cell(COUNT.format(name=name)),
    ]
    cells += [new_code_cell(body)] if body else []
    notebook = new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


@pytest.fixture
def notebooks(tmp_path: Path) -> Path:
    folder = tmp_path / "notebooks"
    folder.mkdir()
    toy(folder, "01_first", "print('left' if left else 'clean')")
    toy(folder, "02_second", FIGURE)
    return folder


def profile(**parameters: object) -> Profile:
    return Profile("toy", "toy", dict(parameters), minutes=1, disk_mib=1, memory_mib=1)


def times_run(root: Path, name: str) -> int:
    return len((root / "toy" / f"{name}.log").read_text())


def test_finished_notebooks_are_skipped_and_changed_ones_repeated(tmp_path: Path, notebooks: Path) -> None:
    root = tmp_path / "runs"
    first = reproduce(profile(size=3), LANE, root, notebooks)
    assert [outcome.ran for outcome in first] == [True, True]
    executed = nbformat.read(root / "toy" / "notebooks" / "01_first.ipynb", as_version=4)
    assert any("injected-parameters" in cell.metadata.get("tags", []) for cell in executed.cells)
    assert not list((root / "toy" / "notebooks").glob("*.partial.ipynb"))

    again = reproduce(profile(size=3), LANE, root, notebooks)
    assert [outcome.ran for outcome in again] == [False, False]
    assert [outcome.seconds for outcome in again] == [outcome.seconds for outcome in first]

    # another source of the second alone: the first is kept
    toy(notebooks, "02_second", FIGURE + "\n# changed")
    assert [outcome.ran for outcome in reproduce(profile(size=3), LANE, root, notebooks)] == [False, True]
    # another source of the first: the second needs it, so both run
    toy(notebooks, "01_first", "print('left' if left else 'clean')  # changed")
    assert [outcome.ran for outcome in reproduce(profile(size=3), LANE, root, notebooks)] == [True, True]
    # another parameter
    assert [outcome.ran for outcome in reproduce(profile(size=4), LANE, root, notebooks)] == [True, True]
    assert (times_run(root, "01_first"), times_run(root, "02_second")) == (3, 4)


def test_only_runs_what_is_needed_and_force_repeats(tmp_path: Path, notebooks: Path) -> None:
    root = tmp_path / "runs"
    assert [outcome.name for outcome in reproduce(profile(), LANE, root, notebooks, only=["01"])] == ["01_first"]
    outcomes = reproduce(profile(), LANE, root, notebooks, only=["02"])
    assert [(outcome.name, outcome.ran) for outcome in outcomes] == [("01_first", False), ("02_second", True)]
    outcomes = reproduce(profile(), LANE, root, notebooks, only=["02"], force=True)
    assert [outcome.ran for outcome in outcomes] == [False, True]
    executed = root / "toy" / "notebooks" / "02_second.ipynb"
    assert executed.is_file()
    reproduce(profile(), LANE, root, notebooks, only=["01"], force=True)
    assert not executed.is_file()  # it was made from older results of the first
    with pytest.raises(ReproduceError, match="got 9, expected the beginning of one of: 01_first, 02_second"):
        reproduce(profile(), LANE, root, notebooks, only=["9"])


def test_a_file_that_a_notebook_is_given_counts_with_what_is_in_it(tmp_path: Path, notebooks: Path) -> None:
    toy(notebooks, "01_first", parameters='size: int = 1\nreference: str = ""')
    root, folder = tmp_path / "runs", tmp_path / "images"
    folder.mkdir()
    (folder / "1.png").write_text("one")

    def ran() -> list[bool]:
        return [outcome.ran for outcome in reproduce(profile(reference=str(folder)), LANE, root, notebooks)]

    assert ran() == [True, True]
    assert ran() == [False, False]
    (folder / "1.png").write_text("another")
    assert ran() == [True, True]
    (folder / "2.png").write_text("two")
    assert ran() == [True, True]
    assert ran() == [False, False]


def test_a_notebook_whose_product_is_gone_is_not_finished(
    tmp_path: Path, notebooks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy(notebooks, "01_first", "(run / 'adapters').mkdir(exist_ok=True); (run / 'store').mkdir(exist_ok=True)")
    lane = (Notebook("01_first", makes=("adapters", "store")), LANE[1])
    root = tmp_path / "runs"
    reproduce(profile(), lane, root, notebooks)
    (root / "toy" / "store").rmdir()  # to make room
    assert [outcome.ran for outcome in reproduce(profile(), lane, root, notebooks)] == [False, False]
    (root / "toy" / "adapters").rmdir()
    assert reproduce(profile(), lane, root, notebooks)[0].ran
    assert "what it had made is not there any more: adapters" in capsys.readouterr().out


def test_a_damaged_note_is_named_and_a_product_that_is_a_link_goes_without_what_it_leads_to(
    tmp_path: Path, notebooks: Path
) -> None:
    toy(notebooks, "01_first", "pass")
    lane, root = (Notebook("01_first", makes=("adapters",)),), tmp_path / "runs"
    reproduce(profile(), lane, root, notebooks)
    (tmp_path / "elsewhere").mkdir()
    (root / "toy" / "adapters").symlink_to(tmp_path / "elsewhere")
    reproduce(profile(size=5), lane, root, notebooks)
    assert (tmp_path / "elsewhere").is_dir() and not (root / "toy" / "adapters").exists()
    note = root / "toy" / "notebooks" / "01_first.started.json"
    note.write_text(note.read_text()[:-5])
    with pytest.raises(ReproduceError, match=r"01_first\.started\.json is not valid JSON"):
        reproduce(profile(size=6), lane, root, notebooks)


def test_products_are_cleared_when_inputs_change_and_kept_when_they_do_not(tmp_path: Path, notebooks: Path) -> None:
    root = tmp_path / "runs"

    def printed() -> str:
        executed = nbformat.read(root / "toy" / "notebooks" / "01_first.ipynb", as_version=4)
        return str(executed.cells[-1].outputs[0].text).strip()

    reproduce(profile(), LANE, root, notebooks, only=["01"])
    assert printed() == "clean"
    (root / "toy" / "notebooks" / "01_first.ipynb").unlink()  # as after an interruption: same inputs, no result
    reproduce(profile(), LANE, root, notebooks, only=["01"])
    assert printed() == "left"
    reproduce(profile(size=5), LANE, root, notebooks, only=["01"])
    assert printed() == "clean"


def test_a_failure_names_notebook_cell_and_error(tmp_path: Path, notebooks: Path) -> None:
    root = tmp_path / "runs"
    toy(notebooks, "02_second", "answer = 42\nraise RuntimeError('no such luck')")
    with pytest.raises(NotebookFailure) as caught:
        reproduce(profile(), LANE, root, notebooks)
    message = str(caught.value)
    assert "02_second.ipynb stopped in cell In [3]" in message or "In [4]" in message
    assert "answer = 42" in message and "RuntimeError: no such luck" in message
    assert (root / "toy" / "notebooks" / "02_second.failed.ipynb").is_file()
    assert not (root / "toy" / "notebooks" / "02_second.ipynb").exists()
    toy(notebooks, "02_second", FIGURE)  # mended: the first is not repeated, and the failed copy goes
    assert [outcome.ran for outcome in reproduce(profile(), LANE, root, notebooks)] == [False, True]
    assert not (root / "toy" / "notebooks" / "02_second.failed.ipynb").exists()


def test_a_kernel_that_dies_is_reported(tmp_path: Path, notebooks: Path) -> None:
    toy(notebooks, "02_second", "import os\nos._exit(9)")
    with pytest.raises(NotebookFailure, match=r"02_second\.ipynb stopped: its Python process died"):
        reproduce(profile(), LANE, tmp_path / "runs", notebooks)


def start(tmp_path: Path, notebooks: Path) -> subprocess.Popen[str]:
    """The same run in a process of its own, which can be killed; returns once the second notebook is being executed."""
    script = (
        "import sys; from pathlib import Path; from agd_lib.reproduce import *\n"
        "lane = (Notebook('01_first', makes=('made',)), Notebook('02_second', needs=('01_first',)))\n"
        "try:\n"
        f"    reproduce(Profile('toy', 'toy', {{}}, 1, 1, 1), lane, Path({str(tmp_path / 'runs')!r}), "
        f"Path({str(notebooks)!r}))\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(130)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # where the tests run in a shell's background Ctrl-C is ignored, and children would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 300
    while not (tmp_path / "runs" / "toy" / "02_second.log").exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(process.communicate(timeout=60)[0])
        time.sleep(0.1)
    return process


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_resumes(tmp_path: Path, notebooks: Path, how: signal.Signals) -> None:
    gate = tmp_path / "gate"
    toy(
        notebooks,
        "02_second",
        f"import time\nfrom pathlib import Path\nwhile not Path({str(gate)!r}).exists():\n    time.sleep(0.05)",
    )
    process = start(tmp_path, notebooks)
    if how == signal.SIGINT:  # Ctrl-C in a terminal reaches the kernel too
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)
    try:
        output, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == (130 if how == signal.SIGINT else -how), output
    root = tmp_path / "runs"
    assert (root / "toy" / "notebooks" / "01_first.ipynb").is_file()
    assert not (root / "toy" / "notebooks" / "02_second.ipynb").exists()
    assert not (root / "toy" / "notebooks" / "02_second.failed.ipynb").exists()
    gate.touch()
    assert [outcome.ran for outcome in reproduce(profile(), LANE, root, notebooks)] == [False, True]


def test_a_damaged_executed_notebook_is_not_taken_for_finished(tmp_path: Path, notebooks: Path) -> None:
    root = tmp_path / "runs"
    reproduce(profile(), LANE, root, notebooks)
    finished = root / "toy" / "notebooks" / "01_first.ipynb"
    finished.write_text(finished.read_text()[:200])
    assert [outcome.ran for outcome in reproduce(profile(), LANE, root, notebooks)] == [True, False]


def test_a_misspelt_parameter_is_refused(tmp_path: Path, notebooks: Path) -> None:
    with pytest.raises(ReproduceError, match="sets sise, which no notebook declares"):
        reproduce(profile(sise=3), LANE, tmp_path / "runs", notebooks)


@pytest.mark.parametrize(("name", "given"), [("reference", "exception"), ("real_images", "common")])
def test_a_profile_that_names_files_which_are_not_there_is_refused_at_once(
    tmp_path: Path, notebooks: Path, name: str, given: str
) -> None:
    """Not by the last notebook, after days."""
    toy(notebooks, "01_first", "", parameters=f'run_dir: str = "{tmp_path}/x"\nsize: int = 0\n{name}: str = ""')
    wanted = replace(profile(), exceptions={"01": {name: "no/such.npz"}})
    if given == "common":
        wanted = profile(**{name: "no/such.npz"})
    with pytest.raises(ReproduceError, match=f"names no/such.npz as {name}, and there is no such file or folder"):
        reproduce(wanted, LANE, tmp_path / "runs", notebooks)
    assert not (tmp_path / "runs").exists()
    module._check_files(profile(**{name: ""}))
    module._check_files(profile(**{name: str(notebooks)}))


def test_the_papers_profile_is_refused_until_its_reference_is_there(tmp_path: Path) -> None:
    paper = load_profile("paper", "dit-xl-2-256")
    with pytest.raises(ReproduceError, match="as reference, and there is no such file or folder"):
        reproduce(paper, LANES[paper.lane], tmp_path)


def test_a_profile_can_make_an_exception_for_one_notebook(tmp_path: Path, notebooks: Path) -> None:
    toy(notebooks, "02_second", "print(size)")
    settings = Profile("toy", "toy", {"size": 3}, 1, 1, 1, exceptions={"02": {"size": 8}})
    reproduce(settings, LANE, tmp_path / "runs", notebooks)
    executed = nbformat.read(tmp_path / "runs" / "toy" / "notebooks" / "02_second.ipynb", as_version=4)
    assert executed.cells[-1].outputs[0].text == "8\n"
    misspelt = Profile("toy", "toy", {}, 1, 1, 1, exceptions={"02": {"sise": 8}})
    with pytest.raises(ReproduceError, match="sets sise"):
        reproduce(misspelt, LANE, tmp_path / "runs", notebooks)


def test_a_disk_that_is_too_small_is_refused_before_anything_runs(tmp_path: Path, notebooks: Path) -> None:
    greedy = Profile("toy", "toy", {}, minutes=1, disk_mib=1e12, memory_mib=1)
    with pytest.raises(ReproduceError, match=r"this run needs 1,000,000,000,000 MiB: make room"):
        reproduce(greedy, LANE, tmp_path / "runs", notebooks)
    assert not (tmp_path / "runs").exists()


def test_a_missing_notebook_is_named(tmp_path: Path, notebooks: Path) -> None:
    with pytest.raises(ReproduceError, match=r"no notebook at .*03_third\.ipynb"):
        reproduce(profile(), (*LANE, Notebook("03_third")), tmp_path / "runs", notebooks)


# Profiles ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("expected: 2020-13-45", "not valid YAML"),
        ("a: !!int x", "not valid YAML"),
        ("[" * 3_000, "not valid YAML"),
        ("a: 1", "malformed"),
        ("- 1", "malformed"),
        ("expected: {minutes: 1, disk_mib: 1}", "malformed"),
        ("expected: {minutes: 1, disk_mib: 1, memory_mib: lots}", "must not be negative"),
    ],
)
def test_a_malformed_profile_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "toy.cpu.yaml"
    path.write_text(text)
    with pytest.raises(ReproduceError, match=message):
        load_profile("cpu", "toy", path)


def test_the_profile_of_a_base_model_of_ones_own_tells_its_lane(tmp_path: Path) -> None:
    path = tmp_path / "own.cpu.yaml"
    costs = "expected: {minutes: 1, disk_mib: 1, memory_mib: 1}\n"
    path.write_text(costs)
    assert load_profile("cpu", "tiny-sdxl", path).lane == "sdxl"
    with pytest.raises(ReproduceError, match="gives lane: None, expected one of: dit, sd21, sdxl"):
        load_profile("cpu", "me/own", path)
    path.write_text(f"{costs}lane: sd21\n")
    assert (
        load_profile("cpu", "me/own", path).lane == "sd21" and "lane" not in load_profile("cpu", "o", path).parameters
    )
    for lane, told in (("flux", "'flux'"), ("[]", r"\[\]")):
        path.write_text(f"{costs}lane: {lane}\n")
        with pytest.raises(ReproduceError, match=f"gives lane: {told}, expected one of: dit, sd21, sdxl"):
            load_profile("cpu", "me/own", path)


def test_an_unknown_profile_lists_those_that_exist() -> None:
    with pytest.raises(ReproduceError, match=r"Profiles \(base\.profile\): .*tiny-dit\.cpu"):
        load_profile("gpu", "tiny-dit")


PROFILES = sorted((ROOT / "notebooks" / "profiles").glob("*.yaml"))


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_key_of_a_profile_is_declared_by_a_notebook(path: Path) -> None:
    base, _, name = path.stem.rpartition(".")
    assert base in LANE_OF_BASE, f"{path.name}: expected <base>.<profile>.yaml"
    loaded = load_profile(name, base)
    declared = set().union(
        *(declared_parameters(ROOT / "notebooks" / f"{notebook.name}.ipynb") for notebook in LANES[loaded.lane])
    )
    assert not loaded.parameters.keys() - declared
    for number, values in loaded.exceptions.items():
        (notebook,) = [notebook.name for notebook in LANES[loaded.lane] if notebook.name.startswith(number)]
        assert values.keys() <= declared_parameters(ROOT / "notebooks" / f"{notebook}.ipynb")
    assert not loaded.parameters.keys() & {"base_name", "run_dir"}, "these two are given by reproduce itself"


@pytest.mark.parametrize(
    ("base", "collects", "trains", "authors"),
    [("dit-xl-2-256", "02", "03", 8.96e6), ("sd21", "04", "04", 1.119e6), ("sdxl", "05", "05", 1.06e6)],
)
def test_the_thrifty_profile_trains_as_the_papers_for_a_quarter_of_the_forward_passes(
    base: str, collects: str, trains: str, authors: float
) -> None:
    thrifty, paper = load_profile("thrifty", base), load_profile("paper", base)
    collection, training = thrifty.parameters_for(collects), thrifty.parameters_for(trains)
    trajectories = collection.get("num_prompts") or 1_000 * collection["trajectories_per_condition"]
    reads = training["num_training_steps"] * training["training_batch_size"]
    steps = collection["num_inference_steps"]
    passes = 2 * trajectories * steps + 3 * reads  # backwards counts as two forwards
    assert passes <= authors / 4
    kept = steps if collection["steps_per_trajectory"] == "all" else int(collection["steps_per_trajectory"])
    assert 1 <= reads / (trajectories * kept) <= 2, "what is recorded is read, and not more often than was tried"
    of_collection = {"num_inference_steps", "steps_per_trajectory"}
    assert {name: value for name, value in training.items() if name not in of_collection} == {
        name: value for name, value in paper.parameters_for(trains).items() if name not in of_collection
    }


@pytest.mark.parametrize("profile_name", ["paper", "thrifty"])
@pytest.mark.parametrize(
    ("base", "collects", "latent_shape", "values_of_condition", "gigabytes"),
    [
        ("dit-xl-2-256", "02", (4, 32, 32), 1, 8),
        ("sd21", "04", (4, 96, 96), 77 * 1024, 8),
        ("sdxl", "05", (4, 128, 128), 77 * 2048 + 1280 + 6, 6),
    ],
)
def test_the_papers_runs_keep_no_more_than_training_reads(
    profile_name: str,
    base: str,
    collects: str,
    latent_shape: tuple[int, int, int],
    values_of_condition: int,
    gigabytes: float,
) -> None:
    """All steps of all trajectories would be 66, 74 and 131 GB in float16."""
    given = load_profile(profile_name, base).parameters_for(collects)
    kept = given["steps_per_trajectory"]
    conditions = given.get("num_prompts") or 1_000
    plan = CollectionPlan(
        tuple(range(conditions)),
        conditions * given.get("trajectories_per_condition", 1),
        num_inference_steps=given["num_inference_steps"],
        steps_per_trajectory=kept if kept == "all" else int(kept),
    )
    encoded = {"condition": torch.empty(1, values_of_condition, device="meta")}
    model: Any = SimpleNamespace(latent_shape=latent_shape, blank_condition=lambda batch_size: encoded)
    assert predicted_size(model, plan) < gigabytes * 1e9
    whole = replace(plan, num_inference_steps=999, steps_per_trajectory="all")
    assert predicted_size(model, whole) > 8 * gigabytes * 1e9


def test_every_notebook_of_a_lane_exists_and_takes_base_and_run_folder() -> None:
    for lane in LANES.values():
        names = [notebook.name for notebook in lane]
        for position, notebook in enumerate(lane):
            assert set(notebook.needs) <= set(names[:position])
            assert {"base_name", "run_dir"} <= declared_parameters(ROOT / "notebooks" / f"{notebook.name}.ipynb")


def test_what_is_shipped_for_a_small_model_counts_among_its_files() -> None:
    folders = {str(row[0]).split("/")[0] for row in module._data_manifest("tiny-sd21")}
    assert folders == {"tiny-sd21", "tiny-sd21-controlnet", "tiny-sd21-faded"}
    assert {str(row[0]).split("/")[0] for row in module._data_manifest("tiny-sdxl")} == {"tiny-sdxl"}


def test_names_of_base_models_make_file_names() -> None:
    names = ["tiny-dit", "facebook/DiT-XL-2-256", "some/folder/my-dit/", "a b"]
    assert [folder_name(name) for name in names] == ["tiny-dit", "DiT-XL-2-256", "my-dit", "a-b"]


# What a run leaves ------------------------------------------------------------------------------------------------------


def row(base: str = "toy", guidance: str = "cfg", seed: int = 0, fd: float | None = 1.0) -> Row:
    adapter = "offset" if guidance == "agd" else None
    scale = 1.0 if guidance == "unguided" else 2.0
    nfe = 40.0 if guidance == "cfg" else 20.0
    return Row(
        base, guidance, adapter, scale, 20, nfe, 100, seed, fd, "toy-extractor", 0.5, 0.5, 0.9, 0.1, 0.01, 1000,
        20 if adapter else None,
    )  # fmt: skip


def test_results_of_all_base_models_are_merged(tmp_path: Path) -> None:
    write_results(tmp_path / "a" / "results.json", [row("a")])
    write_results(tmp_path / "b" / "results.json", [row("b"), row("b", "agd")])
    assert [(r.base, r.guidance) for r in merge_results(tmp_path)] == [("a", "cfg"), ("b", "cfg"), ("b", "agd")]
    assert merge_results(tmp_path) == read_results(tmp_path / "results.json")


def test_rows_of_another_version_of_the_library_are_told_of(tmp_path: Path, notebooks: Path) -> None:
    toy(notebooks, "06_evaluate_fid")
    root, lane = tmp_path / "runs", (Notebook("06_evaluate_fid", makes=("results.json",)),)
    reproduce(profile(), lane, root, notebooks)
    write_results(root / "toy" / "results.json", [row()])
    assert outdated(root) == []
    executed = root / "toy" / "notebooks" / "06_evaluate_fid.ipynb"
    executed.write_text(executed.read_text().replace(module._library(), "0" * 16))
    assert outdated(root) == ["toy"]


def test_the_report_is_one_page_that_needs_nothing_else(tmp_path: Path, notebooks: Path) -> None:
    root = tmp_path / "runs"
    reproduce(profile(size=3), LANE, root, notebooks, command="the command")
    rows = [row(guidance="unguided", fd=3.0), row(fd=1.0), row(fd=1.2, seed=1), row(guidance="agd", fd=1.1)]
    page = write_report(root, rows).read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 1
    assert "the command" in page and "Toy 02_second" in page and "A section" in page
    assert "1.100 ± 0.141" in page
    for outside in ("http://", "https://", "<script", "@import", "url("):
        assert outside not in page


def test_the_report_of_an_empty_run_is_a_page(tmp_path: Path) -> None:
    assert "no base model yet" in write_report(tmp_path, []).read_text(encoding="utf-8")


def test_formulas_become_pictures_or_code() -> None:
    from agd_lib.report import _markdown

    text = _markdown(r"the state $x_t$ and $\unknowncommand{x}$")
    assert text.count("data:image/svg+xml") == 1
    assert r"<code>\unknowncommand{x}</code>" in text


# The committed notebooks again -------------------------------------------------------------------------------------------


def test_stripping_leaves_cells_and_plain_outputs() -> None:
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}}
    bar = new_output("display_data", {**widget, "text/plain": "train:   0%|          | 0/5 [00:00<?, ?it/s]"})
    slider = new_output("display_data", {**widget, "text/plain": "VBox(children=(IntSlider(value=0),))"})
    text = new_output("stream", name="stdout", text="kept")
    cell = new_code_cell("f()", outputs=[bar, slider, text], execution_count=1)
    cell.metadata.update({"papermill": {}, "execution": {}, "tags": []})
    injected = new_code_cell("size = 2")
    injected.metadata["tags"] = ["injected-parameters"]
    checked = new_code_cell("g()")
    checked.metadata["tags"] = ["nbval-check-output"]
    notebook = new_notebook(cells=[cell, injected, checked])
    notebook.metadata.update({"papermill": {}, "widgets": {}, "agd_lib": {}})
    strip_execution(notebook)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert [c.source for c in notebook.cells] == ["f()", "g()"]
    assert notebook.cells[0].metadata == {} and notebook.cells[1].metadata == {"tags": ["nbval-check-output"]}
    assert [sorted(output.get("data", {})) for output in notebook.cells[0].outputs] == [["text/html", "text/plain"], []]
    assert "IntSlider" not in json.dumps(notebook)


def test_pictures_are_shrunk_without_being_changed_to_the_eye() -> None:
    figure = plt.figure(figsize=(4, 3))
    figure.gca().plot([1, 3, 2], label="a curve")
    figure.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    plain = base64.b64encode(buffer.getvalue()).decode()
    data = {"image/png": plain, "text/plain": "<Figure>"}
    cell = new_code_cell("", outputs=[new_output("display_data", data=data)])
    notebook = shrink_pictures(new_notebook(cells=[new_markdown_cell("text"), cell]))
    small = cell.outputs[0].data["image/png"]
    assert len(small) < 0.7 * len(plain) and cell.outputs[0].data["text/plain"] == "<Figure>"
    pixels = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(p))).convert("RGB"), dtype=float) for p in (plain, small)
    ]
    assert np.abs(pixels[0] - pixels[1]).mean() < 1
    again = shrink_pictures(copy.deepcopy(notebook))
    assert len(again.cells[1].outputs[0].data["image/png"]) <= len(small)


def test_in_place_renews_outputs_and_leaves_a_failing_notebook_alone(notebooks: Path) -> None:
    failing = toy(notebooks, "02_second", "raise ValueError('x')", parameters="size: int = 2")
    parameters = 'run_dir = str(__import__("tempfile").mkdtemp())'
    toy(notebooks, "01_first", "print(size)", parameters=f"{parameters}\nsize: int = 7")
    before = failing.read_bytes()
    with pytest.raises(NotebookFailure):
        module.execute_in_place(notebooks)
    assert failing.read_bytes() == before
    renewed = nbformat.read(notebooks / "01_first.ipynb", as_version=4)
    assert renewed.cells[-1].outputs[0].text == "7\n" and renewed.cells[-1].execution_count == 3
    assert "papermill" not in json.dumps(renewed)


def test_the_command_line_reports_a_bad_profile_with_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--profile", "nothing-like-it"]) == 1
    assert "no profile 'nothing-like-it'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["tiny-dit", "tiny-sd21", "tiny-sdxl"]),
        (["--base", "tiny-sdxl", "tiny-dit"], ["tiny-sdxl", "tiny-dit"]),
        (["--only", "03"], ["tiny-dit"]),  # the only one that has such a notebook
        (["--only", "06"], ["tiny-dit", "tiny-sd21", "tiny-sdxl"]),
    ],
)
def test_base_models_are_run_one_after_another(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    expected: list[str],
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(module, "reproduce", lambda profile, lane, root, **options: ran.append(profile.base) or [])
    assert main([*arguments, "--run-dir", str(tmp_path)]) == 0
    assert ran == expected
    minutes = sum(load_profile("cpu", base).minutes for base in expected)
    announced = f"{len(expected)} base models one after another ({', '.join(expected)}): about {minutes:g} min"
    assert (announced in capsys.readouterr().out) == (len(expected) > 1)


def test_another_profile_file_is_for_one_base_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--parameters", str(tmp_path / "mine.yaml")]) == 1
    assert "got --parameters for 3 base models, expected one" in capsys.readouterr().err
