// Blocks of the divergences, compiled once per instruction set.

#include "../common/numerics.h"
#include "../formulas/divergence.h"
#include "lanes.h"

namespace {

// Through memory: a loop that computes this much and sums at once is not vectorised.
// The row by value: where stores might change it, no loop is.
template <class F, class A>
PairSums pair_sums(const A* s, const A* t, PairRow<A> row, int64_t n) {
  constexpr int64_t part = 512;
  A values[part], of_student[part], of_teacher[part];
  PairSums sums{0, 0, 0};
  for (int64_t start = 0; start < n; start += part) {
    const int64_t count = n - start < part ? n - start : part;
    const A *s_part = s + start, *t_part = t + start;
    FL_ELEMENTWISE
    for (int64_t i = 0; i < count; ++i) {
      const Terms<A> terms = F::terms(Weights<A>::of(s_part[i], t_part[i], row), row);
      values[i] = terms.value, of_student[i] = terms.of_student, of_teacher[i] = terms.of_teacher;
    }
    sums.value += row_sum(values, count);
    sums.of_student += row_sum_in<double>(of_student, count);
    sums.of_teacher += row_sum_in<double>(of_teacher, count);
  }
  return sums;
}

// k times the gradient of the student's logits or the teacher's.
template <class F, bool kOfStudent, class A>
void pair_gradient(const A* s, const A* t, PairRow<A> row, A k, Mean<A> mean, int64_t n, A* out) {
  const A scale = k * (kOfStudent ? row.student : row.teacher).scale;
  FL_ELEMENTWISE
  for (int64_t i = 0; i < n; ++i) {
    const Weights<A> c = Weights<A>::of(s[i], t[i], row);
    const Terms<A> terms = F::terms(c, row);
    out[i] = scale *
             (kOfStudent ? from_mean(terms.of_student, c.s, mean) : from_mean(terms.of_teacher, c.t, mean));
  }
}

template <class A>
PairFunctions<A> pair_functions(Divergence divergence) {
  switch (divergence) {
#define FL_CASE(F, name) \
  case Divergence::F:    \
    return {pair_sums<F, A>, mean_of<A>, pair_gradient<F, true, A>, pair_gradient<F, false, A>};
    FL_DIVERGENCES(FL_CASE)
#undef FL_CASE
  }
  return {};
}

}  // namespace

inline constexpr DivergenceTable kDivergences = {pair_functions<float>, pair_functions<double>};
