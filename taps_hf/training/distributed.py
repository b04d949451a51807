"""How the processes of one run part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed


@contextmanager
def parting() -> Iterator[None]:
    """Leave the process group that was joined in the block, if one was, together with the others.

    For a command, which ends its process. Left to the interpreter's end, a group's threads meet
    peers that have gone already, and abort the process though its work is done.
    """
    try:
        yield
    except BaseException:
        # The others may be anywhere: nothing they would have to take part in, as NCCL's end is.
        if _in_group() and distributed.get_backend() == "gloo":
            distributed.destroy_process_group()
        raise
    if _in_group():
        distributed.barrier()
        distributed.destroy_process_group()


def _in_group() -> bool:
    return distributed.is_available() and distributed.is_initialized()
