"""Pickles made by hand to harm: refused with a reason, or read as inert data, in little time and memory."""

import io
import pickle
import struct

import numpy as np
import pytest

from detection.models.weights.pickles import MAX_DEPTH, MAX_OPERATIONS, StandIn, read_pickle
from tests.models.weights.pickle_streams import binary, build, call, dtype, name, number, text, tuple_of


def read(program: bytes, file_size: int | None = None):
    stream = b"\x80\x02" + program + b"."
    return read_pickle(io.BytesIO(stream), len(stream) if file_size is None else file_size)


def array(kind: bytes, shape: bytes, data: bytes) -> bytes:
    """A numpy array's pickle: what makes it, and its state."""
    made = call("numpy.core.multiarray", "_reconstruct", name("numpy", "ndarray"), tuple_of(number(0)), text("b"))
    return build(made, tuple_of(number(1), shape, kind, b"\x89", data))


NO_FIELDS = (b"N", b"N", b"N", number(-1), number(-1), number(0))


@pytest.mark.parametrize("code", ["O8", "|O", "V8", "f4,O", "(2,)f8", "S8", "U2", "M8[s]", "f16", "b1", "x" * 5000])
def test_an_array_of_other_than_numbers_stays_empty(code):
    """The state of a type once reached numpy: with an object field that its flags deny, bytes became pointers."""
    fields = b"}" + text("a") + tuple_of(dtype("O8"), number(0)) + b"s"
    hostile = (number(3), text("|"), b"N", tuple_of(text("a")), fields, number(8), number(1), number(0))
    for state in (hostile, (number(3), text("<"), *NO_FIELDS)):
        kind = build(dtype(code), tuple_of(*state))
        result = read(array(kind, tuple_of(number(1)), binary(b"\x41" * 8)))
        assert type(result) is np.ndarray and result.size == 0 and result.dtype == np.int8
        assert isinstance(read(call("numpy.core.multiarray", "scalar", kind, binary(b"A" * 8))), StandIn)


def test_nothing_of_a_types_state_but_its_byte_order_is_taken():
    hostile = (number(3), text(">"), b"N", tuple_of(text("a")), b"}", number(1), number(64), number(63))
    kind = build(dtype("f4"), tuple_of(*hostile))
    result = read(array(kind, tuple_of(number(1)), binary(struct.pack(">f", 1.5))))
    assert result.tolist() == [1.5] and result.dtype == np.float32 and result.dtype.names is None


HARMFUL = {
    "array larger than its bytes": array(dtype("f8"), tuple_of(number(1 << 30)), binary(b"A" * 8)),
    "array of less than its bytes": array(dtype("f8"), tuple_of(number(1)), binary(b"A" * 16)),
    "negative sizes": array(dtype("f8"), tuple_of(number(-1), number(-1)), binary(b"A" * 8)),
    "sizes whose product overflows": array(dtype("f8"), tuple_of(*3 * [number(1 << 62)], number(0)), binary(b"")),
    "a size that is no number": array(dtype("f8"), tuple_of(text("1")), binary(b"A" * 8)),
    "a list for data": array(dtype("f8"), tuple_of(number(1)), b"]"),
    "a scalar cut short": call("numpy.core.multiarray", "scalar", dtype("f8"), binary(b"A")),
    "another codec": call("_codecs", "encode", text("a"), text("rot13")),
    "a size of a string": call("torch", "Size", text("abc")),
    "a tensor of a list": call("torch._utils", "_rebuild_tensor", b"]", number(0), b")", b")"),
    "a parameter of a list": call("torch._utils", "_rebuild_parameter", b"]", b"\x89", b"N"),
    "a dictionary of numbers": call("collections", "OrderedDict", b"]" + number(1) + b"a"),
    "a call of a number": number(1) + b")R",
    "arguments in a list": name("_codecs", "encode") + b"]R",
    "a thousand arguments": call("numpy.core.multiarray", "_reconstruct", *1000 * [b"N"]),
    "state of a function": build(name("_codecs", "encode"), tuple_of(b"N", b"}" + text("__defaults__") + b"Ns")),
    "state of a type": build(name("torch", "float32"), b"}"),
    "append to a dictionary": b"}" + number(1) + b"a",
    "an item of a list": b"]" + number(0) + number(1) + b"s",
    "an extension": b"\x82\x01",
    "an unknown name": name("os", "system"),
    "a name by way of a known one": b"\x8c\x05numpy\x8c\x08f2py.run\x93",
    "a storage without a file": tuple_of(text("storage")) + b"Q",
    "a number of 100,000 bits": b"\x8b" + struct.pack("<i", 12500) + b"\x7f" * 12500,
    "a list that holds itself": b"]q\x00h\x00a",
    "text of many times the file": text("x" * 1000) + b"q\x000(" + 100_000 * b"h\x00" + b"t",
    "deep lists": 10_000 * b"]" + 9_999 * b"a",
    "deep tuples": b")" + 10_000 * b"\x85",
    "a billion items": b")" + b"".join(b"q%ch%c\x86" % (level, level) for level in range(MAX_DEPTH - 1)),
    "operations without end": (MAX_OPERATIONS + 1) * b"N",
}  # fmt: skip


@pytest.mark.parametrize("what", HARMFUL)
def test_what_could_harm_is_refused(what):
    with pytest.raises(pickle.UnpicklingError) as refused:
        read(HARMFUL[what])
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize("copied", [call("_codecs", "encode", b"h\x00", text("latin1")), b"h\x00"])
def test_memory_for_copies_of_what_the_file_has_once_is_bounded(copied):
    once = text("x" * 100_000) + b"q\x000]"
    assert len(read(once + copied + b"a")) == 1
    with pytest.raises(pickle.UnpicklingError, match="many times larger than the file"):
        read(once + 100 * (copied + b"a"))


def test_keys_whose_hash_takes_a_file_s_own_time_are_replaced():
    """The hash of a tuple takes as long as the items that it spells out, and as deep a recursion as it is nested."""
    deep = b")" + b"q\x00h\x00\x86" * 90
    (key,) = read(b"}" + deep + b"Ns")
    assert isinstance(key, StandIn)
    assert read(b"}" + text("k") + b"Ns" + number(1) + b"Ns") == {"k": None, 1: None}


def test_a_memo_s_index_takes_no_memory():
    # Python's own unpickler makes room for all the places before it.
    assert read(b"Nr\xff\xff\xff\x7f") is None


def test_lengths_beyond_the_stream_are_damage():
    for operation in (b"\x8e", b"\x8d", b"\x96"):
        with pytest.raises(ValueError, match="expected 1099511627776 bytes"):
            read(operation + struct.pack("<Q", 1 << 40))


def test_tensors_attributes_and_names_of_types_are_no_way_around():
    inner = tuple_of(text("x"), text("latin1"))
    program = call("torch._tensor", "_rebuild_from_type_v2", name("_codecs", "encode"), b"N", inner, b"}")
    assert read(program) == b"x"
    with pytest.raises(pickle.UnpicklingError, match="calls a int"):
        read(call("torch._tensor", "_rebuild_from_type_v2", number(1), b"N", inner, b"}"))
