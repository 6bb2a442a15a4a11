"""Which parts of the training matter: the same training with one part exchanged, and what the adapters are worth then.

    python -m agd_lib.recipes tiny-dit states --run runs/recipes/tiny-dit

Every variant of an ablation is trained from several seeds, in a short training of its own, and measured as the shipped
adapters are. What is finished is kept below ``--run``; all of it is written to ``data/results/<base>-<ablation>.json``.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from .attach import AdapterSet
from .base_models import BaseModel, StableDiffusionBase, load_base
from .errors import AGDError
from .guidance import AGD, CFG, GuidanceInterval, Unguided
from .influence import influence_of
from .project import DATA
from .results import Row, Summary, cell, row_from_dict, summarise
from .scenes import make_scenes
from .shapes import make_images
from .storage import key_of, lock_folder, read_json, write_json
from .study import (
    PLANS,
    SEEDS,
    TRAINING_PROMPTS,
    Unit,
    in_parallel,
    measure,
    measure_unit,
    provenance,
    rows_of,
    train_compiled,
    training_conditions,
)
from .tiny import TRAIN_SEED
from .training import TrainingSettings, state_errors
from .trajectories import CollectionPlan, TrajectoryStore, collect, noised_data_states, with_other_states


@dataclass(frozen=True)
class TrainingVariant:
    """One way to train.

    Attributes:
        kind: of adapters. share: of the base model's parameters, at most: what is left out elsewhere goes into the size.
        use_timestep, use_condition: what they see.
        all_sites: False leaves out the layers that the authors' code passes over (in a UNet).
        states: ``"guided"`` (the paper), ``"noised"`` images, or ``"half"`` of each.
        trajectories, collection_steps, kept_steps: of the store; kept_steps of None: all of a trajectory's.
        weighting, num_steps: see :class:`~agd_lib.training.TrainingSettings`.
        guided_to: the highest timestep at which the images are guided in measuring; None: they are guided at every one. The
            endpoint error is against CFG at every timestep.
    """

    kind: str = "modulated"
    share: float = 0.05
    use_timestep: bool = True
    use_condition: bool = True
    all_sites: bool = True
    states: str = "guided"
    trajectories: int = 4_000
    collection_steps: int = 20
    kept_steps: int | None = None
    weighting: str = "endpoint"
    num_steps: int = 1_000
    guided_to: int | None = None

    def store_name(self) -> str:
        """Variants of one name are trained on the same store."""
        kept = self.kept_steps or self.collection_steps
        return f"{self.trajectories}-of-{kept}-in-{self.collection_steps}-{self.states}"


KINDS = ("offset", "cross-attention", "modulated")
SETTINGS = TrainingSettings(
    batch_size=64, learning_rate=5e-3, weighting="endpoint", optimizer="muon", max_grad_norm=1.0
)
NOISE_RANGES, STEPS = 10, 20
HELD_OUT_PROMPTS = 30
"""Seed of prompts that are neither trained on nor measured with."""

_DEFAULT = TrainingVariant()
_THRIFT = ((100, None), (400, None), (1_600, None), (6_400, None), (1_600, 5), (6_400, 5), (6_400, 1))

ABLATIONS: dict[str, tuple[TrainingVariant, ...]] = {
    "states": tuple(
        TrainingVariant(kind=kind, states=states) for kind in KINDS for states in ("guided", "noised", "half")
    ),
    "size": tuple(TrainingVariant(kind=kind, share=share) for kind in KINDS for share in (0.01, 0.025, 0.05, 0.10)),
    "smallest": tuple(TrainingVariant(kind=kind, share=0.005) for kind in KINDS),
    "inputs": tuple(
        TrainingVariant(kind=kind, use_timestep=timestep, use_condition=condition)
        for kind in KINDS
        for timestep, condition in ((True, True), (False, True), (True, False), (False, False))
        if condition or kind != "modulated"
    ),
    "sites": tuple(TrainingVariant(kind=kind, all_sites=all_sites) for kind in KINDS for all_sites in (True, False)),
    "weighting": tuple(
        TrainingVariant(kind=kind, weighting=weighting)
        for kind in KINDS
        for weighting in ("none", "timestep", "endpoint")
    ),
    "noisiest": tuple(
        replace(_DEFAULT, weighting=weighting, guided_to=to) for weighting in ("endpoint", "none") for to in (None, 800)
    ),
    "thrift": (
        *(replace(_DEFAULT, trajectories=trajectories, kept_steps=kept) for trajectories, kept in _THRIFT),
        *(replace(_DEFAULT, trajectories=6_400, collection_steps=steps) for steps in (5, 10)),
        replace(_DEFAULT, trajectories=400, collection_steps=1_000, kept_steps=20),  # the paper's number of steps
    ),
    # 999: what DDIM of Stable Diffusion takes at most
    "collection": tuple(
        replace(_DEFAULT, trajectories=400, collection_steps=steps, kept_steps=20) for steps in (999, 50, 20)
    ),
}
"""Ablation -> what is trained. Each is tried on one base model at a time; a DiT has no other ``sites``."""


@dataclass(frozen=True)
class TrainingRow:
    """One measurement of one training.

    Attributes:
        row: see :class:`~agd_lib.results.Row`; its seed is also the training's.
        error_left: the squared error on held-out guided states as a share of what guidance adds there, in ten equal ranges
            of timesteps from the cleanest to the noisiest.
        train_seconds: of the training, with compiling.
    """

    variant: TrainingVariant
    row: Row
    error_left: tuple[float, ...]
    train_seconds: float


def clean_latents(base: BaseModel, trajectories: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Latents (N, C, H, W) of real images of what :func:`~agd_lib.study.training_conditions` asks for, and their conditions.

    Returns:
        ``(latents, conditions)``; conditions (N,) are places in the trajectories' conditions.
    """
    if isinstance(base, StableDiffusionBase):
        images, _ = make_scenes(TRAINING_PROMPTS, trajectories)
        conditions = torch.arange(trajectories)
    else:
        images, conditions = make_images(TRAIN_SEED, max(trajectories, 2_000))
    generator = torch.Generator().manual_seed(seed)
    latents = [base.encode_images(chunk / 255, generator).cpu() for chunk in images.split(250)]
    return torch.cat(latents), conditions


def collect_for(base: BaseModel, variant: TrainingVariant, run: Path) -> TrajectoryStore:
    """The store that a variant is trained on; what was collected before is read."""
    guided_run = run / "stores" / replace(variant, states="guided").store_name()
    plan = CollectionPlan(
        training_conditions(base, variant.trajectories),
        variant.trajectories,
        PLANS[base.name].guidance_range,
        num_inference_steps=variant.collection_steps,
        steps_per_trajectory=variant.kept_steps or "all",
        trajectories_per_shard=1_000,
    )
    guided = collect(base, plan, guided_run)
    influence_of(base, guided)  # once, before two workers want it
    if variant.states == "guided":
        return guided
    folder = run / "stores" / variant.store_name()
    made_from = {"guided": guided.manifest["shards"], "base": base.fingerprint()}
    note = folder.with_suffix(".json")
    if not note.is_file() or read_json(note, AGDError, "note") != made_from:
        latents, conditions = clean_latents(base, variant.trajectories)
        states = noised_data_states(guided, latents, base, clean_conditions=conditions)
        if variant.states == "half":
            own = torch.cat([guided.batch(indices).latents for indices in torch.arange(len(guided)).split(1_000)])
            chosen = torch.rand(len(guided), generator=torch.Generator().manual_seed(0)) < 0.5
            states[chosen] = own[chosen]
        influence_of(base, with_other_states(guided, base, states, folder))
        write_json(note, made_from)
    return TrajectoryStore(folder)


def held_out_store(base: BaseModel, run: Path) -> TrajectoryStore:
    """Guided trajectories that no variant is trained on: other noises, and other prompts."""
    conditions = training_conditions(base, 400, HELD_OUT_PROMPTS)
    plan = CollectionPlan(conditions, 400, PLANS[base.name].guidance_range, num_inference_steps=20, seed=1)
    return collect(base, plan, run / "stores" / "held-out")


def largest_size(
    base: BaseModel, kind: str, share: float, guidance_range: tuple[float, float], seed: int = 0, **inputs: bool
) -> AdapterSet:
    """Untrained adapters of the largest hidden size that are at most this share of the base model's parameters.

    Args:
        inputs: what they see, and where they are: see :meth:`AdapterSet.create`.

    Raises:
        ValueError: if even the smallest are larger.
    """

    def made(size: int) -> AdapterSet:
        return AdapterSet.create(
            base,
            kind,
            size * step,
            guidance_range,
            noise_ranges=2 if kind == "modulated" else 1,
            seed=seed,
            **inputs,
        )

    step = 2 if kind == "cross-attention" else 1
    largest, allowed = 0, share * base.num_parameters()
    for half in (2**power for power in range(9, -1, -1)):
        if made(largest + half).num_parameters() <= allowed:
            largest += half
    if largest == 0:
        raise ValueError(f"got a share of {share:.2%}, of which {kind} adapters cannot be made")
    return made(largest)


def adapters_of(base: BaseModel, variant: TrainingVariant, seed: int = 0) -> AdapterSet:
    """A variant's adapters, untrained."""
    return largest_size(
        base,
        variant.kind,
        variant.share,
        PLANS[base.name].guidance_range,
        seed,
        use_timestep=variant.use_timestep,
        use_condition=variant.use_condition,
        all_sites=variant.all_sites,
    )


def train_variant(base_name: str, run: Path, variant: TrainingVariant, seed: int) -> Path:
    """Train a variant from one seed, unless that is done; returns the folder of the adapters."""
    torch.set_num_threads(1)
    base = load_base(base_name)
    store, held_out = (
        TrajectoryStore(run / "stores" / name, check=False) for name in (variant.store_name(), "held-out")
    )
    adapters = adapters_of(base, variant, seed)
    settings = replace(SETTINGS, num_steps=variant.num_steps, weighting=variant.weighting, seed=seed)
    inputs = [
        asdict(adapters.config),
        asdict(settings),
        *(each.manifest["shards"] for each in (store, held_out)),
        influence_of(base, store).tolist(),
    ]
    folder = run / "adapters" / key_of(inputs)
    note = folder.with_suffix(".json")
    if note.is_file():
        return folder
    start = time.perf_counter()
    train_compiled(base, adapters, store, settings, label=f"{variant.kind} {seed}")
    seconds = time.perf_counter() - start
    adapters.remove()
    adapters.save_pretrained(folder)
    left = error_left(load_base(base_name), adapters, held_out)
    write_json(note, {"error_left": left, "train_seconds": seconds})
    return folder


def error_left(base: BaseModel, adapters: AdapterSet, held_out: TrajectoryStore) -> list[float]:
    """The squared error as a share of what guidance adds, in equal ranges of timesteps from the cleanest to the noisiest."""
    errors, signal = state_errors(base, adapters, held_out), held_out.column("signal")
    ranges = held_out.column("timestep") * NOISE_RANGES // base.num_train_timesteps
    return [float(errors[ranges == i].sum() / signal[ranges == i].sum()) for i in range(NOISE_RANGES)]


def measure_variant(
    base_name: str, run: Path, variant: TrainingVariant, scale: float, seed: int, n: int
) -> TrainingRow:
    """Train a variant, and sample and measure it; what was done before is read."""
    folder = train_variant(base_name, run, variant, seed)
    base, how = load_base(base_name), (n, seed, STEPS)
    unguided = measure(base, Unguided(), *how, run / "rows")
    cfg = measure(base, CFG(scale), *how, run / "rows")
    adapters = AdapterSet.from_pretrained(folder).attach(base)
    schedule: float | GuidanceInterval = scale
    keep = run / "rows" / folder.name
    if variant.guided_to is not None:
        schedule, keep = (
            GuidanceInterval(scale, -1, variant.guided_to),
            keep.with_name(f"{keep.name}-to-{variant.guided_to}"),
        )
    row = measure(base, AGD(adapters, schedule), *how, keep, unguided, cfg).row
    note = read_json(folder.with_suffix(".json"), AGDError, "training note")
    return TrainingRow(variant, row, tuple(note["error_left"]), note["train_seconds"])


def write_variants(path: Path, rows: Sequence[TrainingRow], cfg: Sequence[Row], command: str, seconds: float) -> None:
    """Write the rows, and CFG's beside them, with where they come from."""
    values = [asdict(row) for row in rows]
    write_json(path, provenance(command, seconds) | {"cfg": [asdict(row) for row in cfg], "rows": values})


def read_variants(path: Path) -> tuple[list[TrainingRow], list[Row]]:
    """``(rows, CFG's)`` of a file that :func:`write_variants` wrote.

    Raises:
        AGDError: if it is missing or malformed.
    """
    found, names = [], {field.name for field in fields(TrainingVariant)}  # one that is missing has its default
    for number, entry in enumerate(rows_of(path)):
        variant, left, seconds = (entry.get(name) for name in ("variant", "error_left", "train_seconds"))
        if (
            entry.keys() != {field.name for field in fields(TrainingRow)}
            or not (isinstance(variant, dict) and variant.keys() <= names)
            or not (isinstance(left, list) and all(isinstance(share, float) for share in left))
            or not isinstance(seconds, float)
        ):
            raise AGDError(f"{path}, row {number} is not a variant and its row: measure it again")
        row = row_from_dict(entry["row"], f"{path}, row {number}")
        found.append(TrainingRow(TrainingVariant(**variant), row, tuple(left), seconds))
    return found, [row_from_dict(row, f"{path}, CFG, row {number}") for number, row in enumerate(rows_of(path, "cfg"))]


def variant_table(rows: Sequence[TrainingRow], cfg: Sequence[Row]) -> str:
    """The rows as a Markdown table, mean ± standard deviation over seeds: a line for each variant and scale, CFG's first.

    Of the variant the columns show what differs between the rows.
    """
    differing = [
        field.name for field in fields(TrainingVariant) if len({getattr(row.variant, field.name) for row in rows}) > 1
    ]
    lines = [
        _line(["method", *(name.replace("_", " ") for name in differing), "w", "endpoint error", "FD", "accuracy"]),
        "|---" * (len(differing) + 5) + "|",
    ]
    for summary in summarise(cfg):
        lines.append(_line([summary.method, *("" for _ in differing), f"{summary.scale:g}", *_measured_cells(summary)]))
    for variant in dict.fromkeys(row.variant for row in rows):
        for summary in summarise([row.row for row in rows if row.variant == variant]):
            values = [getattr(variant, name) for name in differing]
            cells = ["all" if value is None else f"{value}" for value in values]
            lines.append(_line([summary.method, *cells, f"{summary.scale:g}", *_measured_cells(summary)]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _measured_cells(summary: Summary) -> list[str]:
    return [
        cell(summary.mean[name], summary.deviation[name], 3)
        for name in ("endpoint_mse_ratio", "fd", "condition_accuracy")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", choices=list(PLANS))
    parser.add_argument("ablation", choices=list(ABLATIONS))
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=None, help="by default data/results/<base>-<ablation>.json")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--scales", nargs="+", type=float, default=[2.0, 4.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--n", type=int, default=1_000, help="images for each measurement")
    parser.add_argument("--steps", type=int, default=None, help="gradient steps, instead of the variants' own")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    arguments = parser.parse_args()
    start, run = time.perf_counter(), arguments.run
    variants = [variant for variant in ABLATIONS[arguments.ablation] if variant.kind in arguments.kinds]
    if not variants:
        parser.error(f"{arguments.ablation} has no variants of the kinds {', '.join(arguments.kinds)}")
    if arguments.ablation == "sites" and arguments.base == "tiny-dit":
        parser.error("tiny-dit has one attention layer in each block, and the authors' code adapts them all")
    if arguments.steps is not None:
        variants = [replace(variant, num_steps=arguments.steps) for variant in variants]
    base, name = load_base(arguments.base), arguments.base
    parallel = functools.partial(in_parallel, arguments.workers)
    how = (arguments.n, STEPS)
    with lock_folder(run):
        for variant in {variant.store_name(): variant for variant in variants}.values():
            collect_for(base, variant, run)
        held_out_store(base, run)
        parallel("unguided", measure_unit, [(name, run, Unit("unguided", 1.0, seed), *how) for seed in arguments.seeds])
        at = list(itertools.product(arguments.scales, arguments.seeds))
        trainings = dict.fromkeys(
            replace(variant, guided_to=None) for variant in variants
        )  # no two workers do the same
        cfg = parallel("CFG", measure_unit, [(name, run, Unit("cfg", *each), *how) for each in at])
        parallel("train", train_variant, [(name, run, *each) for each in itertools.product(trainings, arguments.seeds)])
        units = itertools.product(variants, at)
        rows = parallel("AGD", measure_variant, [(name, run, variant, *each, arguments.n) for variant, each in units])
    path = arguments.results or DATA / "results" / f"{name}-{arguments.ablation}.json"
    command = "python -m agd_lib.recipes " + shlex.join(sys.argv[1:])
    write_variants(path, rows, cfg, command, time.perf_counter() - start)


if __name__ == "__main__":
    main()
