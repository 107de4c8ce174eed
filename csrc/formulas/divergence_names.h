#pragma once

// Every divergence and the name its operator knows it by.
#define FL_DIVERGENCES(X)    \
  X(ForwardKL, "forward_kl") \
  X(ReverseKL, "reverse_kl") \
  X(JensenShannon, "jsd")    \
  X(TotalVariation, "tvd")

namespace fused_losses {

enum class Divergence {
#define FL_NAME(F, name) F,
  FL_DIVERGENCES(FL_NAME)
#undef FL_NAME
};

}  // namespace fused_losses
