"""The library's own exceptions. Bad arguments raise ``ValueError``; these are for files and models that do not fit."""


class AGDError(Exception):
    """Base class: catch it to catch every error below."""


class BaseModelError(AGDError):
    """A base model cannot be loaded, or is of a kind that this library does not handle."""


class AdapterError(AGDError):
    """Adapters do not fit a base model, or their files are damaged."""


class StoreError(AGDError):
    """A trajectory store is damaged, incomplete, or belongs to another run."""


class CheckpointError(AGDError):
    """A training checkpoint is damaged or belongs to another run."""


class WriteError(AGDError):
    """A file could not be written (disk full, no permission); nothing half-written is left behind."""


class FolderInUseError(AGDError):
    """Another process is writing to the same folder."""


class PromptError(AGDError):
    """Prompts cannot be read or fetched."""
