"""Mistakes in sampling.cu: (name, text before, text after)."""

import numpy as np

from test_kernels_sampling import A_LONG_TAIL, ALL, drawn, sampling

MISTAKES = [
    # the equations
    ("the penalty ignores signs", "x > 0.0f ? x / penalty : x * penalty", "x / penalty"),
    ("tokens past the tokenizer's", "i >= end || i >= n_tokens", "i >= end"),
    ("the last of equals", "x == max && i < token", "x == max && i > token"),
    ("the sum is not scaled where the maximum grows", "all.raw_sum *= ", "0.0f * "),
    ("warps add sums of different scales", "raw_sum * __expf(raw_max - from(all))", "raw_sum"),
    (
        "the key of what is below zero",
        "? ~bits : bits | 0x80000000u",
        "? bits : bits | 0x80000000u",
    ),
    ("top_p counts the token itself", "above + through - own <= limit", "above + through <= limit"),
    ("what lies above a range is forgotten", "    above = s.above;\n", ""),
    (
        "top_p of all tokens, not of top_k's",
        "key < first || key > last) continue;",
        "false) continue;",
    ),
    ("a carry is lost", "(old + low < old ? 1u : 0u)", "0u"),
    ("the token before", "token = begin; (before", "token = begin - 1; (before"),
    ("the sum before a segment is forgotten", "target -= __shfl", "__shfl"),
    # the order of reads and writes
    (
        "no barrier before the warps' summaries are read",
        "    __syncthreads();\n    *this = Summary();",
        "    *this = Summary();",
    ),
    (
        "bins are not emptied before all are counted",
        "= 0;\n    __syncthreads();",
        "= 0;",
    ),
    ("no barrier in the scan", "= in_warp;\n  __syncthreads();", "= in_warp;"),
    (
        "bins are read while others count",
        "bin_of(x, key), w);\n    }\n    __syncthreads();",
        "bin_of(x, key), w);\n    }",
    ),
    ("no barrier after the crossing bin", "own;\n    }\n    __syncthreads();", "own;\n    }"),
    ("no barrier after the range", "high);\n    }\n    __syncthreads();", "high);\n    }"),
    (
        "adds without an atomic",
        "old = atomicAdd(&s.low[bin], low)",
        "old = s.low[bin]; s.low[bin] = old + low",
    ),
    ("logits are read before the kernel before has ended", "  wait_for_previous_kernel();\n", ""),
    (
        "a row longer than its shared memory",
        "SAMPLED && KEEP) row.kept[i] =",
        "SAMPLED && KEEP) row.kept[i + 32] =",
    ),
]


def run(launcher):
    case = drawn(9, 1000, "equals")
    case.x[::2] -= 10  # the penalty has another formula for negative logits
    case.n_tokens, case.allowed = 990, np.arange(990) % 5 != 0
    case.check(launcher, sampling(**ALL))
    few = drawn(20, 300)
    for changes in ({}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}):
        few.check(launcher, sampling(**changes))
    A_LONG_TAIL.check(launcher, sampling(top_p=0.9))
    drawn(1, 30_000).check(launcher, sampling())
    equals = drawn(1, 300)
    equals.x[:] = np.minimum(equals.x, 2)
    equals.check(launcher, sampling(temperature=0.0))
