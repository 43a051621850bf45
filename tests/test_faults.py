"""What happens to real runs: kills, dead ranks, full disks, damaged files.

`python -m pytest -n 0 -m "slow or long" -s tests/test_faults.py` runs most of it and prints how
many faults of each kind were tried.
"""

import collections
import contextlib
import dataclasses
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import joblib
import pytest
import torch
from helpers import MAIN, SKETCHING, STRESS, fingerprint, refused, tiny, wait_until

import main
from lab.data import cifar10
from lab.machine import device, files
from lab.report import figures

TRIED = collections.Counter()


@pytest.fixture(scope="module", autouse=True)
def counts():
    yield
    print("\nfaults tried: " + ", ".join(f"{count} {kind}" for kind, count in TRIED.items()))


@contextlib.contextmanager
def in_a_hurry():
    """Runs in this process neither measure which arithmetic pays nor draw, which take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "bfloat16_speedup", lambda: 1.0)
        patch.setattr(figures, "save", lambda *_: None)
        yield patch


@pytest.fixture(autouse=True)
def hurried():  # of each test, so that what others share is made as ever
    with in_a_hurry():
        yield


BATCHES = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch", "batches.meta"]


BRIEF = ("--gradcam-images", "1")  # little to do after the training


def start(output, *more, **how):
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **how}
    command = [sys.executable, str(SKETCHING), *tiny(output, *BRIEF, *more)]
    return subprocess.Popen(command, **how)


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


@pytest.mark.slow
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
    assert process.returncode == 1 and "interrupted; what was trained and measured is kept" in line


@pytest.mark.slow
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


STRESSED = (*STRESS, "--stress-images", "300", "--attack-images", "300", "--attack-steps", "20")


@pytest.fixture(scope="module")
def stressed_run(made_tiny_run, tmp_path_factory):
    """A run from a tiny one's weights on, most of whose time goes to stress tests, and its time."""
    output = tmp_path_factory.mktemp("stressed")
    shutil.copytree(made_tiny_run / "models", output / "models")
    since = time.monotonic()
    process = start(output, *STRESSED)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return output, time.monotonic() - since


def killed_in_stress_tests(output, moments):
    """How many kills there were, and how many measurements were found again after the last."""
    kills = 0
    for moment in moments:
        process = start(output, *STRESSED)
        try:
            process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    process = start(output, *STRESSED)
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    assert not list(output.rglob("unfinished")) and not list(output.rglob(".*.tmp"))
    return kills, int(re.search(r"(\d+) of \d+ measurements were there already", out)[1])


@pytest.mark.long
def test_20_kills_at_random_moments_of_the_stress_tests(stressed_run, made_tiny_run, tmp_path):
    """Same numbers, to the bit, as never killed."""
    expected, seconds = stressed_run
    rng, tried = random.Random(0), collections.Counter()
    while tried["kills in stress tests"] < 20:
        output = tmp_path / str(tried["runs"])
        shutil.copytree(made_tiny_run / "models", output / "models")
        moments = [rng.uniform(0.3, 0.95) * seconds for _ in range(rng.randint(1, 3))]
        kills, found = killed_in_stress_tests(output, moments)
        tried.update({"runs": 1, "kills in stress tests": kills, "measurements found again": found})
        for name in ("robustness.json", "stress_tests.csv"):
            same = (expected / "results" / name).read_bytes()
            assert (output / "results" / name).read_bytes() == same, name
        assert tried["runs"] <= 40
    assert tried["measurements found again"] > 20
    TRIED.update(tried)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_soon_and_says_how_to_go_on(tmp_path, number):
    # Shells have it ignored in what they start with &.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start(tmp_path, "--epochs", "2000")
    wait_until(lambda: list(tmp_path.rglob("*resume.pth")), process)
    process.send_signal(number)
    since = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - since < 10 and process.returncode != 0
    assert "interrupted" in errors and "same command goes on" in errors
    assert "Traceback" not in errors
    TRIED["kills"] += 1


@pytest.mark.slow
def test_a_second_run_on_the_same_folder_stops_at_once(tmp_path):
    first = start(tmp_path, "--epochs", "2000")
    wait_until(lambda: list(tmp_path.rglob("*resume.pth")), first)
    second = start(tmp_path, "--epochs", "2000")
    _, errors = second.communicate(timeout=60)
    assert second.returncode != 0 and f"process {first.pid} " in errors
    assert "Traceback" not in errors
    assert first.poll() is None
    first.kill()
    first.communicate()
    TRIED["second runs"] += 1


def torchrun(output, *more, program=SKETCHING):
    command = "-m torch.distributed.run --standalone --nproc-per-node=2".split()
    return subprocess.Popen(
        [sys.executable, *command, str(program), *tiny(output, *BRIEF, *more)],
        cwd=MAIN.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(MAIN.parent)},
    )  # fmt: skip


def finished_files(output):
    """The names of the weights of trainings that have ended."""
    return [path.name for path in (output / "models").glob("*.pth") if "resume" not in path.name]


@pytest.mark.slow
def test_ranks_share_the_trainings_and_one_that_dies_costs_no_bit(tmp_path, undrawn):
    """The run ends in a line, the same command trains what is missing, and the results are those of
    one process."""
    # Long enough that no rank finishes before another has started.
    many = ("--seeds", "2", "--epochs", "12", "--precision", "fp32")
    run = torchrun(tmp_path / "shared", *many)
    wait_until(lambda: len(finished_files(tmp_path / "shared")) >= 2, run)
    ranks = subprocess.run(
        ["pgrep", "-P", str(run.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(ranks[1]), signal.SIGKILL)
    out, errors = run.communicate(timeout=60)
    assert run.returncode != 0
    for rank in (0, 1):
        assert f"rank {rank}: " in out
    lines = [line for line in errors.splitlines() if line.startswith("main.py:")]
    assert len(lines) == 1 and "ranks died" in lines[0] and "same command goes on" in lines[0]
    finished = finished_files(tmp_path / "shared")
    again = torchrun(tmp_path / "shared", *many)
    out, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    for name in finished:
        assert f"Using {tmp_path / 'shared' / 'models' / name}" in out
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        main.main(tiny(tmp_path / "alone", *BRIEF, *many))
    finally:
        torch.set_num_threads(threads)
    assert fingerprint(tmp_path / "shared") == fingerprint(tmp_path / "alone")
    TRIED["dead ranks"] += 1


LATE = f"""
import runpy, time
from lab.measure import trainings

real = trainings.delete

def late(*arguments):
    time.sleep(5)
    return real(*arguments)

trainings.delete = late
runpy.run_path({str(SKETCHING)!r}, run_name="__main__")
"""


@pytest.mark.slow
def test_ranks_that_train_again_share_the_work(made_tiny_run, tmp_path):
    """Though rank 0 deletes the old weights when the other rank has long been there."""
    shutil.copytree(made_tiny_run / "models", tmp_path / "run" / "models")
    (tmp_path / "late.py").write_text(LATE)
    again = torchrun(tmp_path / "run", "--retrain", "--epochs", "20", program=tmp_path / "late.py")
    out, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert "rank 0: " in out and "rank 1: " in out


@pytest.mark.slow
def test_each_refused_start_of_ranks_says_why(made_tiny_run, tmp_path):
    shutil.copytree(made_tiny_run / "models", tmp_path / "models")
    for _ in range(2):
        run = torchrun(tmp_path, "--epochs", "3")
        out, errors = run.communicate(timeout=120)
        assert run.returncode != 0
        lines = [line for line in errors.splitlines() if line.startswith("main.py:")]
        assert len(lines) == 1 and "was trained otherwise, epochs 2 (now 3)" in lines[0]
        assert "epoch 1/3" not in out


COLD = """
import dataclasses, hashlib, io, pickle, sys, tarfile
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10

from lab.data import cifar10, download

folder = Path(sys.argv[1])
batches = {}
for name in sys.argv[2].split(","):
    content = {"data": np.zeros((20, 3072), "uint8"), "labels": list(range(10)) * 2}
    if name == "batches.meta":
        content = {"label_names": list("abcdefghij")}
    batches[name] = pickle.dumps(content) + bytes(5_000_000)  # what follows a pickle is not read
CIFAR10.train_list = [[n, hashlib.md5(b).hexdigest()] for n, b in batches.items() if "data" in n]
CIFAR10.test_list = [["test_batch", hashlib.md5(batches["test_batch"]).hexdigest()]]
CIFAR10.meta = {**CIFAR10.meta, "md5": hashlib.md5(batches["batches.meta"]).hexdigest()}
archive = folder / CIFAR10.filename
if sys.argv[3] == "make":
    with tarfile.open(archive, "w:gz", compresslevel=1) as file:
        for name, content in batches.items():
            member = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
else:
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    cifar10.ARCHIVE = dataclasses.replace(cifar10.ARCHIVE, hash=md5)
    print("ready", flush=True)
    for _ in sys.stdin:
        train, test = cifar10.load(folder, download.Settings())
        assert len(train) == 100 and len(test) == 20
        print("ready", flush=True)
"""


@pytest.mark.slow
def test_processes_that_unpack_together_do_not_disturb_each_other(tmp_path):
    """Each comes to a folder that holds the archive alone, as torchrun's first run does."""

    def cold(what):
        command = [sys.executable, "-c", COLD, str(tmp_path), ",".join(BATCHES), what]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=MAIN.parent, stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )

    assert cold("make").wait(120) == 0
    processes = [cold("load") for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
    for _ in range(3):
        shutil.rmtree(tmp_path / "cifar-10-batches-py", ignore_errors=True)
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        for process in processes:
            assert process.stdout.readline() == "ready\n", process.communicate()[1]
        TRIED["cold starts"] += 1
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0


def test_a_full_disk_ends_in_one_line_and_leaves_no_part(small_disk, capsys):
    message = refused(capsys, *tiny(small_disk))
    assert "No space left" in message and str(small_disk) in message and "--output-dir" in message
    assert not list(small_disk.rglob(".*.tmp"))
    for path in small_disk.rglob("*.pth"):
        files.read_tensors(path)  # what is there is whole
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


HALF = ("--epochs", "4")


@pytest.fixture(scope="module")
def half_done(tmp_path_factory):
    """A folder with one network finished and the other half-way."""
    output = tmp_path_factory.mktemp("half")
    calls = []
    real = main.logits_of

    def exit_late(*arguments):
        calls.append(arguments)
        return real(*arguments) if len(calls) < 3 else sys.exit(9)

    with in_a_hurry() as patch:
        main.main(tiny(output, *HALF))
        whole = fingerprint(output)
        (output / "models" / "baseline_model.pth").unlink()
        patch.setattr(main, "logits_of", exit_late)  # of the images that validate, in each epoch
        with pytest.raises(SystemExit):
            main.main(tiny(output, *HALF))
    assert sorted(path.name for path in (output / "models").glob("[!.]*")) == [
        "baseline_model_resume.pth",
        "se_attention_model.pth",
    ]
    return output, whole


@pytest.fixture
def drawn_once(half_done, monkeypatch):
    """The half-done run's images, which need not be drawn for each of its copies."""
    data = main.load_data(main.parse_settings(tiny(half_done[0], *HALF)))
    monkeypatch.setattr(main, "load_data", lambda settings: data)


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
            main.main(tiny(copy, *HALF))
            assert unchanged and fingerprint(copy) == whole, (name, kind)
        except SystemExit as ended:
            assert name in str(ended) and "\n" not in str(ended), (name, kind)
        TRIED[f"{kind} of {'weights' if name == names[1] else 'resume file'}"] += 1
        shutil.rmtree(copy)
    capsys.readouterr()


@pytest.mark.usefixtures("drawn_once")
def test_damaged_weights_are_refused(half_done, tmp_path, capsys):
    corrupt(half_done, tmp_path, capsys, 12)


@pytest.mark.long
@pytest.mark.usefixtures("drawn_once")
def test_150_damaged_weights_and_resume_files(half_done, tmp_path, capsys):
    corrupt(half_done, tmp_path, capsys, 150)


@pytest.mark.long
def test_50_damaged_data_batches(cifar10_dir, tmp_path, monkeypatch, capsys):
    nowhere = dataclasses.replace(cifar10.ARCHIVE, mirrors=("http://127.0.0.1:1/",))
    monkeypatch.setattr(cifar10, "ARCHIVE", nowhere)
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
    message = refused(capsys, *tiny(tmp_path / "a", *HALF))
    assert "baseline_model.pth holds a training half done" in message
    (models / "baseline_model.pth").unlink()
    TRIED["foreign weights"] += 1


def test_a_training_killed_as_its_file_gets_its_name_is_finished(half_done, tmp_path, monkeypatch):
    """Its weights lie where the unfinished state lay, which was the last step but one."""
    shutil.copytree(half_done[0], tmp_path / "a")
    models = tmp_path / "a" / "models"
    whole = (models / "se_attention_model.pth").read_bytes()
    (models / "se_attention_model.pth").rename(models / "se_attention_model_resume.pth")
    (models / "baseline_model_resume.pth").unlink(missing_ok=True)
    monkeypatch.setattr(main, "train_epoch", None)  # calling it for SE-Attention would fail
    jobs = main.training_jobs
    monkeypatch.setattr(main, "training_jobs", lambda settings: jobs(settings)[1:])
    monkeypatch.setattr(main, "measure", lambda *_: None)
    main.main(tiny(tmp_path / "a", *HALF))
    assert files.read_tensors(models / "se_attention_model.pth")["state_dict"].keys()
    assert len((models / "se_attention_model.pth").read_bytes()) == len(whole)
    assert not list(models.glob("*_resume.pth"))
    TRIED["foreign weights"] += 1


def test_weights_that_are_deleted_are_trained_anew(tmp_path, monkeypatch):
    """At no moment do finished weights and an unfinished state lie side by side: else what was to
    be trained again would go on from the last epoch but one."""
    beside = []
    real = main.move

    def note(source, target):
        beside.append(sorted(path.name for path in target.parent.glob("*.pth")))
        real(source, target)
        beside.append(sorted(path.name for path in target.parent.glob("*.pth")))

    monkeypatch.setattr(main, "move", note)
    jobs = main.training_jobs
    monkeypatch.setattr(main, "training_jobs", lambda settings: jobs(settings)[:1])
    monkeypatch.setattr(main, "measure", lambda *_: None)
    main.main(tiny(tmp_path, "--precision", "fp32"))
    assert beside == [["baseline_model_resume.pth"], ["baseline_model.pth"]]


def test_weights_that_are_not_finite_are_refused(made_tiny_run, tmp_path, capsys):
    shutil.copytree(made_tiny_run / "models", tmp_path / "models")
    path = tmp_path / "models" / "se_attention_model.pth"
    content = files.read_tensors(path)
    content["state_dict"]["classifier.bias"][3] = float("nan")
    files.write_tensors(path, content)
    message = refused(capsys, *tiny(tmp_path))
    assert "not finite" in message and path.name in message
    del content["state_dict"]["classifier.bias"]
    files.write_tensors(path, content)
    assert path.name in refused(capsys, *tiny(tmp_path))
    content["state_dict"]["classifier.bias"] = torch.zeros(7)
    files.write_tensors(path, content)
    assert path.name in refused(capsys, *tiny(tmp_path))
    TRIED["foreign weights"] += 3
