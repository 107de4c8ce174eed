// Blocks of the divergences, compiled once per instruction set.

#include "../common/numerics.h"
#include "../formulas/divergence.h"
#include "lanes.h"

namespace {

template <class A>
FL_INLINE Shares<A> shares_of(const PairRow<A>& row, A s, A t) {
  return Shares<A>::of(s, t, row.maximum_s, row.log_sum_s, row.maximum_t, row.log_sum_t);
}

// Through memory: a loop that computes this much and sums at once is not vectorised.
template <class F, class A>
PairSums pair_sums(const A* s, const A* t, const PairRow<A>& row, int64_t n) {
  constexpr int64_t part = 512;
  A values[part], of_student[part], of_teacher[part];
  PairSums sums{0, 0, 0};
  for (int64_t start = 0; start < n; start += part) {
    const int64_t count = n - start < part ? n - start : part;
    const A *s_part = s + start, *t_part = t + start;
    FL_ELEMENTWISE
    for (int64_t i = 0; i < count; ++i) {
      const Terms<A> terms = F::terms(shares_of(row, s_part[i], t_part[i]), row.beta);
      values[i] = terms.value, of_student[i] = terms.of_student, of_teacher[i] = terms.of_teacher;
    }
    sums.value += row_sum(values, count);
    sums.of_student += row_sum(of_student, count), sums.of_teacher += row_sum(of_teacher, count);
  }
  return sums;
}

// k (p f'(p) - p total), with p the student's or the teacher's.
template <class F, bool kOfStudent, class A>
void pair_gradient(const A* s, const A* t, const PairRow<A>& row, A k, A total, int64_t n, A* out) {
  FL_ELEMENTWISE
  for (int64_t i = 0; i < n; ++i) {
    const Shares<A> c = shares_of(row, s[i], t[i]);
    if constexpr (kOfStudent) {
      out[i] = k * fma_(-c.s, total, F::terms(c, row.beta).of_student);
    } else {
      out[i] = k * fma_(-c.t, total, F::terms(c, row.beta).of_teacher);
    }
  }
}

// What the sums of a whole row come to.
template <class F, class A>
void totals(A* of_student, A* of_teacher) {
  *of_student = F::student_total(*of_student);
  *of_teacher = F::teacher_total(*of_teacher);
}

template <class A>
PairFunctions<A> pair_functions(Divergence divergence) {
  switch (divergence) {
#define FL_CASE(F, name) \
  case Divergence::F:    \
    return {pair_sums<F, A>, totals<F, A>, pair_gradient<F, true, A>, pair_gradient<F, false, A>};
    FL_DIVERGENCES(FL_CASE)
#undef FL_CASE
  }
  return {};
}

}  // namespace

inline constexpr DivergenceTable kDivergences = {pair_functions<float>, pair_functions<double>};
