// The softmax family on the CPU: operators, and the choice between rows and pixels.
#include "softmax.h"

#include <torch/csrc/stable/library.h>

#include "softmax_pixels.h"
#include "softmax_rows.h"

#define FL_KERNELS "../cpu/softmax_kernels.h"
#include "../common/for_each_isa.h"

namespace fused_losses {

template <class A>
const SoftmaxFunctions<A>& softmax_functions() {
  const auto& table = choose(isa_default::kSoftmax, isa_avx2::kSoftmax, isa_avx512::kSoftmax);
  if constexpr (sizeof(A) == 4) {
    return table.single;
  } else {
    return table.wide;
  }
}

template const SoftmaxFunctions<float>& softmax_functions();
template const SoftmaxFunctions<double>& softmax_functions();

namespace {

// Below this many classes, a row is too short to fill vectors along its classes.
constexpr int64_t kFewClasses = 64;

template <class A>
bool goes_by_rows(const SoftmaxProblem<A>& problem) {
  return problem.view.classes_are_adjacent() && (problem.view.classes >= kFewClasses || problem.rows == 1);
}

template <class A, class Body>
void by_rows_or_pixels(const SoftmaxProblem<A>& problem, const Body& body) {
  if (problem.rows == 0) return;
  if (goes_by_rows(problem)) {
    body(Rows<A>(problem));
  } else {
    body(Pixels<A>(problem));
  }
}

// Raises for a label out of range, before anything is computed; the sum of the weights of the others.
template <class Weight>
double checked_label_weights(const SoftmaxCall& call, const Weight& weight_of) {
  constexpr int64_t per_task = 65536;
  const int64_t rows = call.rows(), classes = call.classes(), tasks = (rows + per_task - 1) / per_task;
  const auto* labels = static_cast<const int64_t*>(call.target.const_data_ptr());
  std::vector<double> sums(static_cast<size_t>(tasks));
  std::vector<int64_t> bad(static_cast<size_t>(tasks), -1);
  for_each_task(tasks, [&](int64_t task) {
    const int64_t end = std::min(rows, (task + 1) * per_task);
    for (int64_t row = task * per_task; row < end; ++row) {
      if (labels[row] == call.ignore_index) continue;
      if (labels[row] < 0 || labels[row] >= classes) {
        bad[static_cast<size_t>(task)] = row;
        return;
      }
      sums[static_cast<size_t>(task)] += weight_of(labels[row]);
    }
  });
  for (const int64_t row : bad) {
    STD_TORCH_CHECK(row < 0, "Target ", labels[row], " is out of bounds for ", classes, " classes");
  }
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

std::vector<const Tensor*> inputs_of(const SoftmaxCall& call) {
  std::vector<const Tensor*> tensors{&call.logits};
  if (!call.has_labels()) tensors.push_back(&call.target);
  return tensors;
}

// What forward returns, and what its mean divides by.
template <class A>
struct Results {
  const SoftmaxProblem<A>& problem;
  Tensor loss, stats;
  A *maximum, *log_sum;
  double denominator;

  Results(const SoftmaxProblem<A>& problem, ScalarType out_dtype)
      : problem(problem),
        loss(problem.call.reduction == Reduction::None
                 ? empty_contiguous(problem.call.label_shape(), out_dtype, problem.call.logits)
                 : empty_scalar(out_dtype, problem.call.logits)),
        stats(empty_contiguous({2 * problem.rows + 1}, accumulate_type(problem.call.logits.scalar_type()),
                               problem.call.logits)),
        maximum(static_cast<A*>(stats.mutable_data_ptr())),
        log_sum(maximum + problem.rows),
        denominator(static_cast<double>(problem.rows)) {
    if (problem.labels) {
      denominator = checked_label_weights(problem.call,
                                          [&](int64_t label) { return double(problem.weight_of(label)); });
    }
    if (problem.call.reduction != Reduction::Mean) denominator = 1.0;
    log_sum[problem.rows] = static_cast<A>(denominator);
  }

  // run(way, sink) adds the losses of all rows.
  template <class Run>
  std::tuple<Tensor, Tensor> made_by(const Run& run) {
    int64_t tasks = 0;
    by_rows_or_pixels(problem, [&](const auto& way) { tasks = way.tasks(); });
    LossSink<A> sink(problem, loss, tasks);
    by_rows_or_pixels(problem, [&](const auto& way) { run(way, sink); });
    sink.finish(denominator);
    return {loss, stats};
  }
};

template <class A>
std::tuple<Tensor, Tensor> forward(const SoftmaxCall& call, ScalarType out_dtype) {
  const SoftmaxProblem<A> problem(call, inputs_of(call));
  Results<A> results(problem, out_dtype);
  return results.made_by(
      [&](const auto& way, LossSink<A>& sink) { way.forward(sink, results.maximum, results.log_sum); });
}

template <class A>
void backward(const SoftmaxCall& call, const Tensor& grad_output, const Tensor& stats, Tensor& out) {
  auto tensors = inputs_of(call);
  const int gradient = static_cast<int>(tensors.size());
  tensors.push_back(&out);
  const SoftmaxProblem<A> problem(call, tensors);
  const Upstream<A> upstream(problem, grad_output, stats);
  const bool is_fresh = out.data_ptr() != call.logits.data_ptr();
  const Output<A> output(out, problem.f, is_fresh);
  by_rows_or_pixels(problem, [&](const auto& way) { way.backward(upstream, output, gradient); });
}

// Also makes the gradient of the loss, or of the sum of the losses; it may take the place of the logits.
template <class A>
std::tuple<Tensor, Tensor> forward_backward(const SoftmaxCall& call, ScalarType out_dtype, Tensor& out) {
  auto tensors = inputs_of(call);
  const int gradient = static_cast<int>(tensors.size());
  tensors.push_back(&out);
  const SoftmaxProblem<A> problem(call, tensors);
  if (goes_by_rows(problem) && (problem.probabilities || problem.transforms)) {
    const auto [loss, stats] = forward<A>(call, out_dtype);
    Tensor one = empty_like(loss, accumulate_type(call.logits.scalar_type()));
    std::fill_n(static_cast<A*>(one.mutable_data_ptr()), one.numel(), A(1));
    backward<A>(call, one, stats, out);
    return {loss, stats};
  }
  Results<A> results(problem, out_dtype);
  const Upstream<A> upstream(problem, results.maximum, 1.0 / results.denominator);
  const Output<A> output(out, problem.f, out.data_ptr() != call.logits.data_ptr());
  return results.made_by([&](const auto& way, LossSink<A>& sink) {
    way.forward_backward(sink, results.maximum, results.log_sum, upstream, output, gradient);
  });
}

template <class A>
void target_backward(const SoftmaxCall& call, const Tensor& grad_output, const Tensor& stats, Tensor& out) {
  const SoftmaxProblem<A> problem(call, {&call.logits, &call.target, &out});
  const Upstream<A> upstream(problem, grad_output, stats);
  const Output<A> output(out, problem.f);
  by_rows_or_pixels(problem, [&](const auto& way) { way.target_backward(upstream, output, 2); });
}

std::tuple<Tensor, Tensor> cross_entropy_forward(const Tensor& logits, const Tensor& target,
                                                 const OptionalTensor& weight,
                                                 const OptionalTensor& sample_weight,
                                                 const std::string& reduction, int64_t ignore_index,
                                                 double label_smoothing, double z_loss, double softcap,
                                                 double temperature, ScalarType out_dtype) {
  const SoftmaxCall call = checked_softmax_call(logits, target, weight, sample_weight, reduction,
                                                ignore_index, label_smoothing, z_loss, softcap, temperature);
  return logits.scalar_type() == ScalarType::Double ? forward<double>(call, out_dtype)
                                                    : forward<float>(call, out_dtype);
}

// Checks, then fills a gradient that has the layout of `out`.
template <auto Single, auto Wide>
void fill_gradient(const Tensor& grad_output, const SoftmaxCall& call, const Tensor& stats, Tensor& out) {
  check_saved(call, grad_output, stats);
  // Labels may have changed since the forward pass, and they are offsets here too.
  if (call.has_labels()) checked_label_weights(call, [](int64_t) { return 0.0; });
  const Tensor upstream = torch::stable::contiguous(grad_output);
  (call.logits.scalar_type() == ScalarType::Double ? Wide : Single)(call, upstream, stats, out);
}

#define FL_BACKWARD_PARAMETERS                                                                         \
  const Tensor &target, const OptionalTensor &weight, const OptionalTensor &sample_weight,             \
      const Tensor &stats, const std::string &reduction, int64_t ignore_index, double label_smoothing, \
      double z_loss, double softcap, double temperature
#define FL_BACKWARD_CALL                                                                                \
  checked_softmax_call(logits, target, weight, sample_weight, reduction, ignore_index, label_smoothing, \
                       z_loss, softcap, temperature)

Tensor cross_entropy_backward(const Tensor& grad_output, const Tensor& logits, FL_BACKWARD_PARAMETERS) {
  const SoftmaxCall call = FL_BACKWARD_CALL;
  Tensor out = empty_like(logits, logits.scalar_type());
  fill_gradient<backward<float>, backward<double>>(grad_output, call, stats, out);
  return out;
}

void cross_entropy_backward_(const Tensor& grad_output, Tensor logits, FL_BACKWARD_PARAMETERS) {
  const SoftmaxCall call = FL_BACKWARD_CALL;
  fill_gradient<backward<float>, backward<double>>(grad_output, call, stats, logits);
}

std::tuple<Tensor, Tensor> with_gradient(const SoftmaxCall& call, ScalarType out_dtype, Tensor& out) {
  return out.scalar_type() == ScalarType::Double ? forward_backward<double>(call, out_dtype, out)
                                                 : forward_backward<float>(call, out_dtype, out);
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_with_gradient(
    const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
    const OptionalTensor& sample_weight, const std::string& reduction, int64_t ignore_index,
    double label_smoothing, double z_loss, double softcap, double temperature, ScalarType out_dtype) {
  const SoftmaxCall call = FL_BACKWARD_CALL;
  Tensor gradient = empty_like(logits, logits.scalar_type());
  const auto [loss, stats] = with_gradient(call, out_dtype, gradient);
  return {loss, stats, gradient};
}

Tensor cross_entropy_with_gradient_in_place(Tensor logits, const Tensor& target, const OptionalTensor& weight,
                                            const OptionalTensor& sample_weight, int64_t ignore_index,
                                            double label_smoothing, double z_loss, double softcap,
                                            double temperature) {
  const std::string reduction = "none";
  const SoftmaxCall call = FL_BACKWARD_CALL;
  return std::get<0>(with_gradient(call, accumulate_type(logits.scalar_type()), logits));
}

Tensor cross_entropy_target_backward(const Tensor& grad_output, const Tensor& logits,
                                     FL_BACKWARD_PARAMETERS) {
  const SoftmaxCall call = FL_BACKWARD_CALL;
  STD_TORCH_CHECK(!call.has_labels(), "class indices have no gradient");
  Tensor out = empty_like(target, target.scalar_type());
  fill_gradient<target_backward<float>, target_backward<double>>(grad_output, call, stats, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_losses, CPU, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&cross_entropy_forward));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
  m.impl("cross_entropy_backward_", TORCH_BOX(&cross_entropy_backward_));
  m.impl("cross_entropy_with_gradient", TORCH_BOX(&cross_entropy_with_gradient));
  m.impl("cross_entropy_with_gradient_", TORCH_BOX(&cross_entropy_with_gradient_in_place));
  m.impl("cross_entropy_target_backward", TORCH_BOX(&cross_entropy_target_backward));
}

}  // namespace fused_losses
