"""Stand-ins for the classes, functions and objects of a pickle, which are never made."""

from dataclasses import dataclass

from emanet_triton.models.checkpoint_files.refusals import DangerousError

_KEY = 1 << 60  # below it, different integers have different hashes
# No function that a pickle names is ever called. These lists only choose the message: a file with
# such a name is an attack.
_DANGEROUS_MODULES = frozenset(
    [
        "_ctypes",
        "_pickle",
        "_posixsubprocess",
        "asyncio",
        "codeop",
        "ctypes",
        "ftplib",
        "imp",
        "importlib",
        "marshal",
        "multiprocessing",
        "nt",
        "os",
        "pickle",
        "popen2",
        "posix",
        "pty",
        "runpy",
        "shutil",
        "smtplib",
        "socket",
        "subprocess",
        "sys",
        "webbrowser",
    ]
)
_DANGEROUS_BUILTINS = frozenset(
    [
        "__import__",
        "apply",
        "breakpoint",
        "compile",
        "delattr",
        "eval",
        "exec",
        "execfile",
        "exit",
        "globals",
        "help",
        "input",
        "locals",
        "open",
        "quit",
        "setattr",
        "vars",
    ]
)
_HARMLESS = frozenset(  # named tuples by which a training may describe its machine
    f"{module}.{name}"
    for module in ("os", "posix", "nt")
    for name in (
        *("sched_param", "stat_result", "statvfs_result", "terminal_size", "times_result"),
        "uname_result",
    )
)
_BUILTINS = ("builtins", "__builtin__")


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function that a pickle names. It is never imported.

    Attributes:
        path: module and name, joined by a dot.
    """

    path: str


class Inert:
    """Stands for an object that is no weight. It holds no content.

    Attributes:
        path: of the class or function that makes the object.
        is_module: whether the object is an ``nn.Module``.
    """

    __slots__ = ("is_module", "path")

    def __init__(self, path: str) -> None:
        self.path = path
        self.is_module = False


def named(module: str, name: str) -> Global:
    """The stand-in for ``module.name``.

    Raises:
        DangerousError: the function or its module is in the lists of dangerous names.
    """
    path = f"{module}.{name}"
    if module in _BUILTINS and name in _DANGEROUS_BUILTINS:
        raise DangerousError(name)
    modules = {module.partition(".")[0], *name.split(".")[:-1]}
    if modules & _DANGEROUS_MODULES and path not in _HARMLESS:
        raise DangerousError(path)
    return Global(path)


def put(target: object, key: object, value: object) -> None:
    """Set an item of a dict. For an ``Inert`` nothing happens.

    Only texts and small integers are hashed, because the hash of nested tuples can take for ever.
    """
    if type(target) is dict:
        if isinstance(key, str):
            key = str(key)  # not one of a subclass
        elif type(key) is not int or not -_KEY < key < _KEY:
            key = Inert("key")
        target[key] = value
    elif not isinstance(target, Inert):
        raise TypeError("not a dict")
