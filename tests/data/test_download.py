"""Downloads: broken, slow and lying mirrors, parts of an archive, and what is unpacked."""

import contextlib
import dataclasses
import hashlib
import http.server
import io
import random
import tarfile
import threading
import time
import typing

import pytest
from helpers import refused

import main
from lab.data import cifar10, cifar10h, download
from lab.machine.options import UserError


def archive_of(*members):
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return made.getvalue()


BATCHES = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch", "batches.meta"]

ARCHIVE = archive_of(
    *((f"cifar-10-batches-py/{name}", random.Random(name).randbytes(90_000)) for name in BATCHES)
)


class Mirror(http.server.BaseHTTPRequestHandler):
    """A server whose path says what is wrong with it; remembers what it was asked."""

    asked: typing.ClassVar[list] = []

    def do_GET(self):
        fault = self.path.split("?")[0].strip("/")
        start = 0 if fault == "norange" else int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.asked.append((fault, int(self.headers.get("Range", "bytes=0-")[6:-1])))
        if fault in ("404", "503"):
            self.send_error(int(fault))
        elif fault == "loop":
            self.send_response(302)
            self.send_header("Location", "/loop")
            self.end_headers()
        elif fault == "silent":
            time.sleep(3)
        else:
            self.send_body(fault, start)

    def send_body(self, fault, start):
        bodies = {"html": b"<html>We are down for maintenance</html>", "other": bytes(len(ARCHIVE))}
        bodies["short"] = ARCHIVE[: len(ARCHIVE) // 2]
        body = bodies.get(fault, ARCHIVE)
        if start >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.send_header("Content-Type", "text/html" if fault == "html" else "application/gzip")
        self.end_headers()
        body = body[start:]
        if fault in ("broken", "norange"):
            body = body[: len(ARCHIVE) // 3]
        pause = 0.3 if fault == "slow" else 0
        with contextlib.suppress(ConnectionError):  # it is left for another
            for i in range(0, len(body), 2**16):
                self.wfile.write(body[i : i + 2**16])
                time.sleep(pause)

    def log_message(self, *_):
        pass


@pytest.fixture
def mirrors(monkeypatch, tmp_path):
    """Makes a data folder and settings of a download whose mirrors have the faults named."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    Mirror.asked = []
    nobody = dataclasses.replace(cifar10h.ARCHIVE, mirrors=("http://127.0.0.1:1/",))
    monkeypatch.setattr(cifar10h, "ARCHIVE", nobody)

    def make(*faults):
        address = f"http://127.0.0.1:{server.server_port}"
        urls = [
            f"{address}/{fault}" if fault != "nobody" else "http://127.0.0.1:1/" for fault in faults
        ]
        archive = dataclasses.replace(
            cifar10.ARCHIVE,
            size=len(ARCHIVE),
            hash=hashlib.md5(ARCHIVE).hexdigest(),
            mirrors=tuple(urls),
        )
        monkeypatch.setattr(cifar10, "ARCHIVE", archive)
        return tmp_path / "data", download.Settings(
            connect_seconds=1, slow_seconds=1, slow_rate=1000
        )

    (tmp_path / "data").mkdir()
    yield make
    server.shutdown()


def arrived(folder):
    names = sorted(path.name for path in folder.iterdir())
    unpacked = sorted(path.name for path in (folder / "cifar-10-batches-py").iterdir())
    archive_and_batches = ["cifar-10-batches-py", "cifar-10-python.tar.gz"]
    return names == archive_and_batches and unpacked == sorted(BATCHES)


FP32 = ("--precision", "fp32")  # else it is measured, which takes seconds


def out_of(folder):
    """Arguments of a run on the data in `folder`, whose results go below it."""
    return ["--data-dir", str(folder), "--output-dir", str(folder / "out"), *FP32]


FAULTS = ("404", "503", "html", "short", "other", "loop", "silent", "nobody")


@pytest.mark.parametrize("fault", [*FAULTS, "broken", "norange"])
def test_next_mirror_takes_over(mirrors, fault):
    folder, settings = mirrors(fault, "good")
    cifar10.fetch(folder, settings)
    assert arrived(folder)
    assert [asked for asked, _ in Mirror.asked][-1] == "good"


def test_broken_transfers_resume_where_they_broke(mirrors):
    folder, settings = mirrors("404", "broken")
    cifar10.fetch(folder, settings)
    starts = [start for fault, start in Mirror.asked if fault == "broken"]
    assert arrived(folder) and len(starts) == 4 and starts == sorted(starts) and starts[1] > 0


def test_slow_mirror_is_left_while_another_remains(mirrors):
    folder, settings = mirrors("slow", "good")
    cifar10.fetch(folder, settings)
    assert arrived(folder) and [fault for fault, _ in Mirror.asked] == ["slow", "good"]
    assert Mirror.asked[1][1] > 0  # what the slow one gave is not thrown away


@pytest.mark.parametrize(
    "others",
    [
        pytest.param((), marks=pytest.mark.slow),
        pytest.param(("404",), marks=pytest.mark.slow),
        ("nobody", "html"),
    ],
)
def test_slow_mirror_is_used_if_it_is_the_last(mirrors, others):
    folder, settings = mirrors("slow", *others)
    cifar10.fetch(folder, settings)
    assert arrived(folder)


def test_a_given_mirror_comes_first(mirrors):
    folder, settings = mirrors("good")
    other = cifar10.ARCHIVE.mirrors[0].replace("good", "also-good")
    cifar10.fetch(folder, dataclasses.replace(settings, mirror=other))
    assert arrived(folder) and [fault for fault, _ in Mirror.asked] == ["also-good"]


def test_results_may_lie_in_the_data_folder(mirrors, monkeypatch, capsys):
    """Each has a lock there; the same one for both would be waited for without end."""
    folder, _ = mirrors("good")
    monkeypatch.setattr(cifar10, "open_parts", pretend_to_open)
    monkeypatch.setattr(main, "load_data", load_and_stop)
    said = refused(capsys, "--data-dir", str(folder), "--output-dir", str(folder), *FP32)
    assert "it is there" in said and (folder / "cifar-10-batches-py" / "data_batch_1").exists()


def pretend_to_open(data_dir):
    """The batches of tests are no images."""
    if not (data_dir / "cifar-10-batches-py").exists():
        raise RuntimeError("Dataset not found")
    return "train", "test"


def load_and_stop(settings):
    assert cifar10.load(settings.data_dir, settings.download) == ("train", "test")
    raise UserError("it is there")


def test_archive_in_place_needs_no_network(mirrors):
    folder, settings = mirrors("nobody")
    (folder / "cifar-10-python.tar.gz").write_bytes(ARCHIVE)
    cifar10.fetch(folder, settings)
    assert arrived(folder)


def test_when_no_mirror_is_left_one_message_says_all(mirrors, capsys):
    folder, _ = mirrors(*FAULTS, "norange")
    patience = ["--connect-seconds", "1", "--slow-seconds", "1"]
    message = refused(capsys, *out_of(folder), *patience)
    for url in cifar10.ARCHIVE.mirrors:
        assert url in message
    for part in ("404", "503", "text/html", "MD5", "cifar-10-python.tar.gz", str(folder),
                 "--dataset shapes"):  # fmt: skip
        assert part in message


PART = "cifar-10-python.tar.gz.part"


def test_a_part_that_is_whole_needs_no_network(mirrors):
    """The process was killed between the last byte and the file's new name."""
    folder, settings = mirrors("nobody")
    (folder / PART).write_bytes(ARCHIVE)
    cifar10.fetch(folder, settings)
    assert arrived(folder) and not Mirror.asked


@pytest.mark.parametrize(
    "part", [bytes(len(ARCHIVE)), ARCHIVE + b"more", bytes(1000), ARCHIVE[:1000] + bytes(1000)],
    ids=["bad", "too long", "bad start", "bad end"],
)  # fmt: skip
def test_a_bad_part_is_fetched_again(mirrors, part):
    folder, settings = mirrors("good")
    (folder / PART).write_bytes(part)
    cifar10.fetch(folder, settings)
    assert arrived(folder) and Mirror.asked[-1] == ("good", 0)


def test_a_damaged_archive_in_place_is_mentioned(mirrors, capsys):
    folder, _ = mirrors("nobody")
    (folder / "cifar-10-python.tar.gz").write_bytes(ARCHIVE[:1000])
    message = refused(capsys, *out_of(folder))
    assert f"{folder / 'cifar-10-python.tar.gz'} is not whole (1,000 of " in message


@pytest.mark.parametrize("place", ["127.0.0.1:{port}/404", "127.0.0.1:1/nobody"])
def test_secrets_of_a_mirror_are_not_shown(mirrors, capsys, place):
    folder, _ = mirrors("503")
    port = cifar10.ARCHIVE.mirrors[0].split(":")[2].split("/")[0]
    mirror = f"http://me:opensesame@{place.format(port=port)}?token=hunter2"
    message = refused(capsys, *out_of(folder), "--mirror", mirror)
    assert f"http://{place.format(port=port)}: " in message
    for word in ("me:", "opensesame", "hunter2"):
        assert word not in message


def test_a_log_file_gets_a_line_a_minute(mirrors, capsys):
    folder, settings = mirrors("slow")
    cifar10.fetch(folder, settings)  # takes over two seconds
    assert arrived(folder) and capsys.readouterr().err.count("CIFAR-10 from 127.0.0.1") <= 3


EVIL = archive_of(
    ("../evil", b"evil"),
    ("/tmp/evil", b"evil"),
    ("cifar-10-batches-py/../../evil", b"evil"),
    ("cifar-10-batches-py/evil", b"evil"),
)


def test_nothing_but_the_batches_is_unpacked(mirrors, monkeypatch, capsys):
    folder, _ = mirrors("nobody")
    evil = dataclasses.replace(cifar10.ARCHIVE, hash=hashlib.md5(EVIL).hexdigest())
    monkeypatch.setattr(cifar10, "ARCHIVE", evil)
    (folder / "cifar-10-python.tar.gz").write_bytes(EVIL)
    message = refused(capsys, *out_of(folder))
    assert "cifar-10-python.tar.gz does not hold batches.meta, data_batch_1" in message
    assert not list(folder.parent.rglob("evil"))


def test_a_download_that_fills_the_disk_blames_no_mirror(mirrors, small_disk, tmp_path, capsys):
    mirrors("good", "good")
    arguments = ["--data-dir", str(small_disk), "--output-dir", str(tmp_path / "out"), *FP32]
    message = refused(capsys, *arguments)
    assert str(small_disk / PART) in message and "No space left" in message
    assert "--data-dir" in message and "http" not in message
    assert Mirror.asked == [("good", 0)]


@pytest.mark.parametrize("faults", [("broken", "other"), ("other", "other?again"), ("norange",)])
def test_no_mirror_is_tried_for_ever(mirrors, capsys, faults):
    """One that breaks off halfway always gave something, and one whose bytes are wrong always
    could have gone on from bad ones: between them they had no end."""
    folder, settings = mirrors(*faults)
    with pytest.raises(UserError) as raised:
        cifar10.load(folder, settings)
    asked = [fault for fault, _ in Mirror.asked]
    for fault in set(asked):
        assert asked.count(fault) <= len(faults) * download.TRIES
    for fault in faults:
        assert f"/{fault.split('?')[0]}" in str(raised.value)
