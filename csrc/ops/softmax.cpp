#include <torch/csrc/stable/library.h>

#define FL_OPTIONS \
  "str reduction, int ignore_index, float label_smoothing, float z_loss, float softcap, float temperature"
#define FL_INPUTS "Tensor target, Tensor? weight, Tensor? sample_weight, "
#define FL_SAVED "Tensor target, Tensor? weight, Tensor? sample_weight, Tensor stats, "

STABLE_TORCH_LIBRARY_FRAGMENT(fused_losses, m) {
  m.def("cross_entropy_forward(Tensor logits, " FL_INPUTS FL_OPTIONS
        ", ScalarType out_dtype) -> (Tensor, Tensor)");
  m.def("cross_entropy_backward(Tensor grad_output, Tensor logits, " FL_SAVED FL_OPTIONS ") -> Tensor");
  m.def("cross_entropy_backward_(Tensor grad_output, Tensor(a!) logits, " FL_SAVED FL_OPTIONS ") -> ()");
  m.def("cross_entropy_with_gradient(Tensor logits, " FL_INPUTS FL_OPTIONS
        ", ScalarType out_dtype) -> (Tensor, Tensor, Tensor)");
  m.def("cross_entropy_with_gradient_(Tensor(a!) logits, " FL_INPUTS
        "int ignore_index, float label_smoothing, float z_loss, float softcap, float temperature) -> Tensor");
  m.def("cross_entropy_target_backward(Tensor grad_output, Tensor logits, " FL_SAVED FL_OPTIONS
        ") -> Tensor");
}
