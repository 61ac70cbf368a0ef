"""What stands in for operators of Triton's interpreter gives what they give: values, types and errors."""

import itertools
import os

import numpy as np
import pytest
import triton
import triton.language as tl

import quick_operators

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="nothing is interpreted")
ELEMENTS = "float32", "int32", "int64", "int1", "float16", "bfloat16", "uint8", "compared"
SHAPES = (), (4,), (1,), (4, 1), (1, 8), (4, 8)
PAIRS = [((4, 1), (1, 8)), ((), (4, 8)), ((), ()), ((4,), ()), ((8,), (4, 8)), *zip(SHAPES, SHAPES, strict=True)]
"""Of shapes; the first three for elements that differ too."""
NUMBERS = 0, 1, -3, 2**31, 0.0, 0.5, 1e-40, float("inf"), float("nan"), True


@triton.jit
def nothing(x):
    pass


@pytest.fixture(autouse=True)
def patched():
    """The language, as a first launch leaves it."""
    import torch

    nothing[(1,)](torch.zeros(1))


def make(element, shape, first=-3):
    from triton.runtime.interpreter import TensorHandle, _get_np_dtype

    if element == "compared":
        return make("float32", shape, first) > 0  # truths, with a handle of another element
    element = getattr(tl, element)
    values = np.arange(first, first + int(np.prod(shape))).reshape(shape or (1,))
    if element == tl.bfloat16:
        data = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    else:
        data = values.astype(_get_np_dtype(element))
    return tl.tensor(TensorHandle(data, element), tl.block_type(element, list(shape)) if shape else element)


def places(data, shape=None):
    """Addresses of an array's elements, as a block; of its first alone for a shape of ``()``."""
    from triton.runtime.interpreter import TensorHandle

    kind = tl.pointer_type(getattr(tl, data.dtype.name))
    first = data.__array_interface__["data"][0]
    shape = data.shape if shape is None else shape
    addresses = first + data.itemsize * np.arange(int(np.prod(shape)), dtype=np.uint64).reshape(shape or (1,))
    return tl.tensor(TensorHandle(addresses, kind), tl.block_type(kind, list(shape)) if shape else kind)


def outcome(function, *operands, **named):
    """Of one operation: what it raises, or what is known of its result."""
    try:
        with np.errstate(all="ignore"):
            result = function(*operands, **named)
    except Exception as error:
        return type(error)
    handle = result.handle
    data = handle.data
    shape = [one.value for one in result.shape]
    return data.tobytes(), data.shape, data.dtype, handle.dtype, result.type, result.dtype, shape, result.numel.value


def assert_same(name, quick, *operands, **named):
    expected = outcome(quick_operators.own[name], *operands, **named)
    for call in range(3):
        assert outcome(quick, *operands, **named) == expected, (name, operands, named, call)
    return not isinstance(expected, type)


OPERATORS = [f"__{name}__" for name in quick_operators.OPERATORS]
OPERATORS += [f"__r{name}__" for name in quick_operators.REFLECTED]


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_tritons(name):
    worked = 0
    for left, right in itertools.product(ELEMENTS, repeat=2):
        for shapes in PAIRS if left == right else PAIRS[:3]:
            if "compared" in (left, right) and shapes[0] != shapes[1]:
                continue  # Triton's spreads these truths as numbers, and fails
            operands = make(left, shapes[0]), make(right, shapes[1], first=1)
            worked += assert_same(name, getattr(tl.tensor, name), *operands)
    for element, shape, number in itertools.product(ELEMENTS, [(), (4, 1)], NUMBERS):
        for given in (number, tl.constexpr(number)):
            worked += assert_same(name, getattr(tl.tensor, name), make(element, shape), given)
    assert worked > 50


@pytest.mark.parametrize("name", ["__add__", "__radd__"])
def test_addresses_move_by_elements(name):
    for data in (np.zeros(8, np.float32), np.zeros(8, np.uint8), np.zeros((4, 8), np.int64)):
        for shape, element in itertools.product([(), (8,), (4, 8)], ["int32", "int64", "uint8", "float32"]):
            assert_same(name, getattr(tl.tensor, name), places(data), make(element, shape))
            assert_same(name, getattr(tl.tensor, name), places(data, ()), make(element, shape))
        assert assert_same(name, getattr(tl.tensor, name), places(data), -2)


def test_indices_conversions_and_choices_are_tritons():
    whole = slice(None)
    for element, indices in itertools.product(ELEMENTS, [(whole, None), (None, whole), (None, None), (whole, whole)]):
        for shape in ((4,), (), (4, 8)):
            assert_same("__getitem__", tl.tensor.__getitem__, make(element, shape), indices)
    for one, other in itertools.product(ELEMENTS, ELEMENTS[:-1]):
        assert_same("to", tl.tensor.to, make(one, (4,)), getattr(tl, other))
    values = [make("float32", (4, 8)), make("int32", (4, 1)), make("float32", ()), make("int64", (1, 8)), 0, 0.5, True]
    conditions = [make("int1", shape) for shape in ((), (4, 1), (1, 8), (4, 8))]
    for condition, x, y in itertools.product(conditions, values, values):
        assert_same("where", tl.where, condition, x, y)


def test_loads_are_tritons():
    worked = 0
    for kind in ("float32", "int32", "uint8", "float16", "int64"):
        data = np.arange(1, 33).astype(kind).reshape(4, 8)
        masks = [None, *(make("int1", shape, first=0) for shape in ((), (4, 1), (1, 8), (4, 8)))]
        for shape, mask, other in itertools.product([(), (4, 8), (1, 8)], masks, [None, 0, 0.0, 2, float("-inf")]):
            worked += assert_same("load", tl.load, places(data, shape), mask, other)
            named = {"mask": mask, "other": other, "eviction_policy": "evict_first"}
            worked += assert_same("load", tl.load, places(data, shape), **named)
    assert worked > 200


def test_stores_are_tritons():
    masks = [None, *(make("int1", shape, first=0) for shape in ((), (4, 1), (4, 8)))]
    values = [make(element, shape) for element in ("float32", "int32", "float16") for shape in ((), (4, 1), (4, 8))]
    for kind, shape, value, mask in itertools.product(("float32", "int32"), [(), (4, 8)], [*values, 2], masks):
        written = []
        for store in (quick_operators.own["store"], tl.store, tl.store):
            data = np.full((4, 8), 100, kind)
            try:
                store(places(data, shape), value, mask)
                written.append(data.tobytes())
            except Exception as error:
                written.append(type(error))
        assert written[0] == written[1] == written[2], (kind, shape, value, mask)
