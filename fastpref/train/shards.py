"""What several ranks wrote into a checkpoint (torch.distributed.checkpoint), read on any number of them.

    checkpoint/sharded/     .metadata: which part of which tensor is in which file; __RANK_N.distcp: the parts

The metadata is a pickle, and a pickle can run code: here it makes the classes that describe tensors and nothing else.
"""

from __future__ import annotations

import pathlib
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastpref.errors import UserError, first_line

_DESCRIBES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
}


class _Description(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(found := vars(torch).get(name), torch.dtype):
            return found
        if module.split(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath"):  # another module in 3.13
            return getattr(pathlib, "Pure" + name)
        if name not in _DESCRIBES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which describes no tensor and may run code")
        return super().find_class(module, name)


def _reader(folder: Path) -> Any:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import StorageMeta, TensorStorageMetadata

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with (folder / ".metadata").open("rb") as file:
                found = _Description(file).load()
            tensors = found.state_dict_metadata.items()  # anything else would be unpickled by its reader
            found.state_dict_metadata = {key: it for key, it in tensors if isinstance(it, TensorStorageMetadata)}
            found.storage_meta = found.storage_meta or StorageMeta()
            found.storage_meta.load_id = self.load_id
            return found

    return Reader(folder)


def sharded_metadata(folder: Path) -> dict[str, Any]:
    """Name -> sizes and dtype of every tensor in a sharded checkpoint."""
    try:
        found: dict[str, Any] = _reader(folder).read_metadata().state_dict_metadata
        return found
    except Exception as error:  # a missing file, a damaged pickle, one that names what it must not
        raise UserError(f"{folder}/.metadata: cannot be read ({first_line(error)})") from error


def read_sharded(wanted: dict[str, Any], folder: Path) -> None:
    """In place; every rank reads its own part, for itself."""
    import torch.distributed.checkpoint as dcp

    if not wanted:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it reads without a process group
            dcp.load(wanted, storage_reader=_reader(folder), no_dist=True)
    except (Exception, dcp.api.CheckpointException) as error:
        raise UserError(f"{folder}: cannot be read ({last_line(error)})") from error


def last_line(error: BaseException) -> str:
    """What failed, of a CheckpointException, which tells of each rank at length, and is no Exception."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


def fill(own: Any, whole: Any) -> None:
    """Copies a whole tensor into one that may be sharded: of that, into what this rank has of it."""
    if hasattr(own, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        whole = distribute_tensor(whole.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
    own.copy_(whole)


def load_sharded_weights(model: nn.Module, folder: Path) -> None:
    """The weights of a sharded checkpoint into a model, which may be sharded over other ranks."""
    saved, wanted = sharded_metadata(folder), {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for key, tensor in wanted.items():
        there = tuple(saved[key].size) if key in saved else None
        if there != tuple(tensor.shape):
            raise UserError(f"{folder.parent}: is of another model: {key.removeprefix('model.')} is "
                            f"{there or 'missing'} there, {tuple(tensor.shape)} here")
    read_sharded(wanted, folder)
