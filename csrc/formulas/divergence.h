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

// Each has a class's value, and p times the value's derivative with respect to p, for the student's p and the
// teacher's. Constants that a sum over classes cancels are left out. p log p is 0 at p = 0. beta is the
// teacher's weight in a mixture.
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
  FL_INLINE static A value(const Shares<A>& c, A) {
    return times_log(c.t, c.log_t - c.log_s);
  }
  template <class A>
  FL_INLINE static A of_student(const Shares<A>& c, A) {
    return -c.t;
  }
  template <class A>
  FL_INLINE static A of_teacher(const Shares<A>& c, A beta) {
    return value(c, beta);
  }
};

struct ReverseKL : TotalsAreSums {
  template <class A>
  FL_INLINE static A teacher_total(A sum) {
    return sum == sum ? A(-1) : sum;
  }
  template <class A>
  FL_INLINE static A value(const Shares<A>& c, A) {
    return times_log(c.s, c.log_s - c.log_t);
  }
  template <class A>
  FL_INLINE static A of_student(const Shares<A>& c, A beta) {
    return value(c, beta);
  }
  template <class A>
  FL_INLINE static A of_teacher(const Shares<A>& c, A) {
    return -c.s;
  }
};

// Of both to their mixture m = beta t + (1 - beta) s.
struct JensenShannon : TotalsAreSums {
  // log(s / m) and log(t / m), from the difference of the logarithms alone: exact where both underflow, and
  // where both are near 1.
  template <class A>
  struct Ratios {
    A of_student, of_teacher;
  };
  template <class A>
  FL_INLINE static Ratios<A> ratios(const Shares<A>& c, A beta) {
    const A difference = c.log_s - c.log_t, smaller = -abs_(difference);
    const bool student_is_larger = difference > A(0);
    const A own = student_is_larger ? A(1) - beta : beta, other = student_is_larger ? beta : A(1) - beta;
    // log(m / larger) = log(own + other exp(smaller)); near 1 as a log1p, for 1 must not hide the rest
    const bool is_near = smaller > A(-0.5);
    const A below = other * expm1_near_zero(smaller), near = A(1) + below;
    const A log_u = log_(is_near ? near : fma_(other, exp_nonpositive(smaller), own));
    const A log1p_below = near == A(1) ? below : log_u * (below / (near - A(1)));
    const A log_m = is_near ? log1p_below : log_u;
    const A of_larger = -log_m, of_smaller = smaller - log_m;
    return {student_is_larger ? of_larger : of_smaller, student_is_larger ? of_smaller : of_larger};
  }
  template <class A>
  FL_INLINE static A value(const Shares<A>& c, A beta) {
    return of_teacher(c, beta) + of_student(c, beta);
  }
  template <class A>
  FL_INLINE static A of_student(const Shares<A>& c, A beta) {
    return (A(1) - beta) * times_log(c.s, ratios(c, beta).of_student);
  }
  template <class A>
  FL_INLINE static A of_teacher(const Shares<A>& c, A beta) {
    return beta * times_log(c.t, ratios(c, beta).of_teacher);
  }
};

struct TotalVariation : TotalsAreSums {
  template <class A>
  FL_INLINE static A value(const Shares<A>& c, A) {
    // larger - smaller = larger (1 - exp(their logarithms' difference)), where both are near 1, too
    const A larger = c.s > c.t ? c.s : c.t;
    return A(0.5) * times_log(larger, -expm1_(-abs_(c.log_s - c.log_t)));
  }
  template <class A>
  FL_INLINE static A of_student(const Shares<A>& c, A) {
    return A(0.5) * c.s * (c.s > c.t ? A(1) : c.s < c.t ? A(-1) : A(0));
  }
  template <class A>
  FL_INLINE static A of_teacher(const Shares<A>& c, A) {
    return A(0.5) * c.t * (c.t > c.s ? A(1) : c.t < c.s ? A(-1) : A(0));
  }
};
