"""Errors a user can act on, and the one place that turns them into a line on the terminal."""

from __future__ import annotations

import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable

USER_ERRORS = {  # file errors that a user can fix; any other is a bug of ours
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EEXIST,
    errno.EISDIR,
}  # fmt: skip


class UserError(Exception):
    """A mistake the user can fix. The message says what is wrong, what was found and what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence for a name that is not among the known ones: the nearest, and all of them unless they are many."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    guess = f"Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
    listed = f"Known: {', '.join(known)}." if len(known) <= 12 or not close else ""
    return f"{guess} {listed}".strip()


def check_choice(setting: str, value: str, known: Iterable[str]) -> None:
    """Raise UserError unless `value` is one of the known ones."""
    known = list(known)
    if value not in known:
        raise UserError(f"{setting} is {value!r}. {nearest(value, known)}")


def check_at_least(setting: str, value: int, least: int) -> None:
    """Raise UserError when a number is too small."""
    if value < least:
        raise UserError(f"{setting} is {value}; it must be at least {least}")


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`: 0 when done, 2 with one line for a user's error, 130 when interrupted,
    141 when its output is no longer read.

    Anything else is a fault of ours and keeps its traceback.
    """
    try:
        main()
    except UserError as error:
        _stop(str(error))
    except KeyboardInterrupt:
        message = "interrupted; what is done is kept. The same command continues (finetune.py with --resume true)."
        print(f"\n{message}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:  # it is the terminal's pipe: `| head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush at exit
            sys.exit(141)
        raise
    except OSError as error:
        if error.errno not in USER_ERRORS:
            raise
        reason = f"{error.filename or 'a file'}: {os.strerror(error.errno).lower()}"
        _stop(f"cannot write or read {reason}. Fix that, or choose another folder.")
    except Exception as error:
        if "No space left on device" in str(error):  # safetensors reports it in a class of its own
            _stop(f"no space is left on the disk ({error}). Free some space; the same command continues.")
        raise


def _stop(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
