// residual, one thread block a row: the algorithm is in rows.cuh.
#include "block.cuh"
#include "launch.cuh"

namespace fastpref::cuda {
namespace {

// Blocks that share an SM. Four: 64 registers a thread, and up to 64 KiB of fp32 logits in flight, of which 17 KiB must
// arrive each 0.8 us to keep an H200's memory busy (arithmetic: 4.3 TB/s over 132 SMs). Fewer where the softcap's
// slopes or the extras' sums want more.
template <class U, Map kMap, bool kExtras = false>
constexpr int kBlocks = kExtras ? 2 : kMap == Map::linear || std::is_same_v<U, None> ? 4 : 3;

template <class T, class U, Map kMap, bool kExtras>
__global__ void __launch_bounds__(kThreads, kBlocks<U, kMap, kExtras>) residual_kernel(const __grid_constant__ Args a) {
  __shared__ Shared shared;
  GpuBlock block(shared);
  residual_row<T, U, kMap, kExtras>(block, a, blockIdx.x);
}

struct LaunchResidual {
  const Args& a;
  Where where;
  template <class T, class U, Map kMap, bool kExtras>
  void operator()() const {
    launch_rows(residual_kernel<T, U, kMap, kExtras>, a, where, "launching residual");
  }
};

}  // namespace

void residual_by_cluster(const Args&, Where);  // cluster.cu

void residual(const Tile& tile, const Out& out, const Stats& stats, Sweep how, Where where) {
  check_shape(tile);
  const Args a = make_args(tile, out, stats, {}, {});
  if (how == Sweep::cluster) residual_by_cluster(a, where);
  else dispatch_residual(a, LaunchResidual{a, where});
}

std::vector<int> devices() {
  int driver = 0, count = 0;
  if (cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0)  // CUDA's own words would be "insufficient version"
    throw std::runtime_error("there is no NVIDIA driver");
  check(cudaGetDeviceCount(&count), "looking for devices");
  std::vector<int> capabilities;
  for (int device = 0; device < count; ++device) {
    int major, minor;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "asking for its capability");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "asking for its capability");
    capabilities.push_back(10 * major + minor);
  }
  return capabilities;
}

}  // namespace fastpref::cuda
