"""Reading pickles without running code: a class stays a name, an object becomes an ``Inert``.

The reader knows the opcodes of protocols 2 to 5, and of protocol 2 as Python 2 wrote it
(https://docs.python.org/3/library/pickletools.html). Reading takes seconds and some hundred
megabytes at most, even if the pickle is malicious.
"""

import pickle  # for the opcodes' names
import struct
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from emanet_triton.models.checkpoint_files.inert import Global, Inert, named, put
from emanet_triton.models.checkpoint_files.refusals import (
    DamagedError,
    DangerousError,
    UnsupportedError,
)

# Limits of a file
_STEPS = 2_000_000  # opcodes; a training's checkpoint has some 100,000
_NAME_STEPS = 8  # a class name counts as so many opcodes, because it takes as long
_MARKS = 1_000  # lists, dicts and tuples that are open at once
_LONG_TEXT = 1 << 20  # bytes of a text; longer texts are not decoded
_TEXTS = 1 << 26  # bytes of all decoded texts together
_NAME = 512  # bytes of the name of a module or a class
_INTEGER = 16  # bytes of an integer
_ARGUMENTS = 16  # arguments of a call


def apply(builder: Callable[..., object], arguments: object) -> object:
    """Call a builder with pickled arguments.

    Raises:
        TypeError: the arguments are no tuple, or the builder does not take them.
    """
    if type(arguments) is not tuple or len(arguments) > _ARGUMENTS:
        raise TypeError("no arguments")
    return builder(*arguments)


class Unpickler:
    """Reads the pickles of a file, one after the other.

    Args:
        data: the file.
        position: first byte of the first pickle.
        builders: by path, functions that are called with the pickled arguments instead of the
            function or class of this path. All other functions and classes give ``Inert`` objects.
        persistent: turns a persistent id into an object.

    Attributes:
        position: the byte after the last pickle that was read.
    """

    def __init__(
        self,
        data: memoryview,
        position: int,
        builders: Mapping[str, Callable[..., object]],
        persistent: Callable[[object], object],
    ) -> None:
        self.position = position
        self.data = data
        self.builders = builders
        self.persistent = persistent
        self.steps = 0
        self.texts = 0

    def load(self) -> Any:
        """Read one pickle: texts, numbers, ``None``, lists, tuples, dicts and results of builders.

        Keys of dicts are texts and integers; any other key becomes an ``Inert``.

        Raises:
            DamagedError: it is no pickle, or has more opcodes, levels or text than any checkpoint.
            DangerousError: it names a function that could do harm.
        """
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        start = self.position
        try:
            while (code := self.data[self.position]) != pickle.STOP[0]:
                self.position += 1
                self.spend(1)
                operation = _OPERATIONS[code]
                if operation is None:
                    self.fail(f"has the unknown opcode {code}")
                operation(self)
            self.position += 1
            return self.stack.pop()
        except (DamagedError, DangerousError, UnsupportedError):
            raise
        except (LookupError, TypeError, ValueError, struct.error) as error:
            raise DamagedError(
                f"the pickle at byte {start} is damaged at byte {self.position}"
            ) from error

    def fail(self, problem: str) -> NoReturn:
        raise DamagedError(f"the pickle {problem} before byte {self.position}")

    def spend(self, steps: int) -> None:
        self.steps += steps
        if self.steps > _STEPS:
            self.fail(f"takes more than {_STEPS} steps")

    def take(self, size: int) -> memoryview:
        end = self.position + size
        if size < 0 or end > len(self.data):
            self.fail("claims more bytes than the file has")
        part = self.data[self.position : end]
        self.position = end
        return part

    def number(self, form: struct.Struct) -> Any:
        (value,) = form.unpack_from(self.data, self.position)
        self.position += form.size
        return value

    def line(self) -> str:
        """The text up to the end of the line."""
        line, end, _ = bytes(self.data[self.position : self.position + _NAME]).partition(b"\n")
        if not end:
            self.fail("has an endless name")
        self.position += len(line) + 1
        return line.decode()

    def text(self, part: memoryview, errors: str) -> object:
        """The object for a text, which ends at ``position``."""
        if len(part) > _LONG_TEXT:
            return Inert("str")
        self.texts += len(part)
        if self.texts > _TEXTS:
            self.fail(f"has more than {_TEXTS} bytes of texts")
        return str(part, "utf-8", errors)

    def raw(self, part: memoryview) -> object:
        """The object for bytes, which end at ``position``."""
        return Inert("bytes")

    def build(self, target: object, state: object) -> None:
        """Set the state of an object. Only whether the object is an nn.Module is kept."""
        if isinstance(target, Inert) and isinstance(state, dict):
            target.is_module = "_parameters" in state and "_modules" in state

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def make(self, function: object, arguments: object) -> object:
        """The result of a builder, or an ``Inert`` where there is none for the function."""
        if isinstance(function, Inert):
            return Inert(function.path)
        if not isinstance(function, Global):
            self.fail("calls something that is no function")
        ordered = function.path == "collections.OrderedDict"
        builder = self._ordered_dict if ordered else self.builders.get(function.path)
        if builder is None:
            return Inert(function.path)
        return apply(builder, arguments)

    def _ordered_dict(self, pairs: Any = ()) -> dict[Any, Any]:
        """Python 2 passes the items as an argument; Python 3 sets them afterwards."""
        result: dict[Any, Any] = {}
        if type(pairs) not in (list, tuple):
            raise TypeError("not a list")
        self.spend(len(pairs))
        for key, value in pairs:
            put(result, key, value)
        return result


_Operation = Callable[[Unpickler], None]
_UINT1, _UINT2, _UINT4, _UINT8, _INT4 = (struct.Struct(f"<{code}") for code in "BHIQi")


def _pushing(make: Callable[[], object]) -> _Operation:
    return lambda machine: machine.stack.append(make())


def _number(form: struct.Struct) -> _Operation:
    return lambda machine: machine.stack.append(machine.number(form))


def _skipping(form: struct.Struct) -> _Operation:
    def skip(machine: Unpickler) -> None:
        machine.number(form)

    return skip


def _text(form: struct.Struct, errors: str) -> _Operation:
    def push(machine: Unpickler) -> None:
        part = machine.take(machine.number(form))
        machine.stack.append(machine.text(part, errors))

    return push


def _bytes(form: struct.Struct) -> _Operation:
    def push(machine: Unpickler) -> None:
        part = machine.take(machine.number(form))
        machine.stack.append(machine.raw(part))

    return push


def _integer(form: struct.Struct) -> _Operation:
    def push(machine: Unpickler) -> None:
        data = machine.take(machine.number(form))
        small = len(data) <= _INTEGER
        machine.stack.append(int.from_bytes(data, "little", signed=True) if small else Inert("int"))

    return push


def _integer_line(machine: Unpickler) -> None:
    """Integers of Python 2 beyond 32 bits; 00 and 01 are its False and True."""
    text = machine.line().removesuffix("L")
    if len(text) > 20 or not text.lstrip("-").isdecimal():
        machine.fail("has a strange number")
    machine.stack.append({"00": False, "01": True}.get(text, int(text)))


def _global(machine: Unpickler) -> None:
    machine.spend(_NAME_STEPS)
    module = machine.line()
    machine.stack.append(named(module, machine.line()))


def _stack_global(machine: Unpickler) -> None:
    machine.spend(_NAME_STEPS)
    name, module = machine.stack.pop(), machine.stack.pop()
    if not (isinstance(name, str) and isinstance(module, str)) or len(name + module) > _NAME:
        machine.fail("names a class strangely")
    machine.stack.append(named(module, name))


def _mark(machine: Unpickler) -> None:
    machine.marks.append(machine.stack)
    machine.stack = []
    if len(machine.marks) > _MARKS:
        machine.fail("is nested too deeply")


def _pop(machine: Unpickler) -> None:
    machine.stack.pop() if machine.stack else machine.pop_mark()


def _pop_mark(machine: Unpickler) -> None:
    machine.pop_mark()


def _tuple(machine: Unpickler) -> None:
    items = tuple(machine.pop_mark())
    machine.stack.append(items)


def _short_tuple(size: int) -> _Operation:
    def push(machine: Unpickler) -> None:
        items = tuple(machine.stack[-size:])
        if len(items) < size:
            raise IndexError("stack underflow")
        machine.stack[-size:] = [items]

    return push


def _extend(machine: Unpickler, items: list[Any]) -> None:
    target = machine.stack[-1]
    if type(target) is list:
        target.extend(items)
    elif not isinstance(target, Inert):
        machine.fail("appends to something that is no list")


def _append(machine: Unpickler) -> None:
    item = machine.stack.pop()
    _extend(machine, [item])


def _appends(machine: Unpickler) -> None:
    _extend(machine, machine.pop_mark())


def _set_item(machine: Unpickler) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    put(machine.stack[-1], key, value)


def _set_items(machine: Unpickler) -> None:
    items = machine.pop_mark()
    if len(items) % 2:
        machine.fail("has a key without a value")
    for i in range(0, len(items), 2):
        put(machine.stack[-1], items[i], items[i + 1])


def _frozen_set(machine: Unpickler) -> None:
    machine.pop_mark()
    machine.stack.append(Inert("frozenset"))


def _call(machine: Unpickler) -> None:
    arguments, function = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(machine.make(function, arguments))


def _new_with_keywords(machine: Unpickler) -> None:
    machine.stack.pop()
    _call(machine)


def _build(machine: Unpickler) -> None:
    state = machine.stack.pop()
    machine.build(machine.stack[-1], state)


def _persistent(machine: Unpickler) -> None:
    machine.stack.append(machine.persistent(machine.stack.pop()))


def _put(form: struct.Struct) -> _Operation:
    def put_memo(machine: Unpickler) -> None:
        machine.memo[machine.number(form)] = machine.stack[-1]

    return put_memo


def _memoize(machine: Unpickler) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _get(form: struct.Struct) -> _Operation:
    return lambda machine: machine.stack.append(machine.memo[machine.number(form)])


def _protocol(machine: Unpickler) -> None:
    if machine.number(_UINT1) > pickle.HIGHEST_PROTOCOL:
        machine.fail("has an unknown protocol")


_BY_OPCODE: dict[bytes, _Operation] = {
    pickle.PROTO: _protocol,
    pickle.FRAME: _skipping(_UINT8),
    pickle.NONE: _pushing(lambda: None),
    pickle.NEWTRUE: _pushing(lambda: True),
    pickle.NEWFALSE: _pushing(lambda: False),
    pickle.EMPTY_TUPLE: _pushing(tuple),
    pickle.EMPTY_LIST: _pushing(list),
    pickle.EMPTY_DICT: _pushing(dict),
    pickle.EMPTY_SET: _pushing(lambda: Inert("set")),
    pickle.BININT: _number(_INT4),
    pickle.BININT1: _number(_UINT1),
    pickle.BININT2: _number(_UINT2),
    pickle.BINFLOAT: _number(struct.Struct(">d")),
    pickle.LONG1: _integer(_UINT1),
    pickle.LONG4: _integer(_INT4),
    pickle.INT: _integer_line,
    pickle.LONG: _integer_line,
    pickle.SHORT_BINUNICODE: _text(_UINT1, "surrogatepass"),
    pickle.BINUNICODE: _text(_UINT4, "surrogatepass"),
    pickle.BINUNICODE8: _text(_UINT8, "surrogatepass"),
    pickle.SHORT_BINSTRING: _text(_UINT1, "surrogateescape"),  # Python 2's texts
    pickle.BINSTRING: _text(_INT4, "surrogateescape"),
    pickle.SHORT_BINBYTES: _bytes(_UINT1),
    pickle.BINBYTES: _bytes(_UINT4),
    pickle.BINBYTES8: _bytes(_UINT8),
    pickle.BYTEARRAY8: _bytes(_UINT8),
    pickle.GLOBAL: _global,
    pickle.STACK_GLOBAL: _stack_global,
    pickle.MARK: _mark,
    pickle.POP: _pop,
    pickle.POP_MARK: _pop_mark,
    pickle.TUPLE: _tuple,
    pickle.TUPLE1: _short_tuple(1),
    pickle.TUPLE2: _short_tuple(2),
    pickle.TUPLE3: _short_tuple(3),
    pickle.APPEND: _append,
    pickle.APPENDS: _appends,
    pickle.ADDITEMS: _appends,
    pickle.SETITEM: _set_item,
    pickle.SETITEMS: _set_items,
    pickle.FROZENSET: _frozen_set,
    pickle.REDUCE: _call,
    pickle.NEWOBJ: _call,
    pickle.NEWOBJ_EX: _new_with_keywords,
    pickle.BUILD: _build,
    pickle.BINPERSID: _persistent,
    pickle.BINPUT: _put(_UINT1),
    pickle.LONG_BINPUT: _put(_UINT4),
    pickle.MEMOIZE: _memoize,
    pickle.BINGET: _get(_UINT1),
    pickle.LONG_BINGET: _get(_UINT4),
}
_OPERATIONS = [_BY_OPCODE.get(bytes([code])) for code in range(256)]
