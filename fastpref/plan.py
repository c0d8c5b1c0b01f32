"""From a memory budget to a plan: which rows are multiplied with the head when, and what is kept. Pure Python.

One GEMM is 2 * N * V * H floating-point operations (N scored rows, V vocabulary, H hidden size).

    scheme      GEMMs   what it does
    forward     1       logits of a few rows at a time; log-probs only
    frozen      2       no weight gradient wanted: dX row block by row block, the loss scalar applied at the end
    groups      3       complete groups (pairs, sequences, the batch): residuals of a group wait in a stash until its
                        loss scalars are known, then one dX and one dW GEMM. A pair or sequence too long for the stash
                        sends its dW, without the unknown scalar, to a fp32 scratch of its own
    recompute   4 - f   a group does not fit, or the scalars arrive in backward: a fraction f of the residuals is
                        stashed, the others are multiplied again, one vocabulary slice after another (f = 0: two passes)

Where the gradient of the token entropies may arrive too (`Problem.entropy_grad`), U is not enough for it: its factor
log p + H is lost in a bf16 residual of a row whose probability is near 1. If that gradient does come, every row is
multiplied again (4 GEMMs) and a stash is of no use; but most callers only log the entropy, and nobody knows until
backward. So such a call stashes what half of the budget holds, in case it does not come, and leaves the other half to
the slices, in case it does.

The budget bounds everything that grows with rows x vocabulary or with the rows of a tile; it is passed over only where
one group for the whole batch takes fewer bytes in all than several groups and their fp32 sum. What a gradient needs
is beside it and is reported as `accumulator_bytes`: a fp32 sum where a bf16 / fp16 gradient is added up from more than
one GEMM, the scratches of groups that do not fit, and the low-precision copy of the weight under autocast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

MIB, GIB = 2**20, 2**30
H200 = (790e12, 4.3e12)  # bf16 GEMM FLOP/s and bytes/s that were measured on one
KEPT = GIB  # CPU: bytes of buffers that workspace.py keeps for the next call, at most
DEFAULT_BUDGET = {"cpu": 256 * MIB, "cuda": 2048 * MIB}

# Rows of logits made at a time. CUDA: fewer than ~1024 rows leave the GEMM without enough 128 x 256 tiles to fill 132
# SMs evenly, more only enlarge the fp32 scratch. CPU: logits are made in the stash itself, and fewer rows cost time
# (bf16, N 2048, H 512, V 32000: 1.15 of the three GEMMs' time at 128 rows, 1.14 at 256, 1.07 at 1024, 1.06 at 2048).
TILE_ROWS = {"cpu": 2048, "cuda": 1024}
# A group that does not fit is swept through stashes of its own, each a read and write of a fp32 [V, H] scratch: 245 / C
# of the three GEMMs for C rows on an H200 (790 TFLOP/s, 4.3 TB/s; arithmetic). Below about this many the fourth GEMM
# of "recompute", a third of three, is cheaper.
LEAST_STASH_ROWS = {"cpu": 128, "cuda": 768}
# CPU: a low-precision dW GEMM reaches its fp32 sum through a buffer of this size (bf16, 1024 rows, H 1024, V 32768: the
# GEMM alone 166 ms, with 16 MiB 231 ms, 4 MiB 174 ms, 2 MiB 184 ms).
WEIGHT_SLICE_BYTES = 4 * MIB
# Rows of a block of tail.py. Fewer have fewer active columns (SmolLM2's own answers, V 49152, eps 2^-12: 12.8 % at 256
# rows, 19.3 at 512, 28.1 at 1024), but each block reads its rows of W and adds to those of dW once more.
# CUDA, arithmetic for an H200: 512 rows are 64 of the GEMM's tiles, half of its SMs, and take as long to gather as to
# multiply; at 1024 a half.
TAIL_BLOCK_ROWS = {"cpu": 512, "cuda": 1024}
TAIL_MOST = 0.5  # of the columns active: beyond, gathering them costs what it saves
SLICE_COLS = 64  # vocabulary slices are multiples of this
# A fp32 GEMM on the CPU packs the whole head before it multiplies; slices of it are packed into the cache. C 512, H
# 1024, V 128256 on two cores: 769 ms whole, 657 ms by 2048 columns, 786 ms by 8192; C 2048, H 512, V 32000: 349 and
# 336 ms. A bf16 GEMM takes the same time either way, and so do dX and dW.
LOGITS_COLS = 2048


@dataclass(frozen=True)
class Problem:
    """Sizes of one call. `lengths`: scored rows of each sequence, in the order of the batch."""

    lengths: tuple[int, ...]
    hidden: int
    vocab: int
    itemsize: int = 2  # bytes of the compute dtype: operands and stash
    logits_itemsize: int = 4  # bytes of a logit as the GEMM writes it
    grad_itemsize: int = 2  # bytes of the weight's gradient
    needs_hidden_grad: bool = True
    needs_weight_grad: bool = True
    coupling: str = "pair"  # "pair", "sequence" or "batch": the sequences whose log-probs one loss scalar needs
    scratches: int = 2  # unknown scalars of one pair or sequence: 1 where the rejected one follows from the chosen one
    late: bool = False  # the loss scalars arrive in backward (the stand-alone log-prob op)
    entropy_grad: bool = False  # late: the gradient of the token entropies may arrive as well
    cast_weight: bool = False  # the weight has another dtype than the GEMMs: narrowed whole, widened by slices
    gathered: bool = False  # scored rows are picked out of a padded input
    tail: bool = False  # the softmax's tail as a rank-one matrix (tail.py): dX and dW by the active columns only
    device: str = "cpu"

    @property
    def rows(self) -> int:
        return sum(self.lengths)

    @property
    def whole(self) -> Group:
        """The batch as one group."""
        sequences = len(self.lengths)
        items = sequences // 2 if self.coupling == "pair" else sequences
        return Group((0, items), ((0, sequences),), ((0, self.rows),))


@dataclass(frozen=True)
class Group:
    """Sequences whose loss scalars become known together: rows `segments`, one after another (see `Plan.order`).

    Where nothing waits for a scalar (forward, frozen) a group is just a block of rows and names no sequences.
    """

    items: tuple[int, int]  # pairs, or sequences where there are no pairs: [start, end)
    sequences: tuple[tuple[int, int], ...]  # the same as ranges of sequences: chosen and rejected, or one range
    segments: tuple[tuple[int, int], ...]  # their rows in the order they are walked, a range for each of `sequences`
    long: bool = False  # one pair or sequence, longer than the stash

    @property
    def span(self) -> tuple[int, int]:
        return self.segments[0][0], self.segments[-1][1]

    @property
    def rows(self) -> int:
        start, end = self.span
        return end - start


@dataclass(frozen=True)
class Plan:
    """Which rows are multiplied with the head when, and what that costs. Bytes are beyond the inputs and the gradients
    returned."""

    scheme: str
    problem: Problem = field(repr=False)
    budget: int
    groups: tuple[Group, ...]
    tile_rows: int  # rows of logits made at a time
    stash_rows: int  # rows of residuals kept at a time
    slice_cols: int  # recompute: vocabulary columns at a time
    weight_slice: int  # rows of dW that pass through a buffer at a time; 0: the GEMM adds to the sum itself
    tile_bytes: int
    accumulator_bytes: int
    tail_columns: int = 0  # active columns gathered at a time
    tail_capacity: int = 0  # CUDA: the most of a block; tail.Needed takes a share of V up to it. 0: no bound but V

    @property
    def order(self) -> tuple[tuple[int, int], ...] | None:
        """Ranges of sequences in the order their rows are walked; None: that of the batch.

        Chosen and rejected rows of a pair lie far apart in the batch. Walked side by side they are one GEMM in place of
        two (CPU, fp32, H 1024, V 128256, a group of 512 rows: logits 879 ms and dX 784 ms as two of 256 rows each, 822
        and 696 ms as one, for each GEMM packs the whole head).
        """
        if self.scheme != "groups" or self.problem.coupling != "pair" or len(self.groups) == 1:
            return None
        return tuple(span for group in self.groups for span in group.sequences)

    @property
    def bytes(self) -> int:
        return self.tile_bytes + self.accumulator_bytes

    @property
    def kept_bytes(self) -> int:
        """CPU: what stays with the process between calls, at most: `bytes`, and dW's once nobody holds it."""
        p = self.problem
        gradients = p.needs_weight_grad * p.vocab * p.hidden * p.grad_itemsize
        return min(KEPT, self.bytes + gradients) if p.device == "cpu" else 0

    @property
    def gemms(self) -> float:
        """GEMMs over all scored rows: 1, 2, 3, or 4 minus the stashed fraction; 4 where an entropy gradient arrives."""
        if self.scheme == "recompute":
            backward = self.problem.needs_hidden_grad + self.problem.needs_weight_grad
            return 2 + backward - min(self.stash_rows, self.problem.rows) / max(self.problem.rows, 1)
        if self.scheme == "groups":
            return 1 + self.problem.needs_hidden_grad + self.problem.needs_weight_grad
        return {"forward": 1, "frozen": 2}[self.scheme]

    @property
    def tail_block_rows(self) -> int:
        return _tail_block_rows(self.problem)

    def gemms_at(self, active: float) -> float:
        """GEMMs where this share of the columns is active (tail.py)."""
        p = self.problem
        fewer = p.tail and (self.scheme in ("groups", "frozen") or (self.scheme == "recompute" and p.device == "cpu"))
        return self.gemms - fewer * (1 - active) * (p.needs_hidden_grad + p.needs_weight_grad)

    @property
    def traffic(self) -> int:
        """Bytes that move beside the GEMMs, each read or written once; what a GEMM reads and writes itself, its own
        operands and a result in the gradient's dtype, is its own."""
        p, wide = self.problem, 4 if self.problem.itemsize < 4 else self.problem.itemsize
        again = p.rows - min(self.stash_rows, p.rows) if self.scheme == "recompute" else 0
        kept = p.itemsize * (self.scheme != "forward")
        total = (p.rows + again) * p.vocab * (p.logits_itemsize + kept)
        if self.scheme == "forward":
            return total
        total += p.needs_hidden_grad * p.rows * p.hidden * (wide + p.itemsize)  # the row scale of dX
        if p.needs_weight_grad:
            total += 2 * p.rows * p.hidden * p.itemsize  # and of x
            stashes = sum(-(-group.rows // max(self.stash_rows, 1)) for group in self.groups)
            if stashes > 1 and self.scheme == "groups":
                # A wide sum: written once and rounded, and read and written by each further GEMM.
                rounded = wide + p.grad_itemsize if p.grad_itemsize < wide else 0
                total += p.vocab * p.hidden * (2 * wide * (stashes - 1) + rounded)
        return total

    def over_gemms(self, flops_per_s: float = H200[0], bytes_per_s: float = H200[1]) -> float:
        """Time over that of three, two or one GEMMs: arithmetic, with nothing for launches."""
        p = self.problem
        least = 1 + p.needs_hidden_grad + p.needs_weight_grad if self.scheme != "forward" else 1
        limit = least * 2 * p.rows * p.vocab * p.hidden / flops_per_s
        return (self.flops / flops_per_s + self.traffic / bytes_per_s) / limit if limit else 1.0

    @property
    def flops(self) -> float:
        return self.gemms * 2 * self.problem.rows * self.problem.vocab * self.problem.hidden

    def __str__(self) -> str:
        p = self.problem
        long = sum(group.long for group in self.groups)
        lines = [
            f"{self.scheme}: {p.rows} scored rows in {len(p.lengths)} sequences, hidden {p.hidden}, vocab {p.vocab}",
            f"  GEMMs        {self.gemms:.2f} x {2 * p.rows * p.vocab * p.hidden / 1e12:.3f} TFLOP",
            f"  groups       {len(self.groups)}" + (f", {long} of them longer than the stash" if long else ""),
            f"  at a time    {self.tile_rows} rows of logits, {self.stash_rows} rows of residuals"
            + (f", {self.slice_cols} columns of the others" if self.slice_cols else ""),
            f"  tiles        {self.tile_bytes / MIB:.1f} MiB (budget {self.budget / MIB:.1f})",
            f"  accumulator  {self.accumulator_bytes / MIB:.1f} MiB",
        ]
        if p.tail:
            counts = (f"{self.gemms_at(share):.2f} at {share:.0%}" for share in (0.1, 0.2, TAIL_MOST))
            lines.append(f"  tail         GEMMs by active columns: {', '.join(counts)}, {self.gemms:.2f} beyond")
        if self.kept_bytes:
            lines.append(f"  kept         up to {self.kept_bytes / MIB:.1f} MiB between calls")
        if p.device == "cuda":
            larger = {f"{found.budget / GIB:.3g} GiB": found.over_gemms() for found in (self, *self.larger())}
            lines.append("  GEMM times   " + "; ".join(f"{budget}: {ratio:.2f} x" for budget, ratio in larger.items())
                         + f" (arithmetic for {H200[0] / 1e12:.0f} TFLOP/s and {H200[1] / 1e12:.1f} TB/s)")
        return "\n".join(lines)

    def larger(self) -> list[Plan]:
        """What larger budgets would buy: half as many groups, and so on to one."""
        p, found, last = self.problem, [], self
        while len(last.groups) > 1 and self.scheme == "groups":
            budget = last.budget
            while len(last.groups) > 1 and (more := plan(p, budget := budget * 5 // 4)) is not None:
                if 2 * len(more.groups) <= len(last.groups):
                    break
            last = more
            found.append(more)
        return found


def plan(problem: Problem, memory_budget: int | None = None) -> Plan:
    """The cheapest plan for `memory_budget` bytes of tiles (None: 2 GiB on CUDA, 256 MiB elsewhere).

    Depends on nothing but its arguments, so that results do not depend on what else is on the device.

    Raises:
        ValueError: the budget is below what any plan needs; the message names the least that works.
    """
    if memory_budget is None:
        memory_budget = DEFAULT_BUDGET.get(problem.device, DEFAULT_BUDGET["cpu"])
    if memory_budget <= 0:
        raise ValueError(f"memory_budget is {memory_budget}; it takes a positive number of bytes, or None")
    found = _Planner(problem, memory_budget).plan()
    if found is None:
        raise ValueError(
            f"memory_budget is {memory_budget} bytes; {problem.rows} rows of hidden {problem.hidden} and vocab "
            f"{problem.vocab} need at least {_least_budget(problem, memory_budget)}"
        )
    return found


def _least_budget(problem: Problem, too_small: int) -> int:
    low, high = too_small, 2 * too_small
    while _Planner(problem, high).plan() is None:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _Planner(problem, middle).plan() is None else (low, middle)
    return high


class _Planner:
    def __init__(self, problem: Problem, budget: int) -> None:
        self.p, self.budget = problem, budget
        device = problem.device if problem.device in TILE_ROWS else "cpu"
        self.max_tile_rows, self.least_stash_rows = TILE_ROWS[device], LEAST_STASH_ROWS[device]
        # Logits of the stash's own dtype are made in the stash and swept in place: no scratch.
        self.scratch_itemsize = 0 if problem.logits_itemsize == problem.itemsize else problem.logits_itemsize
        self.wide = device == "cuda" and problem.itemsize < 4  # GEMMs write fp32
        # The GEMMs themselves add up in the gradient's dtype.
        self.direct = problem.itemsize >= 4 and problem.grad_itemsize == problem.itemsize
        # On CUDA a GEMM adds bf16 products to a fp32 sum; elsewhere they go through a buffer, a slice at a time.
        slice_rows = max(1, WEIGHT_SLICE_BYTES // max(1, problem.hidden * problem.itemsize))
        self.weight_slice = 0 if device == "cuda" else min(problem.vocab, slice_rows)
        self.starts = [0, *accumulate(problem.lengths)]

    # -- sizes ---------------------------------------------------------------------------------------------------

    def per_stash_row(self) -> int:
        """Stash row, and one of the operands: gathered x, then dX before it is scattered, then scaled x for dW. On CUDA
        dX is made in fp32, half of its rows at a time: beside a gathered x that is an operand more."""
        operands = 1 + (self.wide and self.p.gathered and self.p.needs_hidden_grad)
        each = self.p.itemsize * (self.p.vocab + self.p.hidden * operands)
        return each + self.tail_row_bytes()

    def tail_row_bytes(self) -> int:
        """dX before it is rounded, and the row's part of its block's."""
        each = self.p.hidden * max(4, self.p.itemsize) + self.tail_block_bytes() // _tail_block_rows(self.p)
        return self.p.tail * each

    def tail_column_bytes(self) -> int:
        """An active column: its row of W, and of the product for dW; on the CPU of a block's residuals too."""
        p = self.p
        product = p.needs_weight_grad * (4 if self.wide else p.itemsize)
        return p.itemsize * (p.hidden + TAIL_BLOCK_ROWS["cpu"] * (p.device == "cpu")) + product * p.hidden

    def tail_columns(self) -> int:
        """Gathered at a time, in an eighth of the budget: whole 128 bytes, or cuBLAS takes slower kernels."""
        most = max(SLICE_COLS, self.budget // 8 // max(1, self.tail_column_bytes()) // SLICE_COLS * SLICE_COLS)
        return min(self.p.vocab, most) if self.p.tail else 0

    def tail_block_bytes(self) -> int:
        """What is known of each column of a block: its peak, sum, squares, whether it is active, and its share."""
        return self.p.tail * self.p.vocab * (3 * max(4, self.p.itemsize) + 1 + self.p.itemsize)

    def tail_capacity(self) -> int:
        """CUDA: active columns of a block, gathered as residuals at once, in an eighth of the budget."""
        if not self.p.tail or self.p.device != "cuda":
            return 0
        return max(1, min(int(TAIL_MOST * self.p.vocab), self.budget // 8 // self.tail_capacity_bytes(1)))

    def tail_capacity_bytes(self, columns: int) -> int:
        return columns * self.p.itemsize * TAIL_BLOCK_ROWS["cuda"]

    def tail_bytes(self) -> int:
        found = self.tail_columns() * self.tail_column_bytes() + self.tail_block_bytes()
        if capacity := self.tail_capacity():
            found += self.tail_capacity_bytes(capacity)
        return found

    def logits_bytes(self, rows: int) -> int:
        return rows * self.p.vocab * self.scratch_itemsize

    def scratch_bytes(self, rows: int) -> int:
        """Logits, and the gathered rows that make them."""
        return self.logits_bytes(rows) + rows * self.p.gathered * self.p.hidden * self.p.itemsize

    def tile_rows_for(self, budget: int, rows: int) -> int:
        """As many rows of logits as a quarter of the budget allows, at least one, at most what is of use."""
        each = max(1, self.scratch_bytes(1))
        return max(1, min(self.max_tile_rows, rows, budget // 4 // each))

    def widened(self, rows: int) -> int:
        """CPU: those of W in fewer bits than the GEMMs', which read them some at a time."""
        p = self.p
        return p.cast_weight * (p.device == "cpu" and p.itemsize >= 4) * min(rows, LOGITS_COLS) * p.hidden * p.itemsize

    def accumulator_bytes(self, stashes: int, scratches: int = 0, cols: int | None = None) -> int:
        """`stashes`: how many GEMMs add up to dW; `scratches`: fp32 sums of groups that do not fit; cols: of a slice of
        the vocabulary."""
        p, widened = self.p, self.widened(self.p.vocab if cols is None else cols)
        scratch = scratches * p.vocab * p.hidden * max(4, p.itemsize)
        if scratches and self.direct:
            return scratch + widened
        if scratches or (p.tail and stashes):
            stashes = max(stashes, 2)  # rows of dW are added to, in fp32
        total = (p.cast_weight and not widened) * p.vocab * p.hidden * p.itemsize
        product = 0
        if p.needs_weight_grad and not self.direct:
            if p.grad_itemsize < 4 and stashes > 1:
                total += p.vocab * p.hidden * 4
            if stashes > (p.grad_itemsize < 4) if p.itemsize < 4 else stashes == 1:
                product = self.weight_slice * p.hidden * p.itemsize
                if self.weight_slice and stashes > 1:
                    product += add_rows(self.weight_slice, p.hidden) * p.hidden * 4
        return total + scratch + max(product, widened)

    # -- schemes -----------------------------------------------------------------------------------------------

    def plan(self) -> Plan | None:
        """None where no scheme fits."""
        p = self.p
        if not (p.needs_hidden_grad or p.needs_weight_grad):
            return self.by_rows("forward")
        if not p.needs_weight_grad:
            return self.by_rows("frozen")
        fits = self.stash_capacity()
        if not p.late:
            groups = self.groups(fits)
            if groups is not None:
                found = self.one_group_if_smaller(self.complete_groups(groups))
                if found.order is not None and not p.gathered:
                    return _Planner(replace(p, gathered=True), self.budget).plan()
                return found
        elif p.rows <= fits:
            whole = self.complete_groups((self.p.whole,))
            if not p.entropy_grad:
                return whole
            cols, used = self.slices(p.rows)
            if 2 * whole.tile_bytes <= self.budget and cols >= SLICE_COLS:
                return replace(whole, slice_cols=cols, tile_bytes=max(whole.tile_bytes, used))
        return self.recompute()

    def by_rows(self, scheme: str) -> Plan | None:
        """Row block by row block; nothing waits for anything."""
        p = self.p
        frozen = scheme == "frozen"
        tile = self.tile_rows_for(self.budget if frozen else 4 * self.budget, p.rows)
        if not frozen and not self.scratch_itemsize:
            tile = self.max_tile_rows
        each = p.itemsize * (p.vocab + p.hidden * p.gathered) if frozen else p.vocab * p.logits_itemsize
        each += 0 if frozen else p.gathered * p.hidden * p.itemsize
        each += frozen * self.tail_row_bytes()
        fixed = self.scratch_bytes(tile) + self.tail_bytes() if frozen else 0
        rows = min((self.budget - fixed) // each, 4 * tile if frozen else tile, max(p.rows, 1))
        if rows < 1:
            return None
        tile = min(tile, rows)
        blocks = tuple(Group((0, 0), (), ((a, min(a + rows, p.rows)),)) for a in range(0, p.rows, rows))
        return Plan(
            scheme, p, self.budget, blocks, tile, rows if frozen else 0, 0, 0,
            rows * each + (self.scratch_bytes(tile) + self.tail_bytes() if frozen else 0),
            self.accumulator_bytes(0) + frozen * self.wide * 4 * p.rows * p.hidden,  # dX until it is scaled
            self.tail_columns() if frozen else 0, self.tail_capacity() if frozen else 0,
        )

    def stash_capacity(self) -> int:
        """Rows of residuals that fit beside the logits' scratch, which gets up to a quarter of the budget."""
        most = min(self.max_tile_rows, self.p.rows)
        scratch = max(self.logits_bytes(1), min(self.logits_bytes(most), self.budget // 4))
        return max(0, (self.budget - scratch - self.tail_bytes()) // self.per_stash_row())

    def tile_rows_beside(self, stash: int) -> int:
        """Rows of logits at a time in what a stash leaves of the budget."""
        free = (self.budget - self.tail_bytes() - stash * self.per_stash_row()) // max(1, self.logits_bytes(1))
        return max(1, min(self.max_tile_rows, stash, free))

    def groups(self, capacity: int) -> tuple[Group, ...] | None:
        """Whole items, in order, in as few groups as `capacity` rows allow, and those as equal as they can be.

        Fewer groups: each costs one read and write of a fp32 dW. Equal: the largest one sets the memory.
        """
        p = self.p
        if p.rows <= capacity:
            return (self.p.whole,)
        if p.coupling == "batch" or (p.late and p.rows > capacity):
            return None
        half = len(p.lengths) // 2
        rows = [a + b for a, b in zip(p.lengths[:half], p.lengths[half:])] if p.coupling == "pair" else p.lengths
        if max(rows) > capacity and capacity < self.least_stash_rows:
            return None
        count = len(_fill(rows, capacity))
        low, high = min(max(rows), capacity), capacity
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if len(_fill(rows, middle)) <= count else (middle + 1, high)
        found: list[Group] = []
        for start, end in _fill(rows, low):
            found.append(self.group(start, end, low, found[-1].span[1] if found else 0))
        return tuple(found)

    def group(self, start: int, end: int, capacity: int, first_row: int) -> Group:
        half = len(self.p.lengths) // 2
        offsets = (0, half) if self.p.coupling == "pair" else (0,)
        sequences = tuple((start + offset, end + offset) for offset in offsets)
        ends = list(accumulate((self.starts[b] - self.starts[a] for a, b in sequences), initial=first_row))
        found = Group((start, end), sequences, tuple(zip(ends, ends[1:])))
        return replace(found, long=found.rows > capacity)

    def complete_groups(self, groups: tuple[Group, ...]) -> Plan:
        long = [group for group in groups if group.long]
        stash = max((group.rows for group in groups if not group.long), default=0)
        if long:
            # As few stashes as the capacity allows for the longest sequence, and those of equal size.
            capacity = self.stash_capacity()
            longest = max(end - start for group in long for start, end in group.segments)
            stash = max(stash, -(-longest // -(-longest // capacity)))
        tile = self.tile_rows_beside(stash)
        return Plan(
            "groups", self.p, self.budget, groups, tile, stash, 0, 0 if self.direct else self.weight_slice,
            stash * self.per_stash_row() + self.logits_bytes(tile) + self.tail_bytes(),
            self.accumulator_bytes(len(groups), self.p.scratches if long else 0), self.tail_columns(),
            self.tail_capacity(),
        )

    def one_group_if_smaller(self, several: Plan) -> Plan:
        """One stash for the whole batch needs no fp32 sum beside dW: often the lesser evil, and always the faster."""
        p = self.p
        if len(several.groups) == 1 and not several.groups[0].long:
            return several
        tile_bytes = p.rows * self.per_stash_row() + self.logits_bytes(several.tile_rows) + self.tail_bytes()
        whole = replace(
            several,
            groups=(p.whole,),
            stash_rows=p.rows,
            tile_bytes=tile_bytes,
            accumulator_bytes=self.accumulator_bytes(1),
        )
        return whole if whole.bytes <= several.bytes else several

    def recompute(self) -> Plan | None:
        """Up to half of the budget for stashed residuals, the rest for slices of recomputed ones."""
        p = self.p
        stash_row = p.vocab * p.itemsize
        first_pass = p.vocab * p.logits_itemsize + p.gathered * p.hidden * p.itemsize  # each row of its tiles
        most = max(1, min(self.max_tile_rows, p.rows, self.budget // 8 // first_pass))
        half = max(0, self.budget // 2 - most * first_pass) // stash_row
        # A stash is made of whole tiles. The last two matter only where the budget hardly suffices.
        for tile, wanted in ((most, half), (most, 0), (1, 0), (1, p.rows)):
            kept = min(wanted, p.rows - 1) // tile * tile
            cols, second = self.slices(kept)
            first = kept * stash_row + tile * first_pass + self.widened(p.vocab) - self.widened(cols)
            used = max(first, second)
            if cols >= SLICE_COLS and used <= self.budget:
                return Plan(
                    "recompute", p, self.budget, (self.p.whole,), tile, kept, cols, 0, used,
                    self.accumulator_bytes(0, cols=cols), self.tail_columns(),
                )
        return None

    def slices(self, kept: int) -> tuple[int, int]:
        """Columns of a slice of the second pass beside `kept` stashed rows, and the bytes it takes."""
        p = self.p
        passes = [self.second_pass(kept, p.rows - kept)] if kept < p.rows else []
        if p.entropy_grad:
            passes.append(self.second_pass(kept, p.rows))
        cols = min((self.budget - fixed) // max(1, per_col) for fixed, per_col in passes) // SLICE_COLS * SLICE_COLS
        cols = min(cols, -(-p.vocab // SLICE_COLS) * SLICE_COLS)
        return cols, max(fixed + min(cols, p.vocab) * per_col for fixed, per_col in passes)

    def second_pass(self, kept: int, again: int) -> tuple[int, int]:
        """Bytes of that pass over `again` rows: fixed, and for each column of a slice."""
        p = self.p
        rank1 = p.tail and p.device == "cpu"  # on a GPU rows made again are exact
        low, of_two = p.itemsize < 4, rank1 or 0 < kept and again < p.rows  # of_two: dW is a sum, with the stash's
        summed, product_rows = (p.rows, max(kept, again)) if rank1 else (again, again)  # of dX, slice by slice
        product = p.itemsize if low and p.device != "cuda" else 0  # no CPU GEMM adds bf16 products to a fp32 sum
        fixed = kept * p.vocab * p.itemsize + p.gathered * again * p.hidden * p.itemsize
        fixed += p.needs_weight_grad * p.rows * p.hidden * p.itemsize
        fixed += p.needs_hidden_grad * p.hidden * (summed * max(4, p.itemsize) + product_rows * product)
        fixed += rank1 * self.tail_columns() * self.tail_column_bytes()
        if product and p.needs_hidden_grad:
            fixed += add_rows(again, p.hidden) * p.hidden * 4
        per_col = again * (p.itemsize + self.scratch_itemsize)
        per_col += -(-rank1 * product_rows // _tail_block_rows(p)) * self.tail_block_bytes() // max(1, p.vocab)
        if p.needs_weight_grad and not self.direct:
            if of_two and p.grad_itemsize < 4:
                per_col += p.hidden * (4 + product)
            elif of_two or p.grad_itemsize >= 4:
                per_col += p.hidden * product
            elif not low:
                per_col += p.hidden * p.itemsize
        return fixed, per_col


def _tail_block_rows(problem: Problem) -> int:
    return TAIL_BLOCK_ROWS.get(problem.device, TAIL_BLOCK_ROWS["cpu"])


def add_rows(rows: int, width: int) -> int:
    """CPU: rows of a bf16 or fp16 [rows, width] product added to a fp32 sum at a time; torch copies them first."""
    return max(1, min(rows // 16, MIB // max(1, 4 * width)))


def _fill(rows: Sequence[int], capacity: int) -> list[tuple[int, int]]:
    """Consecutive items [start, end) of at most `capacity` rows each, as many as fit; an item above it stands alone."""
    spans, start, used = [], 0, 0
    for i, count in enumerate(rows):
        if used + count > capacity and i > start:
            spans.append((start, i))
            start, used = i, 0
        used += count
    spans.append((start, len(rows)))
    return spans
