"""Makes all models that PEFT builds rank-sparse, by one call at the top of a script."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sparse_unsloth.rank.application import apply
from sparse_unsloth.rank.config import RankConfig, RankError

_undo: list[Callable[[], None]] = []


def patch(target_density: float = 0.08, importance_lambda: float = 1.0, **options: Any) -> Callable[[], None]:
    """Makes every trainable LoRA model that PEFT builds from now on rank-sparse, as `apply` does.

    It replaces ``peft.PeftModel.__init__`` in the whole process, so the order of imports does not matter. Loading an
    adapter for training (``PeftModel.from_pretrained(..., is_trainable=True)``) also loads its rank state. Models for
    inference and other types of adapters stay unchanged. `apply` does the same for one model.

    Args:
        target_density, importance_lambda, options: see `RankConfig`.

    Returns:
        A function that undoes the patch; models built in between stay rank-sparse.

    Raises:
        RankError: wrong options, or patched already.
    """
    from peft import LoraConfig, PeftModel

    config = RankConfig.from_any({"target_density": target_density, "importance_lambda": importance_lambda} | options)
    if _undo:
        raise RankError("rank.patch() was called already; call the function that it returned first.")
    original = PeftModel.__init__

    @functools.wraps(original)
    def init(self: PeftModel, model: Any, peft_config: Any, adapter_name: str = "default", *args: Any, **kwargs: Any):
        original(self, model, peft_config, adapter_name, *args, **kwargs)
        if isinstance(peft_config, LoraConfig) and not peft_config.inference_mode:
            apply(self, adapter=adapter_name, **vars(config))

    def undo() -> None:
        if PeftModel.__init__ is init:
            PeftModel.__init__ = original
        _undo.clear()

    PeftModel.__init__ = init
    _undo.append(undo)
    return undo
