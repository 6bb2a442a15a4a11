"""Other ways to guide in one forward pass, trained on the same trajectories for as many operations, and measured beside AGD.

    python -m agd_lib.rivals tiny-dit --run runs/rivals/tiny-dit

Each stands in for an :class:`~agd_lib.attach.AdapterSet` in training and in sampling. They are here to be compared with, not
to be used: what each costs a base model is part of the comparison. Every student's learning rate is the best of three, by
the error on held-out states after a quarter of the steps. Results go to ``data/results/<base>-rivals.json``.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .adapters import ScalarEncoding
from .attach import AdapterConfig, AdapterSet
from .base_models import BaseModel, Condition, StableDiffusionBase, load_base
from .errors import AdapterError, AGDError
from .evaluation import endpoint_mse_ratio
from .guidance import AGD, CFG, Scale, Unguided, scale_at
from .influence import influence_of
from .memory import LiveStorages, training_step
from .project import DATA
from .recipes import HELD_OUT_PROMPTS, SETTINGS, STEPS
from .results import Row, cell, row_from_dict, summarise
from .sampling import generate
from .storage import key_of, lock_folder, read_json, read_tensors, write_json, write_tensors
from .study import (
    PLANS,
    SEEDS,
    Unit,
    in_parallel,
    measure,
    measure_unit,
    measuring_conditions,
    provenance,
    rows_of,
    train_compiled,
    training_conditions,
)
from .training import Student, TrainingSettings, state_errors, state_weights
from .trajectories import CollectionPlan, TrajectoryStore, collect

# The students ----------------------------------------------------------------------------------------------------------


class Rival(nn.Module):
    """What training and sampling ask of adapters, for other ways of telling a model the guidance scale.

    It belongs to the base model that it is made for, and is on it from :meth:`attach` on for good.

    Attributes:
        config: as of adapters, for the guidance range and the name (``kind``). weights: everything that is trained.
    """

    name = ""

    def __init__(self, base: BaseModel, guidance_range: tuple[float, float], size: int = 0, seed: int = 0) -> None:
        super().__init__()
        like = AdapterSet.create(base, "offset", 1, guidance_range).config
        self.config: AdapterConfig = replace(like, kind=self.name)
        self.size, self.seed = size, seed
        self.weights = nn.ParameterList()
        self._base: BaseModel | None = None
        self._scale: Scale | None = None
        self._scales: Tensor | None = None  # (B,), of the forward pass that is under way

    def attach(self, base: BaseModel) -> Rival:
        """Put it on the base model; returns self."""
        if self._base is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                self.weights.extend(self._put_on(base))
            self._base = base
            base.denoiser.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True)
        self.check_attached(base)
        return self

    def _put_on(self, base: BaseModel) -> list[nn.Parameter]:
        """Change the model so that it can be told a scale, with no effect yet; returns what is to be trained."""
        raise NotImplementedError

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self._base is not None
        timestep, _ = self._base.read_call(args, kwargs)
        like = torch.empty(0, device=timestep.device)
        self._scales = None if self._scale is None else scale_at(self._scale, 0, len(timestep), like)

    def check_attached(self, base: BaseModel) -> None:
        """Raises :class:`AdapterError` if this is not on that very base model."""
        if self._base is None or self._base.denoiser is not base.denoiser:
            raise AdapterError(f"this {self.name} student is not on this copy of {base.name}: call attach(base) first")

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Only off is offered."""
        if enabled:
            raise AdapterError(f"{self.name} students are trained without gradient checkpointing only")

    @contextmanager
    def guided_by(self, scale: Scale, negative: Tensor | None = None) -> Iterator[Rival]:
        """Inside the block every forward pass of the base model is guided at this scale, a number or one for each sample."""
        if negative is not None:
            raise AdapterError(f"{self.name} students do not see negative prompts: leave them out")
        before, self._scale = self._scale, scale
        try:
            yield self
        finally:
            self._scale = before

    def num_parameters(self) -> int:
        """Trained parameters."""
        return sum(weight.numel() for weight in self.weights)


class FineTuned(Rival):
    """All weights of the model, told the scale by an embedding: stage one of Meng et al. (arXiv 2210.03142).

    The scale's random Fourier features go through a two-layer network, and the result is added to the embedding of the
    timestep. The base model is no more when this has been trained. (Of a DiT every block's own copy of the embedding is
    trained, so the parameters are more than the base model's, which counts the copies once.)
    """

    name = "fine-tuned"

    def _put_on(self, base: BaseModel) -> list[nn.Parameter]:
        sites = base.attention_sites().values()
        embedders = [site.embedding for site in sites if site.embedding is not None]
        width = next(iter(sites)).channels
        if not embedders:
            embedders, width = [base.denoiser.time_embedding], base.denoiser.time_embedding.linear_2.out_features
        encoding, projection = ScalarEncoding(64, inner_norm=False), nn.Linear(64, width)
        nn.init.zeros_(projection.weight)
        nn.init.zeros_(projection.bias)

        def told(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return output if self._scales is None else output + projection(encoding(self._scales)).to(output.dtype)

        for embedder in embedders:
            embedder.register_forward_hook(told)
        base.denoiser.requires_grad_(True)
        return [*base.denoiser.parameters(), *encoding.parameters(), *projection.parameters()]


class ScaledLoRA(Rival):
    """peft's LoRA on the linear layers of attention and feed-forward, each layer's update times w - 1.

    Args:
        size: rank of the updates.
    """

    name = "lora"
    LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def _put_on(self, base: BaseModel) -> list[nn.Parameter]:
        from peft import LoraConfig, inject_adapter_in_model

        def times_beyond_one(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if self._scales is None:
                return output * 0
            return output * (self._scales - 1).to(output.dtype).view(-1, *[1] * (output.ndim - 1))

        config = LoraConfig(r=self.size, lora_alpha=self.size, target_modules=list(self.LAYERS))
        inject_adapter_in_model(config, base.denoiser)
        found = []
        for name, module in base.denoiser.named_modules():
            if name.endswith(("lora_A.default", "lora_B.default")):
                found += list(module.parameters())
            if name.endswith("lora_B.default"):
                module.register_forward_hook(times_beyond_one)
        return found


class Sharpener(Rival):
    """A network on the prompt's embeddings alone, after DICE (Zhou et al., arXiv 2502.03726); the model is as it was.

    Every token c becomes ``c + (w - 1) W gelu(V [c, mean of all tokens] + b)``. (That could be computed once for a prompt;
    here it is computed at every step.)

    Args:
        size: hidden width of the network.

    Raises:
        AdapterError: if the base model is told its condition by something else than prompts.
    """

    name = "sharpener"

    def _put_on(self, base: BaseModel) -> list[nn.Parameter]:
        width = self.config.prompt_dim
        if width is None:
            raise AdapterError(f"got {base.name}, expected a text-to-image model: it sharpens a prompt's embeddings")
        first, last = nn.Linear(2 * width, self.size), nn.Linear(self.size, width, bias=False)
        nn.init.zeros_(last.weight)

        def sharpen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._scales is None:
                return None
            tokens = kwargs["encoder_hidden_states"]
            seen = torch.cat([tokens, tokens.mean(dim=1, keepdim=True).expand_as(tokens)], dim=-1)
            change = last(F.gelu(first(seen.float()))) * (self._scales - 1)[:, None, None]
            return args, kwargs | {"encoder_hidden_states": tokens + change.to(tokens.dtype)}

        base.denoiser.register_forward_pre_hook(sharpen, with_kwargs=True)
        return [*first.parameters(), *last.parameters()]


# The comparison --------------------------------------------------------------------------------------------------------

RIVALS: dict[str, type[Rival]] = {kind.name: kind for kind in (ScaledLoRA, FineTuned, Sharpener)}
SHARE = 0.05


@dataclass(frozen=True)
class Entrant:
    """One student in the comparison.

    Attributes:
        name: ``"modulated"`` (AGD's), or a name in :data:`RIVALS`. size: rank or width; 0 for fine-tuning.
        operations: floating-point operations of one gradient step, per sample; see :func:`operations_per_step`.
    """

    name: str
    size: int
    operations: int

    def make(self, base: BaseModel, seed: int) -> AdapterSet:
        """The student, untrained. (A :class:`Rival` stands in for adapters wherever this module uses them.)"""
        bounds = PLANS[base.name].guidance_range
        if self.name in RIVALS:
            return cast(AdapterSet, RIVALS[self.name](base, bounds, self.size, seed))
        ranges = PLANS[base.name].recipes[self.name].noise_ranges
        return AdapterSet.create(base, self.name, self.size, bounds, noise_ranges=ranges, seed=seed)


def entrants(base_name: str) -> list[Entrant]:
    """Who takes part: AGD's adapters first. Those with a size have the largest of at most 5 % of the parameters."""
    base = load_base(base_name)
    found = [Entrant("modulated", PLANS[base_name].recipes["modulated"].hidden_size, 0), Entrant("fine-tuned", 0, 0)]
    sized = ["lora", "sharpener"] if isinstance(base, StableDiffusionBase) else ["lora"]
    found += [Entrant(name, _largest(name, base_name), 0) for name in sized]
    counted = []
    for entrant in found:
        base = load_base(base_name)
        counted.append(replace(entrant, operations=operations_per_step(base, entrant.make(base, 0))))
    return counted


def _largest(name: str, base_name: str) -> int:
    """The largest size of a rival of which the trained parameters are at most :data:`SHARE` of the base model's.

    Raises:
        AGDError: if even the smallest has more.
    """

    def parameters(size: int) -> int:
        base = load_base(base_name)
        return Entrant(name, size, 0).make(base, 0).attach(base).num_parameters()

    one, two = parameters(1), parameters(2)  # they grow linearly
    size = 1 + math.floor((SHARE * load_base(base_name).num_parameters() - one) / (two - one))
    if size < 1:
        raise AGDError(f"{base_name} is too small: {name} of size 1 has more than {SHARE:.0%} of its parameters")
    return size


def operations_per_step(base: BaseModel, student: AdapterSet, batch_size: int = 8) -> int:
    """Of one gradient step, forward and backward, per sample; counted by torch. The optimiser's own are not in it."""
    module = Student(base, student)
    latents = torch.randn(batch_size, *base.latent_shape, device=base.device)
    timestep = torch.full((batch_size,), base.num_train_timesteps // 2, device=base.device)
    condition: Condition = base.blank_condition(batch_size)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # fused attention is not counted
        scales = torch.full((batch_size,), 2.0, device=base.device)
        module(latents, timestep, condition, scales).square().mean().backward()
    for weight in student.parameters():
        weight.grad = None
    return int(counter.get_total_flops()) // batch_size


def peak_of_a_step(base: BaseModel, student: AdapterSet, batch_size: int) -> int:
    """The most bytes that a gradient step in float32 has alive: weights, Adam's moments, gradients, activations.

    The step is taken, on zeros: the student is another one then.
    """
    with LiveStorages() as tracker:
        training_step(Student(base, student), batch_size, tracker)
    sizes, _ = tracker.peak()
    return sum(sizes.values())


def equal_steps(competitors: Sequence[Entrant], steps: int) -> dict[str, int]:
    """Gradient steps of each that cost as many operations as ``steps`` of the first."""
    total = steps * competitors[0].operations
    return {entrant.name: math.floor(total / entrant.operations) for entrant in competitors}


def rates(name: str) -> tuple[TrainingSettings, ...]:
    """The settings that are tried for a student: three learning rates."""
    if name == "fine-tuned":  # Muon is for small updates from zero; whole models are fine-tuned with Adam
        return tuple(replace(SETTINGS, optimizer="adam", learning_rate=rate) for rate in (1.25e-4, 2.5e-4, 5e-4))
    return tuple(replace(SETTINGS, learning_rate=rate) for rate in (2.5e-3, 5e-3, 1e-2))


def train_entrant(base_name: str, run: Path, entrant: Entrant, settings: TrainingSettings) -> Path:
    """Train a student, unless that is done; returns the folder of its weights and of what is to be said of them."""
    torch.set_num_threads(1)
    base = load_base(base_name)
    store, held_out = (TrajectoryStore(run / name, check=False) for name in ("trajectories", "held-out"))
    inputs = [
        base.fingerprint(),
        asdict(entrant),
        asdict(settings),
        *(each.manifest["shards"] for each in (store, held_out)),
        influence_of(base, store).tolist(),
    ]
    folder = run / "students" / key_of(inputs)
    note = folder.with_suffix(".json")
    if note.is_file():
        return folder
    student = entrant.make(base, settings.seed)
    start = time.perf_counter()
    train_compiled(base, student, store, settings, label=f"{entrant.name} {settings.seed}")
    seconds = time.perf_counter() - start
    write_tensors(folder / "weights.safetensors", student.state_dict())
    base = load_base(base_name)
    student = load_entrant(folder, base, entrant, settings.seed)
    weights = state_weights(held_out, settings.weighting).double()
    error = float((weights * state_errors(base, student, held_out)).sum())
    left = error / float((weights * held_out.column("signal")).sum())
    write_json(note, {"held_out": left, "train_seconds": seconds})
    return folder


def load_entrant(folder: Path, base: BaseModel, entrant: Entrant, seed: int) -> AdapterSet:
    """A trained student on a base model of its own."""
    student = entrant.make(base, seed).attach(base)
    student.load_state_dict(read_tensors(folder / "weights.safetensors", AGDError, "student"))
    return student


@dataclass(frozen=True)
class Outcome:
    """One student, trained and measured.

    Attributes:
        row: its ``adapter`` is the student's name, its ``adapter_parameters`` are what was trained.
        settings: of the training. operations: floating-point operations of all of it. train_seconds: with compiling.
        peak_bytes: see :func:`peak_of_a_step`, at the training's batch size.
        base_moved: how far the model's unguided images have moved when the student is told no scale, as a share of how
            far guidance moves them; 0: the base model is still there, to the bit.
    """

    row: Row
    settings: TrainingSettings
    operations: int
    train_seconds: float
    peak_bytes: int
    base_moved: float


def compare(
    base_name: str, run: Path, entrant: Entrant, settings: TrainingSettings, scale: float, seed: int, n: int
) -> Outcome:
    """Train a student from one seed, and sample and measure it; what was done before is read."""
    settings = replace(settings, seed=seed)
    folder = train_entrant(base_name, run, entrant, settings)
    note = read_json(folder.with_suffix(".json"), AGDError, "note")
    base, how = load_base(base_name), (n, seed, STEPS)
    base_parameters = base.num_parameters()
    unguided = measure(base, Unguided(), *how, run / "rows")
    cfg = measure(base, CFG(scale), *how, run / "rows")
    student = load_entrant(folder, base, entrant, seed)
    row = measure(base, AGD(student, scale), *how, folder, unguided, cfg).row
    asked = (list(measuring_conditions(base, n, seed)) * n)[:n]
    # in batches as large as those that were measured: on some models others differ in the last bit
    told_nothing = torch.cat(list(generate(base, asked, Unguided(), STEPS, seed, batch_size=250))).float().cpu()
    moved = endpoint_mse_ratio(
        told_nothing, cfg.latents, unguided.latents
    )  # MSE(nothing, unguided) / MSE(CFG, unguided)
    operations = entrant.operations * settings.batch_size * settings.num_steps
    row = replace(row, base_parameters=base_parameters, adapter_parameters=student.num_parameters())
    peak = peak_of_a_step(base, student, settings.batch_size)
    return Outcome(row, settings, operations, note["train_seconds"], peak, moved)


def read_comparison(path: Path) -> tuple[list[Outcome], list[Row]]:
    """``(outcomes, rows of unguided sampling and CFG)`` in a file that this module wrote.

    Raises:
        AGDError: if it is missing or malformed.
    """
    names, found = {field.name for field in fields(Outcome)}, []
    for number, value in enumerate(rows_of(path)):
        if value.keys() != names:
            raise AGDError(f"{path}, row {number} is not the outcome of a comparison: measure it again")
        try:
            settings = TrainingSettings(**value["settings"])
        except (TypeError, ValueError) as error:
            raise AGDError(f"{path}, row {number}: its settings are malformed: {error}") from error
        row = row_from_dict(value["row"], f"{path}, row {number}")
        found.append(Outcome(**(value | {"row": row, "settings": settings})))
    return found, [row_from_dict(row, f"{path}, row {number}") for number, row in enumerate(rows_of(path, "others"))]


def comparison_table(outcomes: Sequence[Outcome], others: Sequence[Row]) -> str:
    """A Markdown table, mean ± standard deviation over seeds: unguided sampling and CFG first, then every student."""
    lines = [
        "| way | trained parameters | MiB of a training step | w | NFE | endpoint error | FD | accuracy | base model moved |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for summary in summarise([*others, *(found.row for found in outcomes)]):
        name = summary.method.removeprefix("agd ")
        mine = [found for found in outcomes if found.row.adapter == name]
        moved = [
            found.base_moved for found in outcomes if (found.row.adapter, found.row.scale) == (name, summary.scale)
        ]
        cells = [
            f"{name} (AGD)" if name == "modulated" else name,
            f"{mine[0].row.adapter_parameters:,}" if mine else "-",
            f"{mine[0].peak_bytes / 2**20:,.0f}" if mine else "-",
            f"{summary.scale:g}",
            f"{summary.nfe:g}",
            *(
                cell(summary.mean[measure], summary.deviation[measure], 3)
                for measure in ("endpoint_mse_ratio", "fd", "condition_accuracy")
            ),
            cell(fmean(moved), stdev(moved) if len(moved) > 1 else None, 3) if any(moved) else "0" if moved else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", choices=list(PLANS))
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=None, help="by default data/results/<base>-rivals.json")
    parser.add_argument("--steps", type=int, default=1_000, help="gradient steps of AGD's adapters; others: as costly")
    parser.add_argument("--trajectories", type=int, default=4_000)
    parser.add_argument("--scales", nargs="+", type=float, default=[2.0, 3.0, 4.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--n", type=int, default=1_000, help="images for each measurement")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    arguments = parser.parse_args()
    start, name, run, seeds = time.perf_counter(), arguments.base, arguments.run, arguments.seeds
    base, parallel = load_base(name), functools.partial(in_parallel, arguments.workers)
    bounds, count = PLANS[name].guidance_range, arguments.trajectories
    plan = CollectionPlan(training_conditions(base, count), count, bounds, STEPS, trajectories_per_shard=1_000)
    held_out = CollectionPlan(training_conditions(base, 400, HELD_OUT_PROMPTS), 400, bounds, STEPS, seed=1)
    with lock_folder(run):
        influence_of(base, collect(base, plan, run / "trajectories"))
        collect(base, held_out, run / "held-out")
        at, how = list(itertools.product(arguments.scales, seeds)), (arguments.n, STEPS)
        others = parallel("unguided", measure_unit, [(name, run, Unit("unguided", 1.0, seed), *how) for seed in seeds])
        others += parallel("CFG", measure_unit, [(name, run, Unit("cfg", *each), *how) for each in at])
        competitors = entrants(name)
        steps = equal_steps(competitors, arguments.steps)
        tried = [
            (name, run, entrant, replace(settings, num_steps=max(1, steps[entrant.name] // 4)))
            for entrant in competitors
            for settings in rates(entrant.name)
        ]
        folders = parallel("learning rates", train_entrant, tried)
        errors = [read_json(folder.with_suffix(".json"), AGDError, "note")["held_out"] for folder in folders]
        best: dict[str, tuple[float, TrainingSettings]] = {}
        for (_, _, entrant, settings), error in zip(tried, errors):
            settings = replace(settings, num_steps=steps[entrant.name])
            best[entrant.name] = min(best.get(entrant.name, (error, settings)), (error, settings), key=lambda e: e[0])
        chosen = [(name, run, entrant, best[entrant.name][1]) for entrant in competitors]
        parallel(
            "train",
            train_entrant,
            [(*who, replace(settings, seed=seed)) for *who, settings in chosen for seed in seeds],
        )
        units = [(*who, *each, arguments.n) for who in chosen for each in at]
        outcomes: list[Outcome] = parallel("students", compare, units)
    path = arguments.results or DATA / "results" / f"{name}-rivals.json"
    command = "python -m agd_lib.rivals " + shlex.join(sys.argv[1:])
    values = {"others": [asdict(row) for row in others], "rows": [asdict(outcome) for outcome in outcomes]}
    write_json(path, provenance(command, time.perf_counter() - start) | values)
    print(comparison_table(outcomes, others))


if __name__ == "__main__":
    main()
