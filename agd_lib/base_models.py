"""Base models behind one door: ``load_base("tiny-dit")``, a folder, or a hub id.

The few things in which diffusion models differ (how a condition is encoded, what the null condition is, where the
attention layers are) live here and nowhere else. Everything else in the library sees a :class:`BaseModel`.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import DiffusionPipeline, DiTPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn

from .adapters import AdapterInputs
from .errors import BaseModelError
from .project import DATA

Condition: TypeAlias = dict[str, Tensor]
"""The denoiser's conditioning arguments by name, each with the batch as first dimension."""


@dataclass(frozen=True)
class KnownBase:
    """A base model that :func:`load_base` knows by a short name."""

    source: str
    revision: str | None = None
    licence: str = ""


KNOWN_BASES: dict[str, KnownBase] = {
    "tiny-dit": KnownBase(str(DATA / "tiny-dit"), licence="MIT"),
    # The main revision holds pickled weights only; this one holds the same weights as safetensors.
    "dit-xl-2-256": KnownBase("facebook/DiT-XL-2-256", "refs/pr/1", "CC-BY-NC-4.0"),
}


@dataclass(frozen=True)
class Site:
    """A place for an adapter: an attention layer and its surroundings.

    Attributes:
        attention: the attention layer. feed_forward: the feed-forward layer of the same block.
        embedding: the module whose output (B, channels) tells the block the timestep and the class. (diffusers' DiT
            asks the first block's once more for its last layer norm.)
        channels: C, the width of all three.
    """

    attention: nn.Module
    feed_forward: nn.Module
    embedding: nn.Module
    channels: int


class BaseModel(ABC):
    """A frozen diffusion model: a diffusers pipeline with the names that this library uses for its parts.

    Attributes:
        name: short name, folder or hub id.
        revision: hub revision; None for a folder.
        pipeline: the diffusers pipeline; its modules are in eval mode and need no gradients.
        denoiser: the module that predicts noise (or velocity): a transformer or a UNet.
        scheduler: the pipeline's own scheduler.
        vae: the autoencoder.
    """

    denoiser: Any

    def __init__(self, pipeline: Any, name: str, revision: str | None = None) -> None:
        self.pipeline = pipeline
        self.name = name
        self.revision = revision
        self.scheduler = pipeline.scheduler
        self.vae = pipeline.vae
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.eval().requires_grad_(False)

    # What differs between architectures -----------------------------------------------------------------------------

    @abstractmethod
    def encode(self, conditions: Sequence[Any]) -> Condition:
        """Turn conditions as a person writes them (class labels or names, prompts) into a :data:`Condition`."""

    @abstractmethod
    def null_condition(self, batch_size: int) -> Condition:
        """The condition of the unconditional branch."""

    @abstractmethod
    def all_conditions(self) -> list[Any]:
        """Every condition that the model knows, if they can be listed (the classes)."""

    @abstractmethod
    def read_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Condition]:
        """``(timestep, condition)`` from the arguments of a call of the denoiser, whoever makes it."""

    @abstractmethod
    def adapter_inputs(self, timestep: Tensor, condition: Condition, guidance_scale: Tensor) -> AdapterInputs:
        """What the adapters see of a forward pass."""

    @abstractmethod
    def adapter_input_dims(self) -> dict[str, int | None]:
        """Widths of those inputs: ``timestep_dim``, ``class_dim``, ``prompt_dim`` (None: the model has no such input)."""

    @abstractmethod
    def attention_sites(self) -> dict[str, Site]:
        """The attention layers that the paper adapts, by name, with what surrounds them."""

    @abstractmethod
    def num_parameters(self) -> int:
        """Parameters of the denoiser, repeated copies counted once."""

    # What they share ------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Device of the denoiser."""
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the denoiser."""
        return next(self.denoiser.parameters()).dtype

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent."""
        config = self.denoiser.config
        size = config.sample_size
        return int(config.in_channels), int(size), int(size)

    @property
    def prediction_type(self) -> str:
        """What the denoiser predicts: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``."""
        return str(self.scheduler.config.prediction_type)

    @property
    def num_train_timesteps(self) -> int:
        """Timesteps of the noise schedule (usually 1,000)."""
        return int(self.scheduler.config.num_train_timesteps)

    def denoise(self, latents: Tensor, timestep: int | Tensor, condition: Condition) -> Tensor:
        """One forward pass of the denoiser.

        Args:
            latents: (B, C, H, W). timestep: one for all, or (B,). condition: see :data:`Condition`.

        Returns:
            (B, C, H, W), in :attr:`prediction_type`; a learned variance (DiT's second half of channels) is dropped.
        """
        timesteps = torch.as_tensor(timestep, device=latents.device).expand(len(latents))
        return self.denoiser(latents, timestep=timesteps, **condition).sample[:, : latents.shape[1]]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to images (B, 3, H, W), float32 in [0, 1]."""
        unscaled = latents.to(self.vae.dtype) * (1 / self.vae.config.scaling_factor)  # rounds as DiTPipeline does
        return (self.vae.decode(unscaled).sample / 2 + 0.5).clamp(0, 1).float()

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to the latents (B, C, h, w) that the denoiser was trained on, scaled.

        They are drawn from the autoencoder's posterior with ``generator``.
        """
        posterior = self.vae.encode((images * 2 - 1).to(self.device, self.vae.dtype)).latent_dist
        return posterior.sample(generator) * self.vae.config.scaling_factor

    def clean_estimate(self, latents: Tensor, prediction: Tensor, timestep: int) -> Tensor:
        """The clean latents that a prediction at x_t stands for: the model's guess of where the trajectory ends.

        Args:
            latents: x_t, (B, C, H, W). prediction: the same shape, in :attr:`prediction_type`. timestep: t.
        """
        alpha_bar = self.scheduler.alphas_cumprod[timestep].to(latents.device, torch.float32)
        signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        if self.prediction_type == "epsilon":
            return (latents - noise * prediction) / signal
        return signal * latents - noise * prediction if self.prediction_type == "v_prediction" else prediction

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> BaseModel:
        """Move the whole pipeline; returns self."""
        self.pipeline.to(*[target for target in (device, dtype) if target is not None])
        return self

    def fingerprint(self) -> str:
        """Hex digest of the denoiser's configuration and of a fixed sample of its weights, rounded to bfloat16.

        Tells base models apart, also fine-tuned from one another; float32 and bfloat16 copies of one agree. A model on
        the meta device has no weights to tell apart: ``"meta"``.
        """
        if self.device.type == "meta":
            return "meta"
        digest = hashlib.sha256()
        config = {k: v for k, v in self.denoiser.config.items() if not k.startswith("_")}
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        digest.update(self.prediction_type.encode())
        for name, parameter in sorted(self.denoiser.named_parameters()):
            stride = max(1, parameter.numel() // 64)
            values = parameter.detach().flatten()[::stride][:64].to("cpu", torch.bfloat16)
            digest.update(f"{name}{tuple(parameter.shape)}".encode() + values.view(torch.int16).numpy().tobytes())
        return digest.hexdigest()[:32]


class DiTBase(BaseModel):
    """A class-conditional diffusion transformer (``DiTPipeline``): DiT-XL/2, or one of any size and class count."""

    def __init__(self, pipeline: DiTPipeline, name: str, revision: str | None = None) -> None:
        super().__init__(pipeline, name, revision)
        self.denoiser = pipeline.transformer
        self.num_classes: int = int(pipeline.transformer.config.num_embeds_ada_norm)

    def encode(self, conditions: Sequence[Any]) -> Condition:
        """Class labels (int) or class names (str, where the pipeline has names) -> ``{"class_labels": (B,)}``.

        Raises:
            ValueError: if a label is out of range or a name unknown.
        """
        labels = [self._label(condition) for condition in conditions]
        return {"class_labels": torch.tensor(labels, dtype=torch.int64, device=self.device)}

    def _label(self, condition: Any) -> int:
        if isinstance(condition, str):
            if condition not in self.pipeline.labels:
                known = ", ".join(list(self.pipeline.labels)[:25]) or "none: this pipeline has no class names"
                raise ValueError(f"got the class name {condition!r}, expected one of: {known}")
            return int(self.pipeline.labels[condition])
        try:
            label = operator.index(condition)
        except TypeError:
            label = -1
        if not 0 <= label < self.num_classes:
            raise ValueError(
                f"got class label {condition}, expected an integer from 0 to {self.num_classes - 1} "
                f"({self.num_classes} is the null class, which guidance adds by itself)"
            )
        return label

    def null_condition(self, batch_size: int) -> Condition:
        return {"class_labels": torch.full((batch_size,), self.num_classes, dtype=torch.int64, device=self.device)}

    def all_conditions(self) -> list[int]:
        return list(range(self.num_classes))

    def class_name(self, label: int) -> str:
        """Name of a class, or the label itself where the pipeline has no names."""
        names = {int(index): name for name, index in self.pipeline.labels.items()}
        return names.get(label, str(label))

    def read_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Condition]:
        named = dict(zip(("hidden_states", "timestep", "class_labels"), args)) | dict(kwargs)
        return named["timestep"], {"class_labels": named["class_labels"]}

    def _embedder(self) -> Any:
        return self.pipeline.transformer.transformer_blocks[0].norm1.emb

    def adapter_inputs(self, timestep: Tensor, condition: Condition, guidance_scale: Tensor) -> AdapterInputs:
        embedder, labels = self._embedder(), condition["class_labels"]
        timestep = timestep.expand(len(labels))
        with torch.no_grad():
            frequencies = embedder.time_proj(timestep).to(self.dtype)
            return AdapterInputs(
                guidance_scale=guidance_scale,
                timestep_embedding=embedder.timestep_embedder(frequencies).float(),
                class_embedding=embedder.class_embedder.embedding_table(labels).float(),
            )

    def adapter_input_dims(self) -> dict[str, int | None]:
        width = int(self.pipeline.transformer.inner_dim)
        return {"timestep_dim": width, "class_dim": width, "prompt_dim": None}

    def attention_sites(self) -> dict[str, Site]:
        width = int(self.pipeline.transformer.inner_dim)
        return {
            f"transformer_blocks.{i}.attn1": Site(block.attn1, block.ff, block.norm1.emb, width)
            for i, block in enumerate(self.pipeline.transformer.transformer_blocks)
        }

    def num_parameters(self) -> int:
        total = sum(p.numel() for p in self.denoiser.parameters())
        copies = len({block.norm1.emb for block in self.pipeline.transformer.transformer_blocks}) - 1
        return total - copies * sum(p.numel() for p in self._embedder().parameters())


def base_from_pipeline(pipeline: Any, name: str = "pipeline", revision: str | None = None) -> BaseModel:
    """Wrap a diffusers pipeline that is already in memory.

    Raises:
        BaseModelError: if the pipeline is of a kind that the library does not handle.
    """
    if isinstance(pipeline, DiTPipeline):
        return DiTBase(pipeline, name, revision)
    raise BaseModelError(
        f"{name} is a {type(pipeline).__name__}; this library distils DiTPipeline. Pass the folder or hub id of one"
    )


def load_base(
    name: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> BaseModel:
    """Load a base model.

    Args:
        name: a short name of :data:`KNOWN_BASES`, a folder that a diffusers pipeline was saved to, or a hub id.
        device: where to put it. dtype: of its weights; targets are best collected in float32.
        revision: hub revision; by default the pinned one for a short name, else the repository's main one.

    Raises:
        BaseModelError: if there is no such model, it holds no safetensors, or it is of another kind. Pickled weights
            are never loaded.
    """
    known = KNOWN_BASES.get(str(name))
    source = known.source if known else str(name)
    revision = revision or (known.revision if known else None)
    is_folder = source != "" and Path(source).is_dir()
    if not is_folder and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        raise BaseModelError(
            f"got base model {str(name)!r}: no such folder, and not a hub id (owner/name). "
            f"Known short names: {', '.join(KNOWN_BASES)}"
        )
    if is_folder and not (Path(source) / "model_index.json").is_file():
        raise BaseModelError(
            f"{source} holds no model_index.json: expected a folder that a diffusers pipeline was saved to"
        )
    try:
        with _quiet_diffusers():
            pipeline = DiffusionPipeline.from_pretrained(source, revision=revision, dtype=dtype, use_safetensors=True)
    except Exception as error:  # diffusers and the hub raise many kinds
        raise BaseModelError(
            f"could not load the base model {source!r}"
            + (f" (revision {revision})" if revision else "")
            + f": {error}. A hub id needs the network at the first use; pickled weights are refused"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return base_from_pipeline(pipeline.to(device), str(name), revision)


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Without diffusers' remarks on a load (class names kept as JSON, a progress bar over three parts)."""
    verbosity, progress = diffusers_logging.get_verbosity(), diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity)
        if progress:
            diffusers_logging.enable_progress_bar()


@dataclass
class ForwardMeter:
    """Counts what went through the denoiser, by a hook. ``samples`` / images = NFE per image."""

    samples: int = 0
    calls: int = 0

    def nfe(self, num_images: int) -> float:
        """Forward passes per image. A CFG step counts 2 also where its two passes are batched into one call."""
        return self.samples / num_images


@contextmanager
def count_forwards(base: BaseModel) -> Iterator[ForwardMeter]:
    """Count the denoiser's forward passes inside the block."""
    meter = ForwardMeter()

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latents = args[0] if args else kwargs["hidden_states" if "hidden_states" in kwargs else "sample"]
        meter.samples += len(latents)
        meter.calls += 1

    handle = base.denoiser.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield meter
    finally:
        handle.remove()


def count_flops(base: BaseModel) -> int:
    """Floating-point operations of one forward pass of one sample (multiply and add counted apart).

    Counted by torch's own counter on the real operations, so attached adapters count too while they are active.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    latents = torch.zeros(1, *base.latent_shape, device=base.device, dtype=base.dtype)
    # the counter knows the plain form of attention on every device, fused forms on GPUs only
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        base.denoise(latents, 0, base.null_condition(1))
    return math.floor(counter.get_total_flops())
