"""The script that runs between fork and exec of every child: ``python -I -S launch.py OPTIONS PROGRAM ARGUMENT...``.

The script ties the new process to its parent's life by means that the kernel enforces, then becomes PROGRAM. It is a
script of its own and not a ``preexec_fn``, because Python code between fork and exec of a process with threads can
deadlock.
"""

import ctypes
import json
import os
import resource
import signal
import sys

PR_SET_PDEATHSIG = 1
PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP = 28, 1 << 2
PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE = 47, 2
CAPABILITY_VERSION_3 = 0x20080522

libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, first: int, second: int = 0) -> None:
    """Call prctl(2) with ``option`` and its arguments.

    Raises:
        OSError: The call failed.
    """
    if libc.prctl(option, ctypes.c_ulong(first), ctypes.c_ulong(second), ctypes.c_ulong(0), ctypes.c_ulong(0)):
        raise OSError(ctypes.get_errno(), f"prctl {option}")


def die_with_parent(parent: int, death_signal: int = signal.SIGKILL) -> None:
    """Make the kernel send ``death_signal`` to this process when the thread that forked the process ends.

    ``parent`` is the pid of the parent, which the parent read before the fork. If the parent is already dead, no signal
    would come, and this process kills itself.
    """
    prctl(PR_SET_PDEATHSIG, death_signal)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def become(uid: int, gid: int, capability: int | None) -> None:
    """Change from root to ``uid`` and ``gid``, and keep ``capability`` through exec (capabilities(7), "Ambient")."""
    if capability is not None:
        prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP)  # without this bit, access(2) ignores the capability
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    if capability is not None:
        bits = 1 << capability
        header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
        if libc.capset(header, (ctypes.c_uint32 * 6)(bits, bits, bits, 0, 0, 0)):
            raise OSError(ctypes.get_errno(), "capset")
        prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability)


def main() -> None:
    options, argv = json.loads(sys.argv[1]), sys.argv[2:]
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    if options["user"] is not None:
        become(*options["user"])
    # A change of user clears the death signal, so the signal is set after the change.
    die_with_parent(options["parent"], options["death_signal"])
    if options["file_size"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (options["file_size"], options["file_size"]))
    if options["timer"] is not None:
        signal.setitimer(signal.ITIMER_REAL, options["timer"])
    os.execv(argv[0], argv)


if __name__ == "__main__":
    main()
