"""Compiles the kernels for a GPU of Hopper's kind, where none is: `python -m tests.deployments.engine.gpu.compiles` prints JSON.

A program of its own: in the tests' process the kernels belong to the interpreter.
"""

from __future__ import annotations

import json
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deployments.engine.gpu import kernel
from deployments.engine.gpu.inputs import ROWS

HOPPER = GPUTarget("cuda", 90, 32)
ALIGNED = {"queries", "keys", "values", "output", "sums", "scales", "query_stride", "head_stride", "key_stride", "value_stride"}
WHOLE = {*ALIGNED, "table_stride", "tokens", "heads", "window"}


def compiled(dtype: str, itemsize: int, size: int, group: int, tokens_each: int) -> dict[str, Any]:
    """What became of one way to launch it: bytes of shared memory, and the kind of matrix instruction."""
    block = max(16, triton.next_power_of_2(size))
    constants = {
        "GROUP": group,
        "D": size,
        "DV": size,
        "BLOCK_SIZE": 16,
        "QUERIES": tokens_each,
        "ROWS": max(16, triton.next_power_of_2(tokens_each * group)),
        "COLUMNS": max(16, min(64, kernel.TILE_BYTES // (block * itemsize))),
        "BLOCK_D": block,
        "CAPPED": True,
        "SPLITS": 8 if tokens_each == 1 else 1,
    }
    names = kernel._attend.arg_names
    pointers = dict.fromkeys(["queries", "keys", "values", "output"], f"*{dtype}") | {"sums": "*fp32", "scales": "*fp32"}
    views = dict.fromkeys(kernel.VIEWS, "*i32")
    known = dict.fromkeys(WHOLE, "i32") | pointers | views | {"scale": "fp32", "softcap": "fp32"}
    source = ASTSource(
        fn=kernel._attend,
        signature={name: "constexpr" if name in constants else known[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in ALIGNED},
    )
    found = triton.compile(source, target=HOPPER, options={"num_warps": 4 if tokens_each == 1 else 8})
    kinds = [kind for kind in ("wgmma", "mma.sync") if kind in found.asm["ptx"]]
    return {"shared": found.metadata.shared, "kind": kinds[0] if kinds else "fma"}


if __name__ == "__main__":
    ways = [("bf16", 2, 128, 4, 1), ("bf16", 2, 128, 4, ROWS // 4), ("fp32", 4, 256, 1, ROWS)]
    print(json.dumps([compiled(*way) for way in ways]))
