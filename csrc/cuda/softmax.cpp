// The softmax operators on a GPU. Nothing here waits for the GPU.
#include <torch/csrc/stable/library.h>

#include "../common/class_view.h"
#include "../ops/softmax.h"
#include "device.h"
#include "softmax.h"

namespace fused_losses {
namespace {

ClassLayout layout_of(const ClassView& view, size_t tensor) {
  ClassLayout layout;
  layout.classes = view.of[tensor].classes;
  std::copy(view.of[tensor].outer.begin(), view.of[tensor].outer.end(), layout.rows);
  layout.rows[view.outer.size()] = view.of[tensor].pixels;
  return layout;
}

template <class T>
const T* data_of(const OptionalTensor& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

// The logits, then the probabilities where those are the target, then a gradient if there is one.
ClassView view_of(const SoftmaxCall& call, const Tensor* gradient) {
  std::vector<const Tensor*> tensors{&call.logits};
  if (!call.has_labels()) tensors.push_back(&call.target);
  if (gradient != nullptr) tensors.push_back(gradient);
  ClassView view = class_view(tensors);
  STD_TORCH_CHECK(view.outer.size() < kMaxRowDims, "the strides of these tensors need ",
                  view.outer.size() + 1, " dimensions beside the classes and the CUDA kernels take ",
                  kMaxRowDims, "; pass contiguous tensors");
  return view;
}

template <class T>
SoftmaxProblem<T> problem_of(const SoftmaxCall& call, const ClassView& view) {
  using A = Accumulate<T>;
  SoftmaxProblem<T> problem;
  problem.classes = call.classes();
  problem.rows = call.rows();
  problem.row_dims = static_cast<int>(view.outer.size()) + 1;
  std::copy(view.outer.begin(), view.outer.end(), problem.row_sizes);
  problem.row_sizes[view.outer.size()] = view.pixels;
  problem.logits = static_cast<const T*>(call.logits.const_data_ptr());
  problem.logits_layout = layout_of(view, 0);
  if (call.has_labels()) {
    problem.labels = static_cast<const int64_t*>(call.target.const_data_ptr());
  } else {
    problem.probabilities = static_cast<const T*>(call.target.const_data_ptr());
    problem.probabilities_layout = layout_of(view, 1);
  }
  problem.class_weight = data_of<A>(call.weight);
  problem.sample_weight = data_of<A>(call.sample_weight);
  problem.ignore_index = call.ignore_index;
  problem.smoothing = static_cast<A>(call.label_smoothing);
  problem.share =
      problem.classes == 0 ? A(0) : static_cast<A>(call.label_smoothing / double(problem.classes));
  problem.z_loss = static_cast<A>(call.z_loss);
  problem.softcap = static_cast<A>(call.softcap), problem.temperature = static_cast<A>(call.temperature);
  problem.transforms = call.softcap > 0 || call.temperature != 1.0;
  return problem;
}

template <class T>
std::tuple<Tensor, Tensor> forward(const SoftmaxCall& call, ScalarType out_dtype, cudaStream_t stream) {
  using Loss = SoftmaxLoss<T>;
  const auto problem = problem_of<T>(call, view_of(call, nullptr));
  const bool unreduced = call.reduction == Reduction::None;
  Tensor loss = unreduced ? empty_contiguous(call.label_shape(), out_dtype, call.logits)
                          : empty_scalar(out_dtype, call.logits);
  Tensor stats =
      empty_contiguous({2 * problem.rows + 1}, accumulate_type(call.logits.scalar_type()), call.logits);
  const int64_t blocks = std::clamp<int64_t>(problem.rows, 1, kSoftmaxMaxBlocks);  // at most
  const Tensor partial = empty_contiguous({2 * blocks}, ScalarType::Double, call.logits);
  const auto reduction = unreduced                           ? Loss::kNone
                         : call.reduction == Reduction::Mean ? Loss::kMean
                                                             : Loss::kSum;
  STD_CUDA_CHECK(softmax_forward<T>(problem,
                                    {loss.mutable_data_ptr(), dtype_of(out_dtype), reduction,
                                     static_cast<Accumulate<T>*>(stats.mutable_data_ptr()),
                                     static_cast<double*>(partial.mutable_data_ptr())},
                                    stream));
  return {loss, stats};
}

std::tuple<Tensor, Tensor> cross_entropy_forward_cuda(const Tensor& logits, const Tensor& target,
                                                      const OptionalTensor& weight,
                                                      const OptionalTensor& sample_weight,
                                                      const std::string& reduction, int64_t ignore_index,
                                                      double label_smoothing, double z_loss, double softcap,
                                                      double temperature, ScalarType out_dtype) {
  const Launches launches(logits);
  const SoftmaxCall call = checked_softmax_call(logits, target, weight, sample_weight, reduction,
                                                ignore_index, label_smoothing, z_loss, softcap, temperature);
  return for_element_type(logits.scalar_type(), [&](auto* type) {
    return forward<std::remove_pointer_t<decltype(type)>>(call, out_dtype, launches.stream());
  });
}

template <class T>
using Backward = cudaError_t (*)(const SoftmaxProblem<T>&, const SoftmaxGradient<T>&, cudaStream_t, int);

// Checks, then fills a gradient that has the layout of `out`.
template <class T>
void fill_gradient(Backward<T> backward, const Tensor& grad_output, const SoftmaxCall& call,
                   const Tensor& stats, Tensor& out, const Launches& launches) {
  check_saved(call, grad_output, stats);
  if (out.numel() == 0) return;
  const Tensor upstream = torch::stable::contiguous(grad_output);
  const ClassView view = view_of(call, &out);
  const SoftmaxGradient<T> gradient{static_cast<T*>(out.mutable_data_ptr()),
                                    layout_of(view, view.of.size() - 1),
                                    upstream.const_data_ptr(),
                                    dtype_of(upstream.scalar_type()),
                                    call.reduction != Reduction::None,
                                    static_cast<const Accumulate<T>*>(stats.const_data_ptr())};
  STD_CUDA_CHECK(backward(problem_of<T>(call, view), gradient, launches.stream(), kSoftmaxMaxBlocks));
}

#define FL_BACKWARD_PARAMETERS                                                                         \
  const Tensor &target, const OptionalTensor &weight, const OptionalTensor &sample_weight,             \
      const Tensor &stats, const std::string &reduction, int64_t ignore_index, double label_smoothing, \
      double z_loss, double softcap, double temperature
#define FL_BACKWARD_CALL                                                                                \
  checked_softmax_call(logits, target, weight, sample_weight, reduction, ignore_index, label_smoothing, \
                       z_loss, softcap, temperature)

void fill_logits_gradient(const Tensor& grad_output, const SoftmaxCall& call, const Tensor& stats,
                          Tensor& out, const Launches& launches) {
  for_element_type(call.logits.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    fill_gradient<T>(&softmax_backward<T>, grad_output, call, stats, out, launches);
  });
}

Tensor cross_entropy_backward_cuda(const Tensor& grad_output, const Tensor& logits, FL_BACKWARD_PARAMETERS) {
  const Launches launches(logits);
  const SoftmaxCall call = FL_BACKWARD_CALL;
  Tensor out = empty_like(logits, logits.scalar_type());
  fill_logits_gradient(grad_output, call, stats, out, launches);
  return out;
}

void cross_entropy_backward_in_place_cuda(const Tensor& grad_output, Tensor logits, FL_BACKWARD_PARAMETERS) {
  const Launches launches(logits);
  const SoftmaxCall call = FL_BACKWARD_CALL;
  fill_logits_gradient(grad_output, call, stats, logits, launches);
}

// Losses of the rows; the logits become the gradient of their sum.
template <class T>
Tensor with_gradient(const SoftmaxCall& call, Tensor& logits, const Launches& launches) {
  const ScalarType accumulate = accumulate_type(logits.scalar_type());
  const auto [loss, stats] = forward<T>(call, accumulate, launches.stream());
  if (logits.numel() == 0) return loss;
  // The denominator of unreduced losses is a 1 that is on the device already.
  const auto* numbers = static_cast<const Accumulate<T>*>(stats.const_data_ptr());
  const ClassView view = view_of(call, &logits);
  const SoftmaxGradient<T> gradient{static_cast<T*>(logits.mutable_data_ptr()),
                                    layout_of(view, view.of.size() - 1),
                                    numbers + 2 * call.rows(),
                                    dtype_of(accumulate),
                                    true,
                                    numbers};
  STD_CUDA_CHECK(
      softmax_backward<T>(problem_of<T>(call, view), gradient, launches.stream(), kSoftmaxMaxBlocks));
  return loss;
}

Tensor cross_entropy_with_gradient_cuda(Tensor logits, const Tensor& target, const OptionalTensor& weight,
                                        const OptionalTensor& sample_weight, int64_t ignore_index,
                                        double label_smoothing, double z_loss, double softcap,
                                        double temperature) {
  const Launches launches(logits);
  const std::string reduction = "none";
  const SoftmaxCall call = FL_BACKWARD_CALL;
  return for_element_type(logits.scalar_type(), [&](auto* type) {
    return with_gradient<std::remove_pointer_t<decltype(type)>>(call, logits, launches);
  });
}

Tensor cross_entropy_target_backward_cuda(const Tensor& grad_output, const Tensor& logits,
                                          FL_BACKWARD_PARAMETERS) {
  const Launches launches(logits);
  const SoftmaxCall call = FL_BACKWARD_CALL;
  STD_TORCH_CHECK(!call.has_labels(), "class indices have no gradient");
  Tensor out = empty_like(target, target.scalar_type());
  for_element_type(logits.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    fill_gradient<T>(&softmax_target_backward<T>, grad_output, call, stats, out, launches);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_losses, CUDA, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&cross_entropy_forward_cuda));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward_cuda));
  m.impl("cross_entropy_backward_", TORCH_BOX(&cross_entropy_backward_in_place_cuda));
  m.impl("cross_entropy_with_gradient_", TORCH_BOX(&cross_entropy_with_gradient_cuda));
  m.impl("cross_entropy_target_backward", TORCH_BOX(&cross_entropy_target_backward_cuda));
}

}  // namespace fused_losses
