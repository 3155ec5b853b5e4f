// Results of products, as in matmul.cuh, that warps pass to each other through shared memory: each lane finds what the same
// lane of another warp has computed.
#pragma once

#include <common/types.cuh>
#include <ptx/memory.cuh>

namespace cuattn {

// Room for `results` results of each of `groups` groups of warps, twice, so that one may be written while the last is
// read. A base class of a block's shared memory, so that it takes no room where nothing is passed on.
template <bool used, int groups, int results, int row_blocks, int blocks>
struct SharedResults {
    alignas(1024) float4 scores[2][groups][results * row_blocks * blocks * 32];

    __device__ __forceinline__ const float4* room(int turn, int group) const { return scores[turn][group]; }
};
template <int groups, int results, int row_blocks, int blocks>
struct SharedResults<false, groups, results, row_blocks, blocks> {
    __device__ __forceinline__ const float4* room(int, int) const { return nullptr; }
};

// One group's room for results of row_blocks times 16 rows and `blocks` times 8 columns.
template <int row_blocks, int blocks>
class Exchange {
  public:
    __device__ __forceinline__ Exchange(const float4* memory, int lane)
        : memory_(ptx::shared_address(memory) + lane * 16) {}

    // Some columns of result number `result`, from block `first` on.
    template <int some>
    __device__ __forceinline__ void store(int result, const float (&x)[row_blocks][some][4], int first) const {
#pragma unroll
        for (int m = 0; m < row_blocks; ++m) {
#pragma unroll
            for (int b = 0; b < some; ++b) {
                ptx::store_shared_f32x4(at(result, m, first + b),
                                        make_float4(x[m][b][0], x[m][b][1], x[m][b][2], x[m][b][3]));
            }
        }
    }

    __device__ __forceinline__ void load(int result, float (&x)[row_blocks][blocks][4]) const {
#pragma unroll
        for (int m = 0; m < row_blocks; ++m) {
#pragma unroll
            for (int b = 0; b < blocks; ++b) {
                const float4 four = ptx::load_shared_f32x4(at(result, m, b));
                x[m][b][0] = four.x, x[m][b][1] = four.y, x[m][b][2] = four.z, x[m][b][3] = four.w;
            }
        }
    }

  private:
    __device__ __forceinline__ u32 at(int result, int m, int b) const {
        return memory_ + ((result * row_blocks + m) * blocks + b) * 512;
    }

    u32 memory_;
};

}  // namespace cuattn
