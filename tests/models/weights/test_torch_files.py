"""Files of torch.save: read exactly as torch reads them, and refused where sizes are not as they should be."""

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from detection.models.weights.pickles import StandIn
from detection.models.weights.torch_files import read_archive, read_legacy

FLAT = torch.arange(24.0)
CONTENT = {
    "plain": FLAT.reshape(2, 3, 4),
    "a view of the same storage": FLAT[4:12].reshape(2, 4).T,
    "channels last": torch.arange(36.0).reshape(1, 3, 4, 3).contiguous(memory_format=torch.channels_last),
    "expanded": torch.ones(1).expand(3, 2),
    "scalar": torch.tensor(7),
    "empty": torch.zeros(0, 4),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "truth": torch.tensor([True, False]),
    **{str(dtype): torch.ones(3, dtype=dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.uint8)},
    "plain types": [1, -1, 2**40, 1.5, None, True, "ü", b"\xff", (1, 2), {"a": [], 3: float("inf")}, FLAT.shape],
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("legacy", [False, True])
def test_what_torch_saves_is_read_as_torch_reads_it(tmp_path: Path, protocol: int, legacy: bool):
    file = tmp_path / "file.pt"
    torch.save(CONTENT, file, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    mine = read_legacy(file) if legacy else read_archive(file, verified=True)
    assert list(mine) == list(CONTENT) and mine["plain types"] == CONTENT["plain types"]
    for name, tensor in CONTENT.items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(mine[name], tensor) and mine[name].dtype == tensor.dtype, name
            assert mine[name].stride() == tensor.stride() and mine[name].storage_offset() == tensor.storage_offset()
    mine["plain"][0, 1, 0] = -1
    assert mine["a view of the same storage"][0, 0] == -1


def test_without_tensors_only_the_pickle_is_read(tmp_path: Path):
    torch.save({"iteration": 3, "w": torch.ones(1000)}, tmp_path / "file.pt")
    content = (tmp_path / "file.pt").read_bytes()
    place = content.index(torch.ones(1000).numpy().tobytes())
    (tmp_path / "file.pt").write_bytes(content[:place] + bytes(4000) + content[place + 4000 :])
    state = read_archive(tmp_path / "file.pt", with_tensors=False)
    assert state["iteration"] == 3 and isinstance(state["w"], StandIn)
    with pytest.raises(ValueError, match="checksum"):
        read_archive(tmp_path / "file.pt", verified=True)


def rewritten(file: Path, change: Callable[[dict[str, bytes]], None], compression: int = zipfile.ZIP_STORED) -> Path:
    """The archive with other members."""
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    change(members)
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file


def replace(name: str, content: bytes) -> Callable[[dict[str, bytes]], None]:
    return lambda members: members.update({name: content})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.save({"w": torch.ones(6), "flag": torch.tensor([True])}, tmp_path / "file.pt")
    return tmp_path / "file.pt"


def refused(file: Path, words: str) -> None:
    with pytest.raises(pickle.UnpicklingError, match=words):
        read_archive(file)


def test_an_archive_written_by_another_zip_program_is_read(file: Path):
    assert torch.equal(read_archive(rewritten(file, lambda _: None), verified=True)["w"], torch.ones(6))


def test_a_compressed_member_is_refused_before_it_is_unpacked(file: Path):
    rewritten(file, replace("file/data/0", bytes(50_000_000)), zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 100_000
    refused(file, "'file/data.pkl' is compressed")


@pytest.mark.parametrize("size", [0, 20, 28])
def test_a_storage_of_another_size_than_its_member_is_refused(file: Path, size: int):
    refused(rewritten(file, replace("file/data/0", bytes(size))), f"storage '0' of 6 x torch.float32 has {size} bytes")


def test_a_storage_without_a_member_is_refused(file: Path):
    refused(rewritten(file, lambda members: members.pop("file/data/0")), "storage '0' .* has -1 bytes")


def test_truth_values_other_than_0_and_1_are_refused(file: Path):
    refused(rewritten(file, replace("file/data/1", b"\xff")), "truth values")


def test_another_byte_order_is_refused(file: Path):
    refused(rewritten(file, replace("file/byteorder", b"big")), "byte order is 'big'")


def test_an_archive_without_a_pickle_is_refused(file: Path):
    refused(rewritten(file, lambda members: members.pop("file/data.pkl")), "not one of torch.save")


def test_two_members_of_one_name_are_refused(file: Path):
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("file/data/0", bytes(24))
    refused(file, "two members .* one name")


def directory_field(content: bytearray, name: bytes, field: int) -> int:
    """Place of a 4-byte field of the entry for a member in the zip's directory."""
    return content.index(name, content.index(b"PK\1\2")) - 46 + field


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        (24, 4096, "overlaps another, or has two sizes"),  # its size when unpacked
        (20, 4, "overlaps another, or has two sizes"),  # its size as stored
        (42, 0, "overlaps another, or has two sizes"),  # its place: that of the first member
        (8, 1, "encrypted"),
    ],
)
def test_members_that_overlap_or_lie_about_their_size_are_refused(file: Path, field: int, value: int, error: str):
    rewritten(file, lambda _: None)
    content = bytearray(file.read_bytes())
    place = directory_field(content, b"file/data/0", field)
    content[place : place + 4] = struct.pack("<I", value)
    file.write_bytes(content)
    refused(file, error)


def test_a_directory_larger_than_any_is_refused(file: Path):
    content = bytearray(file.read_bytes())
    end = content.rindex(b"PK\5\6")
    size, start = 2**25, len(content)
    content[end:] = bytes(size) + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, size, start, 0)
    file.write_bytes(content)
    refused(file, "directory .* larger than any")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_cut_anywhere_is_an_error(tmp_path: Path, legacy: bool):
    file = tmp_path / "file.pt"
    torch.save({"w": torch.ones(6)}, file, _use_new_zipfile_serialization=not legacy)
    content = file.read_bytes()
    for length in range(0, len(content), 1 if legacy else 5):
        file.write_bytes(content[:length])
        with pytest.raises(Exception, match="."):  # noqa: PT011 - whatever a damaged file makes zipfile and genops raise
            (read_legacy if legacy else read_archive)(file)


@pytest.mark.parametrize(("size", "error"), [(2**30, "storages are larger than the file"), (5, "beyond its storage")])
def test_an_old_file_whose_storage_has_another_size_is_refused(tmp_path: Path, size: int, error: str):
    stream = io.BytesIO()
    torch.save({"w": torch.ones(6)}, stream, _use_new_zipfile_serialization=False)
    six = b"cpuq\x06K\x06"  # the storage's place, and how many values it has
    assert six in stream.getvalue()
    (tmp_path / "old.pt").write_bytes(stream.getvalue().replace(six, six[:-2] + b"J" + struct.pack("<i", size)))
    with pytest.raises(pickle.UnpicklingError, match=error):
        read_legacy(tmp_path / "old.pt")
