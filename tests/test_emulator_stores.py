"""The copy engine's way back as the emulator has it: its results, and mistakes in its use that it finds."""

import numpy as np
import pytest
from hopper_kernels import TILE, Bug, Case, Product, numbers, padded

from cuattn import emulator


def stores_case(rows: int = 64, columns: int = 128) -> Case:
    """A copy of the left matrix to as many of the result's bits."""
    left = padded(numbers("bfloat16", (rows, columns), 9))
    product = Product("stores", left, None, 64, (64, 16), 2 * TILE + TILE + 8)
    expected = np.full((rows, 64), np.nan, np.float32).view(np.uint16)
    expected[:, :columns] = left
    return Case(product, expected.view(np.uint32))


@pytest.mark.parametrize(("rows", "columns"), [(64, 128), (37, 128), (64, 43), (20, 99)])
def test_stores_end_where_the_tensor_does(rows: int, columns: int) -> None:
    for schedule in emulator.SCHEDULES:
        stores_case(rows, columns).check(schedule)


STORE_FENCE = "        ptx::fence_async_proxy();\n        __syncwarp();\n"
STORE_WAIT = "        if (lane == 0) ptx::tma_store_wait();\n"
STORE_COMMIT = "            ptx::tma_store_commit();\n"
BUGS = {
    "a store of what the copy engine does not see": Bug(
        STORE_FENCE,
        "        __syncwarp();\n",
        "tma_store_4d .* a store by thread [0-9]+ is not visible to the asynchronous proxy",
    ),
    "a store before all lanes have written": Bug(
        STORE_FENCE,
        "        ptx::fence_async_proxy();\n",
        "tma_store_4d .* (race with a write by thread|never written)",
    ),
    "room that is written while it is stored": Bug(
        STORE_WAIT, "", "shared store .* a store from there has not been waited for"
    ),
    "lanes that do not know that room has been stored": Bug(
        STORE_WAIT + "        __syncwarp();\n",
        STORE_WAIT,
        "shared store .* (race with a read by thread|a store from there has not been waited for)",
    ),
    "stores that belong to no group": Bug(
        STORE_COMMIT,
        "",
        "a store from there has not been waited for|returns without tma_store_commit of its last stores",
    ),
    "the end of a thread whose stores read its memory": Bug(
        "    if (lane == 0) ptx::tma_store_wait();\n}",
        "}",
        "returns without tma_store_wait for its last stores",
    ),
    "a store from a multiple of 512": Bug(
        "16 * warp, 0, 0, room);",
        "16 * warp, 0, 0, room + 512);",
        "tma_store_4d .* misaligned: not a multiple of 1024",
    ),
    "a store that starts before the tensor": Bug(
        "16 * warp, 0, 0, room);", "16 * warp - 8, 0, 0, room);", "tma_store_4d: a negative coordinate"
    ),
    "a store of columns before the tensor's": Bug(
        "params.right_map, 64 * i, 16", "params.right_map, 64 * i - 8, 16", "tma_store_4d: a negative coordinate"
    ),
    "a store to where another one went": Bug(
        "params.right_map, 64 * i, 16",
        "params.right_map, 0 * i, 16",
        "tma_store_4d .* out is being stored there by the copy engine",
    ),
    "a load of what is being stored": Bug(
        "    if (lane == 0) ptx::tma_store_wait();\n}",
        "    if (lane == 0) ptx::tma_store_wait();\n    ptx::load_global_f32(params.out + 16 * warp * 64);\n}",
        "global load .* out is being stored there by the copy engine",
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_found(name: str) -> None:
    BUGS[name].check(stores_case().product)
