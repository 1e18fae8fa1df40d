"""Pickles written operation by operation, as no writer would write them."""

from __future__ import annotations

import pickletools
import random
import struct
from collections.abc import Callable


def number(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def text(value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def binary(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def tuple_of(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def call(module: str, function: str, *arguments: bytes) -> bytes:
    return name(module, function) + tuple_of(*arguments) + b"R"


def build(target: bytes, state: bytes) -> bytes:
    return target + state + b"b"


def dtype(code: str) -> bytes:
    return call("numpy", "dtype", text(code), b"\x89", b"\x88")


def operations(stream: bytes) -> list[bytes]:
    """A pickle cut into its operations."""
    starts = [place for _, _, place in pickletools.genops(stream) if place is not None]
    return [stream[start:end] for start, end in zip(starts, [*starts[1:], len(stream)], strict=True)]


NAMES = [
    *("numpy ndarray", "numpy dtype", "numpy.core.multiarray _reconstruct", "numpy._core.multiarray scalar"),
    *("_codecs encode", "collections OrderedDict", "collections defaultdict", "builtins set", "builtins getattr"),
    *("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor", "torch._utils _rebuild_parameter"),
    *("torch._tensor _rebuild_from_type_v2", "torch FloatStorage", "torch BoolStorage", "torch int64", "torch Size"),
    *("torch device", "torch Tensor", "mmengine.config ConfigDict", "numpy.dtypes Float32DType", "copyreg __newobj__"),
    *("builtins eval", "os system", "numpy.core.multiarray array", "torch.storage _load_from_bytes", "torch jit"),
]
CODES = ["", "f4", "<f8", ">i2", "u1", "O8", "|O", "V8", "S3", "U2", "M8[s]", "f4,O", "(2,)f4", "b1", "c8", "f16", "?"]
SIZES = [-1, 0, 1, 2, 3, 6, 7, 24, 2**16, 2**31, 2**40, 2**62, 2**63, 2**64, -(2**63)]
TEXTS = ["", "a", "state_dict", "model", "conv1.weight", "format", "<", ">", "|", "latin1", "storage", "0", "1"]


class HostilePickles:
    """Pickles whose operations are in order, and whose names, states, arguments, types and sizes are not."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        self._memoized = 0

    def stream(self) -> bytes:
        entries = b"".join(text(key) + self.value(0) for key in self._dice.choices(TEXTS, k=self._dice.randint(1, 4)))
        return b"\x80\x02}(" + entries + b"u."

    def value(self, depth: int) -> bytes:
        """Operations that leave one value on the stack."""
        kinds: list[Callable[[int], bytes]] = [self._atom]
        if depth < 6:
            kinds += [self._atom, self._container, self._call, self._array, self._tensor, self._odd]
        written = self._dice.choice(kinds)(depth + 1)
        if self._dice.random() < 0.2:
            written += b"q" + bytes([self._memoized % 256])
            self._memoized += 1
        elif self._memoized and self._dice.random() < 0.2:
            written = b"h" + bytes([self._dice.randrange(min(self._memoized, 256))])
        return written

    def _size(self) -> bytes:
        return number(self._dice.choice(SIZES))

    def _text(self) -> bytes:
        return text(self._dice.choice(TEXTS))

    def _name(self) -> bytes:
        return name(*self._dice.choice(NAMES).split())

    def _values(self, depth: int, most: int = 4) -> list[bytes]:
        return [self.value(depth) for _ in range(self._dice.randint(0, most))]

    def _atom(self, _: int) -> bytes:
        data = self._dice.randbytes(self._dice.choice([0, 1, 4, 8, 24, 96]))
        short = b"U" + bytes([len(data)]) + data
        others = [b"N", b"\x88", b"\x89", b")", b"]", b"}", b"\x8f", b"G\x7f\xf8" + bytes(6), binary(data), short]
        return self._dice.choice([*others, self._size(), self._text(), self._name()])

    def _container(self, depth: int) -> bytes:
        items = b"".join(self._values(depth))
        pairs = b"".join(self.value(depth) + self.value(depth) for _ in range(self._dice.randint(0, 3)))
        ways = [b"(" + items + b"t", b"](" + items + b"e", b"(" + items + b"l", b"\x8f(" + items + b"\x90"]
        return self._dice.choice([*ways, b"(" + items + b"\x91", b"}(" + pairs + b"u", b"(" + pairs + b"d"])

    def _call(self, depth: int) -> bytes:
        function, arguments = self._name(), tuple_of(*self._values(depth))
        pair = f"i{self._dice.choice(NAMES).replace(' ', chr(10))}\n".encode()
        ways = [function + arguments + b"R", function + arguments + b"\x81", function + arguments + b"}\x92"]
        called = self._dice.choice([*ways, b"(" + function + b"".join(self._values(depth)) + b"o", b"(" + pair])
        return build(called, self.value(depth)) if self._dice.random() < 0.3 else called

    def _dtype(self, depth: int) -> bytes:
        made = dtype(self._dice.choice(CODES))
        if self._dice.random() < 0.5:
            return made
        fields = b"}" + self._text() + tuple_of(dtype(self._dice.choice(CODES)), self._size()) + b"s"
        either = [b"N", fields, tuple_of(self._text()), self._size(), self.value(depth)]
        return build(made, tuple_of(number(3), self._text(), *(self._dice.choice(either) for _ in range(6))))

    def _array(self, depth: int) -> bytes:
        data = self._dice.choice([binary(bytes(24)), binary(bytes(8)), b"U\x04abcd", b"]", self.value(depth)])
        kind = self._dtype(depth) if self._dice.random() < 0.9 else self.value(depth)
        if self._dice.random() < 0.3:
            return call("numpy.core.multiarray", "scalar", kind, data)
        shape = tuple_of(*(self._size() for _ in range(self._dice.randint(0, 3))))
        shape = self._dice.choice([shape, tuple_of(number(3)), tuple_of(number(6)), self.value(depth)])
        made = call("numpy.core.multiarray", "_reconstruct", name("numpy", "ndarray"), tuple_of(number(0)), text("b"))
        return build(made, tuple_of(number(1), shape, kind, self._dice.choice([b"\x88", b"\x89"]), data))

    def _tensor(self, depth: int) -> bytes:
        kind = name("torch", self._dice.choice(["FloatStorage", "BoolStorage", "LongStorage", "int64", "Size"]))
        length = self._dice.choice([number(6), self._size()])
        parts = [text("storage"), kind, self._dice.choice([text("0"), self._text()]), text("cpu"), length]
        parts += [b"N"] if self._dice.random() < 0.5 else []  # the old format has a view besides
        storage = tuple_of(*parts) + b"Q"
        sizes, strides = (
            tuple_of(*(self._dice.choice([number(1), number(2), self._size()]) for _ in "ab")) for _ in "ab"
        )
        arguments = [storage, self._dice.choice([number(0), self._size()]), sizes, strides, b"\x89", b"}"]
        if self._dice.random() < 0.2:
            arguments[self._dice.randrange(6)] = self.value(depth)
        return call("torch._utils", "_rebuild_tensor_v2", *arguments)

    def _odd(self, depth: int) -> bytes:
        """Operations on what they are not for."""
        one, other = self.value(depth), self.value(depth)
        index = struct.pack("<I", self._dice.choice([0, 1, 2**16, 2**31, 2**32 - 1]))
        length = struct.pack("<Q", self._dice.choice([0, 1, 2**31, 2**62, 2**64 - 1]))
        return self._dice.choice(
            [
                *(build(one, other), one + other + b"a", one + b"(" + other + b"e", one + b"(" + other + other + b"u"),
                *(one + b"(" + other + b"\x90", one + other + b"R", one + other + b"\x81", one + b"20", one + b"Q"),
                *(
                    one + b"r" + index,
                    b"j" + index,
                    b"\x8e" + length,
                    b"\x95" + length + one,
                    b"(" + one + b"1" + other,
                ),
                *(b"\x82\x01", b"P0\n", b"\x97", one + b"\x98", b"L" + b"9" * 5000 + b"L\n", b"I01\n", b"Fnan\n"),
                *(one + other + b"\x93", b"]q\x00h\x00a", b")" + b"\x85" * 200, one + b"\x94", b"\x80\xff" + one),
            ]
        )


def changed(stream: bytes, dice: random.Random) -> bytes:
    """A pickle with a few operations left out, repeated, exchanged, or put in from elsewhere."""
    parts = operations(stream)
    for _ in range(dice.randint(1, 4)):
        place = dice.randrange(len(parts))
        how = dice.choice(["drop", "repeat", "exchange", "hostile", "argument"])
        if how == "drop" and len(parts) > 1:
            del parts[place]
        elif how == "repeat":
            parts.insert(dice.randrange(len(parts)), parts[place])
        elif how == "exchange":
            other = dice.randrange(len(parts))
            parts[place], parts[other] = parts[other], parts[place]
        elif how == "hostile":
            hostile = HostilePickles(dice).value(3)
            parts[place : place + dice.randint(0, 1)] = [hostile]
        elif len(parts[place]) > 1:
            altered = bytearray(parts[place])
            altered[dice.randrange(1, len(altered))] = dice.choice([0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)])
            parts[place] = bytes(altered)
    return b"".join(parts)
