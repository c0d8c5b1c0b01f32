// The softmax's tail on the CPU: residuals taken apart into a few active columns and the sums of the rest (see
// fastpref/tail.py). Included by rows.cpp, so compiled once per instruction set; nothing here needs a row's order.
#pragma once

#include "isa.h"
#include "vec.h"

namespace {

using namespace fastpref;

template <class T>
const T* row_of(const Residuals& r, int64_t row) {
  return static_cast<const T*>(r.data) + row * r.row_stride;
}

struct Four {  // a number of rows that the compiler knows
  constexpr operator int64_t() const { return 4; }
};

// Largest |U|, sum of U and sum of U^2 in each of the columns [begin, end), U = scale * S. A row whose scale is 0 (ignored) or not
// finite (its logits held a NaN or inf) counts nowhere: what is wrong with one sequence stays with it.
template <class T>
void peaks_of(const Residuals& r, const Peaks& out, int64_t begin, int64_t end) {
  constexpr int64_t kColumns = 1024;  // 12 KiB of sums that stay in L1 while 2 or 4 KiB of each row pass by
  constexpr int64_t kRows = Four{};
  alignas(64) float peak[kColumns], total[kColumns], squares[kColumns];
  for (int64_t c = begin; c < end; c += kColumns) {
    const int64_t n = end - c < kColumns ? end - c : kColumns, whole = n / kLanes * kLanes;
    __builtin_memset(peak, 0, sizeof peak);
    __builtin_memset(total, 0, sizeof total);
    __builtin_memset(squares, 0, sizeof squares);
    // Rows that count, four by four: their sums are read and written once.
    const T* s[kRows];
    float scale[kRows];
    int64_t found = 0;
    const auto take = [&](auto count, int64_t i, const auto& get) {
      vf sum = load(total + i), square = load(squares + i), top = load(peak + i);
      for (int64_t j = 0; j < count; ++j) {
        const vf u = get(s[j] + i) * scale[j];
        sum += u;
        square += u * u;
        top = max_or_second(bits_as<vf>(bits_as<vu>(u) & 0x7fffffffu), top);
      }
      store(total + i, sum);
      store(squares + i, square);
      store(peak + i, top);
    };
    const auto take_rows = [&](auto count) {
      for (int64_t i = 0; i < whole; i += kLanes) take(count, i, [](const T* p) { return load(p); });
      if (whole < n) take(count, whole, [&](const T* p) { return load_first(p, n - whole); });
      found = 0;
    };
    for (int64_t row = 0; row < r.rows; ++row) {
      const float of = r.scale[row];
      if (!(of - of == 0) || of == 0) continue;
      s[found] = row_of<T>(r, row) + c;
      scale[found++] = of;
      if (found == kRows) take_rows(Four{});
    }
    if (found) take_rows(found);
    __builtin_memcpy(out.peak + c, peak, n * sizeof(float));
    __builtin_memcpy(out.total + c, total, n * sizeof(float));
    __builtin_memcpy(out.squares + c, squares, n * sizeof(float));
  }
}

void peaks(const Residuals& r, const Peaks& out, int64_t begin, int64_t end) {
  switch (r.dtype) {
    case DType::bf16: return peaks_of<bf16>(r, out, begin, end);
    case DType::f16: return peaks_of<f16>(r, out, begin, end);
    default: return peaks_of<float>(r, out, begin, end);
  }
}

// x where the column is not active, else 0. bits: of the vector's columns, from the lowest on.
FASTPREF_INLINE vf inactive(vf x, uint32_t bits) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_mov_ps(__mmask16(~bits), (__m512)x);
#else
  vu lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = 1u << i;
  const vu is = (vu{} + bits) & lane;
  return is == 0 ? x : vf{};
#endif
}

// Rows [begin, end): S in the active columns goes to `out`, side by side; the sum of the others is added to
// rest.
template <class T>
void split_of(const Residuals& r, const Active& a, const Out& out, float* rest, int64_t begin, int64_t end) {
  constexpr int64_t kColumns = 4096;  // added up in fp32 lanes, then in fp64
  for (int64_t row = begin; row < end; ++row) {
    const T* s = row_of<T>(r, row);
    T* to = static_cast<T*>(out.data) + row * out.row_stride;
    double sum = 0;
    [[maybe_unused]] int64_t k = 0;
    for (int64_t c = 0; c < r.cols; c += kColumns) {
      const int64_t n = r.cols - c < kColumns ? r.cols - c : kColumns;
      vf part = {};
      const auto take = [&](int64_t i, vf x) {
        const uint32_t bits = uint32_t(a.mask[(c + i) / 16]) >> (c + i) % 16;
        part += inactive(x, bits);
#if defined(__AVX512F__)
        // What is active moves together in the register: bf16 in as much time as reading it takes.
        const vf packed = (vf)_mm512_maskz_compress_ps(__mmask16(bits), (__m512)x);
        const int64_t count = __builtin_popcount(bits);
        if (k + kLanes <= a.count) store(to + k, packed);
        else store_first(to + k, packed, count);
        k += count;
#endif
      };
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) take(i, load(s + c + i));
      if (i < n) take(i, load_first(s + c + i, n - i));
      sum += sum_lanes(part);
    }
#if !defined(__AVX512F__)
    for (int64_t j = 0; j < a.count; ++j) to[j] = s[a.columns[j]];
#endif
    rest[row] += float(sum);
  }
}

void split(const Residuals& r, const Active& a, const Out& out, float* rest, int64_t begin, int64_t end) {
  switch (r.dtype) {
    case DType::bf16: return split_of<bf16>(r, a, out, rest, begin, end);
    case DType::f16: return split_of<f16>(r, a, out, rest, begin, end);
    default: return split_of<float>(r, a, out, rest, begin, end);
  }
}

// total[columns[k]] += part[k], rows of `width` numbers, k in [begin, end): each row of total at most once.
template <class T>
void add_rows_of(float* total, const Out& part, const int32_t* columns, int64_t width, int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; ++k) {
    float* to = total + int64_t(columns[k]) * width;
    const T* from = static_cast<const T*>(part.data) + k * part.row_stride;
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) store(to + i, load(to + i) + load(from + i));
    if (i < width) store_first(to + i, load_first(to + i, width - i) + load_first(from + i, width - i), width - i);
  }
}

void add_rows(float* total, const Out& part, const int32_t* columns, int64_t width, int64_t begin, int64_t end) {
  switch (part.dtype) {
    case DType::bf16: return add_rows_of<bf16>(total, part, columns, width, begin, end);
    case DType::f16: return add_rows_of<f16>(total, part, columns, width, begin, end);
    default: return add_rows_of<float>(total, part, columns, width, begin, end);
  }
}

}  // namespace
