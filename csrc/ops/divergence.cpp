#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(fused_losses, m) {
  m.def(
      "divergence_forward(Tensor student, Tensor teacher, str divergence, float beta, float temperature) -> "
      "(Tensor, Tensor)");
  m.def(
      "divergence_backward(Tensor grad_losses, Tensor student, Tensor teacher, Tensor statistics, str "
      "divergence, float beta, float temperature, bool student_grad, bool teacher_grad) -> (Tensor, Tensor)");
  m.def(
      "divergence_backward_(Tensor grad_losses, Tensor(a!) student, Tensor(b!) teacher, Tensor statistics, "
      "str "
      "divergence, float beta, float temperature, bool student_grad, bool teacher_grad) -> ()");
}
