"""The few calls of CUDA's driver that moving blocks takes, beside what PyTorch offers. `libcuda` is loaded with the first one.

Addresses are plain numbers. Calls act in the context of `device` (an ordinal of this process), which PyTorch's is, too, so its streams
and tensors can be used with them. A call that waits leaves Python's lock free.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
import torch

IPC_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
_PORTABLE, _READ_ONLY = 1, 8  # CU_MEMHOSTREGISTER_...


class CudaError(Exception):
    """A call of the driver failed; the message names both."""


class _IpcHandle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_ubyte * IPC_HANDLE_BYTES)]


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaError(f"CUDA's driver is not here: {error}") from error
    address, size = ctypes.c_uint64, ctypes.c_size_t
    library.cuMemAlloc_v2.argtypes = [ctypes.POINTER(address), size]
    library.cuMemFree_v2.argtypes = [address]
    library.cuIpcGetMemHandle.argtypes = [ctypes.POINTER(_IpcHandle), address]
    library.cuIpcOpenMemHandle_v2.argtypes = [ctypes.POINTER(address), _IpcHandle, ctypes.c_uint]
    library.cuIpcCloseMemHandle.argtypes = [address]
    library.cuMemcpyAsync.argtypes = [address, address, size, ctypes.c_void_p]
    library.cuMemHostRegister_v2.argtypes = [ctypes.c_void_p, size, ctypes.c_uint]
    library.cuMemHostUnregister.argtypes = [ctypes.c_void_p]
    library.cuGetErrorName.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
    return library


def _call(name: str, *args: Any) -> None:
    driver = _driver()
    if (code := getattr(driver, name)(*args)) != 0:
        told = ctypes.c_char_p()
        driver.cuGetErrorName(code, ctypes.byref(told))
        raise CudaError(f"{name}: {(told.value or str(code).encode()).decode()}")


def use(device: int) -> None:
    """Make the device's context that of this thread; the calls below need one."""
    torch.cuda.set_device(device)
    torch.cuda.current_stream(device)


def allocate(device: int, nbytes: int) -> int:
    """Memory of its own allocation, so that others can be given it; its address. Raises `CudaError`."""
    use(device)
    address = ctypes.c_uint64()
    _call("cuMemAlloc_v2", ctypes.byref(address), nbytes)
    return address.value


def free(device: int, address: int) -> None:
    """Give back what `allocate` gave. Waits for what runs on the device."""
    use(device)
    _call("cuMemFree_v2", address)


def ipc_handle(address: int) -> bytes:
    """What another process of this host needs to open the allocation that begins at `address`."""
    handle = _IpcHandle()
    _call("cuIpcGetMemHandle", ctypes.byref(handle), address)
    return bytes(handle.reserved)


def open_ipc(device: int, handle: bytes) -> int:
    """Where another process's allocation is to be found from `device`. Once an allocation: opening it again fails on some devices.

    Raises `CudaError` where the devices do not reach each other, the allocation is gone, or it is this process's own.
    """
    use(device)
    address = ctypes.c_uint64()
    told = _IpcHandle.from_buffer_copy(handle)
    _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), told, _LAZY_PEER_ACCESS)
    return address.value


def close_ipc(device: int, address: int) -> None:
    """Undo `open_ipc`."""
    use(device)
    _call("cuIpcCloseMemHandle", address)


def copy(to: int, source: int, nbytes: int, stream: torch.cuda.Stream) -> None:
    """Put a copy between any two places, host memory included, behind what is in the stream."""
    _call("cuMemcpyAsync", to, source, nbytes, stream.cuda_stream)


def register(device: int, address: int, nbytes: int, *, read_only: bool = False) -> None:
    """Pin host memory, so that copies run at the speed of the bus (55 instead of 15 GB/s on an H200)."""
    use(device)
    _call("cuMemHostRegister_v2", address, nbytes, _PORTABLE | (_READ_ONLY if read_only else 0))


def unregister(device: int, address: int) -> None:
    """Undo `register`."""
    use(device)
    _call("cuMemHostUnregister", address)


def address_of(memory: memoryview) -> int:
    """Where host memory begins."""
    return int(np.frombuffer(memory, dtype=np.uint8).__array_interface__["data"][0])


def copy_out(device: int, address: int, to: memoryview) -> None:
    """Copy memory of the device to host memory; returns when it is there."""
    use(device)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    copy(address_of(to), address, to.nbytes, stream)
    stream.synchronize()
