#pragma once

// Every formula and the name its operator knows it by.
#define FL_POINTWISE_FORMULAS(X)        \
  X(MSE, "mse")                         \
  X(L1, "l1")                           \
  X(SmoothL1, "smooth_l1")              \
  X(Huber, "huber")                     \
  X(LogCosh, "log_cosh")                \
  X(Charbonnier, "charbonnier")         \
  X(BCE, "bce")                         \
  X(BCEWithLogits, "bce_with_logits")   \
  X(SigmoidFocal, "sigmoid_focal")      \
  X(SigmoidFocalTwo, "sigmoid_focal_2") \
  X(KLDiv, "kl_div")                    \
  X(KLDivLogTarget, "kl_div_log_target")

namespace fused_losses {

enum class Formula {
#define FL_NAME(F, name) F,
  FL_POINTWISE_FORMULAS(FL_NAME)
#undef FL_NAME
};

}  // namespace fused_losses
