// What happens to a chunk of logits between two matrix products, row by row in the second-level cache.
#include "../ops/linear.h"

#include <torch/csrc/stable/library.h>

#include "softmax.h"

namespace fused_losses {
namespace {

// A call's rows as blocks of transformed logits in the accumulation type.
template <class A>
class LogitRows {
 public:
  static constexpr int64_t kBlock = SoftmaxProblem<A>::kBlock;
  struct Scratch {
    alignas(64) A z[kBlock], out[kBlock];
  };

  explicit LogitRows(const RowsCall& call)
      : f(softmax_functions<A>()),
        call(call),
        labels(static_cast<const int64_t*>(call.labels.const_data_ptr())),
        factors(call.factors ? static_cast<const A*>(call.factors->const_data_ptr()) : nullptr),
        stride(call.logits.strides()[0]),
        data_(static_cast<const char*>(call.logits.const_data_ptr())),
        dtype_(dtype_of(call.logits.scalar_type())),
        softcap_(static_cast<A>(call.softcap)),
        temperature_(static_cast<A>(call.temperature)) {}

  const SoftmaxFunctions<A>& f;
  const RowsCall& call;
  const int64_t* labels;
  const A* factors;
  int64_t stride;

  bool transforms() const { return call.softcap > 0 || call.temperature != 1.0; }
  bool has_label(int64_t row) const { return labels[row] >= 0 && labels[row] < call.classes(); }

  // Calls body(row, scratch).
  template <class Body>
  void for_each(const Body& body) const {
    const int64_t per_task = std::max<int64_t>(1, 65536 / std::max<int64_t>(call.classes(), 1));
    for_each_task((call.rows() + per_task - 1) / per_task, [&](int64_t task) {
      thread_local Scratch scratch;
      const int64_t end = std::min(call.rows(), (task + 1) * per_task);
      for (int64_t row = task * per_task; row < end; ++row) body(row, scratch);
    });
  }

  // Calls body(first class, count, logits).
  template <class Body>
  void for_each_block(int64_t row, Scratch& scratch, const Body& body) const {
    for (int64_t c = 0; c < call.classes(); c += kBlock) {
      const int64_t n = std::min(kBlock, call.classes() - c);
      const char* source = data_ + (row * stride + c) * element_size(dtype_);
      const A* z = scratch.z;
      if (dtype_ == kAccumulate<A>) {
        z = reinterpret_cast<const A*>(source);
      } else {
        f.load(dtype_, source, 1, n, scratch.z);
      }
      if (transforms()) f.transform(z, n, softcap_, temperature_, scratch.z), z = scratch.z;
      body(c, n, z);
    }
  }

  A logit(int64_t row, int64_t c) const {
    A z;
    f.load(dtype_, data_ + (row * stride + c) * element_size(dtype_), 1, 1, &z);
    if (transforms()) f.transform(&z, 1, softcap_, temperature_, &z);
    return z;
  }

 private:
  const char* data_;
  Dtype dtype_;
  A softcap_, temperature_;
};

template <class A>
void statistics_of(const RowsCall& call, A* statistics, int64_t* prediction) {
  const LogitRows<A> rows(call);
  const int64_t count = call.rows(), classes = call.classes();
  const A lowest = -std::numeric_limits<A>::infinity();
  rows.for_each([&](int64_t row, auto& scratch) {
    A maximum = lowest;
    rows.for_each_block(row, scratch, [&](int64_t, int64_t n, const A* z) {
      maximum = std::max(maximum, rows.f.row_max(z, n));
    });
    const A reference = maximum == lowest ? A(0) : maximum;
    ExpSums sums{0, 0};
    double gap = 0;
    int64_t first = classes;
    rows.for_each_block(row, scratch, [&](int64_t c, int64_t n, const A* z) {
      const ExpSums of_block = rows.f.row_exp_sums(z, reference, n);
      sums.exp += of_block.exp, sums.moment += of_block.moment;
      if (rows.factors) gap += rows.f.row_gap(z, rows.factors + c, reference, n);
      if (first == classes) {
        const int64_t found = rows.f.row_find(z, maximum, n);
        if (found < n) first = c + found;
      }
    });
    statistics[kMaximum * count + row] = maximum;
    statistics[kLogSum * count + row] =
        static_cast<A>(maximum == lowest ? std::numeric_limits<double>::quiet_NaN() : std::log(sums.exp));
    statistics[kLabelLogit * count + row] = rows.has_label(row) ? rows.logit(row, rows.labels[row]) : A(0);
    statistics[kGap * count + row] = static_cast<A>(gap);
    statistics[kMoment * count + row] = static_cast<A>(sums.moment / sums.exp);
    prediction[row] = first == classes ? 0 : first;
  });
}

// What a row's gradient is made of.
template <class A>
struct Coefficients {
  A excess, label, entropy, share;

  Coefficients(const A* table, int64_t count, int64_t row)
      : excess(table[kExcess * count + row]),
        label(table[kLabel * count + row]),
        entropy(table[kEntropy * count + row]),
        share(table[kShare * count + row]) {}

  bool are_zero() const { return excess == A(0) && label == A(0) && entropy == A(0) && share == A(0); }

  A at_label(A z, A maximum, A log_sum) const {
    const double log_probability =
        (static_cast<double>(z) - static_cast<double>(maximum)) - static_cast<double>(log_sum);
    const double p = std::exp(log_probability);
    const double of_entropy = p > 0 ? static_cast<double>(entropy) * log_probability : 0.0;
    return static_cast<A>(p * (static_cast<double>(excess) + of_entropy) +
                          static_cast<double>(label) * std::expm1(log_probability));
  }
};

template <class A>
void gradient_over(const RowsCall& call, Tensor& logits, const A* statistics, const A* table) {
  const LogitRows<A> rows(call);
  const int64_t count = call.rows();
  const Output<A> out(logits, rows.f, false);
  const auto softcap = static_cast<A>(call.softcap), temperature = static_cast<A>(call.temperature);
  rows.for_each([&](int64_t row, auto& scratch) {
    const Coefficients<A> k(table, count, row);
    const int64_t start = row * rows.stride;
    if (k.are_zero()) return out.zero(call.classes(), start);
    const A maximum = statistics[kMaximum * count + row], log_sum = statistics[kLogSum * count + row];
    // Read before blocks are written over.
    const int64_t label = rows.has_label(row) ? rows.labels[row] : -1;
    const A of_label = label >= 0 ? k.at_label(rows.logit(row, label), maximum, log_sum) : A(0);
    rows.for_each_block(row, scratch, [&](int64_t c, int64_t n, const A* z) {
      A* gradient = out.place(start + c, scratch.out);
      if (k.entropy == A(0)) {
        rows.f.row_gradient(z, maximum, log_sum, k.excess + k.label, n, gradient);
      } else {
        rows.f.row_entropy_gradient(z, maximum, log_sum, k.excess + k.label, k.entropy, n, gradient);
      }
      if (label >= c && label < c + n) gradient[label - c] = of_label;
      if (rows.factors) rows.f.subtract(rows.factors + c, k.share, n, gradient);
      if (rows.transforms()) rows.f.chain(z, n, softcap, temperature, gradient);
      out.put(gradient, 1, n, start + c);
    });
  });
}

std::tuple<Tensor, Tensor> row_statistics(const Tensor& logits, const Tensor& labels,
                                          const OptionalTensor& factors, double softcap, double temperature) {
  const RowsCall call = checked_rows_call(logits, labels, factors, softcap, temperature);
  Tensor statistics =
      empty_contiguous({kStatistics, call.rows()}, accumulate_type(logits.scalar_type()), logits);
  Tensor prediction = empty_contiguous({call.rows()}, ScalarType::Long, logits);
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    statistics_of<A>(call, static_cast<A*>(statistics.mutable_data_ptr()),
                     static_cast<int64_t*>(prediction.mutable_data_ptr()));
  };
  logits.scalar_type() == ScalarType::Double ? run(0.0) : run(0.0f);
  return {statistics, prediction};
}

void row_gradient_in_place(Tensor logits, const Tensor& labels, const Tensor& statistics,
                           const Tensor& coefficients, const OptionalTensor& factors, double softcap,
                           double temperature) {
  const RowsCall call = checked_rows_call(logits, labels, factors, softcap, temperature);
  check_table("statistics", statistics, kStatistics, call);
  check_table("coefficients", coefficients, kCoefficients, call);
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    gradient_over<A>(call, logits, static_cast<const A*>(statistics.const_data_ptr()),
                     static_cast<const A*>(coefficients.const_data_ptr()));
  };
  logits.scalar_type() == ScalarType::Double ? run(0.0) : run(0.0f);
}

// Calls body(first, count) for blocks of many numbers.
template <class Body>
void for_each_block(int64_t count, int64_t block, const Body& body) {
  const int64_t per_task = 64 * block;
  for_each_task((count + per_task - 1) / per_task, [&](int64_t task) {
    const int64_t end = std::min(count, (task + 1) * per_task);
    for (int64_t i = task * per_task; i < end; i += block) body(i, std::min(block, end - i));
  });
}

constexpr int64_t kScaledBlock = 1024;

const char* checked_numbers(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(is_supported(x.scalar_type()) && x.is_contiguous(), name, " must be contiguous and floating");
  return static_cast<const char*>(x.const_data_ptr());
}

// x times a number, in another dtype, in one pass and fp32.
Tensor scaled(const Tensor& x, const Tensor& factor, ScalarType dtype) {
  const char* source = checked_numbers("x", x);
  STD_TORCH_CHECK(factor.numel() == 1 && is_supported(dtype), "factor must be one number, dtype floating");
  const auto& f = softmax_functions<float>();
  Tensor result = empty_like(x, dtype);
  const Output<float> out(result, f);
  const Dtype from = dtype_of(x.scalar_type());
  float by;
  f.load(dtype_of(factor.scalar_type()), checked_numbers("factor", factor), 1, 1, &by);
  for_each_block(x.numel(), kScaledBlock, [&](int64_t i, int64_t n) {
    alignas(64) float values[kScaledBlock];
    f.load(from, source + i * element_size(from), 1, n, values);
    f.affine(values, n, by, 0.0f, values);
    out.put(values, 1, n, i);
  });
  return result;
}

// total += x, whatever the dtype of x.
void add_in_place(Tensor total, const Tensor& x) {
  const char* source = checked_numbers("x", x);
  STD_TORCH_CHECK(total.scalar_type() == ScalarType::Float && total.is_contiguous() && same_shape(total, x),
                  "total must be float32, contiguous and of the shape of x");
  const auto& f = softmax_functions<float>();
  const Dtype from = dtype_of(x.scalar_type());
  auto* sums = static_cast<float*>(total.mutable_data_ptr());
  for_each_block(x.numel(), kScaledBlock, [&](int64_t i, int64_t n) {
    alignas(64) float values[kScaledBlock];
    f.load(from, source + i * element_size(from), 1, n, values);
    f.subtract(values, -1.0f, n, sums + i);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_losses, CPU, m) {
  m.impl("row_statistics", TORCH_BOX(&row_statistics));
  m.impl("row_gradient_", TORCH_BOX(&row_gradient_in_place));
  m.impl("scaled", TORCH_BOX(&scaled));
  m.impl("add_", TORCH_BOX(&add_in_place));
}

}  // namespace fused_losses
