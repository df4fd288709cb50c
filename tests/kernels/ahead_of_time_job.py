"""Compile the kernels for GPUs that are not here, and print a JSON record a variant: registers, spills, vector loads.

    python tests/kernels/ahead_of_time_job.py [sm_80 sm_90 gfx942]

Run by ``test_ahead_of_time.py`` in a process of its own, because the interpreter's flag must not be set when Triton is
imported.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import triton
from subspace_kernels import launch, tiles
from subspace_kernels.reference import FLOOR, TINY
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
F32, BF16, F16 = triton.language.float32, triton.language.bfloat16, triton.language.float16
POINTERS = {
    "table": "*i64", "records": "*i64", "tiles": "*i32", "segments": "*i64", "blocks": "*i32", "owner": "*i32",
    "matrices": "i32", "plane": "i32", "out_plane": "i32", "first_tile": "i32", "rows": "i32", "count": "i32",
    "row_blocks": "i32", "zero": "i32",
}  # fmt: skip


def variants() -> list[tuple[str, str, dict, int]]:
    """Return (name, kernel, constants, warps) of every variant that production launches."""
    found = []

    def add(kernel: str, name: str, warps: int, **constants: object) -> None:
        found.append((name, kernel, constants, warps))

    classes = {"64x128": launch.LARGE, "16x256": launch.WIDE, "256x16": launch.TALL}
    plain = {"SAME": False, "WEIGHTED_U": False, "WEIGHTED_V": False, "MOMENTS": False}
    modes = {
        "same": {**plain, "SAME": True},
        "weighted": {**plain, "WEIGHTED_U": True, "WEIGHTED_V": True},
        "moments": {**plain, "MOMENTS": True},
    }
    ranks = {
        "squares": {"SECOND": False, "MIX": False, "SQUARES": True},
        "mix squares": {"SECOND": False, "MIX": True, "SQUARES": True},
        "second": {"SECOND": True, "MIX": False, "SQUARES": False},
    }
    # Types and alignment all matter for the large tiles; for the small ones the hardest case stands for the others.
    cases = [("64x128", F32, 4), ("64x128", BF16, 8), ("64x128", F32, 0), ("16x256", F32, 4), ("256x16", F32, 0)]
    cases.append(("64x128", F16, 8))
    for shape, dtype, aligned in cases:
        tile = classes[shape]
        common = {"ROWS": tile.rows, "COLUMNS": tile.columns, "ALIGNED": aligned, "OUT_TYPE": F32}
        for name, mode in modes.items():
            if dtype == F16 and name != "moments":
                continue
            types = {"A_TYPE": dtype, "B_TYPE": dtype if name == "weighted" else F32}
            add("cross_tiles", f"{name} {shape} {dtype} {aligned}", tile.warps(aligned), **common, **types, **mode)
        for name, mode in ranks.items():
            if dtype == F16 or (name == "second" and shape != "64x128"):
                continue
            types = {"X_TYPE": dtype, "M_TYPE": F32}
            add("rank_tiles", f"{name} {shape} {dtype} {aligned}", tile.warps(aligned), **common, **types, **mode)
    add("reduce_partials", "reduce", 4, TILES=launch.REDUCE_TILES, BLOCK=launch.REDUCE_BLOCK)
    cut = {"UNITS": launch.CELL_UNITS, "BLOCK": launch.CELL_BLOCK, "FLOOR": FLOOR, "TINY": TINY}
    for sizes in ((20, 4, 1, 15, 5), (20, 1, 1, 8, 2)):
        constants = dict(zip("HEQCO", sizes, strict=True), **cut, OUTPUTS=8 if sizes[-1] == 5 else 2)
        add("lstm_cell", f"H, E, Q, C, O = {sizes}", launch.CELL_WARPS, **constants)
    return found


def cubin_resources(cubin: bytes) -> dict[str, int]:
    """Return registers, stack and local memory by the cuobjdump in Triton's package."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {key: int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL", "SHARED")}


def compile_variant(kernel: str, constants: dict, warps: int, target: GPUTarget) -> dict[str, object]:
    """Compile one variant; return what it uses."""
    function = getattr(tiles, kernel)
    if kernel == "lstm_cell":
        constants = {**constants, "ROLLED": target.backend == "hip"}
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else POINTERS.get(name, "*fp32") for name in names}
    # Arguments the launcher finds to be multiples of 16: everything torch allocates.
    hints = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(function, signature, {(names.index(k),): v for k, v in constants.items()}, hints)
    compiled = triton.compile(source, target=target, options={"num_warps": warps, "enable_fp_fusion": True})
    if target.backend == "cuda":
        used = cubin_resources(compiled.asm["cubin"])
        ptx = compiled.asm["ptx"]
        loads = len(re.findall(r"ld\.global\S*\.v4", ptx))
        return {
            "registers": used["REG"], "spills": used["STACK"] + used["LOCAL"], "shared": used["SHARED"],
            "vector_loads": loads, "vector_stores": len(re.findall(r"st\.global\S*\.v4", ptx)),
        }  # fmt: skip
    text = compiled.asm["amdgcn"]
    number = {
        key: int(re.search(rf"\.{key}:\s+(\d+)", text)[1])
        for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    }
    return {
        "registers": number["vgpr_count"],
        # Scalar registers "spill" into lanes of vector registers, which costs no memory traffic.
        "spills": number["vgpr_spill_count"] + number["private_segment_fixed_size"],
        "scalar_spills": number["sgpr_spill_count"],
        "shared": compiled.metadata.shared,
        "vector_loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", text)),
        "vector_stores": len(re.findall(r"(?:global|buffer)_store_dwordx4", text)),
    }


def main(targets: list[str]) -> None:
    """Compile everything for ``targets`` and print one record a line."""
    for target in targets or list(TARGETS):
        for name, kernel, constants, warps in variants():
            start = time.monotonic()
            used = compile_variant(kernel, constants, warps, TARGETS[target])
            seconds = round(time.monotonic() - start, 2)
            record = {"target": target, "kernel": kernel, "variant": name, "warps": warps, "seconds": seconds, **used}
            record["aligned"] = constants.get("ALIGNED", 0)
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
