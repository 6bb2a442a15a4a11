"""Puts adapters on a base model's attention layers, by hooks, and takes them off again without a trace.

adapters = AdapterSet.create(base, kind="offset")
adapters.attach(base)
with adapters.guided_by(4.0):
    ...                       # every forward pass of the base in here is guided, by whoever calls it
adapters.remove()             # the base is what it was, to the bit
"""

from __future__ import annotations

import re
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .adapters import ADAPTERS, Adapter, AdapterSizes, ModulatedAdapter, SharedCode, TimestepShift
from .base_models import BaseModel, Condition, DiTBase, SamplingRun, Site, StableDiffusionXLBase
from .errors import AdapterError
from .guidance import NEGATIVE, Scale, check_scale, scale_at, scale_per_sample
from .project import DATA, display_path
from .storage import read_json, read_tensors, write_json, write_tensors, writing

CONFIG_NAME, WEIGHTS_NAME, CARD_NAME = "config.json", "adapter_model.safetensors", "README.md"
FORMAT_VERSION = 1
ROWS_AHEAD = 256
"""Steps times samples whose conditions a sampling run computes at once: bounds their memory, about 100 MB for SDXL."""

_attached: weakref.WeakKeyDictionary[nn.Module, weakref.ref[AdapterSet]] = weakref.WeakKeyDictionary()
"""Which adapters a denoiser carries. The denoiser's hooks keep them alive, not this."""


@dataclass(frozen=True)
class AdapterConfig:
    """Everything that is needed to build an :class:`AdapterSet` again and to know what it was trained for.

    Attributes:
        kind: a name in :data:`agd_lib.adapters.ADAPTERS`.
        hidden_size: d, the adapters' inner width.
        sites: attention layer -> its width C. timestep_sites: projection by which a residual block is told the timestep
            -> its width; only modulated adapters of a UNet have any.
        timestep_dim, class_dim, prompt_dim, negative_dim: widths of the inputs; None where the adapters do not see that
            input.
        guidance_range: (w_min, w_max) of the training trajectories.
        base_name, base_revision, base_fingerprint, prediction_type: the base model trained on.
        guided_channels: latent channels that the teacher guided.
        scale_multiplier, noise_ranges: see :class:`agd_lib.adapters.AdapterSizes`.
        strength: gains of equal ranges of noise levels, from the cleanest: a scale w is taken for 1 + (w - 1) * gain; see
            :func:`agd_lib.strength.strength_gains`. Empty: w is taken as it is. With gains above 1 the largest scales of the
            guidance range are taken for larger ones, which nobody trained.
    """

    kind: str
    hidden_size: int
    sites: dict[str, int]
    timestep_dim: int | None
    class_dim: int | None
    prompt_dim: int | None
    guidance_range: tuple[float, float]
    base_name: str
    base_revision: str | None
    base_fingerprint: str
    prediction_type: str
    guided_channels: int
    scale_multiplier: float = 1.0
    noise_ranges: int = 1
    timestep_sites: dict[str, int] = field(default_factory=dict)
    negative_dim: int | None = None
    strength: tuple[float, ...] = ()
    format_version: int = FORMAT_VERSION
    library_version: str = field(default_factory=lambda: _library_version())


def _library_version() -> str:
    try:
        return version("agd-lib")
    except PackageNotFoundError:
        return "unknown"


LayerConditions: TypeAlias = dict[str, tuple[Tensor, ...]]
"""What every adapter needs of one forward pass besides its layer's tokens, by site."""


@dataclass(frozen=True)
class _Ahead:
    """Conditions of the coming steps of a sampling run, and what they were computed from.

    Attributes:
        scale, condition: copies of what was given. weights: the adapters', see :meth:`AdapterSet._weights_state`.
        strength: of their config.
        by_timestep: the conditions: of all timesteps, views of the same tensors.
    """

    scale: Scale
    condition: Condition
    weights: list[tuple[int, int]]
    strength: tuple[float, ...]
    by_timestep: dict[float, LayerConditions]


def _compile_anew() -> None:
    """Forget whatever was compiled in this process: hooks that come or go are not noticed by what was compiled before.

    A model does not tell whether it was compiled, since something else may hold what ``torch.compile`` returned.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


class AdapterSet(nn.Module):
    """One adapter for every attention site of a base model; modulated ones of a UNet also shift every residual block.

    Within a sampling run (:meth:`BaseModel.running`) what depends on scale, timestep and condition alone is computed once
    for many steps; in every other forward pass, and wherever gradients are recorded, for that pass.

    Attributes:
        config: see :class:`AdapterConfig`.
        adapters: the adapters by site; dots in site names are written as slashes, as ``nn.ModuleDict`` asks.
        shared: the code network that they share; None for kinds that do not.
        enabled: while False, the base model behaves as if nothing were attached.
        card: the model card that they were loaded with; empty for others, and after more training. Saved with them again
            while their config is the one that it was written for.

    Raises:
        ValueError: for an unknown kind, or several noise ranges for a kind other than modulated.
    """

    card: str

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        if config.kind not in ADAPTERS:
            raise ValueError(f"got adapter kind {config.kind!r}, expected one of: {', '.join(ADAPTERS)}")
        self.config = config
        self.card, self._config_of_card = "", config
        if config.noise_ranges > 1 and config.kind != "modulated":
            raise ValueError(
                f"got noise_ranges {config.noise_ranges} for {config.kind} adapters, expected 1: only modulated adapters "
                "have hidden units for ranges of noise levels"
            )
        sizes = AdapterSizes(
            config.hidden_size,
            config.timestep_dim,
            config.class_dim,
            config.prompt_dim,
            config.scale_multiplier,
            config.noise_ranges,
            config.negative_dim,
        )
        self.adapters = nn.ModuleDict()
        for kind, places in ((ADAPTERS[config.kind], config.sites), (TimestepShift, config.timestep_sites)):
            for site, channels in places.items():
                self.adapters[site.replace(".", "/")] = kind(channels, sizes)
        self.shared = SharedCode(sizes) if ADAPTERS[config.kind].shares_code else None
        self.enabled = True
        self._scale: Scale | None = None
        self._negative: Tensor | None = None  # (B, L, D)
        self._nothing: Tensor | None = None  # (1, L, D), of the null condition
        self._base: BaseModel | None = None
        self._handles: list[Any] = []
        self._call: tuple[Tensor, Condition] | None = None  # of a forward pass that has not reached its blocks
        self._conditions: LayerConditions | None = None  # of one that has
        self._checkpointing = False
        self._parts = list(self.modules())

    @classmethod
    def create(
        cls,
        base: BaseModel,
        kind: str = "offset",
        hidden_size: int = 32,
        guidance_range: tuple[float, float] = (1.0, 6.0),
        guided_channels: int | None = None,
        use_timestep: bool = True,
        use_condition: bool = True,
        scale_multiplier: float = 1.0,
        noise_ranges: int = 1,
        seed: int = 0,
        all_sites: bool = True,
        use_negative: bool = False,
    ) -> AdapterSet:
        """New adapters for the attention sites of a base model, untrained: they change nothing yet.

        Args:
            kind: ``"offset"`` or ``"cross-attention"`` (the paper's), or ``"modulated"`` (an extension).
            hidden_size: d; the paper uses 256 for DiT-XL/2, its code 320 for the UNets of SD 2.1 and SDXL.
            guidance_range: (w_min, w_max) that they will be trained on.
            guided_channels: latent channels that the teacher guides; None: all.
            use_timestep, use_condition: whether the adapters see the timestep, and the class or prompt.
            noise_ranges: equal ranges of noise levels for which modulated adapters have ``hidden_size`` units each.
            seed: of their initial weights.
            all_sites: False leaves out the last attention of each up block of a UNet, as the authors' code does (13 of
                SD 2.1's 16 sites, 58 of SDXL's 70); ``config.sites`` tells which there are.
            use_negative: whether they see negative prompts, which the paper's do not. Then they are trained on trajectories
                whose conditions are pairs of a prompt and a negative one.

        Raises:
            ValueError: for an unknown kind, a hidden size or a number of noise ranges below 1, an odd hidden size for
                cross-attention adapters (half sines, half cosines), several noise ranges for a kind other than modulated, a
                guidance range out of order, modulated adapters for a text-to-image model that are not to see the prompt,
                which is what they shift, or negative prompts of a model without any.
        """
        check_guidance_range(guidance_range)
        if not _is_size(hidden_size):
            raise ValueError(f"got hidden_size {hidden_size!r}, expected a whole number from 1 to 65,536")
        if use_negative and base.adapter_input_dims()["prompt_dim"] is None:
            raise ValueError(f"got use_negative for {base.name}, expected a text-to-image model: it has no prompts")
        if not _is_number_of_ranges(noise_ranges):
            raise ValueError(f"got noise_ranges {noise_ranges!r}, expected a whole number from 1 to 100")
        dims = base.adapter_input_dims()
        timestep_sites = base.timestep_sites() if kind == "modulated" else {}
        config = AdapterConfig(
            kind=kind,
            hidden_size=hidden_size,
            sites={site: parts.channels for site, parts in base.attention_sites(all_sites).items()},
            timestep_dim=dims["timestep_dim"] if use_timestep else None,
            class_dim=dims["class_dim"] if use_condition else None,
            prompt_dim=dims["prompt_dim"] if use_condition else None,
            guidance_range=(float(guidance_range[0]), float(guidance_range[1])),
            base_name=base.name,
            base_revision=base.revision,
            base_fingerprint=base.fingerprint(),
            prediction_type=base.prediction_type,
            guided_channels=guided_channels or base.latent_shape[0],
            scale_multiplier=scale_multiplier,
            noise_ranges=noise_ranges,
            timestep_sites={site: projection.out_features for site, projection in timestep_sites.items()},
            negative_dim=dims["prompt_dim"] if use_negative else None,
        )
        if not use_condition and kind == "modulated" and dims["prompt_dim"] is not None:
            raise ValueError("got use_condition=False, expected True: modulated adapters shift the prompt's tokens")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(config).to(base.device)

    @classmethod
    def from_tensors(cls, config: AdapterConfig, tensors: Mapping[str, Tensor], complaint: str) -> AdapterSet:
        """Adapters with given weights. Memory is taken for them only once names and shapes are known to fit.

        Args:
            tensors: a state dict. complaint: how the error's message starts if they do not fit the config.

        Raises:
            AdapterError: if the config cannot be built, or a tensor is missing, unknown or of another shape or dtype.
        """
        try:
            with torch.device("meta"):
                adapters = cls(config)
        except (KeyError, ValueError) as error:
            raise AdapterError(f"{complaint}: the config is malformed: {error}") from error
        expected = adapters.state_dict()
        wrong = [f"{name} is missing" for name in expected if name not in tensors]
        wrong += [f"{name} is unknown" for name in tensors if name not in expected]
        wrong += [
            f"{name}: shape {tuple(tensors[name].shape)}, expected {tuple(expected[name].shape)}"
            for name in expected.keys() & tensors.keys()
            if tensors[name].shape != expected[name].shape
        ]
        wrong += [f"{name} is of {tensor.dtype}" for name, tensor in tensors.items() if not tensor.is_floating_point()]
        if wrong:
            raise AdapterError(f"{complaint}: {'; '.join(sorted(wrong)[:5])} ({len(wrong)} differences)")
        adapters.load_state_dict({name: _own_copy(tensor) for name, tensor in tensors.items()}, assign=True)
        return adapters

    # Attaching ------------------------------------------------------------------------------------------------------

    def attach(self, base: BaseModel) -> AdapterSet:
        """Put the adapters on a base model; returns self. Adapters that it carried before are removed, with a warning.

        There is a warning, too, if they were trained on a base model of the same name with other weights. What is compiled
        in this process is compiled anew at its next call, as after :meth:`remove`: it would not notice adapters that come or
        go.

        Raises:
            AdapterError: if the base model does not fit; the message says in what.
        """
        if self._put_on(base):
            _compile_anew()
        return self

    def _put_on(self, base: BaseModel) -> bool:
        """Whether they were not on it already."""
        self.check_fit(base)
        previous = _attached[base.denoiser]() if base.denoiser in _attached else None
        if previous is self:
            return False
        untellable = ("meta", "incomplete")
        if base.name == self.config.base_name and base.fingerprint() not in (*untellable, self.config.base_fingerprint):
            warnings.warn(
                f"these adapters were trained on a {base.name} with other weights (fingerprint "
                f"{self.config.base_fingerprint}, here {base.fingerprint()}): expect worse images, or train them again",
                stacklevel=3,
            )
        if previous is not None:
            warnings.warn("this base model carried adapters already; they were removed", stacklevel=3)
            previous._take_off()
        self._take_off()
        on_meta = base.device.type == "meta"  # where accelerate keeps the place of weights that it has offloaded
        if not on_meta and next(self.parameters()).device != base.device:
            self.to(base.device)
        self._base = base
        self._handles = [
            base.denoiser.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            base.input_layer.register_forward_pre_hook(self._before_blocks),
        ]
        for site, parts in base.attention_sites().items():
            if site in self.config.sites:
                adapter = self._at(site)
                layer = parts.attention if adapter.layer == "attention" else parts.feed_forward
                self._handles.append(layer.register_forward_hook(self._layer_hook(site), with_kwargs=True))
                if isinstance(adapter, ModulatedAdapter):
                    self._handles.append(self._hook_embedding(site, parts))
        for site, projection in base.timestep_sites().items():
            if site in self.config.timestep_sites:
                self._handles.append(projection.register_forward_hook(self._layer_hook(site), with_kwargs=True))
        _attached[base.denoiser] = weakref.ref(self)
        return True

    def remove(self) -> None:
        """Take the adapters off. The base model is again what it was, to the bit. Harmless where none are on."""
        was_on = self._base is not None
        self._take_off()
        if was_on:
            _compile_anew()

    def _take_off(self) -> None:
        for handle in self._handles:
            handle.remove()
        if self._base is not None:
            self.set_gradient_checkpointing(False)
            _attached.pop(self._base.denoiser, None)
        self._handles, self._base, self._call, self._conditions = [], None, None, None

    @contextmanager
    def attached(self, base: BaseModel) -> Iterator[AdapterSet]:
        """Inside the block the adapters are on ``base``; afterwards they are where they were before, if anywhere.

        What is compiled runs uncompiled inside the block, and need not be compiled anew after it.

        Raises:
            AdapterError: if the base model does not fit; the message says in what.
        """
        before = self._base
        with torch.compiler.set_stance("force_eager"):
            self._put_on(base)
            try:
                yield self
            finally:
                self._take_off()
                if before is not None:
                    self._put_on(before)

    def check_attached(self, base: BaseModel) -> None:
        """Raises :class:`AdapterError` if these adapters are not on this very base model."""
        if self._base is None or self._base.denoiser is not base.denoiser:
            where = "no base model" if self._base is None else f"another copy of a base model ({self._base.name})"
            raise AdapterError(f"these adapters are on {where}, not on {base.name}: call attach(base) first")

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Whether backward computes each block of the base model again instead of keeping what it computed.

        Off after :meth:`attach`. Only forward passes that record gradients are concerned, and they give the same
        gradients either way: the adapters are told again what they were told in the forward pass, whatever has gone
        through the base model since.

        Raises:
            AdapterError: if these adapters are on no base model.
        """
        if self._base is None:
            raise AdapterError("these adapters are on no base model: call attach(base) first")
        if enabled:
            self._base.denoiser.enable_gradient_checkpointing(self._checkpointed)
        elif self._checkpointing:
            self._base.denoiser.disable_gradient_checkpointing()
        self._checkpointing = enabled

    def _checkpointed(self, block: nn.Module, *args: Any) -> Any:
        """A block of the denoiser, as diffusers calls it where gradient checkpointing is enabled."""
        conditions = self._conditions

        @contextmanager
        def again() -> Iterator[None]:
            before, self._conditions = self._conditions, conditions
            try:
                yield
            finally:
                self._conditions = before

        # nothing random happens in a frozen base in eval mode, so no state of random numbers is kept
        return checkpoint(
            block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: (nullcontext(), again())
        )

    @contextmanager
    def guided_by(self, scale: Scale, negative: Tensor | None = None) -> Iterator[AdapterSet]:
        """Inside the block every forward pass of the base model is guided at this scale; see :data:`Scale`.

        It costs least if the base model knows the run that the passes belong to, as :func:`agd_lib.sampling.sample` and
        :func:`agd_lib.dropin.load_agd` see to: ``with base.running(SamplingRun(scheduler))``.

        Args:
            negative: (B, L, D), the tokens of negative prompts (``base.encode`` of pairs), for adapters that see them; None:
                no negative prompts.

        Raises:
            AdapterError: if these adapters are on no base model, or are given negative prompts and do not see them.
            ValueError: if a scale is negative, NaN or infinite: here, or, from a schedule, at its step.
        """
        if self._base is None:
            raise AdapterError("these adapters are on no base model: call attach(base) first")
        if not callable(scale):
            check_scale(scale)
        if negative is not None and self.config.negative_dim is None and self.enabled:
            raise AdapterError(
                "got negative prompts, and these adapters do not see them: leave them out, guide by CFG, or train adapters "
                "with use_negative=True"
            )
        if negative is None and self.config.negative_dim is not None and self.enabled:
            nothing = self._base.blank_condition if self._base.device.type == "meta" else self._base.null_condition
            self._nothing = nothing(1)["encoder_hidden_states"]
        before = self._scale, self._negative
        self._scale, self._negative = scale, negative
        try:
            yield self
        finally:
            (self._scale, self._negative), self._conditions = before, None

    @contextmanager
    def disabled(self) -> Iterator[AdapterSet]:
        """Inside the block the base model behaves as if nothing were attached."""
        before, self.enabled = self.enabled, False
        try:
            yield self
        finally:
            self.enabled = before

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what the denoiser is called with."""
        self._call = self._conditions = None
        if self._base is not None and self.enabled and self._scale is not None:
            timestep, condition = self._base.read_call(args, kwargs)
            if self.config.negative_dim is not None:
                condition = condition | {NEGATIVE: self._negative_tokens(len(timestep))}
            self._call = timestep, condition

    def _negative_tokens(self, batch_size: int) -> Tensor:
        """Of the negative prompts; of the null condition where there are none."""
        if self._negative is None:
            assert self._nothing is not None
            return self._nothing.expand(batch_size, -1, -1)
        if len(self._negative) != batch_size:
            raise ValueError(
                f"got {len(self._negative)} negative prompts for {batch_size} samples, expected one for each"
            )
        return self._negative

    def _before_blocks(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Compute, or look up, what the adapters need of this forward pass besides their layer's tokens.

        They use the denoiser's own embedders: offloaded ones are on the device of the call by now, no sooner.
        """
        if self._call is None:
            return
        assert self._base is not None
        (timestep, condition), self._call = self._call, None
        if NEGATIVE in condition:  # the base model's own conditions are there already
            condition = condition | {NEGATIVE: condition[NEGATIVE].to(timestep.device)}
        if next(self.parameters()).device != timestep.device:
            self.to(timestep.device)
        one_for_all = len(timestep) == 1 or timestep.stride() == (0,)
        if self._base.run is None or not one_for_all or torch.is_grad_enabled():
            scale = self._scales([timestep[0]], len(timestep))[0]
            self._conditions = self._compute(timestep, condition, scale)
        else:
            self._conditions = self._look_up(timestep, condition, self._base.run)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # compiled, it would be compiled for each timestep
    def _look_up(self, timesteps: Tensor, condition: Condition, run: SamplingRun) -> LayerConditions:
        """The conditions of a step of a run: from those computed ahead, if they were computed from the same."""
        timestep = float(timesteps[0])
        ahead: _Ahead | None = run.ahead.pop(self, None)
        constants: LayerConditions = {}
        if ahead is not None and (
            not all(_same(ahead.condition.get(name), value) for name, value in condition.items())
            or ahead.weights != self._weights_state()
            or ahead.strength != self.config.strength
        ):
            ahead = None
        elif ahead is not None and (timestep not in ahead.by_timestep or not _same(ahead.scale, self._scale)):
            of_a_step = next(iter(ahead.by_timestep.values()))
            constants = {site: self._at(site).constant(tensors) for site, tensors in of_a_step.items()}
            ahead = None  # before others are computed, for its memory
            del of_a_step
        if ahead is None:
            ahead = self._look_ahead(timestep, condition, run, constants)
        run.ahead[self] = ahead
        return ahead.by_timestep[timestep]

    def _look_ahead(
        self, timestep: float, condition: Condition, run: SamplingRun, constants: LayerConditions
    ) -> _Ahead:
        """Compute the conditions of this step and of those that are to come, as far as :data:`ROWS_AHEAD` goes.

        Args:
            constants: by site, what is known of them: :meth:`~agd_lib.adapters.Adapter.constant`.
        """
        assert self._scale is not None
        batch_size = len(next(iter(condition.values())))
        expected = list(dict.fromkeys(run.scheduler.timesteps.tolist()))  # some schedulers repeat theirs
        start = expected.index(timestep) if timestep in expected else len(expected)
        steps = expected[start:][: max(1, ROWS_AHEAD // batch_size)] or [timestep]
        device = next(self.parameters()).device
        conditions = self._compute(
            torch.tensor(steps, device=device, dtype=torch.float32)[:, None],
            condition,
            self._scales(steps, batch_size),
            constants,
        )
        by_site = [zip(*(tensor.unbind() for tensor in tensors)) for tensors in conditions.values()]
        return _Ahead(
            self._scale.clone() if isinstance(self._scale, Tensor) else self._scale,
            {name: value.clone() for name, value in condition.items()},
            self._weights_state(),
            self.config.strength,
            {step: dict(zip(conditions, of_step)) for step, of_step in zip(steps, zip(*by_site))},
        )

    def _compute(
        self, timestep: Tensor, condition: Condition, scale: Tensor, constants: LayerConditions | None = None
    ) -> LayerConditions:
        """Of one forward pass: timestep and scale are (B,). Of T passes: (T, 1) and (T, B), and T comes first in all."""
        assert self._base is not None
        if self.config.strength:
            gains = torch.tensor(self.config.strength, device=scale.device)
            ranges = (timestep * len(gains) / self._base.num_train_timesteps).long().clamp(0, len(gains) - 1)
            scale = 1 + (scale - 1) * gains[ranges.to(gains.device)]
        inputs = self._base.adapter_inputs(timestep, condition, scale).to(next(self.parameters()).dtype)
        if self.shared is not None:
            inputs = self.shared(inputs)
        sites = (*self.config.sites, *self.config.timestep_sites)
        return {site: self._at(site).condition(inputs, (constants or {}).get(site, ())) for site in sites}

    def _scales(self, timesteps: Sequence[float | Tensor], batch_size: int) -> Tensor:
        """The scale at each timestep, (T, B)."""
        assert self._scale is not None
        like = torch.empty(0, device=next(self.parameters()).device)
        if callable(self._scale):
            return torch.stack([scale_at(self._scale, int(timestep), batch_size, like) for timestep in timesteps])
        return scale_per_sample(self._scale, batch_size, like).expand(len(timesteps), batch_size)

    def _weights_state(self) -> list[tuple[int, int]]:
        """Changes whenever a weight of the adapters does. (``self.parameters()`` takes ten times as long.)"""
        weights = [weight for part in self._parts for weight in part._parameters.values() if weight is not None]
        return [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights]

    def _hook_embedding(self, site: str, parts: Site) -> Any:
        """Shift what tells the block its condition: its embedding, or the prompt tokens that its attention sees."""

        adapter = self._at(site)
        assert isinstance(adapter, ModulatedAdapter)

        def shifted(embedding: Tensor) -> Tensor:
            assert self._conditions is not None
            return adapter.shifted(embedding, self._conditions[site])

        def shift(module: nn.Module, args: tuple[Any, ...], embedding: Tensor) -> Tensor | None:
            return None if self._conditions is None else shifted(embedding)

        def shift_tokens(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._conditions is None:
                return None
            tokens = kwargs["encoder_hidden_states"]
            if isinstance(tokens, tuple):  # an IP-Adapter's image tokens come second
                prompt, *others = tokens
                return args, kwargs | {"encoder_hidden_states": (shifted(prompt), *others)}
            return args, kwargs | {"encoder_hidden_states": shifted(tokens)}

        if parts.embedding is None:
            return parts.attention.register_forward_pre_hook(shift_tokens, with_kwargs=True)
        return parts.embedding.register_forward_hook(shift)

    def _layer_hook(self, site: str) -> Any:
        adapter = self._at(site)

        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            if self._conditions is None:
                return None
            hidden_states = args[0] if args else kwargs["hidden_states"]
            corrected: Tensor = adapter(hidden_states, output, self._conditions[site])
            return corrected

        return add

    def _at(self, site: str) -> Adapter:
        adapter = self.adapters[site.replace(".", "/")]
        assert isinstance(adapter, Adapter)
        return adapter

    def check_fit(self, base: BaseModel) -> None:
        """Raises :class:`AdapterError` if these adapters cannot go on ``base``; the message says what differs."""
        sites = {site: parts.channels for site, parts in base.attention_sites().items()}
        dims = base.adapter_input_dims()
        wrong = [f"attention layer {site} is missing" for site in self.config.sites if site not in sites]
        for_fewer = set(sites) - set(self.config.sites)
        if not wrong and for_fewer and set(self.config.sites) != set(base.attention_sites(all_sites=False)):
            wrong.append(
                f"it has {len(sites)} attention layers, the adapters are for {len(self.config.sites)} of them: there is "
                f"none for {min(for_fewer)}"
            )
        wrong += [
            f"{site} has width {sites[site]}, the adapter {channels}"
            for site, channels in self.config.sites.items()
            if site in sites and sites[site] != channels
        ]
        projections = {site: projection.out_features for site, projection in base.timestep_sites().items()}
        if self.config.timestep_sites not in ({}, projections):
            wrong.append("its residual blocks are others than those that the adapters shift")
        wrong += [
            f"{name} is {dims[name]}, the adapters expect {getattr(self.config, name)}"
            for name in ("timestep_dim", "class_dim", "prompt_dim")
            if getattr(self.config, name) is not None and getattr(self.config, name) != dims[name]
        ]
        if self.config.negative_dim not in (None, dims["prompt_dim"]):
            wrong.append(
                f"prompt_dim is {dims['prompt_dim']}, the adapters expect {self.config.negative_dim} of negative ones"
            )
        embeddings = [parts.embedding for parts in base.attention_sites().values() if parts.embedding is not None]
        if self.shared is not None and len(set(embeddings)) < len(embeddings):
            wrong.append("its blocks share one embedder, so their embeddings cannot be shifted one by one")
        if self.config.kind == "modulated" and self.config.prompt_dim is None and dims["prompt_dim"] is not None:
            wrong.append("its blocks are told the condition by prompt tokens, the adapters shift an embedding")
        if base.prediction_type != self.config.prediction_type:
            wrong.append(
                f"it predicts {base.prediction_type}, the adapters were trained for {self.config.prediction_type}"
            )
        if wrong:
            raise AdapterError(
                f"these adapters were made for {self.config.base_name} and do not fit {base.name}: "
                + "; ".join(wrong[:5])
                + (f"; and {len(wrong) - 5} more differences" if len(wrong) > 5 else "")
            )

    # Numbers --------------------------------------------------------------------------------------------------------

    def num_parameters(self) -> int:
        """Trainable parameters of all adapters."""
        return sum(p.numel() for p in self.parameters())

    def summary(self, base: BaseModel) -> str:
        """One line: kind, sites, parameters, and their share of the base model's."""
        count, total = self.num_parameters(), base.num_parameters()
        return (
            f"{self.config.kind} adapters, d = {self.config.hidden_size}, in {len(self.config.sites)} blocks: "
            f"{count:,} parameters, {100 * count / total:.2f} % of the base model's {total:,}"
        )

    # Disk -----------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, card: str = "") -> None:
        """Write ``config.json``, ``adapter_model.safetensors`` and a model card, all or nothing.

        Args:
            folder: replaced if it exists. card: text for the model card (measured results belong there); by default the one
                that the adapters were loaded with, or one without results.

        Raises:
            WriteError: if the disk refuses; nothing half-written is left.
        """
        known = self.card if self.config == self._config_of_card else ""
        with writing(Path(folder)) as temporary:
            temporary.mkdir()
            write_tensors(temporary / WEIGHTS_NAME, self.state_dict())
            write_json(temporary / CONFIG_NAME, asdict(self.config))
            (temporary / CARD_NAME).write_text(card or known or default_card(self.config), encoding="utf-8")

    def push_to_hub(self, repo_id: str, card: str = "", private: bool = False) -> str:
        """Upload what :meth:`save_pretrained` writes to the hub; the repository is made if there is none.

        Args:
            repo_id: the hub id (owner/name), to be given to :meth:`from_pretrained`. card: see :meth:`save_pretrained`.
            private: whether a repository that is made here is private.

        Returns:
            The address of the commit.

        Raises:
            AdapterError: if the hub refuses or cannot be reached.
        """
        from huggingface_hub import HfApi

        api = HfApi()
        with TemporaryDirectory() as folder:
            written = Path(folder) / "adapters"
            self.save_pretrained(written, card)
            try:
                api.create_repo(repo_id, private=private, exist_ok=True)
                return str(api.upload_folder(repo_id=repo_id, folder_path=written, commit_message="AGD adapters"))
            except Exception as error:  # the hub client raises many kinds
                raise AdapterError(
                    f"could not push the adapters to {repo_id!r}: {error}. It takes the network, a name of the form "
                    "owner/name, and a token that may write there: hf auth login"
                ) from error

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: str | torch.device = "cpu", revision: str | None = None
    ) -> AdapterSet:
        """Load adapters from a folder that :meth:`save_pretrained` wrote, or from a hub id.

        Args:
            revision: of the hub's repository: a commit's hash gives the same adapters for ever. None: the newest.

        Raises:
            AdapterError: if files are missing, malformed, truncated, pickled, or of an unknown format version.
        """
        folder = _local_folder(folder, revision)
        config = config_from_dict(read_json(folder / CONFIG_NAME, AdapterError, "adapter config"), folder)
        tensors = read_tensors(folder / WEIGHTS_NAME, AdapterError, "adapter weights")
        adapters = cls.from_tensors(config, tensors, f"the weights in {folder} do not fit its config.json")
        adapters.card, adapters._config_of_card = _card_of(folder), config
        return adapters.to(device)


def _card_of(folder: Path) -> str:
    """The model card in a folder of adapters; empty if there is none, or none that is a text of reasonable length."""
    path = folder / CARD_NAME
    if not path.is_file() or path.stat().st_size > 2**20:
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    return one is other or (isinstance(one, int | float) and one == other)


def _own_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def find_adapters(base: BaseModel, run: str | Path, kind: str) -> Path:
    """Folder of the trained adapters to use: those of this run if it has trained any, else the shipped ones.

    Args:
        run: folder of the run; its own adapters are in ``adapters/<kind>``.
        kind: a name in :data:`agd_lib.adapters.ADAPTERS`.

    Raises:
        AdapterError: if there are none in either place; the message says how to make them.
        ValueError: for an unknown kind.
    """
    if kind not in ADAPTERS:
        raise ValueError(f"got adapter kind {kind!r}, expected one of: {', '.join(ADAPTERS)}")
    places = [Path(run) / "adapters" / kind, DATA / base.name / "adapters" / kind]
    for place in places:
        if (place / CONFIG_NAME).is_file():
            return place
    lessons = {DiTBase: "03_train_dit_adapters", StableDiffusionXLBase: "05_train_sdxl_adapters"}
    lesson = next((name for known, name in lessons.items() if isinstance(base, known)), "04_train_sd21_adapters")
    raise AdapterError(
        f"found no trained {kind} adapters for {base.name}, neither in {display_path(places[0])} (this run's own) nor in "
        f"{display_path(places[1])} (shipped). Train them: run notebooks/{lesson}.ipynb with the same base_name and run_dir"
    )


def check_guidance_range(guidance_range: tuple[float, float]) -> None:
    """Raises ``ValueError`` unless 0 <= w_min <= w_max, both finite."""
    low, high = guidance_range
    if not (0 <= low <= high < float("inf")):
        raise ValueError(f"got guidance range {guidance_range}, expected 0 <= w_min <= w_max, such as (1, 6)")


def default_card(config: AdapterConfig) -> str:
    """A model card without results: what the adapters are, and how to use them."""
    low, high = config.guidance_range
    return (
        "---\nlibrary_name: agd-lib\ntags: [adapter-guidance-distillation]\n---\n"
        f"# AGD adapters ({config.kind}) for {config.base_name}\n\n"
        f"Classifier-free guidance in one forward pass a step, for scales {low:g} to {high:g}.\n\n"
        "```python\nfrom agd_lib import AGD, AdapterSet, load_base\n\n"
        f'base = load_base("{config.base_name}")\nadapters = AdapterSet.from_pretrained("this folder").attach(base)\n```\n\n'
        "Or in a diffusers pipeline of your own:\n\n"
        "```python\nfrom agd_lib import load_agd\n\n"
        f'load_agd(pipe, "this folder")\nimages = pipe(..., guidance_scale={(low + high) / 2:g}).images\n```\n'
    )


_NEWER_FIELDS = {"timestep_sites", "negative_dim", "strength"}
"""Fields that configs of older versions do not have."""


def config_from_dict(values: Mapping[str, Any], origin: Path) -> AdapterConfig:
    """Check and build an :class:`AdapterConfig` from parsed JSON.

    Raises:
        AdapterError: naming the field that is missing, unknown or out of range.
    """
    fields = AdapterConfig.__dataclass_fields__
    missing, unknown = fields.keys() - values.keys() - _NEWER_FIELDS, values.keys() - fields.keys()
    if values.get("format_version") != FORMAT_VERSION:
        raise AdapterError(
            f"{origin} has adapter format version {values.get('format_version')!r}, this library reads {FORMAT_VERSION}"
        )
    if missing or unknown:
        raise AdapterError(
            f"the adapter config in {origin} is malformed: missing {sorted(missing)}, unknown {sorted(unknown)}"
        )
    problems = [
        f"{name} is {value!r}, expected {expected}"
        for name, value in values.items()
        for fits, expected in [_CONFIG_RULES.get(name, (_is_text, "a text"))]
        if not fits(value)
    ]
    if problems:
        raise AdapterError(f"the adapter config in {origin} is malformed: {'; '.join(problems)[:500]}")
    low, high = values["guidance_range"]
    strength = tuple(float(gain) for gain in values.get("strength", ()))
    return AdapterConfig(**{**values, "guidance_range": (float(low), float(high)), "strength": strength})


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_kind(value: Any) -> bool:
    return isinstance(value, str) and value in ADAPTERS


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e6


def _is_range(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(_is_number(bound) for bound in value)
        and 0 <= value[0] <= value[1]
    )


def _are_gains(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) <= 1_000
        and all(_is_number(gain) and gain >= 0 for gain in value)
    )


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 65_536


def _is_number_of_ranges(value: Any) -> bool:
    return _is_size(value) and value <= 100


def _is_size_or_none(value: Any) -> bool:
    return value is None or _is_size(value)


def _are_sites(value: Any) -> bool:
    return _are_places(value) and len(value) > 0


def _are_places(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= 500
        and all(re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)+", site) and _is_size(value[site]) for site in value)
    )


_CONFIG_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "kind": (_is_kind, f"one of: {', '.join(ADAPTERS)}"),
    "hidden_size": (_is_size, "a size from 1 to 65,536"),
    "guided_channels": (_is_size, "a size from 1 to 65,536"),
    "timestep_dim": (_is_size_or_none, "a size from 1 to 65,536, or null"),
    "class_dim": (_is_size_or_none, "a size from 1 to 65,536, or null"),
    "prompt_dim": (_is_size_or_none, "a size from 1 to 65,536, or null"),
    "negative_dim": (_is_size_or_none, "a size from 1 to 65,536, or null"),
    "sites": (_are_sites, "at most 500 attention layers by name, each with a size from 1 to 65,536"),
    "timestep_sites": (_are_places, "at most 500 projections by name, each with a size from 1 to 65,536"),
    "guidance_range": (_is_range, "[w_min, w_max] with 0 <= w_min <= w_max"),
    "scale_multiplier": (_is_number, "a number"),
    "noise_ranges": (_is_number_of_ranges, "a whole number from 1 to 100"),
    "strength": (_are_gains, "at most 1,000 numbers, none negative"),
    "format_version": (_is_size, "a version number"),
    "base_revision": (lambda value: value is None or _is_text(value), "a text or null"),
}
"""Field of an adapter config -> (test, what is expected). Every other field is a text."""


def _local_folder(folder: str | Path, revision: str | None) -> Path:
    path = Path(folder)
    if path.is_dir():
        return path
    if path.is_file():
        read_tensors(path, AdapterError, "adapter weights")  # names a pickle for what it is
        raise AdapterError(f"{path} is a file, expected the folder that holds {CONFIG_NAME} and {WEIGHTS_NAME}")
    if str(folder).count("/") != 1 or str(folder).startswith((".", "/", "~")):
        raise AdapterError(f"got adapters {str(folder)!r}: no such folder, and not a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        wanted = [CONFIG_NAME, WEIGHTS_NAME, CARD_NAME]
        return Path(snapshot_download(str(folder), revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub client raises many kinds
        raise AdapterError(f"could not fetch the adapters {str(folder)!r} from the hub: {error}") from error
