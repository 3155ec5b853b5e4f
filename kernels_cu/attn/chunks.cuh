// The left fold over chunks: R' = max(R, r); O' = fma(o, b, O * a); L' = fma(l, b, L * a), a = 2^(R - R'), b = 2^(r - R').
#pragma once

#include <attn/softmax.cuh>
#include <common/types.cuh>
#include <ptx/math.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

// The fp32 result of a warp's merged chunks: outputs in shared memory (slots private to the lane: no barrier), row
// statistics in registers.
template <int blocks>
class MergedChunks {
  public:
    static constexpr int bytes_per_warp = blocks * 32 * 16;  // [column block][lane][4]

    __device__ __forceinline__ explicit MergedChunks(u32 warp_memory) : slots_(warp_memory + (threadIdx.x & 31) * 16) {
        rows_.reset();
    }

    // Folds a finished chunk in; the merged output goes to shared memory and `out` is free for the next chunk.
    __device__ __forceinline__ void fold(float (&out)[blocks][4], const RowStatistics& chunk) {
        fold_into(out, chunk);
#pragma unroll
        for (int b = 0; b < blocks; ++b) {
            ptx::store_shared_f32x4(slot(b), make_float4(out[b][0], out[b][1], out[b][2], out[b][3]));
        }
    }

    // Folds the row's last chunk in; the merged output stays in `out`. Returns the final statistics.
    __device__ __forceinline__ const RowStatistics& finish(float (&out)[blocks][4], const RowStatistics& chunk) {
        fold_into(out, chunk);
        return rows_;
    }

  private:
    __device__ __forceinline__ u32 slot(int block) const { return slots_ + block * 32 * 16; }

    __device__ __forceinline__ void fold_into(float (&out)[blocks][4], const RowStatistics& chunk) {
        float a[2], b[2];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const float reference = fmaxf(rows_.reference[row], chunk.reference[row]);
            a[row] = ptx::exp2_approx(__fsub_rn(rows_.reference[row], reference));
            b[row] = ptx::exp2_approx(__fsub_rn(chunk.reference[row], reference));
            rows_.sum[row] = __fmaf_rn(quad_sum(chunk.sum[row]), b[row], __fmul_rn(rows_.sum[row], a[row]));
            rows_.reference[row] = reference;
        }
        // The first chunk folds into nothing: a = 0 (or nothing visible, out = 0) and b = 1 leave it as it is.
        if (!empty_) {
#pragma unroll
            for (int i = 0; i < blocks; ++i) {
                const float4 merged = ptx::load_shared_f32x4(slot(i));
                out[i][0] = __fmaf_rn(out[i][0], b[0], __fmul_rn(merged.x, a[0]));
                out[i][1] = __fmaf_rn(out[i][1], b[0], __fmul_rn(merged.y, a[0]));
                out[i][2] = __fmaf_rn(out[i][2], b[1], __fmul_rn(merged.z, a[1]));
                out[i][3] = __fmaf_rn(out[i][3], b[1], __fmul_rn(merged.w, a[1]));
            }
        }
        empty_ = false;
    }

    u32 slots_;
    bool empty_ = true;
    RowStatistics rows_;
};

}  // namespace cuattn
