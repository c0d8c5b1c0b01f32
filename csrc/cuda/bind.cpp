// `fastpref._native.cuda`: the CUDA row kernels for fastpref/rows/cuda.py, which checks what it passes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda.h"

namespace py = pybind11;

void bind_cuda(py::module_& m) {
  using namespace fastpref;
  using no_gil = py::call_guard<py::gil_scoped_release>;
  py::module_ c = m.def_submodule("cuda", "Row kernels over device addresses; use fastpref.rows.cuda instead.");

  c.def("devices", &cuda::devices, no_gil(),
        "Compute capabilities, 10 * major + minor; raises RuntimeError with the reason if there are none.");
  c.def("cluster_size", [](const Tile& tile, int device) { return cuda::cluster_size(tile.dtype, tile.cols, device); },
        py::arg("tile"), py::arg("device"), "Thread blocks a row of the cluster sweep; 0: it cannot run.");
  c.def(
      "residual",
      [](const Tile& tile, const Out& out, const Stats& stats, bool cluster, int device, uintptr_t stream) {
        cuda::residual(tile, out, stats, cluster ? cuda::Sweep::cluster : cuda::Sweep::block, {device, stream});
      },
      py::arg("tile"), py::arg("out"), py::arg("stats"), py::arg("cluster"), py::arg("device"), py::arg("stream"),
      no_gil());
  c.def(
      "fold",
      [](const Tile& tile, const FoldState& state, int device, uintptr_t stream) {
        cuda::fold(tile, state, {device, stream});
      },
      py::arg("tile"), py::arg("state"), py::arg("device"), py::arg("stream"), no_gil());
  c.def(
      "residual_given_lse",
      [](const Tile& tile, const Given& given, const Out& out, int device, uintptr_t stream) {
        cuda::residual_given_lse(tile, given, out, {device, stream});
      },
      py::arg("tile"), py::arg("given"), py::arg("out"), py::arg("device"), py::arg("stream"), no_gil());
  c.def(
      "gradient_given_lse",
      [](const Tile& tile, const Given& given, const Out& out, int device, uintptr_t stream) {
        cuda::gradient_given_lse(tile, given, out, {device, stream});
      },
      py::arg("tile"), py::arg("given"), py::arg("out"), py::arg("device"), py::arg("stream"), no_gil());
}
