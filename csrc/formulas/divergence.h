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

// A class's value, and p times the value's derivative with respect to p, for the student's p and the
// teacher's. Constants that a sum over classes cancels are left out.
template <class A>
struct Terms {
  A value, of_student, of_teacher;
};

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

// Each has a class's terms. beta is the teacher's weight in a mixture.
struct ForwardKL : TotalsAreSums {
  template <class A>
  FL_INLINE static A student_total(A sum) {
    return sum == sum ? A(-1) : sum;
  }
  template <class A>
  FL_INLINE static Terms<A> terms(const Shares<A>& c, A) {
    const A value = times_log(c.t, c.log_t - c.log_s);
    return {value, -c.t, value};
  }
};

struct ReverseKL : TotalsAreSums {
  template <class A>
  FL_INLINE static A teacher_total(A sum) {
    return sum == sum ? A(-1) : sum;
  }
  template <class A>
  FL_INLINE static Terms<A> terms(const Shares<A>& c, A) {
    const A value = times_log(c.s, c.log_s - c.log_t);
    return {value, value, -c.s};
  }
};

// Of both to their mixture m = beta t + (1 - beta) s.
struct JensenShannon : TotalsAreSums {
  template <class A>
  FL_INLINE static Terms<A> terms(const Shares<A>& c, A beta) {
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
    return {of_teacher + of_student, of_student, of_teacher};
  }
};

struct TotalVariation : TotalsAreSums {
  template <class A>
  FL_INLINE static Terms<A> terms(const Shares<A>& c, A) {
    const A sign = c.s > c.t ? A(0.5) : c.s < c.t ? A(-0.5) : A(0);
    // larger - smaller = larger (1 - exp(their logarithms' difference)), where both are near 1, too
    const A smaller = -abs_(c.log_s - c.log_t), larger = c.s > c.t ? c.s : c.t;
    const A apart = -expm1_nonpositive(smaller, exp_nonpositive(smaller));
    return {A(0.5) * times_log(larger, apart), c.s * sign, -c.t * sign};
  }
};
