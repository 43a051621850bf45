"""What happens to real runs: broken downloads, kills, full disks, damaged files, wrong settings.

`python -m pytest -m slow -s` runs all of it and prints how many faults of each kind were tried;
what is not marked long runs always.
"""

import collections
import contextlib
import dataclasses
import hashlib
import http.server
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import typing
from pathlib import Path

import joblib
import pytest
import torch
from conftest import fingerprint, refused, tiny, wait_until

import main

pytestmark = pytest.mark.slow
MAIN = Path(main.__file__)
TRIED = collections.Counter()


@pytest.fixture(scope="module", autouse=True)
def counts():
    yield
    print("\nfaults tried: " + ", ".join(f"{count} {kind}" for kind, count in TRIED.items()))


# Downloads


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
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(main.CIFAR10, "tgz_md5", hashlib.md5(ARCHIVE).hexdigest())
    monkeypatch.setattr(main, "CIFAR10_BYTES", len(ARCHIVE))
    Mirror.asked = []

    def make(*faults):
        address = f"http://127.0.0.1:{server.server_port}"
        urls = [
            f"{address}/{fault}" if fault != "nobody" else "http://127.0.0.1:1/" for fault in faults
        ]
        monkeypatch.setattr(main, "CIFAR10_MIRRORS", tuple(urls))
        TRIED["downloads"] += 1
        return tmp_path / "data", main.DownloadSettings(
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


FAULTS = ("404", "503", "html", "short", "other", "loop", "silent", "nobody")


@pytest.mark.parametrize("fault", [*FAULTS, "broken", "norange"])
def test_next_mirror_takes_over(mirrors, fault):
    folder, settings = mirrors(fault, "good")
    main.fetch_cifar10(folder, settings)
    assert arrived(folder)
    assert [asked for asked, _ in Mirror.asked][-1] == "good"


def test_broken_transfers_resume_where_they_broke(mirrors):
    folder, settings = mirrors("404", "broken")
    main.fetch_cifar10(folder, settings)
    starts = [start for fault, start in Mirror.asked if fault == "broken"]
    assert arrived(folder) and len(starts) == 4 and starts == sorted(starts) and starts[1] > 0


def test_slow_mirror_is_left_while_another_remains(mirrors):
    folder, settings = mirrors("slow", "good")
    main.fetch_cifar10(folder, settings)
    assert arrived(folder) and [fault for fault, _ in Mirror.asked] == ["slow", "good"]
    assert Mirror.asked[1][1] > 0  # what the slow one gave is not thrown away


@pytest.mark.parametrize("others", [(), ("404",), ("nobody", "html")])
def test_slow_mirror_is_used_if_it_is_the_last(mirrors, others):
    folder, settings = mirrors("slow", *others)
    main.fetch_cifar10(folder, settings)
    assert arrived(folder)


def test_a_given_mirror_comes_first(mirrors):
    folder, settings = mirrors("good")
    other = main.CIFAR10_MIRRORS[0].replace("good", "also-good")
    main.fetch_cifar10(folder, dataclasses.replace(settings, mirror=other))
    assert arrived(folder) and [fault for fault, _ in Mirror.asked] == ["also-good"]


def test_results_may_lie_in_the_data_folder(mirrors, monkeypatch, capsys):
    """Each has a lock there; the same one for both would be waited for without end."""
    folder, _ = mirrors("good")
    monkeypatch.setattr(main, "open_cifar10", pretend_to_open)
    monkeypatch.setattr(main, "load_data", lambda settings: main.load_cifar10(settings) and stop())
    said = refused(capsys, "--data-dir", str(folder), "--output-dir", str(folder))
    assert "it is there" in said and (folder / "cifar-10-batches-py" / "data_batch_1").exists()


def pretend_to_open(data_dir):
    """The batches of tests are no images."""
    if not (data_dir / "cifar-10-batches-py").exists():
        raise RuntimeError("Dataset not found")
    return "train", "test"


def stop():
    raise main.UserError("it is there")


def test_archive_in_place_needs_no_network(mirrors):
    folder, settings = mirrors("nobody")
    (folder / "cifar-10-python.tar.gz").write_bytes(ARCHIVE)
    main.fetch_cifar10(folder, settings)
    assert arrived(folder)


def test_when_no_mirror_is_left_one_message_says_all(mirrors, capsys):
    folder, _ = mirrors(*FAULTS, "norange")
    with pytest.raises(SystemExit) as ended:
        main.main(["--data-dir", str(folder), "--output-dir", str(folder / "out"),
                   "--connect-seconds", "1", "--slow-seconds", "1"])  # fmt: skip
    message = str(ended.value)
    for url in main.CIFAR10_MIRRORS:
        assert url in message
    for part in (
        "404",
        "503",
        "text/html",
        "MD5",
        "cifar-10-python.tar.gz",
        str(folder),
        "--dataset shapes",
    ):
        assert part in message
    assert "\n" not in message and "Traceback" not in capsys.readouterr().err


PART = "cifar-10-python.tar.gz.part"


def test_a_part_that_is_whole_needs_no_network(mirrors):
    """The process was killed between the last byte and the file's new name."""
    folder, settings = mirrors("nobody")
    (folder / PART).write_bytes(ARCHIVE)
    main.fetch_cifar10(folder, settings)
    assert arrived(folder) and not Mirror.asked


@pytest.mark.parametrize(
    "part", [bytes(len(ARCHIVE)), ARCHIVE + b"more", bytes(1000), ARCHIVE[:1000] + bytes(1000)],
    ids=["bad", "too long", "bad start", "bad end"],
)  # fmt: skip
def test_a_bad_part_is_fetched_again(mirrors, part):
    folder, settings = mirrors("good")
    (folder / PART).write_bytes(part)
    main.fetch_cifar10(folder, settings)
    assert arrived(folder) and Mirror.asked[-1] == ("good", 0)


def test_a_damaged_archive_in_place_is_mentioned(mirrors, capsys):
    folder, _ = mirrors("nobody")
    (folder / "cifar-10-python.tar.gz").write_bytes(ARCHIVE[:1000])
    message = refused(capsys, "--data-dir", str(folder), "--output-dir", str(folder / "out"))
    assert f"{folder / 'cifar-10-python.tar.gz'} is not whole (1,000 of " in message


@pytest.mark.parametrize("place", ["127.0.0.1:{port}/404", "127.0.0.1:1/nobody"])
def test_secrets_of_a_mirror_are_not_shown(mirrors, capsys, place):
    folder, _ = mirrors("503")
    port = main.CIFAR10_MIRRORS[0].split(":")[2].split("/")[0]
    mirror = f"http://me:opensesame@{place.format(port=port)}?token=hunter2"
    message = refused(
        capsys, "--data-dir", str(folder), "--output-dir", str(folder / "out"), "--mirror", mirror
    )
    assert f"http://{place.format(port=port)}: " in message
    for word in ("me:", "opensesame", "hunter2"):
        assert word not in message


def test_a_log_file_gets_a_line_a_minute(mirrors, capsys):
    folder, settings = mirrors("slow")
    main.fetch_cifar10(folder, settings)  # takes over two seconds
    assert arrived(folder) and capsys.readouterr().err.count("CIFAR-10 from 127.0.0.1") <= 3


EVIL = archive_of(
    ("../evil", b"evil"),
    ("/tmp/evil", b"evil"),
    ("cifar-10-batches-py/../../evil", b"evil"),
    ("cifar-10-batches-py/evil", b"evil"),
)


def test_nothing_but_the_batches_is_unpacked(mirrors, monkeypatch, capsys):
    folder, _ = mirrors("nobody")
    monkeypatch.setattr(main.CIFAR10, "tgz_md5", hashlib.md5(EVIL).hexdigest())
    (folder / "cifar-10-python.tar.gz").write_bytes(EVIL)
    message = refused(capsys, "--data-dir", str(folder), "--output-dir", str(folder / "out"))
    assert "cifar-10-python.tar.gz does not hold batches.meta, data_batch_1" in message
    assert not list(folder.parent.rglob("evil"))


# Kills


def start(output, *more, **how):
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **how}
    return subprocess.Popen([sys.executable, str(MAIN), *tiny(output, *more)], **how)


LONG = ("--epochs", "12")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    output = tmp_path_factory.mktemp("uninterrupted")
    since = time.monotonic()
    process = start(output, *LONG)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return fingerprint(output), time.monotonic() - since


def killed_and_resumed(output, uninterrupted, moments, number=signal.SIGKILL):
    expected, _ = uninterrupted
    for moment in moments:
        process = start(output, *LONG)
        try:
            process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            process.communicate()
            TRIED["kills"] += 1
    process = start(output, *LONG)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert fingerprint(output) == expected
    assert not list(output.rglob("*resume*")) and not list(output.rglob(".*.tmp"))


@pytest.mark.skipif(joblib.cpu_count() < 2, reason="needs two cores")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_both_trainings(tmp_path, number):
    """Which are side by side in threads, of which the signal reaches neither."""
    # Shells have it ignored in what they start with &.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    process = start(tmp_path, "--epochs", "500", env=environment)
    models = tmp_path / "models"
    unfinished = [models / f"{network.key}_model_resume.pth" for network in main.NETWORKS]
    wait_until(lambda: all(path.exists() for path in unfinished), process)
    since = time.monotonic()
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert time.monotonic() - since < 20
    assert "2 threads for 2 networks at once" in out
    (line,) = errors.splitlines()
    assert process.returncode == 1 and "interrupted; what finished is kept" in line


def test_a_killed_run_goes_on_to_the_same_bits(uninterrupted, tmp_path):
    _, seconds = uninterrupted
    killed_and_resumed(tmp_path, uninterrupted, [0.5 * seconds, 0.6 * seconds])


@pytest.mark.long
def test_25_kills_at_random_moments(uninterrupted, tmp_path):
    _, seconds = uninterrupted
    rng, before, runs = random.Random(0), TRIED["kills"], 0
    while TRIED["kills"] < before + 25:  # a run that ends before its moment is not one
        killed_and_resumed(tmp_path / str(runs), uninterrupted, [rng.uniform(0.1, 1) * seconds])
        runs += 1
        assert runs <= 50


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_soon_and_says_how_to_go_on(tmp_path, number):
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # shells have it ignored in what they start with &
    process = start(tmp_path, "--epochs", "2000")
    wait_until(lambda: list(tmp_path.rglob("*resume.pth")), process)
    process.send_signal(number)
    since = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - since < 10 and process.returncode != 0
    assert (
        "interrupted" in errors and "same command goes on" in errors and "Traceback" not in errors
    )
    TRIED["kills"] += 1


def test_a_second_run_on_the_same_folder_stops_at_once(tmp_path):
    first = start(tmp_path, "--epochs", "2000")
    wait_until(lambda: list(tmp_path.rglob("*resume.pth")), first)
    second = start(tmp_path, "--epochs", "2000")
    _, errors = second.communicate(timeout=60)
    assert (
        second.returncode != 0 and f"process {first.pid} " in errors and "Traceback" not in errors
    )
    assert first.poll() is None
    first.kill()
    first.communicate()
    TRIED["second runs"] += 1


# Ranks


def torchrun(output, *more, program=MAIN):
    command = "-m torch.distributed.run --standalone --nproc-per-node=2".split()
    return subprocess.Popen(
        [sys.executable, *command, str(program), *tiny(output, *more)],
        cwd=MAIN.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(MAIN.parent)},
    )  # fmt: skip


def finished_files(output):
    """The names of the weights of trainings that have ended."""
    return [path.name for path in (output / "models").glob("*.pth") if "resume" not in path.name]


def test_ranks_share_the_trainings_and_give_the_bits_of_one_process(tmp_path):
    many = (
        "--seeds",
        "2",
        "--epochs",
        "50",
    )  # long enough that no rank finishes before another has started
    shared = torchrun(tmp_path / "shared", *many)
    out, errors = shared.communicate(timeout=300)
    assert shared.returncode == 0, errors
    for rank in (0, 1):
        assert f"rank {rank}: " in out
    arguments = tiny(tmp_path / "alone", *many)
    one_thread = f"import torch, main; torch.set_num_threads(1); main.main({arguments})"
    alone = subprocess.run(
        [sys.executable, "-c", one_thread], cwd=MAIN.parent, capture_output=True, text=True
    )
    assert alone.returncode == 0, alone.stderr
    assert fingerprint(tmp_path / "shared") == fingerprint(tmp_path / "alone")


def test_a_dead_rank_ends_the_run_and_the_rerun_trains_what_was_missing(tmp_path):
    many = ("--seeds", "2", "--epochs", "40")
    run = torchrun(tmp_path, *many)
    wait_until(lambda: len(finished_files(tmp_path)) >= 2, run)
    ranks = subprocess.run(
        ["pgrep", "-P", str(run.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(ranks[1]), signal.SIGKILL)
    _, errors = run.communicate(timeout=60)
    assert run.returncode != 0
    lines = [line for line in errors.splitlines() if line.startswith("main.py:")]
    assert len(lines) == 1 and "ranks died" in lines[0] and "same command goes on" in lines[0]
    finished = finished_files(tmp_path)
    again = torchrun(tmp_path, *many)
    out, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    for name in finished:
        assert f"Using {tmp_path / 'models' / name}" in out
    TRIED["dead ranks"] += 1


LATE = """
import sys, time
import main

real = main.prepare_files

def late(*arguments):
    time.sleep(5)
    return real(*arguments)

main.prepare_files = late
main.main(sys.argv[1:])
"""


def test_ranks_that_train_again_share_the_work(tiny_run, tmp_path):
    """Though rank 0 deletes the old weights when the other rank has long been there."""
    shutil.copytree(tiny_run / "models", tmp_path / "run" / "models")
    (tmp_path / "late.py").write_text(LATE)
    again = torchrun(tmp_path / "run", "--retrain", "--epochs", "40", program=tmp_path / "late.py")
    out, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert "rank 0: " in out and "rank 1: " in out


def test_each_refused_start_of_ranks_says_why(tmp_path, tiny_run):
    shutil.copytree(tiny_run / "models", tmp_path / "models")
    for _ in range(2):
        run = torchrun(tmp_path, "--epochs", "3")
        out, errors = run.communicate(timeout=120)
        assert run.returncode != 0
        lines = [line for line in errors.splitlines() if line.startswith("main.py:")]
        assert len(lines) == 1 and "was trained otherwise, epochs 2 (now 3)" in lines[0]
        assert "epoch 1/3" not in out


COLD = """
import hashlib, pickle, sys
import main
from main import CIFAR10

folder = main.Path(sys.argv[1])
batches = {}
for name in sys.argv[2].split(","):
    content = {"data": main.np.zeros((20, 3072), "uint8"), "labels": list(range(10)) * 2}
    if name == "batches.meta":
        content = {"label_names": list("abcdefghij")}
    batches[name] = pickle.dumps(content) + bytes(5_000_000)  # what follows a pickle is not read
CIFAR10.train_list = [[n, hashlib.md5(b).hexdigest()] for n, b in batches.items() if "data" in n]
CIFAR10.test_list = [["test_batch", hashlib.md5(batches["test_batch"]).hexdigest()]]
CIFAR10.meta = {**CIFAR10.meta, "md5": hashlib.md5(batches["batches.meta"]).hexdigest()}
archive = folder / CIFAR10.filename
if sys.argv[3] == "make":
    with main.tarfile.open(archive, "w:gz", compresslevel=1) as file:
        for name, content in batches.items():
            member = main.tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            member.size = len(content)
            file.addfile(member, main.io.BytesIO(content))
else:
    CIFAR10.tgz_md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    print("ready", flush=True)
    input()
    train, test = main.load_cifar10(main.Settings(data_dir=folder))
    assert len(train) == 100 and len(test) == 20
"""


def test_processes_that_unpack_together_do_not_disturb_each_other(tmp_path):
    """Each comes to a folder that holds the archive alone, as torchrun's first run does."""

    def cold(what):
        command = [sys.executable, "-c", COLD, str(tmp_path), ",".join(BATCHES), what]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=MAIN.parent, stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )

    assert cold("make").wait(120) == 0
    for _ in range(3):
        shutil.rmtree(tmp_path / "cifar-10-batches-py", ignore_errors=True)
        processes = [cold("load") for _ in range(3)]
        for process in processes:
            assert process.stdout.readline() == "ready\n", process.communicate()[1]
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
        TRIED["cold starts"] += 1


# Files


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("no right to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_in_one_line_and_leaves_no_part(small_disk, capsys):
    message = refused(capsys, *tiny(small_disk))
    assert "No space left" in message and str(small_disk) in message and "--output-dir" in message
    assert not list(small_disk.rglob(".*.tmp"))
    for path in small_disk.rglob("*.pth"):
        main.read_tensors(path)  # what is there is whole
    TRIED["full disks"] += 1


def test_a_download_that_fills_the_disk_blames_no_mirror(mirrors, small_disk, tmp_path, capsys):
    mirrors("good", "good")
    message = refused(capsys, "--data-dir", str(small_disk), "--output-dir", str(tmp_path / "out"))
    assert str(small_disk / PART) in message and "No space left" in message
    assert "--data-dir" in message and "http" not in message
    assert Mirror.asked == [("good", 0)]
    TRIED["full disks"] += 1


def test_a_read_only_disk_is_named(small_disk, capsys):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    message = refused(capsys, *tiny(small_disk / "out"))
    assert "Read-only" in message and str(small_disk) in message
    TRIED["blocked paths"] += 1


def test_an_output_that_is_a_file_is_named(tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    for blocked in (tmp_path / "taken", tmp_path / "taken" / "below", tmp_path / "round" / "below"):
        for option in ("--output-dir", "--data-dir"):
            folders = {"--output-dir": tmp_path / "out", "--data-dir": tmp_path, option: blocked}
            arguments = [str(word) for pair in folders.items() for word in pair]
            message = refused(capsys, *arguments)
            assert f"main.py: {blocked} " in message
            assert message.endswith(f"mend that, or choose another {option}")
            TRIED["blocked paths"] += 1
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_output_is_named(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert str(tmp_path) in refused(capsys, *tiny(tmp_path / "out"))
    tmp_path.chmod(0o700)
    TRIED["blocked paths"] += 1


def damaged(content, other, rng):
    """Content with a flipped bit, cut short, with two parts swapped, or another file's."""
    kind = rng.choice(["flip", "cut", "swap", "other"])
    changed = bytearray(content)
    if kind == "flip":
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del changed[rng.randrange(len(changed)) :]
    elif kind == "swap":
        half = len(changed) // 2
        size = rng.randrange(1, min(1000, half))
        a, b = rng.randrange(half - size), half + rng.randrange(half - size)
        changed[a : a + size], changed[b : b + size] = changed[b : b + size], changed[a : a + size]
    else:
        changed = bytearray(other)
    return bytes(changed), kind


@pytest.fixture(scope="module")
def half_done(tmp_path_factory):
    """A folder with one network finished and the other half-way."""
    output = tmp_path_factory.mktemp("half")
    process = start(output, "--epochs", "4")
    process.communicate()
    whole = fingerprint(output)
    (output / "models" / "baseline_model.pth").rename(output / "models" / "kept")
    patch = pytest.MonkeyPatch()
    real = main.logits_of
    calls = []
    patch.setattr(
        main,
        "logits_of",
        lambda *a: calls.append(0) or (sys.exit(9) if len(calls) > 2 else real(*a)),
    )
    with pytest.raises(SystemExit):
        main.main(tiny(output, "--epochs", "4"))
    patch.undo()
    (output / "models" / "kept").unlink()
    assert sorted(path.name for path in (output / "models").glob("[!.]*")) == [
        "baseline_model_resume.pth",
        "se_attention_model.pth",
    ]
    return output, whole


def corrupt(half_done, tmp_path, capsys, count):
    """Damage a file of a half-done run, run again: a clear line, or the right result."""
    output, whole = half_done
    rng = random.Random(count)
    names = ["baseline_model_resume.pth", "se_attention_model.pth"]
    for i in range(count):
        copy = tmp_path / str(i)
        shutil.copytree(output, copy)
        name, other = rng.sample(names, 2)
        path = copy / "models" / name
        content, kind = damaged(path.read_bytes(), (copy / "models" / other).read_bytes(), rng)
        unchanged = content == path.read_bytes()
        path.write_bytes(content)
        try:
            main.main(tiny(copy, "--epochs", "4"))
            assert unchanged and fingerprint(copy) == whole, (name, kind)
        except SystemExit as ended:
            assert name in str(ended) and "\n" not in str(ended), (name, kind)
        TRIED[f"{kind} of {'weights' if name == names[1] else 'resume file'}"] += 1
        shutil.rmtree(copy)
    capsys.readouterr()


def test_damaged_weights_are_refused(half_done, tmp_path, capsys):
    corrupt(half_done, tmp_path, capsys, 12)


@pytest.mark.long
def test_150_damaged_weights_and_resume_files(half_done, tmp_path, capsys):
    corrupt(half_done, tmp_path, capsys, 150)


@pytest.mark.long
def test_50_damaged_data_batches(cifar10_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(main, "CIFAR10_MIRRORS", ("http://127.0.0.1:1/",))
    source = Path(cifar10_dir) / "cifar-10-batches-py"
    rng = random.Random(1)
    names = sorted(
        path.name
        for path in source.iterdir()
        if path.name.startswith(("data", "test", "batches.meta"))
    )
    for _ in range(50):
        folder = tmp_path / source.name
        folder.mkdir()
        broken, other = rng.sample(names, 2)
        for file in source.iterdir():
            (folder / file.name).symlink_to(file)
        (folder / broken).unlink()
        content, kind = damaged((source / broken).read_bytes(), (source / other).read_bytes(), rng)
        (folder / broken).write_bytes(content)
        message = refused(
            capsys, "--data-dir", str(tmp_path), "--output-dir", str(tmp_path / "out")
        )
        assert "could not be downloaded" in message
        shutil.rmtree(folder)
        TRIED[f"{kind} of data batches"] += 1


def test_a_half_done_training_and_a_finished_one_are_not_taken_for_each_other(
    half_done, tmp_path, capsys
):
    shutil.copytree(half_done[0], tmp_path / "a")
    models = tmp_path / "a" / "models"
    (models / "baseline_model_resume.pth").rename(models / "baseline_model.pth")
    message = refused(capsys, *tiny(tmp_path / "a", "--epochs", "4"))
    assert "baseline_model.pth holds a training half done" in message
    (models / "baseline_model.pth").unlink()
    (models / "se_attention_model.pth").rename(models / "se_attention_model_resume.pth")
    message = refused(capsys, *tiny(tmp_path / "a", "--epochs", "4"))
    assert "se_attention_model_resume.pth holds a finished training" in message
    TRIED["foreign weights"] += 2


def test_weights_that_are_not_finite_are_refused(tiny_run, tmp_path, capsys):
    shutil.copytree(tiny_run / "models", tmp_path / "models")
    path = tmp_path / "models" / "se_attention_model.pth"
    content = main.read_tensors(path)
    content["state_dict"]["classifier.bias"][3] = float("nan")
    main.write_tensors(path, content)
    message = refused(capsys, *tiny(tmp_path))
    assert "not finite" in message and path.name in message
    del content["state_dict"]["classifier.bias"]
    main.write_tensors(path, content)
    assert path.name in refused(capsys, *tiny(tmp_path))
    content["state_dict"]["classifier.bias"] = torch.zeros(7)
    main.write_tensors(path, content)
    assert path.name in refused(capsys, *tiny(tmp_path))
    TRIED["foreign weights"] += 3


# Training and settings


def test_a_loss_that_is_not_finite_stops_training(tmp_path, capsys):
    message = refused(capsys, *tiny(tmp_path, "--learning-rate", "1e8"))
    for part in ("epoch 1", "step", "learning rate ", "--learning-rate"):
        assert part in message
    assert not list(tmp_path.rglob("*.pth"))
    TRIED["diverged trainings"] += 1


FULL = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: str(error)[:40])
def test_full_memory_says_what_to_lower(tmp_path, monkeypatch, capsys, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(main, "train_network", fail)
    assert "--batch-size" in refused(capsys, *tiny(tmp_path))


def test_errors_of_the_program_keep_their_traceback(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(main, "train_network", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        main.main(tiny(tmp_path))


BAD = [
    "--epochs 0", "--epochs -3", "--epochs 1.5", "--epochs x", "--batch-size 0",
    "--batch-size 60000", "--seed -1", "--seeds 0", "--learning-rate nan", "--learning-rate inf",
    "--learning-rate 0", "--momentum 1", "--validation 0", "--validation 1", "--label-smoothing 1",
    "--crop-epochs 2", "--crop-padding 40", "--crop-size 33", "--widths 0", "--widths",
    "--stem 28", "--muon-rate 0", "--reduction 0", "--device tpu", "--precision fp8",
    "--dataset mnist", "--shapes-train 3", "--level 0", "--stress some", "--epsilons 0",
    "--epsilons 1 256", "--nonsense 1", "--widths 8 8 8 8 8", "--widths 1000000000",
    "--crop-size 8 --widths 8 8 8 8", "--validation 0.01 --dataset shapes --shapes-train 300",
    "--validation 0.9 --dataset shapes --shapes-train 200 --batch-size 21",
    "--shapes-test 1000000000", "--shapes-train 1000000000", "--resamples 1000000000",
    "--batch-size 1 --widths 8 8 8 8", "--power 0.1 --level 0.2", "--failure-images 1000000",
    "--calibration-bins 1000000000", "--data-dir ~nobody-of-this-name/data",
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_impossible_settings_are_usage_errors(bad, capsys, monkeypatch):
    monkeypatch.setattr(main, "prepare_machine", None)  # nothing may be started
    with pytest.raises(SystemExit) as ended:
        main.main(bad.split())
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    named = [option for option in bad.split() if option.startswith("--")]
    assert any(option in " ".join(errors.split()) for option in named)
    assert "Traceback" not in errors
    TRIED["impossible settings"] += 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_absent_cuda_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(["--device", "cuda"])
    assert ended.value.code == 2 and "sees no CUDA device" in capsys.readouterr().err
