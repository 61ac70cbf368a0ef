"""Operators of Triton's interpreter that work out the types of a result once; values and types are Triton's.

Triton's own take 30 to 100 microseconds for an operation on a few numbers, nearly all of it to compare and promote the
types of the operands. Here the first operation on two types is Triton's, and later ones are NumPy's function and the
types that the first one found.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import triton.language as tl
from triton._C.libtriton import interpreter as native
from triton.runtime import interpreter

FLOATS, INTEGERS, TRUTHS = {tl.float32.name}, {tl.int32.name, tl.int64.name}, {tl.int1.name}
NUMBERS = FLOATS, INTEGERS


def _quotient(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return (left - np.fmod(left, right)) // right  # rounds to zero


OPERATORS = {
    "add": (np.add, NUMBERS), "sub": (np.subtract, NUMBERS), "mul": (np.multiply, NUMBERS),
    "truediv": (np.divide, (FLOATS,)), "floordiv": (_quotient, (INTEGERS,)), "mod": (np.fmod, (INTEGERS,)),
    "and": (np.bitwise_and, (TRUTHS,)), "or": (np.bitwise_or, (TRUTHS,)),
    "lt": (np.less, NUMBERS), "le": (np.less_equal, NUMBERS), "gt": (np.greater, NUMBERS),
    "ge": (np.greater_equal, NUMBERS), "eq": (np.equal, NUMBERS), "ne": (np.not_equal, NUMBERS),
}  # fmt: skip
"""By name: the function that Triton's interpreter calls too, and which elements both operands may then have."""
REFLECTED = "add", "sub", "mul", "truediv"
own: dict[str, Callable] = {}
"""Triton's, by name, of all that is replaced."""
_constants: dict[tuple, tl.tensor | None] = {}
_fills: dict[tuple, np.ndarray] = {}
HINTS = {"cache_modifier", "eviction_policy"}
"""What the interpreter takes no notice of."""
_WHOLE = slice(None)


def install() -> None:
    """Puts them in place of those of `triton.language` that Triton's interpreter has patched."""
    for name, (function, elements) in OPERATORS.items():
        _replace(tl.tensor, f"__{name}__", partial(_binary, function, elements, name == "add"))
        if name in REFLECTED:
            reflected = partial(_swapped, function)
            _replace(tl.tensor, f"__r{name}__", partial(_binary, reflected, elements, name == "add"))
    _replace(tl.tensor, "__getitem__", _index)
    _replace(tl.tensor, "to", _convert)
    _replace(tl, "where", _where)
    _replace(tl, "load", _load)
    _replace(tl, "store", _store)


def _replace(place: object, name: str, quick: Callable) -> None:
    own[name] = getattr(place, name)
    setattr(place, name, quick(own[name]))


def _swapped(function: Callable, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return function(right, left)


def _tensor(data: np.ndarray, element: tl.dtype, known: dict) -> tl.tensor:
    """``element``: of the handle, which for truths is that of what was compared."""
    handle = object.__new__(interpreter.TensorHandle)
    handle.data, handle.dtype, handle.attr = data, element, {}
    tensor = object.__new__(tl.tensor)
    tensor.__dict__.update(known)
    tensor.handle = handle
    return tensor


def _known(tensor: tl.tensor) -> tuple[tl.dtype, dict]:
    """What `_tensor` needs beside the data."""
    return tensor.handle.dtype, {name: value for name, value in tensor.__dict__.items() if name != "handle"}


def _plans(type_: tl.dtype, call: object) -> dict:
    """What ``call`` has found for a first operand of this type: by the identities of the others' types.

    Each plan ends with these types, so that no other has their identities.
    """
    found = type_.__dict__.get("_plans")
    if found is None:
        found = type_._plans = {}
    return found.setdefault(call, {})


def _constant(value: float, element: tl.dtype) -> tl.tensor | None:
    """A scalar of that element, or None where Triton would compute in another."""
    if element.name not in FLOATS | INTEGERS or value != value:
        return None
    key = value.__class__, value, element.name
    if key not in _constants:
        semantic, name = interpreter.interpreter_semantic, element.name
        scalar = semantic.to_tensor(value)
        fits = scalar.type.name in (name, tl.int32.name)
        _constants[key] = semantic.cast(scalar, element) if fits else None
    return _constants[key]


def _binary(function: Callable, elements: tuple[set[str], ...], moves: bool, slow: Callable) -> Callable:
    """``slow``, an operator of two operands; ``moves``: it adds offsets to pointers."""
    key = object()

    def quick(self, other):
        given = other
        if given.__class__ is tl.constexpr:
            given = given.value
        if given.__class__ is int or given.__class__ is float:
            given = _constant(given, tl.int32 if self.dtype.is_ptr() else self.dtype)
        if given.__class__ is not tl.tensor:
            return slow(self, other)
        plans = _plans(self.type, key)
        plan = plans.get(id(given.type))
        if plan is None:
            result = slow(self, other)
            left, right = self.dtype.name, given.dtype.name
            if moves and self.dtype.is_ptr() and right in INTEGERS:
                width = max(1, self.dtype.element_ty.primitive_bitwidth // 8)
                plans[id(given.type)] = (partial(_moved, width), *_known(result), given.type)
            elif any(left in kind and right in kind for kind in elements):
                element, known = _known(result)
                plans[id(given.type)] = (function, None if left in TRUTHS else element, known, given.type)
            else:
                plans[id(given.type)] = (None, None, None, given.type)
            return result
        operation, element, known, _ = plan
        if operation is None:
            return slow(self, other)
        handle = self.handle
        return _tensor(operation(handle.data, given.handle.data), element or handle.dtype, known)

    return quick


def _moved(width: int, pointers: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    return pointers + width * offsets.astype(np.uint64)


def _index(slow: Callable) -> Callable:
    keys = [object(), object()]

    def quick(self, slices):
        if slices.__class__ is not tuple or len(slices) != 2 or len(self.shape) != 1:
            return slow(self, slices)
        axis = 0 if slices[0] is None else 1
        if slices[axis] is not None or slices[1 - axis] != _WHOLE:
            return slow(self, slices)
        plans = _plans(self.type, keys[axis])
        if not plans:
            result = slow(self, slices)
            plans[None] = _known(result)[1]
            return result
        data = self.handle.data
        return _tensor(data[None] if axis == 0 else data[:, None], self.handle.dtype, plans[None])

    return quick


def _convert(slow: Callable) -> Callable:
    def quick(self, dtype, *others, **named):
        return self if dtype is self.dtype and not others and not named else slow(self, dtype, *others, **named)

    return quick


def _where(slow: Callable) -> Callable:
    key = object()

    def quick(condition, x, y):
        if condition.__class__ is not tl.tensor or condition.dtype.name not in TRUTHS:
            return slow(condition, x, y)
        left, right = (one.value if one.__class__ is tl.constexpr else one for one in (x, y))
        if left.__class__ is tl.tensor and right.__class__ in (int, float):
            right = _constant(right, left.dtype)
        elif right.__class__ is tl.tensor and left.__class__ in (int, float):
            left = _constant(left, right.dtype)
        if left.__class__ is not tl.tensor or right.__class__ is not tl.tensor:
            return slow(condition, x, y)
        plans = _plans(condition.type, key)
        types = id(left.type), id(right.type)
        plan = plans.get(types)
        if plan is None:
            result = slow(condition, x, y)
            fits = left.dtype.name == right.dtype.name and left.dtype.name in FLOATS | INTEGERS
            plans[types] = (fits, *_known(result), left.type, right.type)
            return result
        fits, element, known, *_ = plan
        if not fits:
            return slow(condition, x, y)
        return _tensor(np.where(condition.handle.data, left.handle.data, right.handle.data), element, known)

    return quick


def _filled(value: float | None, element: tl.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """``value`` in each place, to be read alone; zeros for None, as Triton's interpreter takes them."""
    key = value.__class__, value, element.name, shape
    if key not in _fills:
        semantic = interpreter.interpreter_semantic
        scalar = semantic.cast(semantic.to_tensor(value or 0), element)
        _fills[key] = np.full(shape, scalar.handle.data)
        _fills[key].flags.writeable = False
    return _fills[key]


def _load(slow: Callable) -> Callable:
    key = object()

    def quick(pointer, mask=None, other=None, **hints):
        given = mask.value if mask.__class__ is tl.constexpr else mask
        fill = other.value if other.__class__ is tl.constexpr else other
        masked = given.__class__ is tl.tensor
        plain = fill is None or (masked and fill.__class__ in (int, float))
        if pointer.__class__ is not tl.tensor or not (masked or given is None) or not plain or hints.keys() - HINTS:
            return slow(pointer, mask, other, **hints)
        plans = _plans(pointer.type, key)
        plan = plans.get(id(given.type) if masked else None)
        places = pointer.handle.data
        if plan is None:
            result = slow(pointer, mask, other, **hints)
            fits = _fits(pointer, given) and result.handle.data.shape == places.shape
            plans[id(given.type) if masked else None] = (fits, *_known(result), masked and given.type)
            return result
        fits, element, known, _ = plan
        if not fits:
            return slow(pointer, mask, other, **hints)
        within = given.handle.data if masked else _filled(True, tl.int1, places.shape)
        if within.shape != places.shape:
            within = np.broadcast_to(within, places.shape)
        others = _filled(fill, element, places.shape)
        return _tensor(native.load(places, within, others, others.dtype), element, known)

    return quick


def _store(slow: Callable) -> Callable:
    key = object()

    def quick(pointer, value, mask=None, **hints):
        masked = mask.__class__ is tl.tensor
        plain = pointer.__class__ is tl.tensor and value.__class__ is tl.tensor and (masked or mask is None)
        if not plain or hints.keys() - HINTS:
            return slow(pointer, value, mask, **hints)
        plans = _plans(pointer.type, key)
        types = id(value.type), id(mask.type) if masked else None
        plan = plans.get(types)
        if plan is None:
            slow(pointer, value, mask, **hints)
            fits = _fits(pointer, mask) and value.dtype.name == pointer.dtype.element_ty.name
            plans[types] = (fits and _spans(pointer, value, mask), value.type, masked and mask.type)
            return None
        if not plan[0]:
            return slow(pointer, value, mask, **hints)
        places, data = pointer.handle.data, value.handle.data
        within = mask.handle.data if masked else _filled(True, tl.int1, places.shape)
        if data.shape != places.shape:
            data = np.broadcast_to(data, places.shape)
        if within.shape != places.shape:
            within = np.broadcast_to(within, places.shape)
        native.store(places, data, within)
        return None

    return quick


def _fits(pointer: tl.tensor, mask: tl.tensor | None) -> bool:
    """Whether these are addresses of more than truths, under a mask of truths or none."""
    of_numbers = pointer.dtype.is_ptr() and pointer.dtype.element_ty.name not in TRUTHS
    return of_numbers and (mask is None or mask.dtype.name in TRUTHS)


def _spans(pointer: tl.tensor, *others: tl.tensor | None) -> bool:
    """Whether the others take the pointers' shape."""
    shapes = [one.handle.data.shape for one in (pointer, *others) if one is not None]
    return np.broadcast_shapes(*shapes) == shapes[0]
