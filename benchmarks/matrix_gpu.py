"""The matrix of model types in bfloat16 on a GPU, written down: what ran where, and how it erred.

Runs `tests/matrix/test_matrix_bf16.py` and turns its record into JSON: for each draw of each model
type the calls that each engine computed, and the errors of outputs and gradients, call by call,
beside those of the model's own attention in bfloat16, ours / theirs, relative to float32's.
Run on a GPU: `PYTHONPATH=.:kernels python benchmarks/matrix_gpu.py --processes 14 --out out.json`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
import transformers
import triton

TEST = Path(__file__).parents[1] / "tests" / "matrix" / "test_matrix_bf16.py"
ENDS = ("failure", "error", "skipped")


def row_of(case: ElementTree.Element) -> dict[str, Any]:
    """What one test recorded, and how it ended."""
    model_type = case.attrib["name"].partition("[")[2].removesuffix("-cuda]")
    draws = [json.loads(found.attrib["value"]) for found in case.iter("property")]
    for draw in draws:
        draw["errors"] = ", ".join(f"{ours:.1e} / {theirs:.1e}" for ours, theirs in draw["errors"])
    ends = {
        child.tag: child.attrib.get("message", "").partition("\n")[0][:200]
        for child in case
        if child.tag in ENDS
    }
    return {"model_type": model_type, **ends, "draws": draws}


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", default="auto", help="how many test at once")
    parser.add_argument("--only", default="", help="an expression of pytest's -k")
    parser.add_argument("--commit", default="unknown", help="of the code that runs")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.NamedTemporaryFile(suffix=".xml") as xml:
        options = ["-q", "-m", "gpu", "--tb=line", "-p", "no:cacheprovider", "-o", "addopts="]
        options += ["-n", arguments.processes, "-k", arguments.only, f"--junitxml={xml.name}"]
        command = [sys.executable, "-m", "pytest", *options, str(TEST)]
        subprocess.run(command, check=False)  # what fails is written down
        cases = ElementTree.parse(xml.name).iter("testcase")
        rows = [row_of(case) for case in cases]
    rows = [row for row in rows if row.get("skipped") != "no attention"]
    outcomes = Counter(next((end for end in ENDS if end in row), "passed") for row in rows)
    calls = sum((Counter(draw["engines"]) for row in rows for draw in row["draws"]), Counter[str]())
    record: dict[str, Any] = {
        "what": __doc__,
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "commit": arguments.commit,
        "outcomes": dict(outcomes),
        "calls": dict(calls),
        "rows": rows,
    }
    print(json.dumps({name: record[name] for name in ("card", "outcomes", "calls")}))
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
