"""The tail of the softmax as a rank-one matrix: two of a step's three GEMMs over a few columns of the vocabulary.

For a block of C rows of residuals U, let a be the columns whose largest |U| reaches eps, and d the others.

    m = U_d 1,   c = 1^T U_d / (1^T m)        row sums [C]; the columns' shares of the sum [V], 0 in a
    U_d ~ m c^T                               every row sum and every column sum stays what it was

    U W   ~ U_a W_a + m (c^T W)               (U^T X)_a = U_a^T X,   (U^T X)_d ~ c (m^T X)

So rows of U still add up to zero, and no row of dW is left without gradient: AdamW divides by a row's own size, and a
row that is always dropped would be another optimiser. Everything is a dense GEMM on gathered columns; nothing is added
up in an order that is not fixed. Late scalars are a row scale, as on U itself.

What is left out is known from the same pass: U_d and m c^T are of one sign, therefore
||U_d - m c^T||^2 <= ||U_d||^2 + ||m||^2 ||c||^2. That, over ||U||, is the error reported.

Shape suffixes: C rows of a stash, B blocks of it, K active columns, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from .plan import TAIL_BLOCK_ROWS
from .rows import reference

# SmolLM2's own answers, 1536 rows in blocks of 512, relative errors of dX and dW in fp32: eps 2^-12 2.8e-3 and 9.0e-4
# with 13 % active columns, 2^-13 1.7e-3 and 5.1e-4 with 18 %, 2^-14 9.9e-4 and 2.8e-4 with 23 %. Rounding the exact
# gradient to bf16 costs 1.65e-3.
EPS = 2.0**-13
# Beyond this share of active columns gathering costs what it saves.
MOST_ACTIVE = 0.5
# Of ||U_d|| / ||U||, beyond which the product is the exact one. Near-uniform logits have all of their mass in the tail:
# 1 / sqrt(V), 4.5e-3 at V 49152, where SmolLM2's own answers have 5e-4.
MOST_LEFT_OUT = 2.0**-9


@dataclass(frozen=True)
class Tail:
    """Residuals S, [C, V], as blocks of rows: which columns are active, and the others' shares of the tail."""

    blocks: tuple[tuple[int, int], ...]
    active_BV: Tensor  # bool
    shares_BV: Tensor  # fp32, c of each block
    left_out_B: Tensor  # ||U_d||^2
    squares: Tensor  # ||U||^2

    @property
    def is_worth_it(self) -> bool:
        """Whether the exact products are neither cheaper nor needed. Reads the device."""
        share = self.active_BV.float().mean()
        ratio = (self.left_out_B.sum() / self.squares.clamp(min=1e-30)).sqrt()
        return bool(share <= MOST_ACTIVE) and bool(ratio <= MOST_LEFT_OUT)


def find(kernels: ModuleType, stash_CV: Tensor, scale_C: Tensor, eps: float) -> Tail:
    """One pass over residuals U = diag(scale) S. A row whose scale is 0 or not finite counts nowhere."""
    count, vocab = stash_CV.shape
    blocks = tuple((start, min(start + TAIL_BLOCK_ROWS, count)) for start in range(0, count, TAIL_BLOCK_ROWS))
    peaks_BV, totals_BV, squares_BV = scale_C.new_empty(3, len(blocks), vocab)
    peaks = getattr(kernels, "peaks", reference.peaks)
    for b, (start, end) in enumerate(blocks):
        peaks(stash_CV[start:end], scale_C[start:end], peaks_BV[b], totals_BV[b], squares_BV[b])
    active_BV, squares = peaks_BV >= eps, squares_BV.sum()
    totals_BV.masked_fill_(active_BV, 0.0)
    sums_B1 = totals_BV.sum(1, keepdim=True)
    shares_BV = totals_BV.div_(sums_B1.masked_fill_(sums_B1 == 0, 1.0))
    return Tail(blocks, active_BV, shares_BV, squares_BV.masked_fill_(active_BV, 0.0).sum(1), squares)


def multiply(
    kernels: ModuleType,
    tail: Tail,
    stash_CV: Tensor,
    weight_VH: Tensor,
    scale_C: Tensor,
    product_CH: Tensor | None,
    scaled_CH: Tensor | None,
    total_VH: Tensor | None,
    columns_at_once: int,
) -> Tensor:
    """product = S W and total += S^T scaled, with the tail as a rank-one matrix; a bound of the squares left out of U.

    product, total: fp32 (fp64), None where not wanted; scaled: in the dtype of S. columns_at_once: of a block, gathered
    before they are multiplied, which bounds the memory.
    """
    split = getattr(kernels, "split", reference.split)
    add_rows = getattr(kernels, "add_rows", reference.add_rows)
    rest_C = scale_C.new_zeros(stash_CV.shape[0])  # row sums of S over the columns that are not active
    means_BH = (tail.shares_BV.to(weight_VH.dtype) @ weight_VH).to(scale_C.dtype)
    sums_BH = torch.zeros_like(means_BH)
    for b, (start, end) in enumerate(tail.blocks):
        block, begun = slice(start, end), False
        for left, right, columns_K in _ranges(tail.active_BV[b], columns_at_once):
            active_CK = stash_CV.new_empty(end - start, columns_K.shape[0])
            split(stash_CV[block, left:right], columns_K, active_CK, rest_C[block])
            if product_CH is not None:
                _add_product(product_CH[block], active_CK, weight_VH[left:right].index_select(0, columns_K), begun)
                begun = True
            if total_VH is not None and scaled_CH is not None:
                add_rows(total_VH[left:right], active_CK.t() @ scaled_CH[block], columns_K)
        if product_CH is not None:
            product_CH[block].addr_(rest_C[block], means_BH[b])
        if scaled_CH is not None:
            torch.mv(scaled_CH[block].to(sums_BH.dtype).t(), rest_C[block], out=sums_BH[b])
    if total_VH is not None:
        total_VH.addmm_(tail.shares_BV.t(), sums_BH)
    masses = (rest_C * scale_C).nan_to_num(0.0, 0.0, 0.0).square().split([end - start for start, end in tail.blocks])
    return (tail.left_out_B + torch.stack([mass.sum() for mass in masses]) * tail.shares_BV.square().sum(1)).sum()


def _ranges(active_V: Tensor, columns_at_once: int) -> Iterator[tuple[int, int, Tensor]]:
    """Ranges of the vocabulary with at most so many active columns each, and those, counted from the range's start."""
    columns = active_V.nonzero()[:, 0].int()
    parts = columns.split(columns_at_once) if len(columns) else (columns,)
    left = 0
    for i, part in enumerate(parts, 1):
        right = active_V.shape[0] if i == len(parts) else int(part[-1]) + 1
        yield left, right, part - left
        left = right


def _add_product(total: Tensor, a: Tensor, b: Tensor, begun: bool) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b) if begun else torch.mm(a, b, out=total)
    else:
        total.add_(a @ b) if begun else total.copy_(a @ b)
