"""Memory of CPU tensors that is used again after it was freed (csrc/cpu/tensor_memory.cpp)."""

from __future__ import annotations

import ctypes
import os
import platform

from fastdpo.logps.native import cpu_library


def use_tensor_memory() -> bool:
    """From now on CPU tensors of this process take memory that earlier ones have left, where glibc's malloc would not.

    With torch's own allocator a training on a CPU holds up to three times what its tensors need. It is for programs,
    not for libraries: it is for good, and for all tensors. A program whose environment has settings of glibc's malloc
    (``MALLOC_...``, ``GLIBC_TUNABLES``) is left as it is.

    Returns:
        Whether it is so now; not where the CPU library is not in use, nor where malloc is another than glibc's (a
        preloaded jemalloc, say; musl's, macOS's), of which this is not known to be needed.
    """
    use = getattr(cpu_library(), "fastdpo_cpu_use_tensor_memory", None)  # not in a library older than this file
    if use is None or _malloc_is_set() or not _malloc_is_glibcs():
        return False
    use.restype = ctypes.c_bool
    return bool(use())


def _malloc_is_set() -> bool:
    return any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)


def _malloc_is_glibcs() -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    libraries = (ctypes.CDLL(None), ctypes.CDLL("libc.so.6"))  # what this process calls by that name, and glibc's own
    used, own = (ctypes.cast(library.malloc, ctypes.c_void_p).value for library in libraries)
    return used == own
