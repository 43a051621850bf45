"""Where and how networks compute: device, arithmetic, threads, and which of torchrun's processes.

In come settings and what the environment says. Out comes `Hardware`, which whatever computes is
handed; this process has then been made deterministic.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import math
import os
import platform
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import cv2
import joblib
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lab.machine.options import PROGRAM, ImageCount, refuse

Precision = Literal["fp32", "bf16"]
WORTHWHILE_SPEEDUP = 1.3  # of bfloat16 over float32, for which its rounding is accepted


@dataclass(frozen=True)
class MachineSettings:
    """Where and how to compute."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """where to compute; auto takes CUDA if present"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """arithmetic; auto takes bf16 where it is worth its rounding"""
    eval_batch: ImageCount = 1000
    """images in an evaluation step"""


@dataclass(frozen=True)
class Ranks:
    """Which of torchrun's processes this is, of how many, and their common notice board."""

    rank: int = 0
    count: int = 1
    rank_here: int = 0  # of those on this machine
    count_here: int = 1
    board: torch.distributed.Store | None = None  # None where there is one process

    def share(self, name: str, value: str) -> str:
        """What rank 0 says, for all ranks; they wait for it.

        Torchrun ends those that wait if rank 0 fails.
        """
        if self.board is None:
            return value
        if self.rank == 0:
            self.board.set(name, value)
        while not self.board.check([name]):
            time.sleep(0.1)
        return self.board.get(name).decode()

    def is_first_to(self, deed: str) -> bool:
        """Whether no other rank has come here before."""
        if self.board is None:
            return True
        try:
            return self.board.add(deed, 1) == 1
        except RuntimeError:  # the board has gone with the process that kept it
            return True


def find_ranks() -> Ranks:
    """From what torchrun says in the environment."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return Ranks()
    try:
        board, rank, count = next(torch.distributed.rendezvous("env://"))
    except (ValueError, RuntimeError) as error:
        if "libuv" in str(error):
            sys.exit(
                f"{PROGRAM}: this PyTorch has no libuv: set USE_LIBUV=0 for torchrun ({error})"
            )
        sys.exit(f"{PROGRAM}: WORLD_SIZE is set, but not by torchrun: start it with that ({error})")
    rank_here = int(os.environ.get("LOCAL_RANK", rank))
    count_here = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    return Ranks(rank, count, rank_here, count_here, board)


class CancelledError(Exception):
    """Ends work in a thread: other work beside it has failed, or the run was interrupted."""


@dataclass(frozen=True)
class Hardware:
    """Where and in which arithmetic networks run, and which of several processes this is."""

    device: torch.device
    precision: Precision
    description: str
    reason: str = ""  # why this precision
    eval_batch: int = 1000
    ranks: Ranks = field(default_factory=Ranks)
    at_once: int = 1  # how many networks are trained or tried in parallel
    cancelled: threading.Event = field(default_factory=threading.Event)  # set when they are to end

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def raise_if_cancelled(self) -> None:
        """Work that takes long asks this now and then; see `parallel.in_parallel`."""
        if self.cancelled.is_set():
            raise CancelledError


def prepare_machine(settings: MachineSettings, networks: int) -> Hardware:
    """Make this process deterministic, and choose where and in which arithmetic it computes.

    Each of torchrun's processes gets a GPU, in turn, or its share of the cores. On a CPU, at most
    `networks` are trained or tried in parallel.
    """
    allow_only_deterministic_algorithms()
    keep_freed_memory()
    ranks = find_ranks()
    limit_threads(ranks)
    device = choose_device(settings.device, ranks.rank_here)
    arithmetic = choose_arithmetic(settings.precision, device)
    at_once = min(networks, most_at_once(device, ranks))
    return Hardware(
        device=device,
        precision=arithmetic.precision,
        reason=arithmetic.reason,
        description=describe(device, at_once),
        eval_batch=settings.eval_batch,
        ranks=ranks,
        at_once=at_once,
    )


def most_at_once(device: torch.device, ranks: Ranks) -> int:
    """How many things to do in parallel, each on its share of this process's threads.

    Two threads do two things in less time than two threads do one after the other. Torchrun's
    ranks are parallel already, and a GPU waits for Python, of which a process has one.
    """
    if device.type == "cuda" or ranks.count > 1:
        return 1
    return torch.get_num_threads()


def limit_threads(ranks: Ranks) -> None:
    """At most a thread for each core that this process may use, of the cores that ranks share.

    A container or a cluster often grants fewer cores than the machine has, which PyTorch counts.
    """
    threads = max(1, joblib.cpu_count() // ranks.count_here)
    if ranks.count == 1:  # torchrun sets OMP_NUM_THREADS to 1 where nobody has
        threads = min(threads, torch.get_num_threads())
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)


def choose_device(wanted: Literal["auto", "cuda", "cpu"], rank_here: int) -> torch.device:
    """CUDA where it is there and works, if that is not ruled out."""
    cpu = torch.device("cpu")
    if wanted == "cpu":
        return cpu
    if torch.cuda.is_available():
        device = torch.device("cuda", rank_here % torch.cuda.device_count())
        problem = try_out(device)
        if not problem:
            torch.cuda.set_device(device)
            return device
    else:
        problem = problem_of_driver()
    if wanted == "cuda":
        why = problem or "it sees no CUDA device"
        refuse("device", f"PyTorch {torch.__version__} can't use CUDA: {why}")
    if problem:
        print(f"On the CPU, since PyTorch {torch.__version__} can't use CUDA: {problem}")
    return cpu


def problem_of_driver() -> str:
    """Why a driver that is there does not serve, and the cure; "" where there is none at all."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].partition(" Please update")[0]
        if "driver" in reason and "too old" in reason:
            return f"{reason} Update the driver, or install a PyTorch for an older CUDA"
    return ""


def try_out(device: torch.device) -> str:
    """What goes wrong in a small convolution, "" if nothing does.

    A card may be there that this PyTorch has no kernels for.
    """
    name = str(device)
    try:
        name = torch.cuda.get_device_name(device)
        images = torch.zeros(1, 3, 8, 8, device=device)
        filters = torch.zeros(4, 3, 3, 3, device=device)
        F.relu(F.conv2d(images, filters)).sum().item()
    except RuntimeError as error:
        return f"{name}: {str(error).splitlines()[0]}"
    return ""


def allow_only_deterministic_algorithms() -> None:
    """Allow only those of PyTorch's algorithms that give the same bits every time."""
    # use_deterministic_algorithms does the same and loads PyTorch's compiler, for 2 s.
    torch.set_deterministic_debug_mode("error")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    compute_float32_in_float32()
    # Sums of bfloat16 products in float32, as CPUs take them.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    # Deterministic mode would also fill every new tensor with NaN; nothing here reads those.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def compute_float32_in_float32() -> None:
    """Not in TF32 or bfloat16, whatever a container has set: convolutions, RNNs and products."""
    if hasattr(torch.backends, "fp32_precision"):  # from PyTorch 2.9 on
        cudnn: Any = torch.backends.cudnn
        mkldnn: Any = torch.backends.mkldnn
        for part in (
            torch.backends, torch.backends.cuda.matmul, cudnn, cudnn.conv, cudnn.rnn,
            mkldnn, mkldnn.conv, mkldnn.rnn, mkldnn.matmul,
        ):  # fmt: skip
            part.fp32_precision = "ieee"
    # Newer versions read these too, and end with an error where they say something else.
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed: else each step gets its memory as new pages again."""
    if platform.libc_ver()[0] != "glibc":
        return
    m_trim_threshold = -1
    m_mmap_max = -4
    m_arena_max = -8  # one for all threads: only the first keeps what is freed
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    libc.mallopt(m_arena_max, 1)


def has_amx() -> bool:
    """Whether the CPU has AMX, a matrix unit that computes bfloat16."""
    return torch.cpu._is_amx_tile_supported()  # PyTorch's own check, though its name starts with _


@dataclass(frozen=True)
class Arithmetic:
    """The arithmetic that networks compute in, and why."""

    precision: Precision
    reason: str


def choose_arithmetic(wanted: Literal["auto", "fp32", "bf16"], device: torch.device) -> Arithmetic:
    """bfloat16 where it is worth its rounding, unless the other is wanted.

    A GPU says whether it has it. So does a processor with AMX, and one of Intel's kind without any
    instruction for it. Of the others some are twice as fast in bfloat16 and some no faster, which
    what they say of themselves does not tell: they are measured.
    """
    if wanted != "auto":
        return Arithmetic(wanted, "as asked")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Arithmetic("bf16", "the GPU has it")
        return Arithmetic("fp32", "the GPU has no bfloat16")
    if has_amx():
        return Arithmetic("bf16", "the processor has AMX")
    if is_x86() and not torch.cpu._is_avx512_bf16_supported():
        return Arithmetic("fp32", "the processor has no bfloat16")
    speedup = bfloat16_speedup()
    precision: Precision = "bf16" if speedup >= WORTHWHILE_SPEEDUP else "fp32"
    return Arithmetic(
        precision, f"bfloat16 measured {speedup:.2f} times as fast, {WORTHWHILE_SPEEDUP} would do"
    )


def is_x86() -> bool:
    """Whether the processor is one of Intel's kind, which says what it has."""
    return platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")


def bfloat16_speedup() -> float:
    """How many times as fast a CPU computes a convolution in bfloat16 as in float32.

    One of the size of these networks' own, with its gradients, on one thread: ten tries each, in
    turn, of which the best counts, in the processor's own time: so other processes do not.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    best = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for _ in range(10):
        for dtype in best:
            best[dtype] = min(best[dtype], seconds_of_convolution(dtype))
    torch.set_num_threads(threads)
    return best[torch.float32] / max(best[torch.bfloat16], 1e-9)


def seconds_of_convolution(dtype: torch.dtype) -> float:
    """The processor's time for a convolution, forward and both gradients.

    From 64 to 192 channels, on 64 images of 12x12 pixels.
    """
    convolution = nn.Conv2d(64, 192, kernel_size=3, padding=1, bias=False, dtype=dtype)
    convolution.to(memory_format=torch.channels_last)
    images = torch.zeros(64, 64, 12, 12, dtype=dtype, requires_grad=True)
    channels_last = images.to(memory_format=torch.channels_last)
    start = time.process_time()
    convolution(channels_last).sum().backward()
    return time.process_time() - start


def describe(device: torch.device, at_once: int) -> str:
    """The device in words, as results name it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    amx = " with AMX" if has_amx() else ""
    threads = torch.get_num_threads()
    plural = "s" if threads > 1 else ""
    shared = f" for {at_once} networks at once" if at_once > 1 else ""
    return f"{processor_name()}{amx}, {threads} thread{plural}{shared}"


def processor_name() -> str:
    """What the processor calls itself; its architecture where that can't be asked."""
    cpu_information = Path("/proc/cpuinfo")
    if cpu_information.exists():
        name = re.search(r"^model name\s*:\s*(.+)$", cpu_information.read_text(), re.MULTILINE)
        if name:
            return name[1].strip()
    return platform.processor() or f"{platform.machine()} CPU"


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that numbers depend on.

    The modules say it, not pip's records: OpenCV comes under several names.
    """
    import matplotlib
    import sklearn

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": version_of_torchvision(),
        "numpy": np.__version__,
        "scikit-learn": sklearn.__version__,
        "opencv": cv2.__version__,
        "matplotlib": matplotlib.__version__,
    }


def version_of_torchvision() -> str:
    """As pip's records say it, where there are any: its import takes seconds."""
    try:
        return importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        import torchvision

        return str(torchvision.__version__)
