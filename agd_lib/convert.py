"""Reads adapter checkpoints of the paper's authors (``cristianpjensen/agd``) into an :class:`~agd_lib.attach.AdapterSet`.

Their training writes ``<run>/config.yaml`` and ``<run>/checkpoints/NNNNNNN.pt``, a pickle of
``{"model": {site: {name: tensor}}}``. It is read with torch's restricted unpickler, which builds tensors and containers
and runs nothing else; then every name and every shape must be one that the adapter has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from .attach import AdapterConfig, AdapterSet, check_guidance_range
from .base_models import BaseModel
from .errors import AdapterError
from .storage import MAX_JSON_BYTES


def _layers(pairs: Mapping[str, str]) -> dict[str, str]:
    """Layer names, theirs -> ours, as names of their weights and biases."""
    return {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in pairs.items() for kind in ("weight", "bias")}


_COMMON = {
    "guidance_scale_embedder.net.0.frequencies": "guidance_scale_encoding.frequencies",
    "guidance_scale_embedder.net.0.phases": "guidance_scale_encoding.phases",
} | _layers(
    {
        "guidance_scale_embedder.net.1.net.0": "guidance_scale_encoding.mlp.0",
        "guidance_scale_embedder.net.2": "guidance_scale_encoding.norm",
        "timestep_proj": "timestep_proj",
        "class_proj": "class_proj",
        "prompt_proj": "prompt_proj",
    }
)
_NAMES: dict[str, dict[str, str]] = {
    # the offset adapter's networks count a dropout layer after the activation, so their layers are 0, 3 and 4
    "offset": _COMMON
    | _layers(
        {
            "guidance_scale_embedder.net.1.net.3": "guidance_scale_encoding.mlp.2",
            "guidance_scale_embedder.net.1.net.4": "guidance_scale_encoding.mlp.3",
            "out_proj.net.0": "out_proj.0",
            "out_proj.net.3": "out_proj.2",
            "out_proj.net.4": "out_proj.3",
        }
    ),
    "cross-attention": _COMMON
    | _layers({"guidance_scale_embedder.net.1.net.2": "guidance_scale_encoding.mlp.2", "out_proj": "out_proj"})
    | {f"{name}.weight": f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj")}
    | {"pos_enc.pe": "positions"},
}
"""Adapter kind -> (their tensor name -> ours)."""

_ARCHITECTURES = {"additive": "offset", "attention": "cross-attention"}
"""Their ``arch`` -> our adapter kind; they tried two more, which the paper does not use."""


def convert_authors_checkpoint(
    path: str | Path,
    base: BaseModel,
    guidance_range: tuple[float, float] | None = None,
    guided_channels: int | None = None,
    scale_multiplier: float | None = None,
) -> AdapterSet:
    """Read adapters that the paper's authors' code has trained; nothing is attached yet.

    Kind, inputs and sizes are read off the tensors. ``config.yaml`` (beside the checkpoint, or one folder up, where
    their training writes it) gives the factor on the guidance scale, and must agree with the tensors.

    Args:
        path: a file ``checkpoints/NNNNNNN.pt``.
        base: the base model that they were trained on: DiT, SD 2.1 or SDXL, in diffusers' form. (DiT's timestep
            embedding differs a little from that of the original code: the last frequency is 1e-4 instead of 1.07e-4.)
        guidance_range: of the training trajectories, which the checkpoint does not tell; None: theirs, U[1, 6] for DiT
            and U[1, 12] for SD 2.1 and SDXL.
        guided_channels: latent channels that the teacher guided; None: as theirs did, 3 of 4 for DiT (as the original
            DiT code), all for SD 2.1 and SDXL.
        scale_multiplier: their ``cfg_mult``; None: from ``config.yaml``. DiT's offset adapter needs it from either (the
            default of their training command is 1,000). For SD 2.1 and SDXL theirs cannot be set: 1,000. Their
            cross-attention adapter has no such factor.

    Raises:
        AdapterError: if the file is missing, damaged, holds anything but such tensors, or does not fit the base.
        ValueError: for a guidance range out of order, or a factor that is not a positive number.
    """
    path = Path(path)
    takes_prompts = base.adapter_input_dims()["prompt_dim"] is not None
    if guidance_range is None:
        guidance_range = (1.0, 12.0) if takes_prompts else (1.0, 6.0)
    if guided_channels is None:
        guided_channels = base.latent_shape[0] if takes_prompts else 3
    check_guidance_range(guidance_range)
    if scale_multiplier is not None and not 0 < scale_multiplier <= 1e6:
        raise ValueError(f"got scale_multiplier {scale_multiplier}, expected a positive number such as 1000")
    model = _read(path)
    by_site = {_our_site(site): tensors for site, tensors in model.items()}
    if len(by_site) < len(model):
        raise AdapterError(f"{path} names one attention layer twice: {', '.join(list(model)[:6])} ...")
    settings = _read_settings(path)
    first = next(iter(by_site.values()))
    kind = "cross-attention" if "q_proj.weight" in first else "offset"
    if "arch" in settings and _ARCHITECTURES.get(str(settings["arch"])) != kind:
        raise AdapterError(
            f"{path} holds {kind} adapters, but its config.yaml says arch: {settings['arch']!r}; expected "
            + " or ".join(f"{arch!r} ({ours})" for arch, ours in _ARCHITECTURES.items())
        )
    _check_prediction_type(settings, base, path)
    if scale_multiplier is None:
        scale_multiplier = 1.0 if kind == "cross-attention" else _multiplier(settings, path)
    dims = {f"{name}_dim": _input_dim(first, f"{name}_proj.weight") for name in ("timestep", "class", "prompt")}
    _check_settings(settings, first, dims, path)
    sites = {site: _site_width(tensors, kind, path, site) for site, tensors in by_site.items()}
    config = AdapterConfig(
        kind=kind,
        hidden_size=_length(first, "guidance_scale_embedder.net.0.frequencies", path),
        sites=sites,
        timestep_dim=dims["timestep_dim"],
        class_dim=dims["class_dim"],
        prompt_dim=dims["prompt_dim"],
        guidance_range=(float(guidance_range[0]), float(guidance_range[1])),
        base_name=base.name,
        base_revision=base.revision,
        base_fingerprint=base.fingerprint(),
        prediction_type=base.prediction_type,
        guided_channels=guided_channels,
        scale_multiplier=float(scale_multiplier),
    )
    tensors = {}
    for site, named in by_site.items():
        for name, tensor in named.items():
            if name not in _NAMES[kind]:
                raise AdapterError(
                    f"{path} holds {name!r} at {site}, which no {kind} adapter of the paper's authors has; only their "
                    "own checkpoints can be converted"
                )
            tensors[f"adapters.{site.replace('.', '/')}.{_NAMES[kind][name]}"] = tensor
    adapters = AdapterSet.from_tensors(config, tensors, f"{path} is not a whole set of {kind} adapters")
    adapters.check_fit(base)
    return adapters.to(base.device)


def _read(path: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors by site and name; tensors and strings are all that may come out of the file."""
    if not path.is_file():
        raise AdapterError(f"no checkpoint at {path}: the file does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle makes torch raise whatever its unpickler stumbles over
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise AdapterError(
            f"{path} cannot be read safely ({reason[0][:300]}): it is damaged, or its pickle holds more than tensors. "
            "Nothing of it was run; ask for the file as safetensors"
        ) from error
    model = content.get("model") if isinstance(content, Mapping) else None
    if not isinstance(model, Mapping) or not model:
        raise AdapterError(f"{path} holds no adapters: expected {{'model': {{site: {{name: tensor}}}}}}")
    for site, tensors in model.items():
        if not isinstance(site, str) or not isinstance(tensors, Mapping) or not tensors:
            raise AdapterError(f"{path} is malformed at {str(site)[:100]!r}: expected tensors by name")
        for name, tensor in tensors.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor) or not _is_whole(tensor):
                raise AdapterError(
                    f"{path} is malformed at {site}.{str(name)[:100]}: expected a tensor of finite floats"
                )
    return {site: dict(tensors) for site, tensors in model.items()}


def _is_whole(tensor: Tensor) -> bool:
    """Dense finite floats, each with bytes of its own in the file (a few bytes can claim to be a huge tensor)."""
    return (
        tensor.layout == torch.strided
        and tensor.is_floating_point()
        and tensor.device.type == "cpu"
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
        and bool(torch.isfinite(tensor).all())
    )


def _our_site(site: str) -> str:
    """The original DiT code's name of an attention layer as diffusers'; the UNets' names are diffusers' already."""
    match = re.fullmatch(r"blocks\.(\d+)\.attn", site)
    return f"transformer_blocks.{match[1]}.attn1" if match else site


def _read_settings(path: Path) -> dict[str, Any]:
    """Their ``config.yaml``, if there is one."""
    for candidate in (path.parent / "config.yaml", path.parent.parent / "config.yaml"):
        if candidate.is_file():
            if candidate.stat().st_size > MAX_JSON_BYTES:
                raise AdapterError(
                    f"{candidate} has {candidate.stat().st_size:,} bytes: it is not the authors', remove it"
                )
            try:
                settings = yaml.safe_load(candidate.read_text(encoding="utf-8"))
            except (yaml.YAMLError, ValueError, RecursionError) as error:
                raise AdapterError(f"{candidate} is not valid YAML ({error}); restore it, or remove it") from error
            if not isinstance(settings, dict):
                raise AdapterError(f"{candidate} holds a {type(settings).__name__}, expected settings by name")
            # only plain values are read, and told in messages: nested ones can say in a line what fills a disk
            return {
                name: value if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
                for name, value in settings.items()
                if isinstance(name, str)
            }
    return {}


def _multiplier(settings: Mapping[str, Any], path: Path) -> float:
    if "base_model" in settings:  # the training command for UNets, which leaves the factor at its default
        return 1000.0
    value = settings.get("cfg_mult")
    if value is None:
        raise AdapterError(
            f"the factor on the guidance scale of {path} is unknown: there is no config.yaml with cfg_mult. Pass "
            "scale_multiplier (the default of the authors' training command is 1000)"
        )
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1e6:
        raise AdapterError(f"the config.yaml of {path} gives cfg_mult: {value!r}, expected a number such as 1000")
    return float(value)


_PREDICTION_TYPES = {
    "stabilityai/stable-diffusion-2-1": "v_prediction",
    "stabilityai/stable-diffusion-xl-base-1.0": "epsilon",
}
"""Their ``base_model`` -> what it predicts. Models that predict otherwise can have the very same layers."""


def _check_prediction_type(settings: Mapping[str, Any], base: BaseModel, path: Path) -> None:
    trained_on = str(settings.get("base_model"))
    expected = _PREDICTION_TYPES.get(trained_on, base.prediction_type)
    if base.prediction_type != expected:
        raise AdapterError(
            f"{path} was trained on {trained_on}, which predicts {expected}, but {base.name} predicts "
            f"{base.prediction_type}: expected the base model that it was trained on"
        )


def _check_settings(
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor], dims: Mapping[str, int | None], path: Path
) -> None:
    found = {
        "hidden_dim": len(tensors.get("guidance_scale_embedder.net.0.frequencies", ())),
        "use_timestep": dims["timestep_dim"] is not None,
        "use_class_label": dims["class_dim"] is not None,
        "use_prompt": dims["prompt_dim"] is not None,
    }
    for name, value in found.items():
        if name in settings and settings[name] != value:
            raise AdapterError(
                f"the config.yaml of {path} says {name}: {settings[name]!r}, its tensors say {value}: one of the two is "
                "from another run"
            )


def _length(tensors: Mapping[str, Tensor], name: str, path: Path) -> int:
    tensor = tensors.get(name)
    if tensor is None or tensor.ndim != 1 or len(tensor) == 0:
        raise AdapterError(f"{path} lacks the vector {name}: not a checkpoint of the paper's authors")
    return len(tensor)


def _input_dim(tensors: Mapping[str, Tensor], name: str) -> int | None:
    tensor = tensors.get(name)
    return int(tensor.shape[-1]) if tensor is not None and tensor.ndim else None


def _site_width(tensors: Mapping[str, Tensor], kind: str, path: Path, site: str) -> int:
    name = "out_proj.bias" if kind == "cross-attention" else "out_proj.net.4.bias"
    try:
        return _length(tensors, name, path)
    except AdapterError as error:
        raise AdapterError(f"{error} (at {site})") from None
