"""Error classes: what was wrong, where, and what to do next, in one message.

Every error is also a builtin, so that a caller who knows nothing of tilepipe can still catch it.
The command line prints the message and exits with 1; ``--debug`` shows the traceback.
"""


class TilepipeError(Exception):
    """Anything that tilepipe says no to."""


class SpecError(TilepipeError, ValueError):
    """Settings that contradict each other or are out of range."""


class SlideError(TilepipeError, ValueError):
    """An input image that cannot be read as asked."""


class DamageError(SlideError):
    """Pixels of an input that cannot be decoded; names file, level, tile and pixel box."""


class PlanError(TilepipeError, ValueError):
    """A job that cannot run as asked; nothing has been written yet."""


class ModelError(TilepipeError, ValueError):
    """A network that is unknown, or cannot be built or run as asked."""


class ShapeError(ModelError):
    """An input of a size that the network cannot take; names the next legal one."""


class CheckpointError(ModelError):
    """Weights that cannot be read, do not fit, or would execute code."""


class StoreError(TilepipeError, OSError):
    """An output that cannot be created, read or written."""


class MismatchError(StoreError):
    """An output that belongs to another job: other model, weights, plan or input."""


class JournalError(StoreError):
    """A journal record that cannot be believed."""


class ScheduleError(TilepipeError, RuntimeError):
    """A scheduler or worker that cannot be reached or keeps failing."""


class UnitsFailedError(TilepipeError, RuntimeError):
    """Some units of a job kept failing; the others are done and the store says so."""


class VerifyError(TilepipeError, RuntimeError):
    """A finished result that does not equal what it should be."""


class TrainError(TilepipeError, ValueError):
    """Training that cannot start or go on."""


class ExportError(TilepipeError, ValueError):
    """A result that cannot be written in the form asked for."""
