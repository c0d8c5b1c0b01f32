// The row contract as C structs, shared by the CPU and CUDA kernels. The semantics (what is written, NaN, ignored
// rows) are those of fastpref/rows/contract.py; here are only addresses, sizes and strides: nothing of torch, nothing
// of Python.
//
// Only plain data in this header: it is included by translation units that are compiled for different instruction
// sets, and an inline function shared between them could be linked in the version that this machine cannot run.
#pragma once

#include <cstdint>

namespace fastpref {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// A [rows, cols] tile of logits and what turns it into z = softcap(logit_scale * (logits + bias)) / temperature.
struct Tile {
  const void* logits;
  DType dtype;
  int64_t row_stride;      // elements from one row to the next; columns are contiguous
  int64_t rows;
  int64_t cols;
  const int64_t* targets;  // [rows], contiguous
  int64_t ignore_index;
  int64_t col_offset;      // vocabulary index of column 0; 0 for a tile over the whole vocabulary
  const float* bias;       // [cols] or null
  float logit_scale;
  float softcap;           // 0: none
  float temperature;
};

struct Out {
  void* data;  // null: not wanted
  DType dtype;
  int64_t row_stride;
};

// Each [rows] fp32; a null pointer: not wanted. scale is written exactly when Out::data is given.
struct Stats {
  float* logp;
  float* lse;
  float* scale;
  float* entropy;
  float* top1;
  float* mean_logit;
  float* log_sum_p2;
};

// What is known of the rows before a slice of them is swept, each [rows] fp32. residual_given_lse takes lse alone.
struct Given {
  const float* lse;
  const float* entropy;
  const float* grad_logps;
  const float* grad_entropy;
};

// Residuals in a stash: U = scale * S.
struct Residuals {
  const void* data;
  DType dtype;
  int64_t row_stride;
  int64_t rows;
  int64_t cols;
  const float* scale;  // [rows]
};

struct Peaks {  // each [cols]: over the rows
  float* peak;     // largest |U|
  float* total;    // sum of U
  float* squares;  // sum of U^2
};

// Active columns, in rising order, and as bits: column c is bit c % 16 of mask[c / 16].
struct Active {
  const int32_t* columns;
  int64_t count;
  const uint16_t* mask;
};

struct FoldState {  // each [rows] fp32, updated in place
  float* maximum;
  float* sum_exp;
  float* target;
};

}  // namespace fastpref
