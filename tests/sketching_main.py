"""main.py as a process of its own whose figures are empty: drawing takes most of a small run."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

if __name__ == "__main__":
    from sketches import sketch

    sketch()
    sys.argv[0] = str(ROOT / "main.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
