"""What `import flashpatch` costs and what it leaves alone."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ALL_NAMES = "import flashpatch\nfor name in flashpatch.__all__: getattr(flashpatch, name)\n"

# Processor time, which other programs on the machine do not change.
BUDGET_MS = {"import flashpatch": 50, ALL_NAMES: 250}

# Hides Triton from this interpreter, as if it were not installed.
WITHOUT_TRITON = """
import sys
from importlib.machinery import PathFinder
class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] == "triton"
        return None if hidden else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
"""


def in_fresh_python(code: str, cwd: Path | None = None) -> str:
    """What the code prints in an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_costs_little_beside_torch_and_transformers(tmp_path):
    # Compiled once, as for everybody, also where the environment forbids to keep what was compiled.
    timed = f"""
import json, sys, time
import torch, transformers, transformers.modeling_utils, transformers.masking_utils
sys.dont_write_bytecode, sys.pycache_prefix = False, {str(tmp_path)!r}
times = [time.process_time()]
for code in {[*BUDGET_MS]}:
    exec(code)
    times.append(time.process_time())
print(json.dumps([(end - times[0]) * 1000 for end in times[1:]]))
"""
    runs = zip(*(json.loads(in_fresh_python(timed)) for _ in range(3)), strict=True)
    costs_ms = dict(zip(BUDGET_MS, map(statistics.median, runs), strict=True))
    assert all(costs_ms[code] < budget for code, budget in BUDGET_MS.items()), costs_ms


def test_importing_makes_no_cuda_context():
    code = ALL_NAMES + "import torch; print(torch.cuda.is_initialized())"
    assert in_fresh_python(code) == "False"


def test_importing_loads_neither_torch_nor_transformers_nor_triton():
    code = """
import json, sys
import flashpatch
print(json.dumps([n for n in ("torch", "transformers", "triton") if n in sys.modules]))
"""
    assert json.loads(in_fresh_python(code)) == []


def test_importing_activates_nothing():
    """Neither the import nor reading every name changes transformers, beyond the functions that are
    registered under keys that no model has."""
    code = f"""
import transformers, transformers.modeling_utils as m
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
def state():
    return (
        dict(m.ALL_ATTENTION_FUNCTIONS.items()), dict(masks.items()),
        dict(vars(m.PreTrainedModel)), dict(vars(transformers.PreTrainedConfig)),
    )
before = state()
{ALL_NAMES}
after = state()
for there in after[:2]:
    for key in ("fpatch", "fpatch_masked"):
        del there[key]
print(before == after)
"""
    assert in_fresh_python(code) == "True"


def test_everything_but_triton_works_without_triton():
    code = f"""
{WITHOUT_TRITON}
import torch
from transformers import BertConfig, BertModel
{ALL_NAMES}
model = BertModel(BertConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
)).eval()
ids = torch.arange(12).view(2, 6)
mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
before = model(ids, attention_mask=mask).last_hidden_state
report = flashpatch.apply(model)
after = model(ids, attention_mask=mask).last_hidden_state
assert report.served == 2, report
assert "triton" not in sys.modules
seen = mask.bool()
print((before[seen] - after[seen]).abs().max().item())
"""
    assert float(in_fresh_python(code)) < 1e-5


def test_a_package_named_kernels_is_found_from_the_root(tmp_path):
    """The bare directory `./kernels` must lose against Hugging Face's package, wherever that is."""
    (tmp_path / "kernels").mkdir()
    theirs = tmp_path / "kernels" / "__init__.py"
    theirs.touch()
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels as k; print(k.__file__)"
    assert in_fresh_python(code, ROOT) == str(theirs)


def test_no_module_named_kernels_is_installed_by_us(tmp_path):
    code = """
from importlib.util import find_spec
spec = find_spec("kernels")
print(spec and [*spec.submodule_search_locations])
"""
    assert str(ROOT) not in in_fresh_python(code, tmp_path)
