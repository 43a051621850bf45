"""Which device, arithmetic and threads: old cards, containers, clusters, torchrun's ranks."""

import os
import subprocess
import sys
import time

import cv2
import joblib
import pytest
import torch
from helpers import MAIN, refused, tiny

import main
from lab.machine import device
from lab.machine.device import MachineSettings, Ranks, prepare_machine


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_absent_cuda_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(["--device", "cuda"])
    assert ended.value.code == 2 and "sees no CUDA device" in capsys.readouterr().err


NO_KERNEL = "CUDA error: no kernel image is available for execution on the device\nCompile with"


@pytest.fixture
def old_card(monkeypatch):
    """A card that PyTorch sees, and has no kernels for."""

    def fail(*_, **__):
        raise RuntimeError(NO_KERNEL)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla P100-PCIE-16GB")
    monkeypatch.setattr(torch, "zeros", fail)


def test_a_card_without_kernels_is_left_for_the_cpu(old_card, capsys):
    assert device.choose_device("auto", 0) == torch.device("cpu")
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
    monkeypatch.setattr(device, "try_out", lambda _: "")
    assert device.choose_device("auto", 3) == torch.device("cuda", 1) == chosen[0]


@pytest.mark.parametrize(("cores", "ranks", "expected"), [(1, 1, 1), (7, 3, 2), (1, 4, 1)])
def test_no_more_threads_than_cores_that_may_be_used(monkeypatch, cores, ranks, expected):
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    monkeypatch.setattr(joblib, "cpu_count", lambda: cores)
    device.limit_threads(Ranks(0, ranks, 0, ranks))
    assert torch.get_num_threads() == cv2.getNumThreads() == expected
    torch.set_num_threads(before)


def test_threads_asked_for_are_not_exceeded(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 8)
    device.limit_threads(Ranks())
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "setting", ["", "fp32_precision", "cudnn.fp32_precision", "cudnn.conv.fp32_precision"]
)
def test_what_a_container_has_set_for_cuda_does_not_matter(setting):
    """NVIDIA's set TF32 for float32, and others a workspace that is not deterministic."""
    if setting and not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("PyTorch has no such setting before version 2.9")
    script = (
        "from lab.machine import device\n"
        "import os, torch\n"
        + (f"torch.backends.{setting} = 'tf32'\n" if setting else "")
        + "device.prepare_machine(device.MachineSettings('cpu', 'fp32'), networks=2)\n"
        "assert os.environ['CUBLAS_WORKSPACE_CONFIG'] == ':4096:8'\n"
        "assert torch.get_float32_matmul_precision() == 'highest'\n"
        "assert not torch.backends.cuda.matmul.allow_tf32\n"
        "assert not torch.backends.cudnn.allow_tf32\n"
        "cudnn = torch.backends.cudnn\n"
        "if hasattr(cudnn, 'conv'):\n"
        "    assert cudnn.conv.fp32_precision == cudnn.rnn.fp32_precision == 'ieee'\n"
        "    assert torch.backends.cuda.matmul.fp32_precision == 'ieee'\n"
        "assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction\n"
    )
    container = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1", "CUBLAS_WORKSPACE_CONFIG": ":0:0"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=MAIN.parent, env={**os.environ, **container},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("ranks", ["2", "two"])
def test_ranks_without_torchrun_end_in_a_line(tmp_path, monkeypatch, capsys, ranks):
    monkeypatch.setenv("WORLD_SIZE", ranks)
    line = refused(capsys, *tiny(tmp_path))
    assert line.startswith("main.py: ") and "torchrun" in line


def test_versions_do_not_depend_on_a_packages_name(monkeypatch):
    """OpenCV is opencv-python-headless, opencv-python, or conda's py-opencv."""

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    import importlib.metadata

    monkeypatch.setattr(importlib.metadata, "version", absent)
    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    found = device.versions()
    assert found["opencv"] == cv2.__version__ and found["torch"] == torch.__version__
    assert all(type(value) is str for value in found.values())  # as weights_only loads it


def processor(monkeypatch, amx=False, bfloat16=True, x86=True):
    """One that says this of itself."""
    monkeypatch.setattr(device, "has_amx", lambda: amx)
    monkeypatch.setattr(device, "is_x86", lambda: x86)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bfloat16)


@pytest.mark.parametrize(("seconds", "expected"), [(1, "fp32"), (0.8, "fp32"), (0.75, "bf16")])
@pytest.mark.parametrize("x86", [True, False])
def test_precision_is_chosen_by_measuring_where_a_processor_does_not_say(
    monkeypatch, seconds, expected, x86
):
    """bfloat16 takes these seconds where float32 takes one; some tries take longer."""
    tries = []

    def measured(dtype):
        tries.append(dtype)
        longer = 5 if len(tries) % 3 == 1 else 0
        return longer + (seconds if dtype == torch.bfloat16 else 1)

    processor(monkeypatch, x86=x86, bfloat16=x86)
    monkeypatch.setattr(device, "seconds_of_convolution", measured)
    hardware = prepare_machine(MachineSettings(device="cpu"), 2)
    assert hardware.precision == expected
    assert f"{1 / seconds:.2f} times as fast" in hardware.reason
    assert tries[:4] == [torch.float32, torch.bfloat16] * 2
    for asked in ("fp32", "bf16"):
        settings = MachineSettings(device="cpu", precision=asked)
        hardware = prepare_machine(settings, 2)
        assert (hardware.precision, hardware.reason) == (asked, "as asked")


def test_where_a_processor_says_it_nothing_is_measured(monkeypatch):
    def measured(dtype):
        raise AssertionError

    monkeypatch.setattr(device, "seconds_of_convolution", measured)
    processor(monkeypatch, amx=True)
    hardware = prepare_machine(MachineSettings(device="cpu"), 2)
    assert (hardware.precision, hardware.reason) == ("bf16", "the processor has AMX")
    processor(monkeypatch, bfloat16=False)
    hardware = prepare_machine(MachineSettings(device="cpu"), 2)
    assert (hardware.precision, hardware.reason) == ("fp32", "the processor has no bfloat16")


def test_a_processor_of_any_kind_is_measured():
    assert all(device.seconds_of_convolution(t) > 0 for t in (torch.float32, torch.bfloat16))


@pytest.mark.slow
def test_a_processor_is_measured_soon():
    start = time.process_time()  # twenty seconds of two cores, busy or not
    assert 0.01 < device.bfloat16_speedup() < 100
    assert time.process_time() - start < 40


@pytest.mark.parametrize("name", ["OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY"])
def test_all_cores_are_used_whatever_binds_openmp(name):
    """With such a variable, importing torch ties the process to one core, of which it then counts
    no more."""
    value = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores", "GOMP_CPU_AFFINITY": "0"}[name]
    script = (
        "from lab.machine import packages\n"  # as main.py does before any other import
        "import joblib, torch\n"
        "torch.rand(600, 600) @ torch.rand(600, 600)\n"
        "print(joblib.cpu_count())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=MAIN.parent, env={**os.environ, name: value},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(os.sched_getaffinity(0))


OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU "
    "driver by downloading and installing a new version"
)


def test_a_driver_that_is_too_old_is_said(monkeypatch, capsys):
    def fail():
        raise RuntimeError(OLD_DRIVER)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fail)
    assert device.choose_device("auto", 0).type == "cpu"
    (line,) = capsys.readouterr().out.splitlines()
    assert "driver on your system is too old (found version 11040)" in line
    assert "Update the driver, or install a PyTorch for an older CUDA" in line
    with pytest.raises(SystemExit):
        device.choose_device("cuda", 0)
    assert "too old (found version 11040)" in capsys.readouterr().err


def test_where_there_is_no_driver_nothing_is_said(monkeypatch, capsys):
    def fail():
        raise RuntimeError("Found no NVIDIA driver on your system. Please check that you have one")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fail)
    assert device.choose_device("auto", 0).type == "cpu"
    assert capsys.readouterr().out == ""


def test_a_torchrun_without_libuv_is_told_the_switch(monkeypatch):
    def fail(_):
        raise RuntimeError("use_libuv was requested but PyTorch was built without libuv support")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "rendezvous", fail)
    with pytest.raises(SystemExit, match="set USE_LIBUV=0 for torchrun"):
        device.find_ranks()


@pytest.mark.long
def test_the_choice_is_the_same_under_load():
    """Four busy processes, 20 measurements: all on the same side of what is worthwhile."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    try:
        found = [device.bfloat16_speedup() for _ in range(20)]
    finally:
        for process in busy:
            process.kill()
    print(f"speedups {min(found):.3f} to {max(found):.3f}")
    assert len({speedup >= device.WORTHWHILE_SPEEDUP for speedup in found}) == 1
