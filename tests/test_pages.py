"""The README and docs/results.md: their code, run as it stands there but for its sizes, and their tables."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from small_text_models import build_sdxl_pipeline

from agd_lib import AdapterSet, CollectionPlan, base_from_pipeline, collect, load_base
from agd_lib.pages import PAGES, PageError, marks, with_tables
from agd_lib.project import DATA, ROOT
from agd_lib.reproduce import declared_parameters


def code_with(replaced: Sequence[tuple[str, str]]) -> str:
    """The piece of the pages' code that has all of this, with other things in its place."""
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    pieces = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (code,) = [piece for piece in pieces if all(given in piece for given, _ in replaced)]
    for given, small in replaced:
        code = code.replace(given, small)
    return code


def run_with(replaced: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The names that a piece of the pages' code leaves behind."""
    names: dict[str, Any] = {}
    exec(code_with(replaced), names)
    return names


def test_the_code_for_a_model_of_ones_own(dit_folder: Path, tmp_path: Path) -> None:
    sizes = (
        ("path/to/my-pipeline", str(dit_folder)),
        ("runs/mine", str(tmp_path)),
        ("num_trajectories=2000", "num_trajectories=6"),
        ("TrainingSettings(2000", "TrainingSettings(2"),
        ("num_inference_steps=20", "num_inference_steps=2"),
        ("hidden_size=32", "hidden_size=4"),
    )
    images = run_with(sizes)["images"]
    assert images.shape == (3, 3, 32, 32)
    assert images.min() >= 0 and images.max() <= 1


def test_the_code_for_a_pipeline_of_ones_own(tmp_path: Path) -> None:
    pipeline = build_sdxl_pipeline(tmp_path)
    pipeline.save_pretrained(tmp_path / "pipeline")
    adapters = AdapterSet.create(base_from_pipeline(pipeline), "cross-attention", 8, guidance_range=(1, 12))
    adapters.save_pretrained(tmp_path / "adapters")
    names = run_with(
        (
            ("path/to/sdxl", str(tmp_path / "pipeline")),
            ("path/to/adapters", str(tmp_path / "adapters")),
            ("guidance_scale=7.5", "guidance_scale=7.5, num_inference_steps=2"),
        ),
    )
    plain = pipeline("a red star", guidance_scale=1.0, num_inference_steps=2, generator=torch.manual_seed(0)).images[0]
    guided = names["pipe"]("a red star", num_inference_steps=2, generator=torch.manual_seed(0)).images[0]
    assert names["image"].size == plain.size
    assert guided.tobytes() == plain.tobytes()  # untrained adapters change nothing: one pass, the conditional one


def test_the_code_for_strength(tmp_path: Path) -> None:
    base = load_base("tiny-dit")
    plan = CollectionPlan(tuple(base.all_conditions()), 20, num_inference_steps=5)
    collect(base, plan, tmp_path / "store", progress=False)
    replaced = (
        ("data/tiny-dit/adapters", str(DATA / "tiny-dit" / "adapters")),
        ("runs/default/tiny-dit/trajectories", str(tmp_path / "store")),
        ("runs/mine", str(tmp_path)),
    )
    gains = run_with(replaced)["adapters"].config.strength
    assert AdapterSet.from_pretrained(tmp_path / "restored").config.strength == gains
    assert gains[0] > 1.15 and gains[4:] == (1.0,) * 6


def free_port() -> str:
    """Of this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate launch"])
def test_the_code_for_several_processes(tmp_path: Path, launcher: str) -> None:
    sizes = (
        ("runs/many", str(tmp_path)),
        ("num_trajectories=4000, trajectories_per_shard=64", "num_trajectories=4, trajectories_per_shard=1"),
        ("num_steps=2000", "num_steps=2"),
        ("n=2000, batch_size=50", "n=80, batch_size=40"),
    )
    script = tmp_path / "distil.py"
    script.write_text(code_with(sizes))
    (line,) = re.findall(rf"^{launcher} (.*) distil.py", README, re.MULTILINE)
    if launcher == "torchrun":
        commands = [[sys.executable, "-m", "torch.distributed.run", *line.split(), str(script)]]
    else:  # without MPI it starts one process on a CPU, which is told by the environment which one it is
        accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--main_process_port", free_port()]
        commands = [[*accelerate, "--num_processes", "2", str(script)]] * 2
    outputs = [tmp_path / f"{rank}.txt" for rank in range(len(commands))]
    processes = []
    for rank, (command, output) in enumerate(zip(commands, outputs)):
        ranks = {} if len(commands) == 1 else {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | ranks
        with output.open("w") as text:
            started = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=text, stderr=subprocess.STDOUT)
        processes.append(started)
    ended = [process.wait(timeout=600) for process in processes]
    printed = "".join(output.read_text() for output in outputs)
    assert not any(ended), printed[-5000:]
    assert printed.count("Row(base='tiny-dit', guidance='agd'") == 1
    assert AdapterSet.from_pretrained(tmp_path / "adapters").config.kind == "offset"
    assert len(list((tmp_path / "trajectories").glob("shard-*.safetensors"))) == 4


README, MAKEFILE = (
    re.sub(r"\\\n\s*", "", (ROOT / name).read_text(encoding="utf-8")) for name in ("README.md", "Makefile")
)


def test_the_commands_for_make_exist() -> None:
    named = set(re.findall(r"^`?make (\w+)|`make (\w+)", README, re.MULTILINE))
    assert {name for pair in named for name in pair if name} <= set(re.findall(r"^(\w+):", MAKEFILE, re.MULTILINE))


def test_nbval_is_called_as_ci_calls_it() -> None:
    (ours,) = re.findall(r"^pytest (--nbval.*)$", README, re.MULTILINE)
    (theirs,) = re.findall(r" notebooks (--nbval.*)$", MAKEFILE, re.MULTILINE)
    assert set(ours.split()) - set(theirs.split()) == {"notebooks/00_start_here.ipynb"}
    assert set(theirs.split()) - set(ours.split()) == {"-p", "no:cacheprovider"}


def test_the_parameters_for_papermill_are_declared() -> None:
    (line,) = re.findall(r"^papermill (.*)$", README, re.MULTILINE)
    notebook, _, *options = line.split()
    given = {name for flag, name in pairwise(options) if flag == "-p"}
    assert given == {"base_name", "run_dir"} and given <= declared_parameters(ROOT / notebook)


def test_the_profiles_and_files_that_are_named_exist() -> None:
    for page in PAGES:
        for path in re.findall(
            r"`((?:notebooks|data|tests|docs)/[\w./-]+)`", (ROOT / page).read_text(encoding="utf-8")
        ):
            assert (ROOT / path).exists() or path == "notebooks/profiles/my-pipeline.cpu.yaml", path


def headings(page: Path) -> set[str]:
    """What a link into a page can name: its headings, as GitHub writes them in links."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text, folder = (ROOT / page).read_text(encoding="utf-8"), (ROOT / page).parent
    links = re.findall(r"\]\((?!http)([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    assert len(links) > 10
    for link in links:
        path, _, heading = link.partition("#")
        assert (folder / path).exists(), link
        assert not heading or heading in headings(folder / path if path else ROOT / page), link


LATENTS = {"DiT-XL/2 256": 4 * 32 * 32, "SD 2.1 768": 4 * 96 * 96, "SDXL 1024": 4 * 128 * 128}
CONDITIONS = {
    "DiT-XL/2 256": 1_000 * 8,
    "SD 2.1 768": 500 * 77 * 1_024 * 4,
    "SDXL 1024": 500 * (77 * 2_048 + 1_280 + 6) * 4,
}
"""Bytes of all encoded conditions in float32: classes, or 500 prompts of 77 tokens."""


def test_what_the_papers_runs_cost_follows_from_their_operations_and_bytes() -> None:
    rows = re.findall(
        r"^\| ([\w./ -]+), ([\d,]+)(?: trajectories)? of ([\d,]+)(?: steps)?, (\d+) x ([\d,]+)(?: states)? \| ([\d.]+) TFLOP "
        r"\| ([\d.]+) M passes \| ([\d.]+) M passes \| (\d+) h \+ ([\d.]+) h \| ([\d.]+) h \+ ([\d.]+) h "
        r"\| ([\d.]+) GB \((\d+)\) \|$",
        README,
        re.MULTILINE,
    )
    assert [row[0] for row in rows] == list(LATENTS)
    for name, *row in rows:
        trajectories, steps, batch, updates = (int(cell.replace(",", "")) for cell in row[:4])
        teraflop, collection, training, collection_hours, training_hours, *eight, stored, whole = map(float, row[4:])
        passes = 2 * trajectories * steps, 3 * batch * updates
        assert [collection, training] == [round(count / 1e6, digits) for count, digits in zip(passes, (1, 2))]
        hours = [count * teraflop / 40 / 3600 for count in passes]
        assert collection_hours == round(hours[0]) and training_hours == round(hours[1], 1)
        assert eight == [round(hours[0] / 8, 1), round(hours[1] / min(8, batch), 1)]
        bytes_of_a_state = 2 * 2 * LATENTS[name] + 24
        assert stored == round((batch * updates * bytes_of_a_state + CONDITIONS[name]) / 1e9, 1)
        assert whole == round((trajectories * steps * bytes_of_a_state + CONDITIONS[name]) / 1e9)


def test_what_the_thrifty_runs_cost_follows_from_their_operations() -> None:
    rows = re.findall(
        r"^\| [\w./ -]+ \| ([\d.]+) M passes \| ([\d.]+) M passes \| (\d+) % \| ([\d.]+) h \+ ([\d.]+) h \|$",
        README,
        re.MULTILINE,
    )
    papers = [(8.0e6, 0.96e6, 0.237), (0.999e6, 0.12e6, 2.15), (1.0e6, 0.06e6, 6.76)]
    assert len(rows) == 3
    for row, (collection, training, teraflop) in zip(rows, papers):
        passes, share, hours = [float(cell) * 1e6 for cell in row[:2]], float(row[2]), [float(cell) for cell in row[3:]]
        assert passes[1] == training and share == round(100 * sum(passes) / (collection + training)) <= 25
        assert hours == [round(count * teraflop / 40 / 3600, 1) for count in passes]


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_are_those_of_their_files(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert with_tables(text, page) == text, "run: python -m agd_lib.pages"


RESULTS_PAGE = "docs/results.md"


def every_table(text: str, page: str = RESULTS_PAGE) -> str:
    return "\n".join(f"{begin}{text}{end}" for begin, end in map(marks, PAGES[page]))


@pytest.mark.parametrize("harm", ["no marks", "one mark", "twice", "the other way round"])
def test_a_page_without_a_place_for_a_table_is_refused(harm: str) -> None:
    begin, end = marks("tiny-sd21")
    harmed = {
        "no marks": every_table("").replace(begin, "").replace(end, ""),
        "one mark": every_table("").replace(end, ""),
        "twice": every_table("") + begin + end,
        "the other way round": every_table("").replace(begin + end, end + begin),
    }
    with pytest.raises(PageError, match=r"docs/results\.md must hold .*tiny-sd21: begin.*once each and in this order"):
        with_tables(harmed[harm], RESULTS_PAGE)


@pytest.mark.parametrize("page", PAGES)
def test_what_stood_in_a_table_is_replaced_and_what_stands_around_it_stays(page: str) -> None:
    renewed = with_tables(f"before {every_table('OUTDATED', page)} after", page)
    assert renewed.startswith("before ") and renewed.endswith(" after") and "OUTDATED" not in renewed
    assert with_tables(renewed, page) == renewed


def test_every_file_of_results_is_told_of() -> None:
    told = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    assert [path.name for path in (DATA / "results").glob("*.json") if path.name not in told] == []


def test_a_damaged_file_of_results_is_named(tmp_path: Path) -> None:
    shutil.copytree(DATA / "results", tmp_path / "results")
    (tmp_path / "results" / "tiny-dit.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(PageError, match=r"tiny-dit\.json is not what results_table reads"):
        with_tables(every_table(""), RESULTS_PAGE, tmp_path / "results")


def test_damaged_benchmarks_are_named(tmp_path: Path) -> None:
    shutil.copytree(DATA / "results", tmp_path / "results")
    (tmp_path / "results" / "speed.json").write_text(json.dumps({"machine_info": {}, "benchmarks": []}))
    with pytest.raises(PageError, match=r"speed\.json is not what speed_table reads"):
        with_tables(every_table("", "README.md"), "README.md", tmp_path / "results")
