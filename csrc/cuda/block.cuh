// What the row algorithms ask of a thread block: lanes, barriers, shuffles, votes and shared memory. The tests have a
// second implementation that runs them on a CPU (tests/rows/emulated_block.h).
#pragma once

#include "rows.cuh"

namespace fastpref::cuda {

struct GpuBlock {
  Shared& shared;
  int thread, lane, warp;

  __device__ __forceinline__ explicit GpuBlock(Shared& shared)
      : shared(shared), thread(threadIdx.x), lane(threadIdx.x % kLanes), warp(threadIdx.x / kLanes) {}

  // All barriers order memory, global memory too, among the threads they hold up.
  __device__ __forceinline__ void sync() { __syncthreads(); }
  __device__ __forceinline__ bool sync_or(bool x) { return __syncthreads_or(x); }
  __device__ __forceinline__ void sync_warp() { __syncwarp(); }
  __device__ __forceinline__ bool any_in_warp(bool x) { return __any_sync(0xffffffffu, x); }
  template <class X>
  __device__ __forceinline__ X shuffle_xor(X x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }
};

}  // namespace fastpref::cuda
