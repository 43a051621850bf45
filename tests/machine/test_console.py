"""TODO machine/test_console.py"""

import subprocess
import sys

import pytest
import torch
from helpers import MAIN, STRESS, refused, run_main, tiny

import main

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
