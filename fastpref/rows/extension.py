"""The row contract over the C++ extension: tiles are checked, and go on as addresses, sizes and strides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import checks
from .checks import DTYPES
from .contract import FoldState, RowStats, Tile


class ExtensionRows:
    """The four sweeps. native: the extension; kernels: the part of it whose functions sweep memory of `device`; where:
    what they are told beside the tile (CPU: threads; CUDA: device and stream)."""

    def __init__(self, native: Any, kernels: Any, device: str, where: Callable[[Tensor], tuple[int, ...]]) -> None:
        self.native, self.kernels, self.device, self.where = native, kernels, device, where

    def residual(self, tile: Tile, out: Tensor | None, extras: tuple[str, ...] = (), *options: bool) -> RowStats:
        view, alive = self._tile(tile, out)
        found = checks.stats(tile.logits, out is not None, extras)
        stats = self.native.Stats(*(0 if x is None else x.data_ptr() for x in found))
        self.kernels.residual(view, self.out(out), stats, *options, *self.where(tile.logits))
        del alive
        return found

    def fold(self, tile: Tile, state: FoldState) -> None:
        view, alive = self._tile(tile)
        vectors = checks.state(state, tile.logits)
        self.kernels.fold(view, self.native.FoldState(*(x.data_ptr() for x in vectors)), *self.where(tile.logits))
        del alive

    def residual_given_lse(self, tile: Tile, lse: Tensor, out: Tensor) -> None:
        self._given(self.kernels.residual_given_lse, tile, out, lse=lse)

    def gradient_given_lse(
        self, tile: Tile, lse: Tensor, entropy: Tensor, grad_logps: Tensor, grad_entropy: Tensor, out: Tensor
    ) -> None:
        given = dict(lse=lse, entropy=entropy, grad_logps=grad_logps, grad_entropy=grad_entropy)
        self._given(self.kernels.gradient_given_lse, tile, out, **given)

    def _given(self, sweep: Callable[..., None], tile: Tile, out: Tensor, **given: Tensor) -> None:
        view, alive = self._tile(tile, out)
        vectors = [checks.vector(name, x, tile.logits.shape[0], tile.logits) for name, x in given.items()]
        addresses = [x.data_ptr() for x in vectors] + [0] * (4 - len(vectors))
        sweep(view, self.native.Given(*addresses), self.out(out), *self.where(tile.logits))
        del alive, vectors

    def _tile(self, tile: Tile, out: Tensor | None = None) -> tuple[Any, Tile]:
        """`native.Tile`, and the tensors that must live until its kernel is launched (on the CPU: until it is done)."""
        if tile.logits.device.type != self.device:
            raise ValueError(f"logits is on {tile.logits.device}; it takes {self.device}")
        tile = checks.tile(tile, out)
        bias = None if tile.bias is None else tile.bias.float()
        logits, maths = tile.logits, tile.transform
        view = self.native.Tile(
            logits.data_ptr(), DTYPES[logits.dtype], logits.stride(0), *logits.shape, tile.targets.data_ptr(),
            tile.ignore_index, tile.col_offset, 0 if bias is None else bias.data_ptr(),
            maths.logit_scale, maths.softcap or 0.0, maths.temperature,
        )
        return view, tile._replace(bias=bias)

    def out(self, tensor: Tensor | None) -> Any:
        """`native.Out`."""
        if tensor is None:
            return self.native.Out(0, "float32", 0)
        return self.native.Out(tensor.data_ptr(), DTYPES[tensor.dtype], tensor.stride(0))
