#pragma once
#include <cstdint>

namespace fused_losses {

// The names of what row_statistics says of a row, and of the coefficients of the row's gradient
// p (excess + entropy log p) + label (p - 1 at the label, else p) - share f.
enum Statistic : int64_t { kMaximum, kLogSum, kLabelLogit, kGap, kMoment, kStatistics };
enum Coefficient : int64_t { kExcess, kLabel, kEntropy, kShare, kCoefficients };

}  // namespace fused_losses
