// The row kernels on the CPU: one sweep over each row, whatever it holds. CMake compiles this file once per
// instruction set with -DFASTPREF_KERNELS=kernels_<name>, -DFASTPREF_NAME="<name>"; cpu.cpp picks one at run time.
//
// A row is walked in blocks that stay in the L1 cache. Pass 1 over a block turns logits into z and finds its maximum;
// pass 2 writes E = exp(z - m) (times the softcap's slope) and adds up s = sum E. m is the maximum of the row's FIRST
// block and stays so while later blocks exceed it by less than a limit that keeps E in range. A block that exceeds it
// moves m up to its own maximum, and what this row has written so far is multiplied by exp(m_old - m_new): the logits
// are never needed twice, so `out` may be `logits` itself. At the end E - s is stored at the target, and -row_factor
// / s goes to the scale.
#include "isa.h"
#include "tail.h"
#include "vec.h"

namespace {

using namespace fastpref;

// 2048 columns: 8 KiB of z, and 8 of slopes, beside the block of logits in 32 KiB of L1.
constexpr int64_t kBlock = 2048;
constexpr float kLargest = 3.4028234664e38f;
constexpr float kInf = __builtin_inff();
constexpr float kNaN = __builtin_nanf("");

struct None {};  // the dtype of an `out` that is not wanted
template <class T>
constexpr bool kWanted = true;
template <>
constexpr bool kWanted<None> = false;

// How far z may lie above m before m moves. Sums reach cols * e^limit, which fp32 and bf16 hold for any vocabulary;
// in fp16 a limit of 8 keeps E below 65504, and the sum must fit too, because E - s is stored at the target: m moves
// up where it grows past kLargestSum, so far that the sum becomes kSmallSum.
template <class T>
constexpr float kLimit = 30.0f;
template <>
constexpr float kLimit<f16> = 8.0f;
template <class T>
constexpr double kLargestSum = kLargest;
template <>
constexpr double kLargestSum<f16> = 32768.0;
constexpr double kSmallSum = 128.0;

struct Block {
  alignas(64) float z[kBlock];
  alignas(64) float slope[kBlock];  // of the softcap; untouched without one
};

enum class Map { plain, affine, softcap };

// ---- pass 1: logits -> z ------------------------------------------------------------------------------------------

template <class T, Map kMap, bool kBias>
struct Load {
  const T* logits;
  const float* bias;
  float scale, cap;  // affine: logit_scale / temperature; softcap: logit_scale / softcap and softcap / temperature

  FASTPREF_INLINE vf z(vf x, vf b, float* slope) const {
    if constexpr (kBias) x += b;
    if constexpr (kMap == Map::affine) return x * scale;
    if constexpr (kMap == Map::softcap) {
      const Tanh t = tanh_vec(x * scale);
      store(slope, t.slope);
      return t.value * cap;
    }
    return x;
  }

  FASTPREF_INLINE vf whole(int64_t i, Block& block) const {
    const vf v = z(load(logits + i), kBias ? load(bias + i) : vf{}, block.slope + i);
    store(block.z + i, v);
    return v;
  }

  // Fills block.z up to a whole vector (with -inf, whose exp is 0) and returns the maximum of what is not NaN.
  float run(int64_t n, Block& block) const {
    vf top[4];
    for (vf& t : top) t = splat(-kInf);
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes)
      for (int j = 0; j < 4; ++j) top[j] = max_or_second(whole(i + j * kLanes, block), top[j]);
    for (; i + kLanes <= n; i += kLanes) top[0] = max_or_second(whole(i, block), top[0]);
    if (i < n) {
      const vf x = load_first(logits + i, n - i);
      const vf v = keep_first(z(x, kBias ? load_first(bias + i, n - i) : vf{}, block.slope + i), n - i, -kInf);
      store(block.z + i, v);
      top[0] = max_or_second(v, top[0]);
    }
    for (int j = 1; j < 4; ++j) top[0] = max_or_second(top[j], top[0]);
    return max_lanes(top[0]);
  }
};

typedef float (*LoadBlock)(const Tile&, int64_t row, int64_t column, int64_t n, Block&);

template <class T, Map kMap, bool kBias>
float load_block(const Tile& tile, int64_t row, int64_t column, int64_t n, Block& block) {
  const T* logits = static_cast<const T*>(tile.logits) + row * tile.row_stride + column;
  const float* bias = kBias ? tile.bias + column : nullptr;
  const bool capped = kMap == Map::softcap;
  const float scale = tile.logit_scale / (capped ? tile.softcap : tile.temperature);
  return Load<T, kMap, kBias>{logits, bias, scale, capped ? tile.softcap / tile.temperature : 0.0f}.run(n, block);
}

template <class T>
LoadBlock choose_load(const Tile& tile) {
  const bool bias = tile.bias != nullptr;
  if (tile.softcap != 0) return bias ? load_block<T, Map::softcap, true> : load_block<T, Map::softcap, false>;
  if (bias) return load_block<T, Map::affine, true>;
  if (tile.logit_scale != 1 || tile.temperature != 1) return load_block<T, Map::affine, false>;
  return load_block<T, Map::plain, false>;
}

LoadBlock choose_load(const Tile& tile) {
  switch (tile.dtype) {
    case DType::bf16: return choose_load<bf16>(tile);
    case DType::f16: return choose_load<f16>(tile);
    default: return choose_load<float>(tile);
  }
}

// ---- pass 2: z -> E and its sums ----------------------------------------------------------------------------------

struct Sums {
  float m = 0;           // E = exp(z - m)
  double e = 0;          // sum E
  float top = -kInf;     // max z
  float target = kNaN;   // z and the softcap's slope at the target
  float target_slope = 1;
  double ez = 0;         // extras: sum E (z - m)
  double e2 = 0;         // sum E^2
  double z = 0;          // sum z
  bool first = false;    // the target's z is above every z before it
};

struct Lanes {
  vf e[4] = {}, ez = {}, e2 = {};
};

// N vectors of the block from column i on, n of whose columns are left: fewer than a vector only if N is 1.
template <int N, class T, bool kSlope, bool kExtras>
FASTPREF_INLINE void exp_vectors(const Block& block, int64_t i, int64_t n, vf m, T* out, Lanes& lanes) {
  vf d[N], x[N];
  for (int j = 0; j < N; ++j) x[j] = d[j] = load(block.z + i + j * kLanes) - m;
  exp_all(x);
  for (int j = 0; j < N; ++j) {
    lanes.e[j] += x[j];
    if constexpr (kExtras) {
      lanes.ez += x[j] > 0.0f ? x[j] * d[j] : vf{};  // a probability of 0 contributes 0, also where d is -inf
      lanes.e2 += x[j] * x[j];
    }
    if constexpr (kSlope) x[j] *= load(block.slope + i + j * kLanes);
    if constexpr (kWanted<T>) {
      if (N > 1 || n >= kLanes) store(out + i + j * kLanes, x[j]);
      else store_first(out + i, x[j], n);
    }
  }
}

// Lanes are added up in fp32 within a block (at most kBlock / kLanes terms each) and blocks in double, so that the
// error of a sum over 512k columns is that of one block.
template <class T, bool kSlope, bool kExtras>
FASTPREF_INLINE void exp_block(const Block& block, int64_t n, T* out, Sums& sums) {
  const vf m = splat(sums.m);
  Lanes lanes;
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) exp_vectors<4, T, kSlope, kExtras>(block, i, n - i, m, out, lanes);
  for (; i < n; i += kLanes) exp_vectors<1, T, kSlope, kExtras>(block, i, n - i, m, out, lanes);
  for (const vf& e : lanes.e) sums.e += sum_lanes(e);
  if constexpr (kExtras) {
    sums.ez += sum_lanes(lanes.ez);
    sums.e2 += sum_lanes(lanes.e2);
    vf z = {};
    for (i = 0; i + kLanes <= n; i += kLanes) z += load(block.z + i);
    sums.z += sum_lanes(z);
    for (; i < n; ++i) sums.z += block.z[i];
  }
}

// Moves m, and what was summed and written with the old one. Rare, and then 4 ns per 64 columns.
template <class T>
__attribute__((noinline)) void move_m(float m, T* out, int64_t written, Sums& sums) {
  const double shift = double(sums.m) - double(m);
  const double factor = __builtin_exp(shift);
  if (factor > 0) {
    sums.ez = factor * (sums.ez + shift * sums.e);
    sums.e2 *= factor * factor;
    sums.e *= factor;
  } else if (sums.e == sums.e) {  // a NaN stays
    sums.ez = sums.e2 = sums.e = 0;
  }
  sums.m = m;
  if constexpr (kWanted<T>) {
    const vf f = splat(float(factor));
    int64_t i = 0;
    for (; i + kLanes <= written; i += kLanes) store(out + i, load(out + i) * f);
    if (i < written) store_first(out + i, load_first(out + i, written - i) * f, written - i);
  }
}

FASTPREF_INLINE float finite(float x) { return x > kLargest ? kLargest : x < -kLargest ? -kLargest : x; }

template <class T, bool kSlope, bool kExtras>
Sums sweep(const Tile& tile, LoadBlock load_z, int64_t row, T* out, Block& block) {
  Sums sums;
  const int64_t target = tile.targets[row] - tile.col_offset;
  for (int64_t c = 0; c < tile.cols; c += kBlock) {
    const int64_t n = tile.cols - c < kBlock ? tile.cols - c : kBlock;
    const float top = load_z(tile, row, c, n, block), top_before = sums.top;
    if (top > sums.top) sums.top = top;
    if (c == 0) sums.m = finite(top);
    else if (top > sums.m + kLimit<T>) move_m(finite(top), out, c, sums);
    if (target >= c && target < c + n) {
      sums.target = block.z[target - c];
      if constexpr (kSlope) sums.target_slope = block.slope[target - c];
      if constexpr (kExtras) {
        int32_t before = sums.target <= top_before && c > 0;
        for (int64_t i = 0; i < target - c; ++i) before |= block.z[i] >= sums.target;
        sums.first = !before;
      }
    }
    exp_block<T, kSlope, kExtras>(block, n, out + c, sums);
    if constexpr (kLargestSum<T> < kLargest) {
      if (sums.e > kLargestSum<T> && sums.e < kLargest)
        move_m(float(sums.m + __builtin_log(sums.e / kSmallSum)), out, c + n, sums);
    }
  }
  return sums;
}

// ---- the contract's four functions --------------------------------------------------------------------------------

template <class T>
void store_one(T* p, float x) {
  store_first(p, splat(x), 1);
}

template <class T, bool kSlope, bool kExtras>
void residual_rows(const Tile& tile, const Out& out, const Stats& stats, int64_t begin, int64_t end) {
  const LoadBlock load_z = choose_load(tile);
  const double row_factor = double(tile.logit_scale) / tile.temperature;
  Block block;
  for (int64_t row = begin; row < end; ++row) {
    T* u = kWanted<T> ? static_cast<T*>(out.data) + row * out.row_stride : nullptr;
    const auto put = [&](float* where, double value) {
      if (where) where[row] = float(value);
    };
    const int64_t target = tile.targets[row];
    if (target == tile.ignore_index) {
      float* const all[] = {stats.logp, stats.lse,        stats.scale,     stats.entropy,
                            stats.top1, stats.mean_logit, stats.log_sum_p2};
      for (float* where : all) put(where, 0);
      if constexpr (kWanted<T>) __builtin_memset(u, 0, tile.cols * sizeof(T));
      continue;
    }
    const Sums sums = sweep<T, kSlope, kExtras>(tile, load_z, row, u, block);
    // The sum is NaN where a logit is, and inf where one is +inf.
    const double log_e = sums.e < double(kInf) ? __builtin_log(sums.e) : double(kNaN);
    put(stats.logp, double(sums.target) - sums.m - log_e);
    put(stats.lse, sums.m + log_e);
    if constexpr (kWanted<T>) {
      put(stats.scale, -row_factor / sums.e);
      if (target >= 0 && target < tile.cols) {
        const float e = exp_vec(splat(sums.target - sums.m))[0];
        store_one(u + target, float((e - sums.e) * sums.target_slope));
      }
    }
    if constexpr (kExtras) {
      put(stats.entropy, log_e - sums.ez / sums.e);
      put(stats.top1, sums.first && sums.target >= sums.top && sums.e < double(kInf));
      put(stats.mean_logit, sums.z / double(tile.cols));
      put(stats.log_sum_p2, __builtin_log(sums.e2) - 2 * log_e);
    }
  }
}

template <class T>
void residual_out(const Tile& tile, const Out& out, const Stats& stats, int64_t begin, int64_t end) {
  const bool extras = stats.entropy || stats.top1 || stats.mean_logit || stats.log_sum_p2;
  if (kWanted<T> && tile.softcap != 0) {
    if (extras) residual_rows<T, true, true>(tile, out, stats, begin, end);
    else residual_rows<T, true, false>(tile, out, stats, begin, end);
  } else {
    if (extras) residual_rows<T, false, true>(tile, out, stats, begin, end);
    else residual_rows<T, false, false>(tile, out, stats, begin, end);
  }
}

void residual(const Tile& tile, const Out& out, const Stats& stats, int64_t begin, int64_t end) {
  if (!out.data) return residual_out<None>(tile, out, stats, begin, end);
  switch (out.dtype) {
    case DType::bf16: return residual_out<bf16>(tile, out, stats, begin, end);
    case DType::f16: return residual_out<f16>(tile, out, stats, begin, end);
    default: return residual_out<float>(tile, out, stats, begin, end);
  }
}

void fold(const Tile& tile, const FoldState& state, int64_t begin, int64_t end) {
  const LoadBlock load_z = choose_load(tile);
  Block block;
  for (int64_t row = begin; row < end; ++row) {
    if (tile.targets[row] == tile.ignore_index) continue;
    const Sums slice = sweep<None, false, false>(tile, load_z, row, nullptr, block);
    const int64_t column = tile.targets[row] - tile.col_offset;
    if (column >= 0 && column < tile.cols) state.target[row] = slice.target;
    if (!(slice.e < double(kInf))) {
      state.sum_exp[row] = kNaN;
      continue;
    }
    const float before_m = state.maximum[row];
    const double before = state.sum_exp[row];
    const float m = before == 0 || slice.m > before_m ? slice.m : before_m;
    if (slice.e == 0) continue;
    const double kept = before == 0 ? 0 : before * __builtin_exp(double(before_m) - m);
    state.maximum[row] = m;
    state.sum_exp[row] = float(kept + slice.e * __builtin_exp(double(slice.m) - m));
  }
}

template <class T, bool kSlope, bool kEntropy>
void given_lse_rows(const Tile& tile, const Given& given, const Out& out, int64_t begin, int64_t end) {
  const LoadBlock load_z = choose_load(tile);
  Block block;
  for (int64_t row = begin; row < end; ++row) {
    T* u = static_cast<T*>(out.data) + row * out.row_stride;
    if (tile.targets[row] == tile.ignore_index) {
      __builtin_memset(u, 0, tile.cols * sizeof(T));
      continue;
    }
    const int64_t target = tile.targets[row] - tile.col_offset;
    const vf lse = splat(given.lse[row]);
    float gl = 1.0f;
    vf gh = {}, constant = {};
    if constexpr (kEntropy) {
      gl = given.grad_logps[row];
      gh = splat(given.grad_entropy[row]);
      constant = splat(gl + given.grad_entropy[row] * given.entropy[row]);
    }
    for (int64_t c = 0; c < tile.cols; c += kBlock) {
      const int64_t n = tile.cols - c < kBlock ? tile.cols - c : kBlock;
      load_z(tile, row, c, n, block);
      // Without the 1 or g_l at the target.
      const auto flat = [&](vf z) -> vf {
        const vf log_p = z - lse, p = exp_vec(log_p);
        if constexpr (kEntropy) return p != 0.0f ? -p * (gh * log_p + constant) : vf{};  // log p may be -inf
        else return -p;
      };
      const auto one = [&](int64_t i) -> vf {
        const vf g = flat(load(block.z + i));
        if constexpr (kSlope) return g * load(block.slope + i);
        else return g;
      };
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) store(u + c + i, one(i));
      if (i < n) store_first(u + c + i, one(i), n - i);
      if (target >= c && target < c + n) {
        const float g = flat(splat(block.z[target - c]))[0];
        store_one(u + target, (gl + g) * (kSlope ? block.slope[target - c] : 1.0f));
      }
    }
  }
}

template <class T, bool kEntropy>
void given_lse_out(const Tile& tile, const Given& given, const Out& out, int64_t begin, int64_t end) {
  if (tile.softcap != 0) given_lse_rows<T, true, kEntropy>(tile, given, out, begin, end);
  else given_lse_rows<T, false, kEntropy>(tile, given, out, begin, end);
}

template <bool kEntropy>
void given_lse(const Tile& tile, const Given& given, const Out& out, int64_t begin, int64_t end) {
  switch (out.dtype) {
    case DType::bf16: return given_lse_out<bf16, kEntropy>(tile, given, out, begin, end);
    case DType::f16: return given_lse_out<f16, kEntropy>(tile, given, out, begin, end);
    default: return given_lse_out<float, kEntropy>(tile, given, out, begin, end);
  }
}

// ---- test hooks ---------------------------------------------------------------------------------------------------

void exp_in_place(float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t left = n - i < kLanes ? n - i : kLanes;
    store_first(x + i, exp_vec(load_first(x + i, left)), left);
  }
}

void tanh_in_place(float* x, float* slope, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t left = n - i < kLanes ? n - i : kLanes;
    const Tanh t = tanh_vec(load_first(x + i, left));
    store_first(x + i, t.value, left);
    store_first(slope + i, t.slope, left);
  }
}

}  // namespace

namespace fastpref::cpu {

extern const Kernels FASTPREF_KERNELS = {
    FASTPREF_NAME, residual, fold, given_lse<false>, given_lse<true>, peaks, split, add_rows, exp_in_place, tanh_in_place,
};

}  // namespace fastpref::cpu
