"""What training, collection, and decoding will take of a device's memory, counted before anything is loaded.

The real code of the library runs once on *fake* tensors, which have shapes and storages but no values (torch's
``FakeTensorMode``), and every storage is noted from its birth to its death. Nothing is estimated from tables: what
autograd saves, what gradient checkpointing gives up and how attention is fused is what the model really does. Attention
is counted as its fused kernels do it on the processor, flash attention, which keeps queries, keys, values, output and one
number per query, as the CUDA kernels do; no matrix of scores ever exists.

Not counted is what is not a tensor: the CUDA context, the libraries' workspaces, gaps in the allocator's blocks. See
:data:`RESERVED`.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .attach import AdapterSet
from .base_models import BaseModel, StableDiffusionBase, StableDiffusionXLBase
from .budget import gpu_memory_gib
from .guidance import CFG
from .training import Student, TrainingSettings, optimizers

ModuleT = TypeVar("ModuleT", bound=nn.Module)

GIB = 2**30

RESERVED = 1.0
"""GiB of a card left to what :class:`Memory` does not count. A round allowance, not a measurement."""


@dataclass(frozen=True)
class MemorySettings:
    """What memory can be saved by, and at what price.

    Attributes:
        dtype: of the base model; adapters, gradients and optimiser are in float32 all the same. bfloat16 halves the
            weights and what is saved of them for backward; collection wants float32.
        gradient_checkpointing: training computes each block again in backward: about a forward pass more a step.
        offload: text encoders and autoencoder stay in the computer's memory until they are called, and the denoiser makes
            room for them then, see :func:`agd_lib.base_models.load_base`. Training never calls them.
    """

    dtype: torch.dtype = torch.float32
    gradient_checkpointing: bool = False
    offload: bool = False

    def __str__(self) -> str:
        parts = [f"base in {str(self.dtype).removeprefix('torch.')}"]
        parts += ["gradient checkpointing"] * self.gradient_checkpointing
        parts += ["text encoders and autoencoder off the device"] * self.offload
        return ", ".join(parts)


@dataclass(frozen=True)
class Memory:
    """Bytes on the device at the moment when most is there. The parts are those of that moment, and add up.

    Attributes:
        base: the denoiser's frozen weights. other_models: text encoders and autoencoder.
        adapters, optimizer: their weights, and Adam's two moments. gradients: those that exist at that moment.
        activations: what the forward pass saved for the backward pass and is still there.
        transient: everything else: inputs, and what a layer makes and throws away (with gradient checkpointing, also
            the block that is being computed again).
        saved: activations when the forward pass ended, whether or not that was the moment. Not part of the sum.
        moment: ``"forward"``, ``"backward"`` or ``"optimizer step"``; of decoding and encoding ``"call"``.
    """

    base: int
    other_models: int
    adapters: int
    optimizer: int
    gradients: int
    activations: int
    transient: int
    saved: int
    moment: str

    PARTS = ("base", "other_models", "adapters", "optimizer", "gradients", "activations", "transient")

    @property
    def total(self) -> int:
        """The peak, in bytes."""
        return sum(getattr(self, part) for part in self.PARTS)

    def fits(self, gpu_memory: float) -> bool:
        """Whether it fits a card of ``gpu_memory`` GiB, :data:`RESERVED` left free."""
        return self.total <= (gpu_memory - RESERVED) * GIB

    def __str__(self) -> str:
        parts = ((part.replace("_", " "), getattr(self, part)) for part in self.PARTS)
        return f"{self.total / GIB:.2f} GiB in the {self.moment}: " + ", ".join(
            f"{name} {size / GIB:.2f}" for name, size in parts if size
        )


@dataclass(frozen=True)
class Prediction:
    """What a step takes with some settings.

    Attributes:
        settings: see :class:`MemorySettings`. memory: see :class:`Memory`.
        flops: of the step, multiply and add counted apart; a layer that is computed twice counts twice.
    """

    settings: MemorySettings
    memory: Memory
    flops: int

    def __str__(self) -> str:
        return f"{self.settings}: {self.memory}; {self.flops / 1e12:.2f} TFLOP a step"


_aten = torch.ops.aten
_FLOPS = flop_registry | {
    # torch's counter knows flash attention by its names on GPUs
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}


class LiveStorages(TorchDispatchMode):
    """Notes every storage that operations make while it is active, with its birth and its death, fake or real.

    Storages that were there before are told by :meth:`name`.

    Attributes:
        flops: of the operations so far. (torch's ``FlopCounterMode`` counts the same, but its hooks keep what gradient
            checkpointing computes again alive.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self._alive: dict[int, _Storage] = {}
        self._all: list[_Storage] = []
        self._clock = itertools.count(1)
        self._moments: list[tuple[int, str]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in _FLOPS:
            self.flops += _FLOPS[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return result

    def _note(self, tensor: Tensor) -> _Storage:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            noted = self._alive[key] = _Storage(storage.nbytes(), next(self._clock))
            self._all.append(noted)
            weakref.finalize(storage, self._died, key)
        return self._alive[key]

    def _died(self, key: int) -> None:
        self._alive.pop(key).died = next(self._clock)

    def name(self, tensors: Iterable[Tensor | None], name: str) -> None:
        """Give the storages of these tensors a name, those that are not known yet too."""
        for tensor in tensors:
            if tensor is not None:
                self._note(tensor).name = name

    def name_the_rest(self, name: str) -> None:
        """Give a name to all storages that are alive and have none."""
        for storage in self._alive.values():
            storage.name = storage.name or name

    def begin(self, moment: str) -> None:
        """What follows is called so in :meth:`peak`."""
        self._moments.append((next(self._clock), moment))

    def peak(self) -> tuple[dict[str, int], str]:
        """When most bytes were alive: bytes by name (those without are under ``""``), and the moment's name."""
        changes = [(storage.born, storage.size) for storage in self._all]
        changes += [(storage.died, -storage.size) for storage in self._all if storage.died is not None]
        level, highest, when = 0, -1, 0
        for time, change in sorted(changes):
            level += change
            if level > highest:
                highest, when = level, time
        sizes: dict[str, int] = {}
        for storage in self._all:
            if storage.born <= when and (storage.died is None or storage.died > when):
                sizes[storage.name] = sizes.get(storage.name, 0) + storage.size
        moment = [name for start, name in self._moments if start <= when]
        return sizes, moment[-1] if moment else ""

    def alive(self, name: str) -> int:
        """Bytes alive now under this name."""
        return sum(storage.size for storage in self._alive.values() if storage.name == name)


@dataclass
class _Storage:
    size: int
    born: int
    died: int | None = None
    name: str = ""


def training_memory(
    base: BaseModel, adapters: AdapterSet, batch_size: int, settings: MemorySettings | None = None
) -> Prediction:
    """The peak of Algorithm 2, :func:`agd_lib.training.train`, on one device, from a step on fake tensors.

    Args:
        base, adapters: what would be trained; only their configurations are read, so both may be on the meta device.
        batch_size: recorded states per step on this device.
        settings: those of the run to be predicted, whatever ``base`` itself is in.

    Raises:
        ValueError: if the batch size is below 1.
    """
    settings = settings or MemorySettings()
    _check_batch_size(batch_size)
    with FakeTensorMode():
        blank = _blank_copy(base, settings.dtype)
        with torch.device("meta"):
            blank_adapters = AdapterSet(adapters.config)
        student = Student(blank, _fake(blank_adapters), settings.gradient_checkpointing)
        return _predict(base, settings, lambda tracker: training_step(student, batch_size, tracker))


def training_step(student: Student, batch_size: int, tracker: LiveStorages) -> int:
    """One step as training takes it once it is under way, on zeros. Returns what the forward pass saved, in bytes."""
    base, adapters = student.base, student.adapters
    parameters = list(adapters.parameters())
    tracker.name([*base.denoiser.parameters(), *base.denoiser.buffers()], "base")
    tracker.name([*parameters, *adapters.buffers()], "adapters")
    (optimizer,) = optimizers(adapters, TrainingSettings())
    for parameter in parameters:  # a first step, which makes the moments
        parameter.grad = torch.zeros_like(parameter)
    tracker.name((parameter.grad for parameter in parameters), "gradients")
    optimizer.step()
    optimizer.zero_grad()
    tracker.name((value for state in optimizer.state.values() for value in state.values()), "optimizer")
    tracker.begin("forward")
    latents, target = (torch.zeros(batch_size, *base.latent_shape) for _ in range(2))
    timestep, condition = torch.zeros(batch_size, dtype=torch.int64), base.blank_condition(batch_size)
    tracker.name([latents, target, timestep, *condition.values()], "inputs")
    prediction = student(latents, timestep, condition, guidance_scale=1.0)
    loss = (prediction - target).square().flatten(1).mean(dim=1).mean()
    tracker.name_the_rest("activations")
    saved = tracker.alive("activations")
    tracker.begin("backward")
    gradients_as_they_come = [
        parameter.register_post_accumulate_grad_hook(lambda p: tracker.name([p.grad], "gradients"))
        for parameter in parameters
    ]
    loss.backward()
    tracker.begin("optimizer step")
    optimizer.step()
    for handle in gradients_as_they_come:
        handle.remove()
    optimizer.zero_grad()
    return saved


def settings_that_fit(
    base: BaseModel, adapters: AdapterSet, batch_size: int, gpu_memory: float | None = None
) -> Iterator[Prediction]:
    """The settings with which training fits a card, the fastest first; among equals, those that change least come first.

    They are predicted one after another: whoever wants the fastest alone, ``next(settings_that_fit(...), None)``, need not
    wait for the rest.

    Args:
        base, adapters, batch_size: see :func:`training_memory`.
        gpu_memory: of the card, in GiB; None: this machine's largest. :data:`RESERVED` of it is left free.

    Raises:
        ValueError: if the batch size is below 1, or no card is given and there is none.
    """
    gpu_memory = gpu_memory_gib() if gpu_memory is None else gpu_memory
    if gpu_memory <= 0:
        raise ValueError(f"got {gpu_memory:g} GiB of a GPU's memory, expected more: pass gpu_memory, such as 24")
    _check_batch_size(batch_size)
    return _settings_that_fit(base, adapters, batch_size, gpu_memory)


def _settings_that_fit(
    base: BaseModel, adapters: AdapterSet, batch_size: int, gpu_memory: float
) -> Iterator[Prediction]:
    # checkpointing computes more; dtype and offloading do not
    for gradient_checkpointing, dtype in itertools.product((False, True), (torch.float32, torch.bfloat16)):
        on_device = training_memory(base, adapters, batch_size, MemorySettings(dtype, gradient_checkpointing))
        offloaded = replace(
            on_device,
            settings=replace(on_device.settings, offload=True),
            memory=replace(on_device.memory, other_models=0),
        )
        yield from (prediction for prediction in (on_device, offloaded) if prediction.memory.fits(gpu_memory))


def collection_memory(base: BaseModel, batch_size: int, settings: MemorySettings | None = None) -> Prediction:
    """The peak of Algorithm 1, :func:`agd_lib.trajectories.collect`, on one device: one guided step on fake tensors.

    And of sampling with CFG, which takes the same steps. The flops are those of one. For what prompts and images take see
    :func:`encoding_memory` and :func:`decoding_memory`: the most of the three is needed.

    Args:
        base: only its configuration is read. batch_size: trajectories side by side; each makes two forward passes.

    Raises:
        ValueError: if the batch size is below 1.
    """
    settings = settings or MemorySettings()
    _check_batch_size(batch_size)
    with FakeTensorMode():
        blank = _blank_copy(base, settings.dtype)
        return _predict(base, settings, lambda tracker: collection_step(blank, batch_size, tracker))


@torch.no_grad()
def collection_step(base: BaseModel, batch_size: int, tracker: LiveStorages) -> int:
    """One step of the guided sampler on zeros. Returns 0: nothing is saved for backward."""
    tracker.name([*base.denoiser.parameters(), *base.denoiser.buffers()], "base")
    tracker.begin("forward")
    latents = torch.zeros(batch_size, *base.latent_shape, dtype=base.dtype)
    teacher = CFG(1.0)
    conditional, unconditional = teacher.both(base, latents, 0, base.blank_condition(batch_size))
    target = teacher.combine(unconditional, conditional, torch.ones(batch_size, dtype=base.dtype))
    (target - conditional).float().square().flatten(1).mean(dim=1)
    return 0


def decoding_memory(base: BaseModel, settings: MemorySettings | None = None) -> Memory:
    """The peak of ``base.decode`` on one device, of any number of images: it takes ``base.images_at_once`` of them at a time.

    The images themselves are not counted, 12 MiB for each of 1024 x 1024 pixels.

    Args:
        base: only its configuration is read.
    """
    settings = settings or MemorySettings()
    upcast = (
        isinstance(base, StableDiffusionXLBase) and settings.dtype == torch.float16 and base.vae.config.force_upcast
    )
    dtype = torch.float32 if upcast else settings.dtype
    with FakeTensorMode():
        with torch.device("meta"):
            autoencoder = type(base.vae).from_config(base.vae.config)
        vae, latents = (
            _fake(autoencoder, dtype).eval(),
            torch.zeros(base.images_at_once, *base.latent_shape, dtype=dtype),
        )
        return _predict_visit(base, settings, [vae], lambda: vae.decode(latents).sample.float())


def encoding_memory(base: StableDiffusionBase, settings: MemorySettings | None = None) -> Memory:
    """The peak of ``base.encode`` on one device, of any number of prompts: it takes 32 of them at a time.

    What it returns is not counted: 0.6 MB for each of SDXL's prompts.

    Args:
        base: only its configuration is read.
    """
    settings = settings or MemorySettings()
    with FakeTensorMode():
        with torch.device("meta"):
            blank = [type(encoder)(encoder.config) for encoder in base._text_encoders()]
        encoders: list[Any] = [_fake(encoder, settings.dtype).eval() for encoder in blank]
        tokens = [
            torch.zeros(base.PROMPTS_AT_ONCE, encoder.config.max_position_embeddings, dtype=torch.int64)
            for encoder in encoders
        ]

        def encode() -> None:
            embeddings = []
            for encoder, ids in zip(encoders, tokens):
                embeddings.append(encoder(ids, output_hidden_states=True).hidden_states[-2])

        return _predict_visit(base, settings, encoders, encode)


@torch.no_grad()
def _predict_visit(
    base: BaseModel, settings: MemorySettings, visitors: Sequence[nn.Module], call: Callable[[], object]
) -> Memory:
    """The peak of a call of models that are on the device for its time alone, if ``settings.offload``."""
    with LiveStorages() as tracker:
        tracker.name((p for visitor in visitors for p in visitor.parameters()), "weights")
        call()
    sizes, _ = tracker.peak()
    weights = sizes.pop("weights")
    return Memory(
        base=0 if settings.offload else sum(p.numel() for p in base.denoiser.parameters()) * settings.dtype.itemsize,
        other_models=weights if settings.offload else _other_models(base, settings.dtype),
        adapters=0,
        optimizer=0,
        gradients=0,
        activations=0,
        transient=sum(sizes.values()),
        saved=0,
        moment="call",
    )


def _predict(base: BaseModel, settings: MemorySettings, step: Callable[[LiveStorages], int]) -> Prediction:
    with LiveStorages() as tracker:
        saved = step(tracker)
    sizes, moment = tracker.peak()
    named = {part: sizes.get(part, 0) for part in ("base", "adapters", "optimizer", "gradients", "activations")}
    memory = Memory(
        **named,
        other_models=0 if settings.offload else _other_models(base, settings.dtype),
        transient=sum(sizes.values()) - sum(named.values()),
        saved=saved,
        moment=moment,
    )
    return Prediction(settings, memory, tracker.flops)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"got batch size {batch_size}, expected at least 1")


def _blank_copy(base: BaseModel, dtype: torch.dtype) -> BaseModel:
    """The same architecture on fake tensors."""
    blank = copy.copy(base)
    blank.name = f"{base.name}, without values"
    with torch.device("meta"):
        denoiser = type(base.denoiser).from_config(base.denoiser.config)
    blank.denoiser = _fake(denoiser, dtype).eval().requires_grad_(False)
    # the null condition of a text-to-image model would be encoded, by encoders that may not be there
    blank.null_condition = blank.blank_condition  # type: ignore[method-assign]
    return blank


def _fake(module: ModuleT, dtype: torch.dtype = torch.float32) -> ModuleT:
    """A module from the meta device with fake tensors in the place of its own."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            part.register_parameter(name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = torch.empty(buffer.shape, dtype=dtype if buffer.is_floating_point() else buffer.dtype)
    return module


def _other_models(base: BaseModel, dtype: torch.dtype) -> int:
    """Bytes of the text encoders and the autoencoder in ``dtype``."""
    models = [part for part in base.pipeline.components.values() if isinstance(part, nn.Module)]
    return sum(p.numel() * dtype.itemsize for part in models if part is not base.denoiser for p in part.parameters())
