// How far two distributions over classes are from each other, one class at a time. Included like
// common/numerics.h, after it.

// A class: the probabilities that student and teacher give it, and their logarithms.
template <class A>
struct Shares {
  A s, t, log_s, log_t;

  // From logits, maxima and log-sums.
  FL_INLINE static Shares of(A z_s, A z_t, A maximum_s, A log_sum_s, A maximum_t, A log_sum_t) {
    const A log_s = (z_s - maximum_s) - log_sum_s, log_t = (z_t - maximum_t) - log_sum_t;
    return {exp_nonpositive(log_s), exp_nonpositive(log_t), log_s, log_t};
  }
};

// beta is the teacher's weight in a mixture.
template <class A>
struct Mixture {
  A beta, log_beta, log_rest;
};

// Each has a class's value, and p times the value's derivative with respect to p, for the student's p and the
// teacher's. Constants that a sum over classes cancels are left out. p log p is 0 at p = 0.
template <class A>
FL_INLINE A times_log(A p, A log_ratio) {
  return p == A(0) ? A(0) : p * log_ratio;
}

// What both totals are, given their sums over classes; some are known beforehand.
struct TotalsAreSums {
  template <class A>
  FL_INLINE static A student_total(A sum) {
    return sum;
  }
  template <class A>
  FL_INLINE static A teacher_total(A sum) {
    return sum;
  }
};

struct ForwardKL : TotalsAreSums {
  template <class A>
  FL_INLINE static A student_total(A sum) {
    return sum == sum ? A(-1) : sum;
  }
  template <class A>
  FL_INLINE static A value(const Shares<A>& c, Mixture<A>) {
    return times_log(c.t, c.log_t - c.log_s);
  }
  template <class A>
  FL_INLINE static A of_student(const Shares<A>& c, Mixture<A>) {
    return -c.t;
  }
  template <class A>
  FL_INLINE static A of_teacher(const Shares<A>& c, Mixture<A> m) {
    return value(c, m);
  }
};

struct ReverseKL : TotalsAreSums {
  template <class A>
  FL_INLINE static A teacher_total(A sum) {
    return sum == sum ? A(-1) : sum;
  }
  template <class A>
  FL_INLINE static A value(const Shares<A>& c, Mixture<A>) {
    return times_log(c.s, c.log_s - c.log_t);
  }
  template <class A>
  FL_INLINE static A of_student(const Shares<A>& c, Mixture<A> m) {
    return value(c, m);
  }
  template <class A>
  FL_INLINE static A of_teacher(const Shares<A>& c, Mixture<A>) {
    return -c.s;
  }
};

// Of both to their mixture beta t + (1 - beta) s.
struct JensenShannon : TotalsAreSums {
  // In logarithms: where both probabilities underflow, theirs do not.
  template <class A>
  FL_INLINE static A log_mixture(const Shares<A>& c, Mixture<A> m) {
    const A a = c.log_t + m.log_beta, b = c.log_s + m.log_rest;
    const A larger = a > b ? a : b;
    return larger + log1p_unit(exp_nonpositive(-abs_(a - b)));
  }
  template <class A>
  FL_INLINE static A value(const Shares<A>& c, Mixture<A> m) {
    return of_teacher(c, m) + of_student(c, m);
  }
  template <class A>
  FL_INLINE static A of_student(const Shares<A>& c, Mixture<A> m) {
    return (A(1) - m.beta) * times_log(c.s, c.log_s - log_mixture(c, m));
  }
  template <class A>
  FL_INLINE static A of_teacher(const Shares<A>& c, Mixture<A> m) {
    return m.beta * times_log(c.t, c.log_t - log_mixture(c, m));
  }
};

struct TotalVariation : TotalsAreSums {
  template <class A>
  FL_INLINE static A value(const Shares<A>& c, Mixture<A>) {
    return A(0.5) * abs_(c.s - c.t);
  }
  template <class A>
  FL_INLINE static A of_student(const Shares<A>& c, Mixture<A>) {
    return A(0.5) * c.s * (c.s > c.t ? A(1) : c.s < c.t ? A(-1) : A(0));
  }
  template <class A>
  FL_INLINE static A of_teacher(const Shares<A>& c, Mixture<A>) {
    return A(0.5) * c.t * (c.t > c.s ? A(1) : c.t < c.s ? A(-1) : A(0));
  }
};
