#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(fused_losses, m) {
  m.def(
      "row_statistics(Tensor logits, Tensor labels, Tensor? factors, float softcap, float temperature) -> "
      "(Tensor, Tensor)");
  m.def(
      "row_gradient_(Tensor(a!) logits, Tensor labels, Tensor statistics, Tensor coefficients, Tensor? "
      "factors, float softcap, float temperature) -> ()");
  m.def("add_(Tensor(a!) total, Tensor x) -> ()");
  m.def("add_product_(Tensor(a!) total, Tensor left, Tensor right, bool is_fresh) -> ()");
  m.def("scaled(Tensor x, Tensor factor, ScalarType dtype) -> Tensor");
}
