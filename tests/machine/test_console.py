"""What a person sees: notebooks, odd consoles, and one line where a run can't go on."""

import io
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from helpers import MAIN, SKETCHING, STRESS, refused, run_main, tiny

import main
from lab.machine import console
from lab.machine.options import UserError

FP32 = ("--precision", "fp32")  # else it is measured, which takes seconds
BRIEF = (*FP32, "--gradcam-images", "1")

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
    assert "--batch-size" in refused(capsys, *tiny(tmp_path, *FP32))


def test_errors_of_the_program_keep_their_traceback(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(main, "train_network", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        main.main(tiny(tmp_path, *FP32))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_in_a_line(tmp_path, monkeypatch, capsys, number):
    # Shells have SIGINT ignored in what they start with &.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(main, "train_network", lambda *_: signal.raise_signal(number))
    message = refused(capsys, *tiny(tmp_path, *FP32))
    assert "interrupted; what was trained and measured is kept" in message
    assert "same command goes on" in message


@pytest.mark.parametrize(
    "backend",
    [pytest.param("module://matplotlib_inline.backend_inline", marks=pytest.mark.slow), "nonsense"],
)
def test_a_notebooks_backend_does_not_matter(backend):
    """Seaborn asks for it, which a run imports, and --help does not."""
    script = (
        "from lab.machine import packages\n"  # the first import of main.py that is no standard one
        "import seaborn, matplotlib\n"
        "assert matplotlib.get_backend() == 'agg'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=MAIN.parent, env={**os.environ, "MPLBACKEND": backend},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_run_inside_a_notebook(tmp_path):
    """As %run does it: stdout is no file, and the program is not the process's own."""
    # Shells have it ignored in what they start with &.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    script = (
        "import io, runpy, sys\n"
        "class Cell(io.StringIO):\n    pass\n"
        "sys.stdout, sys.stderr = Cell(), Cell()\n"
        f"sys.argv = {['main.py', *tiny(tmp_path, *BRIEF)]}\n"
        f"runpy.run_path({str(SKETCHING)!r}, run_name='__main__')\n"
        "assert 'Everything is in' in sys.stdout.getvalue()\n"
        "import atexit, signal\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"  # cells can stop
        "atexit._run_exitfuncs()\n"
        "assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN\n"  # as Python ends
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results" / "summary.md").exists()


def test_a_notebooks_cell_is_no_file(monkeypatch):
    cell = io.StringIO()
    monkeypatch.setattr(sys, "stdout", cell)
    monkeypatch.setattr(sys, "stderr", cell)
    with pytest.raises(SystemExit) as ended:
        main.main(["--help"])
    assert ended.value.code == 0 and "--batch-size" in cell.getvalue()
    assert not console.on_terminal()


ENCODINGS = ["cp1252", "ascii", "cp1252:strict"]


@pytest.mark.slow
def test_a_run_on_a_console_that_can_show_little(tmp_path):
    """ASCII alone, and errors for all else: what other encodings can't show, this can't either."""
    arguments = tiny(tmp_path / "日本", *BRIEF)
    done = run_main(*arguments, program=SKETCHING, PYTHONIOENCODING="ascii:strict")
    assert done.returncode == 0, done.stderr
    assert "\\u65e5\\u672c" in done.stdout
    assert (tmp_path / "日本" / "results" / "summary.md").exists()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_a_console_cannot_show_is_shown_by_its_number(monkeypatch, encoding):
    name, _, errors = encoding.partition(":")
    shown = {"stdout": io.BytesIO(), "stderr": io.BytesIO()}
    for stream, content in shown.items():
        file = io.TextIOWrapper(content, encoding=name, errors=errors or "strict")
        monkeypatch.setattr(sys, stream, file)
    with pytest.raises(SystemExit) as ended:
        main.main(["--help"])
    assert ended.value.code == 0
    with pytest.raises(SystemExit) as ended:
        main.main(["--data-dir", "~nobody日本"])
    assert ended.value.code == 2
    sys.stdout.flush()
    sys.stderr.flush()
    assert b"--batch-size" in shown["stdout"].getvalue()
    assert rb"~nobody\u65e5\u672c" in shown["stderr"].getvalue()


def test_closed_streams_keep_it_from_no_start():
    closed = f"{sys.executable} {MAIN} --help >&- 2>&-"
    assert subprocess.run(closed, shell=True).returncode == 0


def test_a_reader_that_has_enough_is_left_in_peace():
    """As `main.py --help | head -3`: no traceback."""
    done = subprocess.run(
        f"{sys.executable} -u {MAIN} --help | head -1", shell=True, capture_output=True, text=True
    )
    assert done.stdout.startswith("usage:") and done.stderr == ""


@pytest.mark.slow
def test_closed_streams_do_not_matter(tmp_path):
    closed = f"{sys.executable} {SKETCHING} {' '.join(tiny(tmp_path, *STRESS, *BRIEF))} >&- 2>&-"
    assert subprocess.run(closed, shell=True).returncode == 0
    assert (tmp_path / "results" / "summary.md").exists()


def test_main_runs_in_any_thread(tiny_run, sketching):
    """As Gradio, Streamlit and Ray call it: signals can be set in the main thread alone."""
    ended = []

    def run():
        main.main(tiny(tiny_run))
        ended.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert ended


def test_a_part_that_fails_is_said_and_the_rest_goes_on(capsys):
    watch = console.Stopwatch()
    parts = console.Parts(watch)
    done = []
    with parts.part("first"):
        raise RuntimeError("two\nlines")
    with parts.part("second"):
        raise UserError("mend that")
    with parts.part("third"):
        done.append("third")
    assert done == ["third"] and list(watch.seconds) == ["third"]
    assert parts.failed() == {"first": "RuntimeError: two lines", "second": "mend that"}
    assert (
        "first failed, and the rest goes on: RuntimeError: two lines\n" in capsys.readouterr().out
    )
    with pytest.raises(RuntimeError, match="two"):
        parts.raise_first()


def test_ctrl_c_is_not_caught(capsys):
    with pytest.raises(KeyboardInterrupt), console.Parts(console.Stopwatch()).part("first"):
        raise KeyboardInterrupt


def test_long_lines_are_wrapped_on_a_terminal_and_whole_in_a_log(capsys, monkeypatch):
    line = f"Using /a/{'long/' * 20}path, {'word ' * 30}end"
    console.say(line)
    assert capsys.readouterr().out == f"{line}\n"
    monkeypatch.setattr(console, "on_terminal", lambda: True)
    console.say(line)
    shown = capsys.readouterr().out.splitlines()
    assert " ".join(part.strip() for part in shown) == line
    assert all(len(part) <= 80 or "path," in part for part in shown) and len(shown) > 2
