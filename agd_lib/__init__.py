"""Adapter Guidance Distillation: classifier-free guidance in one forward pass a step.

The names below load on first use, so that ``import agd_lib`` stays quick.
"""

from importlib import import_module
from typing import Any

_NAMES = {
    "AGD": "guidance",
    "CFG": "guidance",
    "GuidanceInterval": "guidance",
    "Unguided": "guidance",
    "AdapterSet": "attach",
    "load_base": "base_models",
    "base_from_pipeline": "base_models",
    "count_forwards": "base_models",
    "sample": "sampling",
    "generate": "sampling",
    "CollectionPlan": "trajectories",
    "TrajectoryStore": "trajectories",
    "collect": "trajectories",
    "TrainingSettings": "training",
    "train": "training",
    "evaluate": "evaluation",
    "convert_authors_checkpoint": "convert",
    "load_agd": "dropin",
}

__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'agd_lib' has no attribute {name!r}")
    return getattr(import_module(f".{_NAMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
