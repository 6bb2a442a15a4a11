"""Algorithm 2: train adapters on recorded trajectories, as a generator over steps.

    for state in train(base, adapters, store, TrainingSettings(num_steps=1000)):
        ...                                   # watch state.loss; stop when you like

The recorded targets are all that is left of the teacher: a step is one forward and one backward pass at the cost of
the conditional model. With ``accelerate launch`` (``torchrun`` on CPUs, where the former needs MPI to start more than
one process) every process takes its share of each batch.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .attach import AdapterSet
from .base_models import BaseModel, Condition
from .errors import CheckpointError, StoreError
from .guidance import NEGATIVE, Scale
from .influence import influence_of
from .sampling import sample_seed
from .storage import (
    lock_folder,
    read_json,
    read_tensors,
    refuse_link,
    remove,
    sha256,
    write_json,
    write_tensors,
    writing,
)
from .trajectories import TrajectoryStore


@dataclass(frozen=True)
class TrainingSettings:
    """The paper's settings for DiT-XL/2 are the defaults.

    Attributes:
        num_steps: gradient steps.
        batch_size: recorded states per step, over all processes.
        learning_rate: peak, reached after ``warmup`` (a share of the steps) linearly, then cosine annealing to zero.
        weighting: ``"none"`` is the paper's plain squared error of states drawn uniformly; ``"timestep"`` weights each
            state's error by its noise level (see :func:`timestep_weights`); ``"endpoint"`` also by its guidance scale
            (see :func:`scale_weights`), and draws half of the states from every noise level as often as guidance there
            moves the final image (see :class:`InfluenceOrder`).
        optimizer: ``"adam"`` (the paper), or ``"muon"``, an extension: see :func:`optimizers`.
        max_grad_norm: a longer gradient is scaled down to this norm, which lets a higher learning rate be stable; None
            (the paper) leaves it as it is.
        seed: of the order in which states are drawn.

    Raises:
        ValueError: for a number out of its range, an unknown weighting or optimiser; the message says which.
    """

    num_steps: int = 5_000
    batch_size: int = 64
    learning_rate: float = 1e-4
    warmup: float = 0.1
    weighting: str = "none"
    optimizer: str = "adam"
    max_grad_norm: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.batch_size < 1:
            raise ValueError(f"got {self.num_steps} steps of batch {self.batch_size}, expected at least 1 of each")
        if not (0 < self.learning_rate < math.inf) or not 0 <= self.warmup <= 1:
            raise ValueError(
                f"got learning rate {self.learning_rate} and warm-up {self.warmup}, expected a positive rate and a "
                "share of the steps from 0 to 1"
            )
        if self.max_grad_norm is not None and not 0 < self.max_grad_norm < math.inf:
            raise ValueError(
                f"got max_grad_norm {self.max_grad_norm}, expected a positive number, or None to clip nothing"
            )
        if self.weighting not in ("none", "timestep", "endpoint"):
            raise ValueError(f"got weighting {self.weighting!r}, expected 'none' (the paper), 'timestep' or 'endpoint'")
        if self.optimizer not in ("adam", "muon"):
            raise ValueError(f"got optimizer {self.optimizer!r}, expected 'adam' (the paper) or 'muon'")

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of step ``step`` (the first is 0)."""
        warmup_steps = round(self.warmup * self.num_steps)
        if step < warmup_steps:
            return self.learning_rate * (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, self.num_steps - warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class TrainingState:
    """One training step, as the generator yields it.

    Attributes:
        step: steps done, from 1.
        loss: weighted mean squared error of the batch (this process's share).
        learning_rate: that the step used.
        timestep: (B,) of the batch. squared_error: (B,) unweighted, for curves over noise level.
    """

    step: int
    loss: float
    learning_rate: float
    timestep: Tensor
    squared_error: Tensor


class Student(nn.Module):
    """The frozen base with its adapters, as one module whose only trainable parameters are the adapters'.

    The base model may be in bfloat16: the adapters compute in their own float32.

    Args:
        gradient_checkpointing: see :meth:`agd_lib.attach.AdapterSet.set_gradient_checkpointing`.
    """

    def __init__(self, base: BaseModel, adapters: AdapterSet, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.base = base
        self.denoiser = base.denoiser
        self.adapters = adapters.attach(base)
        adapters.set_gradient_checkpointing(gradient_checkpointing)

    def forward(self, latents: Tensor, timestep: Tensor, condition: Condition, guidance_scale: Scale) -> Tensor:
        """The single-pass prediction (B, C, H, W) in float32."""
        with self.adapters.guided_by(guidance_scale, condition.get(NEGATIVE)):
            return self.base.denoise(latents.to(self.base.dtype), timestep, condition).float()


def timestep_weights(store: TrajectoryStore, num_bins: int = 20) -> Tensor:
    """Weights that make every noise level count alike: 1 / E[signal | t], with mean 1 over the store.

    The plain squared error is dominated by low noise, where guidance changes the prediction most in absolute terms. By
    these weights every noise level is asked for the same accuracy relative to its signal, the mean square of what
    guidance adds.

    Returns:
        (num_train_timesteps,) float32, constant over ``num_bins`` equal ranges of timesteps.
    """
    total = int(store.manifest["num_train_timesteps"])
    timesteps, signal = store.column("timestep"), store.column("signal").double()
    bins = timesteps * num_bins // total
    sums = torch.zeros(num_bins, dtype=torch.float64).index_add(0, bins, signal)
    counts = torch.zeros(num_bins, dtype=torch.float64).index_add(0, bins, torch.ones_like(signal))
    mean = torch.where(counts > 0, sums / counts.clamp(min=1), signal.mean())
    weights = 1 / mean.clamp(min=max(1e-3 * float(signal.mean()), 1e-12))
    weights = weights / weights[bins].mean()
    return weights[torch.arange(total) * num_bins // total].float()


def scale_weights(store: TrajectoryStore) -> Tensor:
    """One weight for every recorded state, 1 / (1 + (w - 1)^2), with mean 1 over the store: (len(store),) float32.

    What guidance adds is proportional to w - 1, so a squared error listens to the largest scales: a state at w = 6 has 25
    times the signal of one at w = 2. By these weights scales well above 1 are asked for the same relative accuracy. The
    1 keeps those next to it, where there is hardly anything to learn, from deciding everything.
    """
    weights = 1 / (1 + (store.column("guidance_scale").double() - 1).square())
    return (weights / weights.mean()).float()


def state_weights(store: TrajectoryStore, weighting: str) -> Tensor:
    """The weight of every recorded state's squared error, (len(store),) float32; see :class:`TrainingSettings`."""
    if weighting == "none":
        return torch.ones(len(store))
    by_timestep = timestep_weights(store)[store.column("timestep")]
    return by_timestep * scale_weights(store) if weighting == "endpoint" else by_timestep


@functools.lru_cache(maxsize=2)
def _shuffled(num_states: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(num_states, generator=torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63))


def batch_indices(num_states: int, batch_size: int, step: int, seed: int) -> Tensor:
    """Which recorded states step ``step`` reads: consecutive pieces of one endless sequence of shuffled epochs.

    A function of its arguments alone, so a resumed run reads what an uninterrupted one would have read.

    Returns:
        (batch_size,) int64; a store smaller than a batch is read more than once in it.
    """
    pieces, position, wanted = [], step * batch_size, batch_size
    while wanted > 0:
        epoch, offset = divmod(position, num_states)
        piece = _shuffled(num_states, seed, epoch)[offset : offset + wanted]
        pieces.append(piece)
        position, wanted = position + len(piece), wanted - len(piece)
    return torch.cat(pieces)


class InfluenceOrder:
    """Draws half of the states from ranges of timesteps as often as guidance there moves the endpoint, half from all alike.

    Like :func:`batch_indices`, a function of (step, seed) alone. Within a range all states are equally likely. The
    half that is spread evenly is for what the endpoint's error does not show: details that guidance adds at low noise
    are small in the latents, but class accuracy, precision and the Frechet distance see them.

    Args:
        influence: (number of ranges,), not negative, of equal ranges of timesteps from the cleanest to the noisiest.

    Attributes:
        odds: (number of ranges,), the probability that a state is drawn from each.

    Raises:
        ValueError: if the influence is zero wherever the store has states.
    """

    def __init__(self, store: TrajectoryStore, influence: Tensor) -> None:
        ranges = store.column("timestep") * len(influence) // int(store.manifest["num_train_timesteps"])
        self.members = [(ranges == number).nonzero().flatten() for number in range(len(influence))]
        occupied = torch.tensor([len(members) > 0 for members in self.members])
        by_influence = torch.where(occupied, influence.double(), 0.0)
        if not by_influence.sum() > 0:
            raise ValueError(
                "guidance moves the endpoint nowhere along the store's trajectories (is its guidance range [1, 1]?): "
                "there is nothing to draw by; use weighting 'timestep' or 'none'"
            )
        self.odds = (by_influence / by_influence.sum() + occupied / occupied.sum()) / 2

    def batch_indices(self, batch_size: int, step: int, seed: int) -> Tensor:
        """(batch_size,) int64."""
        generator = torch.Generator().manual_seed(sample_seed(seed, step))
        ranges = torch.multinomial(self.odds, batch_size, replacement=True, generator=generator).tolist()
        places = torch.rand(batch_size, generator=generator, dtype=torch.float64).tolist()
        return torch.stack([self.members[k][int(place * len(self.members[k]))] for k, place in zip(ranges, places)])


def optimizers(adapters: AdapterSet, settings: TrainingSettings) -> list[torch.optim.Optimizer]:
    """The optimisers of the adapters' weights, none with weight decay; every weight belongs to one of them.

    Adam is that of Algorithm 2, without copies of the parameters while it steps (``fused``). Muon
    (https://kellerjordan.github.io/posts/muon) is for matrices: it makes all directions of an update equally long, so that
    those count which the gradient hardly shows. Its steps are scaled to be as long as Adam's, and Adam keeps the vectors.
    """
    matrices = [weight for weight in adapters.parameters() if weight.ndim == 2 and settings.optimizer == "muon"]
    others = [weight for weight in adapters.parameters() if weight.ndim != 2 or settings.optimizer == "adam"]
    found: list[torch.optim.Optimizer] = []
    if others:
        found.append(torch.optim.Adam(others, lr=settings.learning_rate, fused=True))
    if matrices:
        found.append(
            torch.optim.Muon(matrices, settings.learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        )
    return found


def train(
    base: BaseModel,
    adapters: AdapterSet,
    store: TrajectoryStore,
    settings: TrainingSettings | None = None,
    checkpoints: str | Path | None = None,
    checkpoint_every: int = 500,
    accelerator: Accelerator | None = None,
    gradient_checkpointing: bool = False,
) -> Iterator[TrainingState]:
    """Algorithm 2: draw recorded states at random, take a step on the mean squared error to the guided prediction.

    Only the adapters are trained. They are attached to ``base`` and stay attached.

    Args:
        adapters: trained in place.
        store: complete, and collected with this base model.
        checkpoints: folder for checkpoints; with one there, training resumes from it exactly.
        checkpoint_every: steps between checkpoints; one more is written at the end. The newest two are kept.
        accelerator: to train with settings of its own, such as mixed precision.
        gradient_checkpointing: compute each block again in backward instead of keeping what it computed: less memory for
            about a forward pass more a step, and the same gradients. :mod:`agd_lib.memory` predicts both.

    Raises:
        ValueError: if the batch cannot be shared out evenly among the processes, the adapters' strength was restored, or
            ``checkpoint_every`` is below 1; with the weighting ``"endpoint"``, if guidance moves nothing (scale 1), or its
            influence has yet to be measured and the base model is not in float32.
        StoreError: if the store is incomplete, of another base model, or its guidance range or its number of guided
            channels is not the adapters', or it has negative prompts and the adapters do not see them, or the reverse.
        CheckpointError: if a checkpoint is damaged or of other settings, or the loss or a weight becomes NaN or infinite.
        FolderInUseError: if another process keeps its checkpoints in this folder.
        WriteError: if a checkpoint cannot be written.
    """
    settings = settings or TrainingSettings()
    store.check_base(base)
    if not store.complete:
        raise StoreError(f"{store.folder} is unfinished: run collect() on it again, it resumes")
    if tuple(store.manifest["guidance_range"]) != adapters.config.guidance_range:
        raise StoreError(
            f"{store.folder} was collected with guidance range {store.manifest['guidance_range']}, the adapters are "
            f"made for {adapters.config.guidance_range}: create them with guidance_range=that of the store"
        )
    if store.manifest["guided_channels"] != adapters.config.guided_channels:
        raise StoreError(
            f"{store.folder} was collected with {store.manifest['guided_channels']} guided channels, the adapters are made "
            f"for {adapters.config.guided_channels}: create them with guided_channels=that of the store"
        )
    if (NEGATIVE in store.conditions) != (adapters.config.negative_dim is not None):
        sees = "see" if adapters.config.negative_dim is not None else "do not see"
        raise StoreError(
            f"{store.folder} was collected {'with' if NEGATIVE in store.conditions else 'without'} negative prompts, and the "
            f"adapters {sees} them: create them with use_negative to match, or collect with pairs as conditions"
        )
    if adapters.config.strength:
        raise ValueError(
            "got adapters whose strength has been restored (config.strength), expected ones without: train first, then restore"
        )
    accelerator = accelerator or Accelerator(cpu=base.device.type == "cpu")
    if checkpoint_every < 1 or settings.batch_size % accelerator.num_processes:
        raise ValueError(
            f"got batch size {settings.batch_size} for {accelerator.num_processes} processes and a checkpoint every "
            f"{checkpoint_every} steps, expected a multiple of the number of processes, and at least 1"
        )
    influence = None
    if settings.weighting == "endpoint":
        with accelerator.main_process_first():
            influence = influence_of(base, store)
    order = None if influence is None else InfluenceOrder(store, influence)
    precision = [str(base.dtype), accelerator.mixed_precision]
    identity = _identity(settings, store, adapters, influence, precision)
    folder = Path(checkpoints) if checkpoints else None
    student, *parts = accelerator.prepare(
        Student(base, adapters, gradient_checkpointing), *optimizers(adapters, settings)
    )
    weights = state_weights(store, settings.weighting)
    base.denoiser.eval()
    adapters.card = ""  # what it says was measured before
    _lock = lock_folder(folder) if folder and accelerator.is_main_process else None  # held until the generator ends
    start = _resume(folder, adapters, parts, identity) if folder else 0
    if folder and accelerator.is_main_process:
        _prune(folder)  # a run that was killed while it did so leaves an old one, or a part of it
    for step in range(start, settings.num_steps):
        if order is None:
            indices = batch_indices(len(store), settings.batch_size, step, settings.seed)
        else:
            indices = order.batch_indices(settings.batch_size, step, settings.seed)
        share = indices[accelerator.process_index :: accelerator.num_processes]
        batch = store.batch(share).to(base.device)
        prediction = student(batch.latents, batch.timestep, batch.condition, batch.guidance_scale)
        squared_error = (prediction - batch.target).square().flatten(1).mean(dim=1)  # (B,)
        loss = (weights[share].to(base.device) * squared_error).mean()
        if not bool(torch.isfinite(loss)):
            bad = share[~torch.isfinite(squared_error.detach()).cpu()].tolist()
            raise CheckpointError(
                f"the loss at step {step + 1} is {loss.item()} (the store's states {bad[:8]}). {_last_good(folder)}; try a "
                "lower learning rate"
            )
        learning_rate = settings.learning_rate_at(step)
        for group in itertools.chain(*(optimizer.param_groups for optimizer in parts)):
            group["lr"] = learning_rate
        accelerator.backward(loss)
        if settings.max_grad_norm is not None:
            accelerator.clip_grad_norm_(adapters.parameters(), settings.max_grad_norm)
        for optimizer in parts:
            optimizer.step()
            optimizer.zero_grad()  # now, not before the next backward: its forward pass needs the memory
        done = step + 1
        if done % checkpoint_every == 0 or done == settings.num_steps:
            if not all(bool(torch.isfinite(weight).all()) for weight in adapters.parameters()):
                raise CheckpointError(
                    f"after step {done} the adapters hold NaN or infinity, and are not kept. {_last_good(folder)}; try a "
                    "lower learning rate, or max_grad_norm"
                )
            if folder and accelerator.is_main_process:
                _save(folder, done, adapters, parts, identity)
        yield TrainingState(done, loss.item(), learning_rate, batch.timestep, squared_error.detach())


@torch.no_grad()
def state_errors(
    base: BaseModel, adapters: AdapterSet, store: TrajectoryStore, batch_size: int | None = None
) -> Tensor:
    """The mean squared error of the single-pass prediction at every recorded state, (len(store),), on the CPU.

    Untrained adapters give the store's ``signal``: the error of doing nothing. The adapters stay attached.

    Args:
        batch_size: states at once; None: :attr:`~agd_lib.base_models.BaseModel.images_at_once`, at most 256.
    """
    batch_size = batch_size or min(256, base.images_at_once)
    student = Student(base, adapters)
    errors = []
    for indices in torch.arange(len(store)).split(batch_size):
        batch = store.batch(indices).to(base.device)
        prediction = student(batch.latents, batch.timestep, batch.condition, batch.guidance_scale)
        errors.append((prediction - batch.target).square().flatten(1).mean(dim=1).cpu())
    return torch.cat(errors)


class TrainingLog:
    """The losses of a run and whatever was sampled on the way, in one file: a resumed run still has its whole curve.

    Args:
        path: a safetensors file; read if it is there.

    Attributes:
        losses: step -> loss. snapshots: step -> a tensor (final latents, say).

    Raises:
        CheckpointError: if the file is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.losses: dict[int, float] = {}
        self.snapshots: dict[int, Tensor] = {}
        if self.path.is_file():
            tensors = read_tensors(self.path, CheckpointError, "training log")
            steps, losses = (tensors.pop(name, torch.empty(0, 0)) for name in ("step", "loss"))
            if not (steps.ndim == losses.ndim == 1 and len(steps) == len(losses)):
                raise CheckpointError(f"the training log {self.path} has no steps and losses: remove it")
            strange = [name for name in tensors if not re.fullmatch(r"snapshot\.[0-9]{1,9}", name)]
            if strange:
                raise CheckpointError(f"the training log {self.path} holds {strange[0]!r}, which no log has: remove it")
            self.losses = dict(zip(steps.tolist(), losses.tolist()))
            self.snapshots = {int(name.removeprefix("snapshot.")): value for name, value in tensors.items()}

    def save(self) -> None:
        """Write the file, whole or not at all."""
        columns = {
            "step": torch.tensor(list(self.losses), dtype=torch.int64),
            "loss": torch.tensor(list(self.losses.values()), dtype=torch.float64),
        }
        write_tensors(self.path, columns | {f"snapshot.{step}": value for step, value in self.snapshots.items()})


# Checkpoints: step-0000500/{adapters,optimizer}.safetensors and training.json; the newest two are kept ------------------

_FILES = ("adapters.safetensors", "optimizer.safetensors")


def _identity(
    settings: TrainingSettings,
    store: TrajectoryStore,
    adapters: AdapterSet,
    influence: Tensor | None,
    precision: Sequence[str],
) -> dict[str, Any]:
    """What a checkpoint must agree in for a run to go on from it, as JSON would give it back."""
    run = {f"settings.{name}": value for name, value in asdict(settings).items()}
    run |= {
        f"adapters.{name}": value
        for name, value in asdict(adapters.config).items()
        if name not in ("base_name", "base_revision", "library_version", "strength")  # which nothing trained has
    }
    run["influence"] = None if influence is None else influence.tolist()
    run["precision"] = precision
    return json.loads(json.dumps(run | {"store": [shard["sha256"] for shard in store.manifest["shards"]]}))


def _save(folder: Path, step: int, adapters: AdapterSet, parts: Sequence[Any], identity: dict[str, Any]) -> None:
    moments = {
        f"{key}.{name}": torch.as_tensor(value)
        for optimizer in parts
        for name, parameter in adapters.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    with writing(folder / f"step-{step:07d}") as temporary:
        temporary.mkdir()
        write_tensors(temporary / "adapters.safetensors", adapters.state_dict())
        write_tensors(temporary / "optimizer.safetensors", moments)
        checksums = {name: sha256(temporary / name) for name in _FILES}
        write_json(temporary / "training.json", {"step": step, "sha256": checksums, **identity})
    _prune(folder)


def _prune(folder: Path) -> None:
    """Keep the newest two."""
    for old in _all(folder)[:-2]:
        remove(old)


def _all(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"step-\d{7}", path.name))


def _last_good(folder: Path | None) -> str:
    return f"Last good checkpoint: {(_latest(folder) if folder else None) or 'none was kept'}"


def _latest(folder: Path) -> Path | None:
    return (_all(folder) or [None])[-1]  # type: ignore[list-item]


def _resume(folder: Path, adapters: AdapterSet, parts: Sequence[Any], identity: dict[str, Any]) -> int:
    """Load the newest checkpoint into adapters and optimisers; returns the number of steps done (0: none)."""
    latest = _latest(folder)
    if latest is None:
        return 0
    for path in (latest, *(latest / name for name in ("training.json", *_FILES))):
        refuse_link(path, CheckpointError)
    state = read_json(latest / "training.json", CheckpointError, "checkpoint")
    different = [key for key in identity if state.get(key) != identity[key]]
    if different:
        raise CheckpointError(
            f"the checkpoint {latest} is of a run with another {' and '.join(different)}; continue that run with its own "
            "settings, or choose another folder"
        )
    checksums = state["sha256"] if isinstance(state.get("sha256"), dict) else {}
    damaged = [name for name in _FILES if not (latest / name).is_file() or sha256(latest / name) != checksums.get(name)]
    if state.get("step") != int(latest.name.removeprefix("step-")):
        damaged.append("training.json")
    if damaged:
        raise CheckpointError(
            f"{latest / damaged[0]} is damaged (missing, truncated or edited); remove {latest}: training goes on from the "
            "checkpoint before it"
        )
    weights, moments = (read_tensors(latest / name, CheckpointError, "checkpoint") for name in _FILES)
    by_name, own = dict(adapters.named_parameters()), adapters.state_dict()
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    # such as exp_avg and the parameter's name
    entries = {entry: (*entry.partition(".")[::2], value) for entry, value in moments.items()}
    strange = [entry for entry, (_, name, value) in entries.items() if not _is_moment(value, by_name.get(name))]
    owners = {weight: part for part in parts for group in part.param_groups for weight in group["params"]}
    needed = {f"{key}.{name}" for name, parameter in by_name.items() for key in _moments(owners[parameter])}
    strange = sorted({*strange, *(needed ^ entries.keys())})
    if shapes != {name: tensor.shape for name, tensor in own.items()} or strange:
        what = f"moments ({strange[0]})" if strange else "weights"
        raise CheckpointError(
            f"{latest} holds {what} of other adapters: remove it; training goes on from the one before it"
        )
    adapters.load_state_dict(weights)
    for key, name, value in entries.values():
        parameter = by_name[name]
        owners[parameter].state[parameter][key] = value.clone().to(parameter.device)
    return int(state["step"])


def _is_moment(value: Tensor, parameter: Tensor | None) -> bool:
    """Whether an optimiser can keep this of a parameter: a number, or one for each weight, in float32."""
    return parameter is not None and value.shape in ((), parameter.shape) and value.dtype == torch.float32


def _moments(optimizer: Any) -> set[str]:
    """What :func:`optimizers`' keep of every parameter."""
    is_adam = isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.Adam)  # within what accelerate returns
    return {"step", "exp_avg", "exp_avg_sq"} if is_adam else {"momentum_buffer"}
