"""Every error a user can meet.

    SrppoError
    ├── ConfigError        recipe: unknown key, wrong type, impossible combination   (ValueError)
    ├── DataError          data sets, rows, columns, prompts                         (ValueError)
    ├── ModelError         model directories, tokenizers, vocabularies               (ValueError)
    ├── TrainingError      training that cannot go on: bad numbers, no memory (ArithmeticError)
    ├── EngineError        rollout engines: absent, slow, or giving what is no response  (OSError)
    ├── ProcessError       one of several processes is gone                        (RuntimeError)
    ├── RunDirError        run directories: occupied, not writable, disk full        (OSError)
    ├── PublishError       models that cannot be written out or pushed to the hub        (OSError)
    ├── JudgeError         a judge that cannot be asked                              (OSError)
    ├── ServeError         scoring servers that cannot start, or cannot be reached   (OSError)
    └── ShapeError         tensors whose shapes do not fit together                  (ValueError)

A message names the value, the consequence and the cure. The command line prints it and exits
with code 2; anything else that escapes is a bug of ours.
"""


class SrppoError(Exception):
    """Base of all errors that this package raises on purpose."""

    exit_code = 2
    """The command line's, in each of several processes."""


class ConfigError(SrppoError, ValueError):
    """A recipe that cannot be run."""


class DataError(SrppoError, ValueError):
    """Demonstrations or prompts that cannot be used."""


class ModelError(SrppoError, ValueError):
    """A model or tokenizer that cannot be loaded or does not fit its role."""


class TrainingError(SrppoError, ArithmeticError):
    """Training that would go on for nothing, or cannot."""


class EngineError(SrppoError, OSError):
    """A rollout engine that cannot be reached, or whose responses cannot be trained on."""


class ProcessError(SrppoError, RuntimeError):
    """Another process of the same run went away."""


class RunDirError(SrppoError, OSError):
    """A run directory that cannot be written or belongs to another run."""


class PublishError(SrppoError, OSError):
    """A model that cannot be written to another place, or that the hub does not take."""


class JudgeError(SrppoError, OSError):
    """A judge that refuses to be asked, or that is not there."""


class ServeError(SrppoError, OSError):
    """A scoring server that cannot be started, be reached, or do what it was asked."""


class ShapeError(SrppoError, ValueError):
    """Tensors whose shapes do not fit together."""
