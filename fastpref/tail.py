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

On the CPU a follows the data. The host of a GPU does not wait for it: there a block has a number of active columns that
is settled before, those with the largest |U|, by what the calls before would have needed (`Needed`). The first call,
and one after a call whose tail was not small, is exact.

Shape suffixes: C rows of a stash, B blocks of it, K active columns, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from . import rows, workspace
from .plan import TAIL_MOST

# SmolLM2's own answers, 1536 rows in blocks of 512, relative errors of dX and dW in fp32: eps 2^-12 2.8e-3 and 9.0e-4
# with 13 % active columns, 2^-13 1.7e-3 and 5.1e-4 with 18 %, 2^-14 9.9e-4 and 2.8e-4 with 23 %. Rounding the exact
# gradient to bf16 costs 1.65e-3.
EPS = 2.0**-13
# Of ||U_d|| / ||U||, beyond which the product is the exact one. Near-uniform logits have all of their mass in the tail:
# 1 / sqrt(V), 4.5e-3 at V 49152, where SmolLM2's own answers have 5e-4.
MOST_LEFT_OUT = 2.0**-9


SHARES = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, TAIL_MOST)  # of V, from which a GPU's number of columns is taken


@dataclass(frozen=True)
class Tail:
    """Residuals U = diag(scale) S, [C, V], as blocks of rows: which columns are active, and the others' shares."""

    blocks: tuple[tuple[int, int], ...]
    scale_C: Tensor
    active_BV: Tensor  # bool
    columns_BK: Tensor | None  # those, where their number was given; None: it follows the data
    shares_BV: Tensor  # fp32, c of each block
    left_out_B: Tensor  # ||U_d||^2
    squares: Tensor  # ||U||^2
    needed: Tensor  # columns that reach eps, in the block with most of them; V where the others are not small
    is_worth_it: bool  # False: the exact products are needed, or no dearer

    def most(self, columns_at_once: int) -> int:
        """Columns of the largest range."""
        if self.columns_BK is not None:
            return self.columns_BK.shape[1]
        return min(columns_at_once, int(self.active_BV.sum(1).amax()))

    def ranges(self, b: int, columns_at_once: int) -> Iterator[tuple[int, int, Tensor]]:
        """Ranges of the vocabulary and a block's active columns there, counted from the range's start: at most so many
        at once, where their number follows the data."""
        vocab = self.active_BV.shape[1]
        if self.columns_BK is not None:
            yield 0, vocab, self.columns_BK[b]
            return
        columns = self.active_BV[b].nonzero()[:, 0].int()
        parts = columns.split(columns_at_once) if len(columns) else (columns,)
        left = 0
        for i, part in enumerate(parts, 1):
            right = vocab if i == len(parts) else int(part[-1]) + 1
            yield left, right, part - left
            left = right


class Needed:
    """How many active columns the last call of a head needed, for the next one on a device whose host does not wait for
    a call's own data. It waits for those of the last one, which the device is mostly done with."""

    of: dict[tuple, Needed] = {}

    def __init__(self, vocab: int) -> None:
        self.vocab, self.last = vocab, vocab
        self.host: Tensor | None = None  # what is on its way here
        self.event: torch.cuda.Event | None = None

    @classmethod
    def by(cls, weight_VH: Tensor) -> Needed:
        return cls.of.setdefault((weight_VH.device, *weight_VH.shape), cls(weight_VH.shape[0]))

    def columns(self, capacity: int) -> int:
        """Of a block in the call that begins; 0: all, exactly. A CUDA graph keeps what it was captured with."""
        if self.host is not None and not _capturing():
            if self.event is not None:
                self.event.synchronize()
            self.last, self.host = int(self.host), None
        counts = (max(1, int(share * self.vocab) // 8 * 8) for share in SHARES)
        return next((count for count in counts if self.last <= count <= capacity), 0)

    def tell(self, needed: Tensor) -> None:
        if needed.device.type == "meta" or _capturing():
            return
        on_cuda = needed.device.type == "cuda"
        self.host = torch.empty((), dtype=needed.dtype, pin_memory=on_cuda).copy_(needed, non_blocking=True)
        if on_cuda:
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(needed.device))


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def find(
    kernels: ModuleType, stash_CV: Tensor, scale_C: Tensor, eps: float, block_rows: int, columns: int | None = None,
    part_of: Tensor | None = None,
) -> Tail:
    """One pass over residuals U = diag(scale) S. A row whose scale is 0 or not finite counts nowhere.

    columns: active ones of a block, those with the largest peaks (0: the products will be exact); None: as many as
    reach eps, which reads the device. part_of: squares that the tail of S is compared with; None: those of U.
    """
    count, vocab = stash_CV.shape
    blocks = tuple((start, min(start + block_rows, count)) for start in range(0, count, block_rows))
    peaks_BV, totals_BV, squares_BV = scale_C.new_empty(3, len(blocks), vocab)
    for b, (start, end) in enumerate(blocks):
        rows.tail_kernels(kernels, stash_CV).peaks(
            stash_CV[start:end], scale_C[start:end], peaks_BV[b], totals_BV[b], squares_BV[b]
        )
    active_BV, squares = peaks_BV >= eps, squares_BV.sum()
    left_out_B = squares_BV.masked_fill(active_BV, 0.0).sum(1)
    small = left_out_B.sum() <= MOST_LEFT_OUT**2 * (squares if part_of is None else part_of)
    needed = torch.where(small, active_BV.sum(1).amax(), vocab)
    chosen_BK = None
    if columns:
        chosen_BK = torch.stack([_largest(peaks_V, columns) for peaks_V in peaks_BV])
        active_BV = torch.zeros_like(active_BV).scatter_(1, chosen_BK, True)
        left_out_B = squares_BV.masked_fill_(active_BV, 0.0).sum(1)
        chosen_BK = chosen_BK.int()
    is_worth_it = bool(small & (active_BV.float().mean() <= TAIL_MOST)) if columns is None else columns > 0
    totals_BV.masked_fill_(active_BV, 0.0)
    sums_B1 = totals_BV.sum(1, keepdim=True)
    shares_BV = totals_BV.div_(sums_B1.masked_fill_(sums_B1 == 0, 1.0))
    return Tail(blocks, scale_C, active_BV, chosen_BK, shares_BV, left_out_B, squares, needed, is_worth_it)


def _largest(peaks_V: Tensor, count: int) -> Tensor:
    """The columns of the largest peaks, in order; of equal ones the first, which top-k alone does not promise: the bits
    of a float that is not negative rise with it, and the column goes below them."""
    keys = peaks_V.float().view(torch.int32).long().mul_(2**32).sub_(torch.arange(len(peaks_V), device=peaks_V.device))
    return keys.topk(count, sorted=False).indices.sort().values


def multiply(
    kernels: ModuleType,
    add_mm: Callable[[Tensor, Tensor, Tensor, bool], None],
    tail: Tail,
    stash_CV: Tensor,
    weight_VH: Tensor,
    product_CH: Tensor | None,
    scaled_CH: Tensor | None,
    total_VH: Tensor | None,
    columns_at_once: int,
    *,
    begun: bool = False,
) -> Tensor:
    """product = S W (begun: +=) and total += S^T scaled, the tail a rank-one matrix; a bound of the squares left out.

    product, total: fp32 (fp64), None where not wanted; scaled: in the dtype of S. columns_at_once: of a block, gathered
    before they are multiplied, which bounds the memory. add_mm: (sum, a, b, begun), sum (+)= a b.
    """
    kernels, scale_C = rows.tail_kernels(kernels, stash_CV), tail.scale_C
    on_device = tail.columns_BK is not None  # where GEMMs write fp32
    rest_C = torch.zeros_like(scale_C)  # row sums of S over the columns that are not active
    width = weight_VH.shape[1]
    means_BH, sums_BH = scale_C.new_zeros(2, len(tail.blocks), width)
    # Of one size for all blocks, in memory that is kept between calls: fresh pages of 17 MB cost 3 ms a time.
    at_once = tail.most(columns_at_once)
    space = workspace.empty((tail.blocks[0][1] * at_once,), stash_CV.dtype, stash_CV.device)
    few = min(at_once, columns_at_once) * width
    rows_of_w = None if product_CH is None else workspace.empty((few,), weight_VH.dtype, weight_VH.device)
    products = None
    if total_VH is not None and scaled_CH is not None:
        products = workspace.empty((few,), (total_VH if on_device else scaled_CH).dtype, scaled_CH.device)
    add_mm(means_BH, tail.shares_BV.to(stash_CV.dtype), weight_VH, False)
    for b, (start, end) in enumerate(tail.blocks):
        block, block_begun = slice(start, end), begun
        for left, right, columns in tail.ranges(b, columns_at_once):
            active_CK = space[: (end - start) * len(columns)].view(end - start, len(columns))
            kernels.split(stash_CV[block, left:right], columns, active_CK, rest_C[block])
            for part_CK, columns_K in zip(active_CK.split(columns_at_once, 1), columns.split(columns_at_once)):
                if product_CH is not None and rows_of_w is not None:
                    part_KH = rows_of_w[: len(columns_K) * width].view(len(columns_K), width)
                    torch.index_select(weight_VH[left:right], 0, columns_K, out=part_KH)
                    add_mm(product_CH[block], part_CK, part_KH, block_begun)
                    block_begun = True
                if total_VH is not None and scaled_CH is not None and products is not None:
                    part_KH = products[: len(columns_K) * width].view(len(columns_K), width)
                    add_mm(part_KH, part_CK.t(), scaled_CH[block], False)
                    kernels.add_rows(total_VH[left:right], part_KH, columns_K)
        if product_CH is not None:
            product_CH[block].addr_(rest_C[block], means_BH[b])
        if scaled_CH is not None:
            torch.mv(scaled_CH[block].to(sums_BH.dtype).t(), rest_C[block], out=sums_BH[b])
    if total_VH is not None:
        total_VH.addmm_(tail.shares_BV.t(), sums_BH)
    masses = (rest_C * scale_C).nan_to_num(0.0, 0.0, 0.0).square().split([end - start for start, end in tail.blocks])
    return (tail.left_out_B + torch.stack([mass.sum() for mass in masses]) * tail.shares_BV.square().sum(1)).sum()
