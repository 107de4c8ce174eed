// What a softmax loss does to one logit. Included like common/numerics.h, after it.

// z = softcap * tanh(x / softcap) / temperature; softcap 0 is off.
template <class A>
struct LogitTransform {
  A softcap, temperature;

  FL_INLINE A operator()(A x) const {
    return (softcap > A(0) ? softcap * tanh_(x / softcap) : x) / temperature;
  }

  // dz / dx, from z.
  FL_INLINE A derivative(A z) const {
    const A capped = softcap > A(0) ? z * temperature / softcap : A(0);
    return (A(1) - capped * capped) / temperature;
  }
};

// What a row knows of its logits: their maximum and the logarithm of the sum of exp(z - maximum). Their sum
// is the log-sum-exp; apart, they stay exact where logits have a large offset.
template <class A>
struct RowStats {
  A maximum, log_sum;

  FL_INLINE A log_sum_exp() const { return maximum + log_sum; }
  FL_INLINE A minus_log_probability(A z) const { return (maximum - z) + log_sum; }
  FL_INLINE A probability(A z) const { return exp_nonpositive((z - maximum) - log_sum); }

  // excess * p + label * (p - 1), the gradient of a label's logit: p - 1 must not cancel where p is near 1.
  FL_INLINE A label_gradient(A z, A excess, A label) const {
    const A log_probability = (z - maximum) - log_sum;
    return excess * exp_nonpositive(log_probability) + label * expm1_(log_probability);
  }
};

// Adds exp(z - maximum) to a sum in two parts. Logits equal to the maximum are counted apart: added to their
// 1, terms below its rounding would vanish, and with them the loss of a confident row.
template <class A>
FL_INLINE void add_exp(A z, A maximum, A& top, A& rest) {
  const A is_top = z == maximum ? A(1) : A(0);
  top += is_top;
  rest += exp_nonpositive(z - maximum) - is_top;  // 0 at the top, or NaN where the maximum is infinite
}

template <class A>
FL_INLINE A log_of_sum(A top, A rest) {
  return log1p_(rest + (top - A(1)));
}
