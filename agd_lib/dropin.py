"""The drop-in for diffusers: a pipeline that somebody already has, guided in one forward pass a step.

    pipe = StableDiffusionXLPipeline.from_pretrained(...)
    load_agd(pipe, "path-or-hub-id")
    image = pipe("a red star", guidance_scale=7.5).images[0]
    pipe.agd.unload()                        # the pipeline is what it was, to the bit

diffusers' pipelines make a second, unconditional pass if their guidance scale is above 1: that alone decides whether the
batch is doubled, a negative prompt encoded and two predictions combined. So all that is to be done is to take the scale
out of the call, to tell it to the adapters, and to let the pipeline run its own loop at scale 1. Python looks ``__call__``
up on an object's class, so the pipeline object is given a subclass of its class for that, with the same name, which is
what diffusers writes to ``model_index.json`` and goes by in ``from_pipe``. Scheduler, callbacks, LoRA, ControlNet and
IP-Adapter stay the pipeline's own affair.

The adapters' hooks are on the denoiser while a call runs, and only then. So its parts can be saved, exchanged
(``pipe.unet = another checkpoint's``) and shared with a second pipeline, which is guided only if it is loaded too. What
``torch.compile`` made of it would not notice such hooks, so it runs uncompiled while the adapters guide, and compiled
whenever they do not.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DiTPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor

from .attach import AdapterSet
from .base_models import BaseModel, DiTBase, SamplingRun, StableDiffusionBase, StableDiffusionXLBase
from .errors import BaseModelError
from .guidance import Scale, check_scale, warn_if_untrained

PIPELINES: dict[Any, type[DiTBase | StableDiffusionBase]] = {
    DiTPipeline: DiTBase,
    StableDiffusionPipeline: StableDiffusionBase,
    StableDiffusionImg2ImgPipeline: StableDiffusionBase,
    StableDiffusionControlNetPipeline: StableDiffusionBase,
    StableDiffusionControlNetImg2ImgPipeline: StableDiffusionBase,
    StableDiffusionXLPipeline: StableDiffusionXLBase,
    StableDiffusionXLImg2ImgPipeline: StableDiffusionXLBase,
    StableDiffusionXLControlNetPipeline: StableDiffusionXLBase,
    StableDiffusionXLControlNetImg2ImgPipeline: StableDiffusionXLBase,
}
"""The pipelines that take adapters."""


def load_agd(pipeline: Any, adapters: str | Path | AdapterSet, revision: str | None = None) -> LoadedAdapters:
    """Guide a diffusers pipeline by adapters: from now on its calls make one forward pass a step.

    The ``guidance_scale`` of a call goes to the adapters. It is, as before, a number, by default the pipeline's own
    default; it may also be one number per prompt or per image (a sequence or a tensor; images of a prompt are next to
    each other), or a function of the timestep (an int from ``num_train_timesteps - 1`` down to 0) that returns either, such
    as :class:`~agd_lib.guidance.GuidanceInterval`. Less than 1 is the same as 1, as in diffusers' own pipelines. A scale should
    be in the range that the adapters were trained on: outside it a call warns.

    What only a second pass can do is refused, by a ``ValueError``: negative prompts (empty ones are fine; adapters that were
    trained to see negative prompts take ``negative_prompt`` or ``negative_prompt_embeds``) and ``guidance_rescale``; so are
    scales that are negative, not finite, or not one per prompt or image, and ``ip_adapter_image_embeds`` with the negative
    half that two passes need (two embeddings for two prompts are taken for one each). A callback cannot change the guidance
    by ``_guidance_scale``; a schedule can.

    Args:
        pipeline: one of :data:`PIPELINES`. Adapters that it was given before are unloaded.
        adapters: a folder or a hub id (see :meth:`AdapterSet.from_pretrained`), or the adapters themselves; one set may
            serve many pipelines.
        revision: of the hub's repository that the id names: a commit's hash gives the same adapters for ever.

    Returns:
        The handle, also to be had as ``pipeline.agd``.

    Raises:
        AdapterError: if the adapters cannot be read, or do not fit the pipeline's denoiser.
        BaseModelError: for a pipeline of another kind.
        TypeError: if ``adapters`` are neither.
    """
    base = _base_of(pipeline)
    if not isinstance(adapters, AdapterSet | str | Path):
        raise TypeError(
            f"got adapters of type {type(adapters).__name__}, expected a folder, a hub id, or an AdapterSet"
        )
    loaded = adapters if isinstance(adapters, AdapterSet) else AdapterSet.from_pretrained(adapters, revision=revision)
    loaded.check_fit(base)
    if isinstance(pipeline, _Guided):
        pipeline.agd.unload()
    pipeline._agd_adapters = loaded
    pipeline.__class__ = _guided(type(pipeline))
    return LoadedAdapters(pipeline, loaded)


class LoadedAdapters:
    """The handle of a pipeline's adapters; :func:`load_agd` returns it, and so does ``pipeline.agd``.

    Attributes:
        pipeline: the pipeline. adapters: its adapters.
    """

    def __init__(self, pipeline: Any, adapters: AdapterSet) -> None:
        self.pipeline = pipeline
        self.adapters = adapters

    def enable(self) -> None:
        """Guide by the adapters (again)."""
        self.adapters.enabled = True

    def disable(self) -> None:
        """Leave guidance to the pipeline: classifier-free guidance in two passes, negative prompts and all.

        (To every pipeline that the adapters serve.)
        """
        self.adapters.enabled = False

    def disabled(self) -> AbstractContextManager[AdapterSet]:
        """Inside the block guidance is left to the pipeline, as by :meth:`disable`."""
        return self.adapters.disabled()

    def unload(self) -> None:
        """Make the pipeline what it was before, to the bit. Harmless where other adapters took these ones' place."""
        if vars(self.pipeline).get("_agd_adapters") is self.adapters:
            del self.pipeline._agd_adapters
            self.pipeline.__class__ = type(self.pipeline).__bases__[0]


class _Guided:
    """What marks the classes that :func:`_guided` makes."""

    @property
    def agd(self) -> LoadedAdapters:
        """The handle of the pipeline's adapters."""
        return LoadedAdapters(self, vars(self)["_agd_adapters"])


def _guided(kind: type) -> type:
    """The subclass of a pipeline's class whose calls are guided by the adapters in ``_agd_adapters``."""
    pipeline_call: Callable[..., Any] = kind.__call__
    signature = inspect.signature(pipeline_call)

    @functools.wraps(pipeline_call)
    def guided_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        adapters: AdapterSet | None = vars(self).get("_agd_adapters")  # a new object of this class has none
        if adapters is None or not adapters.enabled:
            return pipeline_call(self, *args, **kwargs)
        call = signature.bind(self, *args, **kwargs)
        call.apply_defaults()
        base = _base_of(self)
        negative = None
        if adapters.config.negative_dim is not None:
            negative = _take_negative_prompts(call.arguments, base)
        _refuse_what_takes_two_passes(call.arguments, signature)
        scale = _read_scale(call.arguments, adapters.config.guidance_range)
        call.arguments["guidance_scale"] = 1.0
        run = base.running(SamplingRun(base.scheduler))
        with adapters.attached(base), adapters.guided_by(scale, negative), run:
            return pipeline_call(*call.args, **call.kwargs)

    looks = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind, _Guided), {"__call__": guided_call} | looks)


def _base_of(pipeline: Any) -> BaseModel:
    for kind, base_class in PIPELINES.items():
        if isinstance(pipeline, kind):
            base = base_class(pipeline, pipeline.name_or_path or f"this {type(pipeline).__name__}")
            base.denoiser = getattr(base.denoiser, "_orig_mod", base.denoiser)  # within what torch.compile returns
            return base
    raise BaseModelError(
        f"got a {type(pipeline).__name__}, expected one of: {', '.join(kind.__name__ for kind in PIPELINES)}"
    )


def _take_negative_prompts(arguments: dict[str, Any], base: BaseModel) -> Tensor:
    """The tokens of a call's negative prompts, (B, L, D), which are taken out of the call; where it has none, of empty ones.

    The adapters do not see a pooled embedding, so that of negative prompts is taken out too.
    """
    assert isinstance(base, StableDiffusionBase)
    count, given = _num_prompts(arguments), arguments.get("negative_prompt") or ""
    tokens: Tensor | None = arguments.get("negative_prompt_embeds")
    if tokens is None:
        prompts = [given] * count if isinstance(given, str) else [prompt or "" for prompt in given]
        if len(prompts) != count:
            raise ValueError(f"got {len(prompts)} negative prompts for {count} prompts, expected one for each")
        tokens = base.negative_tokens(prompts)
    elif given:
        raise ValueError("got negative_prompt and negative_prompt_embeds, expected one of them")
    elif len(tokens) != count:
        raise ValueError(f"got negative_prompt_embeds of {len(tokens)} prompts, expected {count}")
    taken = ("negative_prompt", "negative_prompt_embeds", "negative_pooled_prompt_embeds")
    arguments |= {name: None for name in taken if name in arguments}
    return tokens.repeat_interleave(arguments.get("num_images_per_prompt") or 1, dim=0)


def _num_prompts(arguments: Mapping[str, Any]) -> int:
    """Of a call; or of its classes."""
    conditions = next(
        (arguments[n] for n in ("class_labels", "prompt", "prompt_embeds") if arguments.get(n) is not None), ""
    )
    return 1 if isinstance(conditions, str) else len(conditions)


def _refuse_what_takes_two_passes(arguments: Mapping[str, Any], signature: inspect.Signature) -> None:
    given = [
        name
        for name, value in arguments.items()
        if name.startswith("negative_") and _says_something(value, signature.parameters[name].default)
    ]
    if arguments.get("guidance_rescale"):
        given.append("guidance_rescale")
    num_prompts = _num_prompts(arguments)
    if any(len(embeds) > num_prompts for embeds in arguments.get("ip_adapter_image_embeds") or ()):
        raise ValueError(
            f"got ip_adapter_image_embeds of {[len(embeds) for embeds in arguments['ip_adapter_image_embeds']]} pictures for "
            f"{num_prompts} prompts, expected at most one for each: with one pass there is no negative half. Leave it out: "
            "[embeds.chunk(2)[1] for embeds in ip_adapter_image_embeds]"
        )
    if given:
        raise ValueError(
            f"got {', '.join(given)}, expected none: the adapters guide in one forward pass, which has no negative "
            "(unconditional) branch; some are trained to see negative_prompt, nothing else. Leave it out, or let the pipeline "
            "make its two passes: with pipe.agd.disabled(): pipe(...)"
        )


def _says_something(value: Any, default: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    if isinstance(value, str | list | tuple):
        return value != default and any(part not in ("", None) for part in value)
    return value is not None and value != default


def _read_scale(arguments: Mapping[str, Any], trained: tuple[float, float]) -> Scale:
    """The scale of a call: one number per image, (B,), or a function of the timestep that returns these."""
    given = arguments["guidance_scale"]
    if not callable(given):
        scales = _per_image(given, arguments)
        warn_if_untrained(scales, trained, given, stacklevel=4)
        return scales
    has_warned = False

    def scale(timestep: int) -> Tensor:
        nonlocal has_warned
        value = given(timestep)
        scales = _per_image(value, arguments)
        has_warned = has_warned or warn_if_untrained(scales, trained, f"{value} at timestep {timestep}", stacklevel=3)
        return scales

    return scale


def _per_image(value: Any, arguments: Mapping[str, Any]) -> Tensor:
    """What a call, or its schedule, gives as scale: as one number per image, (B,), and none below 1."""
    prompts, images = _num_prompts(arguments), arguments.get("num_images_per_prompt") or 1
    try:
        scales = torch.as_tensor(value, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"got guidance_scale {value!r}, expected a number, one number per prompt or image, or a function of the timestep"
        ) from error
    check_scale(value)
    if scales.shape not in {(), (prompts,), (prompts * images,)}:
        raise ValueError(
            f"got a guidance_scale of shape {tuple(scales.shape)} for {prompts} prompts and {prompts * images} images, "
            "expected one number, or one per prompt or image"
        )
    each = images if scales.shape == (prompts,) else 1
    return scales.clamp(min=1).repeat_interleave(each).expand(prompts * images)
