"""scripts/download_coco.py against a server on this machine that fails in every way servers do."""

import fcntl
import hashlib
import importlib
import io
import shutil
import threading
import zipfile
from collections import namedtuple
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from data.tools import coco_archives
from data.tools.coco_archives import CocoArchive, space_needed
from data.tools.download import DownloadError, RemoteFile, download, unpack

SCRIPTS = Path(__file__).parents[2] / "scripts"


class Handler(BaseHTTPRequestHandler):
    """Serves server.files; server.faults says what goes wrong, one entry a request."""

    def do_GET(self):
        server = self.server
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        server.requests.append((self.path, begin))
        fault, value = server.faults.pop(0) if server.faults else (None, None)
        content = server.files.get(self.path)
        if fault == "status" or content is None:
            self.send_error(value if fault == "status" else 404)
            return
        if fault == "other file":
            content = value
        if begin and not server.ignores_range:
            if begin >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
            content = content[begin:]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:value] if fault == "drop" else content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.faults, server.requests, server.ignores_range = {}, [], [], False
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


class Watcher:
    """Takes down what is said and how far the progress came, and how long the pauses would have been."""

    def __init__(self):
        self.said, self.done, self.pauses = [], [], []

    @contextmanager
    def progress(self, description, total):
        yield self.done.append

    @property
    def options(self):
        return {"say": self.said.append, "progress": self.progress, "sleep": self.pauses.append}


def random_bytes(size, seed=0):
    return np.random.default_rng(seed).bytes(size)


def serve(server, content, path="/file.zip"):
    server.files[path] = content
    return RemoteFile(server.url + path, len(content), hashlib.sha256(content).hexdigest())


def make_zip(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_a_dropped_connection_goes_on_where_it_broke(server, tmp_path):
    content = random_bytes(300_000)
    remote, watcher = serve(server, content), Watcher()
    server.faults += [("drop", 100_000), ("status", 503), ("drop", 50_000)]
    assert download(remote, tmp_path / "file.zip", **watcher.options)
    assert (tmp_path / "file.zip").read_bytes() == content
    assert [begin for _, begin in server.requests] == [0, 100_000, 100_000, 150_000]
    assert watcher.pauses == [1, 2, 1]  # growing while nothing comes
    assert watcher.done[-1] == len(content)
    assert [path.name for path in tmp_path.iterdir()] == ["file.zip"]


def test_a_later_call_goes_on_with_what_an_earlier_one_left(server, tmp_path):
    content = random_bytes(200_000)
    remote = serve(server, content)
    (tmp_path / "file.zip.part").write_bytes(content[:120_000])
    assert download(remote, tmp_path / "file.zip", **Watcher().options)
    assert server.requests == [("/file.zip", 120_000)]
    assert (tmp_path / "file.zip").read_bytes() == content
    assert not download(remote, tmp_path / "file.zip", **Watcher().options)
    assert len(server.requests) == 1


def test_a_server_without_ranges_sends_all_of_it_again(server, tmp_path):
    content = random_bytes(200_000)
    remote = serve(server, content)
    server.ignores_range = True
    server.faults.append(("drop", 90_000))
    assert download(remote, tmp_path / "file.zip", **Watcher().options)
    assert (tmp_path / "file.zip").read_bytes() == content


@pytest.mark.parametrize("left", [b"x" * 70_000, b"x" * 100_000, b"x" * 130_000])
def test_what_does_not_belong_to_the_file_is_fetched_again_once(server, tmp_path, left):
    content = random_bytes(100_000)
    remote, watcher = serve(server, content), Watcher()
    (tmp_path / "file.zip.part").write_bytes(left)
    assert download(remote, tmp_path / "file.zip", **watcher.options)
    assert (tmp_path / "file.zip").read_bytes() == content


def test_a_file_of_another_size_is_refused_before_it_is_fetched(server, tmp_path):
    remote = serve(server, random_bytes(100_000))
    server.faults.append(("other file", b"<html>log in first</html>"))
    with pytest.raises(DownloadError, match="has 25 bytes there, and should have 100000"):
        download(remote, tmp_path / "file.zip", **Watcher().options)
    assert len(server.requests) == 1


def test_a_file_with_a_wrong_sum_never_gets_its_name(server, tmp_path):
    remote = serve(server, random_bytes(100_000))
    server.files["/file.zip"] = random_bytes(100_000, seed=1)
    with pytest.raises(DownloadError, match="wrong SHA-256"):
        download(remote, tmp_path / "file.zip", **Watcher().options)
    assert not (tmp_path / "file.zip").exists()
    assert (tmp_path / "file.zip.part").stat().st_size == 0


def test_a_wrong_file_of_the_users_is_not_overwritten(server, tmp_path):
    remote = serve(server, random_bytes(100_000))
    (tmp_path / "file.zip").write_bytes(b"mine")
    with pytest.raises(DownloadError, match="delete it"):
        download(remote, tmp_path / "file.zip", **Watcher().options)
    assert (tmp_path / "file.zip").read_bytes() == b"mine"
    assert not server.requests


def test_a_server_that_is_not_there_is_given_up_soon_with_the_address(tmp_path, monkeypatch, server):
    server.shutdown()
    server.server_close()
    watcher = Watcher()
    with pytest.raises(DownloadError, match=r"http://127.*cannot be reached .*refused.*mirror with --base-url"):
        download(RemoteFile(f"{server.url}/a.zip", 10, ""), tmp_path / "a.zip", **watcher.options)
    assert sum(watcher.pauses) < 30


def test_a_status_that_will_not_change_is_not_tried_again(server, tmp_path):
    with pytest.raises(DownloadError, match="404 Not Found; is --base-url right"):
        download(RemoteFile(f"{server.url}/no.zip", 10, ""), tmp_path / "no.zip", **Watcher().options)
    assert len(server.requests) == 1


def test_two_downloads_of_one_file_do_not_mix(server, tmp_path):
    remote = serve(server, random_bytes(1000))
    with (tmp_path / "file.zip.part").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DownloadError, match="written by another download"):
            download(remote, tmp_path / "file.zip", **Watcher().options)


def test_a_disk_that_fills_up_is_named(server, tmp_path):
    remote = serve(server, random_bytes(5000))
    (tmp_path / "file.zip.part").symlink_to("/dev/full")
    with pytest.raises(DownloadError, match="the disk of .* is full .*file.zip.part stays"):
        download(remote, tmp_path / "file.zip", **Watcher().options)
    assert not (tmp_path / "file.zip").exists()


@pytest.mark.parametrize(
    "name", ["../evil.jpg", "/evil.jpg", "val2017/../../evil.jpg", "other/a.jpg", "val2017/sub/a.jpg", "val2017/.."]
)
def test_members_with_other_paths_are_refused_and_nothing_is_unpacked(tmp_path, name):
    archive = tmp_path / "sub" / "val2017.zip"
    archive.parent.mkdir()
    archive.write_bytes(make_zip({"val2017/good.jpg": b"1", name: b"2"}))
    with pytest.raises(DownloadError, match="was not unpacked"):
        unpack(archive, archive.parent, "val2017", progress=Watcher().progress)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["sub", "val2017.zip"]


def test_links_in_an_archive_are_refused(tmp_path):
    link = zipfile.ZipInfo("val2017/link.jpg")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "val2017.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(DownloadError, match="no plain file"):
        unpack(tmp_path / "val2017.zip", tmp_path, "val2017", progress=Watcher().progress)


def test_a_damaged_archive_leaves_no_half_folder(tmp_path):
    content = bytearray(make_zip({"val2017/a.jpg": random_bytes(1000), "val2017/b.jpg": random_bytes(1000, 1)}))
    content[1500] ^= 1
    (tmp_path / "val2017.zip").write_bytes(content)
    with pytest.raises(DownloadError, match="cannot be unpacked .*CRC"):
        unpack(tmp_path / "val2017.zip", tmp_path, "val2017", progress=Watcher().progress)
    assert [path.name for path in tmp_path.iterdir()] == ["val2017.zip"]


@pytest.fixture
def small_coco(server, monkeypatch):
    """Archives of COCO's form with a few bytes each, on the server and in the script's table."""
    contents = {
        "annotations": {f"annotations/instances_{split}2017.json": b"{}" for split in ("train", "val")},
        "val": {f"val2017/{i:012}.jpg": random_bytes(50, i) for i in range(5)},
        "train": {f"train2017/{i:012}.jpg": random_bytes(50, i) for i in range(9)},
    }
    archives = {}
    for part, members in contents.items():
        real = coco_archives.ARCHIVES[part]
        remote = serve(server, make_zip(members), f"/{real.path}")
        archives[part] = CocoArchive(
            real.path, remote.size, remote.sha256, real.folder, real.pattern, len(members), 50 * len(members)
        )
    monkeypatch.setattr(coco_archives, "ARCHIVES", archives)
    return contents


@pytest.fixture
def main(small_coco, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("download_coco")
    monkeypatch.setattr(script, "ARCHIVES", coco_archives.ARCHIVES)
    return script.main


def test_the_standard_layout_comes_out_and_a_second_run_fetches_nothing(main, server, small_coco, tmp_path, capsys):
    command = ["--data-path", str(tmp_path / "coco"), "--base-url", server.url + "/"]
    assert main(command) == 0, capsys.readouterr().err
    files = {str(p.relative_to(tmp_path / "coco")): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {name: content for members in small_coco.values() for name, content in members.items()}
    assert len(server.requests) == 3
    assert main(command) == 0
    assert len(server.requests) == 3
    assert "val2017: complete, 5 files" in capsys.readouterr().out


def test_only_the_parts_asked_for_are_fetched_and_lost_files_come_back(main, server, tmp_path, capsys):
    command = ["--data-path", str(tmp_path), "--base-url", server.url, "--parts", "val", "--keep-archives"]
    (tmp_path / "val2017").mkdir()
    (tmp_path / "val2017" / "000000000001.jpg").write_bytes(b"cut sho")
    (tmp_path / "val2017" / "notes.txt").write_text("mine")
    assert main(command) == 0, capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["val2017", "val2017.zip"]
    assert (tmp_path / "val2017" / "000000000001.jpg").stat().st_size == 50
    assert (tmp_path / "val2017" / "notes.txt").read_text() == "mine"
    assert "1 of 5 files" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--parts", "test"])
    assert "parts are annotations, val, train" in capsys.readouterr().err


def test_too_small_a_disk_is_told_before_anything_is_fetched(main, server, tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 500))
    assert main(["--data-path", str(tmp_path / "a" / "b"), "--base-url", server.url]) == 1
    error = capsys.readouterr().err
    assert "0.0 GB free" in error and "are needed" in error and "Traceback" not in error
    assert error.count("\n") == 1
    assert not server.requests and not (tmp_path / "a").exists()


def test_the_space_needed_is_that_of_the_worst_moment(tmp_path):
    archives = [CocoArchive("zips/a.zip", 10, "", "a", "*.jpg", 1, 12), CocoArchive("b.zip", 30, "", "b", "*", 1, 31)]
    assert space_needed(archives, tmp_path, keep_archives=False) == 12 + 30 + 31
    assert space_needed(archives, tmp_path, keep_archives=True) == 10 + 12 + 30 + 31
    (tmp_path / "b.zip.part").write_bytes(bytes(7))
    assert space_needed(archives, tmp_path, keep_archives=False) == 12 + 23 + 31
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").touch()
    assert space_needed(archives, tmp_path, keep_archives=False) == 23 + 31
