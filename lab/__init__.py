"""The laboratory beside main.py: what the study measures, draws and writes with.

Four wings, and arrows run one way. Each room says in its first lines what goes in and what comes
out, and can be used alone; none knows main.py.

    machine   the computer: options, device and arithmetic, files, console
    data      images and labels, and where they come from
    measure   from networks and images to numbers
    report    from numbers to records, tables, figures and pages
"""

import os
import sys

# Here, since every room's import comes by first, before that of torch and matplotlib.
# cuBLAS is deterministic only with a fixed workspace, and reads this when CUDA starts.
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
# Where one of these is set, importing torch ties this process to fewer cores than it was granted.
for binding in ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY"):
    os.environ.pop(binding, None)
# Figures go to files alone. A notebook's cells hand on a backend that only notebooks have.
os.environ["MPLBACKEND"] = "agg"

# Both may be closed, and some packages want them: NumPy 2.0 as it is imported, older tqdm later.
for stream_name in ("stdout", "stderr"):
    if getattr(sys, stream_name) is None:
        setattr(sys, stream_name, open(os.devnull, "w"))  # noqa: PTH123, SIM115
