"""Spares Triton's interpreter what it repeats without need, most of its time; results are the same."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

import quick_operators

_patch_lang, _get_np_dtype = interpreter._patch_lang, interpreter._get_np_dtype
_make_tensor, _make_block, _make_pointer = tl.tensor.__init__, tl.block_type.__init__, tl.pointer_type.__init__
_broadcast = TritonSemantic.broadcast_impl_value
_patched: dict[int, dict] = {}
_dtypes: dict[str, np.dtype] = {}
_blocks: dict[tuple, tl.block_type] = {}
_pointers: dict[tuple, tl.pointer_type] = {}
_SCOPE = SimpleNamespace(restore=lambda: None)
_OF_THE_TYPE = "shape", "numel", "dtype"


def make_interpreter_faster() -> None:
    """Makes Triton patch its language once a process, not once a launch and once a call of a function in a kernel.

    And keeps NumPy's dtypes of Triton's, the types of blocks, and what a tensor derives from its type, all of which it
    makes anew at each operation; and leaves out its search for overflows of int32, for which it repeats each integer
    operation in int64. Operators are those of `quick_operators`. Nothing may be compiled for a GPU in this process any
    more.
    """
    interpreter._patch_lang, interpreter._get_np_dtype = _patch_once, _np_dtype
    tl.block_type.__new__, tl.block_type.__init__ = _known_block, _nothing_more
    tl.pointer_type.__new__, tl.pointer_type.__init__ = _known_pointer, _nothing_more
    tl.tensor.__init__, TritonSemantic.broadcast_impl_value = _init_tensor, _broadcast_others
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _patch_once(function) -> SimpleNamespace:
    namespace = function.__globals__
    if id(namespace) not in _patched:
        _patch_lang(function)
        if not _patched:
            quick_operators.install()
        _patched[id(namespace)] = namespace
    return _SCOPE


def _np_dtype(dtype: tl.dtype) -> np.dtype:
    scalar = dtype.scalar
    if isinstance(scalar, tl.pointer_type):
        return _get_np_dtype(scalar)
    if scalar.name not in _dtypes:
        _dtypes[scalar.name] = _get_np_dtype(scalar)
    return _dtypes[scalar.name]


def _known_block(kind: type, element_ty: tl.dtype, shape) -> tl.block_type:
    sizes = (getattr(size, "value", size) for size in shape)
    key = element_ty.name, getattr(element_ty, "address_space", None), *sizes
    if key not in _blocks:
        block = object.__new__(kind)
        _make_block(block, element_ty, shape)
        _blocks[key] = block
    return _blocks[key]


def _known_pointer(kind: type, element_ty: tl.dtype, address_space: int = 1, const: bool = False) -> tl.pointer_type:
    key = getattr(element_ty, "value", element_ty).name, address_space, const
    if key not in _pointers:
        pointer = object.__new__(kind)
        _make_pointer(pointer, element_ty, address_space, const)
        _pointers[key] = pointer
    return _pointers[key]


def _nothing_more(*_, **__) -> None:
    """It is made already."""


def _init_tensor(self: tl.tensor, handle, type: tl.dtype) -> None:
    known = type.__dict__.get("_of_its_tensors")
    if known is None:
        _make_tensor(self, handle, type)
        type._of_its_tensors = tuple((name, self.__dict__[name]) for name in _OF_THE_TYPE)
        return
    self.handle, self.type = handle, type
    self.__dict__.update(known)


def _broadcast_others(self: TritonSemantic, lhs: tl.tensor, rhs: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    return (lhs, rhs) if lhs.type is rhs.type else _broadcast(self, lhs, rhs)
