// What the two ways through the logits share: along rows (classes adjacent in memory) and along pixels.
#pragma once
#include <cmath>
#include <cstring>
#include <limits>

#include "../common/class_view.h"
#include "../common/isa.h"
#include "../ops/softmax.h"
#include "operand.h"

namespace fused_losses {

constexpr int32_t kIgnored = -1, kNoLabel = -2;

// Per-pixel numbers of a tile: what its gradient is made of.
template <class A>
struct PixelRows {
  const A *maximum, *log_sum;
  const A *a, *b, *k;
  const int32_t* label;
};

// A sum of exponentials, those of the maximum apart.
struct SplitSum {
  double top, rest;
  double total() const { return top + rest; }
};

struct ExpSums {
  double exp, moment;
};

template <class A>
struct SoftmaxFunctions {
  Load<A> load;
  Store<A> store;
  Stream<A> stream;
  void (*transpose)(const A* in, int64_t in_stride, int64_t rows, int64_t columns, A* out,
                    int64_t out_stride);
  void (*transform)(const A* x, int64_t n, A softcap, A temperature, A* z);
  void (*chain)(const A* z, int64_t n, A softcap, A temperature, A* gradient);
  void (*affine)(const A* x, int64_t n, A scale, A shift, A* out);
  void (*multiply)(const A* x, const A* y, int64_t n, A* out);
  A (*row_max)(const A* z, int64_t n);
  SplitSum (*row_sum_exp)(const A* z, A maximum, int64_t n);
  SplitSum (*row_exp)(A* z, A maximum, int64_t n);
  ExpSums (*row_exp_sums)(const A* z, A maximum, int64_t n);
  int64_t (*row_find)(const A* z, A value, int64_t n);
  double (*row_gap)(const A* z, const A* w, A maximum, int64_t n);
  double (*row_sum)(const A* x, int64_t n);
  void (*row_gradient)(const A* z, A maximum, A log_sum, A a, int64_t n, A* out);
  void (*row_gradient_minus)(const A* z, A maximum, A log_sum, A a, A k, const A* r, int64_t n, A* out);
  void (*row_entropy_gradient)(const A* z, A maximum, A log_sum, A a, A e, int64_t n, A* out);
  void (*subtract)(const A* f, A k, int64_t n, A* out);
  void (*row_target_gradient)(const A* z, A maximum, A log_sum, A k, const A* w, int64_t n, A* out);
  void (*pixel_max)(const A* z, int64_t n, A* maximum);
  void (*pixel_sum_exp)(const A* z, const A* maximum, int64_t n, A* top, A* rest);
  void (*pixel_gap)(const A* z, const A* maximum, A w, const A* r, int64_t n, A* gap, A* weight);
  void (*log_sums)(const A* top, const A* rest, int64_t n, A* log_sum);
  void (*label_gradients)(const A* z, const A* maximum, const A* log_sum, const A* excess, int64_t n,
                          A* label);
  void (*pixel_gradient)(const A* z, const PixelRows<A>& rows, A w, const A* r, int32_t this_class, int64_t n,
                         A* out);
  void (*pixel_target_gradient)(const A* z, const PixelRows<A>& rows, A w, int64_t n, A* out);
};

struct SoftmaxTable {
  SoftmaxFunctions<float> single;
  SoftmaxFunctions<double> wide;
};

template <class A>
const SoftmaxFunctions<A>& softmax_functions();

// One call, with everything its rows share.
template <class A>
struct SoftmaxProblem {
  const SoftmaxFunctions<A>& f = softmax_functions<A>();
  const SoftmaxCall& call;
  ClassView view;  // of the logits, then of the probabilities and of the gradient where there are any
  int64_t rows;
  Dtype dtype;
  const char* logits;
  const char* probabilities = nullptr;
  const int64_t* labels = nullptr;
  const A* class_weight = nullptr;
  const A* sample_weight = nullptr;
  A smoothing, share, softcap, temperature;
  bool transforms;
  double weight_total;  // of all classes
  std::vector<A>
      share_of_class;  // smoothing / classes * weight, empty without smoothing or for probabilities

  // Sums pay for every block; what only writes takes small ones, so that its reads and writes overlap.
  static constexpr int64_t kBlock = 2048, kWritten = 512;

  // As many as any block has elements: what stands in for absent weights.
  static const A* ones() {
    static const std::vector<A> values(kBlock, A(1));
    return values.data();
  }

  SoftmaxProblem(const SoftmaxCall& c, const std::vector<const Tensor*>& tensors)
      : call(c), view(class_view(tensors)), rows(c.rows()), dtype(dtype_of(c.logits.scalar_type())) {
    logits = static_cast<const char*>(c.logits.const_data_ptr());
    if (c.has_labels()) {
      labels = static_cast<const int64_t*>(c.target.const_data_ptr());
    } else {
      probabilities = static_cast<const char*>(c.target.const_data_ptr());
    }
    if (c.weight) class_weight = static_cast<const A*>(c.weight->const_data_ptr());
    if (c.sample_weight) sample_weight = static_cast<const A*>(c.sample_weight->const_data_ptr());
    const auto classes = static_cast<double>(view.classes);
    smoothing = static_cast<A>(c.label_smoothing);
    share = view.classes == 0 ? A(0) : static_cast<A>(c.label_smoothing / classes);
    softcap = static_cast<A>(c.softcap), temperature = static_cast<A>(c.temperature);
    transforms = c.softcap > 0 || c.temperature != 1.0;
    weight_total = classes;  // stays out of a loss without smoothing, so a weight of infinity may be unused
    if (class_weight && smoothing > A(0))
      weight_total = std::accumulate(class_weight, class_weight + view.classes, 0.0);
    if (labels && smoothing > A(0)) {
      share_of_class.assign(static_cast<size_t>(view.classes), share);
      for (size_t i = 0; class_weight && i < share_of_class.size(); ++i) share_of_class[i] *= class_weight[i];
    }
  }

  bool is_ignored(int64_t row) const { return labels && labels[row] == call.ignore_index; }
  A weight_of(int64_t label) const { return class_weight ? class_weight[label] : A(1); }
  A weight_of_row(int64_t row) const { return sample_weight ? sample_weight[row] : A(1); }
  const char* logits_at(int64_t offset) const { return logits + offset * element_size(dtype); }
  const char* probabilities_at(int64_t offset) const { return probabilities + offset * element_size(dtype); }

  // The logit of a row's label, transformed.
  A label_logit(int64_t offset) const {
    A z;
    f.load(dtype, logits_at(offset), 1, 1, &z);
    if (transforms) f.transform(&z, 1, softcap, temperature, &z);
    return z;
  }

  // gap is the sum of w (maximum - z) over classes, weighted by the probabilities where those are the target;
  // weight is the sum of those factors.
  double row_loss(int64_t row, A maximum, A log_sum, A label_logit, double gap, double weight) const {
    double loss;
    if (labels) {
      const double nll = static_cast<double>(maximum - label_logit) + static_cast<double>(log_sum);
      loss = (1.0 - call.label_smoothing) * static_cast<double>(weight_of(labels[row])) * nll;
      if (smoothing > A(0))
        loss += static_cast<double>(share) * (gap + weight_total * static_cast<double>(log_sum));
    } else {
      loss = gap + weight * static_cast<double>(log_sum);
    }
    const double log_sum_exp = static_cast<double>(maximum) + static_cast<double>(log_sum);
    if (call.z_loss > 0) loss += call.z_loss * log_sum_exp * log_sum_exp;
    return loss * static_cast<double>(weight_of_row(row));
  }

  // The factor of softmax(z) in a row's gradient, for an upstream gradient of 1, without that of its label;
  // weight is that of its probabilities.
  double excess_factor(A maximum, A log_sum, double weight) const {
    const double log_sum_exp = static_cast<double>(maximum) + static_cast<double>(log_sum);
    return (labels ? static_cast<double>(share) * weight_total : weight) + 2.0 * call.z_loss * log_sum_exp;
  }
  double label_factor(int64_t row) const {
    return labels ? (1.0 - call.label_smoothing) * static_cast<double>(weight_of(labels[row])) : 0.0;
  }
};

// Where losses of rows go: the tensor itself, or one sum per task, added in the order of the tasks.
template <class A>
class LossSink {
 public:
  LossSink(const SoftmaxProblem<A>& problem, Tensor& loss, int64_t tasks) : problem_(problem), loss_(loss) {
    unreduced_ = problem.call.reduction == Reduction::None;
    dtype_ = dtype_of(loss.scalar_type());
    data_ = static_cast<char*>(loss.mutable_data_ptr());
    partial_.assign(static_cast<size_t>(tasks), 0.0);
  }
  void add(int64_t task, int64_t row, double value) {
    if (unreduced_) {
      store(row, value);
    } else {
      partial_[static_cast<size_t>(task)] += value;
    }
  }
  void finish(double denominator) {
    if (!unreduced_) store(0, std::accumulate(partial_.begin(), partial_.end(), 0.0) / denominator);
  }

 private:
  void store(int64_t index, double value) {
    const A wide = static_cast<A>(value);
    problem_.f.store(dtype_, &wide, 1, 1, data_ + index * element_size(dtype_));
  }

  const SoftmaxProblem<A>& problem_;
  Tensor& loss_;
  bool unreduced_;
  Dtype dtype_;
  char* data_;
  std::vector<double> partial_;
};

// The upstream gradient of a row, over the denominator and times the row's weight.
template <class A>
class Upstream {
 public:
  const A* maximum;
  const A* log_sum;

  Upstream(const SoftmaxProblem<A>& problem, const Tensor& grad_output, const Tensor& stats)
      : maximum(static_cast<const A*>(stats.const_data_ptr())),
        log_sum(maximum + problem.rows),
        problem_(problem),
        values_(static_cast<const char*>(grad_output.const_data_ptr())),
        dtype_(dtype_of(grad_output.scalar_type())),
        each_row_(problem.call.reduction == Reduction::None) {
    if (!each_row_) shared_ = value(0) / static_cast<double>(log_sum[problem.rows]);
  }
  // One number for every row.
  Upstream(const SoftmaxProblem<A>& problem, const A* maximum, double shared)
      : maximum(maximum),
        log_sum(maximum + problem.rows),
        problem_(problem),
        values_(nullptr),
        dtype_(kAccumulate<A>),
        each_row_(false),
        shared_(shared) {}
  double operator()(int64_t row) const {
    const double upstream = each_row_ ? value(row) : shared_;
    return problem_.sample_weight ? upstream * static_cast<double>(problem_.sample_weight[row]) : upstream;
  }

 private:
  double value(int64_t row) const {
    double result;
    softmax_functions<double>().load(dtype_, values_ + row * element_size(dtype_), 1, 1, &result);
    return result;
  }

  const SoftmaxProblem<A>& problem_;
  const char* values_;  // one, or one per row
  Dtype dtype_;
  bool each_row_;
  double shared_ = 0.0;  // one value over the denominator, which is 1 where there is one per row
};

}  // namespace fused_losses
