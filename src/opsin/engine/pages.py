"""Weights mapped from a file: once they are packed, nothing need hold them in memory a second time."""

import ctypes
import mmap
import re
from pathlib import Path

from torch import nn

MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+)")  # of /proc/self/smaps: start, end, …, inode
MADV_DONTNEED = 4  # Linux


class FilePages:
    """The addresses at which, as of now, files are mapped into this process and no page has been written to.

    The memory behind them can be given back without loss: the next access reads the file again, from the system's
    cache as a rule. Linux; elsewhere there are none.
    """

    def __init__(self) -> None:
        try:
            lines = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            lines = []
        written: dict[range, int] = {}  # file's addresses → kB of pages that are no longer the file's
        addresses = range(0)
        for line in lines:
            if mapping := MAPPING.match(line):
                addresses = range(int(mapping[1], 16), int(mapping[2], 16))
                if mapping[3] != "0":
                    written[addresses] = 0
            elif addresses in written and line.startswith(("Anonymous:", "Swap:")):
                written[addresses] += int(line.split()[1])
        self.unwritten = [addresses for addresses, size in written.items() if not size]

    def release(self, module: nn.Module) -> None:
        """Give back the memory of those of the module's parameters that are such pages.

        What was written to them since would be lost: for weights that nobody else has in hand yet.
        """
        for tensor in module.parameters():
            # whole pages: the ends are a neighbour's too
            start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            whole = tensor.is_contiguous() and start < end
            if whole and any(start in file and end <= file.stop for file in self.unwritten):
                ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)

    def trim(self) -> None:
        """Give back what malloc holds free: a layer on its way into another layout takes several copies."""
        if self.unwritten and hasattr(ctypes.CDLL(None), "malloc_trim"):  # glibc
            ctypes.CDLL(None).malloc_trim(0)
