// `_native.cuda` without a GPU: the same functions, over addresses in host memory and emulated thread blocks.
#include <algorithm>

#include "emulated_block.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;
using namespace fastpref;
using namespace emulated;

namespace {

int ranks = 2;

template <class Body>
void each_row(const Args& a, int ranks, const Body& body) {
  const size_t slice = ranks ? (row_chunks(a.tile.dtype, a.tile.cols) + ranks - 1) / ranks * kChunkBytes / 16 : 0;
  for (int64_t row = 0; row < a.tile.rows; ++row)
    run_row(std::max(ranks, 1), slice, unsigned(row + a.tile.cols), [&](Block& block) { body(block, row); });
}

struct RunResidual {
  const Args& a;
  template <class T, class U, Map kMap, bool kExtras>
  void operator()() const {
    each_row(a, 0, [&](Block& block, int64_t row) { residual_row<T, U, kMap, kExtras>(block, a, row); });
  }
};

struct RunCluster {
  const Args& a;
  template <class T>
  void operator()() const {
    each_row(a, ranks, [&](Block& block, int64_t row) { residual_row_by_cluster<T, true>(block, a, row); });
  }
};

struct RunFold {
  const Args& a;
  template <class T>
  void operator()() const {
    each_row(a, 0, [&](Block& block, int64_t row) { fold_row<T>(block, a, row); });
  }
};

template <bool kEntropy>
struct RunGivenLse {
  const Args& a;
  template <class T>
  void operator()() const {
    each_row(a, 0, [&](Block& block, int64_t row) { given_lse_row<T, Any, kEntropy>(block, a, row); });
  }
};

}  // namespace

PYBIND11_MODULE(emulated_cuda, m) {
  m.def("set_ranks", [](int count) { ranks = count; });
  m.def("devices", [] { return std::vector<int>{90}; });
  m.def("cluster_size", [](const Tile&, int) { return ranks; });
  m.def("residual", [](const Tile& tile, const Out& out, const Stats& stats, bool cluster, int, uintptr_t) {
    const Args a = make_args(tile, out, stats, {}, {});
    if (cluster) dispatch_logits(a, RunCluster{a});
    else dispatch_residual(a, RunResidual{a});
  });
  m.def("fold", [](const Tile& tile, const FoldState& state, int, uintptr_t) {
    const Args a = make_args(tile, {}, {}, state, {});
    dispatch_logits(a, RunFold{a});
  });
  m.def("residual_given_lse", [](const Tile& tile, const Given& given, const Out& out, int, uintptr_t) {
    const Args a = make_args(tile, out, {}, {}, given);
    dispatch_logits(a, RunGivenLse<false>{a});
  });
  m.def("gradient_given_lse", [](const Tile& tile, const Given& given, const Out& out, int, uintptr_t) {
    const Args a = make_args(tile, out, {}, {}, given);
    dispatch_logits(a, RunGivenLse<true>{a});
  });
}
