#pragma once

namespace fused_losses {

// A row's probabilities: exp(z - maximum) / sum.
template <class A>
struct Distribution {
  A maximum, sum, log_sum;
  A scale = A(1) / sum;
};

// The mean of the derivative over a row, in two parts.
template <class A>
struct Mean {
  A high, low;
};

// What the classes of a pair of rows share. beta is the teacher's weight in a mixture.
template <class A>
struct PairRow {
  Distribution<A> student, teacher;
  A beta;
};

}  // namespace fused_losses
