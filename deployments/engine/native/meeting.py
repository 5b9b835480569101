"""The ranks of one machine in memory that they share (`meeting.cpp`): batches and sums between them without a network.

The segment has no name anywhere: rank 0 makes it with `memfd_create` and tells its `Place` over the group that the ranks have
already; the others open it through /proc, which the kernel grants to the same user alone. It goes when the last rank ends.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from torch import Tensor

from cluster.errors import ReplicaLost

LATE = 1
"""MEETING_LATE of `meeting.h`."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a segment is: a descriptor of a process, and what must be found there."""

    pid: int
    fd: int
    device: int
    inode: int

    @classmethod
    def create(cls, library: ctypes.CDLL, size: int) -> Place:
        """A segment for `size` ranks; the descriptor belongs to who joins with it. Raises OSError, also when memory is short."""
        fd = os.memfd_create("mmaas-meeting", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.fchmod(fd, 0o600)
            os.posix_fallocate(fd, 0, _prepared(library).mmaas_meeting_bytes(size))  # now, for later it would be a SIGBUS
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            found = os.fstat(fd)
        except BaseException:
            os.close(fd)
            raise
        return cls(os.getpid(), fd, found.st_dev, found.st_ino)

    def numbers(self) -> tuple[int, ...]:
        """`Place(*numbers)` in another process is the same place."""
        return astuple(self)

    def open(self) -> int:
        """A descriptor of this process. Raises OSError when another process is behind the number, as in another container."""
        if self.pid == os.getpid():
            return self.fd
        path = f"/proc/{self.pid}/fd/{self.fd}"
        found = Path(path).stat()
        if (found.st_dev, found.st_ino) != (self.device, self.inode):
            raise FileNotFoundError(f"{path} is not the segment of the leader")
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)


class Meeting:
    """This rank's seat. Every rank makes the same calls in the same order, from one thread at a time.

    Calls raise ReplicaLost when a rank has ended, or doesn't come within `timeout_s`; from then on every call does, on every rank.
    """

    def __init__(self, library: ctypes.CDLL, place: Place, rank: int, size: int, timeout_s: float) -> None:
        """Raises OSError when the segment can't be had. All ranks must have joined before the first call."""
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self._library = _prepared(library)
        fd = place.open()
        self.handle: int | None = self._library.mmaas_meeting_join(fd, self._library.mmaas_meeting_bytes(size), rank, size)
        """What other compiled parts call `meeting.h` with."""
        if self.handle is None:
            number = ctypes.get_errno()
            os.close(fd)
            raise OSError(number, f"rank {rank} of {size} can't join: {os.strerror(number)}")

    def all_reduce(self, tensor: Tensor) -> None:
        """The sum over all ranks, in place. float32 and bfloat16 as they are, anything else by way of float32."""
        if tensor.dtype not in (torch.float32, torch.bfloat16) or not tensor.is_contiguous():
            wide = tensor.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
            self.all_reduce(wide)
            tensor.copy_(wide)
            return
        narrow = tensor.dtype == torch.bfloat16
        call = self._library.mmaas_meeting_all_reduce_bf16 if narrow else self._library.mmaas_meeting_all_reduce
        self.check(call(self.handle, tensor.data_ptr(), tensor.numel(), self.timeout_s))

    def broadcast(self, tensor: Tensor) -> None:
        """Rank 0's contiguous `tensor` to all others', which have its size."""
        num_bytes = tensor.numel() * tensor.element_size()
        self.check(self._library.mmaas_meeting_broadcast(self.handle, tensor.data_ptr(), num_bytes, self.timeout_s))

    def gather(self, part: Tensor) -> Tensor | None:
        """`R x C` float32 from each rank as `R x (C * size)` on rank 0, in the order of ranks; None on the others."""
        part = part.contiguous()
        rows, columns = part.shape
        whole = torch.empty(rows, columns * self.size) if self.rank == 0 else None
        out = None if whole is None else whole.data_ptr()
        self.check(self._library.mmaas_meeting_gather(self.handle, part.data_ptr(), rows, columns, out, self.timeout_s))
        return whole

    @property
    def talk(self) -> int:
        """How many rounds this rank has begun. May be asked from another thread."""
        return int(self._library.mmaas_meeting_round(self.handle)) if self.handle is not None else 0

    def leave(self) -> None:
        """Give the seat up; ranks that still wait for this one see it as lost."""
        if self.handle is not None:
            self._library.mmaas_meeting_leave(self.handle)
            self.handle = None

    def check(self, result: int) -> None:
        """Raises ReplicaLost for any `MeetingResult` but MEETING_OK."""
        if result:
            why = f"didn't come within {self.timeout_s:g} s" if result == LATE else "has ended"
            raise ReplicaLost(f"rank {self._library.mmaas_meeting_missing(self.handle)} of the shard group {why}")


def _prepared(library: ctypes.CDLL) -> ctypes.CDLL:
    """With the types of `meeting.h`, and of the same library that other compiled parts are called in."""
    handle, address, number, seconds = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    signatures = {
        "mmaas_meeting_all_reduce": [handle, address, number, seconds],
        "mmaas_meeting_all_reduce_bf16": [handle, address, number, seconds],
        "mmaas_meeting_broadcast": [handle, address, number, seconds],
        "mmaas_meeting_gather": [handle, address, number, number, address, seconds],
        "mmaas_meeting_missing": [handle],
        "mmaas_meeting_round": [handle],
    }
    for name, types in signatures.items():
        getattr(library, name).argtypes = types
    library.mmaas_meeting_bytes.restype, library.mmaas_meeting_bytes.argtypes = ctypes.c_size_t, [ctypes.c_int]
    library.mmaas_meeting_round.restype = ctypes.c_uint32
    library.mmaas_meeting_leave.restype, library.mmaas_meeting_leave.argtypes = None, [handle]
    library.mmaas_meeting_join.restype = ctypes.c_void_p
    library.mmaas_meeting_join.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_int, ctypes.c_int]
    return library
