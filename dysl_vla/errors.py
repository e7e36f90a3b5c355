"""The exceptions that a user can meet. Every message says what was wrong and how to fix it.

Programming mistakes are not among them: those stay `TypeError`, `AssertionError` and the like, with a traceback.
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
    """An action that must not be executed: of another dimension, NaN or infinite."""


class RenderingError(DyslError):
    """No working OpenGL on this machine, so cameras cannot be rendered."""


class RobotFault(DyslError):  # noqa: N818 # the field's word
    """A robot, a driver or a server that does not answer, or answers what cannot be true."""


class SafetyStop(DyslError):  # noqa: N818 # the field's word
    """The reason for which a robot was stopped at once."""
