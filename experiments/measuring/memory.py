"""A memory allocator that does not add page faults to the times."""

import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8


def steady_memory(one_arena: bool = True) -> bool:
    """Makes glibc keep freed memory, so that page faults on large buffers are not timed.

    By default glibc returns every buffer above 32 MB to the kernel, and the next call pays a page
    fault for each 4 KB of it: on a virtual machine this can cost more than the convolution itself.
    A training step runs in one buffer and does not pay this for every layer.

    Args:
      one_arena: whether all threads share one arena, so that memory that one of them frees serves
        the others.

    Returns:
      Whether the allocator took the settings (False outside of glibc).

    Example:
      >>> steady_memory() in (True, False)
      True

    Reference: mallopt(3): M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1}
    if one_arena:
        settings[_M_ARENA_MAX] = 1
    taken = [mallopt(option, value) for option, value in settings.items()]
    return all(taken)
