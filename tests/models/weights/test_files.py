"""Weight files are read as data: foreign metadata becomes inert, and nothing that a file names is ever called."""

import functools
import io
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import types
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch

from detection.models.weights.files import WeightsError, read_weight_file
from detection.models.weights.pickles import StandIn

WEIGHTS = {"layer1.0.conv1.weight": torch.arange(6.0).reshape(2, 3)}

WEIGHTS_AS_ARRAYS = {name: tensor.numpy() for name, tensor in WEIGHTS.items()}


class Bomb:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


TORCH_WRITERS = {
    "torch": torch.save,
    "legacy torch": functools.partial(torch.save, _use_new_zipfile_serialization=False),
    "modern torch": functools.partial(torch.save, pickle_protocol=4),
}
WRITERS = {
    **TORCH_WRITERS,
    "pickle": lambda content, path: path.write_bytes(pickle.dumps(content)),
    "old pickle": lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2)),
}


@pytest.fixture
def mmengine(monkeypatch):
    """A package with MMEngine's names, gone again when the file is read; made to fail if it were used."""
    config, history = types.ModuleType("mmengine.config"), types.ModuleType("mmengine.logging.history_buffer")

    class ConfigDict(dict):
        def __setstate__(self, state):
            raise AssertionError("metadata was executed")

    class HistoryBuffer:
        def __init__(self):
            self._log_history = np.arange(3.0)
            self._statistics_methods = OrderedDict(mean=self.mean)
            self._max_length = np.int64(5)

        def mean(self):
            raise AssertionError("metadata was executed")

    for module, thing in ((config, ConfigDict), (history, HistoryBuffer)):
        thing.__module__, thing.__qualname__ = module.__name__, thing.__name__
        setattr(module, thing.__name__, thing)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "mmengine", types.ModuleType("mmengine"))
    monkeypatch.setitem(sys.modules, "mmengine.logging", types.ModuleType("mmengine.logging"))
    yield types.SimpleNamespace(ConfigDict=ConfigDict, HistoryBuffer=HistoryBuffer)


@pytest.mark.parametrize("write", TORCH_WRITERS)
def test_mmdetections_metadata_becomes_stand_ins_and_its_weights_are_read(write, mmengine, tmp_path, monkeypatch):
    config = mmengine.ConfigDict(model=mmengine.ConfigDict(type="FasterRCNN"))
    config.extra = "attribute"
    content = {
        "meta": {"cfg": config, "epoch": 12, "dataset_meta": {"CLASSES": ("cat", "dog")}, "where": pathlib.Path("a")},
        "message_hub": {"log_scalars": OrderedDict(loss=mmengine.HistoryBuffer()), "counts": defaultdict(int, a=1)},
        "state_dict": OrderedDict(WEIGHTS),
    }
    path = tmp_path / "epoch_12.pth"
    TORCH_WRITERS[write](content, path)
    for name in [name for name in sys.modules if name.startswith("mmengine")]:
        monkeypatch.delitem(sys.modules, name)

    result = read_weight_file(path)

    assert torch.equal(result["state_dict"]["layer1.0.conv1.weight"], WEIGHTS["layer1.0.conv1.weight"])
    assert result["meta"]["dataset_meta"] == {"CLASSES": ("cat", "dog")}
    assert isinstance(result["meta"]["cfg"], StandIn)
    assert isinstance(result["message_hub"]["log_scalars"]["loss"], StandIn)
    assert not vars(result["meta"]["cfg"])
    assert not any(name.startswith("mmengine") for name in sys.modules)


def hostile_calls(marker):
    """Calls that would leave `marker` behind."""
    touch = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w')"
    blob = io.BytesIO()
    torch.save(Bomb(os.system, touch), blob)
    return {
        "os.system": Bomb(os.system, touch),
        "eval": Bomb(eval, code),
        "exec": Bomb(exec, code),
        "open": Bomb(open, str(marker), "w"),
        "subprocess": Bomb(subprocess.check_call, ["touch", str(marker)]),
        "pathlib": Bomb(pathlib.Path.touch, marker),
        "shutil": Bomb(shutil.copy, __file__, str(marker)),
        "pickle.loads": Bomb(pickle.loads, pickle.dumps(Bomb(os.system, touch))),
        "torch.load of bytes": Bomb(torch.storage._load_from_bytes, blob.getvalue()),
        "map": Bomb(list, Bomb(map, os.system, [touch])),
        "numpy": Bomb(np.savetxt, str(marker), [1.0]),
    }


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("call", hostile_calls(pathlib.Path("x")))
def test_a_hostile_pickle_is_refused_and_nothing_in_it_runs(write, call, tmp_path):
    marker = tmp_path / "marker"
    path = tmp_path / "weights.pth"
    weights = WEIGHTS_AS_ARRAYS if "pickle" in write else WEIGHTS
    WRITERS[write]({"state_dict": weights, "meta": hostile_calls(marker)[call]}, path)
    if call == "pathlib":  # a path is usual metadata, so its class is known, but only as a stand-in
        assert isinstance(read_weight_file(path)["meta"], StandIn)
    else:
        with pytest.raises(WeightsError, match="nothing in it was executed") as error:
            read_weight_file(path)
        assert str(path) in str(error.value)
    assert not marker.exists()


def test_a_method_of_a_module_cannot_be_reached_through_getattr(tmp_path):
    marker = tmp_path / "marker"
    # What pickle writes for getattr(<stand-in for mmengine.fileio.os>, "system")("touch marker").
    program = (
        b"\x80\x02c__builtin__\ngetattr\ncmmengine.fileio\nos\nX\x06\x00\x00\x00system\x86R"
        + b"X"
        + len(f"touch {marker}").to_bytes(4, "little")
        + f"touch {marker}".encode()
        + b"\x85R."
    )
    path = tmp_path / "weights.pkl"
    path.write_bytes(program)
    assert isinstance(read_weight_file(path), StandIn)
    assert not marker.exists()


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "int64", ">f4"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_of_numpy_arrays_is_read_exactly(dtype, protocol, tmp_path):
    content = {"model": {"a": np.arange(6).reshape(2, 3).astype(dtype), "b": np.float32(2.5)}, "__author__": "someone"}
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    result = read_weight_file(path)
    assert result["__author__"] == "someone"
    assert result["model"]["b"] == np.float32(2.5)
    np.testing.assert_array_equal(result["model"]["a"], content["model"]["a"])
    assert result["model"]["a"].dtype == np.dtype(dtype).newbyteorder("=")


def test_python_2s_pickles_are_read(tmp_path):
    """The model zoo's files: arrays whose bytes are Python 2 strings."""
    values = np.array([1.5, -2.0], dtype="<f4")
    program = (
        b"\x80\x02}U\x01acnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x08" + values.tobytes() + b"tbs."
    )
    path = tmp_path / "model.pkl"
    path.write_bytes(program)
    np.testing.assert_array_equal(read_weight_file(path)["a"], values)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(WeightsError, match="nowhere.pth"):
        read_weight_file(tmp_path / "nowhere.pth")
    with pytest.raises(WeightsError, match="/dev/null is not a regular file"):
        read_weight_file(pathlib.Path("/dev/null"))


@pytest.mark.parametrize("write", WRITERS)
def test_a_file_that_is_cut_short_is_said_to_be_damaged(write, tmp_path):
    path = tmp_path / "weights.pth"
    big = np.arange(10_000.0)
    WRITERS[write]({"a": big if "pickle" in write else torch.from_numpy(big)}, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(WeightsError, match="weights.pth"):
        read_weight_file(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_text("<html>Not found</html>")
    with pytest.raises(WeightsError, match="is no torch file"):
        read_weight_file(path)
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    with pytest.raises(WeightsError, match="TorchScript"):
        read_weight_file(path)


def test_a_pickled_model_is_refused_with_a_remedy(tmp_path):
    path = tmp_path / "model.pth"
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(WeightsError, match=r"torch\.nn\.modules.*state_dict\(\)"):
        read_weight_file(path)
