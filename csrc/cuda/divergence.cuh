// Kernels of the divergences: a block of threads to a pair of rows.
#pragma once
#include "../formulas/divergence_rows.h"
#include "../ops/divergence_names.h"
#include "divergence.h"
#include "softmax.cuh"

namespace fused_losses {

#include "../formulas/divergence.h"

// A sum with what its additions round away, for the means that gradients are differences from.
template <class A>
struct ExactSum {
  A sum = 0, lost = 0;

  FL_INLINE void add(A value) {
    const A larger = sum + value, added = larger - sum;
    lost += (sum - (larger - added)) + (value - added);
    sum = larger;
  }
  FL_INLINE double total() const { return static_cast<double>(sum) + static_cast<double>(lost); }
};

// Where gradients are rounded far more than a sum is.
template <class A>
struct PlainSum {
  A sum = 0;

  FL_INLINE void add(A value) { sum += value; }
  FL_INLINE double total() const { return static_cast<double>(sum); }
};

// Divides by one number: its reciprocal in two parts, the first of them too small, so that infinity meets no
// infinity of the other sign. By powers of two it divides exactly; else a last digit may differ, which is
// rare.
template <class A>
struct Divisor {
  static constexpr A kTooSmall = A(1) - std::numeric_limits<A>::epsilon();
  A high, low;

  FL_INLINE explicit Divisor(A divisor)
      : high(kTooSmall / divisor), low(fma_(-high, divisor, A(1)) / divisor) {}
  FL_INLINE A operator()(A x) const { return fma_(x, high, x * low); }
};

// What a mean is made of: weights times derivatives, and the weights as the gradient has them, not as they
// were summed before the row's maximum was known.
struct MeanSums {
  double terms, weights;

  FL_INLINE void merge(const MeanSums& other) { terms += other.terms, weights += other.weights; }
  FL_INLINE MeanSums from_lane(int offset) const {
    return {__shfl_xor_sync(kWholeWarp, terms, offset), __shfl_xor_sync(kWholeWarp, weights, offset)};
  }
  template <class A>
  FL_INLINE Mean<A> mean() const {
    return mean_of<A>(terms, weights);
  }
};

template <class T>
struct MeanOfThread {
  using A = Accumulate<T>;
  std::conditional_t<sizeof(T) == 2, PlainSum<A>, ExactSum<A>> terms, weights;

  FL_INLINE void add(A term, A weight) { terms.add(term), weights.add(weight); }
  FL_INLINE MeanSums sums() const { return {terms.total(), weights.total()}; }
};

struct PairSums {
  double value;
  MeanSums of_student, of_teacher;

  FL_INLINE void merge(const PairSums& other) {
    value += other.value, of_student.merge(other.of_student), of_teacher.merge(other.of_teacher);
  }
  FL_INLINE PairSums from_lane(int offset) const {
    return {__shfl_xor_sync(kWholeWarp, value, offset), of_student.from_lane(offset),
            of_teacher.from_lane(offset)};
  }
};

template <class A>
FL_INLINE Distribution<A> distribution_of(const LogitSums<A>& sums) {
  return {sums.maximum, sums.top + sums.rest, sums.log_sum()};
}

// Two rows, read in packs where both are aligned alike.
template <class T>
struct PairReader {
  using A = Accumulate<T>;
  using Way = AlongClasses<T, kThreads>;
  const DivergenceProblem<T>& p;
  int64_t student, teacher;  // where the rows start, in elements
  Divisor<A> cooled;
  int64_t head;

  FL_INLINE PairReader(const DivergenceProblem<T>& problem, int64_t row)
      : p(problem), student(row * p.student_stride), teacher(row * p.teacher_stride), cooled(p.temperature) {
    const auto misaligned = misalignment(p.student, student);
    const int64_t skipped =
        misaligned == 0 ? 0 : static_cast<int64_t>((kWideAccess - misaligned) / sizeof(T));
    const bool agrees = misalignment(p.teacher, teacher) == misaligned;
    head = agrees && skipped < p.classes ? skipped : p.classes;
  }

  FL_INLINE static uintptr_t misalignment(const T* data, int64_t start) {
    return (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(start) * sizeof(T)) % kWideAccess;
  }
  // Whether a gradient may be stored in the packs that are read.
  FL_INLINE bool agrees_with(const T* data, int64_t start) const {
    return head == p.classes || misalignment(data, start) == misalignment(p.student, student);
  }
  template <class Body>
  FL_INLINE void for_each(Body&& body) const {
    Way::for_each(head, p.classes, body);
  }
  template <int N>
  FL_INLINE void logits(int64_t c, A (&s)[N], A (&t)[N]) const {
    load(p.student + student + c, s);
    load(p.teacher + teacher + c, t);
#pragma unroll
    for (int k = 0; k < N; ++k) s[k] = cooled(s[k]), t[k] = cooled(t[k]);
  }
};

// Blocks that a multiprocessor holds: what hides the latency of long chains of arithmetic.
template <class T>
constexpr int kDivergenceBlocks = sizeof(T) == 8 ? 2 : 3;

template <class F, class T>
__global__ void __launch_bounds__(kThreads, kDivergenceBlocks<T>)
    divergence_forward_kernel(const __grid_constant__ DivergenceProblem<T> p, Accumulate<T>* losses,
                              Accumulate<T>* statistics) {
  using A = Accumulate<T>;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const PairReader<T> reader(p, row);
    auto of_s = LogitSums<A>::none(), of_t = LogitSums<A>::none();
    reader.for_each([&](int64_t c, auto width) {
      A s[decltype(width)::value], t[decltype(width)::value];
      reader.logits(c, s, t);
      of_s.add(s);
      of_t.add(t);
    });
    of_s = block_reduce(of_s);
    of_t = block_reduce(of_t);
    const PairRow<A> shared{distribution_of(of_s), distribution_of(of_t), p.beta};
    A value = 0;
    MeanOfThread<T> of_student, of_teacher;
    reader.for_each([&](int64_t c, auto width) {
      constexpr int N = decltype(width)::value;
      A s[N], t[N];
      reader.logits(c, s, t);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const auto weights = Weights<A>::of(s[k], t[k], shared);
        const auto terms = F::terms(weights, shared);
        value += terms.value;
        of_student.add(terms.of_student, weights.s);
        of_teacher.add(terms.of_teacher, weights.t);
      }
    });
    const PairSums sums = block_reduce(PairSums{value, of_student.sums(), of_teacher.sums()});
    if (threadIdx.x != 0) continue;
    const auto mean_s = sums.of_student.mean<A>(), mean_t = sums.of_teacher.mean<A>();
    losses[row] = static_cast<A>(sums.value);
    const auto keep = [&](int64_t name, A value) { statistics[name * p.rows + row] = value; };
    keep(kStudentMaximum, shared.student.maximum), keep(kTeacherMaximum, shared.teacher.maximum);
    keep(kStudentSum, shared.student.sum), keep(kTeacherSum, shared.teacher.sum);
    keep(kStudentLogSum, shared.student.log_sum), keep(kTeacherLogSum, shared.teacher.log_sum);
    keep(kStudentMean, mean_s.high), keep(kTeacherMean, mean_t.high);
    keep(kStudentMeanLow, mean_s.low), keep(kTeacherMeanLow, mean_t.low);
  }
}

template <class F, class T>
__global__ void __launch_bounds__(kThreads, kDivergenceBlocks<T>)
    divergence_backward_kernel(const __grid_constant__ DivergenceProblem<T> p,
                               const __grid_constant__ DivergenceGradient<T> g,
                               const Accumulate<T>* statistics) {
  using A = Accumulate<T>;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const PairReader<T> reader(p, row);
    const auto known = [&](int64_t name) { return statistics[name * p.rows + row]; };
    const PairRow<A> shared{{known(kStudentMaximum), known(kStudentSum), known(kStudentLogSum)},
                            {known(kTeacherMaximum), known(kTeacherSum), known(kTeacherLogSum)},
                            p.beta};
    const Mean<A> mean_s{known(kStudentMean), known(kStudentMeanLow)};
    const Mean<A> mean_t{known(kTeacherMean), known(kTeacherMeanLow)};
    const A upstream = load_one<A>(g.upstream, g.upstream_dtype, row), k = upstream / p.temperature;
    const A scale_s = k * shared.student.scale, scale_t = k * shared.teacher.scale;
    const int64_t to_s = row * g.student_stride, to_t = row * g.teacher_stride;
    const bool packs_s = reader.agrees_with(g.student, to_s), packs_t = reader.agrees_with(g.teacher, to_t);
    const auto store_both = [&](int64_t c, const auto& s, const auto& t) {
      if (g.student != nullptr) store_pack(s, g.student + to_s + c, packs_s);
      if (g.teacher != nullptr) store_pack(t, g.teacher + to_t + c, packs_t);
    };
    if (upstream == A(0)) {
      // A row that nobody asks for has a gradient of exactly 0, whatever its logits.
      reader.for_each([&](int64_t c, auto width) {
        const A zeros[decltype(width)::value] = {};
        store_both(c, zeros, zeros);
      });
      continue;
    }
    reader.for_each([&](int64_t c, auto width) {
      constexpr int N = decltype(width)::value;
      A s[N], t[N];
      reader.logits(c, s, t);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const auto weights = Weights<A>::of(s[j], t[j], shared);
        const auto terms = F::terms(weights, shared);
        s[j] = scale_s * from_mean(terms.of_student, weights.s, mean_s);
        t[j] = scale_t * from_mean(terms.of_teacher, weights.t, mean_t);
      }
      store_both(c, s, t);
    });
  }
}

static_assert(sizeof(LogitSums<double>) <= sizeof(PairSums), "one piece of shared memory serves both");

inline int divergence_blocks(int64_t rows, int max_blocks) {
  return static_cast<int>(rows < 1 ? 1 : rows < max_blocks ? rows : max_blocks);
}

template <class T>
cudaError_t divergence_forward(Divergence divergence, const DivergenceProblem<T>& problem,
                               Accumulate<T>* losses, Accumulate<T>* statistics, cudaStream_t stream,
                               int max_blocks) {
  const int blocks = divergence_blocks(problem.rows, max_blocks);
  const size_t shared = block_reduce_bytes<PairSums>;
  switch (divergence) {
#define FL_CASE(F, name)                                                                                   \
  case Divergence::F:                                                                                      \
    return launch(&divergence_forward_kernel<fused_losses::F, T>, blocks, shared, stream, problem, losses, \
                  statistics);
    FL_DIVERGENCES(FL_CASE)
#undef FL_CASE
  }
  return cudaErrorInvalidValue;
}

template <class T>
cudaError_t divergence_backward(Divergence divergence, const DivergenceProblem<T>& problem,
                                const DivergenceGradient<T>& gradient, const Accumulate<T>* statistics,
                                cudaStream_t stream, int max_blocks) {
  const int blocks = divergence_blocks(problem.rows, max_blocks);
  switch (divergence) {
#define FL_CASE(F, name)                                                                                 \
  case Divergence::F:                                                                                    \
    return launch(&divergence_backward_kernel<fused_losses::F, T>, blocks, 0, stream, problem, gradient, \
                  statistics);
    FL_DIVERGENCES(FL_CASE)
#undef FL_CASE
  }
  return cudaErrorInvalidValue;
}

#define FL_INSTANTIATE_DIVERGENCE(T)                                                                  \
  template cudaError_t divergence_forward<T>(Divergence, const DivergenceProblem<T>&, Accumulate<T>*, \
                                             Accumulate<T>*, cudaStream_t, int);                      \
  template cudaError_t divergence_backward<T>(Divergence, const DivergenceProblem<T>&,                \
                                              const DivergenceGradient<T>&, const Accumulate<T>*,     \
                                              cudaStream_t, int);

}  // namespace fused_losses
