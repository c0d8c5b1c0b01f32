// The CUDA kernels as seen by the rest: the row contract with device addresses, launched on a stream. Nothing here
// waits for the device. Every error is a std::runtime_error that says what CUDA said.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../rows.h"

namespace fastpref::cuda {

struct Where {
  int device;
  uintptr_t stream;  // a cudaStream_t
};

// Compute capabilities, 10 * major + minor, of the devices; throws with the reason if there is no driver or no device.
std::vector<int> devices();

enum class Sweep { block, cluster };

// Sweep::cluster: see cluster.cuh; throws where `cluster_size` gives 0.
void residual(const Tile&, const Out&, const Stats&, Sweep, Where);
void fold(const Tile&, const FoldState&, Where);
void residual_given_lse(const Tile&, const Given&, const Out&, Where);
void gradient_given_lse(const Tile&, const Given&, const Out&, Where);

// Thread blocks that share a row of logits in the cluster sweep; 0: this device, or rows this wide, cannot.
int cluster_size(DType logits, int64_t cols, int device);

}  // namespace fastpref::cuda
