// How far two distributions over classes are from each other, one class at a time. Included like
// common/numerics.h, after it.

// A class: exp(z - maximum) of student and teacher, their weights, and the logarithms of their probabilities.
template <class A>
struct Weights {
  A s, t, log_s, log_t;

  FL_INLINE static Weights of(A z_s, A z_t, const PairRow<A>& row) {
    const A below_s = z_s - row.student.maximum, below_t = z_t - row.teacher.maximum;
    return {exp_nonpositive(below_s), exp_nonpositive(below_t), below_s - row.student.log_sum,
            below_t - row.teacher.log_sum};
  }
};

// A class's value, and its weights times the value's derivatives with respect to the probabilities, the
// student's and the teacher's. Rounded probabilities would not sum to 1, and where one class has nearly
// everything, its gradient would show it.
template <class A>
struct Terms {
  A value, of_student, of_teacher;
};

template <class A>
FL_INLINE Mean<A> mean_of(double terms, double weights) {
  const double mean = terms / weights;
  const A high = static_cast<A>(mean), low = static_cast<A>(mean - static_cast<double>(high));
  return {high, low == low ? low : A(0)};  // nothing is left of infinity
}

// weight (derivative - mean), from the weight times the derivative.
template <class A>
FL_INLINE A from_mean(A term, A weight, const Mean<A>& mean) {
  return fma_(-weight, mean.low, fma_(-weight, mean.high, term));
}

// p log p is 0 at p = 0.
template <class A>
FL_INLINE A times_log(A p, A log_ratio) {
  return p == A(0) ? A(0) : p * log_ratio;
}

// exp(x) - 1 for x <= 0.
template <class A>
FL_INLINE A expm1_nonpositive(A x, A exp_x) {
  return x > A(-0.5) ? expm1_near_zero(x) : exp_x - A(1);
}

// Each has a class's terms.
struct ForwardKL {
  template <class A>
  FL_INLINE static Terms<A> terms(const Weights<A>& c, const PairRow<A>& row) {
    const A of_teacher = times_log(c.t, c.log_t - c.log_s);
    return {of_teacher * row.teacher.scale, -c.t * (row.teacher.scale * row.student.sum), of_teacher};
  }
};

struct ReverseKL {
  template <class A>
  FL_INLINE static Terms<A> terms(const Weights<A>& c, const PairRow<A>& row) {
    const A of_student = times_log(c.s, c.log_s - c.log_t);
    return {of_student * row.student.scale, of_student, -c.s * (row.student.scale * row.teacher.sum)};
  }
};

// Of both to their mixture m = beta t + (1 - beta) s.
struct JensenShannon {
  template <class A>
  FL_INLINE static Terms<A> terms(const Weights<A>& c, const PairRow<A>& row) {
    const A beta = row.beta;
    // log(s / m) and log(t / m), from the difference of the logarithms alone: exact where both underflow, and
    // where both are near 1.
    const A difference = c.log_s - c.log_t, smaller = -abs_(difference), ratio = exp_nonpositive(smaller);
    const bool student_is_larger = difference > A(0);
    const A own = student_is_larger ? A(1) - beta : beta, other = student_is_larger ? beta : A(1) - beta;
    const A below = other * expm1_nonpositive(smaller, ratio);
    const A of_larger = -log_below_one(fma_(other, ratio, own), below), of_smaller = smaller + of_larger;
    const A log_s_m = student_is_larger ? of_larger : of_smaller;
    const A log_t_m = student_is_larger ? of_smaller : of_larger;
    const A of_student = (A(1) - beta) * times_log(c.s, log_s_m), of_teacher = beta * times_log(c.t, log_t_m);
    return {fma_(of_teacher, row.teacher.scale, of_student * row.student.scale), of_student, of_teacher};
  }
};

struct TotalVariation {
  template <class A>
  FL_INLINE static Terms<A> terms(const Weights<A>& c, const PairRow<A>& row) {
    const A s = c.s * row.student.scale, t = c.t * row.teacher.scale;
    const A sign = s > t ? A(0.5) : s < t ? A(-0.5) : A(0);
    // larger - smaller = larger (1 - exp(their logarithms' difference)), where both are near 1, too
    const A smaller = -abs_(c.log_s - c.log_t), larger = s > t ? s : t;
    const A apart = -expm1_nonpositive(smaller, exp_nonpositive(smaller));
    return {A(0.5) * times_log(larger, apart), c.s * sign, -c.t * sign};
  }
};
