// The CPU's row kernels as the Python door sees them: whole tiles, on `threads` threads, with the instruction set
// chosen.
#pragma once

#include <string>
#include <vector>

#include "../rows.h"
#include "isa.h"

namespace fastpref::cpu {

std::vector<std::string> isas();  // what this machine can run, fastest first

// The fastest, or the one that the environment variable FASTPREF_ISA names, or the one named here.
// Throws std::invalid_argument where this machine cannot run it.
const Kernels& kernels(const std::string& isa = "");

void residual(const Tile& tile, const Out& out, const Stats& stats, int threads);
void fold(const Tile& tile, const FoldState& state, int threads);
void residual_given_lse(const Tile& tile, const Given& given, const Out& out, int threads);
void gradient_given_lse(const Tile& tile, const Given& given, const Out& out, int threads);

// The tail of the softmax (fastpref/tail.py). columns: rising, in [0, cols).
void peaks(const Residuals& residuals, const Peaks& out, int threads);
void split(const Residuals& residuals, const int32_t* columns, int64_t count, const Out& out, float* rest, int threads);
void add_rows(float* total, const Out& part, const int32_t* columns, int64_t count, int64_t width, int threads);

// Asks for huge pages under the whole pages inside [address, address + bytes). False where there is no such thing.
bool advise_huge(uintptr_t address, size_t bytes);

}  // namespace fastpref::cpu
