// Kernels between two matrix products: a block of threads to a row.
#pragma once
#include "../ops/row_names.h"
#include "linear.h"
#include "softmax_launch.cuh"

namespace fused_losses {

constexpr int64_t kNowhere = INT64_MAX;

// Beside the sums of exponentials: that of exp(z - maximum) (maximum - z), and the first place of the
// maximum.
template <class A>
struct MomentSums {
  TargetSums<A> sums;
  A moment;
  int64_t first;

  FL_INLINE static MomentSums none() { return {TargetSums<A>::none(), A(0), kNowhere}; }
  FL_INLINE void raise(A larger) {
    const A before = sums.logits.maximum, total = sums.logits.top + sums.logits.rest;
    sums.raise(larger);
    if (larger > before) {
      const A step = larger - before, shrunk = exp_nonpositive(-step);
      // A step from the lowest numbers, as masks have them, would overflow before it vanished.
      moment = total > A(0) && shrunk > A(0) ? (moment + step * total) * shrunk : A(0);
    }
  }
  template <int N>
  FL_INLINE void add(const A (&z)[N], int64_t c) {
    A largest = z[0];
#pragma unroll
    for (int k = 1; k < N; ++k) largest = max_(largest, z[k]);
    // Places come in ascending order: an equal maximum only counts where none was found yet.
    if (largest > sums.logits.maximum || first == kNowhere) {
#pragma unroll
      for (int k = N - 1; k >= 0; --k) first = z[k] == largest ? c + k : first;
    }
    raise(largest);
    A rest = 0, part = 0;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const A below = sums.logits.reference() - z[k], e = exp_nonpositive(-below);
      const A is_top = below == A(0) ? A(1) : A(0);
      sums.logits.top += is_top;
      rest += e - is_top;
      part += e > A(0) ? e * below : A(0);
    }
    sums.logits.rest += rest;
    moment += part;
  }
  FL_INLINE void merge(MomentSums other) {
    if (other.sums.logits.maximum > sums.logits.maximum) {
      first = other.first;
    } else if (other.sums.logits.maximum == sums.logits.maximum && other.first < first) {
      first = other.first;
    }
    const A larger = max_(sums.logits.maximum, other.sums.logits.maximum);
    raise(larger);
    other.raise(larger);
    sums.merge(other.sums);
    moment += other.moment;
  }
  FL_INLINE MomentSums from_lane(int offset) const {
    return {sums.from_lane(offset), __shfl_xor_sync(kWholeWarp, moment, offset),
            __shfl_xor_sync(kWholeWarp, first, offset)};
  }
};

template <class T>
using RowWay = AlongClasses<T, kThreads>;

template <class T>
using FactorReader = RowReader<T, true, RowWay<T>>;

template <class T>
FL_INLINE bool is_in_block(const SoftmaxProblem<T>& p, int64_t label) {
  return label >= 0 && label < p.classes;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    row_statistics_kernel(const __grid_constant__ SoftmaxProblem<T> p, Accumulate<T>* statistics,
                          int64_t* prediction) {
  using A = Accumulate<T>;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const FactorReader<T> reader(p, row, nullptr, {});
    auto sums = MomentSums<A>::none();
    reader.for_each([&](int64_t c, auto width) {
      A z[decltype(width)::value];
      reader.logits(c, z);
      sums.add(z, c);
      if (p.class_weight == nullptr) return;
      A f[decltype(width)::value];
      reader.factors(c, f);
      sums.sums.add_factors(z, f);
    });
    sums = RowWay<T>::reduce(sums);
    if (threadIdx.x != 0) continue;
    const LogitSums<A>& logits = sums.sums.logits;
    const int64_t label = p.labels[row];
    statistics[kMaximum * p.rows + row] = logits.maximum;
    statistics[kLogSum * p.rows + row] = logits.log_sum();
    statistics[kLabelLogit * p.rows + row] = is_in_block(p, label) ? reader.logit(label) : A(0);
    statistics[kGap * p.rows + row] = sums.sums.gap;
    statistics[kMoment * p.rows + row] = sums.moment / (logits.top + logits.rest);
    prediction[row] = sums.first < p.classes ? sums.first : 0;
  }
}

// p (excess + entropy log p) + label (p - 1 at the label, else p) - share f
template <class T>
struct RowCoefficients {
  using A = Accumulate<T>;
  A excess, label, entropy, share;

  FL_INLINE RowCoefficients(const A* table, int64_t rows, int64_t row)
      : excess(table[kExcess * rows + row]),
        label(table[kLabel * rows + row]),
        entropy(table[kEntropy * rows + row]),
        share(table[kShare * rows + row]) {}

  FL_INLINE bool are_zero() const {
    return excess == A(0) && label == A(0) && entropy == A(0) && share == A(0);
  }
  FL_INLINE A with_entropy(A p, A log_p) const { return p * (excess + (p > A(0) ? entropy * log_p : A(0))); }
  FL_INLINE A of_others(const RowStats<A>& stats, A z) const {
    const A log_p = (z - stats.maximum) - stats.log_sum, p = exp_nonpositive(log_p);
    return with_entropy(p, log_p) + label * p;
  }
  FL_INLINE A of_label(const RowStats<A>& stats, A z) const {
    const A log_p = (z - stats.maximum) - stats.log_sum;
    return with_entropy(exp_nonpositive(log_p), log_p) + label * expm1_(log_p);
  }
  template <int N>
  FL_INLINE void of_pack(const RowStats<A>& stats, const A (&z)[N], int64_t label_place,
                         A (&gradient)[N]) const {
#pragma unroll
    for (int j = 0; j < N; ++j) gradient[j] = of_others(stats, z[j]);
    if (label_place < 0 || label_place >= N) return;
    replace_element(gradient, label_place, of_label(stats, element_of(z, label_place)));
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    row_gradient_kernel(const __grid_constant__ SoftmaxProblem<T> p, const Accumulate<T>* statistics,
                        const Accumulate<T>* coefficients, T* out) {
  using A = Accumulate<T>;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const FactorReader<T> reader(p, row, out, p.logits_layout);
    const RowCoefficients<T> k(coefficients, p.rows, row);
    const RowStats<A> stats{statistics[kMaximum * p.rows + row], statistics[kLogSum * p.rows + row]};
    const int64_t label = is_in_block(p, p.labels[row]) ? p.labels[row] : kNowhere;
    const bool is_zero = k.are_zero();
    reader.for_each([&](int64_t c, auto width) {
      constexpr int N = decltype(width)::value;
      A gradient[N] = {};
      if (!is_zero) {
        A z[N];
        reader.logits(c, z);
        k.of_pack(stats, z, label - c, gradient);
        if (p.class_weight != nullptr) {
          A f[N];
          reader.factors(c, f);
#pragma unroll
          for (int j = 0; j < N; ++j) gradient[j] -= k.share * f[j];
        }
        if (p.transforms) {
          const LogitTransform<A> transform{p.softcap, p.temperature};
#pragma unroll
          for (int j = 0; j < N; ++j) gradient[j] *= transform.derivative(z[j]);
        }
      }
      reader.store(gradient, c);
    });
  }
}

template <class T>
cudaError_t row_statistics(const SoftmaxProblem<T>& problem, Accumulate<T>* statistics, int64_t* prediction,
                           cudaStream_t stream, int max_blocks) {
  const size_t shared = RowWay<T>::kSharedValues * sizeof(MomentSums<Accumulate<T>>);
  const int blocks = softmax_blocks<RowWay<T>>(problem.rows, max_blocks);
  return launch(&row_statistics_kernel<T>, blocks, shared, stream, problem, statistics, prediction);
}

template <class T>
cudaError_t row_gradient(const SoftmaxProblem<T>& problem, const Accumulate<T>* statistics,
                         const Accumulate<T>* coefficients, T* logits, cudaStream_t stream, int max_blocks) {
  const int blocks = softmax_blocks<RowWay<T>>(problem.rows, max_blocks);
  return launch(&row_gradient_kernel<T>, blocks, 0, stream, problem, statistics, coefficients, logits);
}

#define FL_INSTANTIATE_LINEAR(T)                                                                             \
  template cudaError_t row_statistics<T>(const SoftmaxProblem<T>&, Accumulate<T>*, int64_t*, cudaStream_t,   \
                                         int);                                                               \
  template cudaError_t row_gradient<T>(const SoftmaxProblem<T>&, const Accumulate<T>*, const Accumulate<T>*, \
                                       T*, cudaStream_t, int);

}  // namespace fused_losses
