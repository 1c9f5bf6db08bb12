"""Widths of loads, read from compiled kernels by their places in the source."""

from types import SimpleNamespace

import pytest

from emanet_triton.bench.ahead_of_time import code as compiled_code

TTIR = """
#loc1 = loc("/package/kernels/conv.py":20:9)
#loc2 = loc("/package/kernels/conv.py":30:5)
%b_bias = tt.load %p_bias, %m, %other : tensor<128x!tt.ptr<f32>> loc(#loc11)
%b_x = tt.load %p_x, %m_x, %zero : tensor<128x64x!tt.ptr<bf16>> loc(#loc12)
%scalar = tt.load %p : !tt.ptr<i32> loc(#loc1)
#loc10 = loc("/package/kernels/conv.py":12:7)
#loc11 = loc(callsite(#loc10 at #loc2))
#loc12 = loc("b_x"(#loc1))
"""
BIAS = """
\t.loc\t1 12 7, function_name $L__info_string0, inlined_at 1 30 5 // conv.py:12:7
\t// begin inline asm
\t.loc\t1 12 7, function_name $L__info_string0, inlined_at 1 30 5 // conv.py:12:7
\tmov.u32 %r27, %r31;
\t.loc\t1 13 7, function_name $L__info_string0, inlined_at 1 30 5 // conv.py:13:7
\t@%p3 ld.global.b32 { %r27 }, [ %rd14 + 0 ];
\t// end inline asm
"""
X = "\t.loc\t1 20 9 // conv.py:20:9\n"
COPIED = X + "\tcp.async.cg.shared.global [ %r3 + 0 ], [ %rd5 + 0 ], 0x10, %r9;\n"
NARROW = X + "\tld.global.b16 { %rs65 }, [ %rd43 + 0 ];\n"
HINTED = X + "\tld.global.L1::evict_first.v2.b32 { %r1, %r2 }, [ %rd43 + 0 ];\n"
AMD_X = "\t.loc\t1 20 9                        ; conv.py:20:9\n"
AMD_WIDE = AMD_X + "\tbuffer_load_dwordx4 v[22:25], v3, s[8:11], 0 offen\n"
AMD_NARROW = AMD_WIDE + "\tglobal_load_short_d16_hi v102, v86, s[4:7]\n"


def narrowest(code, warp_size=32, name="ptx"):
    target = SimpleNamespace(warp_size=warp_size)
    metadata = SimpleNamespace(num_warps=8, target=target)
    return compiled_code.narrowest_load(
        SimpleNamespace(asm={"ttir": TTIR, name: code}, metadata=metadata)
    )


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (COPIED, (16, 16)),
        (NARROW, (2, 16)),
        (NARROW + COPIED, (2, 16)),
        (HINTED, (8, 16)),
        (BIAS, (4, 4)),  # 128 numbers for 256 threads: one each
        (BIAS + NARROW, (2, 16)),
        (BIAS + COPIED, (16, 16)),
        ("", (0, 0)),
    ],
    ids=["copied", "narrow", "the-worst", "hinted", "bias", "worst-share", "widest-tile", "none"],
)
def test_loads_of_nvidia_code(code, expected):
    assert narrowest(code) == expected


@pytest.mark.parametrize(
    ("code", "expected"), [(AMD_WIDE, (16, 16)), (AMD_NARROW, (2, 16))], ids=["wide", "narrow"]
)
def test_loads_of_amd_code(code, expected):
    assert narrowest(code, 64, "amdgcn") == expected
