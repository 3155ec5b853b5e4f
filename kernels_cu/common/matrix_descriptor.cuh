// What wgmma must know of a tile in shared memory: rows of 64 numbers of 16 bits (128 bytes), whose units of 16 bytes are
// XORed with the row's low three bits, at a multiple of 1024 bytes. PTX ISA: "Matrix Descriptor Format".
#pragma once

#include <common/types.cuh>

namespace cuattn::ptx {

// As rows of the operand: groups of 16 columns start 32 bytes behind each other.
__device__ __forceinline__ u64 wgmma_rows(u32 address) {
    return (u64(1) << 62) | (u64(1024 / 16) << 32) | (u64(1) << 16) | ((address & 0x3ffff) >> 4);
}
// As columns: groups of 16 rows start 2048 bytes behind each other, and the next 64 columns `panel_bytes`.
__device__ __forceinline__ u64 wgmma_columns(u32 address, int panel_bytes) {
    return (u64(1) << 62) | (u64(1024 / 16) << 32) | (u64(panel_bytes / 16) << 16) | ((address & 0x3ffff) >> 4);
}
// The same tile, so many bytes further on.
__device__ __forceinline__ u64 wgmma_advance(u64 tile, int bytes) { return tile + bytes / 16; }

}  // namespace cuattn::ptx
