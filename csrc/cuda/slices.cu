// fold, residual_given_lse and gradient_given_lse, one thread block a row (rows.cuh).
#include "block.cuh"
#include "launch.cuh"

namespace fastpref::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads, 4) fold_kernel(const __grid_constant__ Args a) {
  __shared__ Shared shared;
  GpuBlock block(shared);
  fold_row<T>(block, a, blockIdx.x);
}

template <class T, bool kEntropy>
__global__ void __launch_bounds__(kThreads, 3) given_lse_kernel(const __grid_constant__ Args a) {
  __shared__ Shared shared;
  GpuBlock block(shared);
  given_lse_row<T, Any, kEntropy>(block, a, blockIdx.x);
}

struct LaunchFold {
  const Args& a;
  Where where;
  template <class T>
  void operator()() const {
    launch_rows(fold_kernel<T>, a, where, "launching fold");
  }
};

template <bool kEntropy>
struct LaunchGivenLse {
  const Args& a;
  Where where;
  template <class T>
  void operator()() const {
    launch_rows(given_lse_kernel<T, kEntropy>, a, where,
                kEntropy ? "launching gradient_given_lse" : "launching residual_given_lse");
  }
};

}  // namespace

void fold(const Tile& tile, const FoldState& state, Where where) {
  check_shape(tile);
  const Args a = make_args(tile, {}, {}, state, {});
  dispatch_logits(a, LaunchFold{a, where});
}

void residual_given_lse(const Tile& tile, const Given& given, const Out& out, Where where) {
  check_shape(tile);
  const Args a = make_args(tile, out, {}, {}, given);
  dispatch_logits(a, LaunchGivenLse<false>{a, where});
}

void gradient_given_lse(const Tile& tile, const Given& given, const Out& out, Where where) {
  check_shape(tile);
  const Args a = make_args(tile, out, {}, {}, given);
  dispatch_logits(a, LaunchGivenLse<true>{a, where});
}

}  // namespace fastpref::cuda
