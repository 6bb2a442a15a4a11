"""Other ways to guide in one forward pass, trained on the same trajectories for as many operations, and measured beside AGD.

    python -m agd_lib.rivals tiny-dit --run runs/rivals/tiny-dit

Each stands in for an :class:`~agd_lib.attach.AdapterSet` in training and in sampling. They are here to be compared with, not
to be used: what each costs a base model is part of the comparison. Results go to ``data/results/<base>-rivals.json``.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from .adapters import ScalarEncoding
from .attach import AdapterConfig, AdapterSet
from .base_models import BaseModel, StableDiffusionBase, load_base
from .errors import AdapterError, AGDError
from .evaluation import default_extractor, endpoint_mse_ratio, evaluate, load_reference
from .guidance import AGD, CFG, Guidance, Scale, Unguided, scale_at
from .influence import influence_of
from .project import DATA
from .results import Row, best_scale, row_from_dict
from .sampling import generate
from .storage import read_json, write_json
from .study import PLANS, SEEDS, measuring_conditions, provenance, read_study, train_compiled, training_conditions
from .training import Student, TrainingSettings
from .trajectories import CollectionPlan, TrajectoryStore, collect


class Rival(nn.Module):
    """What training and sampling ask of adapters, for other ways of telling a model the guidance scale.

    It belongs to the base model that it is made for, and is on it from :meth:`attach` on for good.

    Attributes:
        config: as of adapters, for the guidance range and the name (``kind``).
        weights: everything that is trained.
    """

    name = ""

    def __init__(self, base: BaseModel, guidance_range: tuple[float, float], seed: int = 0) -> None:
        super().__init__()
        like = AdapterSet.create(base, "offset", 1, guidance_range).config
        self.config: AdapterConfig = replace(like, kind=self.name)
        self.seed = seed
        self.weights = nn.ParameterList()
        self._base: BaseModel | None = None
        self._scale: Scale | None = None

    def attach(self, base: BaseModel) -> Rival:
        """Put it on the base model; returns self."""
        if self._base is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                self.weights.extend(self._put_on(base))
            self._base = base
        self.check_attached(base)
        return self

    def _put_on(self, base: BaseModel) -> list[nn.Parameter]:
        """Change the model so that it can be told a scale, with no effect yet; returns what is to be trained."""
        raise NotImplementedError

    def check_attached(self, base: BaseModel) -> None:
        """Raises :class:`AdapterError` if this is not on that very base model."""
        if self._base is None or self._base.denoiser is not base.denoiser:
            raise AdapterError(f"this {self.name} student is not on this copy of {base.name}: call attach(base) first")

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Only off is offered."""
        if enabled:
            raise AdapterError(f"{self.name} students are trained without gradient checkpointing only")

    @contextmanager
    def guided_by(self, scale: Scale) -> Iterator[Rival]:
        """Inside the block every forward pass of the base model is guided at this scale."""
        before, self._scale = self._scale, scale
        try:
            yield self
        finally:
            self._scale = before

    def _scales(self, like: Tensor) -> Tensor | None:
        """The scale of every sample of a batch that ``like`` has as its first dimension; None outside :meth:`guided_by`."""
        return None if self._scale is None else scale_at(self._scale, 0, len(like), like)

    def num_parameters(self) -> int:
        """Trained parameters."""
        return sum(weight.numel() for weight in self.weights)


class FineTuned(Rival):
    """All weights of the model, told the scale by an embedding: stage one of Meng et al. (arXiv 2210.03142).

    The scale's random Fourier features go through a two-layer network, and the result is added to the embedding of the
    timestep. The base model is no more when this has been trained.
    """

    name = "fine-tuned"

    def _put_on(self, base: BaseModel) -> list[nn.Parameter]:
        sites = [site.embedding for site in base.attention_sites().values() if site.embedding is not None]
        embedders = sites or [base.denoiser.time_embedding]
        width = next(iter(base.attention_sites().values())).channels
        if not sites:
            width = base.denoiser.time_embedding.linear_2.out_features
        encoding = ScalarEncoding(64, inner_norm=False)
        projection = nn.Linear(64, width)
        nn.init.zeros_(projection.weight)
        nn.init.zeros_(projection.bias)

        def told(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            scale = self._scales(output)
            return output if scale is None else output + projection(encoding(scale)).to(output.dtype)

        for embedder in embedders:
            embedder.register_forward_hook(told)
        base.denoiser.requires_grad_(True)
        return [*base.denoiser.parameters(), *encoding.parameters(), *projection.parameters()]


class ScaledLoRA(Rival):
    """peft's LoRA on the linear layers of every transformer block, each layer's update times w - 1.

    Args:
        rank: of the updates.
    """

    name = "lora"
    LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def __init__(self, base: BaseModel, guidance_range: tuple[float, float], seed: int = 0, rank: int = 8) -> None:
        super().__init__(base, guidance_range, seed)
        self.rank = rank

    def _put_on(self, base: BaseModel) -> list[nn.Parameter]:
        from peft import LoraConfig, inject_adapter_in_model

        def times_beyond_one(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            scale = self._scales(output)
            if scale is None:
                return output * 0
            return output * (scale - 1).to(output.dtype).view(-1, *[1] * (output.ndim - 1))

        config = LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=list(self.LAYERS))
        inject_adapter_in_model(config, base.denoiser)
        found = []
        for name, module in base.denoiser.named_modules():
            if name.endswith(("lora_A.default", "lora_B.default")):
                found += list(module.parameters())
            if name.endswith("lora_B.default"):
                module.register_forward_hook(times_beyond_one)
        return found


class Sharpener(Rival):
    """A network on the prompt's embeddings alone, once for a prompt, after DICE (Zhou et al., arXiv 2502.03726).

    Every token c becomes ``c + (w - 1) W gelu(V [c, mean of all tokens] + b)``; the model is as it was.

    Args:
        hidden_size: of the network.

    Raises:
        AdapterError: if the base model is told its condition by something else than prompts.
    """

    name = "sharpener"

    def __init__(
        self, base: BaseModel, guidance_range: tuple[float, float], seed: int = 0, hidden_size: int = 64
    ) -> None:
        super().__init__(base, guidance_range, seed)
        if self.config.prompt_dim is None:
            raise AdapterError(f"got {base.name}, expected a text-to-image model: it sharpens a prompt's embeddings")
        self.hidden_size = hidden_size

    def _put_on(self, base: BaseModel) -> list[nn.Parameter]:
        width = self.config.prompt_dim
        assert width is not None
        first, last = nn.Linear(2 * width, self.hidden_size), nn.Linear(self.hidden_size, width, bias=False)
        nn.init.zeros_(last.weight)

        def sharpen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            tokens = kwargs["encoder_hidden_states"]
            scale = self._scales(tokens)
            if scale is None:
                return None
            seen = torch.cat([tokens, tokens.mean(dim=1, keepdim=True).expand_as(tokens)], dim=-1)
            change = last(F.gelu(first(seen.float()))) * (scale - 1)[:, None, None]
            return args, kwargs | {"encoder_hidden_states": tokens + change.to(tokens.dtype)}

        base.denoiser.register_forward_pre_hook(sharpen, with_kwargs=True)
        return [*first.parameters(), *last.parameters()]


@dataclass(frozen=True)
class Entrant:
    """One student in the comparison.

    Attributes:
        make: from (base, guidance range, seed) to the student, untrained.
        settings: of its training, with the number of steps that :func:`equal_steps` is measured by.
    """

    make: Callable[[BaseModel, tuple[float, float], int], Rival | AdapterSet]
    settings: TrainingSettings


def _largest(make: Callable[[int], Rival], base_name: str, share: float = 0.05) -> int:
    """The largest size of which the trained parameters are not above that share of the base model's."""
    size, allowed = 0, share * load_base(base_name).num_parameters()
    for half in (2**power for power in range(11, -1, -1)):
        if make(size + half).attach(load_base(base_name)).num_parameters() <= allowed:
            size += half
    return size


def entrants(base_name: str, steps: int) -> dict[str, Entrant]:
    """Who takes part, by name: AGD's adapters first. Those with a size have the largest within 5 % of the parameters."""
    base, plan = load_base(base_name), PLANS[base_name]
    recipe, bounds = plan.recipes["modulated"], plan.guidance_range
    muon = replace(recipe.settings, num_steps=steps, batch_size=64, learning_rate=5e-3)

    def modulated(base: BaseModel, guidance_range: tuple[float, float], seed: int) -> AdapterSet:
        ranges = recipe.noise_ranges
        return AdapterSet.create(base, "modulated", recipe.hidden_size, guidance_range, noise_ranges=ranges, seed=seed)

    rank = _largest(lambda size: ScaledLoRA(load_base(base_name), bounds, rank=size), base_name)
    found = {
        "modulated": Entrant(modulated, muon),
        "lora": Entrant(lambda base, bounds, seed: ScaledLoRA(base, bounds, seed, rank), muon),
        "fine-tuned": Entrant(FineTuned, replace(muon, optimizer="adam", learning_rate=5e-4)),
    }
    if isinstance(base, StableDiffusionBase):
        hidden = _largest(lambda size: Sharpener(load_base(base_name), bounds, hidden_size=size), base_name)
        found["sharpener"] = Entrant(lambda base, bounds, seed: Sharpener(base, bounds, seed, hidden), muon)
    return found


def operations_per_step(base: BaseModel, student: Rival | AdapterSet, batch_size: int = 8) -> int:
    """Floating-point operations of one gradient step, forward and backward, per sample; counted by torch."""
    module = Student(base, cast(AdapterSet, student))
    latents = torch.randn(batch_size, *base.latent_shape, device=base.device)
    timestep = torch.full((batch_size,), base.num_train_timesteps // 2, device=base.device)
    with FlopCounterMode(display=False) as counter:
        scales = torch.full((batch_size,), 2.0, device=base.device)
        module(latents, timestep, base.blank_condition(batch_size), scales).square().mean().backward()
    for weight in student.parameters():
        weight.grad = None
    return int(counter.get_total_flops()) // batch_size


def equal_steps(base_name: str, entrants: dict[str, Entrant]) -> dict[str, tuple[int, int]]:
    """``(steps, operations per sample and step)`` of each, so that all trainings cost as many operations as the first's."""
    costs = {}
    for name, entrant in entrants.items():
        base = load_base(base_name)
        costs[name] = operations_per_step(base, entrant.make(base, PLANS[base_name].guidance_range, 0))
    first = next(iter(entrants))
    total = entrants[first].settings.num_steps * costs[first]
    return {name: (math.floor(total / cost), cost) for name, cost in costs.items()}


@dataclass(frozen=True)
class Outcome:
    """One student, trained and measured.

    Attributes:
        row: its ``adapter`` is the student's name, its ``adapter_parameters`` are what was trained.
        steps, operations: of the training: gradient steps, and floating-point operations in all.
        train_seconds: with compiling. base_moved: how far the model's unguided images have moved when the student is
            told no scale, as a share of how far guidance moves them; 0: the base model is still there, to the bit.
    """

    row: Row
    steps: int
    operations: int
    train_seconds: float
    base_moved: float


def compare(
    base_name: str, run: Path, name: str, steps: int, operations: int, seed: int, scale: float, n: int
) -> Outcome:
    """Train one entrant from one seed and measure it; what was done before is read.

    Args:
        steps, operations: see :func:`equal_steps`.
    """
    file = run / "outcomes" / f"{name}-{steps}-seed{seed}-{scale:g}-{n}.json"
    if file.is_file():
        return _outcome(read_json(file, AGDError, "outcome"), str(file))
    torch.set_num_threads(1)
    base, plan = load_base(base_name), PLANS[base_name]
    base_parameters = base.num_parameters()
    extractor, reference_path = default_extractor(base, DATA)
    assert reference_path is not None
    reference, conditions = load_reference(reference_path, extractor), measuring_conditions(base, n, seed)

    def measured(guidance: Guidance, keep: Path | None, compared: tuple[Tensor, Tensor] | None) -> tuple[Row, Tensor]:
        found = evaluate(
            base,
            guidance,
            reference,
            extractor,
            n,
            seed,
            unguided_latents=compared[0] if compared else None,
            cfg_latents=compared[1] if compared else None,
            progress=False,
            keep=keep,
            conditions=conditions,
        )
        return found.row, found.latents

    _, unguided = measured(Unguided(), run / "rows", None)
    _, guided = measured(CFG(scale), run / "rows", None)
    entrant = entrants(base_name, 1)[name]
    student = entrant.make(base, plan.guidance_range, seed)
    settings = replace(entrant.settings, num_steps=steps, seed=seed)
    store = TrajectoryStore(run / "trajectories", check=False)
    start = time.perf_counter()
    train_compiled(base, cast(AdapterSet, student), store, settings, label=f"{name} {seed}")
    seconds = time.perf_counter() - start
    with torch.compiler.set_stance("force_eager"):  # batches of another size
        guidance = AGD(cast(AdapterSet, student), scale)
        row = replace(measured(guidance, None, (unguided, guided))[0], base_parameters=base_parameters)
        asked = (conditions * n)[: len(unguided)]
        told_nothing = torch.cat(list(generate(base, asked, Unguided(), row.steps, seed))).float().cpu()
    # What is left of the base model: MSE(told nothing, unguided) / MSE(CFG, unguided).
    base_moved = endpoint_mse_ratio(told_nothing, guided, unguided)
    outcome = Outcome(row, steps, operations * settings.batch_size * steps, seconds, base_moved)
    write_json(file, asdict(outcome))
    return outcome


def read_comparison(path: Path) -> list[Outcome]:
    """The outcomes in a file that this module wrote.

    Raises:
        AGDError: if it is missing or malformed.
    """
    rows = read_json(path, AGDError, "comparison")["rows"]
    return [_outcome(value, f"{path}, row {number}") for number, value in enumerate(rows)]


def _outcome(value: Any, origin: str) -> Outcome:
    names = {field.name for field in fields(Outcome)}
    if not isinstance(value, dict) or value.keys() != names:
        raise AGDError(f"{origin} is not the outcome of a comparison: measure it again")
    return Outcome(**(value | {"row": row_from_dict(value["row"], origin)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", choices=list(PLANS))
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=None, help="by default data/results/<base>-rivals.json")
    parser.add_argument("--steps", type=int, default=1_500, help="gradient steps of AGD's adapters; others: as costly")
    parser.add_argument("--trajectories", type=int, default=4_000)
    parser.add_argument("--scale", type=float, default=None, help="by default the one where CFG's distance is lowest")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--n", type=int, default=1_000, help="images for each measurement")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    arguments = parser.parse_args()
    start, name, run = time.perf_counter(), arguments.base, arguments.run
    base = load_base(name)
    scale = arguments.scale or best_scale(read_study(DATA / "results" / f"{name}-gate.json"))
    plan = CollectionPlan(
        training_conditions(base, arguments.trajectories),
        arguments.trajectories,
        PLANS[name].guidance_range,
        num_inference_steps=20,
        trajectories_per_shard=1_000,
    )
    influence_of(base, collect(base, plan, run / "trajectories"))
    costs = equal_steps(name, entrants(name, arguments.steps))
    pool = ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn"))
    try:
        units = itertools.product(costs.items(), arguments.seeds)
        jobs = [
            pool.submit(compare, name, run, rival, *cost, seed, scale, arguments.n) for (rival, cost), seed in units
        ]
        outcomes = [job.result() for job in tqdm(jobs, desc="rivals")]
    finally:
        pool.shutdown(cancel_futures=True)
    path = arguments.results or DATA / "results" / f"{name}-rivals.json"
    command = "python -m agd_lib.rivals " + shlex.join(sys.argv[1:])
    seconds = time.perf_counter() - start
    write_json(path, provenance(command, seconds) | {"rows": [asdict(outcome) for outcome in outcomes]})


if __name__ == "__main__":
    main()
