// The door between Python and the kernels: `fastpref._native`. Tensors come in as addresses, sizes and strides, so
// that one build serves every version of torch and needs none to be built. fastpref/rows/native.py and cuda.py are
// its callers and check what they pass; here is only what C++ must know.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/cpu.h"
#include "rows.h"

namespace py = pybind11;

#ifdef FASTPREF_WITH_CUDA
void bind_cuda(py::module_& m);  // csrc/cuda/
#endif

namespace fastpref {
namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "bfloat16") return DType::bf16;
  if (name == "float16") return DType::f16;
  throw std::invalid_argument("dtype is " + name + "; it takes float32, bfloat16, float16");
}

Tile make_tile(Address logits, const std::string& dtype, int64_t row_stride, int64_t rows, int64_t cols,
               Address targets, int64_t ignore_index, int64_t col_offset, Address bias, float logit_scale,
               float softcap, float temperature) {
  return {at<const void>(logits), dtype_of(dtype), row_stride, rows, cols, at<const int64_t>(targets), ignore_index,
          col_offset, at<const float>(bias), logit_scale, softcap, temperature};
}

Out make_out(Address data, const std::string& dtype, int64_t row_stride) {
  return {at<void>(data), dtype_of(dtype), row_stride};
}

Stats make_stats(Address logp, Address lse, Address scale, Address entropy, Address top1, Address mean_logit,
                 Address log_sum_p2) {
  return {at<float>(logp),    at<float>(lse),  at<float>(scale),      at<float>(entropy),
          at<float>(top1), at<float>(mean_logit), at<float>(log_sum_p2)};
}

Given make_given(Address lse, Address entropy, Address grad_logps, Address grad_entropy) {
  return {at<const float>(lse), at<const float>(entropy), at<const float>(grad_logps), at<const float>(grad_entropy)};
}

Residuals make_residuals(Address data, const std::string& dtype, int64_t row_stride, int64_t rows, int64_t cols,
                         Address scale) {
  return {at<const void>(data), dtype_of(dtype), row_stride, rows, cols, at<const float>(scale)};
}

FoldState make_fold_state(Address maximum, Address sum_exp, Address target) {
  return {at<float>(maximum), at<float>(sum_exp), at<float>(target)};
}

}  // namespace
}  // namespace fastpref

PYBIND11_MODULE(_native, m) {
  using namespace fastpref;
  using no_gil = py::call_guard<py::gil_scoped_release>;
  m.doc() = "Row kernels over addresses; use fastpref.rows.native, which takes tensors.";

  py::class_<Tile>(m, "Tile").def(py::init(&make_tile));
  py::class_<Out>(m, "Out").def(py::init(&make_out));
  py::class_<Stats>(m, "Stats").def(py::init(&make_stats));
  py::class_<Given>(m, "Given").def(py::init(&make_given));
  py::class_<Residuals>(m, "Residuals").def(py::init(&make_residuals));
  py::class_<FoldState>(m, "FoldState").def(py::init(&make_fold_state));

  m.def("residual", &cpu::residual, py::arg("tile"), py::arg("out"), py::arg("stats"), py::arg("threads"), no_gil());
  m.def("fold", &cpu::fold, py::arg("tile"), py::arg("state"), py::arg("threads"), no_gil());
  m.def("residual_given_lse", &cpu::residual_given_lse, py::arg("tile"), py::arg("given"), py::arg("out"),
        py::arg("threads"), no_gil());
  m.def("gradient_given_lse", &cpu::gradient_given_lse, py::arg("tile"), py::arg("given"), py::arg("out"),
        py::arg("threads"), no_gil());

  m.def(
      "peaks",
      [](const Residuals& r, Address peak, Address total, Address squares, int threads) {
        cpu::peaks(r, {at<float>(peak), at<float>(total), at<float>(squares)}, threads);
      },
      py::arg("residuals"), py::arg("peak"), py::arg("total"), py::arg("squares"),
      py::arg("threads"), no_gil());
  m.def(
      "split",
      [](const Residuals& r, Address columns, int64_t count, const Out& out, Address rest, int threads) {
        cpu::split(r, at<const int32_t>(columns), count, out, at<float>(rest), threads);
      },
      py::arg("residuals"), py::arg("columns"), py::arg("count"), py::arg("out"), py::arg("rest"), py::arg("threads"),
      no_gil());
  m.def(
      "add_rows",
      [](Address total, const Out& part, Address columns, int64_t count, int64_t width, int threads) {
        cpu::add_rows(at<float>(total), part, at<const int32_t>(columns), count, width, threads);
      },
      py::arg("total"), py::arg("part"), py::arg("columns"), py::arg("count"), py::arg("width"), py::arg("threads"),
      no_gil());

  m.def("isas", &cpu::isas, "Instruction sets that this machine runs, fastest first.");
  m.def("isa", [] { return std::string(cpu::kernels().name); }, "The one in use; FASTPREF_ISA names another.");
  m.def("advise_huge", &cpu::advise_huge, py::arg("address"), py::arg("nbytes"),
        "madvise(MADV_HUGEPAGE) on the whole pages inside a range; False where it has no effect.");
  m.def(
      "exp_inplace",
      [](Address x, int64_t n, const std::string& isa) { cpu::kernels(isa).exp(at<float>(x), n); },
      py::arg("address"), py::arg("n"), py::arg("isa") = "", "Test hook: the kernels' own exp on fp32.", no_gil());
  m.def(
      "tanh_inplace",
      [](Address x, Address slope, int64_t n, const std::string& isa) {
        cpu::kernels(isa).tanh(at<float>(x), at<float>(slope), n);
      },
      py::arg("address"), py::arg("slope"), py::arg("n"), py::arg("isa") = "",
      "Test hook: the softcap's tanh in place, and 1 - tanh^2 to slope.", no_gil());

#ifdef FASTPREF_WITH_CUDA
  m.attr("with_cuda") = true;
  bind_cuda(m);
#else
  m.attr("with_cuda") = false;
#endif
}
