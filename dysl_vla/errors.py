"""The exceptions a user can meet. Every message says what was wrong and how to mend it.

Not for programming mistakes: those stay `TypeError`, `AssertionError` and the like, with a traceback.
"""


class DyslError(Exception):
    """Root of everything that this package raises on purpose."""


class ConfigError(DyslError):
    """A name, option or combination of options that cannot work."""


class CheckpointError(DyslError):
    """A checkpoint that is missing, damaged, foreign or edited."""


class DatasetError(DyslError):
    """Demonstrations that are missing, damaged or of another shape than needed."""


class MissingExtraError(DyslError):
    """A part of the package whose optional dependencies are not installed."""


class ObservationError(DyslError):
    """An observation that does not fit what the policy was built for."""


class ActionError(DyslError):
    """An action that no world should be given: wrong dimension, NaN or infinity."""


class RenderingError(DyslError):
    """No working OpenGL on this machine, so cameras cannot be rendered."""


class RobotFault(DyslError):  # noqa: N818 # the field's word
    """A robot that does not answer, or answers what cannot be."""


class SafetyStop(DyslError):  # noqa: N818 # the field's word
    """A reason to stop a robot at once; it was stopped."""
