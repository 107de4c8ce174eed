// Kernels of the softmax family: forward reads the logits once, backward reads them once and writes once.
#pragma once
#include "softmax_ways.cuh"

namespace fused_losses {

#include "../formulas/softmax.h"

// What is known of a row's logits after some of them; merging two gives what is known after both.
template <class A>
struct LogitSums {
  A maximum, top, rest;  // logits equal to the maximum are counted apart, see add_exp

  FL_INLINE static LogitSums none() { return {-kInfinity<A>, A(0), A(0)}; }
  // What exponents are relative to; exp(-inf - (-inf)) would be NaN.
  FL_INLINE A reference() const { return maximum == -kInfinity<A> ? A(0) : maximum; }
  FL_INLINE A log_sum() const { return maximum == -kInfinity<A> ? kNaN<A> : log_of_sum(top, rest); }

  FL_INLINE void raise(A larger) {
    if (larger > maximum) {
      rest = (top + rest) * exp_nonpositive(maximum - larger);
      top = A(0);
      maximum = larger;
    }
  }
  template <int N>
  FL_INLINE void add(const A (&z)[N]) {
    A largest = z[0];
#pragma unroll
    for (int k = 1; k < N; ++k) largest = max_(largest, z[k]);
    raise(largest);
    A part = 0;
#pragma unroll
    for (int k = 0; k < N; ++k) add_exp(z[k], reference(), top, part);
    rest += part;
  }
  FL_INLINE void merge(LogitSums other) {
    raise(other.maximum);
    other.raise(maximum);
    top += other.top;
    rest += other.rest;
  }
  FL_INLINE LogitSums from_lane(int offset) const {
    return {__shfl_xor_sync(kWholeWarp, maximum, offset), __shfl_xor_sync(kWholeWarp, top, offset),
            __shfl_xor_sync(kWholeWarp, rest, offset)};
  }
};

// Together with factors f of the classes: gap is the sum of f * (reference - z), weight that of f.
template <class A>
struct TargetSums {
  LogitSums<A> logits;
  A gap, weight;

  FL_INLINE static TargetSums none() { return {LogitSums<A>::none(), A(0), A(0)}; }
  FL_INLINE void raise(A larger) {
    const A before = logits.reference();
    logits.raise(larger);
    const A step = logits.reference() - before;
    if (step != A(0) && weight != A(0)) gap += step * weight;
  }
  template <int N>
  FL_INLINE void add(const A (&z)[N], const A (&f)[N]) {
    A largest = z[0];
#pragma unroll
    for (int k = 1; k < N; ++k) largest = max_(largest, z[k]);
    raise(largest);
    logits.add(z);
    add_factors(z, f);
  }
  // After the logits of the same classes.
  template <int N>
  FL_INLINE void add_factors(const A (&z)[N], const A (&f)[N]) {
    A gap_part = 0, weight_part = 0;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      gap_part += f[k] * (logits.reference() - z[k]);
      weight_part += f[k];
    }
    gap += gap_part;
    weight += weight_part;
  }
  FL_INLINE void merge(TargetSums other) {
    raise(other.logits.maximum);
    other.raise(logits.maximum);
    logits.merge(other.logits);
    gap += other.gap;
    weight += other.weight;
  }
  FL_INLINE TargetSums from_lane(int offset) const {
    return {logits.from_lane(offset), __shfl_xor_sync(kWholeWarp, gap, offset),
            __shfl_xor_sync(kWholeWarp, weight, offset)};
  }
};

// What a block adds to the loss and to the denominator of its mean.
struct LossSums {
  double loss, weight;

  FL_INLINE void merge(const LossSums& other) { loss += other.loss, weight += other.weight; }
  FL_INLINE LossSums from_lane(int offset) const {
    return {__shfl_xor_sync(kWholeWarp, loss, offset), __shfl_xor_sync(kWholeWarp, weight, offset)};
  }
};

// Where a row starts, in elements. Pointers that were once taken for numbers would no longer be known to be
// global memory: these stay beside them.
struct RowStarts {
  int64_t logits, probabilities, gradient;
};

// Reads one row of a problem. kDense: every class has a factor, by probabilities or by smoothing.
template <class T, bool kDense, class Way>
struct RowReader {
  using A = Accumulate<T>;
  const SoftmaxProblem<T>& p;
  T* gradient_data;  // null in forward
  int64_t gradient_stride;
  RowStarts at{0, 0, 0};
  int64_t head;  // classes before the first pack

  FL_INLINE RowReader(const SoftmaxProblem<T>& problem, int64_t row, T* gradient, const ClassLayout& layout)
      : p(problem), gradient_data(gradient), gradient_stride(layout.classes) {
#pragma unroll 1
    for (int d = p.row_dims - 1; d >= 0; --d) {
      const int64_t i = d > 0 ? split(row, p.row_sizes[d]) : row;
      at.logits += i * p.logits_layout.rows[d];
      at.probabilities += i * p.probabilities_layout.rows[d];
      at.gradient += i * layout.rows[d];
    }
    const auto misaligned = misalignment(p.logits, at.logits);
    const bool agrees = agrees_with(misaligned, p.probabilities, at.probabilities) &&
                        agrees_with(misaligned, gradient, at.gradient);
    const int64_t skipped =
        misaligned == 0 ? 0 : static_cast<int64_t>((kWideAccess - misaligned) / sizeof(T));
    head = agrees && skipped < p.classes ? skipped : p.classes;
  }

  FL_INLINE static uintptr_t misalignment(const T* data, int64_t start) {
    return (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(start) * sizeof(T)) % kWideAccess;
  }
  FL_INLINE static bool agrees_with(uintptr_t misaligned, const T* data, int64_t start) {
    return data == nullptr || misalignment(data, start) == misaligned;
  }

  template <class Body>
  FL_INLINE void for_each(Body&& body) const {
    Way::for_each(head, p.classes, body);
  }
  template <int N>
  FL_INLINE void store(const A (&gradient)[N], int64_t c) const {
    Way::store(gradient, gradient_data + at.gradient, c, gradient_stride);
  }
  template <int N>
  FL_INLINE void transform(A (&z)[N]) const {
    if (!p.transforms) return;
    const LogitTransform<A> f{p.softcap, p.temperature};
#pragma unroll
    for (int k = 0; k < N; ++k) z[k] = f(z[k]);
  }
  template <int N>
  FL_INLINE void logits(int64_t c, A (&z)[N]) const {
    Way::load(p.logits + at.logits, c, p.logits_layout.classes, z);
    transform(z);
  }
  FL_INLINE A logit(int64_t c) const {
    A z[1] = {static_cast<A>(p.logits[at.logits + c * p.logits_layout.classes])};
    transform(z);
    return z[0];
  }

  // Smoothed probabilities times class weights.
  template <int N>
  FL_INLINE void factors(int64_t c, A (&f)[N]) const {
#pragma unroll
    for (int k = 0; k < N; ++k) f[k] = p.share;
    if (p.probabilities != nullptr) {
      A t[N];
      Way::load(p.probabilities + at.probabilities, c, p.probabilities_layout.classes, t);
#pragma unroll
      for (int k = 0; k < N; ++k) f[k] += t[k] * (A(1) - p.smoothing);
    }
    if (p.class_weight == nullptr) return;
#pragma unroll
    for (int k = 0; k < N; ++k) f[k] *= p.class_weight[c + k];
  }
};

// A row's label: what it says of the row, without touching memory if it is out of range.
template <class T>
struct Label {
  using A = Accumulate<T>;
  int64_t value = -1;  // or no label
  bool is_ignored = false, is_wrong = false;
  A weight = 0;  // of its class, or 1

  FL_INLINE Label(const SoftmaxProblem<T>& p, int64_t row) {
    if (p.labels == nullptr) return;
    value = p.labels[row];
    is_ignored = value == p.ignore_index;
    is_wrong = !is_ignored && (value < 0 || value >= p.classes);
    if (!is_ignored && !is_wrong) weight = p.class_weight == nullptr ? A(1) : p.class_weight[value];
  }
};

template <class T, bool kDense>
using RowSums = std::conditional_t<kDense, TargetSums<Accumulate<T>>, LogitSums<Accumulate<T>>>;

template <class T, bool kDense, class Way>
FL_INLINE Accumulate<T> row_loss(const RowReader<T, kDense, Way>& reader, const Label<T>& label,
                                 const RowSums<T, kDense>& sums, const RowStats<Accumulate<T>>& stats) {
  using A = Accumulate<T>;
  const SoftmaxProblem<T>& p = reader.p;
  if (label.is_wrong) return kNaN<A>;
  A loss = 0;
  if (p.labels != nullptr) {
    loss = (A(1) - p.smoothing) * label.weight * stats.minus_log_probability(reader.logit(label.value));
  }
  if constexpr (kDense) loss += sums.gap + sums.weight * stats.log_sum;
  if (p.z_loss > A(0)) loss += p.z_loss * stats.log_sum_exp() * stats.log_sum_exp();
  return loss;
}

// The only block, or the one that finishes.
template <class T>
FL_INLINE void write_loss(const SoftmaxProblem<T>& p, const SoftmaxLoss<T>& loss, const LossSums& sums) {
  using Loss = SoftmaxLoss<T>;
  double denominator = 1;
  if (loss.reduction == Loss::kMean)
    denominator = p.labels != nullptr ? sums.weight : static_cast<double>(p.rows);
  loss.stats[2 * p.rows] = static_cast<Accumulate<T>>(denominator);
  if (loss.reduction != Loss::kNone) store_one(sums.loss / denominator, loss.data, loss.dtype, 0);
}

template <class T, bool kDense, class Way>
__global__ void __launch_bounds__(kThreads, kDense || sizeof(T) == 8 ? 2 : 5)
    softmax_forward_kernel(const __grid_constant__ SoftmaxProblem<T> p, const SoftmaxLoss<T> loss) {
  using A = Accumulate<T>;
  using Sums = RowSums<T, kDense>;
  LossSums total{0, 0};
  const int64_t tiles = (p.rows + Way::kRows - 1) / Way::kRows;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t row = tile * Way::kRows + Way::row_in_block();
    const bool inside = row < p.rows;
    const Label<T> label(p, inside ? row : 0);
    const RowReader<T, kDense, Way> reader(p, inside ? row : 0, nullptr, {});
    Sums sums = Sums::none();
    if (inside && !label.is_ignored) {
      reader.for_each([&](int64_t c, auto width) {
        A z[decltype(width)::value];
        reader.logits(c, z);
        if constexpr (kDense) {
          A f[decltype(width)::value];
          reader.factors(c, f);
          sums.add(z, f);
        } else {
          sums.add(z);
        }
      });
    }
    sums = Way::reduce(sums);
    if (!inside || Way::lane() != 0) continue;
    RowStats<A> stats{A(0), A(0)};
    A value = 0;
    if (!label.is_ignored) {
      if constexpr (kDense) {
        stats = {sums.logits.maximum, sums.logits.log_sum()};
      } else {
        stats = {sums.maximum, sums.log_sum()};
      }
      value = row_loss(reader, label, sums, stats);
      if (p.sample_weight != nullptr) value *= p.sample_weight[row];
    }
    loss.stats[row] = stats.maximum;
    loss.stats[p.rows + row] = stats.log_sum;
    if (loss.reduction == SoftmaxLoss<T>::kNone) store_one(value, loss.data, loss.dtype, row);
    total.loss += static_cast<double>(value);
    total.weight += static_cast<double>(label.weight);
  }
  total = block_reduce(total);
  if (threadIdx.x > 0) return;
  if (gridDim.x == 1) {
    write_loss(p, loss, total);
  } else {
    loss.partial[2 * blockIdx.x] = total.loss;
    loss.partial[2 * blockIdx.x + 1] = total.weight;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    softmax_finish_kernel(const __grid_constant__ SoftmaxProblem<T> p, const SoftmaxLoss<T> loss, int count) {
  LossSums total{0, 0};
  for (int i = threadIdx.x; i < count; i += kThreads)
    total.merge({loss.partial[2 * i], loss.partial[2 * i + 1]});
  total = block_reduce(total);
  if (threadIdx.x == 0) write_loss(p, loss, total);
}

// The upstream gradient of a row over the denominator, times the row's weight; NaN for a wrong label.
template <class T>
FL_INLINE Accumulate<T> upstream_of(const SoftmaxProblem<T>& p, const SoftmaxGradient<T>& g, int64_t row,
                                    const Label<T>& label) {
  using A = Accumulate<T>;
  A k = load_one<A>(g.upstream, g.upstream_dtype, g.upstream_is_one ? 0 : row) / g.stats[2 * p.rows];
  if (p.sample_weight != nullptr) k *= p.sample_weight[row];
  return label.is_wrong ? kNaN<A> : k;
}

// The sum of a row's factors. Every thread of the block calls this: it has barriers.
template <class T, class Way>
FL_INLINE Accumulate<T> factor_sum(const RowReader<T, true, Way>& reader, bool skips) {
  using A = Accumulate<T>;
  const SoftmaxProblem<T>& p = reader.p;
  if (p.probabilities == nullptr && p.class_weight == nullptr) return p.smoothing;
  Total<A> sum{0};
  if (!skips) {
    reader.for_each([&](int64_t c, auto width) {
      A f[decltype(width)::value], part = 0;
      reader.factors(c, f);
#pragma unroll
      for (const A factor : f) part += factor;
      sum.value += part;
    });
  }
  return Way::reduce(sum).value;
}

// What the gradient of a row's logits is made of: of_others * p, and for its label something that does not
// cancel.
template <class T, bool kDense, class Way>
struct RowGradient {
  using A = Accumulate<T>;
  const RowReader<T, kDense, Way>& reader;
  RowStats<A> stats;
  int64_t label;
  A k, excess, of_label, of_others;

  template <int N>
  FL_INLINE void write(int64_t c) const {
    const SoftmaxProblem<T>& p = reader.p;
    A z[N], gradient[N];
    reader.logits(c, z);
#pragma unroll
    for (int j = 0; j < N; ++j) gradient[j] = of_others * stats.probability(z[j]);
    if (label >= c && label < c + N) {
      const A z_label = element_of(z, label - c);
      replace_element(gradient, label - c, stats.label_gradient(z_label, excess, of_label));
    }
    if constexpr (kDense) {
      A f[N];
      reader.factors(c, f);
#pragma unroll
      for (int j = 0; j < N; ++j) gradient[j] -= k * f[j];
    }
    if (p.transforms) {
      const LogitTransform<A> transform{p.softcap, p.temperature};
#pragma unroll
      for (int j = 0; j < N; ++j) gradient[j] *= transform.derivative(z[j]);
    }
    reader.store(gradient, c);
  }
};

template <class T, bool kDense, class Way>
__global__ void __launch_bounds__(kThreads, 2)
    softmax_backward_kernel(const __grid_constant__ SoftmaxProblem<T> p,
                            const __grid_constant__ SoftmaxGradient<T> g) {
  using A = Accumulate<T>;
  const int64_t tiles = (p.rows + Way::kRows - 1) / Way::kRows;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t row = tile * Way::kRows + Way::row_in_block();
    const bool inside = row < p.rows;
    const Label<T> label(p, inside ? row : 0);
    const RowReader<T, kDense, Way> reader(p, inside ? row : 0, g.data, g.layout);
    A weight = 0;
    if constexpr (kDense) weight = factor_sum<T, Way>(reader, !inside || label.is_ignored);
    if (!inside) continue;
    if (label.is_ignored) {
      reader.for_each([&](int64_t c, auto width) {
        const A zeros[decltype(width)::value] = {};
        reader.store(zeros, c);
      });
      continue;
    }
    const RowStats<A> stats{g.stats[row], g.stats[p.rows + row]};
    const A k = upstream_of(p, g, row, label), of_label = k * (A(1) - p.smoothing) * label.weight;
    const A excess = k * (weight + A(2) * p.z_loss * stats.log_sum_exp());
    const RowGradient<T, kDense, Way> gradient{reader, stats,    label.value,      k,
                                               excess, of_label, excess + of_label};
    reader.for_each([&](int64_t c, auto width) { gradient.template write<decltype(width)::value>(c); });
  }
}

template <class T, class Way>
__global__ void __launch_bounds__(kThreads, 2)
    softmax_target_backward_kernel(const __grid_constant__ SoftmaxProblem<T> p,
                                   const __grid_constant__ SoftmaxGradient<T> g) {
  using A = Accumulate<T>;
  const int64_t tiles = (p.rows + Way::kRows - 1) / Way::kRows;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t row = tile * Way::kRows + Way::row_in_block();
    if (row >= p.rows) continue;
    const RowReader<T, true, Way> reader(p, row, g.data, g.layout);
    const RowStats<A> stats{g.stats[row], g.stats[p.rows + row]};
    const A k = upstream_of(p, g, row, Label<T>(p, row)) * (A(1) - p.smoothing);
    reader.for_each([&](int64_t c, auto width) {
      constexpr int N = decltype(width)::value;
      A z[N], gradient[N];
      reader.logits(c, z);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const A w = p.class_weight == nullptr ? A(1) : p.class_weight[c + j];
        gradient[j] = k * w * stats.minus_log_probability(z[j]);
      }
      reader.store(gradient, c);
    });
  }
}

}  // namespace fused_losses
