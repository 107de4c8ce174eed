// Kernels of the divergences: a block of threads to a pair of rows.
#pragma once
#include "../ops/divergence_names.h"
#include "divergence.h"
#include "softmax.cuh"

namespace fused_losses {

#include "../formulas/divergence.h"

// A sum that keeps what its additions round away: where one class has nearly everything, its gradient is the
// difference of a total and nearly the same, of which one rounding more would be seen.
template <class A>
struct CompensatedSum {
  A sum = 0, lost = 0;

  FL_INLINE void add(A value) {
    const A corrected = value - lost, larger = sum + corrected;
    lost = (larger - sum) - corrected;
    sum = larger;
  }
  FL_INLINE double total() const { return static_cast<double>(sum) - static_cast<double>(lost); }
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

struct PairSums {
  double value, of_student, of_teacher;

  FL_INLINE void merge(const PairSums& other) {
    value += other.value, of_student += other.of_student, of_teacher += other.of_teacher;
  }
  FL_INLINE PairSums from_lane(int offset) const {
    return {__shfl_xor_sync(kWholeWarp, value, offset), __shfl_xor_sync(kWholeWarp, of_student, offset),
            __shfl_xor_sync(kWholeWarp, of_teacher, offset)};
  }
};

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
    const A log_sum_s = of_s.log_sum(), log_sum_t = of_t.log_sum();
    A value = 0;
    CompensatedSum<A> of_student, of_teacher;
    reader.for_each([&](int64_t c, auto width) {
      constexpr int N = decltype(width)::value;
      A s[N], t[N];
      reader.logits(c, s, t);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const auto shares = Shares<A>::of(s[k], t[k], of_s.maximum, log_sum_s, of_t.maximum, log_sum_t);
        const auto terms = F::terms(shares, p.beta);
        value += terms.value;
        of_student.add(terms.of_student);
        of_teacher.add(terms.of_teacher);
      }
    });
    const PairSums sums = block_reduce(PairSums{value, of_student.total(), of_teacher.total()});
    if (threadIdx.x != 0) continue;
    losses[row] = static_cast<A>(sums.value);
    statistics[kStudentMaximum * p.rows + row] = of_s.maximum;
    statistics[kStudentLogSum * p.rows + row] = log_sum_s;
    statistics[kTeacherMaximum * p.rows + row] = of_t.maximum;
    statistics[kTeacherLogSum * p.rows + row] = log_sum_t;
    statistics[kStudentTotal * p.rows + row] = F::student_total(static_cast<A>(sums.of_student));
    statistics[kTeacherTotal * p.rows + row] = F::teacher_total(static_cast<A>(sums.of_teacher));
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
    const A maximum_s = known(kStudentMaximum), log_sum_s = known(kStudentLogSum);
    const A maximum_t = known(kTeacherMaximum), log_sum_t = known(kTeacherLogSum);
    const A total_s = known(kStudentTotal), total_t = known(kTeacherTotal);
    const A upstream = load_one<A>(g.upstream, g.upstream_dtype, row), k = upstream / p.temperature;
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
        const auto shares = Shares<A>::of(s[j], t[j], maximum_s, log_sum_s, maximum_t, log_sum_t);
        const auto terms = F::terms(shares, p.beta);
        s[j] = k * (terms.of_student - shares.s * total_s);
        t[j] = k * (terms.of_teacher - shares.t * total_t);
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
