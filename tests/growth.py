"""How costs grow with the work: seconds and memory over batch, resolution, prompts and stored states, four sizes of each.

    python tests/growth.py --results data/results/growth.json --figure docs/growth.svg

Every size is measured in a process of its own, three times; the fastest counts. Memory is what the work adds at its peak to
what the process held before it. On small models, with the machine to itself.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from small_models import randomise
from small_stores import random_states, write_store

from agd_lib.attach import AdapterSet
from agd_lib.base_models import BaseModel, base_from_pipeline, load_base
from agd_lib.guidance import AGD
from agd_lib.pages import exponent
from agd_lib.project import DATA
from agd_lib.sampling import endpoint, sample
from agd_lib.scenes import caption, draw_scene
from agd_lib.storage import write_json
from agd_lib.study import provenance
from agd_lib.trajectories import TrajectoryStore

Work = Callable[[], object]


@dataclass(frozen=True)
class Growth:
    """One quantity that grows.

    Attributes:
        what: is measured. size: what its sizes count. sizes: from the smallest. prepare: a size and an empty folder -> the
            work that is timed.
    """

    what: str
    size: str
    sizes: Sequence[int]
    prepare: Callable[[int, Path], Work]


def _sampling(base: BaseModel, adapters: AdapterSet, batch_size: int) -> Work:
    adapters.attach(base)
    condition = base.blank_condition(batch_size)
    return lambda: endpoint(sample(base, condition, AGD(adapters, 2.0), 4, seeds=range(batch_size)))


def over_batch(size: int, folder: Path) -> Work:
    """Sampling of so many images at once on tiny-dit with its adapters."""
    return _sampling(
        load_base("tiny-dit"), AdapterSet.from_pretrained(DATA / "tiny-dit" / "adapters" / "modulated"), size
    )


def over_resolution(size: int, folder: Path) -> Work:
    """Sampling on tiny-dit's architecture with so many tokens, which have random weights."""
    side = 2 * round(size**0.5)
    known = load_base("tiny-dit").pipeline
    transformer = DiTTransformer2DModel.from_config(dict(known.transformer.config) | {"sample_size": side})
    randomise(transformer.eval(), 0)
    base = base_from_pipeline(DiTPipeline(transformer, known.vae, known.scheduler), "larger images")
    return _sampling(base, AdapterSet.create(base, "modulated", 19), 4)


def over_prompts(size: int, folder: Path) -> Work:
    """Encoding of so many prompts by tiny-sd21."""
    base, prompts = load_base("tiny-sd21"), [caption(draw_scene(0, index)) for index in range(size)]
    return lambda: base.encode(prompts)


def over_states(size: int, folder: Path) -> Work:
    """Opening a store of so many states shaped as tiny-dit's, and reading 1,000 of them at random."""
    shards = (random_states(1_000, (4, 16, 16), 1, seed) for seed in range(size // 1_000))
    write_store(folder, shards, {"class_labels": torch.zeros(1, dtype=torch.int64)})
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(size, (1_000,), generator=generator).split(100)

    def read() -> None:
        store = TrajectoryStore(folder, check=False)
        for indices in chosen:
            store.batch(indices)

    return read


GROWTHS: tuple[Growth, ...] = (
    Growth("sampling, four steps", "images at once", (8, 32, 128, 512), over_batch),
    Growth("sampling of four images, four steps", "tokens an image", (64, 256, 576, 1024), over_resolution),
    Growth("encoding prompts", "prompts", (250, 1_000, 4_000, 16_000), over_prompts),
    Growth("opening a store and reading 1,000 states", "states in it", (2_000, 8_000, 32_000, 128_000), over_states),
)


def peak() -> float:
    """The largest resident memory of this process since :func:`forget_peak`, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def forget_peak() -> float:
    """Begin anew with the resident memory of now, in MiB, which is returned."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def measure(number: int, size: int, answer: Any) -> None:
    """In a process of its own: ``(seconds, MiB)`` of one size, into a queue."""
    with tempfile.TemporaryDirectory() as folder:
        work = GROWTHS[number].prepare(size, Path(folder))
        before, seconds = forget_peak(), []
        for _ in range(3):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        answer.put((min(seconds), peak() - before))


def measure_apart(number: int, size: int) -> tuple[float, float]:
    """:func:`measure` in a new process."""
    context = multiprocessing.get_context("spawn")
    answer: Any = context.Queue()
    process = context.Process(target=measure, args=(number, size, answer))
    process.start()
    found: tuple[float, float] = answer.get(timeout=600)
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=None, help="where to write the measurements")
    parser.add_argument("--figure", type=Path, default=None, help="where to draw them")
    arguments = parser.parse_args()
    start, rows = time.perf_counter(), []
    for number, growth in enumerate(GROWTHS):
        found = [measure_apart(number, size) for size in growth.sizes]
        seconds, mebibytes = map(list, zip(*found))
        rows.append(
            {
                "what": growth.what,
                "size": growth.size,
                "sizes": list(growth.sizes),
                "seconds": seconds,
                "mebibytes": mebibytes,
            }
        )
        print(json.dumps(rows[-1]), f"seconds grow with the power {exponent(growth.sizes, seconds):.2f}")
    if arguments.results:
        command = "python tests/growth.py " + shlex.join(sys.argv[1:])
        write_json(arguments.results, provenance(command, time.perf_counter() - start) | {"rows": rows})
    if arguments.figure:
        draw(rows, arguments.figure)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Seconds and memory over size, both axes logarithmic, a panel for each row."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "growth"
    figure, axes = plt.subplots(1, len(rows), figsize=(13, 3), layout="constrained")
    for axis, row in zip(axes, rows):
        axis.loglog(row["sizes"], row["seconds"], marker="o", label="seconds")
        axis.loglog(row["sizes"], [size / 1024 for size in row["mebibytes"]], marker="s", label="GiB")
        axis.set_xlabel(row["size"])
        axis.set_title(row["what"], fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
