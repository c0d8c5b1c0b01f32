// The cluster sweep of residual (cluster.cuh) on the device, and when it can run.
#include <cooperative_groups.h>

#include "block.cuh"
#include "cluster.cuh"
#include "launch.cuh"

namespace fastpref::cuda {
namespace {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
struct GpuClusterBlock : GpuBlock {
  ClusterShared& shared;
  uint4* slice;
  int rank, ranks;

  __device__ __forceinline__ GpuClusterBlock(ClusterShared& shared, uint4* slice)
      : GpuBlock(shared),
        shared(shared),
        slice(slice),
        rank(cooperative_groups::this_cluster().block_rank()),
        ranks(cooperative_groups::this_cluster().num_blocks()) {}

  // Orders shared memory, the other blocks' too, and global memory.
  __device__ __forceinline__ void sync_cluster() { cooperative_groups::this_cluster().sync(); }
  __device__ __forceinline__ ClusterShared& remote(int rank) {
    return *cooperative_groups::this_cluster().map_shared_rank(&shared, rank);
  }
  __device__ __forceinline__ void copy_async(uint4* to, const uint4* from) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
  }
  __device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
};
#endif

template <class T, bool kExtras>
__global__ void __launch_bounds__(kThreads, 3) cluster_kernel(const __grid_constant__ Args a) {
#if __CUDA_ARCH__ >= 900
  __shared__ ClusterShared shared;
  extern __shared__ uint4 slice[];
  GpuClusterBlock block(shared, slice);
  residual_row_by_cluster<T, kExtras>(block, a, blockIdx.x / block.ranks);
#endif
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "asking for a device attribute");
  return value;
}

struct LaunchCluster {
  const Args& a;
  Where where;
  int ranks;

  template <class T>
  void operator()() const {
    const bool extras = a.stats.entropy || a.stats.top1 || a.stats.mean_logit || a.stats.log_sum_p2;
    if (extras) launch(cluster_kernel<T, true>);
    else launch(cluster_kernel<T, false>);
  }

  template <class Kernel>
  void launch(Kernel* kernel) const {
    const int64_t each = (row_chunks(a.tile.dtype, a.tile.cols) + ranks - 1) / ranks;
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = ranks, cluster.val.clusterDim.y = 1, cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(a.tile.rows * ranks));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(each) * kChunkBytes;
    config.stream = stream_of(where);
    config.attrs = &cluster;
    config.numAttrs = 1;
    const int bytes = static_cast<int>(config.dynamicSmemBytes);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "asking for shared memory");
    check(cudaLaunchKernelEx(&config, kernel, a), "launching residual by clusters");
  }
};

}  // namespace

int cluster_size(DType logits, int64_t cols, int device) {
  if (!attribute(cudaDevAttrClusterLaunch, device)) return 0;
  const int64_t chunks = row_chunks(logits, cols);
  const int64_t memory = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const int64_t most = (memory - static_cast<int64_t>(sizeof(ClusterShared))) / kChunkBytes;
  // As few blocks as leave each 64 KiB of the row or less, for three of them to share an SM; wider rows take what fits.
  for (int ranks = 1; ranks <= kMaxRanks; ranks *= 2)
    if (chunks <= (most < 4 ? most : 4) * ranks) return ranks;
  return chunks <= most * kMaxRanks ? kMaxRanks : 0;
}

void residual_by_cluster(const Args& a, Where where) {
  if (a.tile.rows == 0) return;
  const OnDevice on_device(where.device);
  const int ranks = cluster_size(a.tile.dtype, a.tile.cols, where.device);
  if (ranks == 0)
    throw std::invalid_argument("logits has " + std::to_string(a.tile.cols) +
                                " columns; the cluster sweep takes rows that fit 8 blocks' shared memory, from compute "
                                "capability 9.0 on");
  if (a.tile.rows * ranks > (int64_t{1} << 31) - 1)
    throw std::invalid_argument("logits has too many rows for clusters");
  dispatch_logits(a, LaunchCluster{a, where, ranks});
}

}  // namespace fastpref::cuda
