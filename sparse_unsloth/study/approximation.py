"""Approximates a matrix with fewer numbers, and measures the loss of each method."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LOW_RANK = ("svd_topk", "random_subspace", "random_factors", "leverage_columns", "random_columns")
MAGNITUDE = ("magnitude", "magnitude_rows", "magnitude_columns")
_BLOCK, _ITERATIONS, _TOLERANCE = 8, 200, 1e-5


@dataclass(frozen=True)
class Decomposition:
    """A matrix ``[n, m]``, its singular values ``[p]``, descending, and right vectors ``[p, m]``, ``p = min(n, m)``."""

    matrix: Tensor
    values: Tensor
    right: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Decomposition:
        _, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return cls(matrix, values, right)

    @property
    def energy(self) -> Tensor:
        """Returns the share of the squared Frobenius norm in each singular direction, ``[p]``."""
        squares = self.values.double().square()
        return squares / squares.sum()


@dataclass(frozen=True)
class Loss:
    """An approximation's loss relative to the matrix's norm, the numbers that it stores, and its cost."""

    frobenius: float
    spectral: float
    parameters: int
    seconds: float


def low_rank_loss(method: str, known: Decomposition, rank: int, generator: torch.Generator) -> Loss:
    """Measures the loss of an approximation of ``rank`` (1 to ``min(n, m)``).

    - ``svd_topk``: the ``rank`` largest singular directions, the optimum;
    - ``random_subspace``: as many singular directions, drawn at random;
    - ``random_factors``: the product of two Gaussian factors, times the scalar that fits best;
    - ``leverage_columns``: the projection on as many columns, drawn without replacement by their leverage in the top
      right singular subspace of that rank (Drineas, Mahoney and Muthukrishnan 2008);
    - ``random_columns``: the projection on as many columns, drawn uniformly.

    Raises:
        ValueError: an unknown method, or a rank out of range.
    """
    if not 1 <= rank <= len(known.values):
        raise ValueError(f"rank is {rank}; a matrix of shape {tuple(known.matrix.shape)} has 1 to {len(known.values)}")
    matrix, (n, m) = known.matrix, known.matrix.shape
    began = time.perf_counter()
    if method in ("svd_topk", "random_subspace"):
        kept = torch.arange(rank) if method == "svd_topk" else _draw(len(known.values), rank, generator)
        left_out = known.values.clone().index_fill_(0, kept.to(known.values.device), 0.0).double()
        total = known.values.double().norm().clamp_min(1e-300)
        frobenius, spectral = left_out.norm() / total, left_out.max() / known.values[0].double().clamp_min(1e-300)
        return Loss(frobenius.item(), spectral.item(), rank * (n + m), time.perf_counter() - began)
    if method == "random_factors":
        product = _normal((n, rank), matrix, generator) @ _normal((rank, m), matrix, generator)
        residual = matrix - (matrix * product).sum() / product.square().sum() * product
    elif method in ("leverage_columns", "random_columns"):
        weights = known.right[:rank].square().sum(0).double().cpu() if method == "leverage_columns" else torch.ones(m)
        columns = torch.multinomial(weights.clamp_min(1e-12), rank, generator=generator)
        basis, _ = torch.linalg.qr(matrix.index_select(1, columns.to(matrix.device)))
        residual = matrix - basis @ (basis.t() @ matrix)
    else:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(LOW_RANK)}")
    return _loss(known, residual, rank * (n + m), time.perf_counter() - began)


def magnitude_loss(method: str, known: Decomposition, keep_ratio: float) -> Loss:
    """Measures the loss of keeping the largest share (L2) of entries, rows or columns and zeroing the others.

    Raises:
        ValueError: an unknown method.
    """
    matrix = known.matrix
    began = time.perf_counter()
    if method == "magnitude":
        kept = max(1, round(keep_ratio * matrix.numel()))
        threshold = matrix.abs().flatten().kthvalue(matrix.numel() - kept + 1).values
        residual, parameters = matrix.masked_fill(matrix.abs() >= threshold, 0.0), kept
    elif method in ("magnitude_rows", "magnitude_columns"):
        dim = ("magnitude_rows", "magnitude_columns").index(method)
        kept = max(1, round(keep_ratio * matrix.shape[dim]))
        largest = matrix.norm(dim=1 - dim).topk(kept).indices
        residual, parameters = matrix.index_fill(dim, largest, 0.0), kept * matrix.shape[1 - dim]
    else:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(MAGNITUDE)}")
    return _loss(known, residual, parameters, time.perf_counter() - began)


def spectral_norm(matrix: Tensor) -> float:
    """Estimates the largest singular value from below, within about 0.1 %, by block power iteration."""
    multiply: Callable[[Tensor], Tensor] = lambda block: matrix.t() @ (matrix @ block)  # noqa: E731
    generator = torch.Generator().manual_seed(0)
    block = _normal((matrix.shape[1], min(_BLOCK, matrix.shape[1])), matrix, generator)
    last = 0.0
    for _ in range(_ITERATIONS):
        block, _ = torch.linalg.qr(multiply(block))
        now = torch.linalg.matrix_norm(matrix @ block, ord=2).item()
        if now <= last * (1 + _TOLERANCE):
            break
        last = now
    return max(now, last)


def _loss(known: Decomposition, residual: Tensor, parameters: int, seconds: float) -> Loss:
    frobenius = residual.double().norm() / known.values.double().norm().clamp_min(1e-300)
    spectral = spectral_norm(residual) / max(known.values[0].item(), 1e-300)
    return Loss(frobenius.item(), spectral, parameters, seconds)


def _draw(size: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(size, generator=generator)[:count]


def _normal(shape: tuple[int, int], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=like.dtype).to(like.device)
