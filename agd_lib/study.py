"""The full measurement of a small base model, from trajectories to the results that the repository ships.

    python -m agd_lib.study tiny-dit --run runs/study/tiny-dit --results data/results/tiny-dit.json \
        --ship data/tiny-dit/adapters

It collects trajectories, trains every kind of adapter from three seeds, samples every guidance at every scale with
three seeds, and writes one row for each. What is finished is kept below ``--run``, so an interrupted study resumes.
``--gate`` stops after unguided sampling and classifier-free guidance: what the base model itself gains from guidance.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from .adapters import ADAPTERS
from .attach import AdapterSet, default_card
from .base_models import BaseModel, StableDiffusionBase, load_base
from .cycles import has_fast_bfloat16
from .errors import AGDError
from .evaluation import Evaluation, default_extractor, evaluate, load_reference
from .guidance import AGD, CFG, Guidance, Unguided
from .influence import influence_of
from .project import DATA, ROOT, display_path
from .prompts import scene_prompts
from .results import Row, markdown_table, row_from_dict, summarise
from .storage import lock_folder, read_json, write_json
from .training import TrainingSettings, train
from .trajectories import CollectionPlan, TrajectoryStore, collect


class StudyError(AGDError):
    """A study's folder holds what was made in another way."""


@dataclass(frozen=True)
class Recipe:
    """How one kind of adapter is trained on a small base model."""

    hidden_size: int
    settings: TrainingSettings
    noise_ranges: int = 1


@dataclass(frozen=True)
class StudyPlan:
    """What a study collects, trains and measures on a base model.

    Attributes:
        recipes: by the kind of adapters. scales: guidance scales to sample at.
        guidance_range: w ~ U[w_min, w_max] in training. trajectories: to collect.
        n: images for each measurement.
    """

    recipes: dict[str, Recipe]
    scales: tuple[float, ...]
    guidance_range: tuple[float, float]
    trajectories: int
    n: int


_SETTINGS = TrainingSettings(2_000, 128, 4e-3, weighting="endpoint", optimizer="muon", max_grad_norm=1.0)

RECIPES: dict[str, Recipe] = {
    "offset": Recipe(24, _SETTINGS),
    "cross-attention": Recipe(20, replace(_SETTINGS, num_steps=1_500)),
    "modulated": Recipe(19, replace(_SETTINGS, num_steps=12_000, learning_rate=6e-3), noise_ranges=2),
}
"""For tiny-dit: sizes of at most 5 % of its parameters, and what trains them well in the time of an hour on two cores. The
paper's own settings are the defaults of :class:`~agd_lib.training.TrainingSettings`."""

_TEXT_SETTINGS = replace(_SETTINGS, num_steps=1_000, batch_size=64, learning_rate=5e-3)

_TEXT: tuple[tuple[float, float], int, int] = ((1.0, 12.0), 8_000, 1_000)

PLANS: dict[str, StudyPlan] = {
    "tiny-dit": StudyPlan(RECIPES, (1.5, 2.0, 2.5, 3.0, 4.0, 6.0), (1.0, 6.0), trajectories=24_000, n=1_700),
    "tiny-sd21": StudyPlan(
        {
            "offset": Recipe(44, _TEXT_SETTINGS),
            "cross-attention": Recipe(40, _TEXT_SETTINGS),
            "modulated": Recipe(41, replace(_TEXT_SETTINGS, num_steps=5_000), noise_ranges=2),
        },
        (2.0, 3.0, 5.0, 8.0, 12.0),
        *_TEXT,
    ),
    "tiny-sdxl": StudyPlan(
        {
            "offset": Recipe(28, _TEXT_SETTINGS),
            "cross-attention": Recipe(24, _TEXT_SETTINGS),
            "modulated": Recipe(26, replace(_TEXT_SETTINGS, num_steps=2_000), noise_ranges=2),
        },
        (2.0, 3.0, 5.0, 8.0),
        *_TEXT,
    ),
}
SEEDS = (0, 1, 2)

TRAINING_PROMPTS, MEASURING_PROMPTS = 10, 20
"""Seeds of the prompts that text-to-image models are given: of those in training, and of the first seed's in measuring."""


def training_conditions(base: BaseModel, trajectories: int, seed: int = TRAINING_PROMPTS) -> tuple[Any, ...]:
    """Every class; or one prompt for each trajectory, as in the paper, by the prompts' seed."""
    if isinstance(base, StableDiffusionBase):
        return tuple(scene_prompts(trajectories, seed))
    return tuple(base.all_conditions())


def measuring_conditions(base: BaseModel, n: int, seed: int) -> list[Any]:
    """What the images are asked to show: every class in turn; or prompts drawn independently of those in training.

    Others for each seed. The grammar of the scenes is small: about half of the prompts also occur among the 100,000
    captions that the base models were trained on.
    """
    if isinstance(base, StableDiffusionBase):
        return scene_prompts(n, MEASURING_PROMPTS + seed)
    return base.all_conditions()


@dataclass(frozen=True)
class Unit:
    """One measurement: a guidance at a scale with a seed. ``kind`` is ``"unguided"``, ``"cfg"`` or an adapter kind."""

    kind: str
    scale: float
    seed: int


def train_compiled(
    base: BaseModel,
    adapters: AdapterSet,
    store: TrajectoryStore,
    settings: TrainingSettings,
    checkpoints: Path | None = None,
    label: str = "train",
) -> None:
    """:func:`~agd_lib.training.train` to the end, compiled, and in bfloat16 on a processor that has instructions for it.

    A step takes half the time then. The backward pass of the fused attention has none of those instructions and would eat
    it all up, hence the plain one. The base model stays compiled, for the shapes of these batches: load another one.
    """
    torch.compiler.reset()  # of other adapters in this process: after eight kinds of them nothing is compiled any more
    base.denoiser.compile(dynamic=False)
    accelerator = Accelerator(cpu=base.device.type == "cpu", mixed_precision="bf16" if has_fast_bfloat16() else "no")
    with sdpa_kernel(SDPBackend.MATH):
        states = train(base, adapters, store, settings, checkpoints, accelerator=accelerator)
        for _ in tqdm(states, total=settings.num_steps, desc=label, mininterval=20):
            pass


def train_unit(base_name: str, run: Path, kind: str, seed: int) -> None:
    """Train one kind of adapter from one seed on the run's trajectories, unless that is done.

    Raises:
        StudyError: if adapters are there that were made in another way.
    """
    folder = run / "adapters" / f"{kind}-seed{seed}"
    base, store, recipe = load_base(base_name), TrajectoryStore(run / "trajectories"), PLANS[base_name].recipes[kind]
    inputs = {
        "base": base.fingerprint(),
        "hidden_size": recipe.hidden_size,
        "noise_ranges": recipe.noise_ranges,
        "settings": asdict(recipe.settings),
        "shards": [shard["sha256"] for shard in store.manifest["shards"]],
    }
    note = folder.with_name(f"{folder.name}.json")
    if folder.exists() and note.is_file():
        if read_json(note, StudyError, "training note") != inputs:
            raise StudyError(
                f"{folder} was trained from another base model, store or recipe: remove {folder.parent} or choose another --run"
            )
        return
    torch.set_num_threads(1)
    guidance_range = tuple(store.manifest["guidance_range"])
    adapters = AdapterSet.create(
        base, kind, recipe.hidden_size, guidance_range, noise_ranges=recipe.noise_ranges, seed=seed
    )
    settings = replace(recipe.settings, seed=seed)
    train_compiled(base, adapters, store, settings, run / "checkpoints" / f"{kind}-seed{seed}", f"train {kind} {seed}")
    adapters.save_pretrained(folder)
    write_json(note, inputs)


def measure(
    base: BaseModel,
    guidance: Guidance,
    n: int,
    seed: int,
    num_inference_steps: int,
    keep: Path,
    unguided: Evaluation | None = None,
    cfg: Evaluation | None = None,
) -> Evaluation:
    """:func:`~agd_lib.evaluation.evaluate` of a small base model, by its own extractor, reference and conditions.

    Args:
        keep: what was measured before is read from there. unguided, cfg: for the endpoint error.
    """
    extractor, reference_path = default_extractor(base, DATA)
    assert reference_path is not None
    return evaluate(
        base,
        guidance,
        load_reference(reference_path, extractor),
        extractor,
        n,
        seed,
        num_inference_steps,
        unguided_latents=unguided.latents if unguided else None,
        cfg_latents=cfg.latents if cfg else None,
        progress=False,
        keep=keep,
        conditions=measuring_conditions(base, n, seed),
    )


def measure_unit(base_name: str, run: Path, unit: Unit, n: int, num_inference_steps: int) -> Row:
    """Sample and measure one unit; what was measured before is read."""
    torch.set_num_threads(1)
    base, how = load_base(base_name), (n, unit.seed, num_inference_steps, run / "rows")
    unguided = measure(base, Unguided(), *how)
    if unit.kind == "unguided":
        return unguided.row
    cfg = measure(base, CFG(unit.scale), *how)
    if unit.kind == "cfg":
        return cfg.row
    adapters = AdapterSet.from_pretrained(run / "adapters" / f"{unit.kind}-seed{unit.seed}").attach(base)
    return measure(base, AGD(adapters, unit.scale), *how, unguided, cfg).row


def in_parallel(
    workers: int, label: str, function: Callable[..., Any], calls: Sequence[tuple[object, ...]]
) -> list[Any]:
    """The results of the calls, in order; at the first error the calls that have not begun are given up."""
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        jobs = [pool.submit(function, *call) for call in calls]
        return [job.result() for job in tqdm(jobs, desc=label)]
    finally:
        pool.shutdown(cancel_futures=True)


def provenance(command: str, seconds: float) -> dict[str, Any]:
    """Where results come from: command, commit, machine, and seconds (what an earlier invocation measured is read)."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "command": command,
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "seconds_of_last_invocation": round(seconds),
    }


def write_study(path: Path, rows: Sequence[Row], command: str, seconds: float) -> None:
    """Write rows with where they come from."""
    write_json(path, provenance(command, seconds) | {"rows": [asdict(row) for row in rows]})


def rows_of(path: Path, name: str = "rows") -> list[dict[str, Any]]:
    """A list of JSON objects in a file of results.

    Raises:
        AGDError: if it is missing or malformed.
    """
    value = read_json(path, AGDError, "file of results").get(name)
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise AGDError(f"{path} holds no list of {name}: measure it again")
    return value


def read_study(path: Path) -> list[Row]:
    """The rows of a file that :func:`write_study` wrote.

    Raises:
        AGDError: if it is missing or malformed.
    """
    return [row_from_dict(row, f"{path}, row {number}") for number, row in enumerate(rows_of(path))]


def ship(run: Path, rows: Sequence[Row], kinds: Sequence[str], seed: int, folder: Path, results: Path) -> None:
    """Copy the adapters of one seed to ``folder``, each with a model card that shows its results."""
    for kind in kinds:
        adapters = AdapterSet.from_pretrained(run / "adapters" / f"{kind}-seed{seed}")
        mine = [row for row in rows if row.guidance != "agd" or row.adapter == kind]
        seeds = sorted({row.seed for row in mine})
        card = (
            default_card(adapters.config)
            + f"\n## Results\n\nMean ± standard deviation over {len(seeds)} seeds (of training and of noise; the shipped "
            f"adapters are those of seed {seed}). FD is a Frechet distance in the features of {rows[0].extractor}, "
            f"not an FID. Source: `{display_path(results)}`.\n\n{markdown_table(mine)}\n"
        )
        adapters.save_pretrained(folder / kind, card)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", choices=list(PLANS))
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--ship", type=Path, default=None, help="folder for the trained adapters")
    parser.add_argument("--gate", action="store_true", help="unguided and CFG only")
    parser.add_argument("--kinds", nargs="+", default=list(ADAPTERS), choices=list(ADAPTERS))
    parser.add_argument("--scales", nargs="+", type=float, default=None, help="by default the base model's own")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument(
        "--n", type=int, default=None, help="images per scale and seed; by default the base model's own"
    )
    parser.add_argument("--steps", type=int, default=20, help="sampler steps")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    arguments = parser.parse_args()
    study = PLANS[arguments.base]
    scales, n = arguments.scales or study.scales, arguments.n or study.n
    start = time.perf_counter()
    run, common = arguments.run, (n, arguments.steps)

    def measured(label: str, units: Iterable[Unit]) -> list[Row]:
        return in_parallel(arguments.workers, label, measure_unit, [(arguments.base, run, u, *common) for u in units])

    with lock_folder(run):
        rows = measured("unguided", [Unit("unguided", 1.0, seed) for seed in arguments.seeds])
        rows += measured("CFG", [Unit("cfg", scale, seed) for scale in scales for seed in arguments.seeds])
        if not arguments.gate:
            base = load_base(arguments.base)
            plan = CollectionPlan(
                training_conditions(base, study.trajectories),
                study.trajectories,
                study.guidance_range,
                num_inference_steps=arguments.steps,
                trajectories_per_shard=1_000,
            )
            influence_of(base, collect(base, plan, run / "trajectories"))  # once, before two workers want it
            longest_first = sorted(arguments.kinds, key=lambda kind: -study.recipes[kind].settings.num_steps)
            trainings = [(arguments.base, run, kind, seed) for kind in longest_first for seed in arguments.seeds]
            in_parallel(arguments.workers, "train", train_unit, trainings)
            students = itertools.product(arguments.kinds, scales, arguments.seeds)
            rows += measured("AGD", itertools.starmap(Unit, students))
    command = "python -m agd_lib.study " + shlex.join(sys.argv[1:])
    write_study(arguments.results, rows, command, time.perf_counter() - start)
    if arguments.ship:
        ship(run, rows, arguments.kinds, arguments.seeds[0], arguments.ship, arguments.results.resolve())
    print(markdown_table(rows))
    print(json.dumps({"measurements": len(rows), "settings": len(summarise(rows))}))


if __name__ == "__main__":
    main()
