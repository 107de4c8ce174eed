// What happens to a chunk of logits between two matrix products, row by row in the second-level cache.
#include "../ops/linear.h"

#include <torch/csrc/stable/library.h>

#include "logit_rows.h"

namespace fused_losses {
namespace {

template <class A>
using Block = typename LogitRows<A>::Block;

// What is known of a row, of the blocks that were read: sums are rescaled whenever one has a larger maximum.
template <class A>
struct RowSums {
  A maximum = -std::numeric_limits<A>::infinity();
  double exp = 0, moment = 0, gap = 0, factors = 0;
  int64_t of_maximum = 0;  // the first class of its block

  void raise(A larger, int64_t block) {
    const double step = static_cast<double>(larger) - static_cast<double>(maximum);
    const bool is_first = maximum == -std::numeric_limits<A>::infinity();
    const double shrink = is_first ? 0.0 : std::exp(-step);
    moment = is_first ? 0.0 : (moment + step * exp) * shrink;
    exp *= shrink;
    if (factors != 0) gap += step * factors;
    maximum = larger, of_maximum = block;
  }
  void add(const SoftmaxFunctions<A>& f, const A* z, const A* factors_of_block, int64_t n) {
    const ExpSums sums = f.row_exp_sums(z, reference_of(maximum), n);
    exp += sums.exp, moment += sums.moment;
    if (factors_of_block == nullptr) return;
    gap += f.row_gap(z, factors_of_block, reference_of(maximum), n);
    factors += f.row_sum(factors_of_block, n);
  }
};

template <class A>
void statistics_of(const RowsCall& call, A* statistics, int64_t* prediction) {
  const LogitRows<A> logits(call.logits, call.softcap, call.temperature);
  const auto& f = softmax_functions<A>();
  const int64_t count = call.rows();
  logits.for_each_row([&](int64_t row) {
    thread_local Block<A> scratch;
    RowSums<A> sums;
    logits.for_each_block(row, scratch, [&](int64_t c, int64_t n, const A* z) {
      const A maximum = f.row_max(z, n);
      if (maximum > sums.maximum) sums.raise(maximum, c);
      sums.add(f, z, call.factors ? call.factors_as<A>() + c : nullptr, n);
    });
    const int64_t label = call.label(row);
    prediction[row] = logits.find(row, sums.of_maximum, sums.maximum, scratch);
    // Nothing but NaN, which is no maximum, is told from nothing but -inf where parts of a row are joined.
    if (std::isnan(sums.exp) && reference_of(sums.maximum) != sums.maximum)
      sums.maximum = static_cast<A>(sums.exp);
    statistics[kMaximum * count + row] = sums.maximum;
    statistics[kLogSum * count + row] = log_sum_of(sums.maximum, sums.exp);
    statistics[kLabelLogit * count + row] = label >= 0 ? logits.logit(row, label) : A(0);
    statistics[kGap * count + row] = static_cast<A>(sums.gap);
    statistics[kMoment * count + row] = static_cast<A>(sums.moment / sums.exp);
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
void gradient_over(const RowsCall& call, Tensor& memory, const A* statistics, const A* table) {
  const LogitRows<A> logits(call.logits, call.softcap, call.temperature);
  const auto& f = softmax_functions<A>();
  const int64_t count = call.rows();
  const Output<A> out(memory, f, false);
  logits.for_each_row([&](int64_t row) {
    thread_local Block<A> scratch, computed;
    const Coefficients<A> k(table, count, row);
    const int64_t start = logits.start(row), label = call.label(row);
    if (k.are_zero()) return out.zero(call.classes(), start);
    const A maximum = statistics[kMaximum * count + row], log_sum = statistics[kLogSum * count + row];
    // Read before blocks are written over.
    const A of_label = label >= 0 ? k.at_label(logits.logit(row, label), maximum, log_sum) : A(0);
    logits.template for_each_block<LogitRows<A>::kWritten>(
        row, scratch, [&](int64_t c, int64_t n, const A* z) {
          A* gradient = out.place(start + c, computed);
          if (k.entropy == A(0)) {
            f.row_gradient(z, maximum, log_sum, k.excess + k.label, n, gradient);
          } else {
            f.row_entropy_gradient(z, maximum, log_sum, k.excess + k.label, k.entropy, n, gradient);
          }
          if (label >= c && label < c + n) gradient[label - c] = of_label;
          if (call.factors) f.subtract(call.factors_as<A>() + c, k.share, n, gradient);
          logits.chain(z, n, gradient);
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
  STD_TORCH_CHECK(is_supported(x.scalar_type()) && x.is_contiguous(), name,
                  " must be contiguous and floating");
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
