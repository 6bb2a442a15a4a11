"""The full measurement of a small base model, from trajectories to the results that the repository ships.

    python -m agd_lib.study tiny-dit --run runs/study/tiny-dit --results data/results/tiny-dit.json \
        --ship data/tiny-dit/adapters

It collects trajectories, trains every kind of adapter from three seeds, samples every guidance at every scale with
three seeds, and writes one row for each. What is finished is kept below ``--run``, so an interrupted study resumes.
``--gate`` stops after unguided sampling and classifier-free guidance: what the base model itself gains from guidance.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .attach import AdapterSet, default_card
from .base_models import load_base
from .errors import AGDError
from .evaluation import default_extractor, evaluate, load_reference
from .guidance import AGD, CFG, Guidance, Unguided
from .project import DATA, ROOT, display_path
from .results import Row, markdown_table, row_from_dict, summarise
from .storage import read_json, read_tensors, write_json, write_tensors
from .training import TrainingSettings, train
from .trajectories import CollectionPlan, TrajectoryStore, collect


@dataclass(frozen=True)
class Recipe:
    """How one kind of adapter is trained on a small base model."""

    hidden_size: int
    settings: TrainingSettings


RECIPES: dict[str, Recipe] = {
    "offset": Recipe(24, TrainingSettings(4_000, 64, 2e-3, weighting="endpoint")),
    "cross-attention": Recipe(20, TrainingSettings(4_000, 64, 2e-3, weighting="endpoint")),
    "modulated": Recipe(29, TrainingSettings(4_000, 64, 2e-3, weighting="endpoint")),
}
"""Sizes of at most 5 % of tiny-dit's parameters. The paper's learning rate is 1e-4: small models bear a higher one."""

SCALES = (1.5, 2.0, 2.5, 3.0, 4.0, 6.0)
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Unit:
    """One measurement: a guidance at a scale with a seed. ``kind`` is ``"unguided"``, ``"cfg"`` or an adapter kind."""

    kind: str
    scale: float
    seed: int

    @property
    def name(self) -> str:
        """File name of its row."""
        return f"{self.kind}-{self.scale:g}-seed{self.seed}"


def train_unit(base_name: str, run: Path, kind: str, seed: int) -> None:
    """Train one kind of adapter from one seed on the run's trajectories, unless that is done."""
    folder = run / "adapters" / f"{kind}-seed{seed}"
    if folder.exists():
        return
    torch.set_num_threads(1)
    base, store, recipe = load_base(base_name), TrajectoryStore(run / "trajectories"), RECIPES[kind]
    adapters = AdapterSet.create(base, kind, recipe.hidden_size, tuple(store.manifest["guidance_range"]), seed=seed)
    settings = TrainingSettings(**{**asdict(recipe.settings), "seed": seed})
    states = train(base, adapters, store, settings, run / "checkpoints" / f"{kind}-seed{seed}")
    for _ in tqdm(states, total=settings.num_steps, desc=f"train {kind} {seed}", mininterval=20):
        pass
    adapters.save_pretrained(folder)


def measure_unit(base_name: str, run: Path, unit: Unit, n: int, num_inference_steps: int) -> None:
    """Sample and measure one unit, unless that is done; final latents of unguided and CFG sampling are kept."""
    path = run / "rows" / f"{unit.name}.json"
    if path.exists():
        return
    torch.set_num_threads(1)
    base = load_base(base_name)
    extractor, reference_path = default_extractor(base, DATA)
    assert reference_path is not None
    reference = load_reference(reference_path, extractor)
    unguided, cfg = (
        _latents(run, Unit(kind, scale, unit.seed)) for kind, scale in (("unguided", 1.0), ("cfg", unit.scale))
    )
    guidance: Guidance = Unguided()
    if unit.kind == "cfg":
        guidance = CFG(unit.scale)
    elif unit.kind != "unguided":
        adapters = AdapterSet.from_pretrained(run / "adapters" / f"{unit.kind}-seed{unit.seed}").attach(base)
        guidance = AGD(adapters, unit.scale)
    result = evaluate(
        base,
        guidance,
        reference,
        extractor,
        n,
        unit.seed,
        num_inference_steps,
        unguided_latents=unguided if unit.kind not in ("unguided", "cfg") else None,
        cfg_latents=cfg,
        progress=False,
    )
    if unit.kind in ("unguided", "cfg"):
        write_tensors(run / "latents" / f"{unit.name}.safetensors", {"latents": result.latents})
    write_json(path, asdict(result.row))


def _latents(run: Path, unit: Unit) -> torch.Tensor | None:
    path = run / "latents" / f"{unit.name}.safetensors"
    return read_tensors(path, AGDError, "latents")["latents"] if path.exists() else None


def _in_parallel(workers: int, label: str, function: Callable[..., None], calls: Iterable[tuple[object, ...]]) -> None:
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(function, *call) for call in calls]
        for job in tqdm(jobs, desc=label):
            job.result()


def read_rows(run: Path) -> list[Row]:
    """The rows that are finished, unguided first, then by method and scale."""
    rows = [
        row_from_dict(read_json(path, AGDError, "row"), str(path)) for path in sorted((run / "rows").glob("*.json"))
    ]
    order = {"unguided": 0, "cfg": 1, "agd": 2}
    return sorted(
        rows, key=lambda row: (order[row.guidance], list(RECIPES).index(row.adapter or "offset"), row.scale, row.seed)
    )


def write_study(path: Path, rows: Sequence[Row], command: str, seconds: float) -> None:
    """Write rows with where they come from: command, commit, machine, time."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    write_json(
        path,
        {
            "command": command,
            "commit": commit.stdout.strip(),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
            "seconds": round(seconds),
            "rows": [asdict(row) for row in rows],
        },
    )


def read_study(path: Path) -> list[Row]:
    """The rows of a file that :func:`write_study` wrote."""
    value = read_json(path, AGDError, "study")
    return [row_from_dict(row, f"{path}, row {number}") for number, row in enumerate(value["rows"])]


def ship(run: Path, rows: Sequence[Row], base_name: str, kinds: Sequence[str], folder: Path, results: Path) -> None:
    """Copy the adapters of the first seed to ``folder``, each with a model card that shows its results."""
    for kind in kinds:
        adapters = AdapterSet.from_pretrained(run / "adapters" / f"{kind}-seed{SEEDS[0]}")
        mine = [row for row in rows if row.guidance != "agd" or row.adapter == kind]
        seeds = sorted({row.seed for row in mine})
        card = (
            default_card(adapters.config)
            + f"\n## Results\n\nMean ± standard deviation over {len(seeds)} seeds (of training and of noise; the shipped "
            f"adapters are those of seed {seeds[0]}). FD is a Frechet distance in the features of the shapes extractor, "
            f"not an FID. Source: `{display_path(results)}`.\n\n{markdown_table(mine)}\n"
        )
        adapters.save_pretrained(folder / kind, card)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--ship", type=Path, default=None, help="folder for the trained adapters")
    parser.add_argument("--gate", action="store_true", help="unguided and CFG only")
    parser.add_argument("--kinds", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--scales", nargs="+", type=float, default=list(SCALES))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--n", type=int, default=1_700, help="images per scale and seed")
    parser.add_argument("--steps", type=int, default=20, help="sampler steps")
    parser.add_argument("--trajectories", type=int, default=16_000)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    arguments = parser.parse_args()
    start = time.perf_counter()
    run, common = arguments.run, (arguments.n, arguments.steps)
    teachers = [Unit("unguided", 1.0, seed) for seed in arguments.seeds]
    teachers += [Unit("cfg", scale, seed) for scale in arguments.scales for seed in arguments.seeds]
    _in_parallel(arguments.workers, "CFG", measure_unit, [(arguments.base, run, unit, *common) for unit in teachers])
    if not arguments.gate:
        base = load_base(arguments.base)
        plan = CollectionPlan(
            tuple(base.all_conditions()),
            arguments.trajectories,
            num_inference_steps=arguments.steps,
            steps_per_trajectory=max(1, arguments.steps // 2),
            trajectories_per_shard=1_000,
        )
        collect(base, plan, run / "trajectories")
        trainings = [(arguments.base, run, kind, seed) for seed in arguments.seeds for kind in arguments.kinds]
        _in_parallel(arguments.workers, "train", train_unit, trainings)
        students = [
            Unit(kind, scale, seed)
            for kind in arguments.kinds
            for scale in arguments.scales
            for seed in arguments.seeds
        ]
        _in_parallel(
            arguments.workers, "AGD", measure_unit, [(arguments.base, run, unit, *common) for unit in students]
        )
    rows = read_rows(run)
    command = "python -m agd_lib.study " + shlex.join(sys.argv[1:])
    write_study(arguments.results, rows, command, time.perf_counter() - start)
    if arguments.ship:
        ship(run, rows, arguments.base, arguments.kinds, arguments.ship, arguments.results.resolve())
    print(markdown_table(rows))
    print(json.dumps({"measurements": len(rows), "settings": len(summarise(rows))}))


if __name__ == "__main__":
    main()
