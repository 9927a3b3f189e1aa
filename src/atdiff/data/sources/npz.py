"""An ``.npz`` file of uint8 images ``arr_0`` or ``images``, ``(N, H, W)`` or ``(N, H, W, C)``.

If it has them, its labels are ``arr_1`` or ``labels``, ``(N,)``.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator

import numpy as np

from atdiff.core.errors import UserError
from atdiff.data.npz import npz_array, npz_names
from atdiff.data.pictures import Arrays
from atdiff.data.sources.source import Found, Request, Source, check_whole, checked_labels

__all__ = ["NPZ"]

_NPZ_NAMES = (("images", "arr_0"), ("labels", "arr_1"))


def _load(request: Request) -> Found:
    path = request.path
    check_whole(path, request.split)
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} cannot be read as an .npz file: it is damaged or of another kind.")
    names = npz_names(path)
    found, of_labels = (next((name for name in both if name in names), None) for both in _NPZ_NAMES)
    if found is None:
        raise UserError(f"{path} holds no images: expected an array named arr_0 or images.")
    array = npz_array(path, found)
    shape = array.shape
    if array.dtype != np.uint8 or not (len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))):
        raise UserError(
            f"the images of {path} are {array.dtype} of shape {shape}: "
            "expected uint8 of shape (N, H, W) or (N, H, W, C) with C 1 or 3."
        )
    if 0 in shape:
        raise UserError(f"the images of {path} have shape {shape}: expected at least one.")

    def blocks() -> Iterator[np.ndarray]:
        for block in array.blocks():
            yield block[:, None] if block.ndim == 3 else block.transpose(0, 3, 1, 2)

    pictures = Arrays(shape[0], (1 if len(shape) == 3 else shape[3], *shape[1:3]), blocks, [path])
    if of_labels is None:
        return Found(pictures)
    return Found(pictures, checked_labels(npz_array(path, of_labels).whole(), shape[0], path))


NPZ = Source(lambda name, path: path.is_file() and path.suffix == ".npz", load=_load)
