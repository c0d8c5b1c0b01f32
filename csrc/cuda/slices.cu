// fold, residual_given_lse and gradient_given_lse, one thread block a row (rows.cuh), and scale_unless_one.
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

// A fixed number of blocks, so that those with nothing to do are gone in microseconds.
template <class T>
__global__ void __launch_bounds__(kThreads) scale_kernel(T* x, int64_t n, const float* factor) {
  const float f = *factor;
  if (f == 1.0f) return;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  constexpr int kEach = 16 / sizeof(T);
  const int64_t misaligned = reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T);
  const int64_t head = misaligned ? min(n, kEach - misaligned) : 0;
  const int64_t pieces = (n - head) / kEach, tail = head + pieces * kEach;
  uint4* const whole = reinterpret_cast<uint4*>(x + head);
  for (int64_t i = thread; i < pieces; i += threads) {
    float values[kEach];
    unpack(T(), whole[i], values);
#pragma unroll
    for (float& value : values) value *= f;
    whole[i] = pack(T(), values);
  }
  if (thread < head) x[thread] = from_float<T>(to_float(x[thread]) * f);
  if (tail + thread < n) x[tail + thread] = from_float<T>(to_float(x[tail + thread]) * f);
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

template <class T>
void launch_scale(void* x, int64_t n, const float* factor, Where where) {
  const OnDevice on_device(where.device);
  int processors;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, where.device), "asking for its size");
  const int64_t needed = n / (kThreads * 16 / sizeof(T)) + 1;
  const unsigned blocks = static_cast<unsigned>(needed < 8 * processors ? needed : 8 * processors);
  scale_kernel<<<blocks, kThreads, 0, stream_of(where)>>>(static_cast<T*>(x), n, factor);
  check(cudaGetLastError(), "launching scale_unless_one");
}

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

void scale_unless_one(void* x, DType dtype, int64_t n, const float* factor, Where where) {
  if (n == 0) return;
  switch (dtype) {
    case DType::f32: return launch_scale<float>(x, n, factor, where);
    case DType::bf16: return launch_scale<bf16>(x, n, factor, where);
    case DType::f16: return launch_scale<f16>(x, n, factor, where);
  }
}

}  // namespace fastpref::cuda
