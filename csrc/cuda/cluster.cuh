// residual by a cluster of thread blocks (compute capability 9.0 and newer) that holds a whole row in its shared
// memory, each block a slice: logits are read from global memory once, seen as often as needed, and `out` is written
// once, normalised:
//
//     out = gain * (softmax - onehot) * slope,    scale = -row_factor / gain,    gain = 2^15 for fp16, else 1
//
// It is for what the block sweep of rows.cuh would have to visit twice: fp16, whose range cannot hold unnormalised rows
// (p stays a normal number down to 2e-9). A row's m, the lane that adds up a column and the order within a unit are
// those of the block sweep, and sums beyond a unit are fp64: unless m moved, log-probs agree to the last bit or nearly
// always so.
#pragma once

#include "rows.cuh"

namespace fastpref::cuda {

constexpr int kMaxRanks = 8;   // what every GPU with clusters has
constexpr int kHalfGain = 15;  // 2^15 (1 - p) fits fp16

struct ClusterShared : Shared {
  // Pushed here by every block of the cluster, itself included.
  float first_top[kMaxRanks], top[kMaxRanks];
  WarpResult parts[kMaxRanks];
};

inline int64_t row_chunks(DType dtype, int64_t cols) {
  const int64_t columns = dtype == DType::f32 ? kChunk<float> * kUnit : kChunk<bf16> * kUnit;
  return cols < columns ? 1 : (cols / kUnit * kUnit + columns - 1) / columns;
}
constexpr int kChunkBytes = kChunk<float> * kUnit * sizeof(float);
static_assert(kChunkBytes == kChunk<bf16> * kUnit * sizeof(bf16), "a chunk takes the same memory in every dtype");

template <class T, bool kExtras, class Block>
FASTPREF_DEVICE void residual_row_by_cluster(Block& block, const Args& a, int64_t row) {
  const Writer<T, Any> out(a.out, row);
  const int cols = static_cast<int>(a.tile.cols), units = cols / kUnit;
  const int chunks = (units + kChunk<T> - 1) / kChunk<T>, chunks_each = (chunks + block.ranks - 1) / block.ranks;
  const int begin = block.rank * chunks_each * kChunk<T>;
  const int end = begin + chunks_each * kChunk<T> < units ? begin + chunks_each * kChunk<T> : units;
  const int edge = units * kUnit + block.thread;
  const bool has_edge = block.rank == 0 && block.thread < kUnit && edge < cols;

  const int64_t target = a.tile.targets[row];
  if (target == a.tile.ignore_index) {  // the whole cluster alike
    const float zeros[kPerLane] = {};
#pragma unroll 1
    for (int unit = begin + block.warp; unit < end; unit += kWarps) out.write(block, unit, zeros);
    if (has_edge) out.write_one(edge, 0.0f);
    if (block.rank == 0 && block.thread == 0) ignored_stats(a.stats, row);
    return;
  }

  // Every thread copies just what it will use itself, so that its own wait is all it needs.
  const Logits<T, Map::any> logits(a, row);
  uint4* held = block.slice + block.thread;
  for (int unit = begin + block.warp; unit < end; unit += kWarps) {
    if (logits.in.aligned) {
      for (int p = 0; p < kPieces<T>; ++p) block.copy_async(held + p * kThreads, logits.in.piece(unit, block.lane, p));
    } else {
      const Raw<T> raw = logits.in.read(block, unit);
      for (int p = 0; p < kPieces<T>; ++p) held[p * kThreads] = raw.pieces[p];
    }
    held += kPieces<T> * kThreads;
  }
  const int y = target_column(a.tile, target);
  float edge_slope = 1.0f, slope_y = 1.0f;
  const float edge_z = has_edge ? logits.one(edge, edge_slope) : -kInf;
  const float z_y = y >= 0 ? logits.one(y, slope_y) : quiet_nan();

  const auto for_each_unit = [&](const auto& use) {
    const uint4* from = block.slice + block.thread;
    for (int unit = begin + block.warp; unit < end; unit += kWarps) {
      Raw<T> raw;
      for (int p = 0; p < kPieces<T>; ++p) raw.pieces[p] = from[p * kThreads];
      from += kPieces<T> * kThreads;
      float z[kPerLane], slope[kPerLane];
      logits.z(block, raw, unit, z, slope);
      use(unit, z, slope);
    }
  };

  block.sync_cluster();  // every block runs now, and may be written to
  block.wait_copies();
  float first_top = edge_z, top = edge_z;
  for_each_unit([&](int unit, const float* z, const float*) {
    const float highest = max8(z);
    if (unit < kChunk<T>) first_top = fmaxf(first_top, highest);
    top = fmaxf(top, highest);
  });
  first_top = warp_max(block, first_top), top = warp_max(block, top);
  if (block.lane == 0) block.shared.tops[block.warp] = first_top, block.shared.results[block.warp].top = top;
  block.sync();
  if (block.thread < block.ranks) {
    for (int w = 0; w < kWarps; ++w) {
      first_top = fmaxf(w ? first_top : -kInf, block.shared.tops[w]);
      top = fmaxf(w ? top : -kInf, block.shared.results[w].top);
    }
    ClusterShared& there = block.remote(block.thread);
    there.first_top[block.rank] = first_top, there.top[block.rank] = top;
  }
  block.sync_cluster();  // all of the row was read, in every block: from here on `out` may be written
  top = -kInf;
  for (int rank = 0; rank < block.ranks; ++rank) top = fmaxf(top, block.shared.top[rank]);
  float m = finite(block.shared.first_top[0]);
  if (top > m + kLimit) m = finite(top);

  Sums<kExtras> sums;
  for_each_unit([&](int unit, const float* z, const float*) {
    float e[kPerLane];
    for (int i = 0; i < kPerLane; ++i) e[i] = exp_fast(z[i] - m);
    set_column<T>(y, unit, block.lane, e, 0.0f);
    sums.add(z, e, m);
    sums.template compare<T>(y, z_y, unit, block.lane, z);
  });
  if (has_edge) {
    sums.add_one(edge_z, edge == y ? 0.0f : exp_fast(edge_z - m), m);
    if constexpr (kExtras) sums.beaten |= edge < y ? edge_z >= z_y : edge > y && edge_z > z_y;
  }
  WarpResult mine{};
  mine.s = warp_sum(block, sums.s);
  if constexpr (kExtras) {
    mine.ez = warp_sum(block, sums.ez), mine.e2 = warp_sum(block, sums.e2), mine.sz = warp_sum(block, sums.sz);
    mine.beaten = block.any_in_warp(sums.beaten);
  }
  if (block.lane == 0) block.shared.results[block.warp] = mine;  // its readers before passed the cluster's barrier
  block.sync();
  if (block.thread < block.ranks) {
    WarpResult part{};
    for (int w = 0; w < kWarps; ++w) {
      const WarpResult& each = block.shared.results[w];
      part.s += each.s, part.ez += each.ez, part.e2 += each.e2, part.sz += each.sz;
      part.beaten |= each.beaten;
    }
    block.remote(block.thread).parts[block.rank] = part;
  }
  block.sync_cluster();  // the last access to another block's memory is over
  Sums<kExtras> all;
  for (int rank = 0; rank < block.ranks; ++rank) {
    const WarpResult& part = block.shared.parts[rank];
    all.s += part.s, all.ez += part.ez, all.e2 += part.e2, all.sz += part.sz, all.beaten |= part.beaten;
  }
  const float gain = out.half() ? power_of_two(kHalfGain) : 1.0f;
  if (block.rank == 0 && block.thread == 0) {
    write_stats(a, row, all, m, y >= 0, z_y);
    if (out.wanted()) put(a.stats.scale, row, -a.row_factor / gain);
  }
  if (!out.wanted()) return;

  const double e_y = y >= 0 ? exp(static_cast<double>(z_y) - m) : 0.0;
  const float norm = static_cast<float>(gain / (all.s + e_y)), at_y = static_cast<float>(-all.s);
  for_each_unit([&](int unit, const float* z, const float* slope) {
    float u[kPerLane];
    for (int i = 0; i < kPerLane; ++i) u[i] = exp_fast(z[i] - m);
    set_column<T>(y, unit, block.lane, u, at_y);
    for (int i = 0; i < kPerLane; ++i) u[i] = u[i] * slope[i] * norm;
    out.write(block, unit, u);
  });
  if (has_edge) out.write_one(edge, (edge == y ? at_y : exp_fast(edge_z - m)) * edge_slope * norm);
}

}  // namespace fastpref::cuda
