#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(fused_losses, m) {
  m.def(
      "pointwise_forward(str formula, Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, float "
      "a, "
      "float b, str reduction, ScalarType out_dtype) -> Tensor");
  m.def(
      "pointwise_backward(str formula, Tensor grad_output, Tensor input, Tensor target, Tensor? weight, "
      "Tensor? pos_weight, float a, float b, str reduction, bool input_grad, bool target_grad) -> (Tensor, "
      "Tensor)");
  m.def(
      "pointwise_with_gradients(str formula, Tensor input, Tensor target, Tensor? weight, Tensor? "
      "pos_weight, "
      "float a, float b, str reduction, bool input_grad, bool target_grad, ScalarType out_dtype) -> (Tensor, "
      "Tensor, Tensor)");
  m.def(
      "pointwise_backward_unless_one_(str formula, Tensor grad_output, Tensor input, Tensor target, Tensor? "
      "weight, Tensor? pos_weight, float a, float b, str reduction, Tensor(a!) input_gradient, Tensor(b!) "
      "target_gradient) -> ()");
}
