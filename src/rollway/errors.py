"""The one exception that users see as a sentence."""

import errno
import os
from pathlib import Path

_MENDS = {
    errno.ENOSPC: "free space on that disk",
    errno.EDQUOT: "free space within your quota",
    errno.EFBIG: "raise the limit on file sizes (`ulimit -f unlimited`)",
    errno.EROFS: "mount that file system for writing, or set `results` to another folder",
    errno.EACCES: "give yourself the rights to it (`chmod`, `chown`)",
    errno.EPERM: "give yourself the rights to it (`chmod`, `chown`)",
    errno.EIO: "check the disk and its file system (`dmesg`), or bring the file back from a copy",
    errno.EMFILE: "raise the limit on open files (`ulimit -n`)",
    errno.EISDIR: "remove the folder that stands in its place",
    errno.ENOTDIR: "remove the file that stands in place of its folder",
}


class RollwayError(Exception):
    """A mistake in input or environment: one sentence that names the file, row or key, and the mend."""


def unwritten(path: Path | str, error: OSError) -> RollwayError:
    """What to raise where the system refuses to write `path`, which is as it was before."""
    return RollwayError(f"{path}: cannot be written ({_said(error)}); nothing was changed{_mend(error)}")


def unread(path: Path | str, error: OSError) -> RollwayError:
    """What to raise where the system refuses to read `path`."""
    return RollwayError(f"{path}: cannot be read ({_said(error)}){_mend(error)}")


def of_system(error: Exception) -> RollwayError | None:
    """Of an error that nobody foresaw where it came up: whether the machine is to blame, and the sentence then."""
    if is_out_of_memory(error):
        said = " ".join(str(error).split())[:200] or type(error).__name__
        return RollwayError(
            f"out of memory ({said}); end what else uses it, load the models in half precision (`dtype: bfloat16`), or "
            "take smaller ones or a larger machine"
        )
    if not isinstance(error, OSError) or error.errno not in _MENDS:
        return None
    place = os.fsdecode(error.filename) if error.filename else "a file"
    return RollwayError(f"{place}: {_said(error)}{_mend(error)}")


def is_out_of_memory(error: BaseException) -> bool:
    """Of main memory or of a device's. torch's type is told by its name, as torch is not imported here; on the CPU it
    raises no type of its own."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def system_error(text: str) -> OSError | None:
    """The system's error that the message of a library tells of; None where it is none of those."""
    told = (number for number in _MENDS if os.strerror(number) in text)
    number = next(told, None)
    return None if number is None else OSError(number, os.strerror(number))


def _said(error: OSError) -> str:
    """In the words of the system: those of libraries are longer, and name the temporary file."""
    return os.strerror(error.errno) if error.errno else " ".join(str(error).split())


def _mend(error: OSError) -> str:
    mend = _MENDS.get(error.errno or 0)
    return f"; {mend} and run it again" if mend else ""
