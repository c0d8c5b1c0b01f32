// What each instruction set's copy of rows.cpp exports. Plain data only, for the reason given in rows.h.
#pragma once

#include "../rows.h"

namespace fastpref::cpu {

struct Kernels {
  const char* name;
  // Rows [begin, end) of a tile, on the calling thread.
  void (*residual)(const Tile&, const Out&, const Stats&, int64_t begin, int64_t end);
  void (*fold)(const Tile&, const FoldState&, int64_t begin, int64_t end);
  void (*residual_given_lse)(const Tile&, const Given&, const Out&, int64_t begin, int64_t end);
  void (*gradient_given_lse)(const Tile&, const Given&, const Out&, int64_t begin, int64_t end);
  // Columns [begin, end); rows [begin, end); active columns [begin, end) of `part`'s rows.
  void (*peaks)(const Residuals&, const Peaks&, int64_t begin, int64_t end);
  void (*split)(const Residuals&, const Active&, const Out&, float* rest, int64_t begin, int64_t end);
  void (*add_rows)(float* total, const Out& part, const int32_t* columns, int64_t width, int64_t begin, int64_t end);
  // Test hooks, in place.
  void (*exp)(float* x, int64_t n);
  void (*tanh)(float* x, float* slope, int64_t n);  // slope = 1 - tanh^2
};

extern const Kernels kernels_portable;
#ifdef FASTPREF_X86
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512bf16;
#endif

}  // namespace fastpref::cpu
