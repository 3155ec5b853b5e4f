// The left fold over chunks: R' = max(R, r); O' = fma(o, b, O * a); L' = fma(l, b, L * a), a = 2^(R - R'), b = 2^(r -
// R').
#pragma once

#include <attn/softmax.cuh>
#include <common/types.cuh>
#include <ptx/math.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

// The fp32 result of a warp's finished chunks, in shared memory of the warp's own, so that the accumulators of the
// running chunk keep the registers.
template <int blocks>
class MergedChunks {
  public:
    static constexpr int out_bytes = blocks * 32 * 16;         // [column block][lane][4]
    static constexpr int bytes_per_warp = out_bytes + 8 * 16;  // then [lane / 4]: two references, two sums

    __device__ __forceinline__ explicit MergedChunks(u32 warp_memory) : memory_(warp_memory) {}

    // Folds the finished chunk in `out` and `rows` into what is stored; the merged result is in `out` and `rows`, its
    // sums complete. `first`: nothing is stored yet, which is the fold into R = no_reference, L = 0, O = 0.
    __device__ __forceinline__ void fold(float (&out)[blocks][4], RowStatistics& rows, bool first) const {
        rows.sum[0] = quad_sum(rows.sum[0]);
        rows.sum[1] = quad_sum(rows.sum[1]);
        if (first) return;
        const float4 stored = ptx::load_shared_f32x4(row_slot());
        const float references[2] = {stored.x, stored.y}, sums[2] = {stored.z, stored.w};
        float a[2], b[2];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const float reference = fmaxf(references[row], rows.reference[row]);
            a[row] = ptx::exp2_approx(__fsub_rn(references[row], reference));
            b[row] = ptx::exp2_approx(__fsub_rn(rows.reference[row], reference));
            rows.sum[row] = __fmaf_rn(rows.sum[row], b[row], __fmul_rn(sums[row], a[row]));
            rows.reference[row] = reference;
        }
#pragma unroll
        for (int i = 0; i < blocks; ++i) {
            const float4 merged = ptx::load_shared_f32x4(out_slot(i));
            out[i][0] = __fmaf_rn(out[i][0], b[0], __fmul_rn(merged.x, a[0]));
            out[i][1] = __fmaf_rn(out[i][1], b[0], __fmul_rn(merged.y, a[0]));
            out[i][2] = __fmaf_rn(out[i][2], b[1], __fmul_rn(merged.z, a[1]));
            out[i][3] = __fmaf_rn(out[i][3], b[1], __fmul_rn(merged.w, a[1]));
        }
    }

    __device__ __forceinline__ void store(const float (&out)[blocks][4], const RowStatistics& rows) const {
#pragma unroll
        for (int b = 0; b < blocks; ++b) {
            ptx::store_shared_f32x4(out_slot(b), make_float4(out[b][0], out[b][1], out[b][2], out[b][3]));
        }
        __syncwarp();  // the four lanes of a row share its slot: all have read it before one writes
        if ((threadIdx.x & 3) == 0) {
            ptx::store_shared_f32x4(row_slot(),
                                    make_float4(rows.reference[0], rows.reference[1], rows.sum[0], rows.sum[1]));
        }
        __syncwarp();  // and it is there before any reads again
    }

  private:
    __device__ __forceinline__ u32 out_slot(int block) const {
        return memory_ + (block * 32 + (threadIdx.x & 31)) * 16;
    }
    __device__ __forceinline__ u32 row_slot() const { return memory_ + out_bytes + (threadIdx.x & 31) / 4 * 16; }

    u32 memory_;
};

}  // namespace cuattn
