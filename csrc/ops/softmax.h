// Arguments of the softmax operators, and the checks that keep a direct call inside its memory.
#pragma once
#include "../common/tensor.h"

namespace fused_losses {

struct SoftmaxCall {
  const Tensor& logits;
  Tensor target;  // labels are contiguous
  const OptionalTensor& weight;
  const OptionalTensor& sample_weight;
  Reduction reduction;
  int64_t ignore_index;
  double label_smoothing, z_loss, softcap, temperature;

  bool has_labels() const { return target.scalar_type() == ScalarType::Long; }
  int64_t classes() const { return logits.sizes()[logits.dim() == 1 ? 0 : 1]; }
  std::vector<int64_t> label_shape() const {
    std::vector<int64_t> shape;
    for (int64_t d = 0; d < logits.dim(); ++d) {
      if (d != 1 && logits.dim() > 1) shape.push_back(logits.sizes()[d]);
    }
    return shape;
  }
  int64_t rows() const {
    const auto shape = label_shape();
    return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<int64_t>());
  }
};

inline void check_factor(const char* name, const OptionalTensor& tensor, const std::vector<int64_t>& shape,
                         const Tensor& logits) {
  if (!tensor) return;
  STD_TORCH_CHECK(has_shape(*tensor, shape), name, " has the wrong shape");
  STD_TORCH_CHECK(tensor->scalar_type() == accumulate_type(logits.scalar_type()) && tensor->is_contiguous(),
                  name, " must be contiguous and float32, or float64 for float64 logits");
  STD_TORCH_CHECK(tensor->device() == logits.device(), name, " must be on the logits' device");
}

inline SoftmaxCall checked_softmax_call(const Tensor& logits, const Tensor& target,
                                        const OptionalTensor& weight, const OptionalTensor& sample_weight,
                                        const std::string& reduction, int64_t ignore_index,
                                        double label_smoothing, double z_loss, double softcap,
                                        double temperature) {
  STD_TORCH_CHECK(is_supported(logits.scalar_type()), "logits must be float64, float32, bfloat16 or float16");
  STD_TORCH_CHECK(logits.dim() > 0, "logits need a class dimension");
  STD_TORCH_CHECK(target.device() == logits.device(), "target must be on the logits' device");
  SoftmaxCall call{logits,       target,          weight, sample_weight, reduction_of(reduction),
                   ignore_index, label_smoothing, z_loss, softcap,       temperature};
  if (call.has_labels()) {
    STD_TORCH_CHECK(has_shape(target, call.label_shape()),
                    "class indices must have the logits' shape without classes");
    call.target = torch::stable::contiguous(target);
  } else {
    STD_TORCH_CHECK(same_shape(target, logits) && target.scalar_type() == logits.scalar_type(),
                    "class probabilities must have the logits' shape and dtype");
  }
  check_factor("weight", weight, {call.classes()}, logits);
  check_factor("sample_weight", sample_weight, call.label_shape(), logits);
  return call;
}

inline void check_saved(const SoftmaxCall& call, const Tensor& grad_output, const Tensor& stats) {
  const ScalarType dtype = grad_output.scalar_type();
  STD_TORCH_CHECK(is_supported(dtype), "grad_output must be floating");
  STD_TORCH_CHECK(call.reduction == Reduction::None ? has_shape(grad_output, call.label_shape())
                                                    : grad_output.numel() == 1,
                  "grad_output must have the loss's shape");
  STD_TORCH_CHECK(has_shape(stats, {2 * call.rows() + 1}) && stats.is_contiguous() &&
                      stats.scalar_type() == accumulate_type(call.logits.scalar_type()),
                  "stats must come from the forward operator");
  STD_TORCH_CHECK(grad_output.device() == call.logits.device() && stats.device() == call.logits.device(),
                  "grad_output and stats must be on the logits' device");
}

}  // namespace fused_losses
