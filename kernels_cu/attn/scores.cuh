// Scores of a tile in shared memory, through which the warps that share rows pass them to each other.
#pragma once

#include <common/types.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

// [row][key]; rows lie 8 words apart modulo 32 banks, so that the lanes of half a warp touch every bank once.
template <int keys>
class SharedScores {
  public:
    static constexpr int row_bytes = (keys + 8) * 4;
    static_assert(keys % 32 == 0);

    // `rows`: shared address of the warp's 16 rows.
    __device__ __forceinline__ SharedScores(u32 rows, int lane)
        : memory_(rows + lane / 4 * row_bytes + 8 * (lane & 3)) {}

    // score[b][c] belongs to row lane / 4 + 8 (c / 2) and key first_key + 8 b + 2 (lane % 4) + c % 2.
    template <int blocks>
    __device__ __forceinline__ void store(const float (&score)[blocks][4], int first_key) const {
#pragma unroll
        for (int b = 0; b < blocks; ++b) {
            ptx::store_shared_f32x2(at(0, first_key + 8 * b), make_float2(score[b][0], score[b][1]));
            ptx::store_shared_f32x2(at(8, first_key + 8 * b), make_float2(score[b][2], score[b][3]));
        }
    }

    __device__ __forceinline__ void load(float (&score)[keys / 8][4]) const {
#pragma unroll
        for (int b = 0; b < keys / 8; ++b) {
            const float2 upper = ptx::load_shared_f32x2(at(0, 8 * b)), lower = ptx::load_shared_f32x2(at(8, 8 * b));
            score[b][0] = upper.x, score[b][1] = upper.y, score[b][2] = lower.x, score[b][3] = lower.y;
        }
    }

  private:
    __device__ __forceinline__ u32 at(int row, int key) const { return memory_ + row * row_bytes + 4 * key; }

    u32 memory_;
};

}  // namespace cuattn
