// How a warp holds 256 columns of a row, and how they get in and out of memory in 16-byte pieces.
//
// A UNIT is 256 consecutive columns starting at a multiple of 256; every lane holds 8 of them. Which 8 depends on the
// element size of the logits alone: neither on alignment nor on `out`. So a row's sums are added in the same order, and
// its log-prob comes out the same to the last bit, whatever is written and wherever the row lies.
//
//   fp32 logits  two 16-byte pieces a lane: columns 4 lane .. 4 lane + 3, and the same 128 further on
//   16 bits      one piece: columns 8 lane .. 8 lane + 7
//
// Rows that do not start on 16 bytes go through the warp's staging buffer in shared memory, with one element a lane and
// access: coalesced all the same.
//
// Code here and in rows.cuh takes a `Block` (block.cuh), so that a host compiler can run it under an emulated block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../rows.h"

#ifdef __CUDACC__
#define FASTPREF_DEVICE __device__ __forceinline__
#else
#define FASTPREF_DEVICE inline
#endif

namespace fastpref::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;
struct None {};  // the dtype of an `out` that is not wanted
struct Any {};   // one that is known at run time only, None included: for what is rare

constexpr int kUnit = 256;
constexpr int kLanes = 32;
constexpr int kPerLane = kUnit / kLanes;

constexpr float kInf = __builtin_inff();
constexpr float kLargest = 3.4028234664e38f;

FASTPREF_DEVICE float quiet_nan() { return __builtin_nanf(""); }

template <class To, class From>
FASTPREF_DEVICE To bits_as(const From& x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To y;
  memcpy(static_cast<void*>(&y), &x, sizeof y);
  return y;
}

// ---- fp32 and the tile dtypes ---------------------------------------------------------------------------------------

FASTPREF_DEVICE float to_float(float x) { return x; }
FASTPREF_DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
FASTPREF_DEVICE float to_float(f16 x) { return __half2float(x); }

template <class T>
FASTPREF_DEVICE T from_float(float x);
template <>
FASTPREF_DEVICE float from_float<float>(float x) { return x; }
template <>
FASTPREF_DEVICE bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <>
FASTPREF_DEVICE f16 from_float<f16>(float x) { return __float2half_rn(x); }

FASTPREF_DEVICE uint32_t word_of(bf16, float low, float high) {
  return bits_as<uint32_t>(__floats2bfloat162_rn(low, high));
}
FASTPREF_DEVICE uint32_t word_of(f16, float low, float high) {
  return bits_as<uint32_t>(__floats2half2_rn(low, high));
}
FASTPREF_DEVICE void floats_of(bf16, uint32_t word, float* x) {
  x[0] = bits_as<float>(word << 16);
  x[1] = bits_as<float>(word & 0xffff0000u);
}
FASTPREF_DEVICE void floats_of(f16, uint32_t word, float* x) {
  const float2 both = __half22float2(bits_as<__half2>(word));
  x[0] = both.x;
  x[1] = both.y;
}

// 16 bytes of T <-> fp32: 4 or 8 of them.
FASTPREF_DEVICE void unpack(float, uint4 piece, float* x) {
  x[0] = bits_as<float>(piece.x), x[1] = bits_as<float>(piece.y);
  x[2] = bits_as<float>(piece.z), x[3] = bits_as<float>(piece.w);
}
template <class Half>
FASTPREF_DEVICE void unpack(Half h, uint4 piece, float* x) {
  floats_of(h, piece.x, x), floats_of(h, piece.y, x + 2), floats_of(h, piece.z, x + 4), floats_of(h, piece.w, x + 6);
}
FASTPREF_DEVICE uint4 pack(float, const float* x) {
  return {bits_as<uint32_t>(x[0]), bits_as<uint32_t>(x[1]), bits_as<uint32_t>(x[2]), bits_as<uint32_t>(x[3])};
}
template <class Half>
FASTPREF_DEVICE uint4 pack(Half h, const float* x) {
  return {word_of(h, x[0], x[1]), word_of(h, x[2], x[3]), word_of(h, x[4], x[5]), word_of(h, x[6], x[7])};
}

template <class T>
constexpr int kPieces = sizeof(T) * kPerLane / 16;  // 16-byte pieces of a lane's 8 columns

// ---- logits in ------------------------------------------------------------------------------------------------------

// The column, within a unit, of a lane's i-th element.
template <class T>
FASTPREF_DEVICE int lane_column(int lane, int i) {
  constexpr int kEach = kPerLane / kPieces<T>;
  return i / kEach * (kLanes * kEach) + lane * kEach + i % kEach;
}

template <class T>
struct Raw {
  uint4 pieces[kPieces<T>];
};

// No __restrict__, no read-only loads: `out` may be the logits themselves.
template <class T>
struct Reader {
  const T* row;
  bool aligned;

  FASTPREF_DEVICE explicit Reader(const T* row) : row(row), aligned(reinterpret_cast<uintptr_t>(row) % 16 == 0) {}

  FASTPREF_DEVICE const uint4* piece(int unit, int lane, int p) const {
    return reinterpret_cast<const uint4*>(row + static_cast<int64_t>(unit) * kUnit) + p * kLanes + lane;
  }

  template <class Block>
  FASTPREF_DEVICE Raw<T> read(Block& block, int unit) const {
    Raw<T> raw;
    if (aligned) {
#pragma unroll
      for (int p = 0; p < kPieces<T>; ++p) raw.pieces[p] = *piece(unit, block.lane, p);
    } else {
      uint4* staging = block.shared.staging[block.warp];
      T* elements = reinterpret_cast<T*>(staging);
      const T* from = row + static_cast<int64_t>(unit) * kUnit + block.lane;
      block.sync_warp();  // the last use of the buffer is over in every lane
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) elements[i * kLanes + block.lane] = from[i * kLanes];
      block.sync_warp();
#pragma unroll
      for (int p = 0; p < kPieces<T>; ++p) raw.pieces[p] = staging[p * kLanes + block.lane];
    }
    return raw;
  }
};

template <class T>
FASTPREF_DEVICE void unpack(const Raw<T>& raw, float* x) {
#pragma unroll
  for (int p = 0; p < kPieces<T>; ++p) unpack(T(), raw.pieces[p], x + p * (kPerLane / kPieces<T>));
}

// ---- residuals out --------------------------------------------------------------------------------------------------

// Where, in 16-byte pieces from a unit's start, a lane's p-th piece of U goes, when lanes hold columns as logits of T
// do.
template <class T, class U>
FASTPREF_DEVICE int out_piece(int lane, int p) {
  if constexpr (sizeof(T) == sizeof(U)) return p * kLanes + lane;
  if constexpr (sizeof(T) > sizeof(U)) return lane / 2 + lane % 2 * (kLanes / 2);  // see exchange below
  return lane * kPieces<U> + p;
}

template <class T, class U, class Block>
FASTPREF_DEVICE void pack_out(Block& block, const float* x, uint4* pieces) {
  if constexpr (sizeof(T) > sizeof(U)) {
    // fp32 logits leave a lane with 4 + 4 columns, of which 16 bits each are 8 + 8 bytes. Neighbouring lanes swap
    // halves: the even one gets the 8 columns of both in the unit's first half, the odd one those in its second.
    const uint4 own = pack(U(), x);  // columns of the first half in x, y; of the second in z, w
    const bool odd = block.lane % 2;
    const uint32_t x1 = block.shuffle_xor(odd ? own.x : own.z, 1);
    const uint32_t x2 = block.shuffle_xor(odd ? own.y : own.w, 1);
    pieces[0] = odd ? uint4{x1, x2, own.z, own.w} : uint4{own.x, own.y, x1, x2};
  } else {
#pragma unroll
    for (int p = 0; p < kPieces<U>; ++p) pieces[p] = pack(U(), x + p * (kPerLane / kPieces<U>));
  }
}

// A row of U, written by warps that hold logits of T. Every byte is written, and later rescaled, by one and the same
// thread.
template <class T, class U>
struct Writer {
  U* row;
  bool aligned;

  FASTPREF_DEVICE Writer(const Out& out, int64_t index)
      : row(static_cast<U*>(out.data) + index * out.row_stride),
        aligned(reinterpret_cast<uintptr_t>(row) % 16 == 0) {}

  FASTPREF_DEVICE bool wanted() const { return true; }
  FASTPREF_DEVICE bool half() const { return std::is_same_v<U, f16>; }

  FASTPREF_DEVICE uint4* piece(int unit, int lane, int p) const {
    return reinterpret_cast<uint4*>(row + static_cast<int64_t>(unit) * kUnit) + out_piece<T, U>(lane, p);
  }

  template <class Block>
  FASTPREF_DEVICE void write(Block& block, int unit, const float* x) const {
    uint4 pieces[kPieces<U>];
    pack_out<T, U>(block, x, pieces);
    if (aligned) {
#pragma unroll
      for (int p = 0; p < kPieces<U>; ++p) *piece(unit, block.lane, p) = pieces[p];
    } else {
      uint4* staging = block.shared.staging[block.warp];
      const U* elements = reinterpret_cast<const U*>(staging);
      U* to = row + static_cast<int64_t>(unit) * kUnit + block.lane;
      block.sync_warp();
#pragma unroll
      for (int p = 0; p < kPieces<U>; ++p) staging[out_piece<T, U>(block.lane, p)] = pieces[p];
      block.sync_warp();
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) to[i * kLanes] = elements[i * kLanes + block.lane];
    }
  }

  template <class Block>
  FASTPREF_DEVICE void scale(Block& block, int unit, float factor) const {
    if (aligned) {
#pragma unroll
      for (int p = 0; p < kPieces<U>; ++p) {
        float x[16 / sizeof(U)];
        uint4* const where = piece(unit, block.lane, p);
        unpack(U(), *where, x);
#pragma unroll
        for (float& each : x) each *= factor;
        *where = pack(U(), x);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kPerLane; ++i) scale_one(unit * kUnit + i * kLanes + block.lane, factor);
    }
  }

  FASTPREF_DEVICE void write_one(int column, float x) const { row[column] = from_float<U>(x); }
  FASTPREF_DEVICE void scale_one(int column, float factor) const { write_one(column, to_float(row[column]) * factor); }
};

template <class T>
struct Writer<T, None> {
  FASTPREF_DEVICE Writer(const Out&, int64_t) {}
  FASTPREF_DEVICE bool wanted() const { return false; }
  FASTPREF_DEVICE bool half() const { return false; }
  template <class Block>
  FASTPREF_DEVICE void write(Block&, int, const float*) const {}
  template <class Block>
  FASTPREF_DEVICE void scale(Block&, int, float) const {}
  FASTPREF_DEVICE void write_one(int, float) const {}
  FASTPREF_DEVICE void scale_one(int, float) const {}
};

template <class T>
struct Writer<T, Any> {
  Out out;
  int64_t index;

  FASTPREF_DEVICE Writer(const Out& out, int64_t index) : out(out), index(index) {}
  FASTPREF_DEVICE bool wanted() const { return out.data != nullptr; }
  FASTPREF_DEVICE bool half() const { return out.data && out.dtype == DType::f16; }

  template <class Do>
  FASTPREF_DEVICE void with(const Do& use) const {
    if (!out.data) return;
    if (out.dtype == DType::f32) use(Writer<T, float>(out, index));
    else if (out.dtype == DType::bf16) use(Writer<T, bf16>(out, index));
    else use(Writer<T, f16>(out, index));
  }
  template <class Block>
  FASTPREF_DEVICE void write(Block& block, int unit, const float* x) const {
    with([&](const auto& to) { to.write(block, unit, x); });
  }
  template <class Block>
  FASTPREF_DEVICE void scale(Block& block, int unit, float factor) const {
    with([&](const auto& to) { to.scale(block, unit, factor); });
  }
  FASTPREF_DEVICE void write_one(int column, float x) const {
    with([&](const auto& to) { to.write_one(column, x); });
  }
  FASTPREF_DEVICE void scale_one(int column, float factor) const {
    with([&](const auto& to) { to.scale_one(column, factor); });
  }
};

}  // namespace fastpref::cuda
