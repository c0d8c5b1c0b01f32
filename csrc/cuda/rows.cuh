// The row algorithms, one thread block a row: residual, fold, residual_given_lse and gradient_given_lse of
// fastpref/rows/contract.py.
//
// The sweep reads each logit once. Warps take units of 256 columns in turn and never wait for one another: m, the
// number that E = exp(z - m) is taken relative to, starts as the maximum of the row's first chunk (the sweep's one
// barrier before its end), and each warp keeps its own m from there. A warp that meets a z more than kLimit above its m
// moves it up and multiplies what it has written so far, its own columns and no other's, by exp(m_old - m_new). At the
// end the row's m is the largest of the warps', and a warp that stayed below brings its columns there. Moves are rare,
// the logits are never read twice, and as every byte of `out` belongs to one thread, `out` may be `logits`.
//
// The target's own column is left out of the sums: s_other = sum of E over the other columns, and -s_other is what
// belongs at the target: E[y] - s without its cancellation, right to fp32 precision even where the target's probability
// is 1 - 1e-9.
//
// fp16 cannot hold s_other (up to the vocabulary's size) beside the small E, so there `out` holds 2^shift E. shift
// starts at 10, and at the end is lowered as far as s_other asks; then a row is multiplied by a power of two once more,
// which rounds nothing but subnormals.
#pragma once

#include "vec.cuh"

namespace fastpref::cuda {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
template <class T>
constexpr int kAhead = 8 / sizeof(T);  // units that a warp reads before it uses the first: 64 bytes a thread in flight
template <class T>
constexpr int kChunk = kWarps * kAhead<T>;  // units: 4096 (fp32) or 8192 columns
static_assert(kThreads >= kUnit, "every column behind the last whole unit has its thread");

// Sums reach columns * e^30 = 6e18 for 512k columns, which fp32 and bf16 hold; 25 nats between a row's first chunk and
// its maximum were seen on logits of standard deviation 12.
constexpr float kLimit = 30.0f;
constexpr int kFirstShift = 10;  // fp16: E = 1 is stored as 2^10 ...
constexpr int kTopShift = 15;    // ... and nothing above 2^15, of 65504

enum class Map { linear, softcap, any };  // any: softcap or not, known at run time

// What a kernel is given. pre and post: z = (x + bias) * pre, or tanh((x + bias) * pre) * post with a softcap.
struct Args {
  Tile tile;
  Out out;
  Stats stats;
  FoldState state;
  Given given;
  float pre, post;
  float row_factor;
  bool narrow_in_place;  // out lies over its own, wider rows of logits
};

struct WarpResult {
  double s, ez, e2, sz;
  float m, top;
  int shift;
  bool beaten;
};

struct Shared {
  uint4 staging[kWarps][kUnit * sizeof(float) / sizeof(uint4)];
  WarpResult results[kWarps];
  float tops[kWarps];
};

FASTPREF_DEVICE float finite(float x) { return fminf(fmaxf(x, -kLargest), kLargest); }
FASTPREF_DEVICE float power_of_two(int n) { return bits_as<float>((n + 127) << 23); }  // -126 <= n <= 127

// Relative error 2^-22 and below for the |x| that count; exp(-inf) = 0, NaN stays. One multiplication and one
// instruction: without ftz subnormals are spared, at four more.
FASTPREF_DEVICE float exp_fast(float x) {
  x *= 1.4426950408889634f;
#ifdef __CUDA_ARCH__
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
#else
  return std::exp2(x);
#endif
}

FASTPREF_DEVICE float inverse(float x) {
#ifdef __CUDA_ARCH__
  asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
#else
  return 1.0f / x;
#endif
}

template <class Block, class X>
FASTPREF_DEVICE X warp_sum(Block& block, X x) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) x += block.shuffle_xor(x, lanes);
  return x;
}

// Of what is not NaN; -inf if nothing is.
template <class Block>
FASTPREF_DEVICE float warp_max(Block& block, float x) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) x = fmaxf(x, block.shuffle_xor(x, lanes));
  return x;
}

// Once a row: nothing keeps a second call from overwriting `tops` while a slow warp still reads it.
template <class Block>
FASTPREF_DEVICE float block_max(Block& block, float x) {
  x = warp_max(block, x);
  if (block.lane == 0) block.shared.tops[block.warp] = x;
  block.sync();
  return warp_max(block, block.shared.tops[block.lane % kWarps]);
}

// ---- logits -> z ----------------------------------------------------------------------------------------------------

template <class T, Map kMap>
struct Logits {
  const Args& a;
  Reader<T> in;
  bool bias_aligned;

  FASTPREF_DEVICE Logits(const Args& a, int64_t row)
      : a(a),
        in(static_cast<const T*>(a.tile.logits) + row * a.tile.row_stride),
        bias_aligned(reinterpret_cast<uintptr_t>(a.tile.bias) % 16 == 0) {}

  FASTPREF_DEVICE bool capped() const {
    return kMap == Map::softcap || (kMap == Map::any && a.tile.softcap != 0.0f);
  }

  // z, and the part of dz/dlogit that differs between columns, from u = (x + bias) * pre.
  FASTPREF_DEVICE float softcap(float u, float& slope) const {
    const float magnitude = fabsf(u);
    // 1 - 2 e / (1 + e) and 4 e / (1 + e)^2, e = exp(-2 |u|): nothing overflows, and the slope keeps its relative
    // precision where the cap saturates. Near 0 the first would cancel: a polynomial there (relative error 9e-8 up to
    // 0.55).
    const float e = exp_fast(-2.0f * magnitude), r = inverse(1.0f + e), u2 = u * u;
    const float far = copysignf(1.0f - 2.0f * e * r, u);
    const float p = ((0x1.0da8fap-6f * u2 - 0x1.af96a4p-5f) * u2 + 0x1.10d01ap-3f) * u2 - 0x1.55545ap-2f;
    slope = 4.0f * e * r * r;
    return (magnitude < 0.55f ? u + u * (u2 * p) : far) * a.post;
  }

  template <class Block>
  FASTPREF_DEVICE void z(Block& block, const Raw<T>& raw, int unit, float* z, float* slope) const {
    float x[kPerLane];
    unpack(raw, x);
    if (a.tile.bias) {
#pragma unroll
      for (int i = 0; i < kPerLane; i += 4) {
        const float* bias = a.tile.bias + unit * kUnit + lane_column<T>(block.lane, i);
        const float4 b =
            bias_aligned ? *reinterpret_cast<const float4*>(bias) : float4{bias[0], bias[1], bias[2], bias[3]};
        z[i] = (x[i] + b.x) * a.pre, z[i + 1] = (x[i + 1] + b.y) * a.pre;
        z[i + 2] = (x[i + 2] + b.z) * a.pre, z[i + 3] = (x[i + 3] + b.w) * a.pre;
      }
    } else {  // multiplied here and there: after the branch, each x would be copied before it
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) z[i] = x[i] * a.pre;
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) slope[i] = 1.0f;
    if (capped()) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) z[i] = softcap(z[i], slope[i]);
    }
  }

  FASTPREF_DEVICE float one(int column, float& slope) const {
    float x = to_float(in.row[column]);
    if (a.tile.bias) x += a.tile.bias[column];
    x *= a.pre;
    slope = 1.0f;
    return capped() ? softcap(x, slope) : x;
  }
};

// The target's column in this tile; -1: none, and then it equals no column below.
FASTPREF_DEVICE int target_column(const Tile& tile, int64_t target) {
  const int64_t column = target - tile.col_offset;
  return column >= 0 && column < tile.cols ? static_cast<int>(column) : -1;
}

// x[i] = value where a lane holds column y. A branch that one unit of a row takes.
template <class T>
FASTPREF_DEVICE void set_column(int y, int unit, int lane, float* x, float value) {
  const int within = y - unit * kUnit;
  if (static_cast<unsigned>(within) < kUnit) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] = lane_column<T>(lane, i) == within ? value : x[i];
  }
}

FASTPREF_DEVICE float sum8(const float* x) {
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

FASTPREF_DEVICE float max8(const float* x) {
  return fmaxf(fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])), fmaxf(fmaxf(x[4], x[5]), fmaxf(x[6], x[7])));
}

// ---- sums -----------------------------------------------------------------------------------------------------------

// Of one thread, later of a row: everything but sz without the target's column. fp32 within a unit, fp64
// beyond: the error of a sum over 512k columns is that of one over 8.
template <bool kExtras>
struct Sums {
  double s = 0;             // sum E
  double ez = 0;            // sum E (z - m)
  double e2 = 0;            // sum E^2
  double sz = 0;            // sum z
  bool beaten = false;      // some z is larger than the target's, or as large and before it

  FASTPREF_DEVICE void add(const float* z, const float* e, float m) {
    s += sum8(e);
    if constexpr (kExtras) {
      float ed[kPerLane], ee[kPerLane];
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        ed[i] = e[i] > 0.0f ? e[i] * (z[i] - m) : 0.0f;  // a probability of 0 adds 0, also where z is -inf
        ee[i] = e[i] * e[i];
      }
      ez += sum8(ed), e2 += sum8(ee), sz += sum8(z);
    }
  }

  // y's own column is left out: its z may have been rounded otherwise than z_y.
  template <class T>
  FASTPREF_DEVICE void compare(int y, float z_y, int unit, int lane, const float* z) {
    if constexpr (kExtras) {
      const int within = y - unit * kUnit;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int column = lane_column<T>(lane, i);
        beaten |= column < within ? z[i] >= z_y : column > within && z[i] > z_y;
      }
    }
  }

  FASTPREF_DEVICE void add_one(float z, float e, float m) {
    s += e;
    if constexpr (kExtras) {
      ez += e > 0.0f ? e * (z - m) : 0.0f, e2 += e * e, sz += z;
    }
  }

  // From E = exp(z - m) to exp(z - m + shift), shift <= 0 and possibly -inf.
  FASTPREF_DEVICE void move(float shift, float factor) {
    if constexpr (kExtras) {
      ez = factor * (ez + fmaxf(shift, -kLargest) * s);  // 0 * -inf where nothing was added up yet
      e2 *= static_cast<double>(factor) * factor;
    }
    s *= factor;
  }
};

template <bool kExtras>
struct Row {
  Sums<kExtras> sums;
  float m;
  int shift;  // out holds 2^shift E
};

// Writes E and adds it up, y (-1: none) left out of both: 0 is written there. The sums are right in thread 0.
// z_y is read only where there are extras.
template <class T, class U, Map kMap, bool kExtras, class Block>
FASTPREF_DEVICE Row<kExtras> sweep(Block& block, const Args& a, const Logits<T, kMap>& logits, int y, float z_y,
                                   const Writer<T, U>& out) {
  constexpr bool kMayBeHalf = std::is_same_v<U, f16> || std::is_same_v<U, Any>;
  const bool half = kMayBeHalf && out.half();
  const int cols = static_cast<int>(a.tile.cols), units = cols / kUnit;
  // The columns behind the last whole unit, one a thread. They count for the first m, and are written last.
  const int edge = units * kUnit + block.thread;
  const bool has_edge = block.thread < kUnit && edge < cols;
  float edge_slope = 1.0f;
  const float edge_z = has_edge ? logits.one(edge, edge_slope) : -kInf;

  Sums<kExtras> sums;
  float m = 0.0f, first_m = 0.0f, ceiling = 0.0f;
  int shift = half ? kFirstShift : 0;
  const auto ceiling_of = [&] {
    return m + (kMayBeHalf && half ? fminf(kLimit, 0.693f * static_cast<float>(kTopShift - shift)) : kLimit);
  };

  for (int first = 0; first == 0 || first < units; first += kChunk<T>) {
    Raw<T> raw[kAhead<T>];
    const auto unit = [&](int k) { return first + k * kWarps + block.warp; };
#pragma unroll
    for (int k = 0; k < kAhead<T>; ++k)
      if (unit(k) < units) raw[k] = logits.in.read(block, unit(k));
    if (first == 0) {
      float top = edge_z;
#pragma unroll
      for (int k = 0; k < kAhead<T>; ++k) {
        if (unit(k) >= units) continue;
        float z[kPerLane], slope[kPerLane];  // made again below: kept, they would take registers in every chunk
        logits.z(block, raw[k], unit(k), z, slope);
        top = fmaxf(top, max8(z));
      }
      first_m = m = finite(block_max(block, top));
      ceiling = ceiling_of();
    } else if (a.narrow_in_place) {
      block.sync();  // stores of this chunk, in a narrower row over the same memory, hit logits of no later one
    }

#pragma unroll
    for (int k = 0; k < kAhead<T>; ++k) {
      if (unit(k) >= units) continue;
      float z[kPerLane], slope[kPerLane];
      logits.z(block, raw[k], unit(k), z, slope);
      const float top = max8(z);
      if (block.any_in_warp(top > ceiling)) {
        const float highest = finite(warp_max(block, top));
        float factor = 1.0f;
        if (highest > m + kLimit) {
          factor = exp_fast(m - highest);
          sums.move(m - highest, factor);
          m = highest;
        }
        if (half) {
          const int to = m == highest ? kFirstShift : kFirstShift - static_cast<int>(ceilf((highest - m) * 1.4427f));
          factor *= power_of_two(to - shift);
          shift = to;
        }
        ceiling = ceiling_of();
#pragma unroll 1
        for (int before = block.warp; before < unit(k); before += kWarps) out.scale(block, before, factor);
      }

      float e[kPerLane];
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) e[i] = exp_fast(z[i] - m);
      set_column<T>(y, unit(k), block.lane, e, 0.0f);
      sums.add(z, e, m);
      sums.template compare<T>(y, z_y, unit(k), block.lane, z);
      if constexpr (!std::is_same_v<U, None>) {
        const float gain = kMayBeHalf ? power_of_two(shift) : 1.0f;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
          if (kMap != Map::linear) e[i] *= slope[i];
          if (kMayBeHalf) e[i] *= gain;
        }
        out.write(block, unit(k), e);
      }
    }
  }

  if (has_edge) {
    const float e = edge == y ? 0.0f : exp_fast(edge_z - m);
    sums.add_one(edge_z, e, m);
    if constexpr (kExtras) sums.beaten |= edge < y ? edge_z >= z_y : edge > y && edge_z > z_y;
    out.write_one(edge, e * edge_slope * power_of_two(shift));
  }

  WarpResult mine{};
  mine.s = warp_sum(block, sums.s), mine.m = m, mine.shift = shift;
  if constexpr (kExtras) {
    mine.ez = warp_sum(block, sums.ez), mine.e2 = warp_sum(block, sums.e2), mine.sz = warp_sum(block, sums.sz);
    mine.beaten = block.any_in_warp(sums.beaten);
  }
  WarpResult* const results = block.shared.results;
  if (block.lane == 0) results[block.warp] = mine;
  const bool moved = block.sync_or(m != first_m);

  Row<kExtras> row{{}, first_m, 0};
  if (moved)
#pragma unroll 1
    for (int w = 0; w < kWarps; ++w) row.m = fmaxf(row.m, results[w].m);
  if (block.thread == 0 || half) {
    for (int w = 0; w < kWarps; ++w) {
      Sums<kExtras> part;
      part.s = results[w].s, part.ez = results[w].ez, part.e2 = results[w].e2;
      const float shift_m = results[w].m - row.m;
      part.move(shift_m, exp_fast(shift_m));
      row.sums.s += part.s, row.sums.ez += part.ez, row.sums.e2 += part.e2;
      row.sums.sz += results[w].sz, row.sums.beaten |= results[w].beaten;
    }
  }
  if (half) {  // the largest power of two, up to 2^10, that keeps s_other within 2^15
    const int exponent = static_cast<int>(bits_as<uint32_t>(static_cast<float>(row.sums.s)) >> 23);  // NaN, inf: 255
    const int allowed = kTopShift - 1 - (exponent - 127);
    row.shift = exponent < 255 && allowed < kFirstShift ? allowed : kFirstShift;
  }
  if (row.m != m || row.shift != shift) {
    const float factor = exp_fast(m - row.m) * power_of_two(row.shift - shift);
#pragma unroll 1
    for (int unit = block.warp; unit < units; unit += kWarps) out.scale(block, unit, factor);
    if (has_edge) out.scale_one(edge, factor);
  }
  if (moved || half) block.sync();  // thread 0 goes on to write the target's entry, among columns just rescaled
  return row;
}

// ---- the contract's four functions ----------------------------------------------------------------------------------

FASTPREF_DEVICE void put(float* where, int64_t row, double value) {
  if (where) where[row] = static_cast<float>(value);
}

template <class T, class U, class Block>
FASTPREF_DEVICE void write_zeros(Block& block, const Args& a, const Writer<T, U>& out) {
  const int cols = static_cast<int>(a.tile.cols), units = cols / kUnit;
  const float zeros[kPerLane] = {};
#pragma unroll 1
  for (int unit = block.warp; unit < units; unit += kWarps) out.write(block, unit, zeros);
  const int edge = units * kUnit + block.thread;
  if (block.thread < kUnit && edge < cols) out.write_one(edge, 0.0f);
}

FASTPREF_DEVICE void ignored_stats(const Stats& stats, int64_t row) {
  put(stats.logp, row, 0), put(stats.lse, row, 0), put(stats.scale, row, 0), put(stats.entropy, row, 0);
  put(stats.top1, row, 0), put(stats.mean_logit, row, 0), put(stats.log_sum_p2, row, 0);
}

// The row's numbers from its sums, in fp64: one thread. Without a valid target z_y is NaN. Returns the sum of all E.
template <bool kExtras>
FASTPREF_DEVICE double write_stats(const Args& a, int64_t row, const Sums<kExtras>& sums, float m, bool valid,
                                   float z_y) {
  const double d_y = static_cast<double>(z_y) - m, e_y = valid ? exp(d_y) : 0.0;
  const double total = sums.s + e_y;
  const double log_total = total < kInf ? log(total) : quiet_nan();  // NaN, or inf from a logit of +inf
  put(a.stats.lse, row, m + log_total);
  put(a.stats.logp, row, d_y - log_total);
  if constexpr (kExtras) {
    put(a.stats.entropy, row, log_total - (sums.ez + (e_y > 0 ? e_y * d_y : 0.0)) / total);
    put(a.stats.top1, row, valid && !sums.beaten && total < kInf ? 1.0 : 0.0);
    put(a.stats.mean_logit, row, sums.sz / static_cast<double>(a.tile.cols));
    put(a.stats.log_sum_p2, row, log(sums.e2 + e_y * e_y) - 2.0 * log_total);
  }
  return total;
}

template <class T, class U, Map kMap, bool kExtras, class Block>
FASTPREF_DEVICE void residual_row(Block& block, const Args& a, int64_t row) {
  const Writer<T, U> out(a.out, row);
  const int64_t target = a.tile.targets[row];
  if (target == a.tile.ignore_index) {
    write_zeros(block, a, out);
    if (block.thread == 0) ignored_stats(a.stats, row);
    return;
  }
  const Logits<T, kMap> logits(a, row);
  const int y = target_column(a.tile, target);
  float z_y = quiet_nan(), slope_y = 1.0f;
  // Before a barrier, and so before any store.
  if ((kExtras || block.thread == 0) && y >= 0) z_y = logits.one(y, slope_y);

  const Row<kExtras> swept = sweep<T, U, kMap, kExtras>(block, a, logits, y, z_y, out);
  if (block.thread == 0) {
    const double total = write_stats(a, row, swept.sums, swept.m, y >= 0, z_y);
    if (out.wanted()) {
      const float gain = power_of_two(swept.shift);
      put(a.stats.scale, row, -a.row_factor / (total * gain));
      if (y >= 0) out.write_one(y, static_cast<float>(-swept.sums.s) * slope_y * gain);
    }
  }
}

template <class T, class Block>
FASTPREF_DEVICE void fold_row(Block& block, const Args& a, int64_t row) {
  const int64_t target = a.tile.targets[row];
  if (target == a.tile.ignore_index) return;
  const Logits<T, Map::any> logits(a, row);
  const int y = target_column(a.tile, target);
  const Row<false> slice = sweep<T, None, Map::any, false>(block, a, logits, -1, 0.0f, Writer<T, None>(a.out, row));
  if (block.thread == 0) {
    float slope;
    if (y >= 0) a.state.target[row] = logits.one(y, slope);
    const double s = slice.sums.s, s_before = a.state.sum_exp[row];
    if (!(s < kInf)) {
      a.state.sum_exp[row] = quiet_nan();
    } else if (s > 0) {
      const float before = a.state.maximum[row];
      const float m = s_before == 0 || slice.m > before ? slice.m : before;
      const double kept = s_before == 0 ? 0.0 : s_before * exp(static_cast<double>(before) - m);
      a.state.maximum[row] = m;
      a.state.sum_exp[row] = static_cast<float>(kept + s * exp(static_cast<double>(slice.m) - m));
    }
  }
}

// kEntropy: gradient_given_lse, else residual_given_lse.
template <class T, class U, bool kEntropy, class Block>
FASTPREF_DEVICE void given_lse_row(Block& block, const Args& a, int64_t row) {
  const Writer<T, U> out(a.out, row);
  const int64_t target = a.tile.targets[row];
  if (target == a.tile.ignore_index) {
    write_zeros(block, a, out);
    return;
  }
  const Logits<T, Map::any> logits(a, row);
  const int y = target_column(a.tile, target);
  const float lse = a.given.lse[row];
  const float gl = kEntropy ? a.given.grad_logps[row] : 1.0f, gh = kEntropy ? a.given.grad_entropy[row] : 0.0f;
  const float constant = kEntropy ? gl + gh * a.given.entropy[row] : 1.0f;
  // Without what the target's column adds, gl.
  const auto gradient = [&](float z) {
    const float log_p = z - lse, p = exp_fast(log_p);
    if constexpr (kEntropy) return p != 0.0f ? -p * (gh * log_p + constant) : 0.0f;  // log p may be -inf
    else return -p;
  };
  const int cols = static_cast<int>(a.tile.cols), units = cols / kUnit;
  const int edge = units * kUnit + block.thread;
  const bool has_edge = block.thread < kUnit && edge < cols;
  float edge_slope = 1.0f;
  const float edge_z = has_edge ? logits.one(edge, edge_slope) : 0.0f;

  for (int first = 0; first < units; first += kChunk<T>) {
    Raw<T> raw[kAhead<T>];
    const auto unit = [&](int k) { return first + k * kWarps + block.warp; };
#pragma unroll
    for (int k = 0; k < kAhead<T>; ++k)
      if (unit(k) < units) raw[k] = logits.in.read(block, unit(k));
    if (a.narrow_in_place) block.sync();
#pragma unroll
    for (int k = 0; k < kAhead<T>; ++k) {
      if (unit(k) >= units) continue;
      float u[kPerLane], slope[kPerLane];
      logits.z(block, raw[k], unit(k), u, slope);
      const int within = y - unit(k) * kUnit;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) u[i] = gradient(u[i]);
      if (static_cast<unsigned>(within) < kUnit) {  // one unit of a row
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) u[i] += lane_column<T>(block.lane, i) == within ? gl : 0.0f;
      }
      if (logits.capped()) {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) u[i] *= slope[i];
      }
      out.write(block, unit(k), u);
    }
  }
  if (a.narrow_in_place) block.sync();
  if (has_edge) out.write_one(edge, (gradient(edge_z) + (edge == y ? gl : 0.0f)) * edge_slope);
}

// ---- which instance a call takes ------------------------------------------------------------------------------------

// Calls kernel.operator()<T, U, kMap, kExtras>(). What the engine asks for has its own instance, in which what is off
// costs nothing; extras, and an `out` of another dtype than 16-bit logits, share one a dtype.
template <class T, class U, class Kernel>
void dispatch_map(const Args& a, const Kernel& kernel) {
  if (a.tile.softcap != 0.0f) kernel.template operator()<T, U, Map::softcap, false>();
  else kernel.template operator()<T, U, Map::linear, false>();
}

template <class T, class Kernel>
void dispatch_out(const Args& a, const Kernel& kernel) {
  const bool extras = a.stats.entropy || a.stats.top1 || a.stats.mean_logit || a.stats.log_sum_p2;
  if (extras) return kernel.template operator()<T, Any, Map::any, true>();
  if (!a.out.data) return dispatch_map<T, None>(a, kernel);
  if (a.out.dtype == a.tile.dtype) return dispatch_map<T, T>(a, kernel);
  if constexpr (std::is_same_v<T, float>) {
    if (a.out.dtype == DType::bf16) dispatch_map<T, bf16>(a, kernel);
    else dispatch_map<T, f16>(a, kernel);
  } else {
    kernel.template operator()<T, Any, Map::any, true>();
  }
}

template <class Kernel>
void dispatch_residual(const Args& a, const Kernel& kernel) {
  switch (a.tile.dtype) {
    case DType::f32: return dispatch_out<float>(a, kernel);
    case DType::bf16: return dispatch_out<bf16>(a, kernel);
    case DType::f16: return dispatch_out<f16>(a, kernel);
  }
}

// Calls kernel.operator()<T>().
template <class Kernel>
void dispatch_logits(const Args& a, const Kernel& kernel) {
  switch (a.tile.dtype) {
    case DType::f32: return kernel.template operator()<float>();
    case DType::bf16: return kernel.template operator()<bf16>();
    case DType::f16: return kernel.template operator()<f16>();
  }
}

inline Args make_args(const Tile& tile, const Out& out, const Stats& stats, const FoldState& state,
                      const Given& given) {
  const bool capped = tile.softcap != 0.0f;
  Args a{tile, out, stats, state, given, 1.0f, 1.0f, tile.logit_scale / tile.temperature, false};
  a.pre = tile.logit_scale / (capped ? tile.softcap : tile.temperature);
  a.post = capped ? tile.softcap / tile.temperature : 1.0f;
  a.narrow_in_place = out.data == tile.logits && out.dtype != tile.dtype;
  return a;
}

}  // namespace fastpref::cuda
