"""torch and its functions for the losses, imported when the first one computes: what losses and options there are is
told without (`fastpref losses`, the keys of a configuration), in a tenth of the time."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any


class _Late(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


if TYPE_CHECKING:
    import torch as torch
    import torch.nn.functional as F
else:  # where torch is there, the thing itself
    torch = sys.modules.get("torch") or _Late("torch")
    F = sys.modules.get("torch.nn.functional") or _Late("torch.nn.functional")

__all__ = ["F", "torch"]
