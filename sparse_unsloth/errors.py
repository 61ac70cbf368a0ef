"""Defines the errors that users meet: each message names the cause and the fix."""


class SparsityError(ValueError):
    """The base class of all errors that this package raises on purpose."""


class ConfigError(SparsityError):
    """The sparsity configuration is wrong, or does not fit the model."""


class AttachError(SparsityError):
    """The model, or one of its layers, cannot be made sparse as requested."""


class EstimatorError(SparsityError):
    """The estimator is missing, damaged, or made for another model."""


class BackendError(SparsityError):
    """The backend cannot run here, or cannot load what was requested."""


class CalibrationError(SparsityError):
    """The samples cannot calibrate sparsity, or a budget cannot be kept."""


class InstallError(SparsityError):
    """An optional library is missing; the message names the extra that brings it."""


class DataError(SparsityError):
    """Data or a model file is missing, cannot be read, or has a form that cannot be trained on."""


class RecipeError(SparsityError):
    """A recipe or command-line value cannot be used; the message lists every problem."""
