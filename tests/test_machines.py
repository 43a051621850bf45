"""Other people's machines: notebooks, containers, clusters, Windows, old cards, odd folders."""

import ast
import errno
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from conftest import STRESS, comparison, refused, tiny

import main

MAIN = Path(main.__file__)


def run_main(*arguments, **environment):
    """main.py in a process of its own, with more in the environment."""
    return subprocess.run(
        [sys.executable, str(MAIN), *arguments],
        env={**os.environ, **environment}, capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip


# The device


NO_KERNEL = "CUDA error: no kernel image is available for execution on the device\nCompile with"


@pytest.fixture
def old_card(monkeypatch):
    """A card that PyTorch sees, and has no kernels for."""

    def fail(*_, **__):
        raise RuntimeError(NO_KERNEL)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla P100-PCIE-16GB")
    monkeypatch.setattr(main.torch, "zeros", fail)


def test_a_card_without_kernels_is_left_for_the_cpu(old_card, capsys):
    assert main.choose_device("auto", 0) == torch.device("cpu")
    (line,) = capsys.readouterr().out.splitlines()
    assert "On the CPU" in line and "Tesla P100" in line and "no kernel image" in line


def test_a_card_without_kernels_that_was_asked_for_ends_in_a_line(old_card, capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(["--device", "cuda"])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert "--device" in line and "Tesla P100" in line and "no kernel image" in line


def test_a_card_that_works_is_used(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(main, "try_out", lambda device: "")
    assert main.choose_device("auto", 3) == torch.device("cuda", 1) == chosen[0]


@pytest.mark.parametrize(("cores", "ranks", "expected"), [(1, 1, 1), (7, 3, 2), (1, 4, 1)])
def test_no_more_threads_than_cores_that_may_be_used(monkeypatch, cores, ranks, expected):
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    monkeypatch.setattr(main.joblib, "cpu_count", lambda: cores)
    main.limit_threads(main.Ranks(0, ranks, 0, ranks))
    assert torch.get_num_threads() == main.cv2.getNumThreads() == expected
    torch.set_num_threads(before)


def test_threads_asked_for_are_not_exceeded(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(main.joblib, "cpu_count", lambda: 8)
    main.limit_threads(main.Ranks())
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


# Notebooks and consoles


def test_a_notebooks_backend_does_not_matter():
    done = run_main("--help", MPLBACKEND="module://matplotlib_inline.backend_inline")
    assert done.returncode == 0, done.stderr
    done = run_main("--help", MPLBACKEND="nonsense")
    assert done.returncode == 0, done.stderr


def test_a_run_inside_a_notebook(tmp_path):
    """As %run does it: stdout is no file, and the program is not the process's own."""
    script = (
        "import io, runpy, sys\n"
        "class Cell(io.StringIO):\n    pass\n"
        "sys.stdout, sys.stderr = Cell(), Cell()\n"
        f"sys.argv = {['main.py', *tiny(tmp_path)]}\n"
        f"runpy.run_path({str(MAIN)!r}, run_name='__main__')\n"
        "assert 'Everything is in' in sys.stdout.getvalue()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results" / "summary.md").exists()


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "cp1252:strict"])
def test_a_console_of_another_encoding(tmp_path, encoding):
    done = run_main(*tiny(tmp_path / "日本"), PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert "\\u65e5\\u672c" in done.stdout
    assert (tmp_path / "日本" / "results" / "summary.md").exists()
    for more in (["--help"], ["--data-dir", "~nobody日本"]):
        done = run_main(*more, PYTHONIOENCODING=encoding)
        assert done.returncode in (0, 2) and "Traceback" not in done.stderr


def test_closed_streams_do_not_matter(tmp_path):
    closed = f"{sys.executable} {MAIN} {' '.join(tiny(tmp_path, *STRESS))} >&- 2>&-"
    assert subprocess.run(closed, shell=True).returncode == 0
    assert (tmp_path / "results" / "summary.md").exists()


def test_what_a_container_has_set_for_cuda_does_not_matter():
    """NVIDIA's set TF32 for float32, and others a workspace that is not deterministic."""
    script = (
        "import main, os, torch\n"
        "main.prepare_machine(main.Settings(device='cpu'))\n"
        "assert os.environ['CUBLAS_WORKSPACE_CONFIG'] == ':4096:8'\n"
        "assert torch.get_float32_matmul_precision() == 'highest'\n"
        "assert not torch.backends.cuda.matmul.allow_tf32\n"
        "assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction\n"
    )
    container = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1", "CUBLAS_WORKSPACE_CONFIG": ":0:0"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=MAIN.parent, env={**os.environ, **container},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("ranks", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "two"}])
def test_ranks_without_torchrun_end_in_a_line(tmp_path, ranks):
    done = run_main(*tiny(tmp_path), **ranks)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("main.py")]
    assert done.returncode == 1 and "torchrun" in line and "Traceback" not in done.stderr


def test_an_old_python_is_told_so():
    """The line stands before all that an old one would stumble over."""
    head = MAIN.read_text().split("import copy\n")[0].replace("(3, 11)", "(4, 0)")
    done = subprocess.run([sys.executable, "-c", head], capture_output=True, text=True)
    assert done.returncode == 1 and "needs Python" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("missing", ["cv2", "tabulate", "jinja2", "torch"])
def test_a_missing_package_is_told_before_anything_else(tmp_path, missing):
    """As in a shell without the environment; pandas wants two of these only after training."""
    stop = "raise ImportError('No module named ' + __name__, name=__name__)"
    (tmp_path / f"{missing}.py").write_text(stop)
    run = run_main("--help", PYTHONPATH=str(tmp_path))
    (line,) = run.stderr.splitlines()
    assert run.returncode == 1 and run.stdout == ""
    assert f"(No module named {missing})" in line and "pip install -r requirements.txt" in line


def test_an_interrupt_before_the_run_ends_in_a_line(tmp_path, monkeypatch):
    """While packages are imported, which takes seconds, or the machine is prepared."""
    (tmp_path / "tabulate.py").write_text("raise KeyboardInterrupt")
    run = run_main("--help", PYTHONPATH=str(tmp_path))
    assert run.returncode == 1 and run.stderr == "main.py: interrupted\n"

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(joblib, "cpu_count", interrupt)
    monkeypatch.setattr(sys, "argv", ["main.py", "--device", "cpu"])
    with pytest.raises(SystemExit, match=r"main\.py: interrupted"):
        runpy.run_path(str(MAIN), run_name="__main__")


def test_versions_do_not_depend_on_a_packages_name(monkeypatch):
    """OpenCV is opencv-python-headless, opencv-python, or conda's py-opencv."""

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    import importlib.metadata

    monkeypatch.setattr(importlib.metadata, "version", absent)
    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    found = main.versions()
    assert found["opencv"] == main.cv2.__version__ and found["torch"] == torch.__version__
    assert all(type(value) is str for value in found.values())  # as weights_only loads it


# File systems


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_at_once(tmp_path, monkeypatch, capsys, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(main.fcntl, "flock", fail)
    message = refused(capsys, *tiny(tmp_path))
    assert f"the file system of {tmp_path} has no locks" in message
    assert os.strerror(number) in message and "choose" in message
    assert "in use" not in message
    arguments = ["--data-dir", str(tmp_path), "--output-dir", str(tmp_path)]
    assert "has no locks" in refused(capsys, *arguments)


def test_a_file_that_is_open_elsewhere_is_replaced_when_it_is_closed(tmp_path, monkeypatch):
    """As on Windows, where a virus scanner holds a file for a moment."""
    real, refusals = Path.replace, [PermissionError(13, "in use")] * 3

    def replace(self, target):
        if refusals:
            raise refusals.pop()
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    main.write_file(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new" and not refusals


def test_a_file_that_stays_open_elsewhere_ends_in_a_line(tmp_path, monkeypatch, capsys):
    def replace(self, target):
        raise PermissionError(13, "Permission denied", str(target))

    monkeypatch.setattr(main, "PATIENCE", 0.2)
    monkeypatch.setattr(Path, "replace", replace)
    since = time.monotonic()
    assert "Permission denied" in refused(capsys, *tiny(tmp_path))
    assert time.monotonic() - since < 30
    assert not list(tmp_path.rglob("*.tmp"))


def test_only_what_is_ones_own_is_cleaned(tmp_path):
    """Another live run may be writing in a folder below, and even a live process in this one."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    others = tmp_path / "shapes" / "models" / f".baseline_model.pth.{gone.pid}.tmp"
    lives = tmp_path / "models" / f".baseline_model.pth.{os.getppid()}.tmp"
    mine = tmp_path / "models" / f".baseline_model.pth.{gone.pid}.tmp"
    same = tmp_path / "models" / f".se_attention_model_resume.pth.{os.getpid()}.tmp"
    drawn = tmp_path / "plots" / f".robustness.png.{gone.pid}.tmp"
    overlay = tmp_path / "gradcam" / "baseline" / f".disc_1.png.{gone.pid}.tmp"
    foreign = tmp_path / ".someones.file.tmp"  # of another program
    for path in (others, lives, mine, same, drawn, overlay, foreign):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    main.main(tiny(tmp_path))
    assert others.exists() and lives.exists() and foreign.exists()
    for path in (mine, same, drawn, overlay):
        assert not path.exists()


# The data folder


@pytest.fixture
def batches(cifar10_dir):
    return Path(cifar10_dir) / "cifar-10-batches-py"


def test_the_folder_of_batches_itself_may_be_named(batches, tmp_path, monkeypatch):
    monkeypatch.setattr(main, "fetch_cifar10", None)  # calling it would fail
    (tmp_path / "my_copy").symlink_to(batches)
    for folder in (batches, tmp_path / "my_copy"):
        train, test = main.load_cifar10(main.Settings(data_dir=folder))
        assert len(train) == 50_000 and len(test) == 10_000
    monkeypatch.chdir(batches)
    assert len(main.load_cifar10(main.Settings(data_dir=Path()))[0]) == 50_000


def test_batches_below_serve_where_those_in_the_folder_are_not_whole(
    batches, tmp_path, monkeypatch
):
    """As a download puts them there, when it finds a folder with but some of the batches."""
    monkeypatch.setattr(main, "fetch_cifar10", None)  # calling it would fail
    (tmp_path / "data_batch_1").symlink_to(batches / "data_batch_1")
    (tmp_path / "cifar-10-batches-py").symlink_to(batches)
    train, test = main.load_cifar10(main.Settings(data_dir=tmp_path))
    assert len(train) == 50_000 and len(test) == 10_000


def test_the_archive_itself_may_be_named(batches, tmp_path, monkeypatch):
    monkeypatch.setattr(main, "fetch_cifar10", None)  # calling it would fail
    (tmp_path / batches.name).symlink_to(batches)
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(b"")
    assert len(main.load_cifar10(main.Settings(data_dir=archive))[0]) == 50_000


@pytest.mark.parametrize(
    ("named", "home"),
    [
        ("data/cifar-10-batches-py", "data"),
        ("data/cifar-10-python.tar.gz", "data"),
        ("cifar-10-batches-py", "."),
        ("data", "data"),
    ],
)
def test_the_home_of_data(named, home):
    """There the archive is put and unpacked, and there CIFAR-10-C is looked for."""
    assert main.home_of_data(Path(named)) == Path(home)


def test_a_damaged_folder_of_batches_is_mended_in_its_place(tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(main, "fetch_cifar10", lambda folder, _: fetched.append(folder))
    with pytest.raises(RuntimeError):
        main.load_cifar10(main.Settings(data_dir=tmp_path / "cifar-10-batches-py"))
    assert fetched == [tmp_path]


def test_another_process_may_unpack_while_this_one_waits(tmp_path, monkeypatch):
    def open_cifar10(folder):
        if not (folder / "unpacked").exists():
            raise RuntimeError("Dataset not found or corrupted")
        return "train", "test"

    class Lock:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            (tmp_path / "unpacked").touch()

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(main, "open_cifar10", open_cifar10)
    monkeypatch.setattr(main, "hold_lock", Lock)
    monkeypatch.setattr(main, "fetch_cifar10", None)  # calling it would fail
    assert main.load_cifar10(main.Settings(data_dir=tmp_path)) == ("train", "test")


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = main.parse_settings(["--data-dir=~/x", "--output-dir=~/y"])
    assert (settings.data_dir, settings.output()) == (tmp_path / "x", tmp_path / "y")


def test_a_read_only_folder_with_the_archive_alone_names_the_cure(tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "ro,size=100k", "tmpfs", str(folder)]
    if subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    try:
        message = refused(capsys, "--data-dir", str(folder), "--output-dir", str(tmp_path / "out"))
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    assert f"{folder} has no CIFAR-10 unpacked and can't be written to" in message
    assert "unpack cifar-10-python.tar.gz elsewhere" in message and "--data-dir" in message


# CIFAR-10-C


@pytest.fixture
def official(tmp_path):
    """A data folder with CIFAR-10-C of 20 test images, unpacked one level too deep."""
    folder = tmp_path / "CIFAR-10-C" / "CIFAR-10-C"
    folder.mkdir(parents=True)
    shape = (100, 32, 32, 3)
    values = np.arange(100, dtype=np.uint8)[:, None, None, None]
    np.save(folder / "fog.npy", np.broadcast_to(values, shape))
    np.save(folder / "glass_blur.npy", np.zeros(shape, np.uint8))
    np.save(folder / "labels.npy", np.tile(np.arange(20) % 10, 5))
    (folder / "._fog.npy").write_bytes(b"Mac OS X notes")
    (tmp_path / "CIFAR-10-C" / "__MACOSX").mkdir()
    (tmp_path / "CIFAR-10-C" / "__MACOSX" / "._fog.npy").write_bytes(b"Mac OS X notes")
    return folder


LABELS = torch.arange(20) % 10


def test_official_arrays_are_found_and_named(official, tmp_path, capsys):
    found = main.find_official(tmp_path, LABELS)
    assert list(found) == ["fog", "glass_blur"]
    assert found["fog"].shape == (5, 20, 32, 32, 3) and found["fog"][2, 3, 0, 0, 0] == 43
    assert "2 arrays of CIFAR-10-C" in capsys.readouterr().out
    images = main.draw_shapes(20, 0)
    data = main.Dataset("CIFAR-10", tuple("abcdefghij"), ("a",), images, images, {}, found)
    assert main.corruption_names(data) == ["fog", "glass_blur"]
    shown = main.corrupted_images("fog", data, torch.tensor([3, 7]), 42)
    assert shown[:, :, 0, 0, 0].tolist() == [[20 * k + 3, 20 * k + 7] for k in range(5)]


WRONG = {
    "fog.npy": np.zeros((100, 32, 32), np.uint8),
    "glass_blur.npy": np.zeros((100, 32, 32, 3), np.float32),
    "labels.npy": np.zeros(100),
    "object.npy": np.array([{"a": 1}], dtype=object),
    "short.npy": None,
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arrays_are_refused_before_training(official, tmp_path, name):
    if WRONG[name] is None:
        (official / name).write_bytes((official / "fog.npy").read_bytes()[:1000])
    else:
        np.save(official / name, WRONG[name], allow_pickle=True)
    with pytest.raises(main.UserError, match=f"{name} .*delete it, or fetch CIFAR-10-C again"):
        main.find_official(tmp_path, LABELS)


def test_a_folder_without_arrays_is_mentioned(tmp_path, capsys):
    (tmp_path / "CIFAR-10-C").mkdir()
    assert main.find_official(tmp_path, LABELS) == {}
    assert "holds no arrays" in capsys.readouterr().out


def test_extra_corruptions_alone_are_not_taken(official, tmp_path, capsys):
    """No mean is over them, which table, figures and paper tell of."""
    for name in ("fog", "glass_blur"):
        (official / f"{name}.npy").rename(official / f"{name}.not")
    (official / "fog.not").rename(official / "spatter.npy")
    assert main.find_official(tmp_path, LABELS) == {}
    assert "its extra ones alone: corruptions are made here" in capsys.readouterr().out
    (official / "glass_blur.not").rename(official / "glass_blur.npy")
    assert set(main.find_official(tmp_path, LABELS)) == {"spatter", "glass_blur"}


def test_results_say_which_corruptions_were_used(tiny_run):
    found = comparison(tiny_run)["corruptions"]
    assert found["count"] == 18 and found["extra_count"] == 4
    assert found["source"] == "made by main.py" and found["reference"] == ""
    assert found["names"] == [corruption.name for corruption in main.CORRUPTIONS]
    summary = (tiny_run / "results" / "summary.md").read_text()
    assert "made by main.py; means are over 14 of the benchmark's 15 corruptions" in summary
    assert found["verdicts"] in summary and "Under corruption, SE-Attention CNN is" in summary


def test_the_whole_benchmark_has_a_published_result_beside_it(tiny_run):
    names = [corruption.name for corruption in main.CORRUPTIONS] + ["frost"]
    corrupted = dict.fromkeys(names, np.zeros((32, 32, 3)))
    for official, left_out, told in (
        (True, None, True),
        (True, "fog", False),
        (False, None, False),
    ):
        tried = {name: pixels for name, pixels in corrupted.items() if name != left_out}
        stress = main.StressResults((), (), np.zeros(()), tried, official, 0.1, 0.05)
        assert ("73.46 %" in stress.reference()) == told
        some = "14 of " if left_out else ""
        assert stress.mean_is_over() == f"{some}the benchmark's 15 corruptions"


def test_official_arrays_end_up_in_the_results(cifar10_dir, tmp_path, monkeypatch):
    arrays = {"fog": np.zeros((5, 10_000, 32, 32, 3), np.uint8)}
    monkeypatch.setattr(main, "find_official", lambda folder, labels: arrays)
    small = ["--data-dir", cifar10_dir, "--output-dir", str(tmp_path), "--epochs", "1", *STRESS]
    main.main([*small, "--stem", "4", "--widths", "8", "8", "8"])
    found = comparison(tmp_path)["corruptions"]
    assert (found["count"], found["extra_count"], found["names"]) == (1, 0, ["fog"])
    assert found["source"] == "the published arrays"
    assert found["mean_is_over"] == "1 of the benchmark's 15 corruptions"


# Result files


def test_a_file_that_cannot_be_written_keeps_no_other_from_it(tiny_run, tmp_path, capsys):
    shutil.copytree(tiny_run / "models", tmp_path / "models")
    blocked = ["plots/accuracy_comparison.pdf", "results/summary.md", "gradcam/baseline/disc_1.png"]
    blocked += ["results/files.json"]
    for name in blocked:
        (tmp_path / name).mkdir(parents=True)
    message = refused(capsys, *tiny(tmp_path, *STRESS))
    assert "Is a directory" in message and "mend that and run again" in message
    expected = {*json.loads((tiny_run / "results" / "files.json").read_text()), blocked[-1]}
    assert expected > set(blocked)
    for name in expected:
        assert (name in message) == (name in blocked)
        assert (tmp_path / name).is_file() == (name not in blocked)


def test_what_a_run_did_not_make_does_not_stay(tiny_run, tmp_path):
    """Another seed without stress tests, fewer pictures; what someone put there is left alone."""
    output = tmp_path / "run"
    shutil.copytree(tiny_run, output)
    (output / "plots" / "mine_curves.png").write_text("mine")
    main.main(tiny(output, "--retrain", "--seed", "7", "--gradcam-images", "1"))
    for name in ("results/robustness.json", "plots/robustness.png", "plots/attacks.pdf",
                 "plots/gradcam_disc_2.png", "gradcam/baseline/disc_2.png"):  # fmt: skip
        assert (tiny_run / name).exists() and not (output / name).exists()
    assert (output / "plots" / "mine_curves.png").read_text() == "mine"
    assert (output / "plots" / "gradcam_disc_1.png").exists()
    listed = json.loads((output / "results" / "files.json").read_text())
    there = [path for path in output.rglob("[!.]*") if path.is_file()]
    there = {path.relative_to(output).as_posix() for path in there}
    models = {"models/baseline_model.pth", "models/se_attention_model.pth"}
    assert there == {*listed, *models, "results/files.json", "plots/mine_curves.png"}


def test_what_a_killed_run_made_does_not_stay_either(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "write_report", killed)
    with pytest.raises(SystemExit):
        main.main(tiny(tmp_path))
    monkeypatch.undo()
    assert (tmp_path / "plots" / "gradcam_disc_2.png").exists()
    main.main(tiny(tmp_path, "--gradcam-images", "1"))
    assert not (tmp_path / "plots" / "gradcam_disc_2.png").exists()


PRECIOUS = '["../precious", "plots/../../precious", "{outside}", "models/baseline_model.pth"]'


@pytest.mark.parametrize("content", ["", "{", "7", PRECIOUS])
def test_a_damaged_list_of_files_deletes_nothing_elsewhere(tmp_path, content):
    outside = tmp_path / "precious"
    outside.write_text("mine")
    output = tmp_path / "run"
    (output / "results").mkdir(parents=True)
    content = content.replace("{outside}", str(outside))
    (output / "results" / "files.json").write_text(content)
    main.main(tiny(output))
    assert outside.read_text() == "mine"
    assert (output / "models" / "baseline_model.pth").exists()


def test_plain_sgd_trains(tmp_path):
    main.main(tiny(tmp_path, "--momentum", "0", "--muon-momentum", "0"))
    assert (tmp_path / "results" / "summary.md").exists()


def test_requirements_are_those_that_are_imported():
    """Each package that main.py imports has a lower bound, and no other."""
    text = (MAIN.parent / "requirements.txt").read_text()
    bounds = dict(re.findall(r"^([\w-]+)>=([\d.]+)$", text, re.MULTILINE))
    assert len(bounds) == len(text.split())
    imported = set()
    for node in ast.walk(ast.parse(MAIN.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    names = {"cv2": "opencv-python-headless", "PIL": "pillow", "sklearn": "scikit-learn"}
    packages = {names.get(name, name) for name in imported - set(sys.stdlib_module_names)}
    assert packages == set(bounds)
