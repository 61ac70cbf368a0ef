"""Tells whether what was read from many places is there still, in a twentieth of the time of reading it again."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter, eq, is_
from typing import Any

from torch import Tensor


class Watch:
    """Places, and what was in them when they were noted. It keeps all of it alive.

    Its loops run in C. A module's attributes are in ``module.__dict__``, its parameters in ``module._parameters``, its
    children in ``module._modules``. A key that a dictionary does not have counts as one with the value None. A copy
    does not hold, for the places of a copied module are others.
    """

    def __init__(self) -> None:
        self._same: tuple[list[dict], list[Any], list[Any]] = ([], [], [])
        self._equal: tuple[list[dict], list[Any], list[Any]] = ([], [], [])
        self._types: tuple[list[object], list[type]] = ([], [])
        self._trained: tuple[list[Any], list[bool]] = ([], [])
        self._fixed: tuple[list[Any], list[int]] = ([], [])

    def __reduce__(self) -> tuple[Callable[[], Watch], tuple]:
        return _lapsed, ()

    def same(self, places: dict, *keys: Any) -> None:
        """Expects the very objects that are under ``keys`` now."""
        for key in keys:
            _append(self._same, places, key, places.get(key))

    def equal(self, places: dict, key: Any, value: Any) -> None:
        """Expects something equal to ``value``, which nothing may change later."""
        _append(self._equal, places, key, value)

    def type_of(self, value: object) -> None:
        """Expects that ``value`` keeps its class."""
        _append(self._types, value, type(value))

    def trained(self, tensor: Tensor) -> None:
        """Expects that ``tensor.requires_grad`` stays."""
        _append(self._trained, tensor, tensor.requires_grad)

    def address(self, tensor: Tensor) -> None:
        """Expects that ``tensor`` keeps its memory."""
        _append(self._fixed, tensor, tensor.data_ptr())

    def holds(self) -> bool:
        """Whether everything is as it was noted."""
        places, keys, values = self._same
        if not all(map(is_, map(dict.get, places, keys), values)):
            return False
        objects, types = self._types
        if not all(map(is_, map(type, objects), types)):
            return False
        tensors, trained = self._trained
        if not all(map(is_, map(_requires_grad, tensors), trained)):
            return False
        tensors, addresses = self._fixed
        if not all(map(eq, map(Tensor.data_ptr, tensors), addresses)):
            return False
        places, keys, values = self._equal
        return all(map(eq, map(dict.get, places, keys), values))


def _lapsed() -> Watch:
    watch = Watch()
    watch.equal({}, "", "")
    return watch


_requires_grad = attrgetter("requires_grad")


def _append(lists: tuple[list, ...], *values: Any) -> None:
    for one, value in zip(lists, values, strict=True):
        one.append(value)
