"""The Hopper kernels, compiled on a machine that has no such card, need what they may.

Registers are dealt out by hand. Where they do not suffice, or the assembler makes products wait for
each other, results are still right: no other test would see it.
"""

import json

import pytest

# One process compiles for all tests of this file and for the portable kernels.
pytestmark = pytest.mark.xdist_group("sm90")

pytest.importorskip("triton", minversion="3.6", reason="Triton 3.6 is not installed")

# Shared memory that a program may have on Hopper.
SHARED_BYTES = 227 * 1024


def one(kind, size, mask, dtype="bfloat16", **more):
    """A call of which one pass is compiled."""
    more |= {"engine": "hopper", "passes": [kind]}
    return {"size": size, "mask": mask, "dtype": dtype, **more}


CALLS = [
    one("forward", 64, "band"),
    one("forward", 64, "causal", group=4, term="sinks"),
    one("forward", 64, "causal", n=8192),
    one("forward", 64, "causal", n=8192, term="slopes"),
    one("forward", 64, "causal", n=8192, term="softcap"),
    one("forward", 64, "intervals", "float16"),
    one("forward", 128, "causal"),
    one("forward", 128, "runs"),
    one("forward", 128, "band", term="softcap"),
    one("forward", 96, "band"),
    one("forward", 192, "causal", value_size=128),
    one("forward", 256, "causal"),
    one("forward", 256, "runs", term="softcap"),
    one("forward", 64, "band", term="slopes"),
    one("forward", 128, "runs", term="slopes"),
    one("forward", 256, "causal", term="slopes"),
    one("forward", 64, "causal", term="key bias"),
    one("forward", 128, "runs", term="key bias"),
    one("forward", 64, "band", term="table"),
    one("forward", 128, "causal", term="clamped table"),
    one("forward", 256, "band", term="clamped table"),
    one("backward", 64, "band"),
    one("backward", 64, "runs"),
    one("backward", 128, "causal"),
    one("backward", 128, "intervals", "float16", group=4),
    one("backward", 128, "runs"),
    one("backward", 64, "causal", term="slopes", needs=["q", "k", "v"]),
    one("backward", 128, "runs", term="slopes", needs=["q", "k", "v"]),
    one("backward", 64, "causal", term="key bias", needs=["q", "k", "v", "bias"]),
    one("backward", 128, "causal", term="key bias", needs=["q", "k", "v", "bias"]),
    one("backward", 128, "runs", term="key bias", needs=["q", "k", "v", "bias"]),
    one("backward", 64, "band", term="clamped table", needs=["q", "k", "v", "table"]),
    one("backward", 128, "causal", term="clamped table", needs=["q", "k", "v"]),
    one("backward", 128, "band", term="clamped table", needs=["q", "k", "v", "table"]),
    one("backward", 64, "causal", term="clamped table", needs=["q", "k", "v", "table"]),
    one("backward", 256, "causal", term="key bias", needs=["q", "k", "v"]),
    one("backward", 256, "runs", term="key bias", needs=["k", "v", "bias"]),
    one("backward", 256, "band", term="clamped table", needs=["k", "v", "table"]),
    one("backward", 192, "runs", value_size=128, term="clamped table", needs=["k", "v", "table"]),
    one("backward", 64, "runs", needs=["q"]),
    one("backward", 128, "runs", needs=["k", "v"]),
    one("backward", 64, "causal", term="softcap"),
    one("backward", 128, "band", term="softcap"),
    one("backward", 128, "runs", term="softcap"),
    one("backward", 64, "band", deterministic=True),
    one("backward", 128, "band", "float16", deterministic=True),
    one("backward", 64, "causal", deterministic=True),
    one("backward", 128, "causal", deterministic=True, group=4),
    one("backward", 192, "causal", value_size=128),
    one("backward", 192, "intervals", "float16"),
    one("backward", 256, "band"),
    one("backward", 256, "causal", group=4),
    one("backward", 256, "runs"),
    one("backward", 256, "runs", term="softcap"),
]

# Local memory that is accepted, in bytes a thread, as the Triton of constraints.txt compiles them.
# With slopes too the joint kernel is a quarter faster than the portable ones.
LOCAL_BYTES = {
    ("forward_kernel", 128, "causal"): 16,
    ("forward_kernel", 128, "runs"): 48,
    ("forward_kernel", 128, "band", "softcap"): 8,
    ("forward_kernel", 192, "causal"): 8,
    ("forward_kernel", 256, "causal"): 40,
    ("forward_kernel", 256, "runs", "softcap"): 64,
    ("forward_kernel", 128, "runs", "slopes"): 48,
    ("forward_kernel", 256, "causal", "slopes"): 40,
    ("forward_kernel", 128, "runs", "key bias"): 16,
    ("forward_kernel", 128, "causal", "clamped table"): 56,
    ("forward_kernel", 256, "band", "clamped table"): 96,
    ("joint_kernel", 64, "band"): 8,
    ("joint_kernel", 64, "runs"): 64,
    ("joint_kernel", 128, "causal"): 40,
    ("joint_kernel", 128, "intervals"): 56,
    ("joint_kernel", 128, "runs"): 64,
    ("joint_kernel", 64, "causal", "slopes"): 24,
    ("joint_kernel", 128, "runs", "slopes"): 112,
    ("joint_kernel", 64, "causal", "key bias"): 32,
    ("joint_kernel", 128, "causal", "key bias"): 64,
    ("joint_kernel", 128, "runs", "key bias"): 88,
    ("joint_kernel", 64, "band", "clamped table"): 32,
    ("joint_kernel", 64, "causal", "clamped table"): 32,
    ("joint_kernel", 128, "causal", "clamped table"): 48,
    ("joint_kernel", 128, "band", "clamped table"): 104,
    ("joint_kernel", 64, "causal", "softcap"): 8,
    ("joint_kernel", 128, "band", "softcap"): 96,
    ("joint_kernel", 128, "runs", "softcap"): 144,
    ("joint_kernel", 64, "band", "deterministic"): 8,
    ("joint_kernel", 64, "causal", "deterministic"): 16,
    ("joint_kernel", 128, "band", "deterministic"): 32,
    ("joint_kernel", 128, "causal", "deterministic"): 40,
    ("query_kernel", 256, "band"): 32,
    ("query_kernel", 256, "causal"): 40,
    ("query_kernel", 256, "runs"): 48,
    ("query_kernel", 256, "causal", "key bias"): 48,
    ("query_kernel", 256, "runs", "softcap"): 48,
}

# Of it, the loads and stores within the loops over tiles, of all warpgroups together.
HOT_SPILLS = {
    ("forward_kernel", 128, "runs"): 2,
    # Numbers that are the same for all threads, of both consumers in two loops each.
    ("forward_kernel", 256, "band", "clamped table"): 14,
    ("joint_kernel", 64, "causal", "key bias"): 5,
    ("joint_kernel", 128, "causal", "key bias"): 6,
    ("joint_kernel", 128, "runs", "key bias"): 4,
    ("joint_kernel", 64, "runs"): 6,
    ("joint_kernel", 128, "runs"): 1,
    ("joint_kernel", 128, "runs", "slopes"): 18,
    ("joint_kernel", 64, "causal", "softcap"): 12,
    # Of a step's 900 instructions some 10 of each consumer; under runs half of them for edges only.
    ("joint_kernel", 128, "band", "softcap"): 21,
    ("joint_kernel", 128, "runs", "softcap"): 66,
    ("joint_kernel", 64, "causal", "deterministic"): 2,
    ("joint_kernel", 128, "band", "deterministic"): 4,
    ("query_kernel", 256, "causal", "key bias"): 4,
    ("query_kernel", 256, "runs"): 4,
    ("query_kernel", 256, "runs", "softcap"): 4,
}

OWN = {"forward_kernel", "joint_kernel", "key_kernel", "query_kernel"}


@pytest.fixture(scope="module")
def needs(kernels_of):
    return kernels_of(CALLS)


def own_of(facts):
    """The engine's own kernels that a call needs."""
    if facts["passes"] == ["forward"]:
        return {"forward_kernel"}
    needs = facts.get("needs", ["q", "k", "v"])
    joint = facts["size"] <= 128
    keys = {"joint_kernel" if joint else "key_kernel"} if "k" in needs else set()
    return keys | ({"query_kernel"} if needs == ["q"] or (not joint and "q" in needs) else set())


@pytest.mark.parametrize("call", map(json.dumps, CALLS))
def test_kernels_fit_a_multiprocessor_and_keep_its_tensor_cores_busy(needs, call):
    facts = json.loads(call)
    kernels = dict(needs[call])
    assert kernels.keys() & OWN == own_of(facts)
    for name, found in kernels.items():
        if name not in OWN:
            assert not found["local_bytes"]
            continue
        assert found["shared_bytes"] <= SHARED_BYTES
        assert found["mma"] > 0
        assert not found["serialized"]
        assert not found["overwritten"]
        # A program tells of an addition when all others would see it.
        assert found["released"] == (name == "joint_kernel" and "deterministic" in facts)
        special = facts.get("term") or ("deterministic" if "deterministic" in facts else None)
        which = name, facts["size"], facts["mask"], *([special] if special else [])
        assert found["local_bytes"] <= LOCAL_BYTES.get(which, 0), (name, found)
        assert found["hot_spills"] <= HOT_SPILLS.get(which, 0), (name, found)


# A loop whose product reads R40, which was loaded before it, with what comes behind the product.
LOOP = """
        /*0010*/                   LDSM.16.M88.4 R40, [R8+0x10000] ;
.L_x_1:
        /*0020*/              @!P0 BRA `(.L_x_2) ;
.L_x_2:
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, R40, gdesc[UR20], RZ, !UPT, gsb0 ;
        /*0040*/                   {behind} ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R56, R44, gdesc[UR24].tnspB, R56, gsb0 ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/                   MUFU.EX2 R41, R9 ;
"""
BEHIND = {
    "MUFU.EX2 R43, R26": True,
    "@P2 LDS.64 R42, [R5]": True,
    "F2FP.BF16.F32.PACK_AB R44, R26, R27": False,
    "STS.64 [R41], R42": False,
}


def test_an_operand_that_its_loop_overwrites_is_found(compiling):
    listings = [LOOP.replace("{behind}", behind) for behind in BEHIND]
    code = f"""
import triton_resources as found
for listing in {listings!r}:
    instructions, loops = found.parse(listing)
    print(len(loops), found.overwrites(instructions, loops[0]))
"""
    process = compiling(code)
    told = process.communicate()[0].splitlines()
    assert told == [f"1 {overwrites}" for overwrites in BEHIND.values()]
