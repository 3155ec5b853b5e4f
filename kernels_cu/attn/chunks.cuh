// The left fold over chunks: R' = max(R, r); O' = fma(o, b, O * a); L' = fma(l, b, L * a), a = 2^(R - R'), b = 2^(r -
// R').
#pragma once

#include <attn/softmax.cuh>
#include <common/types.cuh>
#include <ptx/math.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

// What a fold of one chunk multiplies with: R' and the factors a of what was merged before and b of the chunk.
struct Fold {
    float reference, a, b;

    __device__ __forceinline__ Fold(float merged_reference, float chunk_reference)
        : reference(fmaxf(merged_reference, chunk_reference)),
          a(ptx::exp2_approx(__fsub_rn(merged_reference, reference))),
          b(ptx::exp2_approx(__fsub_rn(chunk_reference, reference))) {}

    // A sum, or an element of the output, merged.
    __device__ __forceinline__ float operator()(float merged, float chunk) const {
        return __fmaf_rn(chunk, b, __fmul_rn(merged, a));
    }
};

// The fp32 result of a warp's finished chunks, in memory of the warp's own, so that the accumulators of the running chunk
// keep the registers: shared memory, but for the outputs where they are in global memory.
template <int blocks, bool out_in_shared = true>
class MergedChunks {
  public:
    static constexpr int out_floats = blocks * 32 * 4;  // [column block][lane][4]
    static constexpr int out_bytes = out_in_shared ? out_floats * 4 : 0;
    static constexpr int row_bytes = 8 * 16;  // [lane / 4]: two references, two sums
    static constexpr int bytes_per_warp = out_bytes + row_bytes;

    // Rows lie behind the outputs, or elsewhere.
    __device__ __forceinline__ explicit MergedChunks(u32 warp_memory)
        : memory_(warp_memory), rows_(warp_memory + out_bytes), out_(nullptr) {}
    __device__ __forceinline__ MergedChunks(u32 warp_memory, u32 warp_rows, float* warp_out)
        : memory_(warp_memory), rows_(warp_rows), out_(warp_out) {}

    // Folds the finished chunk in `out` and `rows` into what is stored; the merged result is in `out` and `rows`, its
    // sums complete. `first`: nothing is stored yet, which is the fold into R = no_reference, L = 0, O = 0.
    __device__ __forceinline__ void fold(float (&out)[blocks][4], RowStatistics& rows, bool first) const {
        rows.sum[0] = quad_sum(rows.sum[0]);
        rows.sum[1] = quad_sum(rows.sum[1]);
        if (first) return;
        const float4 stored = ptx::load_shared_f32x4(row_slot());
        const Fold upper(stored.x, rows.reference[0]), lower(stored.y, rows.reference[1]);
        rows.sum[0] = upper(stored.z, rows.sum[0]);
        rows.sum[1] = lower(stored.w, rows.sum[1]);
        rows.reference[0] = upper.reference;
        rows.reference[1] = lower.reference;
#pragma unroll
        for (int i = 0; i < blocks; ++i) {
            const float4 merged = load_block(i);
            out[i][0] = upper(merged.x, out[i][0]);
            out[i][1] = upper(merged.y, out[i][1]);
            out[i][2] = lower(merged.z, out[i][2]);
            out[i][3] = lower(merged.w, out[i][3]);
        }
    }

    __device__ __forceinline__ void store(const float (&out)[blocks][4], const RowStatistics& rows) const {
#pragma unroll
        for (int b = 0; b < blocks; ++b) {
            store_block(b, make_float4(out[b][0], out[b][1], out[b][2], out[b][3]));
        }
        __syncwarp();  // the four lanes of a row share its slot: all have read it before one writes
        if ((threadIdx.x & 3) == 0) {
            ptx::store_shared_f32x4(row_slot(),
                                    make_float4(rows.reference[0], rows.reference[1], rows.sum[0], rows.sum[1]));
        }
        __syncwarp();  // and it is there before any reads again
    }

  private:
    // One address, from which blocks have fixed distances.
    __device__ __forceinline__ u32 shared_slot(int block) const {
        return memory_ + (threadIdx.x & 31) * 16 + block * 512;
    }
    __device__ __forceinline__ float* global_slot(int block) const {
        return out_ + (threadIdx.x & 31) * 4 + block * 128;
    }
    __device__ __forceinline__ float4 load_block(int block) const {
        if constexpr (out_in_shared) return ptx::load_shared_f32x4(shared_slot(block));
        return ptx::load_global_f32x4(global_slot(block));
    }
    __device__ __forceinline__ void store_block(int block, float4 x) const {
        if constexpr (out_in_shared) {
            ptx::store_shared_f32x4(shared_slot(block), x);
        } else {
            ptx::store_global_f32x4(global_slot(block), x);
        }
    }
    __device__ __forceinline__ u32 row_slot() const { return rows_ + (threadIdx.x & 31) / 4 * 16; }

    u32 memory_, rows_;
    float* out_;
};

}  // namespace cuattn
