"""Algorithm 1: collect CFG-guided trajectories, the store that they are kept in, and how training reads it.

A store is a folder::

    manifest.json            format version, base model, scheduler, guidance range, steps, seed, shards with checksums, its own
    conditions.safetensors   every distinct condition once
    shard-00000.safetensors  latents, target, timestep, guidance_scale, condition, signal: one row per recorded state

Every trajectory has a generator of its own, seeded by (seed, index): its scale, its kept timesteps and its noise do not
depend on the batch size, nor on what was collected before an interruption.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from torch import Tensor
from tqdm.auto import tqdm

from .attach import check_guidance_range
from .base_models import BaseModel, Condition
from .errors import StoreError, WriteError
from .guidance import CFG
from .sampling import initial_latents, noise_generators, sample, sample_seed
from .storage import lock_folder, read_json, read_tensors, refuse_link, sha256, write_json, write_tensors, writing

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
CONDITIONS = "conditions.safetensors"
STATES_OF = "states_of"
"""In the manifest of a store whose states are not those of its trajectories, see :func:`with_other_states`."""
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class CollectionPlan:
    """What a store holds, decided before the first step. Two stores with the same plan hold the same trajectories.

    Attributes:
        num_trajectories: trajectories in all.
        conditions: the condition of each, as ``base.encode`` takes it: a class, a prompt, or a pair of a prompt and a negative
            one; trajectory i has ``conditions[i % len]``.
        guidance_range: w ~ U[w_min, w_max].
        num_inference_steps: steps of the sampler.
        steps_per_trajectory: recorded states per trajectory, drawn at random; ``"all"`` keeps every step (the paper).
        seed: of scales, kept steps and noise.
        dtype: ``"float16"``, ``"bfloat16"`` or ``"float32"`` for stored latents and targets.
        trajectories_per_shard: how many trajectories go into one file: the unit that an interruption can cost.
        guided_channels: see :class:`agd_lib.guidance.CFG`.

    Raises:
        ValueError: for numbers below 1, a negative seed, no conditions, a guidance range out of order, more recorded than
            sampled steps, or an unknown dtype; the message says which.
    """

    conditions: tuple[Any, ...]
    num_trajectories: int
    guidance_range: tuple[float, float] = (1.0, 6.0)
    num_inference_steps: int = 20
    steps_per_trajectory: int | str = "all"
    seed: int = 0
    dtype: str = "float16"
    trajectories_per_shard: int = 256
    guided_channels: int | None = None

    def __post_init__(self) -> None:
        check_guidance_range(self.guidance_range)
        for name in ("num_trajectories", "num_inference_steps", "trajectories_per_shard", "guided_channels"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1) and not (name == "guided_channels" and value is None):
                raise ValueError(f"got {name} = {value!r}, expected a whole number of at least 1")
        if not (isinstance(self.seed, int) and self.seed >= 0):
            raise ValueError(f"got seed {self.seed!r}, expected a whole number of at least 0")
        if not self.conditions:
            raise ValueError("got no conditions, expected at least one class label or prompt")
        strange = [condition for condition in self.conditions if not _is_condition(condition)]
        if strange:
            raise ValueError(
                f"got the condition {strange[0]!r}, expected class labels (int), or names or prompts (str), or "
                "pairs (tuples) of a prompt and a negative prompt"
            )
        kept = self.steps_per_trajectory
        if kept != "all" and not (isinstance(kept, int) and 1 <= kept <= self.num_inference_steps):
            raise ValueError(
                f"got steps_per_trajectory = {kept!r}, expected 'all' or a number from 1 to {self.num_inference_steps}"
            )
        if self.dtype not in _DTYPES:
            raise ValueError(f"got dtype {self.dtype!r}, expected one of: {', '.join(_DTYPES)}")

    @property
    def kept_steps(self) -> int:
        """Recorded states per trajectory."""
        return self.num_inference_steps if self.steps_per_trajectory == "all" else int(self.steps_per_trajectory)

    @property
    def num_shards(self) -> int:
        """Files that the store will consist of."""
        return _ceil_div(self.num_trajectories, self.trajectories_per_shard)


def _is_condition(value: Any) -> bool:
    pair = value if isinstance(value, tuple) and len(value) == 2 else None
    return isinstance(value, int | str) or (pair is not None and all(isinstance(text, str) for text in pair))


def _ceil_div(count: int, size: int) -> int:
    return -(-count // size)


@dataclass(frozen=True)
class TrajectoryDraw:
    """The random choices of one trajectory: w, the kept step indices (ascending), and the generator for its noise."""

    guidance_scale: float
    kept_steps: tuple[int, ...]
    generator: torch.Generator


def draw_trajectory(plan: CollectionPlan, index: int) -> TrajectoryDraw:
    """Draw scale and kept steps of trajectory ``index`` from its own generator; its noise comes from there next."""
    (generator,) = noise_generators([sample_seed(plan.seed, index)])
    low, high = plan.guidance_range
    scale = low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()
    order = torch.randperm(plan.num_inference_steps, generator=generator)[: plan.kept_steps]
    return TrajectoryDraw(scale, tuple(sorted(order.tolist())), generator)


def collect_batch(
    base: BaseModel, plan: CollectionPlan, indices: Sequence[int], conditions: Condition | None = None
) -> dict[str, Tensor]:
    """Algorithm 1 for a batch of trajectories: draw w, run the CFG-guided sampler from noise, record its states.

    Args:
        conditions: ``base.encode(plan.conditions)``, on any device; None: encoded here.

    Returns:
        Rows in the order of the trajectories, then of the steps: ``latents`` (as the denoiser saw them, after the
        scheduler's input scaling if it has one) and ``target`` (R, C, H, W), ``timestep`` (R,) int64,
        ``guidance_scale`` (R,) float32, ``condition`` (R,) int64 (index into ``plan.conditions``), and ``signal`` (R,)
        float32: the mean square of what guidance adds, ``target - conditional prediction``.
    """
    draws = [draw_trajectory(plan, index) for index in indices]
    kept = torch.zeros(len(draws), plan.num_inference_steps, dtype=torch.bool)  # (B, steps)
    for row, draw in enumerate(draws):
        kept[row, list(draw.kept_steps)] = True
    condition_indices = torch.tensor([index % len(plan.conditions) for index in indices])
    conditions = base.encode(plan.conditions) if conditions is None else conditions
    condition = {name: value[condition_indices.to(value.device)].to(base.device) for name, value in conditions.items()}
    scales = torch.tensor([draw.guidance_scale for draw in draws], dtype=torch.float32, device=base.device)
    generators = [draw.generator for draw in draws]
    latents = initial_latents(base, generators)
    teacher = _RecordingCFG(scales, plan.guided_channels)
    records = []  # one for each step
    for step in sample(base, condition, teacher, plan.num_inference_steps, latents=latents, generators=generators):
        rows = kept[:, step.index].nonzero()[:, 0]  # the trajectories that keep this step
        on_device = rows.to(base.device)
        records.append(
            {
                "latents": teacher.latents[on_device].cpu(),
                "target": step.prediction[on_device].cpu(),
                "timestep": torch.full_like(rows, step.timestep),
                "guidance_scale": scales[on_device].cpu(),
                "condition": condition_indices[rows],
                "signal": teacher.signal[on_device].cpu(),
                "trajectory": rows,
            }
        )
    columns = {name: torch.cat([record[name] for record in records]) for name in records[0]}
    order = columns.pop("trajectory").argsort(stable=True)
    return {name: column[order] for name, column in columns.items()}


class _RecordingCFG:
    """CFG that remembers its last step: the latents that it was given, and the mean square of what guidance added."""

    def __init__(self, scales: Tensor, guided_channels: int | None) -> None:
        self.cfg = CFG(scales, guided_channels)
        self.scales = scales
        self.guides = bool((scales != 1).any())
        self.latents = torch.empty(0)
        self.signal = torch.zeros_like(scales)

    def predict(self, base: BaseModel, latents: Tensor, timestep: float, condition: Condition) -> Tensor:
        self.latents = latents
        if not self.guides:  # the conditional model's prediction: nothing to ask a second pass for
            return base.denoise(latents, timestep, condition)
        conditional, unconditional = self.cfg.both(base, latents, timestep, condition)
        target = self.cfg.combine(unconditional, conditional, self.scales)
        self.signal = (target - conditional).float().square().flatten(1).mean(dim=1)
        return target


def collect(
    base: BaseModel, plan: CollectionPlan, folder: str | Path, batch_size: int = 128, progress: bool = True
) -> TrajectoryStore:
    """Algorithm 1 into a store on disk. Run again after an interruption, it goes on with the first missing shard.

    With ``accelerate launch`` (``torchrun`` on CPUs) the processes share out the shards, and the store is that of one
    process: the same noise, scales and timesteps to the bit, the same states within float tolerance. What one process has
    finished stays when another one dies.

    Memory grows with ``batch_size``, with one shard's rows and with the distinct conditions (encoded once, and kept on the
    CPU), not with the number of trajectories.

    Args:
        base: in float32, so that the targets are exact: towards high noise the guidance signal is smaller than
            bfloat16's rounding.
        folder: new, or an unfinished or finished store with the same plan.
        batch_size: trajectories side by side; each makes two forward passes a step (one, if all of them have scale 1).

    Raises:
        StoreError: if the folder holds a store with another plan or of another base model, or damaged shards; if a
            prediction is NaN or infinite, also after rounding to the plan's dtype.
        FolderInUseError: if another process collects into this folder.
        WriteError: if the disk is full, or has no room for what is still missing.
        ValueError: for a base model that is not in float32, an unknown condition, more guided channels than the latents
            have, a number of steps that the scheduler cannot make, or a scheduler whose timesteps are not whole numbers.
    """
    folder = Path(folder)
    _check_plan(base, plan)
    conditions = {name: value.cpu() for name, value in base.encode(plan.conditions).items()}  # once for all
    header = _header(base, plan)
    there = _store_of(folder, header)
    if there is not None and there.complete:
        _remove_notes(folder, plan.num_shards)  # a run that was killed while it did so leaves some
        return there
    processes = PartialState(cpu=base.device.type == "cpu")
    with lock_folder(folder) if processes.is_main_process else nullcontext():
        if processes.is_main_process:
            _check_room(base, plan, folder)
            _begin(conditions, folder, header)
        processes.wait_for_everyone()
        listed = len(read_manifest(folder)["shards"])
        mine = range(processes.process_index, plan.num_shards, processes.num_processes)
        missing = [shard for shard in mine if shard >= listed and _noted(folder, shard) is None]
        processes.wait_for_everyone()  # nobody lists shards while another one looks which are missing
        for shard in missing:
            entry = _collect_shard(base, plan, conditions, folder, shard, batch_size, progress)
            write_json(_note(folder, shard), entry)  # only now that the shard is whole
            if processes.is_main_process:
                _list_shards(folder)
        processes.wait_for_everyone()
        if processes.is_main_process:
            _list_shards(folder)
        processes.wait_for_everyone()
    return TrajectoryStore(folder, check=False)


def _store_of(folder: Path, header: dict[str, Any]) -> TrajectoryStore | None:
    """The store in a folder, whole as far as it goes; None if there is none.

    Raises:
        StoreError: if it was collected in another way, or is damaged.
    """
    if not (folder / MANIFEST).exists():
        return None
    manifest = read_manifest(folder)
    keys = [key for key in (*header, STATES_OF) if key != "base_name"]
    different = [key for key in keys if manifest.get(key) != header.get(key)]
    if different:
        raise StoreError(
            f"{folder} holds a store that differs in {', '.join(different)}: "
            + "; ".join(f"{key} is {manifest.get(key)!r} there, {header.get(key)!r} here" for key in different[:2])
            + ". Choose another folder, or remove that one"
        )
    return TrajectoryStore(folder)


def _begin(conditions: Condition, folder: Path, header: dict[str, Any]) -> None:
    """Make sure of a manifest: of the store that is there, with every shard listed that is whole, or of a new one."""
    if (folder / MANIFEST).exists():
        _list_shards(folder)
        _store_of(folder, header)  # looked at again, now that nobody else can change it
    else:
        # notes of a store whose manifest is lost: nothing tells how its shards were collected
        for note in folder.glob("shard-*.json"):
            note.unlink()
        write_tensors(folder / CONDITIONS, conditions)
        _write_manifest(folder, {**header, "shards": [], "conditions_sha256": sha256(folder / CONDITIONS)})


def _check_room(base: BaseModel, plan: CollectionPlan, folder: Path) -> None:
    """Raises :class:`WriteError` if the disk has no room for the shards that are not there yet."""
    missing = sum(not (folder / f"shard-{shard:05d}.safetensors").exists() for shard in range(plan.num_shards))
    needed = predicted_size(base, plan) * missing // plan.num_shards
    free = shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free
    if needed > free:
        raise WriteError(
            f"{folder} will take {needed / 2**20:,.2f} MiB more, {free / 2**20:,.2f} are free there: make room or choose another "
            "folder; a store that records fewer steps_per_trajectory takes less"
        )


def _note(folder: Path, shard: int) -> Path:
    """Where a shard's entry is kept until the manifest lists it: processes finish in any order, one of them lists."""
    return folder / f"shard-{shard:05d}.json"


def _noted(folder: Path, shard: int) -> dict[str, Any] | None:
    """The entry of a shard that is whole and not listed yet; None otherwise."""
    note = _note(folder, shard)
    if not note.is_file():
        return None
    path = folder / f"shard-{shard:05d}.safetensors"
    for file in (note, path):
        refuse_link(file, StoreError)
    entry = read_json(note, StoreError, "note of a shard")
    whole = _is_entry(entry, shard) and path.is_file() and sha256(path) == entry["sha256"]
    return entry if whole else None


def _list_shards(folder: Path) -> None:
    """List in the manifest the planned shards that come next and are whole."""
    manifest = read_manifest(folder)
    shards = manifest["shards"]
    num_listed = len(shards)
    planned = _ceil_div(manifest["num_trajectories"], manifest["trajectories_per_shard"])
    while len(shards) < planned and (entry := _noted(folder, len(shards))) is not None:
        shards.append(entry)
    if len(shards) > num_listed:
        _write_manifest(folder, manifest)
    _remove_notes(folder, len(shards))


def _remove_notes(folder: Path, num_listed: int) -> None:
    """Remove the notes of the shards that the manifest lists."""
    for shard in range(num_listed):
        _note(folder, shard).unlink(missing_ok=True)


def _collect_shard(
    base: BaseModel,
    plan: CollectionPlan,
    conditions: Condition,
    folder: Path,
    shard: int,
    batch_size: int,
    progress: bool,
) -> dict[str, Any]:
    """Collect and write one shard; returns its entry in the manifest."""
    first = shard * plan.trajectories_per_shard
    indices = range(first, min(first + plan.trajectories_per_shard, plan.num_trajectories))
    starts = range(0, len(indices), batch_size)
    batches = []
    for start in tqdm(starts, desc=f"collect {shard + 1}/{plan.num_shards}", disable=not progress):
        batch = collect_batch(base, plan, indices[start : start + batch_size], conditions)
        batches.append(batch | {name: batch[name].to(_DTYPES[plan.dtype]) for name in ("latents", "target")})
    rows = {name: torch.cat([batch.pop(name) for batch in batches]) for name in list(batches[0])}
    _check_finite(rows, indices)
    path = folder / f"shard-{shard:05d}.safetensors"
    write_tensors(path, rows)
    return {"file": path.name, "rows": len(rows["timestep"]), "bytes": path.stat().st_size, "sha256": sha256(path)}


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_json(folder / MANIFEST, manifest | {"manifest_sha256": _manifest_checksum(manifest)})


def _manifest_checksum(manifest: dict[str, Any]) -> str:
    """Of everything that the manifest says, in whatever order and layout."""
    said = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _check_finite(rows: dict[str, Tensor], indices: Sequence[int]) -> None:
    names = ("latents", "target")
    finite = torch.stack([torch.isfinite(rows[name]).flatten(1).all(dim=1) for name in names])  # (2, R)
    if not bool(finite.all()):
        bad = int((~finite.all(dim=0)).nonzero()[0])
        name = names[int(finite[0, bad])]
        raise StoreError(
            f"the {name} of trajectory {indices[bad * len(indices) // finite.shape[1]]} at timestep "
            f"{int(rows['timestep'][bad])} is NaN or infinite as {str(rows[name].dtype).removeprefix('torch.')}; "
            "collect with a base model and dtype of float32, or at smaller guidance scales"
        )


def _check_plan(base: BaseModel, plan: CollectionPlan) -> None:
    """Raises ``ValueError`` for what this base model cannot do, before any work is done."""
    if base.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"got a base model in {base.dtype}, expected torch.float32: where noise is high, guidance adds less than its "
            "rounding errors, and a student would learn those. Load it with dtype=torch.float32"
        )
    channels, steps = base.latent_shape[0], plan.num_inference_steps
    if (plan.guided_channels or 1) > channels:
        raise ValueError(
            f"got guided_channels = {plan.guided_channels}, expected at most the {channels} of {base.name}"
        )
    if steps > base.num_train_timesteps:
        raise ValueError(f"got {steps} steps, expected 1 to {base.num_train_timesteps}")
    scheduler = copy.deepcopy(base.scheduler)
    scheduler.set_timesteps(steps)
    if len(scheduler.timesteps) != steps:
        raise ValueError(
            f"{type(scheduler).__name__} makes {len(scheduler.timesteps)} calls of the denoiser for {steps} steps, expected "
            "one a step: give the pipeline another scheduler, such as DDIMScheduler"
        )
    timesteps = torch.as_tensor(scheduler.timesteps)
    last = base.num_train_timesteps - 1
    if not 0 <= timesteps.min() <= timesteps.max() <= last:
        raise ValueError(
            f"{type(scheduler).__name__} begins at timestep {timesteps.max().item():g} for {steps} steps, where {base.name} was "
            f"trained on 0 to {last} (its steps_offset moves every step up by one): expected fewer steps, such as {steps - 1}"
        )
    fractional = timesteps[timesteps % 1 != 0]
    if len(fractional):
        raise ValueError(
            f"{type(scheduler).__name__} places {len(fractional)} of {steps} steps between the timesteps (such as "
            f"{fractional[0].item():g}), expected whole numbers, which a store keeps: give the pipeline a scheduler with "
            'timestep_spacing="leading" or "trailing" and without Karras sigmas, such as DDIMScheduler'
        )


def _header(base: BaseModel, plan: CollectionPlan) -> dict[str, Any]:
    header = asdict(plan) | {
        "format_version": FORMAT_VERSION,
        "conditions": [list(each) if isinstance(each, tuple) else each for each in plan.conditions],
        "guidance_range": list(plan.guidance_range),
        "guided_channels": plan.guided_channels or base.latent_shape[0],
        "base_name": base.name if not Path(base.name).exists() else Path(base.name).name,
        "base_fingerprint": base.fingerprint(),
        "prediction_type": base.prediction_type,
        "latent_shape": list(base.latent_shape),
        "num_train_timesteps": base.num_train_timesteps,
        "scheduler": {"class": type(base.scheduler).__name__} | _plain(base.scheduler.config),
    }
    return header


def _plain(config: Any) -> dict[str, Any]:
    return {k: v for k, v in dict(config).items() if not k.startswith("_") and isinstance(v, str | int | float | bool)}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


def _is_number_of_timesteps(value: Any) -> bool:
    return _is_count(value) and value <= 100_000


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(w, int | float) for w in value)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(_is_count(n) and n < 65_536 for n in value)


def _is_entry(value: Any, shard: int) -> bool:
    return (
        isinstance(value, dict)
        and value.get("file") == f"shard-{shard:05d}.safetensors"
        and isinstance(value.get("rows"), int)
        and isinstance(value.get("sha256"), str)
    )


_MANIFEST_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "latent_shape": (_is_shape, "three sizes [C, H, W]"),
    "num_trajectories": (_is_count, "a whole number from 1"),
    "trajectories_per_shard": (_is_count, "a whole number from 1"),
    "num_train_timesteps": (_is_number_of_timesteps, "a whole number from 1 to 100,000"),
    "num_inference_steps": (_is_count, "a whole number from 1"),
    "guided_channels": (_is_count, "a whole number from 1"),
    "guidance_range": (_is_pair, "[w_min, w_max]"),
    "dtype": (lambda value: isinstance(value, str) and value in _DTYPES, f"one of: {', '.join(_DTYPES)}"),
    "base_name": (lambda value: isinstance(value, str), "a name"),
    "base_fingerprint": (lambda value: isinstance(value, str), "a checksum"),
    "shards": (lambda value: isinstance(value, list), "a list"),
}
"""What the library reads of a manifest, with a test for each and what it expects."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check a store's manifest.

    Raises:
        StoreError: if it is missing, malformed, edited, of another format version, or names files outside its folder.
    """
    refuse_link(folder / MANIFEST, StoreError)
    manifest = read_json(folder / MANIFEST, StoreError, "store manifest")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise StoreError(
            f"{folder} has store format version {manifest.get('format_version')!r}, this library reads {FORMAT_VERSION}"
        )
    for name, (fits, expected) in _MANIFEST_FIELDS.items():
        if not fits(manifest.get(name)):
            raise StoreError(f"the manifest in {folder} gives {name} = {manifest.get(name)!r}, expected {expected}")
    shards, planned = manifest["shards"], _ceil_div(manifest["num_trajectories"], manifest["trajectories_per_shard"])
    if len(shards) > planned:
        raise StoreError(f"the manifest in {folder} lists {len(shards)} shards, its plan has {planned}")
    for number, shard in enumerate(shards):
        if not _is_entry(shard, number):
            raise StoreError(f"the manifest in {folder} has a malformed entry for shard {number}: {shard!r}")
    if manifest.get("manifest_sha256") != _manifest_checksum(manifest):
        raise StoreError(
            f"the manifest in {folder} is not what was written (its checksum differs): it was edited; collect again"
        )
    return manifest


@dataclass(frozen=True)
class TrajectoryBatch:
    """Recorded states, as training takes them.

    Attributes:
        latents, target: x_t and the guided prediction, (B, C, H, W) float32.
        timestep: (B,) int64. guidance_scale: (B,) float32. condition: see ``Condition``.
        signal: (B,) float32, mean square of target minus conditional prediction.
    """

    latents: Tensor
    target: Tensor
    timestep: Tensor
    guidance_scale: Tensor
    condition: Condition
    signal: Tensor

    def to(self, device: torch.device | str) -> TrajectoryBatch:
        """The batch on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return TrajectoryBatch(**moved, condition={k: v.to(device) for k, v in self.condition.items()})


class TrajectoryStore:
    """A store opened for reading; tensors are memory-mapped: of the states nothing is read until they are asked for.

    Args:
        folder: what :func:`collect` wrote.
        check: verify every file's checksum first (reads the whole store once).

    Attributes:
        conditions: every distinct condition once, (number of conditions, ...) by name.

    Raises:
        StoreError: if a file is missing, truncated, edited, a link, or of the wrong shape; the message names it.
    """

    def __init__(self, folder: str | Path, check: bool = True) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        for name in (CONDITIONS, *(shard["file"] for shard in self.manifest["shards"])):
            refuse_link(self.folder / name, StoreError)
        if check:
            self.verify()
        self.conditions: Condition = read_tensors(self.folder / CONDITIONS, StoreError, "store's conditions")
        self._shards = [self._open(shard) for shard in self.manifest["shards"]]
        self._starts = torch.tensor([0, *(len(shard["timestep"]) for shard in self._shards)]).cumsum(0)
        self._check_values()

    def verify(self) -> None:
        """Read every file and compare it with the checksum that the manifest has of it.

        Raises:
            StoreError: if a file is missing, truncated or edited; the message names it.
        """
        files = {CONDITIONS: self.manifest.get("conditions_sha256")}
        files |= {shard["file"]: shard["sha256"] for shard in self.manifest["shards"]}
        for name, checksum in files.items():
            path = self.folder / name
            if not path.is_file():
                raise StoreError(f"{path} is missing, though the manifest lists it; restore it or collect again")
            if sha256(path) != checksum:
                raise StoreError(f"{path} is not what was collected (its checksum differs): truncated or edited")

    def _open(self, shard: dict[str, Any]) -> dict[str, Tensor]:
        path = self.folder / shard["file"]
        tensors = read_tensors(path, StoreError, "shard")
        rows, dtype = shard["rows"], _DTYPES[self.manifest["dtype"]]
        state = (rows, *self.manifest["latent_shape"]), dtype
        index, number = ((rows,), torch.int64), ((rows,), torch.float32)
        expected = {"latents": state, "target": state, "timestep": index, "condition": index}
        expected |= {"guidance_scale": number, "signal": number}
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        if found != expected:
            raise StoreError(f"{path} holds the tensors {found}, the manifest asks for {expected}")
        return tensors

    def _check_values(self) -> None:
        """Timesteps and conditions must be there to be looked up; scales and signals are numbers that are not negative."""
        counts = {len(value) if value.ndim else 0 for value in self.conditions.values()}
        limits = {"timestep": self.manifest["num_train_timesteps"], "condition": min(counts, default=0)}
        for shard, entry in zip(self._shards, self.manifest["shards"]):
            for name, limit in limits.items():
                if len(shard[name]) and not 0 <= int(shard[name].min()) <= int(shard[name].max()) < limit:
                    raise StoreError(
                        f"{self.folder / entry['file']} holds a {name} that is not in 0 to {limit - 1}: collect again"
                    )
            for name in ("guidance_scale", "signal"):
                bad = (~(shard[name].isfinite() & (shard[name] >= 0))).nonzero()
                if len(bad):
                    raise StoreError(
                        f"{self.folder / entry['file']} holds a {name} of {float(shard[name][bad[0]]):g} in row "
                        f"{int(bad[0])}, expected numbers from 0: collect again"
                    )

    @property
    def complete(self) -> bool:
        """Whether every shard of the plan is there."""
        return len(self._shards) == _ceil_div(
            self.manifest["num_trajectories"], self.manifest["trajectories_per_shard"]
        )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def column(self, name: str) -> Tensor:
        """One value per recorded state, (len(store),): ``timestep``, ``guidance_scale``, ``condition`` or ``signal``.

        Raises:
            KeyError: for another name.
        """
        return torch.cat([shard[name] for shard in self._shards])

    def batch(self, indices: Tensor) -> TrajectoryBatch:
        """The recorded states with these indices (B,), in this order."""
        shard_of = torch.searchsorted(self._starts, indices, right=True) - 1
        rows = indices - self._starts[shard_of]
        places = list(zip(shard_of.tolist(), rows.tolist()))
        stacked = {name: torch.stack([self._shards[s][name][r] for s, r in places]) for name in self._shards[0]}
        condition_index = stacked.pop("condition")
        for name in ("latents", "target"):
            stacked[name] = stacked[name].float()
        return TrajectoryBatch(
            **stacked, condition={name: value[condition_index] for name, value in self.conditions.items()}
        )

    def check_base(self, base: BaseModel) -> None:
        """Raises :class:`StoreError` if the store was collected with another base model, or holds what this one cannot take."""
        if base.fingerprint() != self.manifest["base_fingerprint"]:
            raise StoreError(
                f"{self.folder} was collected with {self.manifest['base_name']} "
                f"(fingerprint {self.manifest['base_fingerprint']}), not with {base.name} ({base.fingerprint()}): "
                "collect trajectories of this base model"
            )
        own = {
            "latent_shape": list(base.latent_shape),
            "num_train_timesteps": base.num_train_timesteps,
            "prediction_type": base.prediction_type,
        }
        for name, value in own.items():
            if self.manifest.get(name) != value:
                raise StoreError(
                    f"the manifest in {self.folder} gives {name} = {self.manifest.get(name)!r}, {base.name} has {value!r}: "
                    "it was edited; collect again"
                )
        if not base.takes(self.conditions):
            shapes = {name: tuple(value.shape) for name, value in self.conditions.items()}
            raise StoreError(
                f"{self.folder / CONDITIONS} holds {shapes}, which are no conditions of {base.name}: collect again"
            )

    def size_on_disk(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.folder.iterdir())


def predicted_size(base: BaseModel, plan: CollectionPlan) -> int:
    """Bytes that a store will take on disk: its recorded states and its encoded conditions, without headers and manifest."""
    values = math.prod(base.latent_shape)
    states = plan.num_trajectories * plan.kept_steps * (2 * values * _DTYPES[plan.dtype].itemsize + 8 + 4 + 8 + 4)
    encoded = sum(value.nbytes for value in base.blank_condition(1).values())
    if any(isinstance(condition, tuple) for condition in plan.conditions):
        encoded *= 2  # a negative prompt takes as much as its prompt
    return states + len(plan.conditions) * encoded


def mean_over_timesteps(
    timesteps: Tensor, values: Tensor, num_train_timesteps: int, num_ranges: int = 20
) -> tuple[Tensor, Tensor]:
    """Mean of values (N,) in equal ranges of timesteps (N,).

    Returns:
        Mean timestep and mean value of every range that is not empty, in ascending order, both float64.
    """
    ranges, present = (timesteps * num_ranges // num_train_timesteps).unique(return_inverse=True)
    counts = torch.bincount(present).double()
    means = [
        torch.zeros(len(ranges), dtype=torch.float64).index_add(0, present, column.double()) / counts
        for column in (timesteps, values)
    ]
    return means[0], means[1]


def noised_data_states(
    store: TrajectoryStore,
    clean_latents: Tensor,
    base: BaseModel,
    seed: int = 0,
    clean_conditions: Tensor | None = None,
) -> Tensor:
    """States of the ordinary diffusion for comparison: clean latents noised to the store's own timesteps.

    Args:
        clean_latents: (N, C, H, W), scaled latents of real images; drawn from with replacement.
        clean_conditions: (N,), the index of each one's condition in the store, which must all be there: then every state is
            made of an image of its own condition.

    Returns:
        (len(store), C, H, W): row i is noised to the timestep of the store's state i, and like it as the denoiser sees it
        (the Euler schedulers' own ``add_noise`` gives it before their input scaling).

    Raises:
        ValueError: if no clean latents are of a condition of the store.
    """
    generator = torch.Generator().manual_seed(seed)
    timesteps = store.column("timestep")
    if clean_conditions is None:
        chosen = torch.randint(len(clean_latents), (len(timesteps),), generator=generator)
    else:
        chosen = torch.empty(len(timesteps), dtype=torch.int64)
        conditions = store.column("condition")
        for condition in conditions.unique().tolist():
            members = (clean_conditions == condition).nonzero().flatten()
            if len(members) == 0:
                raise ValueError(
                    f"got no clean latents of condition {condition} of {store.folder}, expected some of each"
                )
            wanted = conditions == condition
            chosen[wanted] = members[torch.randint(len(members), (int(wanted.sum()),), generator=generator)]
    noise = torch.randn((len(timesteps), *clean_latents.shape[1:]), generator=generator)
    alpha_bar = base.scheduler.alphas_cumprod[timesteps][:, None, None, None]
    return alpha_bar.sqrt() * clean_latents[chosen] + (1 - alpha_bar).sqrt() * noise


@torch.no_grad()
def with_other_states(
    store: TrajectoryStore, base: BaseModel, latents: Tensor, folder: str | Path, batch_size: int = 256
) -> TrajectoryStore:
    """A store like another one but for its states: the teacher is asked again, at the same timesteps, scales and conditions.

    To train on states that no trajectory visits, such as :func:`noised_data_states`, and compare.

    Args:
        latents: (len(store), C, H, W), as the denoiser takes them. folder: replaced if it exists.

    Raises:
        StoreError: if the store is unfinished or of another base model, or a prediction is NaN or infinite.
        ValueError: if there is not one state of latents for each of the store.
    """
    store.check_base(base)
    if not store.complete:
        raise StoreError(f"{store.folder} is unfinished: run collect() on it again, it resumes")
    if len(latents) != len(store):
        raise ValueError(
            f"got {len(latents)} latents, expected one for each of the {len(store)} states of {store.folder}"
        )
    dtype, entries, first = _DTYPES[store.manifest["dtype"]], [], 0
    with writing(Path(folder)) as temporary:
        temporary.mkdir()
        for entry in store.manifest["shards"]:
            indices = torch.arange(first, first + entry["rows"])
            rows = {name: store.column(name)[indices] for name in ("timestep", "guidance_scale", "condition", "signal")}
            rows |= {"latents": latents[indices].to(dtype), "target": torch.empty_like(latents[indices], dtype=dtype)}
            for timestep in rows["timestep"].unique().tolist():
                for part in (rows["timestep"] == timestep).nonzero().flatten().split(batch_size):
                    scales = rows["guidance_scale"][part].to(base.device)
                    teacher = _RecordingCFG(scales, store.manifest["guided_channels"])
                    at = rows["condition"][part]
                    condition = {name: value[at].to(base.device) for name, value in store.conditions.items()}
                    given = latents[indices[part]].to(base.device)
                    rows["target"][part] = teacher.predict(base, given, timestep, condition).to("cpu", dtype)
                    rows["signal"][part] = teacher.signal.cpu()
            _check_finite(rows, range(store.manifest["num_trajectories"]))
            path = temporary / entry["file"]
            write_tensors(path, rows)
            entries.append(entry | {"bytes": path.stat().st_size, "sha256": sha256(path)})
            first += entry["rows"]
        write_tensors(temporary / CONDITIONS, store.conditions)
        _write_manifest(
            temporary,
            {name: value for name, value in store.manifest.items() if name != "manifest_sha256"}
            | {"shards": entries, "conditions_sha256": sha256(temporary / CONDITIONS), STATES_OF: "others"},
        )
    return TrajectoryStore(folder, check=False)
