"""The errors that users meet: each message names the cause and the fix."""


class SparsityError(ValueError):
    """Base of every error that this package raises on purpose."""


class ConfigError(SparsityError):
    """A sparsity configuration that is wrong in itself, or does not fit the model."""


class AttachError(SparsityError):
    """A model, or one of its layers, that cannot be made sparse as asked."""


class EstimatorError(SparsityError):
    """Estimator factors that are missing, damaged, or made for another model."""


class BackendError(SparsityError):
    """A backend that cannot run here, or cannot load what was asked."""


class CalibrationError(SparsityError):
    """Samples that sparsity cannot be calibrated on, or a budget that cannot be kept."""


class DataError(SparsityError):
    """Data or a model file that is missing, out of reach, or not in a form that can be trained on."""


class RecipeError(SparsityError):
    """A recipe, or a value given on the command line, that cannot be used; the message lists every problem."""
