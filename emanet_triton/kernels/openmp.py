"""Run a function in PyTorch's own threads on Linux, which are those of OpenMP.

After an operation these threads keep a core busy for some milliseconds while they wait for the next
one. Other threads would have to share the cores with them.
"""

import contextlib
import ctypes
import functools
import inspect
from collections.abc import Callable, Generator, Iterator

import torch

_BODY = ctypes.CFUNCTYPE(None)  # it ignores the pointer that OpenMP gives it


def has_team() -> bool:
    """Whether ``run_in_team`` works in this process."""
    return _library() is not None


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The libraries of PyTorch, if they share work by GNU's interface of OpenMP."""
    try:
        library = ctypes.CDLL(torch._C.__file__)
        library.GOMP_parallel.argtypes = _BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
        library.GOMP_parallel.restype = None
        library.omp_set_num_threads.restype = None
    except (OSError, AttributeError):  # such as on macOS and Windows
        return None
    return library if _sets_threads_of_pytorch(library) else None


def _sets_threads_of_pytorch(library: ctypes.CDLL) -> bool:
    """Whether PyTorch uses this OpenMP.

    It may use none, or one that was loaded before it, such as Intel's by ``LD_PRELOAD``.
    """
    another = torch.get_num_threads() + 1
    before = library.omp_get_max_threads()
    try:
        library.omp_set_num_threads(another)
        return torch.get_num_threads() == another
    finally:
        library.omp_set_num_threads(before)


def run_in_team(
    function: Callable[[], None], drop: Callable[[BaseException], None], threads: int
) -> None:
    """Call a function once in each of ``threads`` threads: the calling thread and PyTorch's.

    Within these calls every PyTorch operation uses one thread. OpenMP may give fewer threads than
    asked. If the system refuses a thread, OpenMP ends the process, as it does in an operation of
    PyTorch.

    Args:
        function: called without arguments.
        drop: called with each exception of ``function``. One that a signal raises in the calling
            thread, such as KeyboardInterrupt, may come more than once.
        threads: as many as PyTorch uses. With fewer, OpenMP would end the others.
    """
    library = _library()
    assert library is not None

    def call() -> Generator[None, None, None]:
        try:
            yield  # here it waits for a thread
            torch.get_num_threads()  # a thread's first call of PyTorch sets its number of threads
            library.omp_set_num_threads(1)  # until the team ends
            with _one_thread_of_mkl(library):
                function()
        except GeneratorExit:  # no thread came
            return
        except BaseException as error:
            drop(error)
        yield  # no function is called before it, after which Python would look for signals

    # A signal may raise its exception at the first instruction of a function, where only ctypes
    # would catch it, to print it. A generator that waits within ``try`` has no such instruction.
    calls = [call() for _ in range(threads)]
    for waiting in calls:
        next(waiting)
    library.GOMP_parallel(_BODY(map(next, calls).__next__), None, threads, 0)
    if any(inspect.getgeneratorstate(called) == inspect.GEN_CLOSED for called in calls):
        drop(KeyboardInterrupt())  # even ``drop`` was interrupted


@contextlib.contextmanager
def _one_thread_of_mkl(library: ctypes.CDLL) -> Iterator[None]:
    try:
        set_threads = library.MKL_Set_Num_Threads_Local
    except AttributeError:  # PyTorch without MKL
        yield
        return
    before = set_threads(1)
    try:
        yield
    finally:
        set_threads(before)
