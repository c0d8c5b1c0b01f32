// For the .cu files: CUDA's errors as exceptions, the tensor's device as the current one for as long as a launch takes,
// and the launch of a row kernel.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda.h"
#include "rows.cuh"

namespace fastpref::cuda {

inline void check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is told once, and must not turn up again in somebody else's next call
  throw std::runtime_error(std::string("fastpref CUDA rows, ") + doing + ": " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error));
}

class OnDevice {
 public:
  explicit OnDevice(int device) : to_(device) {
    check(cudaGetDevice(&from_), "asking for the current device");
    if (from_ != to_) check(cudaSetDevice(to_), "choosing the device");
  }
  ~OnDevice() {
    if (from_ != to_) cudaSetDevice(from_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int from_, to_;
};

inline cudaStream_t stream_of(Where where) { return reinterpret_cast<cudaStream_t>(where.stream); }

// A kernel of one thread block a row.
inline void launch_rows(void (*kernel)(Args), const Args& a, Where where, const char* doing) {
  if (a.tile.rows == 0) return;
  const OnDevice on_device(where.device);
  kernel<<<static_cast<unsigned>(a.tile.rows), kThreads, 0, stream_of(where)>>>(a);
  check(cudaGetLastError(), doing);
}

inline void check_shape(const Tile& tile) {
  if (tile.cols < 0 || tile.cols > int64_t{1} << 30 || tile.rows < 0 || tile.rows > (int64_t{1} << 31) - 1)
    throw std::invalid_argument("logits is [" + std::to_string(tile.rows) + ", " + std::to_string(tile.cols) +
                                "]; it takes fewer than 2^31 rows and at most 2^30 columns");
}

}  // namespace fastpref::cuda
