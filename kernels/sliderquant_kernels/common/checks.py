"""What the ops check of the tensors that they are given."""

from __future__ import annotations

from torch import Tensor

ALIGNMENT = 16


def check_alignment(**tensors: Tensor) -> None:
    """The Triton kernels read 16 bytes at a time. What `layout.pack` returns is aligned, a slice need not be."""
    for name, tensor in tensors.items():
        if tensor.data_ptr() % ALIGNMENT:
            raise ValueError(
                f"{name}: expected an address that is a multiple of {ALIGNMENT} bytes, got an offset of "
                f"{tensor.data_ptr() % ALIGNMENT}; clone() the tensor"
            )
