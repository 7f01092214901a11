"""How long a model's weights take to be opened, and how much memory: a prior in a folder.

The folder is opened in a process of its own, so that nothing of this one counts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file

from dalle1.common.hardware import DTYPES
from dalle1.transformer.config import TransformerConfig
from dalle1.transformer.model import KIND, Transformer
from dvae.storage import write_section

# Prints seconds until the weights are there, until all of them were read, and bytes at the peak.
# A small folder is opened first: what torch takes for itself at first is not counted.
PROGRAM = """
import json, sys, time
import psutil
from dalle1 import registry

def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])

small, large = sys.argv[1:]
sum(float(p.detach().sum()) for p in registry.load("prior", small).parameters())
before = psutil.Process().memory_info().rss
start = time.perf_counter()
prior = registry.load("prior", large)
loaded = time.perf_counter() - start
sum(float(p.detach().sum()) for p in prior.parameters())
read = time.perf_counter() - start
print(json.dumps({"load": loaded, "load and read": read, "memory": peak() - before}))
"""
SMALL = TransformerConfig(
    width=16, heads=2, head_size=8, layers=2, grid=4, text_length=5, text_vocab=32, image_vocab=32
)


def write_folder(folder: Path, c: TransformerConfig, dtype: torch.dtype) -> int:
    """A prior's folder with random weights of a type; returns how many numbers they are."""
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in Transformer(c).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.empty(shape, dtype=dtype).normal_(0, c.init_std, generator=generator)
        for name, shape in shapes.items()
    }
    folder.mkdir()
    save_file(weights, folder / str(KIND.weights))
    write_section(folder, KIND.role, {"kind": KIND.name, **c.model_dump()})
    return sum(shape.numel() for shape in shapes.values())


def report_loading(c: TransformerConfig, dtype: str, repeats: int) -> dict[str, Any]:
    """Measures the opening of a prior of this shape; prints, and returns for a JSON file, the
    figures.

    Raises ValueError on a system that does not tell the peak of a process' memory.
    """
    if not Path("/proc/self/status").exists():
        raise ValueError("loading: expected Linux, which tells the peak of a process' memory")
    with tempfile.TemporaryDirectory() as name:
        small, large = Path(name) / "small", Path(name) / "large"
        write_folder(small, SMALL, DTYPES[dtype])
        numbers = write_folder(large, c, DTYPES[dtype])
        size = numbers * DTYPES[dtype].itemsize
        print(f"{numbers:,} weights in {dtype}, {size / 1e9:.2f} GB", flush=True)
        command = [sys.executable, "-c", PROGRAM, str(small), str(large)]
        found = [
            json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
            for _ in range(repeats)
        ]
    for what in ("load", "load and read"):
        seconds = [run[what] for run in found]
        print(f"  {what:<14}{median(seconds):8.2f} s  ({min(seconds):.2f} to {max(seconds):.2f})")
    memory = max(run["memory"] for run in found)
    print(f"  {'peak memory':<14}{memory / 1e9:8.2f} GB, {memory / size:.2f} times the weights")
    return {"weights": numbers, "bytes": size, "runs": found}
